"""DVC's commands, each by a process whose imports are done.

`dvc` imports for a second before it looks at anything, and a flow calls it once for each stage. So one process imports
once, and forks itself for each command.

This file is both sides: `Ahead` is what a flow uses; run as a script it is the process that forks, the origin.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from flows.supervise import Crew

LONGEST = 65_536  # bytes of an order
LOOK_SECONDS = 0.5  # between two looks at whether the origin's supervisor is there
FAILED, KILLED = 255, 128 + signal.SIGKILL  # the first as DVC has it
BEGUN = b"begun "  # and behind it the exit code, when there is one


@dataclass
class Ahead:
    """DVC in one repository. `run` may be called from several threads; `close` when none runs any more."""

    crew: Crew
    root: Path
    log: Path  # what the origin says, which knows no command
    env: dict[str, str]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _origin: tuple[subprocess.Popen[bytes], socket.socket] | None = None  # and how it is told

    def prepare(self) -> None:
        """Start the origin, if there is none.

        Raises:
            RuntimeError: the crew was stopped already.
        """
        with self._lock:
            self._origin = self._origin or self._start()

    def run(self, arguments: list[str], log: Path) -> int:
        """`dvc` with these arguments, output appended to `log`. Returns its exit code; 128 + N when signal N ended it.

        Raises:
            RuntimeError: the crew was stopped already.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        told, answer = os.pipe()
        try:
            try:
                origin = self._order(json.dumps({"arguments": arguments, "log": str(log)}).encode(), answer)
            finally:
                os.close(answer)
            said = self._listen(told, origin)
        finally:
            os.close(told)
        if said == BEGUN:
            return KILLED
        if said:
            return int(said.removeprefix(BEGUN))
        if self.crew.wait(origin) > 128:  # what came before the order was taken
            return KILLED
        with log.open("a", encoding="utf-8") as file:
            file.write(self.log.read_text(encoding="utf-8", errors="replace"))
        return FAILED

    def close(self) -> None:
        """End the origin."""
        with self._lock:
            self._end()

    def _order(self, order: bytes, answer: int) -> subprocess.Popen[bytes]:
        """Have a command done, by a process that holds `answer` until it ends. Returns the origin."""
        with self._lock:
            if self._origin and self._origin[0].poll() is not None:  # its supervisor was killed
                self._end()
            self._origin = self._origin or self._start()
            try:
                socket.send_fds(self._origin[1], [order], [answer])
            except OSError:  # it was killed
                self._end()
                self._origin = self._start()
                socket.send_fds(self._origin[1], [order], [answer])
            return self._origin[0]

    def _listen(self, told: int, origin: subprocess.Popen[bytes]) -> bytes:
        """What a command says until it has ended. Where the origin's supervisor is killed, all that it began ends."""
        said = b""
        while True:
            if select.select([told], [], [], LOOK_SECONDS)[0]:
                part = os.read(told, 64)
                if not part:
                    return said
                said += part
            elif origin.poll() is not None:
                self.crew.wait(origin)

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                told = ["dvc", str(self.crew.grace), str(theirs.fileno())]
                command = [sys.executable, "-P", str(Path(__file__).resolve()), *told]
                return self.crew.start(command, self.root, self.log, self.env, (theirs.fileno(),)), ours
            except BaseException:
                ours.close()
                raise

    def _end(self) -> None:
        origin, self._origin = self._origin, None
        if origin:
            origin[1].close()
            self.crew.wait(origin[0])


def serve(orders: socket.socket, grace: float) -> None:
    """Import what `dvc repro` needs, then fork for each order until no more can come.

    Args:
        grace: seconds that a stage has for its checkpoint whose command has ended before it.
    """
    # What DVC imports only once it is at work
    import dvc.repo.reproduce  # noqa: F401
    import dvc.rwlock  # noqa: F401
    import ruamel.yaml  # noqa: F401
    import scmrepo.git  # noqa: F401
    from dvc.cli import parser

    parser.get_main_parser()  # all commands
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever gave the order is told by the one that watches over it
    while True:
        # One order at a time: what brings a descriptor along is not joined with what follows
        order, descriptors, _, _ = socket.recv_fds(orders, LONGEST, 1)
        if not order:
            return
        (answer,) = descriptors
        os.write(answer, BEGUN)
        if _forked(answer):
            orders.close()
            _watch(json.loads(order), answer, grace)
        os.close(answer)


def _forked(answer: int) -> bool:
    """Whether this is the new process; where there can be none, that is the answer."""
    try:
        return os.fork() == 0
    except OSError:
        traceback.print_exc()
        os.write(answer, str(FAILED).encode())
        return False


def _watch(order: dict[str, str], answer: int, grace: float) -> NoReturn:
    """Have DVC run in a process group of its own, and answer when nothing of it is left."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if _forked(answer):
        os.close(answer)
        os.setpgid(0, 0)
        _obey(order)
    group, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    _end_group(group, grace)  # where DVC was killed, or the shell between the two, its stage must not go on
    os.write(answer, str(code if code >= 0 else 128 - code).encode())
    os._exit(0)


def _end_group(group: int, grace: float) -> None:
    deadline, wanted = time.monotonic() + grace, int(signal.SIGTERM)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while True:
            os.killpg(group, wanted)
            wanted = signal.SIGKILL if time.monotonic() > deadline else 0
            time.sleep(0.05)


def _obey(order: dict[str, str]) -> NoReturn:
    """Be `dvc`."""
    from dvc.cli import main

    code = FAILED
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        sys.argv = ["dvc", *order["arguments"]]  # DVC writes it into its lock file
        code = int(main(sys.argv[1:]))
        logging.shutdown()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # as multiprocessing does: to take all objects apart, of which nobody needs one, takes .2 s


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[3])), float(sys.argv[2]))
