"""Losses as pure functions of tensors. Shapes: N tokens, D width, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

IGNORE = -100  # a label that is not supervised, as in torch and transformers
Kind = Literal["forward", "reverse", "jsd"]  # of divergence, from a teacher
OfLogits = Callable[[torch.Tensor, slice], torch.Tensor]  # logits (n, V) in fp32 of the tokens in a slice -> (n,)
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


class TopK(NamedTuple):
    """What a teacher said of N tokens, as far as it is kept: distributions at temperature 1."""

    ids: torch.Tensor  # (N, k) int64
    log_p: torch.Tensor  # (N, k) fp32
    rest: torch.Tensor  # (N,) fp32, log of the mass of all other tokens; -inf where there is none


def divergence(log_q: torch.Tensor, log_p: torch.Tensor, kind: Kind, beta: float = 0.5) -> torch.Tensor:
    """How far a student's distributions q are from a teacher's p: (N,) in nats, of log-probabilities (N, V).

    * forward: KL(p || q), Hinton et al. (2015): the student covers all that the teacher may say.
    * reverse: KL(q || p), Gu et al., "MiniLLM" (2024): it says only what the teacher would.
    * jsd: beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, Agarwal et al., "GKD" (2024),
      section 2: over beta the forward KL as beta -> 0, over 1 - beta the reverse as beta -> 1.

    A token without mass (-inf) in the first distribution of a KL counts nothing.
    """
    if kind == "forward":
        return _kl(log_p, log_q)
    if kind == "reverse":
        return _kl(log_q, log_p)
    mixture = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, mixture) + (1 - beta) * _kl(log_q, mixture)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    none = log_p.isneginf()
    return (log_p.exp() * (log_p.masked_fill(none, 0.0) - log_q.masked_fill(none, 0.0))).sum(dim=-1)


def divergence_to_top_k(logits: torch.Tensor, cached: TopK, kind: Kind, beta: float = 0.5) -> torch.Tensor:
    """The divergence of logits (N, V) from what is kept of a teacher: over its k tokens and all others as one.

    Never more than the whole divergence, since both are put through the same map (data processing inequality), and
    equal to it where k is the vocabulary. (N,) in nats.
    """
    known = torch.log_softmax(logits, dim=1).gather(1, cached.ids)
    others = logits.scatter(1, cached.ids, float("-inf"))
    rest = torch.logsumexp(others, dim=1) - torch.logsumexp(logits, dim=1)
    ours, theirs = torch.cat([known, rest[:, None]], 1), torch.cat([cached.log_p, cached.rest[:, None]], 1)
    return divergence(ours, theirs, kind, beta)


class _Chunked(torch.autograd.Function):
    """Sum over tokens of a function of their logits; gradients are formed chunk by chunk in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, of_logits: OfLogits) -> torch.Tensor:
        head = weight.to(hidden.dtype)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        buffer = _buffer(hidden, head)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, min(start + CHUNK, len(hidden)))
            logits = torch.mm(hidden[part], head.t(), out=buffer[: part.stop - start])
            with torch.enable_grad():
                asked = logits.float().detach().requires_grad_()
                value = of_logits(asked, part).sum()
            (gradient,) = torch.autograd.grad(value, asked)
            total = total + value.detach()
            logits_grad = logits.copy_(gradient)
            torch.mm(logits_grad, head, out=hidden_grad[part])
            if weight_grad is not None:
                weight_grad += (logits_grad.t() @ hidden[part]).to(weight.dtype)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = grads[0].to(hidden_grad.dtype)
        return hidden_grad * scale, None if weight_grad is None else weight_grad * grads[0], None


def linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    kind: Kind,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> torch.Tensor:
    """Mean divergence of a student from a teacher, in nats, straight from hidden states (N, D) and heads (V, D).

    Both distributions are softmax(logits / temperature), and the whole is multiplied by temperature^2, so that its
    gradient keeps its size (Hinton et al., 2015, section 2). As temperature -> infinity, the forward KL goes to
    half the mean squared difference of the logits, each less their mean (section 2.1). The teacher gets no gradient.
    """
    theirs = teacher_weight.detach().to(teacher_hidden.dtype)

    def of_logits(logits: torch.Tensor, part: slice) -> torch.Tensor:
        log_p = torch.log_softmax((teacher_hidden[part].detach() @ theirs.t()).float() / temperature, dim=1)
        log_q = torch.log_softmax(logits / temperature, dim=1)
        return divergence(log_q, log_p, kind, beta) * temperature**2

    total: torch.Tensor = _Chunked.apply(hidden, weight, of_logits)  # type: ignore[no-untyped-call]
    return total / len(hidden)


def linear_divergence_to_top_k(
    hidden: torch.Tensor, weight: torch.Tensor, cached: TopK, kind: Kind, beta: float = 0.5
) -> torch.Tensor:
    """Mean of `divergence_to_top_k`, in nats, straight from hidden states (N, D) and the head (V, D)."""

    def of_logits(logits: torch.Tensor, part: slice) -> torch.Tensor:
        return divergence_to_top_k(logits, TopK(*(one[part] for one in cached)), kind, beta)

    total: torch.Tensor = _Chunked.apply(hidden, weight, of_logits)  # type: ignore[no-untyped-call]
    return total / len(hidden)


@torch.no_grad()
def linear_top_k(hidden: torch.Tensor, weight: torch.Tensor, k: int) -> TopK:
    """The k likeliest tokens of each distribution, from hidden states (N, D) and the head (V, D)."""
    head = weight.to(hidden.dtype)
    buffer = _buffer(hidden, head)
    found = []
    for start in range(0, len(hidden), CHUNK):
        log_p, ids = _log_probabilities(hidden[start : start + CHUNK], head, buffer).topk(min(k, len(head)), dim=1)
        rest = torch.log1p(-log_p.exp().sum(dim=1).clamp(max=1.0))
        found.append(TopK(ids, log_p, rest if k < len(head) else rest.fill_(-torch.inf)))
    return TopK(*(torch.cat(parts) for parts in zip(*found, strict=True)))
