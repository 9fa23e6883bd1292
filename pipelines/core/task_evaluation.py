"""What fine-tuned models are worth on held-out examples, beside baselines that need no language model.

Every comparison is on the same test examples: the majority class, TF-IDF with a linear model on the same training rows
and on all there are, and the ablations. THE score of a task is accuracy; of a regression Pearson's correlation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.core import statistics, task_baselines, task_metrics
from pipelines.core.statistics import Interval
from pipelines.core.task_inputs import Task
from pipelines.core.task_runs import MAIN, Run

BASELINES = ("majority", "tfidf", "tfidf_all")


class Answers(NamedTuple):
    """What a model says of the test examples."""

    predictions: list[float]  # number of the class or candidate; a score
    probabilities: list[list[float]] | None  # of each class or candidate; None for a regression


class Judged(NamedTuple):
    """A task's figures."""

    metrics: dict[str, float]  # without the task's name before them
    scores: dict[str, list[float]]  # of each test example, more is better: by this model and by others
    answers: Answers  # of the model that is kept
    chosen: int  # which seed's model that is


def answers(task: Task, logits: Sequence[Sequence[float]]) -> Answers:
    """The likeliest class or candidate and the softmax; of a regression the score as it is."""
    if task.regression:
        return Answers([row[0] for row in logits], None)
    rows = [np.exp(np.array(row) - max(row)) for row in logits]
    return Answers([float(np.argmax(row)) for row in rows], [(row / row.sum()).tolist() for row in rows])


def judge(task: Task, runs: Mapping[str, Sequence[Run]], untrained: Sequence[float] | None = None) -> Judged:
    """A task's models and baselines on its test examples.

    Args:
        untrained: what the pre-trained model answers without training (`zero_shot`).
        runs: of each variant (`task_runs.Variant.name`), one a seed. Of several seeds the figures are medians, and the
            model that is kept is the one with the median score on the validation side (of two the lower).
    """
    said = {name: [answers(task, run.test) for run in of_seeds] for name, of_seeds in runs.items()}
    main = runs[MAIN]
    chosen = 0
    if len(main) > 1:
        chosen = median_place([_score(task, task.validation, answers(task, run.validation)) for run in main])
    kept = said[MAIN][chosen]
    simple = {
        "majority": task_baselines.majority(task),
        "tfidf": task_baselines.tfidf(task, task.train),
        "tfidf_all": task_baselines.tfidf(task, task.train_all),
    }
    if untrained is not None:
        simple["zero_shot"] = list(untrained)
    scores = {"score": task_metrics.example_scores(task, kept.predictions)}
    scores |= {f"score_{name}": task_metrics.example_scores(task, given) for name, given in simple.items()}
    if "random" in said:
        scores["score_random"] = task_metrics.example_scores(task, said["random"][chosen].predictions)

    estimate, low, high = interval(task, kept.predictions)
    every = [_figures(task, one) for one in said[MAIN]]
    metrics = {key: float(np.median([figures[key] for figures in every])) for key in every[0]}
    metrics |= {"score": float(np.median([_score(task, task.test, one) for one in said[MAIN]]))}
    metrics |= {"score_low": low, "score_high": high}
    if len(every) > 1:
        metrics["score_of_model"] = estimate
    if main[chosen].merged:  # what merging the adapters cost the model that is kept
        after = _score(task, task.test, answers(task, main[chosen].merged))
        metrics["merge_delta"] = after - _score(task, task.test, kept)
    metrics |= {name: _score(task, task.test, Answers(given, None)) for name, given in simple.items()}
    metrics |= {
        name: float(np.median([_score(task, task.test, one) for one in of_seeds]))
        for name, of_seeds in said.items()
        if name != MAIN
    }
    group = [example.group for example in task.test]
    for other in ("majority", "tfidf", "random"):
        if f"score_{other}" in scores:
            ours, theirs = np.array(scores["score"]), np.array(scores[f"score_{other}"])
            found = statistics.paired_bootstrap(ours, theirs, group=group)
            names = (f"gain_over_{other}", f"gain_over_{other}_low", f"gain_over_{other}_high")
            metrics |= dict(zip(names, found, strict=True))
    metrics |= {"train": float(len(task.train)), "test": float(len(task.test)), "truncated": float(task.truncated)}
    return Judged(metrics, scores, kept, chosen)


def median_place(values: Sequence[float]) -> int:
    """Place of the median; of two middle ones the lower."""
    return sorted(range(len(values)), key=lambda place: (values[place], place))[(len(values) - 1) // 2]


def rows(tasks: Sequence[Task], scored: Sequence[Mapping[str, list[float]]]) -> dict[str, list[Any]]:
    """Columns of `evaluation.parquet`, one row a test example of any task; `examples_TASK` is 1 for its own, else 0.

    Args:
        scored: for each task, its test examples' scores by column.
    """
    columns: dict[str, list[Any]] = {"id": [], "group": []}
    names = list(dict.fromkeys(name for scores in scored for name in scores))
    columns |= {name: [] for name in names}
    columns |= {f"examples_{task.name}": [] for task in tasks}
    for task, scores in zip(tasks, scored, strict=True):
        count = len(task.test)
        columns["id"] += [f"{task.name}:{example.id}" for example in task.test]
        columns["group"] += [example.group for example in task.test]
        for name in names:
            columns[name] += scores.get(name, [0.0] * count)
        for other in tasks:
            columns[f"examples_{other.name}"] += [float(other is task)] * count
    return columns


def confusion(task: Task, given: Answers) -> list[list[Any]]:
    """How often each class was taken for each: a head (`truth`, then the answers), then a row a class."""
    table: NDArray[np.int64] = task_metrics.confusion(task, given.predictions)
    rows = [[truth, *counts] for truth, counts in zip(task.labels, table.tolist(), strict=True)]
    return [["truth", *task.labels], *rows]


def _figures(task: Task, given: Answers) -> dict[str, float]:
    """All figures of `task_metrics`."""
    padded = None
    if given.probabilities is not None:
        most = max(map(len, given.probabilities))
        padded = np.array([row + [0.0] * (most - len(row)) for row in given.probabilities])
    return task_metrics.metrics(task, given.predictions, padded)


def _score(task: Task, examples: Sequence[Any], given: Answers) -> float:
    """THE score on these examples."""
    of_these = task._replace(test=list(examples))
    return task_metrics.metrics(of_these, given.predictions)[task_metrics.score_name(task)]


def interval(task: Task, predictions: Sequence[float]) -> Interval:
    """THE score of the test side: by bootstrap over groups; of a correlation by Fisher's transformation."""
    if not task.regression:
        group = [example.group for example in task.test]
        return statistics.bootstrap(np.array(task_metrics.example_scores(task, predictions)), group=group)
    from scipy.stats import pearsonr

    truth = [example.label for example in task.test]
    if len(truth) < 4 or np.ptp(truth) == 0 or np.ptp(predictions) == 0:
        return Interval(0.0, -1.0, 1.0)
    found = pearsonr(truth, predictions)
    return Interval(float(found.statistic), *map(float, found.confidence_interval()))
