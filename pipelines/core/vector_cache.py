"""What an index costs most to make, kept by what it was made of: vectors by their text, spans by their document.

A folder beside the builds. Files are written aside and renamed, so a build that is killed leaves whole ones behind, and
the next one goes on from them. A file that cannot be read is made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.core import artifacts

KEY = 16  # bytes of a SHA-256
LEFT_OVER = 1.0  # vectors kept that the latest build did not use, as a share of those that it did


def key(*parts: str) -> bytes:
    """Of texts: what stands for them."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()[:KEY]


class VectorCache:
    """Vectors of one embedder in one precision, as float16. `folder` None: nothing is kept."""

    def __init__(self, folder: Path | None, embedder: str, dimensions: int) -> None:
        self.place = folder / f"vectors-{hashlib.sha256(embedder.encode()).hexdigest()[:16]}" if folder else None
        self.kind = np.dtype([("key", "u1", (KEY,)), ("vector", "f2", (dimensions,))])
        self.known: dict[bytes, NDArray[np.float16]] = {}
        for path in sorted(self.place.glob("*.npy")) if self.place else ():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            rows = np.load(path)
        except (OSError, ValueError, EOFError, TokenError):  # the last is numpy's, of a broken header
            rows = np.zeros(0)
        if rows.dtype != self.kind:
            path.unlink()
            return
        keys = rows["key"].tobytes()
        self.known |= {keys[at * KEY : (at + 1) * KEY]: vector for at, vector in enumerate(rows["vector"])}

    def add(self, keys: Sequence[bytes], vectors: NDArray[np.floating[Any]]) -> None:
        """Keep vectors, on the disk at once."""
        rows = self._rows(keys, vectors)
        self.known |= dict(zip(keys, rows["vector"], strict=True))
        if self.place:
            self._write(self.place / f"{key(*(one.hex() for one in keys)).hex()}.npy", rows)

    def tidy(self, used: Sequence[bytes]) -> None:
        """Put everything into one file; what the latest build did not use goes where it would be the larger part."""
        if self.place is None:
            return
        needed = set(used)
        others = [one for one in self.known if one not in needed]
        kept = sorted(needed) + (others if len(others) <= LEFT_OVER * len(needed) else [])
        old = set(self.place.glob("*.npy"))
        vectors = np.array([self.known[one] for one in kept], np.float16).reshape(len(kept), -1)
        whole = self.place / f"{key(*(one.hex() for one in kept)).hex()}.npy"
        if whole not in old:
            self._write(whole, self._rows(kept, vectors))
        for path in old - {whole}:
            path.unlink()

    def _rows(self, keys: Sequence[bytes], vectors: NDArray[np.floating[Any]]) -> NDArray[np.void]:
        rows = np.zeros(len(keys), self.kind)
        rows["key"] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY)
        rows["vector"] = vectors.reshape(rows["vector"].shape)
        return rows

    def _write(self, path: Path, rows: NDArray[np.void]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".partial")
        with draft.open("wb") as file:
            np.save(file, rows)
        draft.replace(path)


class SpanCache:
    """Chunks of documents under one chunker, as lists that JSON holds. `folder` None: nothing is kept."""

    def __init__(self, folder: Path | None, chunker: str) -> None:
        self.place = folder / f"spans-{hashlib.sha256(chunker.encode()).hexdigest()[:16]}.json" if folder else None
        self.known: dict[str, list[Any]] = {}
        if self.place and self.place.exists():
            try:
                self.known = json.loads(self.place.read_text(encoding="utf-8"))
            except ValueError:
                self.place.unlink()

    def keep(self, spans: dict[str, list[Any]]) -> None:
        """Keep these, and only these: they are quickly made again."""
        if self.place and spans != self.known:
            artifacts.write_text(self.place, json.dumps(spans, ensure_ascii=False))
