"""What the files of a project hold, remembered: gigabytes of models whose hash every stage and every run asks for.

By DVC's rule a file is the same while inode, size and time of change are; one that was changed just now is read again
the next time, as it may change once more within the clock's grain. The hashes lie in `.sluice/hashes/`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pipelines.core import artifacts
from pipelines.core.environment import STATE

GRAIN = 2_000_000_000  # nanoseconds: the coarsest clock of a file system in use
FINE_GRAIN = 100_000_000  # of one that tells parts of a second: they follow the kernel's, whose step is 10 ms at most
DEPTH = 2  # parts of a path, as in `artifacts/sft`, below which hashes share a file
LONGEST = 50  # characters of that file's name: what begins alike shares it, too


def content_hash(root: Path, place: Path) -> str:
    """`artifacts.content_hash` of a directory or file; below `root`, of what has changed since it was asked last.

    Raises:
        FileNotFoundError: there is no such place.
    """
    if not place.is_relative_to(root):
        return artifacts.content_hash(place)
    memo = root / STATE / "hashes" / f"{'--'.join(place.relative_to(root).parts[:DEPTH])[:LONGEST]}.json"
    known, found = _read(memo), {}

    def digest(file: Path) -> str:
        asked = time.time_ns()  # before it is read, which of a large file takes longer than the clock's grain
        stat, name = file.stat(), file.relative_to(root).as_posix()
        facts = [stat.st_ino, stat.st_size, stat.st_mtime_ns]
        *before, content = known.get(name) or [None]
        if before != facts:
            content = artifacts.content_hash(file)
            grain = FINE_GRAIN if stat.st_mtime_ns % 1_000_000_000 else GRAIN
            if stat.st_mtime_ns < asked - grain:
                found[name] = [*facts, content]
        return str(content)

    content = artifacts.content_hash(place, digest)
    if found:
        here = {name: facts for name, facts in _read(memo).items() if (root / name).exists()}
        artifacts.write_json(memo, here | found)
    return content


def _read(memo: Path) -> dict[str, list[Any]]:
    """What is remembered; nothing where the file is absent, or is not ours."""
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return known if isinstance(known, dict) and all(isinstance(facts, list) for facts in known.values()) else {}
