"""A fine-tuned model behind MLflow, in another process and folder, says what stage `transfer` says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import toy_tasks
from models import tokenizer
from test_transfer import rows, run, write

from pipelines.core import reading, serving
from pipelines.core.context import StageContext

CODE = """
import json, sys
there = set(sys.modules)
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
found = model.predict(pd.DataFrame(json.load(open(sys.argv[2]))))
assert not [name for name in set(sys.modules) - there if name.partition(".")[0] == "pipelines"], "not self-contained"
try:
    model.unwrap_python_model().predict(None, pd.DataFrame({"else": ["x"]}))
except ValueError as error:
    print(json.dumps({"rows": found.to_dict("records"), "told": str(error)}, default=list))
"""


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


@pytest.mark.parametrize("task", ["kind", "close", "pick", "score"])
def test_served_answers_are_the_stages(made: dict[str, Path], task: str, tmp_path: Path) -> None:
    import mlflow

    served = serving.of(made["out"] / "models" / task)
    mlflow.pyfunc.save_model(
        tmp_path / "m", python_model=served.code, code_paths=served.beside, signature=served.signature,
        artifacts={"model": str(made["out"] / "models" / task)}, pip_requirements=["mlflow"],
    )  # fmt: skip
    asked = list(reading.rows(made["data"] / "tasks", task, "test", None))  # type: ignore[arg-type]
    columns = json.loads((made["out"] / "models" / task / "task.json").read_text())["columns"]
    (tmp_path / "rows.json").write_text(json.dumps([{name: row[name] for name in columns} for row in asked]))
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(tmp_path / "m"), str(tmp_path / "rows.json")]
    keep = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=keep, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert f"task {task} needs the columns {', '.join(columns)}; missing: {', '.join(columns)}" in said["told"]

    found = pd.read_parquet(made["out"] / "evaluation.parquet").set_index("id")
    ours = [found.score[f"{task}:{row['id']}"] for row in asked]
    if task == "score":
        assert [-((one["label"] - row["label"]) ** 2) for one, row in zip(said["rows"], asked, strict=True)] == (
            pytest.approx(ours, abs=1e-4)
        )
        return
    right = [float(one["label"] == row["label_text"]) for one, row in zip(said["rows"], asked, strict=True)]
    assert right == ours
    assert all(sum(one["probabilities"]) == pytest.approx(1.0, abs=1e-5) for one in said["rows"])
    assert all(max(one["probabilities"]) == one["probabilities"][one["label_id"]] for one in said["rows"])
