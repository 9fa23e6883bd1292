"""Products of few rows with large matrices on a CPU: the matrices are brought into oneDNN's order once, not every time.

That reordering is a quarter of a product of 1 to 256 rows in bf16. What comes out is the same, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

ROWS = 256  # of more the reordering is a small share, and another kernel may sum in another order


@contextmanager
def quick(model: Any, precision: str) -> Iterator[None]:
    """Inside, linear layers of a model on a CPU multiply up to `ROWS` rows with a reordered copy of their weights.

    Without gradients, and while the weights do not change. Where it is computed in anything but bf16, nothing happens.
    """
    parts = model.modules() if precision == "bf16" and _there() else ()
    linear = [part for part in parts if type(part) is torch.nn.Linear and part.weight.device.type == "cpu"]
    for part in linear:
        part.forward = _forward(part)  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in linear:
            del part.forward


def _there() -> bool:
    """Whether this processor and this torch have the product."""
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(there and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _forward(part: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer's product, as `torch.autocast` has it: in bf16 whatever the weights' type."""
    weight, bias = part.weight.detach(), part.bias
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), ROWS)
    added = None if bias is None else bias.detach().bfloat16()

    def forward(rows: torch.Tensor) -> torch.Tensor:
        if rows.numel() > ROWS * part.in_features:
            return torch.nn.functional.linear(rows, weight, bias)
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows.bfloat16(), ordered, added, "none", [], "")
        return found

    return forward
