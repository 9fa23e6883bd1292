"""Laws and references of the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from pipelines.core import statistics
from pipelines.core.statistics import bootstrap, paired_bootstrap

RANDOM = np.random.default_rng(3)
BYTES = RANDOM.integers(50, 500, 400).astype(float)
BEFORE = BYTES * 3.0 + RANDOM.normal(0, 40, 400)
AFTER = BEFORE - BYTES * 0.1 + RANDOM.normal(0, 20, 400)


def test_interval_of_a_mean_agrees_with_the_normal_theory():
    values = RANDOM.normal(5.0, 2.0, 1000)
    interval = bootstrap(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(1000)
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.01)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.01)


def test_paired_ratio_agrees_with_scipy():
    reference = scipy.stats.bootstrap(
        (AFTER, BEFORE, BYTES),
        lambda a, b, w, axis: a.sum(axis) / w.sum(axis) - b.sum(axis) / w.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=9999,
        random_state=np.random.default_rng(1),
    ).confidence_interval
    interval = paired_bootstrap(AFTER, BEFORE, BYTES)
    width = reference.high - reference.low
    assert interval.low == pytest.approx(reference.low, abs=width / 25)
    assert interval.high == pytest.approx(reference.high, abs=width / 25)
    assert interval.estimate == pytest.approx((AFTER.sum() - BEFORE.sum()) / BYTES.sum())


def test_pairing_sees_what_two_separate_intervals_do_not():
    paired = paired_bootstrap(AFTER, BEFORE, BYTES)
    assert paired.high < 0
    noisy = BEFORE + RANDOM.normal(0, 3000, 400)  # differences between examples that both models share
    shared = noisy - BYTES * 0.1
    assert paired_bootstrap(shared, noisy, BYTES).high < 0
    assert bootstrap(shared, BYTES).high > bootstrap(noisy, BYTES).low


def test_same_input_gives_the_same_interval_and_another_seed_another():
    first = paired_bootstrap(AFTER, BEFORE, BYTES)
    assert paired_bootstrap(AFTER, BEFORE, BYTES) == first
    assert paired_bootstrap(AFTER, BEFORE, BYTES, seed=1) != first


def test_equal_models_differ_by_exactly_nothing():
    assert paired_bootstrap(AFTER, AFTER, BYTES) == (0.0, 0.0, 0.0)


def test_drawing_in_small_portions_changes_little(monkeypatch):
    whole = paired_bootstrap(AFTER, BEFORE, BYTES)
    monkeypatch.setattr(statistics, "BUDGET", 1000)
    portions = paired_bootstrap(AFTER, BEFORE, BYTES)
    assert portions.low == pytest.approx(whole.low, rel=0.02)
    assert portions.estimate == whole.estimate


def test_copies_of_an_example_in_one_group_add_no_certainty():
    copies, groups = np.tile(AFTER, 9), [str(n) for n in range(400)] * 9
    alone = bootstrap(AFTER)
    grouped = bootstrap(copies, group=groups)
    believed = bootstrap(copies)
    assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, rel=0.05)
    assert believed.high - believed.low == pytest.approx((alone.high - alone.low) / 3, rel=0.1)


@pytest.mark.parametrize(
    ("values", "weight", "message"),
    [
        ([], None, "at least one"),
        ([1.0, 2.0], [1.0], "as many weights"),
        ([1.0, np.nan], None, "example 1 has no finite"),
        ([1.0, 2.0], [1.0, 0.0], "example 1 has a weight"),
    ],
)
def test_bad_input(values, weight, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(np.array(values), None if weight is None else np.array(weight))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_clusters_show_no_difference_and_are_told_by_the_range_of_their_examples(count):
    groups = [str(n % count) for n in range(400)]
    each = AFTER / BYTES
    assert bootstrap(AFTER, BYTES, group=groups)[1:] == (each.min(), each.max())
    paired = paired_bootstrap(BEFORE + BYTES, BEFORE, BYTES, group=groups)  # every example by one
    assert paired == pytest.approx((1.0, -1.0, 1.0))
    assert paired_bootstrap(BEFORE[:count] + 1.0, BEFORE[:count])[1] == pytest.approx(-1.0)  # examples without groups
    assert paired_bootstrap(AFTER, AFTER, group=groups) == (0.0, 0.0, 0.0)


def test_as_many_clusters_as_an_interval_needs():
    groups = [str(n % statistics.MIN_GROUPS) for n in range(400)]
    assert paired_bootstrap(AFTER, BEFORE, BYTES, group=groups).high < 0
    of_equals = bootstrap(np.full(3, 0.1))
    assert of_equals.low <= of_equals.estimate <= of_equals.high
