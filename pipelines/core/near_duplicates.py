"""Training rows that nearly repeat a held-out row: Jaccard similarity of word 5-grams, MinHash LSH, then exact.

Words are runs of non-blanks of the case-folded text; a text of fewer than five words is one gram. MinHash
(Broder 1997) with banding (Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, ch. 3) proposes pairs, and
every pair is then decided by its exact Jaccard similarity, so a row never goes because two hashes agreed.

Our own numpy code, not `datasketch`, whose sketches are built one row at a time in Python; figures in
docs/notes.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GRAM = 5
MISSED = 1e-3  # the largest share of pairs at the threshold that banding may miss
LARGEST_SKETCH = 128
SLACK = 0.25  # a pair whose sketches agree in less than threshold - SLACK is not looked at again (5 sigma)
PIECE_CHARACTERS = 1 << 19  # hashed at a time, so that the work stays in the cache

BLOCK_PAIRS = 1 << 14  # pairs of sketches compared at a time

Texts = Iterable[tuple["NDArray[np.int64]", list[str]]]  # row numbers and their texts, batch by batch
Read = Callable[["NDArray[np.bool_]"], Texts]


class Pair(NamedTuple):
    """A training row, the held-out row it nearly repeats, and their exact similarity."""

    train: int
    held: int
    similarity: float


@dataclass(frozen=True)
class Bands:
    """How a sketch of `bands * rows` minima is cut."""

    bands: int
    rows: int


def bands_for(threshold: float) -> Bands:
    """The widest bands that still find all but `MISSED` of the pairs at the threshold.

    A band of r minima agrees with probability J^r, one of b bands with 1 - (1 - J^r)^b; wider bands propose
    fewer pairs in vain.
    """
    import math

    for rows in range(12, 0, -1):
        chance = min(threshold**rows, 1 - 1e-12)
        bands = math.ceil(math.log(MISSED) / math.log(1 - chance))
        if bands * rows <= LARGEST_SKETCH:
            return Bands(bands, rows)
    return Bands(LARGEST_SKETCH, 1)


def grams(texts: list[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of the word 5-grams of each text, one after another, and where each text's begin. [grams], [texts]

    A word is hashed to 32 bits, a gram to 64; every text has at least one gram.
    """
    import numpy as np

    words = []
    lengths = np.empty(len(texts), np.int64)
    for place, text in enumerate(texts):
        own = text.casefold().encode("utf-8", "surrogatepass").split()
        lengths[place] = max(len(own), GRAM)
        own += [b""] * (GRAM - len(own))
        words.append(np.fromiter(map(crc32, own), np.uint32, len(own)))
    flat = np.concatenate(words).astype(np.uint64)
    hashed = np.zeros(max(len(flat) - GRAM + 1, 0), np.uint64)
    for step in range(GRAM):
        hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + flat[step : step + len(hashed)]
    hashed ^= hashed >> np.uint64(29)
    hashed *= np.uint64(0xBF58476D1CE4E5B9)
    hashed ^= hashed >> np.uint64(32)
    ends = np.cumsum(lengths)
    inside = np.ones(len(hashed), bool)
    # The last four windows of a text reach into the next one.
    for step in range(1, GRAM):
        across = ends - step
        inside[across[across < len(hashed)]] = False
    counts = lengths - GRAM + 1
    return hashed[inside], np.cumsum(counts) - counts


def sketches(texts: list[str], size: int) -> NDArray[np.uint32]:
    """MinHash sketches. [texts, size]"""
    import numpy as np

    random = np.random.default_rng(0)
    factors = random.integers(0, 2**31, size, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    offsets = random.integers(0, 2**32, size, dtype=np.uint32)
    sketch = np.empty((len(texts), size), np.uint32)
    for first, last in _pieces(texts):
        hashed, starts = grams(texts[first:last])
        short = (hashed >> np.uint64(32)).astype(np.uint32)
        for place in range(size):
            mixed = short * factors[place] + offsets[place]
            mixed ^= mixed >> np.uint32(15)
            sketch[first:last, place] = np.minimum.reduceat(mixed * np.uint32(0x2C1B3C6D), starts)
    return sketch


def _pieces(texts: list[str]) -> Iterator[tuple[int, int]]:
    """Runs of texts of about `PIECE_CHARACTERS`."""
    first, held = 0, 0
    for place, text in enumerate(texts):
        held += len(text)
        if held >= PIECE_CHARACTERS:
            yield first, place + 1
            first, held = place + 1, 0
    if first < len(texts):
        yield first, len(texts)


def banded(sketch: NDArray[np.uint32], bands: Bands) -> NDArray[np.uint64]:
    """One 64-bit hash a band. [texts, bands]"""
    import numpy as np

    cut = sketch.reshape(len(sketch), bands.bands, bands.rows).astype(np.uint64)
    hashed = np.zeros(cut.shape[:2], np.uint64)
    for row in range(bands.rows):
        hashed = (hashed ^ cut[:, :, row]) * np.uint64(0x9E3779B97F4A7C15)
        hashed ^= hashed >> np.uint64(31)
    return hashed


class Index:
    """Held-out sketches, found by any band they share. Memory: 4 bytes a minimum and 16 a band for each row."""

    def __init__(self, rows: NDArray[np.int64], sketch: NDArray[np.uint32], bands: Bands, threshold: float) -> None:
        import numpy as np

        self.rows, self.sketch, self.bands, self.threshold = rows, sketch, bands, threshold
        hashed = banded(sketch, bands)
        self.order = np.argsort(hashed, axis=0, kind="stable").astype(np.int32)
        self.sorted = np.take_along_axis(hashed, self.order, axis=0)

    def candidates(self, rows: NDArray[np.int64], sketch: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Pairs (training row, held-out row) that share a band and whose sketches agree well. [pairs, 2]"""
        import numpy as np

        hashed = banded(sketch, self.bands)
        found = []
        for band in range(self.bands.bands):
            low = np.searchsorted(self.sorted[:, band], hashed[:, band], "left")
            count = np.searchsorted(self.sorted[:, band], hashed[:, band], "right") - low
            left = np.repeat(np.arange(len(rows)), count)
            within = np.arange(len(left)) - np.repeat(np.cumsum(count) - count, count)
            right = self.order[np.repeat(low, count) + within, band]
            found.append(left * len(self.rows) + right)
        pairs = np.unique(np.concatenate(found))
        left, right = pairs // len(self.rows), pairs % len(self.rows)
        good = np.zeros(len(pairs), bool)
        for at in range(0, len(pairs), BLOCK_PAIRS):
            some = slice(at, at + BLOCK_PAIRS)
            agree = (sketch[left[some]] == self.sketch[right[some]]).mean(axis=1)
            good[some] = agree >= self.threshold - SLACK
        return np.stack([rows[left[good]], self.rows[right[good]]], axis=1)


def find(read: Read, held: NDArray[np.bool_], train: NDArray[np.bool_], threshold: float, threads: int) -> list[Pair]:
    """For each training row, the first held-out row at or above the threshold, in the order of training rows.

    Args:
        read: gives `(row numbers, texts)` in batches for the rows that a mask selects, in ascending order.
        held: mask of the held-out rows. [rows]
        train: mask of the training rows. [rows]
        threshold: Jaccard similarity in (0, 1].
        threads: cores to use; the result does not depend on it.
    """
    import numpy as np

    bands = bands_for(threshold)
    away = list(_sketched(read(held), bands, threads))
    if not away:
        return []
    index = Index(np.concatenate([p[0] for p in away]), np.concatenate([p[1] for p in away]), bands, threshold)
    proposed = [index.candidates(*part) for part in _sketched(read(train), bands, threads)]
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *proposed])
    return list(_decided(read, pairs, len(train), threshold))


def _sketched(texts: Texts, bands: Bands, threads: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32]]]:
    """Sketches batch by batch; a few batches ahead are worked on by other threads."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[NDArray[np.int64], Future[NDArray[np.uint32]]]] = deque()
        for rows, batch in texts:
            waiting.append((rows, pool.submit(sketches, batch, bands.bands * bands.rows)))
            if len(waiting) > threads:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def _decided(read: Read, pairs: NDArray[np.int64], rows: int, threshold: float) -> Iterator[Pair]:
    """Pairs whose exact similarity reaches the threshold, the first for each training row."""
    import numpy as np

    def sets(column: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        mask = np.zeros(rows, bool)
        mask[pairs[:, column]] = True
        for numbers, texts in read(mask):
            for number, text in zip(numbers.tolist(), texts, strict=True):
                yield number, np.unique(grams([text])[0])

    away = dict(sets(1)) if len(pairs) else {}
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    for train, own in sets(0) if len(pairs) else ():
        low, high = np.searchsorted(pairs[:, 0], [train, train + 1])
        for held in pairs[low:high, 1].tolist():
            shared = len(np.intersect1d(own, away[held], assume_unique=True))
            similarity = shared / (len(own) + len(away[held]) - shared)
            if similarity >= threshold:
                yield Pair(train, held, similarity)
                break
