"""A fine-tuned task model as MLflow serves it ("models from code"): a task's columns in, labels and probabilities out.

MLflow copies this file, and `task_sequences.py` beside it, into the model's folder and runs them there, on machines
that have nothing else of this project. So it imports nothing from `pipelines`, and its last line, which MLflow's format
asks for, acts at import.

Input: the columns that `task.json` names: `text`; `premise`, `hypothesis`; `first`, `second`; or `context` and
`choices` (a list of texts). Output: `label` (the class's name, the right candidate's text, or the score), `label_id`
(its number; not for scores) and `probabilities` (of each class or candidate; not for scores).
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.models import set_model


class TaskModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow ships no types for it
    """A Hugging Face classifier with a `task.json` behind MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        """Load model, tokenizer and task from the artifact directory `model`."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.cells = importlib.import_module("serving_cells")  # logged beside this file
        place = Path(context.artifacts["model"])
        self.task = json.loads((place / "task.json").read_text(encoding="utf-8"))
        self.tokenizer = AutoTokenizer.from_pretrained(place)
        self.model = importlib.import_module("cpu").load(place, AutoModelForSequenceClassification)
        self.made = importlib.import_module("task_sequences")  # logged beside this file
        self.special = self.made.Special(*self.tokenizer.convert_tokens_to_ids(list(self.made.SPELLINGS)))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """The answer to each row.

        Raises:
            ValueError: a column is missing, a cell holds no text, or a row has no candidates.
        """
        missing = [name for name in self.task["columns"] if name not in model_input]
        if missing:
            raise ValueError(
                f"task {self.task['task']} needs the columns {', '.join(self.task['columns'])}; missing: "
                f"{', '.join(missing)} (found: {', '.join(map(str, model_input.columns))})"
            )
        given = model_input[self.task["columns"]].to_dict("records")
        rows = [self._answer(number, row) for number, row in enumerate(given)]
        return pd.DataFrame(rows, index=model_input.index)

    def _answer(self, number: int, row: dict[str, Any]) -> dict[str, Any]:
        """One row of the output."""
        import torch

        choices = self.cells.texts(row.get("choices", []), number, "choices")
        if self.task["kind"] == "choice" and not choices:
            raise ValueError(f"task {self.task['task']}: a row has no choices")
        columns = [name for name in self.task["columns"] if name != "choices"]
        parts = self._encode([self.cells.text(row[name], number, name) for name in columns])
        asked = (self.task["kind"], parts, self._encode(choices), self.special, self.task["max_length"])
        with torch.inference_mode():  # one sequence at a time: padding would change the sums of some models
            found = [self._logits(torch.tensor([ids])) for ids in self.made.sequences(*asked).ids]
        # Candidates side by side; of a similarity the sum over both orders.
        said = torch.cat(found) if choices else torch.stack(found).sum(dim=0)
        if self.task["regression"]:
            return {"label": float(said[0])}
        sure, best = torch.softmax(said, dim=0).tolist(), int(said.argmax())
        names = choices or self.task["labels"]
        return {"label": names[best], "label_id": best, "probabilities": sure}

    def _logits(self, ids: Any) -> Any:
        """(1, tokens) to (outputs,) fp32."""
        return self.model(input_ids=ids).logits[0].float()

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids; a special token's spelling inside a text is text."""
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        return [item.ids for item in backend.encode_batch(texts, add_special_tokens=False)]


set_model(TaskModel())
