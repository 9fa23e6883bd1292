"""Which prompt is chosen, and what the cells of the matrix measured.

The rule is that of one standard error (Breiman et al., "Classification and Regression Trees", 1984, section 3.4.3): of
all cells of a task (strategy x model) the best on the validation side, and of those that are worse by no more than one
standard error of the difference on the same questions, the one with the fewest tokens of prompt and answer. "Not worse
with 95 % confidence" is almost anything on forty questions: it took .275 for .375. The test side is asked once, about
the choice and the zero-shot prompt of the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipelines.core import statistics
from pipelines.core.prompt_cells import Cell, Use
from pipelines.core.prompt_strategies import BASELINE, STRATEGIES
from pipelines.core.prompt_tasks import GENERATION, Question, Task
from pipelines.core.statistics import Interval


class Entry(NamedTuple):
    """A cell of the matrix."""

    model: str
    use: Use
    cell: Cell


class Judged(NamedTuple):
    """A task's choice on the test side."""

    chosen: Entry  # on the validation side
    tied: int  # cells within a standard error of the best one
    test: Cell
    zero_shot: Cell  # of the same model, on the test side
    majority: list[float]


def choose(entries: Sequence[Entry], questions: Sequence[Question]) -> tuple[Entry, int]:
    """The cell that the rule takes, and how many it had to choose from; of equal ones the first."""
    best = max(entries, key=lambda one: one.cell.score)
    _, groups = np.unique([one.group for one in questions], return_inverse=True)

    def holds(entry: Entry) -> bool:
        lost = np.array(best.cell.scores) - np.array(entry.cell.scores)
        of_groups = np.bincount(groups, lost - lost.mean())  # questions of a group are not independent
        return bool(lost.mean() <= np.sqrt(np.square(of_groups).sum()) / len(lost))

    tied = [one for one in entries if one is best or holds(one)]
    return min(tied, key=lambda one: one.cell.tokens), len(tied)


def interval(cell: Cell, questions: Sequence[Question]) -> Interval:
    """Score with the ends of its 95 % interval, by bootstrap over groups."""
    return statistics.bootstrap(np.array(cell.scores), group=[one.group for one in questions])


def gain(judged: Judged, questions: Sequence[Question]) -> Interval:
    """Score of the choice less that of zero-shot, on the test side."""
    scores = (np.array(judged.test.scores), np.array(judged.zero_shot.scores))
    return statistics.paired_bootstrap(*scores, group=[one.group for one in questions])


def rows(task: Task, entries: Sequence[Entry], chosen: Entry) -> list[dict[str, object]]:
    """Rows of `matrix.csv`, all of the validation side."""
    found: list[dict[str, object]] = []
    for one in entries:
        score, low, high = interval(one.cell, task.validation)
        count = len(one.cell.scores)
        found.append(
            {
                "task": task.name, "strategy": one.use.strategy, "model": one.model, "prompt": one.use.name,
                "version": one.use.version[:12], "score": score, "low": low, "high": high, "questions": count,
                "prompt_tokens": sum(one.cell.prompt_tokens) / count,
                "answer_tokens": sum(one.cell.answer_tokens) / count,
                "examples": sum(one.cell.shown) / count, "unparsed": one.cell.unparsed, "ties": one.cell.ties,
                "chosen": int(one is chosen),
            }
        )  # fmt: skip
    return found


def metrics(task: Task, entries: Sequence[Entry], judged: Judged) -> dict[str, float]:
    """Figures of one task. `STRATEGY/...` are the first model's; with several, `STRATEGY/MODEL/...` are each one's."""
    models = list(dict.fromkeys(one.model for one in entries))
    found: dict[str, float] = {}
    for one in entries:
        cell, ends = one.cell, ("score", "score_low", "score_high")
        measured = dict(zip(ends, interval(cell, task.validation), strict=True))
        measured["tokens"] = cell.tokens
        strategy = STRATEGIES[one.use.strategy]
        if strategy.examples != "none":
            measured["examples"] = sum(cell.shown) / len(cell.shown)
        if strategy.reasons:
            measured["unparsed"] = cell.unparsed / cell.written
        keys = [one.use.strategy] if one.model == models[0] else []
        keys += [f"{one.use.strategy}/{one.model}"] if len(models) > 1 else []
        found |= {f"{key}/{name}": value for key in keys for name, value in measured.items()}
    for name, values in (("chosen", interval(judged.test, task.test)), ("chosen_gain", gain(judged, task.test))):
        found |= {f"{name}{end}": value for end, value in zip(("", "_low", "_high"), values, strict=True)}
    found["chosen_tokens"] = judged.test.tokens
    found["chosen_zero_shot"] = judged.zero_shot.score
    found["chosen_zero_shot_tokens"] = judged.zero_shot.tokens
    if task.kind != GENERATION and task.pool:
        found["majority"] = sum(judged.majority) / len(judged.majority)
    found["tied"] = float(judged.tied)
    return found


def scores(task: Task, judged: Judged) -> dict[str, list[float]]:
    """Columns of `evaluation.parquet` that are results, of a task's test questions."""
    zero_shot = judged.zero_shot.scores
    return {"score": judged.test.scores, "score_zero_shot": zero_shot, "score_majority": judged.majority}


def evaluation(tasks: Sequence[Task], results: Sequence[dict[str, list[float]]]) -> dict[str, list[object]]:
    """Columns of `evaluation.parquet`: one row a test question of any task; `examples_TASK` is 1 on its own rows."""
    found: dict[str, list[object]] = {"id": [], "group": []}
    names = list(dict.fromkeys(name for one in results for name in one))
    for task, own in zip(tasks, results, strict=True):
        for number, question in enumerate(task.test):
            found["id"].append(f"{task.name}:{question.id}")
            found["group"].append(f"{task.name}:{question.group}")
            for name in names:
                found.setdefault(name, []).append(own[name][number])
            for other in tasks:
                found.setdefault(f"examples_{other.name}", []).append(float(other is task))
    return found


def baseline(entries: Sequence[Entry], model: str) -> Entry:
    """The zero-shot cell of a model."""
    return next(one for one in entries if one.model == model and one.use.strategy == BASELINE)
