"""A reward model as MLflow serves it ("models from code"): prompts with responses in, rewards out.

MLflow copies this file into the model's folder and runs it there, on machines that have nothing else of this project;
beside it lie `grounding.py`, what that imports, `transcripts.py`, and the files that packed layers need. So it imports
nothing from `pipelines`, and its last line, which MLflow's format asks for, acts at import.

Input: columns `prompt` (one user message, or a transcript in hh-rlhf's form, as the data have it) and `response`.
Output: a column `reward`, 0 for an average demonstration.
"""

from __future__ import annotations

import importlib
import json
import threading
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.models import set_model


class RewardModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow ships no types for it
    """A Hugging Face classifier of one label behind MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        """Load model and tokenizer from the artifact directory `model`."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.cells = importlib.import_module("serving_cells")  # logged beside this file
        self.grounding, self.free = importlib.import_module("grounding"), threading.Lock()
        self.transcripts = importlib.import_module("transcripts")
        place = Path(context.artifacts["model"])
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        self.mean = float(config["reward_mean"])
        self.tokenizer = AutoTokenizer.from_pretrained(place)
        self.model = importlib.import_module("cpu").load(place, AutoModelForSequenceClassification)
        self.longest = getattr(self.model.config, "max_position_embeddings", None)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """The reward of each response, read where its EOS stands.

        Raises:
            ValueError: a prompt or a response that is no text, or both longer than the model's context, by the row.
        """
        import torch

        rewards = []
        with torch.inference_mode():
            asked = zip(model_input["prompt"], model_input["response"], strict=True)
            for number, (prompt, response) in enumerate(asked):
                tokens = self._tokens(
                    self.cells.text(prompt, number, "prompt"), self.cells.text(response, number, "response")
                )
                if self.longest is not None and len(tokens) > self.longest:
                    raise ValueError(
                        f"row {number}: prompt and response take {len(tokens)} tokens; the model's context is "
                        f"{self.longest}"
                    )
                ids = torch.tensor([tokens])
                # One at a time, so that no padding is in the way; the head in fp32, as it was trained
                last = self.model.base_model(input_ids=ids).last_hidden_state[0, -1].float()
                rewards.append(float(self.model.score.weight.float()[0] @ last) - self.mean)
        return pd.DataFrame({"reward": rewards})

    def _tokens(self, prompt: str, response: str) -> list[int]:
        """The chat up to the EOS of the answer; as in training, what spells a special token is text."""
        said = [*self.transcripts.messages_of(prompt), {"role": "assistant", "content": response}]
        with self.free:  # a server may ask from several threads, and the tokenizer is changed for it
            tokens: list[int] = self.grounding.encode_answered(self.tokenizer, said)
        return tokens


set_model(RewardModel())
