"""The product of a LoRA layer with its matrix's: added where it is computed, not in two more passes over the output."""

from __future__ import annotations

from typing import Any

import torch


def fuse(model: Any) -> None:
    """Let each plain adapter of a model add its product in one kernel (`addmm`); what it computes stays W x + s B A x.

    peft multiplies B A x by s and adds it: at width 1536 the two passes take as long as half the product with W.
    Adapters of another kind (DoRA), or on weights packed by bitsandbytes, stay as they are.
    """
    from peft.tuners.lora.layer import Linear

    variant = _variant()
    for layer in model.modules():
        if isinstance(layer, Linear):
            for name in layer.lora_A:
                layer.lora_variant.setdefault(name, variant)


def _variant() -> Any:
    """peft's way to put another computation in the place of its own; peft takes seconds to import."""
    from peft.tuners.lora.layer import LoraVariant

    class Fused(LoraVariant):  # type: ignore[misc]
        @staticmethod
        def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)
            return found

        @staticmethod
        def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
            wide = orig_weight.data.float() + module.get_delta_weight(active_adapter)  # += between types is slow
            orig_weight.data.copy_(wide)

        @staticmethod
        def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)
            return found

        @staticmethod
        def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
            low = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
            flat, factor = result.flatten(0, -2), module.scaling[active_adapter]
            low, back = low.to(result.dtype).flatten(0, -2), module.lora_B[active_adapter].weight.to(result.dtype)
            return torch.addmm(flat, low, back.t(), alpha=factor).view(result.shape)

    return Fused()
