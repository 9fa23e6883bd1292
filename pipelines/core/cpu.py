"""Models on a CPU: loaded, and computed in a type that the processor multiplies.

This file imports nothing of the project: a registered model carries it along.
"""

from __future__ import annotations

import itertools
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

ASKED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def multiplies(kind: torch.dtype) -> bool:
    """Whether oneDNN has products of a type on this processor.

    Without AVX-512 (x86) or its own instructions for bf16 (ARM) it has none of bf16, and torch's loops take five to
    fifty times as long for many rows as fp32 does.
    """
    if kind not in ASKED:
        return True
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there and getattr(torch.ops.mkldnn, ASKED[kind])())


def precision(asked: str) -> str:
    """`bf16` where it is asked for, of a GPU or by what another machine has made, and multiplied here; else `fp32`."""
    return asked if asked != "bf16" or multiplies(torch.bfloat16) else "fp32"


def method(place: Path) -> str:
    """How the layers of a model directory are quantized, as its config names it; empty where they are not."""
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    return str((config.get("quantization_config") or {}).get("quant_method", ""))


def load(place: Path, auto: Any) -> Any:
    """The model of a directory in the type that it names, packed layers of ours or not, ready.

    Args:
        auto: transformers' class for it, such as `AutoModelForCausalLM`.
    """
    if (packed := method(place)).startswith("sluice-"):
        name = packed.removeprefix("sluice-")  # in the project `pipelines.core.NAME`, beside a registered model `NAME`
        import_module(f"{__package__}.{name}" if __package__ else name).register()
    return ready(auto.from_pretrained(place).eval())


def guarded(model: Any) -> Any:
    """The model itself, its 4-bit layers kept from packing their weights anew, in place, in the first evaluation.

    That is bitsandbytes 0.50's; what is packed so gives no gradient, and cannot be saved.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def ready(model: Any) -> Any:
    """The model itself, guarded; what is in a type that this processor does not multiply, in fp32, the same values."""
    for part in itertools.chain(model.parameters(), model.buffers()):
        if not multiplies(part.dtype):
            part.data = part.data.float()
    for module in model.modules():
        if not multiplies(getattr(module, "compute_dtype", torch.float32)):  # of bitsandbytes
            module.compute_dtype = torch.float32
    return guarded(model)
