"""DVC's commands, each by a process that was started ahead.

`dvc` imports for a second before it looks at anything, and a flow calls it once for each stage. So while one stage
runs, the process that is to run the next waits on a pipe, its imports done.

This file is both sides: `Ahead` is what a flow uses; run as a script it is the process that waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flows.supervise import Crew


@dataclass
class Ahead:
    """DVC in one repository. `run` may be called from several threads; `close` ends the process that still waits."""

    crew: Crew
    root: Path
    log: Path  # what a process says before it knows its command
    env: dict[str, str]
    expected: int  # commands still to come; more may, which then wait for their imports
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _waiting: tuple[subprocess.Popen[bytes], int] | None = None  # and the pipe by which it is told

    def prepare(self) -> None:
        """Start a process for the next command, if one is expected and none waits.

        Raises:
            RuntimeError: the crew was stopped already.
        """
        with self._lock:
            if self._waiting is None and self.expected > 0:
                self._waiting = self._start()

    def run(self, arguments: list[str], log: Path) -> int:
        """`dvc` with these arguments, output appended to `log`. Returns its exit code; 128 + N when signal N ended it.

        Raises:
            RuntimeError: the crew was stopped already.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        order = json.dumps({"arguments": arguments, "log": str(log)}).encode()
        with self._lock:
            self.expected -= 1
            waiting, self._waiting = self._waiting, None
        process = self._tell(waiting, order) if waiting else None
        if process is None:  # none waited, or it was killed
            process = self._tell(self._start(), order)
            assert process is not None
        with contextlib.suppress(RuntimeError):  # a crew that is stopped ends this one, too
            self.prepare()
        return self.crew.wait(process)

    def close(self) -> None:
        """End the process that waits, if one does."""
        with self._lock:
            waiting, self._waiting, self.expected = self._waiting, None, 0
        if waiting:
            os.close(waiting[1])
            self.crew.wait(waiting[0])

    def _start(self) -> tuple[subprocess.Popen[bytes], int]:
        theirs, ours = os.pipe()
        try:
            command = [sys.executable, "-P", str(Path(__file__).resolve()), "dvc", str(theirs)]
            return self.crew.start(command, self.root, self.log, self.env, (theirs,)), ours
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)

    def _tell(self, waiting: tuple[subprocess.Popen[bytes], int], order: bytes) -> subprocess.Popen[bytes] | None:
        """Give a process its command. Returns it, or None if it is there no more."""
        process, pipe = waiting
        try:
            if process.poll() is None:
                os.write(pipe, order)
                return process
        except BrokenPipeError:
            pass
        finally:
            os.close(pipe)
        self.crew.wait(process)
        return None


def wait(pipe: int) -> int:
    """Import what `dvc repro` needs, wait for a command, and do it. Returns its exit code, 0 if none came."""
    # What DVC imports only once it is at work
    import dvc.repo.reproduce  # noqa: F401
    import dvc.rwlock  # noqa: F401
    import ruamel.yaml  # noqa: F401
    import scmrepo.git  # noqa: F401
    from dvc.cli import main, parser

    parser.get_main_parser()  # all commands
    with open(pipe, encoding="utf-8") as told:
        order = told.read()
    if not order:
        return 0
    asked = json.loads(order)
    log = os.open(asked["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.argv = ["dvc", *asked["arguments"]]  # DVC writes it into its lock file
    return int(main(asked["arguments"]))


if __name__ == "__main__":
    sys.exit(wait(int(sys.argv[2])))
