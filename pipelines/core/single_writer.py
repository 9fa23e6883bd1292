"""One process at a time makes a stage of a folder. A `dvc repro` that is killed leaves its trainer running, and DVC
starts another beside it: the two would fill one directory, and the older params could be published last.

The lock is `.sluice/live/NAME.lock`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.core import file_locks
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
    with file_locks.opened(root / STATE / "live" / f"{stage}.lock") as file:
        if not file_locks.taken(file):
            _wait(file, stage)
        os.truncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield


def _wait(file: int, stage: str) -> None:
    """Take the lock when its holder leaves it, see `of_stage`."""
    holder = os.pread(file, 32, 0).decode()
    print(f"{stage}: waiting for process {holder}, which is making it here", file=sys.stderr, flush=True)
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        while not file_locks.taken(file):
            if time.monotonic() > deadline:
                holder = os.pread(file, 32, 0).decode()
                raise UserError(
                    f"{stage} is being made here by process {holder}, perhaps of a `dvc repro` that was killed. "
                    f"Wait for it, or stop it (kill {holder}), and run again."
                )
            time.sleep(0.1)
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT) from None
