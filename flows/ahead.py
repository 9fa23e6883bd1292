"""DVC's commands, each by a process whose imports are done.

`dvc` imports for a second before it looks at anything, and a flow calls it once for each stage. So one process imports
ahead, while the flow asks what is stale, and then forks itself for each command.

This file is both sides: `Ahead` is what a flow uses; run as a script it is the process that forks.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from flows.supervise import Crew

LONGEST = 65_536  # bytes of an order
KILLED = 128 + signal.SIGKILL


@dataclass
class Ahead:
    """DVC in one repository. `run` may be called from several threads; `close` when none runs any more."""

    crew: Crew
    root: Path
    log: Path  # what the process says before it knows a command
    env: dict[str, str]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _origin: tuple[subprocess.Popen[bytes], socket.socket] | None = None  # that forks, and how it is told

    def prepare(self) -> None:
        """Start the process, if there is none.

        Raises:
            RuntimeError: the crew was stopped already.
        """
        with self._lock:
            self._origin = self._origin or self._start()

    def run(self, arguments: list[str], log: Path) -> int:
        """`dvc` with these arguments, output appended to `log`. Returns its exit code; `KILLED` when a signal ended it.

        Raises:
            RuntimeError: the crew was stopped already.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        answer, theirs = os.pipe()
        with open(answer, encoding="utf-8") as told:
            try:
                self._order(json.dumps({"arguments": arguments, "log": str(log)}).encode(), theirs)
            finally:
                os.close(theirs)
            return int(told.read() or KILLED)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _order(self, order: bytes, answer: int) -> None:
        """Have a command done; the process that does it holds `answer` until it ends."""
        with self._lock:
            self._origin = self._origin or self._start()
            try:
                socket.send_fds(self._origin[1], [order], [answer])
            except OSError:  # it was killed
                self._end()
                self._origin = self._start()
                socket.send_fds(self._origin[1], [order], [answer])

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                command = [sys.executable, "-P", str(Path(__file__).resolve()), str(theirs.fileno())]
                return self.crew.start(command, self.root, self.log, self.env, (theirs.fileno(),)), ours
            except BaseException:
                ours.close()
                raise

    def _end(self) -> None:
        origin, self._origin = self._origin, None
        if origin:
            origin[1].close()
            self.crew.wait(origin[0])


def serve(orders: socket.socket) -> None:
    """Import what `dvc repro` needs, then fork for each order until no more can come."""
    # What DVC imports only once it is at work
    import dvc.repo.reproduce  # noqa: F401
    import dvc.rwlock  # noqa: F401
    import ruamel.yaml  # noqa: F401
    import scmrepo.git  # noqa: F401
    from dvc.cli import parser

    parser.get_main_parser()  # all commands
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever gave the order is told by the process itself
    while True:
        order, descriptors, _, _ = socket.recv_fds(orders, LONGEST, 1)
        if not order:
            return
        (answer,) = descriptors
        if os.fork() == 0:
            orders.close()
            _obey(json.loads(order), answer)
        os.close(answer)


def _obey(order: dict[str, str], answer: int) -> NoReturn:
    from dvc.cli import main

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.argv = ["dvc", *order["arguments"]]  # DVC writes it into its lock file
    code = 255
    try:
        code = int(main(sys.argv[1:]))
    except BaseException:
        traceback.print_exc()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(answer, str(code).encode())
    os._exit(code)  # as multiprocessing does: to take all objects apart, of which nobody needs one, takes .2 s


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
