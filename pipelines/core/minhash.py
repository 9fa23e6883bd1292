"""MinHash sketches of texts (Broder 1997) over word 5-grams, and their bands.

Words are runs of non-blanks of the case-folded text, and single signs of scripts that are written without blanks; a
text of fewer than five words is one gram. Our own numpy code, not `datasketch`, whose sketches are built one row at a
time in Python; figures in docs/notes.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GRAM = 5
MISSED = 1e-3  # the largest share of pairs at the threshold that banding may miss
LARGEST_SKETCH = 128
UNSPACED = re.compile(r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff])")  # Thai to Chinese
PIECE_CHARACTERS = 1 << 19  # hashed at a time, so that the work stays in the cache


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
        apart = text if text.isascii() else " ".join(UNSPACED.split(text))  # in a quarter of the time of `sub`
        own = apart.casefold().encode("utf-8", "surrogatepass").split()
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


def telling(
    hashed: NDArray[np.uint64], starts: NDArray[np.int64], common: NDArray[np.uint64] | None
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """What `grams` gives without those that are common; a text that has no others keeps its own."""
    import numpy as np

    if common is None or not len(common):
        return hashed, starts
    kept = ~np.isin(hashed, common)
    lengths = np.diff(starts, append=len(hashed))
    counts = np.add.reduceat(kept.astype(np.int64), starts)
    kept |= np.repeat(counts == 0, lengths)
    counts = np.where(counts == 0, lengths, counts)
    return hashed[kept], np.cumsum(counts) - counts


def sketches(texts: list[str], size: int, common: NDArray[np.uint64] | None = None) -> NDArray[np.uint32]:
    """MinHash sketches, in which `common` grams do not count. [texts, size]"""
    import numpy as np

    random = np.random.default_rng(0)
    factors = random.integers(0, 2**31, size, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    offsets = random.integers(0, 2**32, size, dtype=np.uint32)
    sketch = np.empty((len(texts), size), np.uint32)
    for first, last in _pieces(texts):
        hashed, starts = telling(*grams(texts[first:last]), common)
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
