"""Figures of labelled tasks by hand, and baselines that find what can be found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pipelines.core import task_baselines, task_evaluation, task_metrics
from pipelines.core.task_inputs import Example, Kind, Task

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jetty", "knoll", "marsh"]
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "classification": ("text",),
    "entailment": ("premise", "hypothesis"),
    "similarity": ("first", "second"),
    "choice": ("context", "choices"),
}
Given = tuple[float, tuple[str, ...], tuple[str, ...]]


def task(kind: Kind, train: Sequence[Given], test: Sequence[Given], labels: str = "", regression: bool = False) -> Task:
    made = [
        [Example(f"{n}", f"{n}", ((),), label, parts, choices) for n, (label, parts, choices) in enumerate(rows)]
        for rows in (train, test)
    ]
    return Task("t", kind, tuple(labels), regression, made[0], [], made[1], made[0], 0, COLUMNS[kind])


def truth(kind: Kind, labels: Sequence[float], names: str = "", **more: Any) -> Task:
    rows = [(float(label), ("x",), ("p", "q", "r") if kind == "choice" else ()) for label in labels]
    return task(kind, rows, rows, names, **more)


def test_classes_by_hand() -> None:
    given = truth("classification", [0, 0, 0, 1, 1, 2], "abcd")
    predictions = [0, 0, 1, 1, 0, 1]
    found = task_metrics.metrics(given, predictions)
    # F1: a 2*2/(3+3) = 2/3, b 2*1/(2+3) = 2/5, c 0; d occurs nowhere.
    # Matthews (Gorodkin): (3*6 - (3*3 + 3*2 + 0*1)) / sqrt((36 - 18) * (36 - 14)).
    assert found == pytest.approx(
        {"accuracy": 0.5, "macro_f1": (2 / 3 + 2 / 5) / 3, "matthews": 3 / math.sqrt(18 * 22)}
    )
    assert task_metrics.confusion(given, predictions).tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0] * 4]
    assert task_metrics.example_scores(given, predictions) == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    assert task_metrics.score_name(given) == "accuracy"


def test_matthews_of_two_classes_and_log_loss_by_hand() -> None:
    given = truth("entailment", [0, 0, 0, 0, 1, 1], "ny")
    probabilities = np.array([[0.5, 0.5]] * 5 + [[0.75, 0.25]])
    found = task_metrics.metrics(given, [0, 0, 0, 1, 1, 0], probabilities)
    assert found["matthews"] == pytest.approx((1 * 3 - 1 * 1) / math.sqrt(2 * 2 * 4 * 4))
    assert found["log_loss"] == pytest.approx((5 * math.log(2) + math.log(4)) / 6)
    sure = task_metrics.metrics(given, [0] * 6, np.array([[1.0, 0.0]] * 6))
    assert sure["matthews"] == 0.0 and math.isfinite(sure["log_loss"])


def test_choices_have_accuracy_alone() -> None:
    assert task_metrics.metrics(truth("choice", [0, 1, 2, 2]), [0, 1, 1, 2]) == {"accuracy": 0.75}
    with pytest.raises(ValueError, match="3 predictions for 4"):
        task_metrics.metrics(truth("choice", [0, 1, 2, 2]), [0, 1, 1])


def test_scores_by_hand() -> None:
    given = truth("similarity", [1, 2, 3, 4], regression=True)
    found = task_metrics.metrics(given, [1.0, 3.0, 2.0, 10.0])
    # Deviations -1.5 -0.5 0.5 1.5 and -3 -1 -2 6: products add up to 13, squares to 5 and 50.
    assert found == pytest.approx({"pearson": 13 / math.sqrt(5 * 50), "spearman": 1 - 6 * 2 / (4 * 15)})
    assert task_metrics.example_scores(given, [1.0, 3.0, 2.0, 10.0]) == [0.0, -1.0, -1.0, -36.0]
    assert task_metrics.score_name(given) == "pearson"
    assert task_metrics.metrics(given, [2.5] * 4) == {"pearson": 0.0, "spearman": 0.0}
    alone = truth("similarity", [1], regression=True)
    assert task_metrics.metrics(alone, [1.5]) == {"pearson": 0.0, "spearman": 0.0}
    with pytest.raises(ValueError, match="no classes"):
        task_metrics.confusion(given, [1.0] * 4)


def test_majority_by_hand() -> None:
    def most(kind: Kind, labels: Sequence[float], **more: Any) -> list[float]:
        return task_baselines.majority(truth(kind, labels, **more))

    assert most("classification", [2, 0, 1, 1, 2], names="abc") == [1.0] * 5  # of equally frequent ones the first
    assert most("similarity", [0.5, 1.0, 3.0], regression=True) == [1.5] * 3
    fewer = task("choice", [(2.0, ("x",), ("a", "b", "c"))], [(0.0, ("x",), ("a", "b")), (0.0, ("x",), ("a",) * 4)])
    assert task_baselines.majority(fewer) == [1.0, 2.0]


def word(n: int) -> str:
    return WORDS[n % len(WORDS)]


def separable(kind: Kind, n: int) -> Given:
    """Row n of a task that word counts can tell: a word in the text, or a word that two texts share."""
    near, far, filler = word(n // 2), word(n // 2 + 1 + n % 5), word(5 * n + 3)
    if kind == "classification":
        return n % 3 % 2, (f"{filler} {'good' if n % 3 % 2 else 'bad'}, {word(n)}",), ()
    if kind == "choice":
        place = n % 3
        return float(place), (f"the {near}",), tuple(f"a {near if at == place else far}" for at in range(3))
    return float(n % 2), (f"the {near}", f"a {near if n % 2 else far}"), ()


@pytest.mark.parametrize(("kind", "regression"), [*((kind, False) for kind in COLUMNS), ("similarity", True)])
def test_tfidf_beats_the_majority_the_same_way_each_time(kind: Kind, regression: bool) -> None:
    made = [separable(kind, n) for n in range(180)]
    given = task(kind, made[:120], made[120:], "ab" if kind != "choice" else "", regression)
    found = task_baselines.tfidf(given, given.train_all)
    assert found == task_baselines.tfidf(given, given.train_all)
    if regression:
        assert task_metrics.metrics(given, found)["pearson"] > 0.9
        return
    score, floor = (task_metrics.metrics(given, p)["accuracy"] for p in (found, task_baselines.majority(given)))
    assert score >= 0.95 > 0.7 > floor


def test_tfidf_learns_from_the_rows_it_is_given() -> None:
    rows = [separable("classification", n) for n in range(60)]
    given = task("classification", rows[:30], rows[30:], "ab")
    turned = [example._replace(label=1 - example.label) for example in given.train]
    assert task_baselines.tfidf(given, turned) == [1 - label for label in task_baselines.tfidf(given, given.train)]
    marks = task(
        "classification", [(0.0, ("!",), ()), (1.0, ("?",), ())], [(1.0, ("? ?",), ()), (0.0, ("!",), ())], "ab"
    )
    assert task_baselines.tfidf(marks, marks.train) == [1.0, 0.0]


def test_interval_of_a_correlation_is_fishers() -> None:
    given = truth("similarity", [1, 2, 3, 4, 5, 6], regression=True)
    predictions = [1.1, 1.9, 3.5, 3.0, 5.2, 5.5]
    found = task_evaluation.interval(given, predictions)
    r = float(np.corrcoef([1, 2, 3, 4, 5, 6], predictions)[0, 1])
    reach = 1.959964 / math.sqrt(6 - 3)
    ends = [math.tanh(math.atanh(r) + sign * reach) for sign in (-1, 1)]
    assert list(found) == pytest.approx([r, *ends], rel=1e-5)
    assert tuple(task_evaluation.interval(given, [2.0] * 6)) == (0.0, -1.0, 1.0), "a constant says nothing"
