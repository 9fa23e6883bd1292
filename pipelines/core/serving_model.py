"""A text model as MLflow serves it ("models from code"): prompts in, texts out.

MLflow copies this file into the model's folder and runs it there, on machines that have nothing else of this
project; beside it lie the files that packed layers of ours need. So it imports nothing from `pipelines`, and its last
line, which MLflow's format asks for, is the one statement of the project that acts at import.

Input: a column `prompt`. Params: `max_new_tokens`, `temperature` (0.0 takes the likeliest token), `seed`, and
`chat`, which puts the prompt into the tokenizer's chat template when it has one. Output: a column `text`.
"""

from __future__ import annotations

import importlib
import json
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

        place = context.artifacts["model"]
        self.quick = _prepare(Path(place))
        self.tokenizer = AutoTokenizer.from_pretrained(place)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(place).eval()
        for module in self.model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would repack the weights in place
                module.support_avx512bf16_for_cpu = False

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
                new = self._quickly(tokens, options) if self.quick else self._slowly(tokens, options, sampling)
                texts.append(self.tokenizer.decode(new, skip_special_tokens=True))
        return pd.DataFrame({"text": texts})

    def _slowly(self, tokens: Any, options: dict[str, Any], sampling: dict[str, Any]) -> Any:
        """New tokens by transformers, for any architecture."""
        import torch

        made = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=int(options["max_new_tokens"]),
            pad_token_id=self.tokenizer.pad_token_id,
            **sampling,
        )
        return made[0, tokens.shape[1] :]

    def _quickly(self, tokens: Any, options: dict[str, Any]) -> list[int]:
        """New tokens by `decoding.Decoder`, several times as fast where layers are packed."""
        decoding = importlib.import_module("decoding")
        count = int(options["max_new_tokens"])
        decoder = decoding.Decoder(self.model, tokens.shape[1] + count)
        ends = self.model.generation_config.eos_token_id
        stops = set(ends) if isinstance(ends, list) else {self.tokenizer.eos_token_id if ends is None else ends}
        made: list[int] = decoder.generate(
            tokens[0].tolist(), count, stops, float(options["temperature"]), int(options["seed"])
        )
        return made

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


def _prepare(place: Path) -> bool:
    """Make packed layers known to transformers; whether there are any, in an architecture that `decoding` knows."""
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    method = (config.get("quantization_config") or {}).get("quant_method", "")
    if not method.startswith("sluice-"):
        return False
    importlib.import_module(method.removeprefix("sluice-")).register()
    known: bool = config["model_type"] in importlib.import_module("decoding").FAMILIES
    return known


set_model(TextModel())
