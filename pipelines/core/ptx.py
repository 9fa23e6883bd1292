"""The pre-training gradient of PPO-ptx (Ouyang et al., 2022, equation 2), accumulated to the policy's.

Both losses are means over tokens, so the coefficient is not the paper's 27.8, which multiplies a loss reduced in
another way; the norms of the two gradients tell what it amounts to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipelines.core import distributed, packing, training
from pipelines.core.context import StageContext
from pipelines.core.params.ppo import PpoParams

LEAST_TOKENS = 2**16  # of text: the few documents that a short run needs might not fill a row


class PtxStep(NamedTuple):
    """What was added to the gradient of an optimizer step; the same numbers in every process."""

    loss: float  # mean next-token cross-entropy of the step's rows, in nats, without the coefficient
    ppo_norm: float  # of the gradient that was there
    ptx_norm: float  # of what was added to it, with the coefficient


def rows(params: PpoParams, steps: int, data: Path, tokenizer: Any, context: StageContext) -> packing.PackedRows:
    """Rows of the training corpus for a run of `steps` optimizer steps.

    Raises:
        ArtifactError: the data have no corpus.
        DataError: it has less text than one row.
    """
    tokens = max(steps * params.ptx_rows * params.ptx_length, LEAST_TOKENS)
    return packing.of_corpus(data, tokenizer, tokens, params.ptx_length, "ppo.ptx_length", params.seed, context)


def accumulate(
    model: Any, trained: Sequence[torch.nn.Parameter], text: packing.PackedRows, step: int, params: PpoParams,
    coefficient: float, context: StageContext,
) -> PtxStep:  # fmt: skip
    """Add `coefficient` times the gradient of the language-model loss on the rows of a step to what is in `.grad`.

    Called after this process has accumulated its share of PPO's gradient, before gradients are averaged: it averages
    both parts itself, to tell their norms, and averaging their sum again changes nothing.

    Args:
        model: the policy.
        trained: its parameters that are.
        step: of the optimizer, from 0 over the whole run: which rows these are.
        coefficient: more than 0.
    """
    world = context.world
    distributed.average_gradients(trained, world)
    ppo_norm = _norm(trained)
    aside = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None

    most = max(1, params.micro_tokens // params.ptx_length)  # rows a forward pass
    parts = [(first, min(most, params.ptx_rows - first)) for first in range(0, params.ptx_rows, most)]
    loss = 0.0
    for (first, count), weight in world.share(parts):
        share = weight * world.size * count / params.ptx_rows  # rows are of one length: each weighs the same
        batch = text.batch(step * params.ptx_rows + first, count)
        part = training.language_model_loss(model, batch, context) * share
        (part * coefficient).backward()  # type: ignore[no-untyped-call]
        loss += float(part.detach())
    distributed.average_gradients(trained, world)
    ptx_norm = _norm(trained)

    for parameter, before in zip(trained, aside, strict=True):
        if before is not None:
            parameter.grad = before if parameter.grad is None else parameter.grad.add_(before)
    return PtxStep(distributed.mean_of(world, loss), ppo_norm, ptx_norm)


def _norm(trained: Sequence[torch.Tensor]) -> float:
    """Norm of all gradients together, of weights that are whole and of those that are split."""
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    norms = [torch.nn.utils.get_total_norm(same) for same in distributed.by_kind(gradients)]
    return float(torch.stack([distributed.whole(norm) for norm in norms]).norm()) if norms else 0.0
