"""Several tasks in one model: whose batch a step is, and which rows of the head answer it.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020), section
3.5.2: a task is drawn in proportion to how many examples it has (temperature 1), or to a root of that number, which
lets small tasks come more often (temperature T: rate^(1/T)). A step's batch is of one task (Liu et al., "Multi-Task
Deep Neural Networks for Natural Language Understanding", 2019, algorithm 1). One task is the mixture of itself.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from pipelines.core.task_inputs import Task


class Turn(NamedTuple):
    """A step of training."""

    task: int  # number of the task
    batch: int  # how many batches of that task came before


def outputs_of(task: Task) -> int:
    """Rows of W_y: the classes; one for a choice (a logit a candidate) and for a regression."""
    return 1 if task.kind == "choice" or task.regression else len(task.labels)


def rows(tasks: Sequence[Task]) -> list[slice]:
    """Which rows of the one matrix W_y answer each task."""
    found, above = [], 0
    for task in tasks:
        found.append(slice(above, above + outputs_of(task)))
        above += outputs_of(task)
    return found


def rates(sizes: Sequence[int], temperature: float) -> list[float]:
    """With which probability a task of so many examples is drawn: size^(1/temperature), as shares."""
    weights = [size ** (1 / temperature) for size in sizes]
    return [weight / sum(weights) for weight in weights]


def an_epoch(task: Task, batch_size: int) -> int:
    """Batches in which each training example comes once."""
    return -(-len(task.train) // batch_size)


def turns(tasks: Sequence[Task], batch_size: int, epochs: int, temperature: float, seed: int) -> list[Turn]:
    """The steps of a run: as many as all tasks' epochs have together, each of a task that is drawn."""
    steps = epochs * sum(an_epoch(task, batch_size) for task in tasks)
    shares = rates([len(task.train) for task in tasks], temperature)
    drawn = random.Random(seed).choices(range(len(tasks)), shares, k=steps)
    seen, found = [0] * len(tasks), []
    for task in drawn:
        found.append(Turn(task, seen[task]))
        seen[task] += 1
    return found
