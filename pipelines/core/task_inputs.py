"""Labelled tasks for the transfer stage: tables read and checked, rows chosen, texts made token sequences.

In: `tasks/NAME/{train,validation,test}.parquet` of the `data` artifact and the base model's tokenizer. Out: a `Task`.
Its kind is told by the table's text columns, and a similarity whose labels are real numbers is a regression. Which
rows are used belongs to the seed and their ids, not to their order, and fewer rows are the first of more. How a
text becomes a sequence, and is cut when it is too long: `pipelines.core.task_sequences` (GPT-1, section 3.3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.core import packing, reading
from pipelines.core.errors import ArtifactError, DataError, ParamsError
from pipelines.core.task_sequences import SHORTEST, Kind, Special, add_special, sequences

__all__ = ["Example", "Kind", "Limits", "Special", "Task", "add_special", "load"]

KINDS: dict[tuple[str, ...], Kind] = {
    ("text",): "classification",
    ("premise", "hypothesis"): "entailment",
    ("first", "second"): "similarity",
    ("context", "choices"): "choice",
}
SPLITS = ("train", "validation", "test")
REMEDY = {
    "train": "add rows",
    "validation": "raise data.validation_share, or give a source with split: validation",
    "test": "raise data.test_share, or give a source with split: test",
}
Row = dict[str, Any]


class Limits(NamedTuple):
    """How much of a task is used."""

    examples: int | None  # most training rows; None: all
    eval_examples: int | None  # most validation rows, and most test rows; None: all
    max_length: int  # tokens of a sequence, the learned ones included
    seed: int  # which rows, with the hash of their ids


class Example(NamedTuple):
    """One labelled example."""

    id: str
    group: str
    sequences: tuple[tuple[int, ...], ...]  # 1 (classification, entailment), 2 (similarity, both orders), K (choice)
    label: float  # number of the class or of the right choice, from 0; a score where the task is a regression
    parts: tuple[str, ...]  # the text; both texts; or the context of a choice
    choices: tuple[str, ...]  # texts of the candidates; () unless a choice


class Task(NamedTuple):
    """One labelled task, ready to be learned."""

    name: str
    kind: Kind
    labels: tuple[str, ...]  # names of the classes by number; () for choices and regressions
    regression: bool
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    train_all: list[Example]  # every training row, for the baseline; those not in `train` have no sequences
    truncated: int  # examples of the three splits whose text was cut
    columns: tuple[str, ...]  # text columns of the table


class _Table(NamedTuple):
    """What the rows of one task have in common, and how their texts become tokens."""

    name: str
    kind: Kind
    columns: tuple[str, ...]
    regression: bool
    encode: Callable[[list[str]], list[list[int]]]
    special: Special
    max_length: int


def load(place: Path, name: str, tokenizer: Any, special: Special, limits: Limits) -> Task:
    """Task `name` of the data artifact `place`, with a tokenizer that has the `special` tokens.

    Raises:
        ArtifactError: the data have no such task.
        DataError: an empty split; nothing to tell apart in train; a held-out class that train lacks; a class that the
            chosen training rows lost; a choice of fewer than two; a text without tokens.
        ParamsError: `max_length` leaves no room for text.
    """
    if limits.max_length < SHORTEST:
        raise ParamsError(f"transfer.max_length is {limits.max_length}; accepted: at least {SHORTEST} tokens")
    table = _table(place, name, tokenizer, special, limits.max_length)
    rows = {split: _rows(place, table, split, limits.seed) for split in SPLITS}
    numbers: dict[str, int] = {}
    if table.kind == "choice":
        for split in SPLITS:
            _check_choices(table, split, rows[split])
    elif not table.regression:
        numbers = _classes(table, rows["train"])
        for split in ("validation", "test"):
            _check_known(table, split, rows[split], numbers)
    elif len({row["label"] for row in rows["train"]}) < 2:
        raise DataError(f"{_file(name, 'train')}: every score is {rows['train'][0]['label']}; accepted: two or more")
    chosen = {split: rows[split][: limits.examples if split == "train" else limits.eval_examples] for split in SPLITS}
    lost = sorted(set(numbers) - {row["label_text"] for row in chosen["train"]}, key=numbers.__getitem__)
    if lost:
        raise DataError(
            f"{_file(name, 'train')}: none of the {len(chosen['train'])} rows that transfer.examples chose of "
            f"{len(rows['train'])} is of class {_quoted(lost)}; raise transfer.examples (null: all rows)"
        )
    made = {split: _examples(table, split, chosen[split], numbers) for split in SPLITS}
    train = made["train"][0]
    rest = [_plain(table, row, numbers) for row in rows["train"][len(train) :]]
    return Task(
        name=name,
        kind=table.kind,
        labels=tuple(numbers),
        regression=table.regression,
        train=train,
        validation=made["validation"][0],
        test=made["test"][0],
        train_all=train + rest,
        truncated=sum(cut for _, cut in made.values()),
        columns=table.columns,
    )


def _table(place: Path, name: str, tokenizer: Any, special: Special, max_length: int) -> _Table:
    """The task's kind, by the columns of its files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = place / "tasks"
    missing = [split for split in SPLITS if not (folder / name / f"{split}.parquet").exists()]
    if missing:
        there = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        raise ArtifactError(
            f"the data have no {_file(name, missing[0])}; tasks there are: {', '.join(there) or 'none'}. Take the task "
            f"out of transfer.tasks, or name a source with table: tasks and task: {name} in data.sources."
        )
    schema = pq.read_schema(folder / name / "train.parquet")
    columns = next((columns for columns in KINDS if set(columns) <= set(schema.names)), None)
    if columns is None:
        accepted = "; ".join(" + ".join(columns) for columns in KINDS)
        raise ArtifactError(f"{_file(name, 'train')} has columns {', '.join(schema.names)}; accepted: {accepted}")
    regression = pa.types.is_floating(schema.field("label").type)
    if regression and KINDS[columns] != "similarity":
        raise DataError(f"{_file(name, 'train')}: real-valued labels are only for the columns first and second")

    def encode(texts: list[str]) -> list[list[int]]:
        return packing.encode(tokenizer, texts)

    return _Table(name, KINDS[columns], columns, regression, encode, special, max_length)


def _rows(place: Path, table: _Table, split: str, seed: int) -> list[Row]:
    """All rows of a split, by hash of seed and id."""
    columns = ["id", "group", "source", "row", *table.columns, "label", "label_text"]
    rows = list(reading.rows(place, f"tasks/{table.name}", split, columns))
    if not rows:
        raise DataError(f"{_file(table.name, split)} has no rows; {REMEDY[split]}")

    def rank(row: Row) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}:{row['id']}".encode(), digest_size=8).digest(), row["id"]

    return sorted(rows, key=rank)


def _classes(table: _Table, rows: list[Row]) -> dict[str, int]:
    """Number of each class of the training rows, from 0 without gaps, in the order of their labels."""
    pairs = sorted({(row["label"], row["label_text"]) for row in rows})
    for a, b in zip(pairs, pairs[1:], strict=False):
        if a[0] == b[0]:
            raise DataError(
                f"{_file(table.name, 'train')}: label {a[0]} is {_quoted([a[1], b[1]])}; accepted: one name"
            )
    names = [name for _, name in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{_file(table.name, 'train')}: {_quoted(twice)} names several labels; accepted: one")
    if len(names) < 2:
        raise DataError(f"{_file(table.name, 'train')}: every row is of class {_quoted(names)}; accepted: two or more")
    return {name: number for number, name in enumerate(names)}


def _check_known(table: _Table, split: str, rows: list[Row], numbers: dict[str, int]) -> None:
    """Refuse held-out rows of a class that no training row has."""
    for row in rows:
        if row["label_text"] not in numbers:
            raise DataError(
                f"{_where(table, split, row)}: the class {_quoted([row['label_text']])} is not in train; "
                f"accepted: {_quoted(list(numbers))}. Give rows of it to train (a source with split: train), or "
                "take it out"
            )


def _check_choices(table: _Table, split: str, rows: list[Row]) -> None:
    """Refuse a row with nothing to choose from, or without the right choice. The number of candidates may vary."""
    for row in rows:
        count = len(row["choices"])
        if count < 2:
            raise DataError(f"{_where(table, split, row)}: {count} choices; accepted: at least two")
        if not 0 <= row["label"] < count:
            raise DataError(f"{_where(table, split, row)}: label {row['label']}; accepted: 0 to {count - 1}")


def _examples(table: _Table, split: str, rows: list[Row], numbers: dict[str, int]) -> tuple[list[Example], int]:
    """Examples with their sequences, and how many of them were cut."""
    found = [_plain(table, row, numbers) for row in rows]
    ids = iter(table.encode([text for one in found for text in (*one.parts, *one.choices)]))
    made, cut = [], 0
    for row, one in zip(rows, found, strict=True):
        parts, choices = list(islice(ids, len(one.parts))), list(islice(ids, len(one.choices)))
        if not all((*parts, *choices)):
            names = [*table.columns[: len(parts)], *("choices" for _ in choices)]
            column = next(name for name, tokens in zip(names, (*parts, *choices), strict=True) if not tokens)
            raise DataError(f"{_where(table, split, row)}, column {column}: the tokenizer makes no token of the text")
        read = sequences(table.kind, parts, choices, table.special, table.max_length)
        made.append(one._replace(sequences=read.ids))
        cut += read.truncated
    return made, cut


def _plain(table: _Table, row: Row, numbers: dict[str, int]) -> Example:
    """A row as an example without sequences."""
    parts = tuple(row[column] for column in table.columns if column != "choices")
    label = numbers[row["label_text"]] if numbers else row["label"]
    return Example(row["id"], row["group"], (), float(label), parts, tuple(row.get("choices") or ()))


def _file(name: str, split: str) -> str:
    return f"tasks/{name}/{split}.parquet"


def _where(table: _Table, split: str, row: Row) -> str:
    """The file and the row, with where the row came from."""
    return f"{_file(table.name, split)}, row {row['id']} ({row['source']}, row {row['row']})"


def _quoted(names: list[str]) -> str:
    """Names of classes for a message, no more than ten."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(f'"{name}"' for name in names[:10]) + more
