"""A text model as MLflow serves it ("models from code"): prompts in, texts out.

MLflow copies this file into the model's folder and runs it there, on machines that have nothing else of this
project. So it imports nothing from `pipelines`, and its last line, which MLflow's format asks for, is the one
statement of the project that acts at import.

Input: a column `prompt`. Params: `max_new_tokens`, `temperature` (0.0 takes the likeliest token), `seed`, and
`chat`, which puts the prompt into the tokenizer's chat template when it has one. Output: a column `text`.
"""

from __future__ import annotations

from typing import Any

import mlflow
import pandas as pd
from mlflow.models import set_model


class TextModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow ships no types for it
    """A Hugging Face causal language model behind MLflow's `predict`."""

    def load_context(self, context: Any) -> None:
        """Load model and tokenizer from the artifact directory `model`."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place = context.artifacts["model"]
        self.tokenizer = AutoTokenizer.from_pretrained(place)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(place).eval()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Continue each prompt. The same params and seed give the same texts."""
        import torch

        longest = getattr(self.model.config, "max_position_embeddings", None)
        options = {"max_new_tokens": 64, "temperature": 0.0, "seed": 0, "chat": False, **(params or {})}
        sampling: dict[str, Any] = {"do_sample": False}
        if options["temperature"] > 0:
            sampling = {"do_sample": True, "temperature": float(options["temperature"]), "top_k": 0}
        texts = []
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(int(options["seed"]))
            for prompt in model_input["prompt"]:
                # One at a time: padding would change the positions, and so the text, of some models
                tokens = self._tokens(str(prompt), bool(options["chat"]))
                if longest is not None:  # the end of a prompt that is too long is what a text continues
                    tokens = tokens[:, -max(1, longest - int(options["max_new_tokens"])) :]
                made = self.model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=int(options["max_new_tokens"]),
                    pad_token_id=self.tokenizer.pad_token_id,
                    **sampling,
                )
                new = made[0, tokens.shape[1] :]
                texts.append(self.tokenizer.decode(new, skip_special_tokens=True))
        return pd.DataFrame({"text": texts})

    def _tokens(self, prompt: str, chat: bool) -> Any:
        """Token ids of a prompt, shape (1, length >= 1)."""
        import torch

        template = chat and bool(self.tokenizer.chat_template)
        if template:
            prompt = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
        ids = self.tokenizer(prompt, add_special_tokens=not template)["input_ids"]
        start = self.tokenizer.bos_token_id
        if not ids:  # an empty prompt: from the start of a text
            ids = [self.tokenizer.eos_token_id if start is None else start]
        return torch.tensor([ids])


set_model(TextModel())
