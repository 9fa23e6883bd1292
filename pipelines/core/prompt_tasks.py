"""Held-out questions and the training rows that examples are chosen from, of the tasks that prompts are tried on.

In: `tasks/NAME/{train,validation,test}.parquet` of the `data` artifact, answered by an option; and, under the name
`generation`, the table `prompts`, whose rows with a reference are answered with a text. Which rows are used belongs to
the seed and their ids. Examples come from the training side alone.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.core import reading
from pipelines.core.context import StageContext
from pipelines.core.errors import DataError, ParamsError
from pipelines.core.prompt_rendering import Example, hashed
from pipelines.core.task_inputs import KINDS

if TYPE_CHECKING:
    from pipelines.core.params.prompts import PromptsParams

GENERATION = "generation"
SPLITS = ("train", "validation", "test")
CANDIDATES = 4  # for each row wanted, how many are looked at where some are too long

Fits = Callable[["Question"], bool]


class Question(NamedTuple):
    """A row of a task, as it is asked."""

    id: str
    group: str
    columns: dict[str, str]
    options: tuple[str, ...]  # () for a generation
    label: int  # number of the right option; 0 for a generation
    answer: str  # the right option, or the reference

    def example(self) -> Example:
        """The same, to be shown with its answer."""
        return Example(self.id, self.columns, self.options, self.label, self.answer)


class Task(NamedTuple):
    """One task."""

    name: str
    kind: str
    labels: tuple[str, ...]  # names of the classes by number; () for choices and generations
    pool: list[Question]  # of the training side
    validation: list[Question]
    test: list[Question]

    @property
    def classes(self) -> bool:
        """Whether every question has the same options."""
        return bool(self.labels)

    def majority(self) -> list[float]:
        """Of each test question the score of the answer that is most frequent in the pool; 0 where there is none."""
        counts = Counter(one.label for one in self.pool)
        if self.kind == GENERATION or not counts:
            return [0.0] * len(self.test)
        ((label, _),) = counts.most_common(1)
        return [float(one.label == label) for one in self.test]


class Chosen(NamedTuple):
    """Rows of one side, and ids of those that were too long."""

    questions: list[Question]
    dropped: list[str]


def load(params: PromptsParams, data: Path, fits: Fits, context: StageContext) -> list[Task]:
    """The tasks that are asked for, or all there are.

    Args:
        fits: whether a question is short enough; asked where `too_long` is drop.

    Raises:
        DataError: a side without rows; a held-out class that train lacks; fewer than two options.
        ParamsError: a task that the data have not, or that prompts cannot ask.
    """
    there = names(data)
    if GENERATION in there:
        raise ParamsError(f"data.sources: a task is called {GENERATION}, which stage prompts calls the prompts' table")
    texts = _with_references(data)
    known = [*there, *([GENERATION] if texts else [])]
    if odd := [name for name in params.tasks if name not in known]:
        told = f"prompts.tasks: {', '.join(odd)}: the data have no such task; there are: {', '.join(known) or 'none'}"
        why = "" if texts else f" ({GENERATION}: where rows of the table prompts have a reference)"
        raise ParamsError(told + why)
    found = []
    for name in params.tasks or known:
        if name == GENERATION:
            found.append(_generation(params, data, fits, context))
        elif _is_regression(data, name):
            told = f"{name} asks for a score, which no option gives"
            if params.tasks:
                raise ParamsError(f"prompts.tasks: {told}")
            context.say(f"left out: {told}")
        else:
            found.append(_labelled(params, data, name, fits, context))
    return found


def names(data: Path) -> list[str]:
    """The labelled tasks there are."""
    return sorted(found.name for found in (data / "tasks").glob("*") if found.is_dir())


def _labelled(params: PromptsParams, data: Path, name: str, fits: Fits, context: StageContext) -> Task:
    """A task whose rows have options."""
    import pyarrow.parquet as pq

    there = set(pq.read_schema(data / "tasks" / name / "train.parquet").names)
    columns, kind = next((columns, kind) for columns, kind in KINDS.items() if set(columns) <= there)
    sides = {side: list(reading.rows(data, f"tasks/{name}", side, None)) for side in SPLITS}  # type: ignore[arg-type]
    labels: tuple[str, ...] = ()
    if kind != "choice":
        pairs = sorted({(row["label"], row["label_text"]) for side in SPLITS for row in sides[side]})
        labels = tuple(text for _, text in pairs)
        if len(set(labels)) < len(labels) or len(pairs) != len({label for label, _ in pairs}):
            raise DataError(f"tasks/{name}: labels and their names are not one to one: {pairs[:10]}")
        if len(labels) < 2:
            raise DataError(f"tasks/{name}: {len(labels)} options ({', '.join(labels)}); accepted: two or more")
        lost = set(labels) - {row["label_text"] for row in sides["train"]}
        if sides["train"] and lost:
            raise DataError(f"tasks/{name}: class {sorted(lost)[0]!r} is held out and not in train")
    numbers = {label: number for number, (label, _) in enumerate(pairs)} if labels else {}

    def question(row: dict[str, Any], side: str) -> Question:
        options = labels or tuple(row["choices"])
        where = f"tasks/{name}/{side}.parquet, row {row['id']} ({row['source']}, row {row['row']})"
        if len(options) < 2:
            raise DataError(f"{where}: {len(options)} choices; accepted: at least two")
        label = numbers[row["label"]] if labels else row["label"]
        if not 0 <= label < len(options):
            raise DataError(f"{where}: label {label}; accepted: 0 to {len(options) - 1}")
        texts = {column: row[column] for column in columns if column != "choices"}
        return Question(row["id"], row["group"], texts, options, label, options[label])

    chosen = {side: _first(params, (question(row, side) for row in rows), side, fits) for side, rows in sides.items()}
    return _task(name, kind, labels, chosen, context)


def _generation(params: PromptsParams, data: Path, fits: Fits, context: StageContext) -> Task:
    """The prompts that have a reference."""

    def questions(side: str) -> Iterator[Question]:
        for row in _prompts(data, side):
            if row["reference"] is not None:
                yield Question(row["id"], row["group"], {"prompt": row["prompt"]}, (), 0, row["reference"])

    chosen = {side: _first(params, questions(side), side, fits) for side in SPLITS}
    return _task(GENERATION, GENERATION, (), chosen, context)


def _task(name: str, kind: str, labels: tuple[str, ...], sides: dict[str, Chosen], context: StageContext) -> Task:
    for side in ("validation", "test"):
        questions, dropped = sides[side]
        if not questions:
            why = f"raise data.{side}_share, or give a source with that split"
            if dropped:
                why = f"all are longer than half of prompts.max_prompt_tokens, first row {dropped[0]}"
            raise DataError(f"{name}: no {side} rows to ask; {why}")
    if long := sum(len(one.dropped) for one in sides.values()):
        context.say(f"{name}: {long} rows are longer than half of prompts.max_prompt_tokens and were passed over")
    return Task(name, kind, labels, *(sides[side].questions for side in SPLITS))


def _first(params: PromptsParams, rows: Iterable[Question], side: str, fits: Fits) -> Chosen:
    """As many rows as the dials say, or as there are, by hash of seed and id."""
    count = {"train": params.pool, "validation": params.eval_examples, "test": params.test_examples}[side]
    most = count if params.too_long == "refuse" else CANDIDATES * count
    found = Chosen([], [])
    for row in heapq.nsmallest(most, rows, key=lambda row: (hashed(params.seed, row.id), row.id)):
        if len(found.questions) == count:
            break
        if params.too_long == "refuse" or fits(row):
            found.questions.append(row)
        else:
            found.dropped.append(row.id)
    return found


def _prompts(data: Path, side: str) -> Iterator[dict[str, Any]]:
    return reading.rows(data, "prompts", side, ["id", "group", "prompt", "reference"])


def _with_references(data: Path) -> bool:
    """Whether prompts of each held-out side have a reference."""
    if not (data / "prompts").is_dir():
        return False
    return all(any(row["reference"] is not None for row in _prompts(data, side)) for side in SPLITS[1:])


def _is_regression(data: Path, name: str) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return bool(pa.types.is_floating(pq.read_schema(data / "tasks" / name / "train.parquet").field("label").type))
