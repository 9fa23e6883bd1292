"""The supervisor: a command never outlives whoever asked for it, however that one ended."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from fake_repository import ROOT
from processes import exists

from flows.supervise import STOPPED, Crew, child_environment

# A parent with a child, as DVC has a trainer: the parent dies of SIGTERM at once, the child ignores it if told.
FAMILY = """
import os, pathlib, signal, subprocess, sys, time
if len(sys.argv) > 2:
    if sys.argv[2] == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.argv[2] == "careful":
        def end(*_):
            time.sleep(0.5)
            pathlib.Path(sys.argv[1] + ".saved").write_text("checkpoint")
            sys.exit(143)
        signal.signal(signal.SIGTERM, end)
    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(100)
subprocess.run([sys.executable, __file__, sys.argv[1], os.environ["KIND"]])
"""


@pytest.fixture
def family(tmp_path: Path) -> list[str]:
    (tmp_path / "family.py").write_text(FAMILY)
    return [sys.executable, str(tmp_path / "family.py"), str(tmp_path / "pid")]


def appears(place: Path) -> int:
    for _ in range(200):
        if place.exists() and place.read_text():
            return int(place.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{place} never came")


def is_gone(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not exists(pid):
            return True
        time.sleep(0.05)
    return False


def test_the_exit_code_and_the_output_come_through(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "a.log"
    assert Crew().run(["sh", "-c", "echo out; echo err >&2; exit 7"], tmp_path, log, child_environment()) == 7
    assert log.read_text() == "out\nerr\n"
    assert Crew().run(["sh", "-c", "kill -9 $$"], tmp_path, log, child_environment()) == 128 + signal.SIGKILL


def test_nothing_is_left_of_a_command_that_ends_well(tmp_path: Path) -> None:
    own_group = "python -c 'import os, time; os.setpgid(0, 0); time.sleep(100)'"
    script = f"sleep 100 & echo $! > a; {own_group} & echo $! > b; sleep 1"
    assert Crew(grace=2.0).run(["sh", "-c", script], tmp_path, tmp_path / "log", child_environment()) == 0
    assert is_gone(appears(tmp_path / "a")) and is_gone(appears(tmp_path / "b"))


@pytest.mark.parametrize(("kind", "saved"), [("careful", True), ("stubborn", False)])
def test_stop_gives_time_for_a_checkpoint_and_then_kills_the_whole_family(
    tmp_path: Path, family: list[str], kind: str, saved: bool
) -> None:
    crew = Crew(grace=2.0)
    codes: list[int] = []
    env = child_environment(KIND=kind)
    thread = threading.Thread(target=lambda: codes.append(crew.run(family, tmp_path, tmp_path / "log", env)))
    thread.start()
    grandchild = appears(tmp_path / "pid")
    crew.stop()
    thread.join(5)
    assert codes == [STOPPED]
    assert is_gone(grandchild)
    assert (tmp_path / "pid.saved").exists() == saved
    with pytest.raises(RuntimeError, match="stopped"):
        crew.run(["true"], tmp_path, tmp_path / "log", env)


@pytest.mark.parametrize("victim", ["caller", "caller's group", "supervisor"])
def test_whoever_is_killed_the_grandchild_goes_too(tmp_path: Path, family: list[str], victim: str) -> None:
    caller = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from flows.supervise import Crew, child_environment
Crew(grace=1.0).run(sys.argv[1:], Path.cwd(), Path("log"), child_environment(KIND="plain"))
"""
    command = [sys.executable, "-c", caller, *family]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    grandchild = appears(tmp_path / "pid")
    if victim == "supervisor":
        supervisor = psutil.Process(process.pid).children()[0]
        os.kill(supervisor.pid, signal.SIGKILL)
    elif victim == "caller":
        os.kill(process.pid, signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    assert is_gone(grandchild)
    process.wait(5)
