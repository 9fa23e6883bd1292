"""Training rows that nearly repeat a held-out row: Jaccard similarity of word 5-grams, MinHash LSH, then exact.

MinHash (Broder 1997; `pipelines.core.minhash`) with banding (Leskovec, Rajaraman & Ullman, Mining of Massive Datasets,
ch. 3) proposes pairs, and every pair is then decided by its exact Jaccard similarity, so a row never goes because two
hashes agreed. Grams that a fifth of a table's rows have, such as those of the system message of chats, do not make two
of them alike and are left out. What is known of held-out rows lies in scratch files and is searched block by block:
memory is for the pairs alone.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipelines.core.minhash import Bands, banded, bands_for, grams, sketches, telling
from pipelines.core.scratch import Records

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SLACK = 0.25  # a pair whose sketches agree in less than threshold - SLACK is not looked at again (5 sigma)
BLOCK_ROWS = 1 << 16  # held-out rows searched at a time
SEARCHED_ROWS = 1 << 12  # training rows that are searched for together
BLOCK_PAIRS = 1 << 13  # pairs of sketches compared at a time
SAMPLED_ROWS = 1 << 10  # in which common grams are looked for
COMMON_SHARE, COMMON_ROWS = 0.2, 20  # a gram in so large a share, and in so many, of them is common
HELD_GRAMS = 1 << 20  # of held-out rows, in memory while pairs are decided

Texts = Iterable[tuple["NDArray[np.int64]", list[str]]]  # row numbers and their texts, batch by batch
Read = Callable[["NDArray[np.bool_]"], Texts]


class Pair(NamedTuple):
    """A training row, the held-out row it nearly repeats, and their exact similarity."""

    train: int
    held: int
    similarity: float


class Index:
    """Held-out sketches on disk, found by any band they share: 4 bytes a minimum and 12 a band for each row."""

    def __init__(self, place: Path, bands: Bands, threshold: float) -> None:
        self.bands, self.threshold = bands, threshold
        self.rows = Records(place / "rows", "i8")
        self.minima = Records(place / "minima", [("minima", "u4", bands.bands * bands.rows)])
        self.hashes = [Records(place / f"band-{n}", "u8") for n in range(bands.bands)]
        self.sorted = [Records(place / f"sorted-{n}", [("hash", "u8"), ("place", "u4")]) for n in range(bands.bands)]

    def add(self, rows: NDArray[np.int64], sketch: NDArray[np.uint32]) -> None:
        """Append rows and their sketches."""
        self.rows.append(rows)
        self.minima.append(sketch.reshape(-1).view(self.minima.kind))
        for records, hashed in zip(self.hashes, banded(sketch, self.bands).T, strict=True):
            records.append(hashed)

    def sort(self) -> None:
        """Make ready to be searched: each band's hashes in order, block by block."""
        import numpy as np

        for hashes, ordered in zip(self.hashes, self.sorted, strict=True):
            for first, block in hashes.blocks(BLOCK_ROWS):
                order = np.argsort(block, kind="stable")
                entries = np.empty(len(block), ordered.kind)
                entries["hash"], entries["place"] = block[order], order + first
                ordered.append(entries)
            hashes.place.unlink()

    def candidates(self, rows: NDArray[np.int64], sketch: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Pairs (training row, held-out row) that share a band and whose sketches agree well. [pairs, 2]"""
        import numpy as np

        found = [np.zeros(0, np.int64)]
        for hashed, ordered in zip(banded(sketch, self.bands).T, self.sorted, strict=True):
            for _, entries in ordered.blocks(BLOCK_ROWS):
                known = np.ascontiguousarray(entries["hash"])
                low = np.searchsorted(known, hashed)
                # Few hashes are there at all, and only for those the end of their run is searched.
                there = np.flatnonzero(known[np.minimum(low, len(known) - 1)] == hashed)
                low = low[there]
                count = np.searchsorted(known, hashed[there], "right") - low
                left = np.repeat(there, count)
                within = np.arange(len(left)) - np.repeat(np.cumsum(count) - count, count)
                found.append(left * self.rows.count + entries["place"][np.repeat(low, count) + within])
        pairs = np.unique(np.concatenate(found))
        left, right = pairs // self.rows.count, pairs % self.rows.count
        good = np.zeros(len(pairs), bool)
        for at in range(0, len(pairs), BLOCK_PAIRS):
            some = slice(at, at + BLOCK_PAIRS)
            agree = (sketch[left[some]] == self.minima.at(right[some])["minima"]).mean(axis=1)
            good[some] = agree >= self.threshold - SLACK
        return np.stack([rows[left[good]], self.rows.at(right[good])], axis=1)


def find(
    read: Read, held: NDArray[np.bool_], train: NDArray[np.bool_], threshold: float, threads: int, scratch: Path
) -> list[Pair]:
    """For each training row, the first held-out row at or above the threshold, in the order of training rows.

    Similarity is that of what is left without common grams.

    Args:
        read: gives `(row numbers, texts)` in batches for the rows that a mask selects, in ascending order.
        held: mask of the held-out rows. [rows]
        train: mask of the training rows. [rows]
        threshold: Jaccard similarity in (0, 1].
        threads: cores to use; the result does not depend on it.
        scratch: a directory of our own, which is gone at the end.
    """
    import numpy as np

    if not held.any() or not train.any():
        return []
    bands = bands_for(threshold)
    index = Index(scratch, bands, threshold)
    common = _common(read, held | train)
    for part in _sketched(read(held), bands, threads, common):
        index.add(*part)
    index.sort()
    proposed = [index.candidates(*part) for part in _together(_sketched(read(train), bands, threads, common))]
    shutil.rmtree(scratch)
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *proposed])
    return _decided(read, pairs, len(train), threshold, common)


def _common(read: Read, rows: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Grams that many rows of a table have, by a sample at even spacing."""
    import numpy as np

    every = np.flatnonzero(rows)
    chosen = every[np.unique(np.linspace(0, len(every) - 1, min(SAMPLED_ROWS, len(every))).astype(np.int64))]
    sets = [own for _, own in _sets(read, chosen, len(rows), None)]
    found, count = np.unique(np.concatenate(sets), return_counts=True)
    return found[count >= max(COMMON_ROWS, COMMON_SHARE * len(sets))]


def _sketched(
    texts: Texts, bands: Bands, threads: int, common: NDArray[np.uint64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32]]]:
    """Sketches batch by batch; a few batches ahead are worked on by other threads."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[NDArray[np.int64], Future[NDArray[np.uint32]]]] = deque()
        for rows, batch in texts:
            waiting.append((rows, pool.submit(sketches, batch, bands.bands * bands.rows, common)))
            if len(waiting) > threads:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def _together(
    parts: Iterator[tuple[NDArray[np.int64], NDArray[np.uint32]]],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32]]]:
    """Row numbers and sketches of several batches at once, since each search reads the index from end to end."""
    import numpy as np

    rows: list[NDArray[np.int64]] = []
    sketched: list[NDArray[np.uint32]] = []
    for own, sketch in parts:
        rows.append(own)
        sketched.append(sketch)
        if sum(map(len, rows)) >= SEARCHED_ROWS:
            yield np.concatenate(rows), np.concatenate(sketched)
            rows, sketched = [], []
    if rows:
        yield np.concatenate(rows), np.concatenate(sketched)


def _decided(
    read: Read, pairs: NDArray[np.int64], rows: int, threshold: float, common: NDArray[np.uint64]
) -> list[Pair]:
    """Pairs whose exact similarity reaches the threshold, the first for each training row."""
    import numpy as np

    pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]
    found: dict[int, Pair] = {}
    for away in _some_held(_sets(read, pairs[:, 1], rows, common)):
        low, high = np.searchsorted(pairs[:, 1], [min(away), max(away) + 1])
        held_of: dict[int, list[int]] = {}
        for train, held in pairs[low:high].tolist():
            if train not in found:
                held_of.setdefault(train, []).append(held)
        for train, own in _sets(read, np.array(list(held_of), np.int64), rows, common):
            for held in held_of[train]:
                shared = len(np.intersect1d(own, away[held], assume_unique=True))
                similarity = shared / (len(own) + len(away[held]) - shared)
                if similarity >= threshold:
                    found[train] = Pair(train, held, similarity)
                    break
    return [found[train] for train in sorted(found)]


def _sets(
    read: Read, numbers: NDArray[np.int64], rows: int, common: NDArray[np.uint64] | None
) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """`(row, its different grams, less the common ones)` of some of `rows` rows, in ascending order."""
    import numpy as np

    if not len(numbers):
        return
    mask = np.zeros(rows, bool)
    mask[numbers] = True
    for own, texts in read(mask):
        for number, text in zip(own.tolist(), texts, strict=True):
            yield number, np.unique(telling(*grams([text]), common)[0])


def _some_held(sets: Iterator[tuple[int, NDArray[np.uint64]]]) -> Iterator[dict[int, NDArray[np.uint64]]]:
    """Held-out rows and their grams, as many at a time as there is room for."""
    some: dict[int, NDArray[np.uint64]] = {}
    room = HELD_GRAMS
    for number, own in sets:
        some[number] = own
        room -= len(own)
        if room <= 0:
            yield some
            some, room = {}, HELD_GRAMS
    if some:
        yield some
