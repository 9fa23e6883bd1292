"""What a model that was loaded needs before it answers on a CPU.

This file imports nothing of the project: a registered model carries it along.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

ASKED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def multiplies(kind: torch.dtype) -> bool:
    """Whether oneDNN has products of a type on this processor.

    Without AVX-512 (x86) or its own instructions for bf16 (ARM) it has none of bf16, and torch's loops take fifty times
    as long as a product in fp32.
    """
    if kind not in ASKED:
        return True
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there and getattr(torch.ops.mkldnn, ASKED[kind])())


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
