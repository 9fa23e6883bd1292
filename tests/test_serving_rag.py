"""An assistant and an index behind MLflow, in another process and folder, say what they say here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import assistants
import pytest

from pipelines.core import assistant, retrieval, serving, versions
from pipelines.core.generate import Sampling

CODE = """
import json, sys
there = set(sys.modules)
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
column, rows, params = json.loads(sys.argv[2])
found = model.predict(pd.DataFrame({column: rows}), params=params)
assert not [name for name in set(sys.modules) - there if name.partition(".")[0] == "pipelines"], "not self-contained"
try:
    model.predict(pd.DataFrame({column: [rows[0], " "]}))
except Exception as error:
    print(json.dumps({"rows": found.to_dict("records"), "told": str(error)}))
"""


def served(folder: Path, root: Path, asked: list[Any]) -> dict[str, Any]:
    """What a model says that is loaded where nothing else of the project is."""
    import mlflow

    how = serving.of(folder)
    mlflow.pyfunc.save_model(
        root / "m", python_model=how.code, code_paths=how.beside, signature=how.signature,
        artifacts={"model": str(folder)}, pip_requirements=["mlflow"],
    )  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(root / "m"), json.dumps(asked)]
    keep = {"PATH": os.environ["PATH"], "HOME": str(root), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, cwd=root, env=keep, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.mark.parametrize("packed", [False, True])
def test_an_assistants_answers(packed: bool, tmp_path: Path) -> None:
    place = assistants.folder(tmp_path / "assistant", packed)
    questions = ["What is the area of shape 3?", "도형의 넓이는?"]
    said = served(place, tmp_path, ["question", questions, {"temperature": 2.0, "seed": 5}])
    opened = assistant.Assistant.open(place)
    for row, question in zip(said["rows"], questions, strict=True):
        reply = opened.answer(question, sampling=Sampling(max_new_tokens=12, temperature=2.0, seed=5))
        assert row["answer"] == reply.text and row["refused"] is reply.refused
        assert json.loads(row["sources"]) == [pytest.approx(source._asdict()) for source in reply.sources]
    assert "row 1: the question is empty" in said["told"]


def test_an_indexs_passages(tmp_path: Path) -> None:
    place = assistants.folder(tmp_path / "assistant") / "index"
    said = served(place, tmp_path, ["query", ["area of shape 3"], {"count": 3, "method": "bm25"}])
    expected = retrieval.Index.open(place).search("area of shape 3", 3, method="bm25")
    found = json.loads(said["rows"][0]["passages"])
    assert [one["chunk"] for one in found] == [one.chunk for one in expected] and len(found) == 3
    assert found[0] == pytest.approx(expected[0]._asdict())
    assert "row 1: the query is empty" in said["told"]


def test_all_that_is_imported_by_name_lies_beside() -> None:
    """Also what the queries of the tests above do not reach."""
    beside = {Path(place).stem for place in serving.RETRIEVING}
    for place in serving.RETRIEVING:
        assert set(re.findall(r'_ours\("(\w+)"\)', Path(place).read_text())) <= beside, place


def test_what_they_need_is_pinned(tmp_path: Path) -> None:
    place = assistants.folder(tmp_path / "assistant")
    assert serving.known(place) and serving.known(place / "index") and not serving.known(tmp_path)
    for folder in (place, place / "index"):
        assert f"faiss-cpu=={version('faiss-cpu')}" in versions.requirements(serving.of(folder).needs)
    assert serving.of(place / "model").needs == ()
