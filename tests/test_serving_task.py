"""A fine-tuned model behind MLflow, in another process and folder, says what stage `transfer` says."""

from __future__ import annotations

import json
from pathlib import Path

import elsewhere
import pandas as pd
import pytest
import toy_tasks
from models import tokenizer
from test_transfer import rows, run, write

from pipelines.core import reading, serving_cells, serving_task
from pipelines.core.context import StageContext


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The output of a run over three tasks, one of them a regression."""
    root = tmp_path_factory.mktemp("made")
    toy_tasks.base(root / "pretrain/model", depth=2)
    tokenizer().save_pretrained(root / "pretrain/model")
    for task in ("kind", "close", "pick"):
        write(root / "data", task, train=24, validation=4, test=8)
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split, count in (("train", 24), ("validation", 4), ("test", 8)):
        place = root / "data/tasks/score" / f"{split}.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        scored = [row | {"label": row["label"] * 2.5, "label_text": None} for row in rows("close", split, count)]
        schema = [("first", pa.string()), ("second", pa.string()), ("label", pa.float64()), ("label_text", pa.string())]
        names = [("id", pa.string()), ("group", pa.string()), ("source", pa.string()), ("row", pa.int64())]
        pq.write_table(pa.Table.from_pylist(scored, pa.schema(names + schema)), place)
    inputs = {"data": root / "data", "pretrain": root / "pretrain"}
    run(inputs, root / "out", StageContext("transfer", root / "work", "0" * 64), epochs=2)
    return {"out": root / "out", "data": root / "data"}


@pytest.mark.parametrize(
    "task", ["kind", "score", *(pytest.param(name, marks=pytest.mark.slow) for name in ("close", "pick"))]
)
def test_served_answers_are_the_stages(made: dict[str, Path], task: str, tmp_path: Path) -> None:
    asked = list(reading.rows(made["data"] / "tasks", task, "test", None))  # type: ignore[arg-type]
    columns = json.loads((made["out"] / "models" / task / "task.json").read_text())["columns"]
    given = [{name: row[name] for name in columns} for row in asked]
    said = elsewhere.ask(made["out"] / "models" / task, tmp_path, given, [{"else": "x"}])
    assert f"task {task} needs the columns {', '.join(columns)}; missing: {', '.join(columns)}" in said.told

    found = pd.read_parquet(made["out"] / "evaluation.parquet").set_index("id")
    ours = [found.score[f"{task}:{row['id']}"] for row in asked]
    if task == "score":
        assert [-((one["label"] - row["label"]) ** 2) for one, row in zip(said.rows, asked, strict=True)] == (
            pytest.approx(ours, abs=1e-4)
        )
        return
    right = [float(one["label"] == row["label_text"]) for one, row in zip(said.rows, asked, strict=True)]
    assert right == ours
    assert all(sum(one["probabilities"]) == pytest.approx(1.0, abs=1e-5) for one in said.rows)
    assert all(max(one["probabilities"]) == one["probabilities"][one["label_id"]] for one in said.rows)


def test_an_empty_cell_is_no_text() -> None:
    """MLflow lets one through; it must not be judged as "None" or "nan"."""
    answering = serving_task.TaskModel()
    answering.cells = serving_cells
    answering.task = {"task": "pick", "kind": "choice", "columns": ["context", "choices"]}
    for context, choices, told in (
        (None, ["a", "b"], "column context holds (None|nan); accepted: a text"),
        (float("nan"), ["a", "b"], "column context holds nan; accepted: a text"),
        ("w", ["a", None], "column choices holds None; accepted: a text"),
        ("w", None, "column choices holds None; accepted: a list of texts"),
    ):
        with pytest.raises(ValueError, match=f"row 0: {told}"):
            answering.predict(None, pd.DataFrame([{"context": context, "choices": choices}]))
