"""Measures of rankings, against sums written out by hand; the threshold, against trying every one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipelines.core import retrieval_metrics as measures


def test_ranks_count_from_one_and_zero_is_absent() -> None:
    found = measures.ranks([["a", "b"], ["c"], []], ["b", "a", "a"])
    assert found.tolist() == [2, 0, 0]


def test_measures_by_hand() -> None:
    found = measures.scores(np.array([1, 2, 6, 11, 0]))
    assert found["mrr"].tolist() == [1, 1 / 2, 1 / 6, 1 / 11, 0]
    assert found["recall_at_1"].tolist() == [1, 0, 0, 0, 0]
    assert found["recall_at_5"].tolist() == [1, 1, 0, 0, 0]
    assert found["recall_at_10"].tolist() == [1, 1, 1, 0, 0]
    assert found["ndcg_at_10"].tolist() == pytest.approx([1, 1 / math.log2(3), 1 / math.log2(7), 0, 0])
    assert tuple(found) == measures.MEASURES


def test_measures_agree_with_scikit_learn() -> None:
    """A ranking of twenty documents as scores, one of them relevant."""
    from sklearn.metrics import label_ranking_average_precision_score, ndcg_score, top_k_accuracy_score

    places = np.random.default_rng(3).permutation(20) + 1
    relevant = np.eye(20)[places - 1]
    given = np.tile(-np.arange(20.0), (20, 1))
    found = measures.scores(places)
    assert found["mrr"].mean() == pytest.approx(label_ranking_average_precision_score(relevant, given))
    assert found["ndcg_at_10"].mean() == pytest.approx(ndcg_score(relevant, given, k=10))
    for cut in (1, 5, 10):
        top = top_k_accuracy_score(places - 1, given, k=cut, labels=np.arange(20))
        assert found[f"recall_at_{cut}"].mean() == pytest.approx(top)


def test_queries_of_a_group_are_drawn_together() -> None:
    """Forty copies of one group say no more than the group: the interval is that of five examples."""
    scores = {"mrr": np.repeat([0.0, 1.0, 1.0, 0.0, 1.0], 40)}
    together = measures.figures(scores, [f"g{n // 40}" for n in range(200)], "x_")
    apart = measures.figures(scores, [str(n) for n in range(200)], "x_")
    assert set(together) == {"x_mrr", "x_mrr_low", "x_mrr_high"} and together["x_mrr"] == pytest.approx(0.6)
    assert together["x_mrr_high"] - together["x_mrr_low"] > 3 * (apart["x_mrr_high"] - apart["x_mrr_low"])


@pytest.mark.parametrize("seed", range(8))
def test_no_threshold_makes_fewer_mistakes(seed: int) -> None:
    random = np.random.default_rng(seed)
    known, unknown = random.normal(0.6, 0.1, 41).round(2), random.normal(0.5, 0.1, 23).round(2)
    chosen = measures.mistakes(measures.calibrate(known, unknown), known, unknown)

    def wrong(cut: float) -> float:
        return sum(value >= cut for value in unknown) / 23 + sum(value < cut for value in known) / 41

    assert chosen.false_answers + chosen.false_refusals == pytest.approx(wrong(chosen.value))
    allowed = [cut for cut in np.arange(0, 1.2, 0.001) if (known < cut).mean() <= measures.REFUSALS]
    assert wrong(chosen.value) == pytest.approx(min(wrong(cut) for cut in allowed))
    assert chosen.false_refusals <= measures.REFUSALS


def test_relevances_that_are_apart_are_told_apart() -> None:
    known, unknown = np.array([0.7, 0.9]), np.array([0.1, 0.3])
    assert measures.calibrate(known, unknown) == pytest.approx(0.5)
    assert measures.mistakes(0.5, known, unknown) == measures.Threshold(0.5, 0.0, 0.0)
    assert measures.mistakes(0.8, known, unknown).false_refusals == 0.5
    assert measures.mistakes(0.3, known, unknown).false_answers == 0.5, "at the threshold a query is answered"


@pytest.mark.parametrize(("known", "unknown"), [([], [0.1]), ([0.1], []), ([float("nan")], [0.1])])
def test_a_threshold_needs_both_kinds(known: list[float], unknown: list[float]) -> None:
    with pytest.raises(ValueError, match="answerable"):
        measures.calibrate(np.array(known), np.array(unknown))
