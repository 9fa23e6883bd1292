"""Losses straight from hidden states: logits exist a chunk of tokens at a time, and gradients are formed with them.

What is done with a chunk's logits is done a few rows at a time, which on a CPU stay in its cache.

Shapes: N tokens, D width, V vocabulary. At N = 2048, V = 49152 all logits would be three fp32 arrays of 400 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

CHUNK = 512  # tokens whose logits exist at one time: at V = 49152 in bf16, 50 MB
ROWS = 16  # of a chunk; one fp32 array of them: 3 MB

# Given rows of logits (n, V) and where they lie: puts their gradient in their place, returns the sum of losses.
Replace = Callable[[torch.Tensor, slice], torch.Tensor]


def pieces(hidden: torch.Tensor, head: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Where a few rows lie and their logits (n, V), in order; without a gradient.

    Args:
        hidden: (N, D), in the type to compute in.
        head: (V, D), the output embedding, of the same type.
    """
    for start, logits in _chunks(hidden, head):
        yield from _rows(start, logits)


def _chunks(hidden: torch.Tensor, head: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Where a chunk begins, and its logits.

    They stand in one place, used again and again: fresh pages for each would cost more than the product.
    """
    buffer = hidden.new_empty(min(CHUNK, len(hidden)), len(head))
    for start in range(0, len(hidden), CHUNK):
        logits = buffer[: len(hidden) - start]
        torch.mm(hidden[start : start + CHUNK], head.t(), out=logits)
        yield start, logits


def _rows(start: int, logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """A chunk in parts: on a CPU of `ROWS`."""
    step = ROWS if logits.device.type == "cpu" else len(logits)
    for first in range(0, len(logits), step):
        part = logits[first : first + step]
        yield slice(start + first, start + first + len(part)), part


def log_softmax(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Of logits / temperature, over the vocabulary, in fp32 (fp64 where the logits are)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    if temperature != 1.0:
        return torch.log_softmax(logits.to(wide) / temperature, dim=1)
    return torch.log_softmax(logits, dim=1, dtype=wide)


def gradients(
    hidden: torch.Tensor, weight: torch.Tensor, of_weight: bool, replace: Replace
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The sum of losses, and its gradients with respect to `hidden` and, if asked for, `weight`."""
    head = weight.to(hidden.dtype)
    hidden_grad = torch.empty_like(hidden)
    weight_grad = torch.zeros_like(weight) if of_weight else None
    total = hidden.new_zeros((), dtype=torch.float32)
    for start, logits in _chunks(hidden, head):
        for part, rows in _rows(start, logits):
            total = total + replace(rows, part)
        chunk = slice(start, start + len(logits))
        torch.mm(logits, head, out=hidden_grad[chunk])
        if weight_grad is not None:
            weight_grad += (logits.t() @ hidden[chunk]).to(weight.dtype)
    return total, hidden_grad, weight_grad


def summed_loss(hidden: torch.Tensor, weight: torch.Tensor, replace: Replace) -> torch.Tensor:
    """Sum of the losses that `replace` gives, with a gradient.

    Args:
        hidden: (N, D), in the type to compute in; gets a gradient.
        weight: (V, D), the output embedding; gets a gradient if it asks for one.
        replace: called for a few rows at a time, in order.
    """
    total: torch.Tensor = _SummedLoss.apply(hidden, weight, replace)  # type: ignore[no-untyped-call]
    return total


class _SummedLoss(torch.autograd.Function):
    """Forms the gradients in the forward, so that each chunk's logits are computed once."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, replace: Replace) -> torch.Tensor:
        total, *found = gradients(hidden, weight, ctx.needs_input_grad[1], replace)
        ctx.save_for_backward(*found)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = grads[0].to(hidden_grad.dtype)
        return hidden_grad * scale, None if weight_grad is None else weight_grad * grads[0], None
