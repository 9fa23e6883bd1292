"""The held-out examples of the corpus: what a model, and a compressor, needs to say them.

Used wherever a model's grasp of the corpus is measured. Bits per byte, with the same bytes for every tokenizer.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.core import attention, language_models, reading, scoring, statistics
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError

PROMPT_CHARACTERS = 80


@dataclass(frozen=True)
class HeldOut:
    """Beginnings of held-out documents, in an order that belongs to their ids."""

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, data: Path, budget: int) -> HeldOut:
        """About `budget` bytes of the test side of the corpus.

        Raises:
            ArtifactError: the data have no held-out corpus.
        """
        examples = reading.held_out_examples(data, budget)
        return cls(*(tuple(example[key] for example in examples) for key in ("id", "group", "text")))

    @property
    def sizes(self) -> list[int]:
        """UTF-8 bytes of each example."""
        return [len(text.encode()) for text in self.texts]

    def prompts(self, count: int) -> list[str]:
        """Beginnings of the first examples, for a model to continue."""
        return [text[:PROMPT_CHARACTERS] for text in self.texts[:count]]

    def bits(self, model: Any, tokenizer: Any, context: StageContext, what: str) -> list[float]:
        """Bits of each example under a model, computed in the type models are saved in, so that any two compare."""
        model.eval()
        adapted = hasattr(model, "peft_config")
        judged = model if adapted or model.dtype is context.dtype else copy.deepcopy(model).to(context.dtype)

        def tell(done: int, total: int) -> None:
            context.progress(done, total, scoring=what)
            context.stop_if_asked()

        return scoring.model_bits(judged, tokenizer, list(self.texts), context.precision, tell)

    def bits_of_directory(self, place: Path, context: StageContext, what: str) -> list[float]:
        """Bits of each example under the model, and with the tokenizer, of a Hugging Face directory."""
        tokenizer = language_models.load_tokenizer(str(place))
        kind = attention.choose(context.device, scoring.WINDOW)
        model = language_models.load(str(place), context.dtype, kind).to(context.device)
        return self.bits(model, tokenizer, context, what)

    def classical_bits(self, data: Path, seed: int) -> list[float]:
        """Bits of each example for LZMA that has read training text of the same corpus.

        Raises:
            ArtifactError: there is no training text to read.
        """
        # Four times what is needed, since a share of documents is not a share of bytes; the tail is used.
        share = scoring.PRIMER_BYTES * 4 / max(1, reading.corpus_bytes(data, "train"))
        primer = "\n".join(reading.sample(data, "train", share, seed))
        if not primer:
            raise ArtifactError("the training corpus is too small to compare with a compressor: add text")
        return scoring.classical_bits(list(self.texts), primer)

    def write(self, place: Path, scores: dict[str, list[float]]) -> None:
        """Write one row an example: id, group, bytes and the scores."""
        known: dict[str, list[Any]] = {"id": list(self.ids), "group": list(self.groups), "bytes": self.sizes}
        reading.write_evaluation(place, {**known, **scores})

    def metrics(self, scores: dict[str, list[float]]) -> dict[str, float]:
        """Bits per byte with 95 % intervals (bootstrap, groups drawn whole; paired for the gain over before)."""
        import numpy as np

        sizes = np.array(self.sizes, dtype=float)
        bits = {name: np.array(values) for name, values in scores.items()}
        after = statistics.bootstrap(bits["bits"], sizes, group=self.groups)
        gain = statistics.paired_bootstrap(bits["bits_before"], bits["bits"], sizes, group=self.groups)
        return {
            "bits_per_byte": after.estimate,
            "bits_per_byte_low": after.low,
            "bits_per_byte_high": after.high,
            "bits_per_byte_before": float(bits["bits_before"].sum() / sizes.sum()),
            "bits_per_byte_classical": float(bits["bits_classical"].sum() / sizes.sum()),
            "gain_bits_per_byte": gain.estimate,
            "gain_bits_per_byte_low": gain.low,
            "gain_bits_per_byte_high": gain.high,
            "held_out_bytes": float(sizes.sum()),
        }
