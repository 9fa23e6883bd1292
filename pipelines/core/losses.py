"""Losses as pure functions of tensors. Shapes: N tokens, D width, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch

IGNORE = -100  # a label that is not supervised, as in torch and transformers
CHUNK = 256  # tokens whose logits exist at one time: at V = 49152 in fp32, 50 MB


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of token losses straight from hidden states; gradients are formed chunk by chunk in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        head = weight.to(hidden.dtype)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        buffers = _buffers(hidden, head)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits, probabilities, gold = _chunk(hidden[part], head, labels[part], buffers)
            kept = (labels[part] != IGNORE)[:, None]
            total = total + ((probabilities.log_z - gold) * kept).sum()
            gradient = probabilities.values
            gradient.scatter_add_(1, labels[part].clamp(min=0)[:, None], gradient.new_full((len(gold), 1), -1.0))
            logits.copy_(gradient.mul_(kept))
            torch.mm(logits, head, out=hidden_grad[part])
            if weight_grad is not None:
                weight_grad += (logits.t() @ hidden[part]).to(weight.dtype)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = grads[0].to(hidden_grad.dtype)
        return hidden_grad * scale, None if weight_grad is None else weight_grad * grads[0], None


class _Softmax:
    """Probabilities (N, V) in fp32 and the log of their normaliser (N, 1)."""

    def __init__(self, values: torch.Tensor, log_z: torch.Tensor) -> None:
        self.values, self.log_z = values, log_z


def _buffers(hidden: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = min(CHUNK, len(hidden))
    return hidden.new_empty(rows, len(head)), hidden.new_empty(rows, len(head), dtype=torch.float32)


def _chunk(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, buffers: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, _Softmax, torch.Tensor]:
    """Logits in the model's type, their softmax in fp32, and the logit of each label (N, 1)."""
    logits, values = buffers[0][: len(hidden)], buffers[1][: len(hidden)]
    torch.mm(hidden, head.t(), out=logits)
    values.copy_(logits)
    gold = values.gather(1, labels.clamp(min=0)[:, None])
    peak = values.amax(dim=1, keepdim=True)
    mass = values.sub_(peak).exp_().sum(dim=1, keepdim=True)
    return logits, _Softmax(values.div_(mass), mass.log() + peak), gold


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of the next token, without ever holding all logits.

    Equal to `F.cross_entropy(hidden @ weight.T, labels)`, in the memory of one chunk: at N = 2048, V = 49152
    the plain way makes three fp32 arrays of 400 MB and takes a third of a training step.

    Args:
        hidden: (N, D), in the type to compute in.
        weight: (V, D), the output embedding; gets a gradient if it asks for one.
        labels: (N,) int64; `IGNORE` is not supervised.

    Raises:
        ValueError: no token is supervised.
    """
    count = int((labels != IGNORE).sum())
    if count == 0:
        raise ValueError("a batch without a supervised token")
    total: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, labels)  # type: ignore[no-untyped-call]
    return total / count


@torch.no_grad()
def label_log_probabilities(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probability in nats of each label, (N,) fp32; 0 where the label is `IGNORE`. Shapes as above."""
    head = weight.to(hidden.dtype)
    buffers = _buffers(hidden, head)
    parts = []
    for start in range(0, len(hidden), CHUNK):
        part = slice(start, start + CHUNK)
        _, softmax, gold = _chunk(hidden[part], head, labels[part], buffers)
        parts.append(((gold - softmax.log_z) * (labels[part] != IGNORE)[:, None])[:, 0])
    return torch.cat(parts)
