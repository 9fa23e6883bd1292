"""A model behind MLflow, asked in another process and folder, where nothing else of the project is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.core import serving

CODE = """
import json, sys
there = set(sys.modules)
import mlflow, pandas as pd
asked = json.load(open("asked.json"))
model = mlflow.pyfunc.load_model("m")
found = model.predict(pd.DataFrame(asked["rows"]), params=asked["params"])
assert not [name for name in set(sys.modules) - there if name.partition(".")[0] == "pipelines"], "not self-contained"
try:  # without MLflow's own checks, which would refuse some of it first
    model.unwrap_python_model().predict(None, pd.DataFrame(asked["wrong"]))
except ValueError as error:
    print(json.dumps({"rows": found.to_dict("records"), "told": str(error)}, default=list))
"""


class Said(NamedTuple):
    """What a served model answers."""

    rows: list[dict[str, Any]]
    told: str  # about the rows that it does not accept


def ask(
    folder: Path,
    place: Path,
    rows: Sequence[Mapping[str, Any]],
    wrong: Sequence[Mapping[str, Any]],
    params: Mapping[str, Any] | None = None,
) -> Said:
    """Save a model's directory as the registry does, load it in `place` by a fresh interpreter and ask it.

    Args:
        wrong: rows that it must refuse with a ValueError.
    """
    import mlflow

    how = serving.of(folder)
    mlflow.pyfunc.save_model(
        place / "m", python_model=how.code, code_paths=how.beside, signature=how.signature,
        artifacts={"model": str(folder)}, pip_requirements=["mlflow"],
    )  # fmt: skip
    asked = {"rows": [dict(row) for row in rows], "wrong": [dict(row) for row in wrong], "params": dict(params or {})}
    (place / "asked.json").write_text(json.dumps(asked))
    keep = {"PATH": os.environ["PATH"], "HOME": str(place)}
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(command, cwd=place, env=keep, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Said(**json.loads(done.stdout.splitlines()[-1]))
