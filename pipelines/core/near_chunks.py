"""Which chunks nearly repeat an earlier one: Jaccard similarity of word 5-grams, as the data stage counts it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.core import minhash

THRESHOLD = 0.8
BLOCK = 65_536  # texts sketched at a time


def first_of_kind(texts: Sequence[str]) -> NDArray[np.int64]:
    """Of each text the number of the first one that it nearly repeats, or its own. [texts]

    A text repeats what the text it is like repeats, so that of a chain of versions one is left.
    """
    first: dict[tuple[str, ...], int] = {}
    same = [first.setdefault(tuple(text.casefold().split()), number) for number, text in enumerate(texts)]
    near = np.arange(len(texts), dtype=np.int64)
    pairs = _candidates(texts, np.array(list(first.values()), np.int64))
    grams = {number: np.unique(minhash.grams([texts[number]])[0]) for number in np.unique(pairs).tolist()}
    for later, earlier in pairs.tolist():
        if near[later] == later and _jaccard(grams[later], grams[earlier]) >= THRESHOLD:
            near[later] = near[earlier]
    repeated: NDArray[np.int64] = near[np.array(same, np.int64)]
    return repeated


def _candidates(texts: Sequence[str], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs (later, earlier) of texts that may be alike, in order. [pairs, 2]

    A text is held against the first and the last before it with which it shares a band: against all of them, a
    thousand versions of one text would be half a million pairs.
    """
    bands = minhash.bands_for(THRESHOLD)
    hashed = [
        minhash.banded(minhash.sketches([texts[row] for row in rows[at : at + BLOCK]], bands.bands * bands.rows), bands)
        for at in range(0, len(rows), BLOCK)
    ]
    found = [np.zeros((0, 2), np.int64)]
    for band in np.concatenate(hashed).T:
        order = np.argsort(band, kind="stable")
        again = np.flatnonzero(band[order][1:] == band[order][:-1]) + 1
        starts = np.searchsorted(band[order], band[order][again])
        found += [np.stack([rows[order[again]], rows[order[before]]], 1) for before in (again - 1, starts)]
    return np.unique(np.concatenate(found), axis=0)


def _jaccard(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    """Of two sorted sets."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
