"""An index as MLflow serves it ("models from code"): queries in, the passages that are found out.

MLflow copies this file into the model's folder and runs it there, on machines that have nothing else of this project;
beside it lie `retrieval.py` and what that imports. So it imports nothing from `pipelines`, and its last line, which
MLflow's format asks for, is the one statement of the project that acts at import.

Input: a column `query`. Params: `count`, of passages, and `method` (`hybrid`, `bm25` or `dense`). Output: a column
`passages`, as JSON a list of objects, best first, with chunk, document, title, text, url, score, relevance (null where
the passage has no vector), start, end, line, source.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.models import set_model


class RetrieverModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow ships no types for it
    """An index folder behind MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        """Open the artifact directory `model`."""
        self.cells = importlib.import_module("serving_cells")  # logged beside this file
        self.retrieval = importlib.import_module("retrieval")
        self.index = self.retrieval.Index.open(Path(context.artifacts["model"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Search for each query.

        Raises:
            ValueError: a query that is empty or no text, by its row; a method or a count that is not accepted.
        """
        options = {"count": 10, "method": "hybrid", **(params or {})}
        if options["method"] not in self.retrieval.METHODS or options["count"] < 1:
            accepted = f"method {', '.join(self.retrieval.METHODS)}; count 1 or more"
            raise ValueError(f"method {options['method']!r}, count {options['count']!r}; accepted: {accepted}")
        found = []
        for number, query in enumerate(model_input["query"]):
            asked = self.cells.text(query, number, "query")
            try:
                passages = self.index.search(asked, int(options["count"]), method=options["method"])
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from None
            found.append(json.dumps([_row(passage) for passage in passages], ensure_ascii=False))
        return pd.DataFrame({"passages": found})


def _row(passage: Any) -> dict[str, Any]:
    """A passage as JSON holds it, which has no NaN."""
    row: dict[str, Any] = passage._asdict()
    return row | {
        "score": float(passage.score),
        "relevance": float(passage.relevance) if passage.relevance == passage.relevance else None,
    }


set_model(RetrieverModel())
