"""A cross-encoder: query and passage read together, one score out.

Nogueira & Cho, "Passage Re-ranking with BERT" (2019).

Flat-importable: imports nothing of the project.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

BATCH = 8


class Reranker:
    """A sequence classifier with one label."""

    def __init__(self, place: Path) -> None:
        """Load a directory.

        Raises:
            ValueError: no safetensors, which an index carries along; another number of labels; transformers cannot
                load it.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if not list(place.glob("model*.safetensors")):
            raise ValueError(f"re-ranker {place}: the directory has no model.safetensors")
        try:
            self.model = AutoModelForSequenceClassification.from_pretrained(place, dtype=torch.float32).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(place)
        except Exception as error:  # of a damaged tokenizer.json it has no narrower class
            told = f"{type(error).__name__}: {error}"
            raise ValueError(f"re-ranker {place}: transformers cannot load it: {told}") from None
        if self.model.config.num_labels != 1:
            raise ValueError(f"re-ranker {place}: it has {self.model.config.num_labels} labels; accepted: 1")
        longest = getattr(self.model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        self.window = min(longest, self.tokenizer.model_max_length, 512)

    @torch.inference_mode()
    def scores(self, query: str, passages: Sequence[str]) -> list[float]:
        """How well each passage answers the query, on the model's own scale; the end of what is too long is cut off."""
        made: list[float] = []
        for first in range(0, len(passages), BATCH):
            some = list(passages[first : first + BATCH])
            # A query of any length leaves half of the window to the passage
            short = self.tokenizer.decode(
                self.tokenizer(query, add_special_tokens=False)["input_ids"][: self.window // 2]
            )
            read = self.tokenizer(
                [short] * len(some), some, truncation="only_second", max_length=self.window, padding=True,
                return_tensors="pt",
            )  # fmt: skip
            made += self.model(**read).logits[:, 0].float().tolist()
        return made
