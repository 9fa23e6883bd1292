"""A command of DVC is done by a process that was forked for it, and none goes on longer than its flow."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import fake_repository as fake
import psutil
import pytest
from processes import exists

from flows.ahead import FAILED, KILLED, Ahead
from flows.supervise import Crew


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return fake.make(tmp_path / "repository")


@pytest.fixture
def dvc(root: Path, tmp_path: Path) -> Iterator[Ahead]:
    env = fake.environment(root, tmp_path / "prefect")
    made = Ahead(Crew(grace=2.0), root, tmp_path / "dvc.log", env)
    yield made
    made.crew.stop()
    made.close()


def origin(dvc: Ahead) -> psutil.Process:
    """The process that forks, below its supervisor."""
    assert dvc._origin is not None
    supervisor = psutil.Process(dvc._origin[0].pid)
    while not supervisor.children():
        assert dvc._origin[0].poll() is None
        time.sleep(0.05)
    return supervisor.children()[0]


def at_work(dvc: Ahead, log: Path, pool: ThreadPoolExecutor) -> tuple[Future[int], psutil.Process]:
    """A command whose stage sleeps, and takes a second to end well; and the stage's process."""
    (dvc.root / "behaviour/data").write_text("careful 60")
    told = pool.submit(dvc.run, ["repro", "-s", "data"], log)
    pid = dvc.root / "data.pid"
    while not (pid.exists() and pid.read_text()):
        assert not told.done(), log.read_text()
        time.sleep(0.05)
    return told, psutil.Process(int(pid.read_text()))


def test_each_command_has_a_process_and_a_log_of_its_own(dvc: Ahead, tmp_path: Path) -> None:
    dvc.prepare()
    first = origin(dvc)
    assert dvc.run(["repro", "-s", "data"], tmp_path / "first.log") == 0
    assert "hello from data" in (tmp_path / "first.log").read_text() and fake.ran(dvc.root) == ["data"]
    assert dvc.run(["repro", "-s", "nothing"], tmp_path / "second.log") != 0
    assert "nothing" in (tmp_path / "second.log").read_text() and not (tmp_path / "dvc.log").read_text()
    with ThreadPoolExecutor() as pool:
        logs = [tmp_path / f"{number}.log" for number in range(4)]
        assert list(pool.map(lambda log: dvc.run(["root"], log), logs)) == [0, 0, 0, 0]
    assert [log.read_text() for log in logs] == [".\n"] * 4
    psutil.wait_procs(first.children(), timeout=10)
    assert origin(dvc) == first and not first.children(), "what has ended is not left as a zombie"


def test_one_that_was_killed_while_it_waited_is_replaced(dvc: Ahead, tmp_path: Path) -> None:
    dvc.prepare()
    assert dvc._origin is not None
    supervisor = dvc._origin[0]
    origin(dvc).send_signal(signal.SIGKILL)
    supervisor.wait(10)
    assert dvc.run(["root"], tmp_path / "log") == 0
    assert (tmp_path / "log").read_text() == ".\n"


def ended_well(dvc: Ahead, stage: psutil.Process) -> bool:
    """Whether a stage is gone that was asked once, and had the time it takes."""
    asked, saved = dvc.root / "data.terms", dvc.root / "data.saved"
    return not exists(stage.pid) and asked.read_text() == "TERM\n" and saved.exists()


@pytest.mark.parametrize(("victim", "code"), [("dvc", KILLED), ("shell", FAILED)])
def test_a_killed_command_is_told_with_its_stage_and_the_next_one_is_done(
    dvc: Ahead, tmp_path: Path, victim: str, code: int
) -> None:
    shell = tmp_path / "shell"  # some replace themselves by their last command; this one stays
    shell.write_text('#!/bin/sh\n/bin/sh "$@"\nexit $?\n')
    shell.chmod(0o755)
    dvc.env["SHELL"] = str(shell)
    with ThreadPoolExecutor() as pool:
        told, stage = at_work(dvc, tmp_path / "log", pool)
        first = origin(dvc)
        (command,) = first.children()[0].children()  # below the one that watches over it
        (command if victim == "dvc" else command.children()[0]).kill()
        assert told.result(10) == code and ended_well(dvc, stage)
    assert dvc.run(["root"], tmp_path / "next") == 0 and origin(dvc) == first


@pytest.mark.parametrize("victim", ["origin", "supervisor"])
def test_with_the_process_that_forks_its_commands_end(dvc: Ahead, tmp_path: Path, victim: str) -> None:
    with ThreadPoolExecutor() as pool:
        told, stage = at_work(dvc, tmp_path / "log", pool)
        process = origin(dvc)
        (process if victim == "origin" else process.parent()).kill()
        assert told.result(10) == KILLED
    while exists(stage.pid):
        time.sleep(0.05)
    assert victim == "supervisor" or ended_well(dvc, stage)
    assert dvc.run(["root"], tmp_path / "next") == 0, "a new one is started"


def test_where_dvc_cannot_be_imported_its_log_says_so(dvc: Ahead, tmp_path: Path) -> None:
    (tmp_path / "dvc.py").write_text("raise ImportError('a broken installation')")
    dvc.env["PYTHONPATH"] = str(tmp_path)
    assert dvc.run(["root"], tmp_path / "log") == FAILED
    assert "a broken installation" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("how", ["close", "stop"])
def test_it_waits_no_longer_than_its_flow(dvc: Ahead, how: str) -> None:
    dvc.prepare()
    last, told = origin(dvc), dvc._origin[1].fileno() if dvc._origin else -1
    if how == "stop":
        dvc.crew.stop()
    dvc.close()
    assert not exists(last.pid) and dvc._origin is None
    with pytest.raises(OSError):
        os.fstat(told)


def test_a_flow_that_is_stopped_ends_its_commands_and_begins_no_more(dvc: Ahead, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        told, stage = at_work(dvc, tmp_path / "log", pool)
        dvc.crew.stop()
        assert told.result(10) == KILLED and ended_well(dvc, stage)
    dvc.close()
    with pytest.raises(RuntimeError, match="stopped"):
        dvc.run(["root"], tmp_path / "log")
