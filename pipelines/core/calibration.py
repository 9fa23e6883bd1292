"""Whether a reward model's certainty is earned: how often the preferred one wins where it says 80 %.

The probability is the model's own, P(first beats second) = sigmoid(reward of first - reward of second). Guo et al.,
"On Calibration of Modern Neural Networks" (2017), section 2: reliability diagram and expected calibration error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BINS = 10


class Bin(NamedTuple):
    """Pairs whose predicted probability lies in [low, high); the last bin holds 1 as well."""

    low: float
    high: float
    pairs: int
    predicted: float | None  # mean probability that the first wins; None without a pair
    observed: float | None  # share of the pairs in which it did


def probabilities(first: Sequence[float], second: Sequence[float]) -> NDArray[np.float64]:
    """P(first beats second) for each pair of rewards."""
    gap = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return 1.0 / (1.0 + np.exp(-np.clip(gap, -500.0, 500.0)))  # beyond, exp overflows and nothing changes


def reliability(predicted: NDArray[np.float64], won: NDArray[np.float64]) -> list[Bin]:
    """`BINS` bins of equal width.

    Args:
        predicted: (pairs,) probabilities that the first wins. Which of a pair is the first must not depend on who
            won, or the curve would only ever see winners.
        won: (pairs,) 1 where the first won, else 0.
    """
    place = np.minimum((predicted * BINS).astype(int), BINS - 1)
    bins = []
    for number in range(BINS):
        here = place == number
        count = int(here.sum())
        means = (float(predicted[here].mean()), float(won[here].mean())) if count else (None, None)
        bins.append(Bin(number / BINS, (number + 1) / BINS, count, *means))
    return bins


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean gap between what was predicted and what happened, each bin weighted by its pairs: 0 is perfect."""
    total = sum(one.pairs for one in bins)
    gaps = (
        one.pairs * abs(one.predicted - one.observed)
        for one in bins
        if one.predicted is not None and one.observed is not None
    )
    return sum(gaps) / total
