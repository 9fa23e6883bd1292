"""What fine-tuning minimises: GPT-1, equation 5, L3 = L2 + lambda x L1. Shapes: N sequences, E examples, C classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipelines.core import losses
from pipelines.core.task_inputs import Kind


def class_logits(kind: Kind, logits: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """One row of class logits an example, from the logits of its sequences (GPT-1, section 3.3).

    Classification, entailment: as they are. Similarity: the two orders' logits added. Choice: the candidates' logits
    side by side, minus infinity where an example has fewer than the most.

    Args:
        logits: (N, outputs).
        sizes: how many of the N sequences each of the E examples has.

    Returns:
        (E, outputs); for choice (E, most candidates).
    """
    parts = torch.split(logits, list(sizes))
    if kind == "choice":
        sides = [part[:, 0] for part in parts]
        return torch.nn.utils.rnn.pad_sequence(sides, batch_first=True, padding_value=-torch.inf)
    return torch.stack([part.sum(dim=0) for part in parts])


def example_loss(found: torch.Tensor, labels: Sequence[float], regression: bool) -> torch.Tensor:
    """L2, summed over the examples: cross-entropy in nats (equation 4), or the squared error of a regression.

    Args:
        found: (E, C) class logits, or (E, 1) for a regression.
        labels: number of the right class, or the score, of each.
    """
    if regression:
        return (found[:, 0] - torch.tensor(labels, dtype=found.dtype, device=found.device)).square().sum()
    wanted = torch.tensor([int(label) for label in labels], device=found.device)
    return torch.nn.functional.cross_entropy(found, wanted, reduction="sum")


def language_loss(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """L1, summed over the labelled tokens: next-token cross-entropy in nats (equation 1).

    Args:
        hidden: (rows, length, width), in the type to compute in.
        head: (vocabulary, width), the output embedding.
        labels: (rows, length) int64; `losses.IGNORE` is not supervised.
    """
    wanted = labels.to(hidden.device).flatten()
    mean = losses.linear_cross_entropy(hidden.flatten(0, 1), head, wanted)
    return mean * (wanted != losses.IGNORE).sum()


def combined(
    examples: torch.Tensor, count: int, language: torch.Tensor | None, tokens: int, weight: float
) -> torch.Tensor:
    """A forward pass's part of L3 of a step: sums over the pass, divided by what the whole step has.

    Args:
        examples: `example_loss` of the pass; `count` examples are in the step.
        language: `language_loss` of the pass, `tokens` labelled tokens are in the step; None if `weight` is 0.
        weight: lambda.
    """
    classified = examples / count
    return classified if language is None else classified + weight * (language / tokens)
