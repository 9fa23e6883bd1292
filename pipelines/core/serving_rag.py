"""An assistant as MLflow serves it ("models from code"): questions in, answers with their sources out.

MLflow copies this file into the model's folder and runs it there, on machines that have nothing else of this project;
beside it lie `assistant.py` and what that imports. So it imports nothing from `pipelines`, and its last line, which
MLflow's format asks for, is the one statement of the project that acts at import.

Input: a column `question`. Params: `max_new_tokens`, `temperature` (0.0 takes the likeliest text) and `seed`. Output:
`answer`, with marks `[n]`; `sources`, as JSON a list of objects with number, title, url, line, text, relevance, cited,
source; `refused`, whether nothing relevant was found or the model said that it does not know.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.models import set_model


class RagModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow ships no types for it
    """An assistant's folder behind MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        """Open the artifact directory `model`."""
        self.cells = importlib.import_module("serving_cells")  # logged beside this file
        self.assistant = importlib.import_module("assistant").Assistant.open(Path(context.artifacts["model"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answer each question, as if it were the only one. The same params give the same answers.

        Raises:
            ValueError: a question that is empty, no text or too long, by its row; a param that is not accepted, by its
                name.
        """
        options = {"max_new_tokens": self.assistant.settings.max_new_tokens, **(params or {})}
        sampling = self.assistant.generate.Sampling(**options)
        rows = []
        for number, question in enumerate(model_input["question"]):
            asked = self.cells.text(question, number, "question")
            try:
                reply = self.assistant.answer(asked, sampling=sampling)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from None
            sources = json.dumps([source._asdict() for source in reply.sources], ensure_ascii=False)
            rows.append({"answer": reply.text, "sources": sources, "refused": reply.refused})
        return pd.DataFrame(rows, columns=["answer", "sources", "refused"])


set_model(RagModel())
