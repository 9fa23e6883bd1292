"""Reciprocal rank fusion (Cormack et al., "Reciprocal Rank Fusion", 2009) of rankings of chunks, by their documents.

A document's score is the sum of weight / (k + rank) over the rankings, its rank that of its best chunk in each.
Flat-importable: imports nothing of the project.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def fuse(
    rankings: Sequence[NDArray[np.int64]], document: NDArray[np.int64], k: float, weights: Sequence[float]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Chunks of all rankings and their scores, best first; equal ones in the order of chunks.

    The best chunk of a document has the document's score; its others what their own places give, which is not above.

    Args:
        rankings: chunks, best first.
        document: of every chunk there is, its document. [chunks]
    """
    whole: dict[int, float] = {}  # of a document
    own: dict[int, float] = {}  # of a chunk
    for ranking, weight in zip(rankings, weights, strict=True):
        ranks: dict[int, int] = {}
        for chunk, of in zip(ranking.tolist(), document[ranking].tolist(), strict=True):
            if of not in ranks:
                ranks[of] = len(ranks) + 1
                whole[of] = whole.get(of, 0.0) + weight / (k + ranks[of])
            own[chunk] = own.get(chunk, 0.0) + weight / (k + len(ranks))
    scores = dict(own)
    led: set[int] = set()
    for chunk in sorted(own, key=lambda chunk: (-own[chunk], chunk)):
        of = int(document[chunk])
        if of not in led:
            led.add(of)
            scores[chunk] = whole[of]
    order = sorted(scores, key=lambda chunk: (-scores[chunk], chunk))
    return np.array(order, np.int64), np.array([scores[chunk] for chunk in order], np.float32)
