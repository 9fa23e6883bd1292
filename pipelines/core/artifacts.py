"""Artifact directories: written beside their place, moved in whole, named by the hash of their content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def published(place: Path) -> Iterator[Path]:
    """A fresh directory that becomes `place` when the block ends well, and vanishes when it does not.

    A reader of `place` sees the old directory or the new one, never half of either. The directory that is
    filled carries a name of its own, so what an earlier, killed run left behind is removed first.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        sync_tree(draft)
        if place.exists():
            old = place.with_name(f".{place.name}.replaced")
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
            draft.rename(place)
            shutil.rmtree(old)
        else:
            draft.rename(place)
        sync(place.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, finds the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(place: Path, of_file: Callable[[Path], str] = file_hash) -> str:
    """SHA-256 over the sorted relative names and contents of a directory's files, or over one file.

    The same bytes give the same hash wherever they lie.

    Args:
        of_file: `file_hash`, or what remembers it.
    """
    if place.is_file():
        return of_file(place)
    digest = hashlib.sha256()
    for path in sorted(p for p in place.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(place).as_posix()}\0{of_file(path)}\n".encode())
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush one file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(place: Path) -> None:
    """Flush every file below a directory, then the directories."""
    for path in sorted(place.rglob("*"), reverse=True):
        sync(path)
    sync(place)
