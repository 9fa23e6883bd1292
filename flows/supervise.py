"""Commands that never outlive whoever asked for them.

DVC runs a stage as its child, and a DVC that is killed leaves that child training: a second `dvc repro` then
starts a second writer in the same directory. So every command runs under a supervisor: a small process in a
session of its own (a Ctrl-C in the terminal does not reach it) that holds the reading end of a pipe. When the
pipe closes, because the caller asked for it or because the caller died, however it died, the supervisor sends
SIGTERM to the whole session, waits while a stage writes its checkpoint, and kills what is left. It does the same with
what a command leaves behind.

This file is both sides: `Crew` is what a flow uses; run as a script it is the supervisor.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

GRACE_SECONDS = 30.0
STOPPED = 128 + signal.SIGTERM
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Crew:
    """The commands of one flow. `run` may be called from several threads; `stop` ends all of them."""

    grace: float = GRACE_SECONDS
    stopped: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)

    def start(
        self, command: list[str], cwd: Path, log: Path, env: dict[str, str], descriptors: tuple[int, ...] = ()
    ) -> subprocess.Popen[bytes]:
        """Start `command` under a supervisor, output appended to `log`; it has these of our open files, too.

        Raises:
            RuntimeError: the crew was stopped already.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        supervisor = [sys.executable, "-P", str(Path(__file__).resolve()), str(self.grace), *command]
        with self._lock, log.open("ab") as output:
            if self.stopped:
                raise RuntimeError("stopped: nothing more is started")
            process = subprocess.Popen(
                supervisor,
                cwd=cwd,
                env=env,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=descriptors,
            )
            self._running.add(process)
        return process

    def run(self, command: list[str], cwd: Path, log: Path, env: dict[str, str]) -> int:
        """Run `command` to its end. Returns its exit code; 128 + N when signal N ended it."""
        return self.wait(self.start(command, cwd, log, env))

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """What `run` returns, of a command that was started."""
        code = process.wait()
        self._forget(process)
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        """End every command and return when none of their processes is left."""
        with self._lock:
            self.stopped = True
            running = list(self._running)
        for process in running:
            _close(process)
        for process in running:
            process.wait()
            self._forget(process)

    def _forget(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            known = process in self._running
            self._running.discard(process)
        if known and process.returncode < 0:  # the supervisor itself was killed: what it watched must not go on
            _signal_session(process.pid, signal.SIGKILL)
        _close(process)


def run_within(seconds: float, command: list[str], cwd: Path, log: Path, env: dict[str, str]) -> int | None:
    """Run one command under a supervisor, output appended to `log`, and stop it when its time is over.

    Returns its exit code, None where it was stopped for that.
    """
    crew, code = Crew(), None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = crew.start(command, cwd, log, env).wait(seconds)
    finally:
        crew.stop()
    return code


def printed(log: Path, begun: int) -> list[str]:
    """The lines of a log from a byte on that are not blank."""
    lines = log.read_bytes()[begun:].decode("utf-8", "replace").splitlines() if log.exists() else []
    return [line for line in lines if line.strip()]


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment for a child that must use the same virtual environment."""
    here = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}", **more}


def detached_environment() -> dict[str, str]:
    """For a child that has a flow run of its own: nothing of the flow run that starts it."""
    return {key: value for key, value in child_environment().items() if not key.startswith("PREFECT__")}


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


def _signal_session(leader: int, number: int, first: int = 0) -> bool:
    """Send a signal to all process groups of a session but its leader's; 0: to none. Returns whether there is any.

    Args:
        first: the group that has it before the others.
    """
    import psutil

    groups = set()
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                groups.add(os.getpgid(process.pid))
    groups.discard(leader)
    for group in sorted(groups, key=lambda one: one != first):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
    return bool(groups)


def supervise(command: list[str], grace: float) -> int:
    """Run `command` until it ends or standard input closes; then nothing of this session is left.

    Returns its exit code, 128 + N when signal N ended it, or `STOPPED` when it was ended on request.
    """
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, frame: asked.append(received))
    _adopt_orphans()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, close_fds=False)
    _close_all_but_standard()  # what `start` gave is the command's alone
    import psutil  # noqa: F401  # now, beside the command: when it is needed it may be too late

    ended = _ending(child.pid)
    while (code := _reap(child.pid)) is None:
        ready, _, _ = select.select([0, *ended], [], [], 0.1)
        if 0 in ready or asked:
            break
    _end_session(child.pid, grace)
    if code is None:
        return STOPPED
    return code if code >= 0 else 128 - code


def _close_all_but_standard() -> None:
    for number in map(int, os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else ()):
        if number > 2:
            with contextlib.suppress(OSError):  # the one that this list was read from
                os.close(number)


def _ending(pid: int) -> list[int]:
    """What is readable as soon as a process has ended; none where the system has no such thing."""
    try:
        return [os.pidfd_open(pid)]
    except (AttributeError, OSError):
        return []


def _adopt_orphans() -> None:
    """Become the parent of grandchildren whose parent ends, so that they can be waited for. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_session(group: int, grace: float) -> None:
    """SIGTERM to all others of this session, `group` first, SIGKILL to those that are left after `grace` seconds."""
    deadline = time.monotonic() + grace
    wanted: int = signal.SIGTERM
    _reap()
    while _signal_session(os.getpid(), wanted, group):
        wanted = signal.SIGKILL if time.monotonic() > deadline else 0  # 0: only ask whether they are there
        time.sleep(0.05)
        _reap()
    _reap()  # what has ended since the last look, which is not counted


def _reap(child: int | None = None) -> int | None:
    """Take leave of children and orphans that have ended. Returns `child`'s exit code if it has; -N by signal N."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == child:
                code = os.waitstatus_to_exitcode(ended[1])
    return code


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[2:], float(sys.argv[1])))
