"""How good the predictions for a labelled task are: the figures that GPT-1 reports (section 4.2, tables 2 to 4).

Predictions are numbers of classes or of choices, from 0, or scores where the task is a regression; they stand in the
order of `task.test`. Nothing here is NaN, even where all predictions are the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipelines.core.task_inputs import Task

Predictions = Sequence[float] | Sequence[int]


def score_name(task: Task) -> str:
    """The metric that is THE score of a task: `pearson` for regressions, else `accuracy`."""
    return "pearson" if task.regression else "accuracy"


def metrics(
    task: Task, predictions: Predictions, probabilities: NDArray[np.floating[Any]] | None = None
) -> dict[str, float]:
    """Figures of the test side.

    * Classes: `accuracy`, `macro_f1` (mean over the classes that occur in the test side or the predictions) and
      `matthews` (correlation; 0.0 where all predictions are the same).
    * Choice: `accuracy`.
    * Regression: `pearson` and `spearman`; 0.0 where predictions or labels are all the same, since then neither is
      defined.
    * Where there are probabilities, `log_loss`: mean negative log probability of the truth, in nats.

    Args:
        probabilities: [examples, classes], or [examples, most choices] with 0 for choices that are not there; None
            for regressions and for predictions without probabilities.

    Raises:
        ValueError: not one prediction for each example of `task.test`.
    """
    truth = [example.label for example in task.test]
    if len(predictions) != len(truth):
        raise ValueError(f"{len(predictions)} predictions for {len(truth)} test examples of {task.name}")
    if task.regression:
        return _correlations(truth, predictions)
    import numpy as np
    from sklearn.metrics import f1_score, matthews_corrcoef

    right = np.array(truth, int)
    given = np.array(predictions, int)
    found = {"accuracy": float((right == given).mean())}
    if task.kind != "choice":
        found["macro_f1"] = float(f1_score(right, given, average="macro"))
        found["matthews"] = float(matthews_corrcoef(right, given))
    if probabilities is not None:
        told = probabilities[np.arange(len(right)), right].astype(float)
        found["log_loss"] = float(-np.log(np.maximum(told, np.finfo(float).tiny)).mean())
    return found


def example_scores(task: Task, predictions: Predictions) -> list[float]:
    """One score a test example, more is better: 1.0 right and 0.0 wrong; for a regression minus the squared error.

    Scores that add up, for paired comparisons of two models: a correlation has no value for one example.
    """
    pairs = zip(task.test, predictions, strict=True)
    if task.regression:
        return [-((float(given) - example.label) ** 2) for example, given in pairs]
    return [float(given == example.label) for example, given in pairs]


def confusion(task: Task, predictions: Predictions) -> NDArray[np.int64]:
    """How often each class (row) was taken for each class (column) in the test side. [classes, classes]

    Raises:
        ValueError: the task has no classes.
    """
    if not task.labels:
        raise ValueError(f"task {task.name} has no classes, so nothing to confuse")
    from sklearn.metrics import confusion_matrix

    truth = [int(example.label) for example in task.test]
    found: NDArray[np.int64] = confusion_matrix(
        truth, [int(given) for given in predictions], labels=range(len(task.labels))
    )
    return found


def _correlations(truth: list[float], predictions: Predictions) -> dict[str, float]:
    """Pearson's and Spearman's correlation; 0.0 where they are not defined."""
    import numpy as np
    from scipy.stats import pearsonr, spearmanr

    if np.ptp(truth) == 0 or np.ptp(predictions) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    with warnings.catch_warnings():  # scipy says that almost constant predictions give an inexact figure
        warnings.simplefilter("ignore")
        return {
            "pearson": float(pearsonr(truth, predictions).statistic),
            "spearman": float(spearmanr(truth, predictions).statistic),
        }
