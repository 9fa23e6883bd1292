"""Bootstrap intervals of a score, and of the difference of two scores on the same examples.

A score is a ratio of sums over examples, sum(values) / sum(weight): bits per byte when the weight is bytes, a
mean when there is none. Whole examples are drawn with replacement, or whole clusters of them (`group`), since
examples of one group are not independent. Percentile method, Efron & Tibshirani, *An Introduction to the
Bootstrap* (1993), chapter 13; pairing as in Koehn, *Statistical Significance Tests for Machine Translation
Evaluation* (EMNLP 2004).

Of fewer than `MIN_GROUPS` clusters no interval can be drawn. A score then has the range of its examples, which holds
whatever their mean may be, and a difference the largest one of an example in either direction, which holds zero: both
are finite, as metrics have to be, and no difference is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEVEL = 0.95
BUDGET = 4_000_000  # drawn indices held at once: 32 MB
MIN_GROUPS = 5  # of fewer, percentile intervals cover far less than 95 %: of one nothing, of two the two themselves


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    estimate: float
    low: float
    high: float


def bootstrap(
    values: Array,
    weight: Array | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    group: Sequence[Any] | None = None,
) -> Interval:
    """Interval of sum(values) / sum(weight), or of the mean without a weight; of few clusters see the module.

    Args:
        values: shape (examples,).
        weight: shape (examples,), positive.
        group: the cluster of each example; clusters are drawn instead of examples.

    Raises:
        ValueError: no example, shapes that differ, a value that is not finite, a weight that is not positive.
    """
    values, weight = _checked(values, weight)
    if clusters(values.size, group) < MIN_GROUPS:
        estimate, each = float(values.sum() / weight.sum()), values / weight
        return Interval(estimate, min(estimate, float(each.min())), max(estimate, float(each.max())))
    return _interval(values, weight, resamples, seed, group)


def paired_bootstrap(
    candidate: Array,
    baseline: Array,
    weight: Array | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    group: Sequence[Any] | None = None,
) -> Interval:
    """Interval of (sum(candidate) - sum(baseline)) / sum(weight), both drawn on the same examples.

    Arguments and errors as in `bootstrap`; `candidate[i]` and `baseline[i]` belong to the same example.
    """
    candidate, weight = _checked(candidate, weight)
    baseline, _ = _checked(baseline, weight)
    # With one weight for both, the difference of the ratios is the ratio of the differences.
    difference = candidate - baseline
    if clusters(difference.size, group) < MIN_GROUPS:
        estimate, largest = float(difference.sum() / weight.sum()), float(np.abs(difference / weight).max())
        return Interval(estimate, min(estimate, -largest), max(estimate, largest))
    return _interval(difference, weight, resamples, seed, group)


def clusters(examples: int, group: Sequence[Any] | None) -> int:
    """How many things are drawn: clusters, or as many as there are examples where these have none."""
    return examples if group is None else len(set(group))


def _checked(values: Array, weight: Array | None) -> tuple[Array, Array]:
    values = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(values) if weight is None else np.asarray(weight, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or weight.shape != values.shape:
        raise ValueError(f"need as many weights as values, at least one: {values.shape}, {weight.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"example {int(np.argmin(np.isfinite(values)))} has no finite value")
    if not (np.isfinite(weight) & (weight > 0)).all():
        raise ValueError(f"example {int(np.argmin(weight > 0))} has a weight that is not positive")
    return values, weight


def _interval(values: Array, weight: Array, resamples: int, seed: int, group: Sequence[Any] | None) -> Interval:
    estimate = float(values.sum() / weight.sum())
    if group is not None:  # the sums of a cluster are drawn as if it were one example
        _, cluster = np.unique(np.asarray(group), return_inverse=True)
        count = int(cluster.max()) + 1
        values = np.bincount(cluster, values, count).astype(np.float64)
        weight = np.bincount(cluster, weight, count).astype(np.float64)
    random = np.random.default_rng(seed)
    size = values.size
    drawn = np.empty(resamples)
    step = max(1, BUDGET // size)
    for first in range(0, resamples, step):
        rows = random.integers(0, size, (min(step, resamples - first), size))
        drawn[first : first + len(rows)] = values[rows].sum(axis=1) / weight[rows].sum(axis=1)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(estimate, float(low), float(high))
