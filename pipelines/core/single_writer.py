"""One process at a time makes a stage of a folder. A `dvc repro` that is killed leaves its trainer running, and DVC
starts another beside it: the two would fill one directory, and the older params could be published last.

The lock, `.sluice/live/NAME.lock`, ends with the process that holds it, so that nothing a kill leaves behind can lie.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.core.context import Stopped
from pipelines.core.environment import STATE
from pipelines.core.errors import UserError

PATIENCE_SECONDS = 15.0  # one that was told to stop is gone by then


@contextmanager
def of_stage(root: Path, stage: str) -> Iterator[None]:
    """Be the one process that makes the stage, while the block runs. Of several that torchrun started, the first asks.

    Raises:
        UserError: another process has been at it for longer than `PATIENCE_SECONDS`.
        Stopped: Ctrl-C, in that time.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    place = root / STATE / "live" / f"{stage}.lock"
    place.parent.mkdir(parents=True, exist_ok=True)
    # A child must not inherit the lock: it would hold it on.
    descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not _taken(descriptor):
            _wait(descriptor, stage)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _wait(descriptor: int, stage: str) -> None:
    """Take the lock when its holder leaves it, see `of_stage`."""
    holder = os.pread(descriptor, 32, 0).decode()
    print(f"{stage}: waiting for process {holder}, which is making it here", file=sys.stderr, flush=True)
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        while not _taken(descriptor):
            if time.monotonic() > deadline:
                holder = os.pread(descriptor, 32, 0).decode()
                raise UserError(
                    f"{stage} is being made here by process {holder}, perhaps of a `dvc repro` that was killed. "
                    f"Wait for it, or stop it (kill {holder}), and run again."
                )
            time.sleep(0.1)
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT) from None


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
