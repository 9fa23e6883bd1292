"""The compressed forms of a model: what they are called, and how a directory of each is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

PLAIN = "plain"  # a model as it is, in bf16
GGUF: dict[str, Literal["f16", "q8_0", "q4_0"]] = {"gguf-f16": "f16", "gguf-q8_0": "q8_0", "gguf-q4_0": "q4_0"}


def load(place: Path, kind: str, classifier: bool = False) -> Any:
    """A model ready to answer on the CPU, its floating-point part in bf16.

    Args:
        kind: `PLAIN` or the name of a variant.
        classifier: whether it scores texts rather than continues them (a reward model).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from pipelines.core import bnb_variants, int4, int8

    if kind == "int8":
        return int8.load(place, classifier)
    if kind == "int4":
        return int4.load(place, classifier)
    if kind in ("nf4", "llm-int8"):
        return bnb_variants.load(place, classifier)
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    if kind in GGUF:  # as transformers reads it: made dense
        (file,) = place.glob("*.gguf")
        return auto.from_pretrained(place, gguf_file=file.name, dtype=torch.bfloat16).eval()
    return auto.from_pretrained(place, dtype=torch.bfloat16).eval()


def weight_of(layer: Any) -> Any:
    """The weight (out, in) that a layer stands for, as a torch tensor; None for what is no linear layer."""
    import torch

    from pipelines.core import bnb_variants

    if isinstance(layer, torch.nn.Linear) and layer.weight.is_floating_point():
        return layer.weight
    if hasattr(layer, "dense") and hasattr(layer, "in_features"):
        return layer.dense()
    return bnb_variants.weight_of(layer)


def dense(model: Any, kind: str) -> Any:
    """A model whose packed layers of ours are made dense, in the model itself: what many rows at a time need."""
    from pipelines.core import int4, int8

    if kind == "int8":
        return int8.dense(model)
    return int4.dense(model) if kind == "int4" else model


def size(place: Path) -> int:
    """Bytes of a directory's weights: all its safetensors, or its GGUF file."""
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.gguf") for file in place.glob(pattern))
