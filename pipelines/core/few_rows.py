"""Products of few rows with large matrices on a CPU: the matrices are brought into oneDNN's order once, not every time.

That reordering is a quarter of a product of 1 to 256 rows in bf16. What comes out is the same, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipelines.core import cpu

ROWS = 256  # of more the reordering is a small share, and another kernel may sum in another order


@contextmanager
def quick(model: Any, precision: str) -> Iterator[None]:
    """Inside, linear layers of a model on a CPU multiply up to `ROWS` rows with a reordered copy of their weights.

    Without gradients, and while the weights do not change. Where it is computed in anything but bf16, nothing happens.
    """
    parts = model.modules() if _helps(precision) else ()
    linear = [part for part in parts if type(part) is torch.nn.Linear and part.weight.device.type == "cpu"]
    for part in linear:
        part.forward = product(part.weight.detach(), part.bias, precision)  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in linear:
            del part.forward


def product(weight: torch.Tensor, bias: torch.Tensor | None, precision: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """x -> x W^T + b, as `torch.autocast` has it where it helps: in bf16 whatever the weights' type.

    The copy is made when it is first needed: of the layers of a model, such as its adapters, not all are.
    """
    ordered: list[torch.Tensor] = []
    helps = _helps(precision) and weight.device.type == "cpu"
    added = bias.detach().bfloat16() if helps and bias is not None else None

    def multiply(rows: torch.Tensor) -> torch.Tensor:
        if not helps or rows.numel() > ROWS * weight.shape[1]:
            return torch.nn.functional.linear(rows, weight, bias)
        if not ordered:
            ordered.append(torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), ROWS))
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows.bfloat16(), ordered[0], added, "none", [], "")
        return found

    return multiply


def _helps(precision: str) -> bool:
    """Whether this processor and this torch have the product."""
    return precision == "bf16" and cpu.multiplies(torch.bfloat16)
