"""Losses as pure functions of tensors. Shapes: N tokens, D width, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from pipelines.core import divergences
from pipelines.core.divergences import Kind as Kind
from pipelines.core.output_layer import gradients, log_softmax, pieces, summed_loss

IGNORE = -100  # a label that is not supervised, as in torch and transformers
ABSENT = -1e4  # log of a mass of nothing; finite, so that nothing times it is nothing


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
    count = _supervised(labels)

    def replace(logits: torch.Tensor, part: slice) -> torch.Tensor:
        scores = log_softmax(logits)
        kept = labels[part] != IGNORE
        target = labels[part].clamp(min=0)[:, None]
        loss = -(scores.gather(1, target)[:, 0] * kept).sum()
        # d loss / d logits = softmax - one-hot of the label
        gradient = scores.exp_().scatter_add_(1, target, scores.new_full(target.shape, -1.0))
        if not kept.all():
            gradient[~kept] = 0
        logits.copy_(gradient)
        return loss

    return summed_loss(hidden, weight, replace) / count


def _supervised(labels: torch.Tensor) -> int:
    """How many labels are; a ValueError where none is."""
    count = int((labels != IGNORE).sum())
    if count == 0:
        raise ValueError("a batch without a supervised token")
    return count


@torch.no_grad()
def label_log_probabilities(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probability in nats of each label, (N,) fp32; 0 where the label is `IGNORE`. Shapes as above."""
    parts = []
    for part, logits in pieces(hidden, weight.to(hidden.dtype)):
        gold = log_softmax(logits).gather(1, labels[part].clamp(min=0)[:, None])[:, 0]
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
        chosen, entropies = [], []
        for part, logits in pieces(hidden, weight.to(hidden.dtype)):
            scores = log_softmax(logits, temperature)
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

        def replace(logits: torch.Tensor, part: slice) -> torch.Tensor:
            target = labels[part, None]
            # d log p(label) / d logits = (one-hot of the label - softmax) / temperature
            gradient = log_softmax(logits, ctx.temperature).exp_().neg_()
            gradient.scatter_add_(1, target, gradient.new_ones(target.shape))
            logits.copy_(gradient.mul_(grads[0][part, None] / ctx.temperature))
            return gradient.new_zeros(())

        _, hidden_grad, weight_grad = gradients(hidden, weight, ctx.needs_input_grad[1], replace)
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


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, kind: Kind, temperature: float = 1.0, beta: float = 0.5
) -> torch.Tensor:
    """Divergence of two distributions over tokens, times temperature^2 (Hinton et al. 2015, section 2); nats, (N,).

    `forward` is KL(teacher || student), `reverse` KL(student || teacher), `jsd` the generalised divergence of GKD
    (Agarwal et al. 2024, section 3): beta KL(teacher || m) + (1 - beta) KL(student || m), where
    m = beta teacher + (1 - beta) student.

    Args:
        student: logits (N, V) of any type; computed in fp32 at least. Gets a gradient, as the teacher's do.
        teacher: logits (N, V).
        temperature: both sides' logits are divided by it.
        beta: of `jsd`, between 0 and 1.

    Raises:
        ValueError: an unknown kind, or a temperature or beta out of range.
    """
    divergences.check(kind, temperature, beta)
    ours, theirs = log_softmax(student, temperature), log_softmax(teacher, temperature)
    return temperature**2 * divergences.between(ours, theirs, kind, beta)


class TopK(NamedTuple):
    """A teacher's answers to N tokens at temperature 1: its k likeliest tokens, and how likely all others are."""

    ids: torch.Tensor  # (N, k) int32
    log_p: torch.Tensor  # (N, k) fp16, in nats
    rest: torch.Tensor  # (N,) fp32, log of the mass outside the k; near `ABSENT` where k is the whole vocabulary


def top_k(teacher_logits: torch.Tensor, k: int) -> TopK:
    """The k likeliest tokens of logits (N, V), without a gradient.

    Raises:
        ValueError: k is below 1 or above V.
    """
    if not 1 <= k <= teacher_logits.shape[1]:
        raise ValueError(f"top {k} of a vocabulary of {teacher_logits.shape[1]}")
    scores = log_softmax(teacher_logits.detach())
    log_p, ids = scores.topk(k, dim=1)
    return TopK(ids.int(), log_p.half(), scores.scatter_(1, ids, ABSENT).logsumexp(dim=1))


@torch.no_grad()
def linear_top_k(teacher_hidden: torch.Tensor, teacher_head: torch.Tensor, k: int) -> TopK:
    """As `top_k`, from hidden states (N, D) and the output embedding (V, D), chunk by chunk."""
    found = [top_k(logits, k) for _, logits in pieces(teacher_hidden, teacher_head.to(teacher_hidden.dtype))]
    return TopK(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def divergence_to_top_k(
    student_logits: torch.Tensor, cached: TopK, kind: Kind, temperature: float = 1.0, beta: float = 0.5
) -> torch.Tensor:
    """As `divergence`, (N,), between the k tokens and one bucket for all others, on both sides.

    It is at most the divergence of the whole distributions (data processing), and equal where k = V.

    Raises:
        ValueError: as `divergence`; or the temperature is not 1: the others' mass at another one was not kept.
    """
    divergences.check(kind, temperature, beta)
    if temperature != 1.0:
        raise ValueError(f"cached answers hold for temperature 1 alone, not {temperature}")
    scores, ids = log_softmax(student_logits), cached.ids.long()
    rest = scores.scatter(1, ids, ABSENT).logsumexp(dim=1)
    return divergences.between(torch.cat([scores.gather(1, ids), rest[:, None]], dim=1), _buckets(cached), kind, beta)


def _buckets(cached: TopK) -> torch.Tensor:
    """Log-probabilities (N, k + 1), the rest last; what fp16 took from their sum is given back."""
    return torch.cat([cached.log_p.float(), cached.rest[:, None]], dim=1).log_softmax(dim=1)


def linear_divergence(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    kind: Kind,
    temperature: float = 1.0,
    beta: float = 0.5,
    labels: torch.Tensor | None = None,
    labels_weight: float = 0.0,
) -> torch.Tensor:
    """Mean of `divergence` over N tokens, without ever holding all logits; the teacher gets no gradient.

    With labels, plus `labels_weight` times what `linear_cross_entropy` gives, from the same logits.

    Args:
        hidden: (N, D), in the type to compute in; gets a gradient.
        head: (V, D), the student's output embedding; gets a gradient if it asks for one.
        teacher_hidden: (N, D of the teacher).
        teacher_head: (V, D of the teacher); each call converts it if it is not of `teacher_hidden`'s type.
        labels: (N,) int64; `IGNORE` is not supervised.

    Raises:
        ValueError: as `divergence`; a weight without labels, no label that is supervised, or shapes that differ.
    """
    divergences.check(kind, temperature, beta)
    if (len(teacher_hidden), len(teacher_head)) != (len(hidden), len(head)):
        raise ValueError("student and teacher differ in tokens or vocabulary")
    theirs = pieces(teacher_hidden.detach(), teacher_head.detach().to(teacher_hidden.dtype))

    def compare(scores: torch.Tensor, chances: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return divergences.with_gradient(scores, chances, log_softmax(logits, temperature), kind, beta)

    return _mean(hidden, head, lambda _: next(theirs)[1:], compare, temperature, labels, labels_weight)


def linear_divergence_to_top_k(
    hidden: torch.Tensor,
    head: torch.Tensor,
    cached: TopK,
    kind: Kind,
    beta: float = 0.5,
    labels: torch.Tensor | None = None,
    labels_weight: float = 0.0,
) -> torch.Tensor:
    """Mean of `divergence_to_top_k` over N tokens; everything else as `linear_divergence`."""
    divergences.check(kind, 1.0, beta)
    answers = cached.ids.long(), _buckets(cached)

    def compare(
        scores: torch.Tensor, chances: torch.Tensor, ids: torch.Tensor, teacher: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        others = chances.scatter(1, ids, 0.0)
        rest = others.sum(dim=1, keepdim=True).clamp_min_(torch.finfo(others.dtype).tiny)
        student = torch.cat([scores.gather(1, ids), rest.log()], dim=1)
        values, of_buckets = divergences.with_gradient(student, student.exp(), teacher, kind, beta)
        # the bucket's logit is a logsumexp: each of its tokens moves it by its share of the bucket
        return values, others.mul_(of_buckets[:, -1:] / rest).scatter_(1, ids, of_buckets[:, :-1])

    return _mean(hidden, head, lambda part: [each[part] for each in answers], compare, 1.0, labels, labels_weight)


def _mean(
    hidden: torch.Tensor,
    head: torch.Tensor,
    answers: Callable[[slice], Sequence[torch.Tensor]],
    compare: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    temperature: float,
    labels: torch.Tensor | None,
    labels_weight: float,
) -> torch.Tensor:
    """`compare` gives values (n,) and their gradient (n, V) from the student's log-probabilities, their exp and
    `answers`, the teacher's side of the same tokens.
    """
    if labels_weight and labels is None:
        raise ValueError("a weight of the labels, but no labels")
    share = labels_weight * len(hidden) / _supervised(labels) if labels is not None and labels_weight else 0.0

    def replace(logits: torch.Tensor, part: slice) -> torch.Tensor:
        scores = log_softmax(logits, temperature)
        chances = scores.exp()
        values, gradient = compare(scores, chances, *answers(part))
        total = temperature**2 * values.sum()
        gradient *= temperature  # temperature^2, and 1 / temperature from the logits' division
        if labels is not None and share:
            if temperature != 1.0:
                scores = log_softmax(logits)
                chances = scores.exp()
            kept = share * (labels[part] != IGNORE)[:, None].to(scores.dtype)
            target = labels[part].clamp(min=0)[:, None]
            gradient.addcmul_(chances, kept).scatter_add_(1, target, -kept)
            total = total - (scores.gather(1, target) * kept).sum()
        logits.copy_(gradient)
        return total

    return summed_loss(hidden, head, replace) / len(hidden)
