"""Which runs live: locks that end with the process that holds them, so that nothing a kill leaves behind can lie.

`.sluice/flow.lock` belongs to the flow of a repository, be it the clone or a worktree. In the clone,
`.sluice/worktrees/<name>.lock` belongs to one run, and `.sluice/worktrees/present` to every run together, or alone to
what must not meet any (`sluice gc`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from flows.failures import LockTrouble
from pipelines.core import file_locks
from pipelines.core.environment import STATE
from pipelines.core.errors import UserError

PATIENCE_SECONDS = 1.0  # a look at a lock (`living`) holds it for microseconds


def folder(root: Path) -> Path:
    """Where worktrees and their locks are."""
    return root.resolve() / STATE / "worktrees"


def living(root: Path) -> list[str]:
    """Names of the runs that are going on now."""
    return [path.stem for path in sorted(folder(root).glob("*.lock")) if not _free(path)]


def abandoned(root: Path) -> list[str]:
    """Names of the worktrees that a killed run left behind."""
    if not folder(root).exists():
        return []
    alive = living(root)
    return sorted(path.name for path in folder(root).iterdir() if path.is_dir() and path.name not in alive)


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """One flow at a time in a repository: two would report each other's stages as their own.

    Raises:
        LockTrouble: another flow is running here.
    """
    with file_locks.opened(root / STATE / "flow.lock") as file:
        if not file_locks.taken(file):
            holder = os.pread(file, 32, 0).decode()
            raise LockTrouble(f"another flow is running in {root} (process {holder})")
        os.truncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield


@contextlib.contextmanager
def owned(root: Path, name: str) -> Iterator[None]:
    """Hold the lock of one run.

    Raises:
        UserError: another process holds it.
    """
    place = folder(root) / f"{name}.lock"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        with file_locks.opened(place) as file:
            if file_locks.taken(file):
                # One that was removed between opening and locking guards nothing any more
                if place.exists() and os.fstat(file).st_ino == place.stat().st_ino:
                    try:
                        yield
                    finally:
                        place.unlink()
                    return
            elif time.monotonic() > deadline:
                raise UserError(f"a run named {name} is going on")
        time.sleep(0.05)


@contextlib.contextmanager
def present(root: Path) -> Iterator[None]:
    """Count as a run that is going on; waits while somebody has asked for quiet."""
    with file_locks.opened(folder(root) / "present") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def quiet(root: Path) -> Iterator[None]:
    """Keep every run from starting while the block runs.

    Raises:
        UserError: a run is going on.
    """
    with file_locks.opened(folder(root) / "present") as file:
        if not file_locks.taken(file):
            raise UserError(f"runs are going on ({', '.join(living(root))}): wait for them, or stop them")
        yield


def dvc_at_work(root: Path) -> list[int]:
    """Processes that DVC's own lock file says are at work; what it says of processes that are no more is removed.

    DVC asks whether there is a process of that number. After a reboot, or in a container, there is: another one, which
    did not run yet when the file was last written, and is no DVC (clocks may have been set, that of a file server is
    another one). A file that a crash tore says nothing; DVC would stumble over it.

    Raises:
        LockTrouble: the file is held by another process.
    """
    from dvc.lock import LockError
    from dvc.repo import Repo
    from dvc.rwlock import RWLockFileCorruptedError, RWLockFileFormatError, _edit_rwlock

    with Repo(str(root)) as repo:
        place = Path(repo.tmp_dir) / "rwlock"
        if not place.exists():
            return []
        hardlink = bool(repo.config["core"].get("hardlink_lock", False))
        alive: set[int] = set()
        try:
            with _edit_rwlock(repo.tmp_dir, repo.fs, hardlink) as locks:
                written = place.stat().st_mtime if place.exists() else 0.0  # now that nobody else writes it
                holders = [*locks["write"].values(), *(one for readers in locks["read"].values() for one in readers)]
                alive |= {int(one["pid"]) for one in holders if _lives(int(one["pid"]), written)}
                locks["write"] = {path: one for path, one in locks["write"].items() if int(one["pid"]) in alive}
                left = {path: [o for o in ones if int(o["pid"]) in alive] for path, ones in locks["read"].items()}
                locks["read"] = {path: readers for path, readers in left.items() if readers}
        except (RWLockFileCorruptedError, RWLockFileFormatError):
            place.unlink(missing_ok=True)
        except LockError as error:
            raise LockTrouble(f"DVC's lock file is held by another process: {error}") from None
    return sorted(alive)


def _lives(number: int, moment: float) -> bool:
    """Whether a process lives that was there at a moment (a second more, for clocks that count otherwise) or is DVC."""
    try:
        process = psutil.Process(number)
        begun_before = float(process.create_time()) <= moment + 1.0
        if process.status() == psutil.STATUS_ZOMBIE:  # killed, in a container where nobody asks for what has ended
            return False
        return begun_before or "dvc" in (Path(word).name for word in process.cmdline())
    except psutil.Error:
        return bool(psutil.pid_exists(number))  # another user's, where /proc hides those


def _free(lock: Path) -> bool:
    with file_locks.opened(lock) as file:
        return file_locks.taken(file)
