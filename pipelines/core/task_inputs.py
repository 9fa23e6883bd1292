"""What a labelled task is made of: examples as token sequences that end with the token `extract`."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["classification", "entailment", "similarity", "choice"]


class Special(NamedTuple):
    """Ids of the three learned tokens, added to the base's tokenizer."""

    start: int
    delimiter: int
    extract: int


class Example(NamedTuple):
    """One row of a task."""

    id: str
    group: str
    sequences: tuple[tuple[int, ...], ...]  # token ids: 1 (classification, entailment), 2 (similarity), K (choice)
    label: float  # number of the class or of the right choice, from 0; a score where the task is a regression
    parts: tuple[str, ...]  # the plain texts
    choices: tuple[str, ...]  # choice: the candidates' plain texts; else ()


class Task(NamedTuple):
    """A labelled task."""

    name: str
    kind: Kind
    labels: tuple[str, ...]  # names of the classes; () for choice and for regressions
    regression: bool  # similarity with real-valued labels
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    train_all: list[Example]  # every training row, where `train` is a part chosen by hash
    truncated: int  # examples whose text did not fit `max_length`
    columns: tuple[str, ...]  # text columns of the table
