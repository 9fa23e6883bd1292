"""How well documents were ranked for queries that one document each answers, and when to say that none does.

A rank is a number from 1, or 0 where the document is not in the ranking at all. With one relevant document a query,
recall at k is whether it is among the first k, and the ideal DCG is 1 (Manning, Raghavan & Schuetze, *Introduction to
Information Retrieval*, 2008, chapter 8; Jaervelin & Kekaelaeinen, *Cumulated Gain-Based Evaluation*, 2002).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.core import statistics

Array = NDArray[np.float64]
CUTS = (1, 5, 10)
GAIN_CUT = 10
MEASURES = ("mrr", *(f"recall_at_{cut}" for cut in CUTS), f"ndcg_at_{GAIN_CUT}")


def ranks(rankings: Sequence[Sequence[str]], targets: Sequence[str]) -> NDArray[np.int64]:
    """Rank of each query's target in its ranking, 0 where it is not in it. [queries]"""
    found = [
        ranking.index(target) + 1 if target in ranking else 0 for ranking, target in zip(rankings, targets, strict=True)
    ]
    return np.array(found, dtype=np.int64)


def scores(ranks: NDArray[np.int64]) -> dict[str, Array]:
    """Of each query, by name of the measure (`MEASURES`), a number from 0 to 1. `ranks`: [queries]"""
    there = ranks > 0
    place = np.where(there, ranks, 1)
    found: dict[str, Array] = {"mrr": np.where(there, 1.0 / place, 0.0)}
    for cut in CUTS:
        found[f"recall_at_{cut}"] = (there & (ranks <= cut)).astype(np.float64)
    found[f"ndcg_at_{GAIN_CUT}"] = np.where(there & (ranks <= GAIN_CUT), 1.0 / np.log2(place + 1.0), 0.0)
    return found


def figures(scores: dict[str, Array], groups: Sequence[str], prefix: str = "") -> dict[str, float]:
    """Means of the measures with the ends of their 95 % intervals; queries of one group are drawn together."""
    found: dict[str, float] = {}
    for name, values in scores.items():
        interval = statistics.bootstrap(values, group=groups)
        found |= {
            f"{prefix}{name}": interval.estimate,
            f"{prefix}{name}_low": interval.low,
            f"{prefix}{name}_high": interval.high,
        }
    return found


REFUSALS = 0.05  # of the queries that have an answer: an assistant that often says it does not know is not asked again


class Threshold(NamedTuple):
    """The least relevance at which a query is answered, and how often that is wrong on other queries."""

    value: float
    false_answers: float  # share of unanswerable queries at or above it
    false_refusals: float  # share of answerable queries below it


def calibrate(answerable: Array, unanswerable: Array) -> float:
    """Of the thresholds that refuse at most `REFUSALS` of what has an answer, the one with the fewest mistakes.

    Mistakes are the sum of both shares (Youden's index, *Cancer* 1950). Without the bound, unanswerable queries about
    neighbours of what is known would have a third of the answerable ones refused. Of equally good ones the lowest; each
    lies halfway between two relevances that were seen.

    Args:
        answerable: relevance of the best passage found for each query that has an answer. [queries]
        unanswerable: of each that has none. [queries]

    Raises:
        ValueError: one of them is empty, or holds something that is no number.
    """
    for name, values in (("answerable", answerable), ("unanswerable", unanswerable)):
        if not values.size or not np.isfinite(values).all():
            raise ValueError(f"{name}: {values.size} relevances, all must be finite, and at least one must be there")
    seen = np.unique(np.concatenate([answerable, unanswerable]))
    cuts = np.concatenate([[seen[0] - 1e-6], (seen[1:] + seen[:-1]) / 2, [seen[-1] + 1e-6]])
    refused = np.searchsorted(np.sort(answerable), cuts, side="left") / answerable.size
    answered = 1.0 - np.searchsorted(np.sort(unanswerable), cuts, side="left") / unanswerable.size
    return float(cuts[int(np.argmin(np.where(refused <= REFUSALS, refused + answered, np.inf)))])


def mistakes(threshold: float, answerable: Array, unanswerable: Array) -> Threshold:
    """What a threshold does to queries that it was not chosen by."""
    return Threshold(threshold, float((unanswerable >= threshold).mean()), float((answerable < threshold).mean()))
