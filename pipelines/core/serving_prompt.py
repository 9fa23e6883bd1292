"""A chosen prompt as MLflow serves it ("models from code"): a task's columns in, the messages for a chat model out.

MLflow copies this file, `prompt_rendering.py` and what that imports into the prompt's folder and runs them there, on
machines that have nothing else of this project. So it imports nothing from `pipelines`, and its last line, which
MLflow's format asks for, acts at import.

Input: the columns that `prompt.yaml` names: the question's, `choices` (a list of texts) where each question has its
own, and `passages` (a list of texts, best first) where the prompt shows some. Output: `messages`, a list of `role` and
`content`. Examples are chosen as in the stage, out of `examples.jsonl`.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import yaml
from mlflow.models import set_model


class PromptModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow ships no types for it
    """A prompt and its examples behind MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        """Read prompt and examples from the artifact directory `model`."""
        self.cells = importlib.import_module("serving_cells")  # logged beside this file
        place = Path(context.artifacts["model"])
        self.prompt = yaml.safe_load((place / "prompt.yaml").read_text(encoding="utf-8"))
        self.made = importlib.import_module("prompt_rendering")  # logged beside this file
        lines = (place / "examples.jsonl").read_text(encoding="utf-8").split("\n")  # a text may hold other line ends
        pool = [self.made.Example(**json.loads(line)) for line in lines if line]
        dials = self.prompt["examples"]
        self.choose = self.made.chooser(pool, dials["how"], dials["shots"], dials["seed"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """The messages of each row.

        Raises:
            ValueError: a column is missing, or a cell holds no text.
        """
        wanted = self.prompt["columns"]
        missing = [name for name in wanted if name not in model_input]
        if missing:
            raise ValueError(
                f"prompt {self.prompt['name']} needs the columns {', '.join(wanted)}; missing: {', '.join(missing)} "
                f"(found: {', '.join(map(str, model_input.columns))})"
            )
        given = model_input[wanted].to_dict("records")
        rows = [{"messages": self._messages(number, row)} for number, row in enumerate(given)]
        return pd.DataFrame(rows, index=model_input.index, columns=["messages"])

    def _messages(self, number: int, row: dict[str, Any]) -> list[dict[str, str]]:
        """The chat that asks one row."""
        options = self.cells.texts(row.pop("choices", self.prompt["labels"]), number, "choices")
        passages = self.cells.texts(row.pop("passages", []), number, "passages")
        columns = {name: self.cells.text(value, number, name) for name, value in row.items()}
        made: list[dict[str, str]] = self.made.messages(self.prompt, columns, options, self.choose(columns), passages)
        return made


set_model(PromptModel())
