"""Whole tasks from CSV files with columns of their own names, through the stage `data` and into token sequences."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_help import jsonl, params, run, sentence
from models import tokenizer
from pydantic import ValidationError

from pipelines.core import task_inputs
from pipelines.core.errors import DataError
from pipelines.core.faults import BadRow
from pipelines.core.params.data import FileSource
from pipelines.core.readers import Cells
from pipelines.core.rows import canonical
from pipelines.core.task_inputs import Limits

ROWS = 60
SCORES = ["3.8", "-0.25", "5", "1e-1"]
MOODS = ["negative", "neutral", "positive"]
TRUTHS = ["no", "yes"]


def csv_file(place: Path, header: list[str], rows: list[list[str]]) -> None:
    with place.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def source(task: str, columns: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"path": f"{task}.csv", "table": "tasks", "task": task, "columns": columns, **more}


def table(place: Path, task: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(place / "tasks" / task / f"{split}.parquet") for split in task_inputs.SPLITS)


def test_whole_tasks_from_csv(tmp_path: Path) -> None:
    numbers = range(ROWS)
    csv_file(tmp_path / "cola.csv", ["sentence", "ok"], [[f'{sentence(n)}, "so"', str(n % 2)] for n in numbers])
    csv_file(tmp_path / "mood.csv", ["review", "mood"], [[sentence(n), MOODS[n % 3]] for n in numbers])
    pairs = [[sentence(n), sentence(n + 999)] for n in numbers]
    csv_file(tmp_path / "rte.csv", ["s1", "s2", "gold"], [[*pair, TRUTHS[n % 2]] for n, pair in enumerate(pairs)])
    csv_file(tmp_path / "sts.csv", ["s1", "s2", "score"], [[*pair, SCORES[n % 4]] for n, pair in enumerate(pairs)])
    given = params(
        source("cola", {"text": "sentence", "label": "ok"}),
        source("mood", {"text": "review", "label": "mood"}),
        source("rte", {"premise": "s1", "hypothesis": "s2", "label": "gold"}),
        source("sts", {"first": "s1", "second": "s2", "label": "score"}, label_type="score"),
    )
    outputs, metrics = run(tmp_path, given)
    assert metrics["expectations_failed"] == 0

    cola = table(outputs, "cola")
    assert cola.schema.field("label").type == pa.int64()
    assert {(row["text"], row["label"], row["label_text"]) for row in cola.to_pylist()} == {
        (f'{sentence(n)}, "so"', n % 2, str(n % 2)) for n in numbers
    }
    mood = {(row["text"], row["label"], row["label_text"]) for row in table(outputs, "mood").to_pylist()}
    assert mood == {(sentence(n), n % 3, MOODS[n % 3]) for n in numbers}
    rte = {(row["premise"], row["hypothesis"], row["label_text"]) for row in table(outputs, "rte").to_pylist()}
    assert rte == {(*pair, TRUTHS[n % 2]) for n, pair in enumerate(pairs)}
    sts = table(outputs, "sts")
    assert sts.schema.field("label").type == pa.float64()
    assert {(row["first"], row["second"], row["label"]) for row in sts.to_pylist()} == {
        (*pair, float(SCORES[n % 4])) for n, pair in enumerate(pairs)
    }
    assert set(sts["label_text"].to_pylist()) == {None}
    assert "sts.csv -> tasks/sts, labels are scores" in (outputs / "README.md").read_text()

    known = tokenizer()
    special = task_inputs.add_special(known)
    tasks = {
        name: task_inputs.load(outputs, name, known, special, Limits(None, None, 64, 0))
        for name in ("cola", "mood", "rte", "sts")
    }
    assert {name: (task.kind, task.labels, task.regression) for name, task in tasks.items()} == {
        "cola": ("classification", ("0", "1"), False),
        "mood": ("classification", tuple(MOODS), False),
        "rte": ("entailment", tuple(TRUTHS), False),
        "sts": ("similarity", (), True),
    }
    assert {example.label for example in tasks["sts"].train} == {3.8, -0.25, 5.0, 0.1}


@pytest.mark.parametrize("value", ["", "high", "nan", "-inf", "1e999"])
def test_scores_that_are_no_number_in_csv(value: str) -> None:
    with pytest.raises(BadRow, match="accepted: a (finite )?number"):
        canonical("tasks", Cells(a="x", b="y", c=value), {"first": "a", "second": "b", "label": "c"}, "score")


@pytest.mark.parametrize("value", [None, True, "2.5", [1], float("nan"), 10**400])
def test_scores_that_are_no_number_in_json(value: Any) -> None:
    with pytest.raises(BadRow, match="accepted: a (finite )?number"):
        canonical("tasks", {"first": "x", "second": "y", "label": value}, {}, "score")


def test_scores_are_asked_for(tmp_path: Path) -> None:
    record = {"first": "x", "second": "y", "label": 2.5}
    assert canonical("tasks", record, {}, "score") == [record | {"label_text": None}]
    with pytest.raises(BadRow, match="label_type: score in the source"):
        canonical("tasks", record, {})
    base = {"path": "a", "table": "tasks", "task": "t", "label_type": "score"}
    with pytest.raises(ValidationError, match="label_type: score has no field 'premise'; it has id, first"):
        FileSource.model_validate(base | {"columns": {"premise": "a"}})
    with pytest.raises(ValidationError, match="only for table: tasks"):
        FileSource.model_validate({"path": "a", "table": "corpus", "label_type": "score"})

    jsonl(tmp_path / "a.jsonl", [record])
    jsonl(tmp_path / "b.jsonl", [record | {"label": 1}])
    both = [{"path": f"{name}.jsonl", "table": "tasks", "task": "t"} for name in "ab"]
    with pytest.raises(DataError, match=r"b.jsonl, row 1, column label: found a class; accepted: a score"):
        run(tmp_path, params({**both[0], "label_type": "score"}, both[1]))
