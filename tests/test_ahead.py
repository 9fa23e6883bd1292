"""A command of DVC is done by a process that waited for it, and none waits longer than its flow."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import fake_repository as fake
import psutil
import pytest

from flows.ahead import Ahead
from flows.supervise import Crew


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake.make(tmp_path_factory.mktemp("ahead") / "repository")


@pytest.fixture
def dvc(root: Path, tmp_path: Path) -> Iterator[Ahead]:
    env = fake.environment(root, tmp_path / "prefect")
    made = Ahead(Crew(grace=2.0), root, tmp_path / "dvc.log", env, expected=2)
    yield made
    made.close()


def waiting(dvc: Ahead) -> psutil.Process:
    """The process that waits, below its supervisor."""
    assert dvc._waiting is not None
    supervisor = psutil.Process(dvc._waiting[0].pid)
    while not supervisor.children():
        assert supervisor.is_running()
    return supervisor.children()[0]


def test_each_command_is_done_in_turn_and_no_more_processes_wait_than_commands_come(dvc: Ahead, tmp_path: Path) -> None:
    dvc.prepare()
    first = waiting(dvc)
    assert dvc.run(["repro", "-s", "data"], tmp_path / "first.log") == 0
    assert "hello from data" in (tmp_path / "first.log").read_text() and fake.ran(dvc.root) == ["data"]
    second = waiting(dvc)
    assert second.pid != first.pid and not first.is_running()
    assert dvc.run(["repro", "-s", "nothing"], tmp_path / "second.log") != 0
    assert "nothing" in (tmp_path / "second.log").read_text() and not (tmp_path / "dvc.log").read_text()
    assert dvc._waiting is None
    assert dvc.run(["root"], tmp_path / "third.log") == 0, "one more than was expected"
    assert (tmp_path / "third.log").read_text() == ".\n" and dvc._waiting is None


def test_one_that_was_killed_while_it_waited_is_replaced(dvc: Ahead, tmp_path: Path) -> None:
    dvc.prepare()
    assert dvc._waiting is not None
    supervisor = dvc._waiting[0]
    waiting(dvc).send_signal(signal.SIGKILL)
    supervisor.wait(10)
    assert dvc.run(["root"], tmp_path / "log") == 0
    assert (tmp_path / "log").read_text() == ".\n"


@pytest.mark.parametrize("how", ["close", "stop"])
def test_none_waits_longer_than_its_flow(dvc: Ahead, how: str) -> None:
    dvc.prepare()
    last, pipe = waiting(dvc), dvc._waiting[1] if dvc._waiting else -1
    if how == "stop":
        dvc.crew.stop()
    dvc.close()
    assert not last.is_running() and dvc._waiting is None
    with pytest.raises(OSError):
        os.fstat(pipe)
    dvc.prepare()
    assert dvc._waiting is None, "none is expected any more"


def test_where_the_flow_is_stopped_no_command_begins(dvc: Ahead, tmp_path: Path) -> None:
    dvc.crew.stop()
    with pytest.raises(RuntimeError, match="stopped"):
        dvc.run(["root"], tmp_path / "log")
