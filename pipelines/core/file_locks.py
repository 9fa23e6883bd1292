"""Locks on files that end with the process that holds them, so that nothing a kill leaves behind can lie (`flock`)."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def descriptor(place: Path) -> int:
    """A file, made where it is absent, opened so that no child inherits it: the lock must end with this very process.

    Whoever asks closes it.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    return os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


@contextlib.contextmanager
def opened(place: Path) -> Iterator[int]:
    """`descriptor`, closed at the end."""
    file = descriptor(place)
    try:
        yield file
    finally:
        os.close(file)


def taken(file: int) -> bool:
    """Take the lock of an open file for this process alone; False where another one has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
