"""Losses as pure functions of tensors. Shapes: N tokens, D width, V vocabulary."""

from __future__ import annotations

from typing import Any, NamedTuple

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
        buffer = _buffer(hidden, head)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            scores = _log_probabilities(hidden[part], head, buffer)
            kept = labels[part] != IGNORE
            target = labels[part].clamp(min=0)[:, None]
            total = total - (scores.gather(1, target)[:, 0] * kept).sum()
            # d loss / d logits = softmax - one-hot of the label
            gradient = scores.exp_().scatter_add_(1, target, scores.new_full(target.shape, -1.0))
            if not kept.all():
                gradient[~kept] = 0
            logits_grad = buffer[: len(target)].copy_(gradient)
            torch.mm(logits_grad, head, out=hidden_grad[part])
            if weight_grad is not None:
                weight_grad += (logits_grad.t() @ hidden[part]).to(weight.dtype)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = grads[0].to(hidden_grad.dtype)
        return hidden_grad * scale, None if weight_grad is None else weight_grad * grads[0], None


def _buffer(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Room for one chunk of logits, used again and again: fresh pages for each would cost more than the product."""
    return hidden.new_empty(min(CHUNK, len(hidden)), len(head))


def _log_probabilities(
    hidden: torch.Tensor, head: torch.Tensor, buffer: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Log-softmax in fp32 (N, V) of logits / temperature in the model's type; N is at most the buffer's rows."""
    logits = buffer[: len(hidden)]
    torch.mm(hidden, head.t(), out=logits)
    if temperature != 1.0:
        return torch.log_softmax(logits.float() / temperature, dim=1)
    return torch.log_softmax(logits, dim=1, dtype=torch.float32)


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
    buffer = _buffer(hidden, head)
    parts = []
    for start in range(0, len(hidden), CHUNK):
        part = slice(start, start + CHUNK)
        scores = _log_probabilities(hidden[part], head, buffer)
        gold = scores.gather(1, labels[part].clamp(min=0)[:, None])[:, 0]
        parts.append(gold * (labels[part] != IGNORE))
    return torch.cat(parts)


class TokenScores(NamedTuple):
    """Of each token, (N,) fp32."""

    log_probabilities: torch.Tensor  # in nats, with a gradient
    entropies: torch.Tensor | None  # of the distribution the token was drawn from, in nats; without one; if asked for


class _TokenScores(torch.autograd.Function):
    """Log-probability of each label, and the entropy; the backward pass computes the logits once more."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float, spread: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        head = weight.to(hidden.dtype)
        buffer = _buffer(hidden, head)
        chosen, entropies = [], []
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            scores = _log_probabilities(hidden[part], head, buffer, temperature)
            chosen.append(scores.gather(1, labels[part, None])[:, 0])
            if spread:
                entropies.append(-(scores.exp() * scores).sum(dim=1))
        ctx.save_for_backward(hidden, weight, labels)
        ctx.temperature = temperature
        if not spread:
            return torch.cat(chosen), None
        found = torch.cat(entropies)
        ctx.mark_non_differentiable(found)
        return torch.cat(chosen), found

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None, None]:
        hidden, weight, labels = ctx.saved_tensors
        head = weight.to(hidden.dtype)
        buffer = _buffer(hidden, head)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            target = labels[part, None]
            # d log p(label) / d logits = (one-hot of the label - softmax) / temperature
            gradient = _log_probabilities(hidden[part], head, buffer, ctx.temperature).exp_().neg_()
            gradient.scatter_add_(1, target, gradient.new_ones(target.shape))
            gradient *= grads[0][part, None] / ctx.temperature
            logits_grad = buffer[: len(target)].copy_(gradient)
            torch.mm(logits_grad, head, out=hidden_grad[part])
            if weight_grad is not None:
                weight_grad += (logits_grad.t() @ hidden[part]).to(weight.dtype)
        return hidden_grad, weight_grad, None, None, None


def token_log_probabilities(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, entropies: bool = False
) -> TokenScores:
    """Log-probabilities of the labels under softmax(logits / temperature), and its entropies, chunk by chunk.

    Args:
        hidden: (N, D), in the type to compute in; gets a gradient.
        weight: (V, D), the output embedding; gets a gradient if it asks for one.
        labels: (N,) int64, each a token.
        entropies: they cost as much as the softmax.
    """
    return TokenScores(*_TokenScores.apply(hidden, weight, labels, temperature, entropies))  # type: ignore[no-untyped-call]
