"""A text model as MLflow serves it ("models from code"): prompts in, texts out.

MLflow copies this file into the model's folder and runs it there, on machines that have nothing else of this
project; beside it lie `generate.py`, `grounding.py`, what these import, `transcripts.py`, and the files that packed
layers of ours need. So it imports nothing from `pipelines`, and its last line, which MLflow's format asks for, is the
one statement of the project that acts at import.

Input: a column `prompt`. Params: those of `generate.Sampling` (`max_new_tokens`, `temperature`, where 0.0 takes the
likeliest token, `top_k`, `top_p`, `repetition_penalty`, `stop`, a list of texts, and `seed`), and `chat`, which puts
the prompt (one user message, or a transcript in hh-rlhf's form, as the data have it) into the tokenizer's chat template
when it has one. Output: a column `text`. A text ends at the model's context, of which at most half is kept free for it:
of a prompt that is too long beside that, the end is continued.
"""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.models import set_model


class TextModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow ships no types for it
    """A Hugging Face causal language model behind MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        """Load model and tokenizer from the artifact directory `model`."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.cells = importlib.import_module("serving_cells")  # logged beside this file
        self.generate, self.grounding = importlib.import_module("generate"), importlib.import_module("grounding")
        self.transcripts = importlib.import_module("transcripts")
        place = Path(context.artifacts["model"])
        self.tokenizer = AutoTokenizer.from_pretrained(place)
        model = importlib.import_module("cpu").load(place, AutoModelForCausalLM)
        self.longest = getattr(model.config, "max_position_embeddings", None)
        self.decoder, self.free = self.generate.decoder(model), threading.Lock()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Continue each prompt, as if it were the only one. The same params and seed give the same texts.

        Raises:
            ValueError: a prompt that is no text, by its row; a param that is not accepted, by its name.
        """
        options = {"max_new_tokens": 64, "chat": False, **(params or {})}
        chat = bool(options.pop("chat"))
        sampling = self.generate.Sampling(**{**options, "stop": tuple(options.get("stop", ()))})
        texts = []
        with self.free:  # a server may ask from several threads; the decoder has room for one sequence
            for number, prompt in enumerate(model_input["prompt"]):
                ids = self._tokens(self.cells.text(prompt, number, "prompt"), chat)
                if self.longest is not None:  # the end of a prompt that is too long is what a text continues
                    ids = ids[-(self.longest - min(sampling.max_new_tokens, self.longest // 2)) :]
                texts.append("".join(self.generate.stream(self.decoder, self.tokenizer, ids, sampling)))
        return pd.DataFrame({"text": texts})

    def _tokens(self, prompt: str, chat: bool) -> list[int]:
        """Token ids of a prompt, one or more; in a chat, as in training, what spells a special token is text."""
        if chat and self.tokenizer.chat_template:
            asked: list[int] = self.grounding.encode(self.tokenizer, self.transcripts.messages_of(prompt))
            return asked
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        start = self.tokenizer.bos_token_id
        if not ids:  # an empty prompt: from the start of a text
            ids = [self.tokenizer.eos_token_id if start is None else start]
        return ids


set_model(TextModel())
