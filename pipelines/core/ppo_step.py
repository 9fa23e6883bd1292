"""One optimizer step of PPO's policy and value model, on the episodes of a minibatch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pipelines.core import distributed, episodes, k_way, packing, policy_gradient, ptx, training
from pipelines.core.actors import Actors
from pipelines.core.context import StageContext
from pipelines.core.episodes import Episodes
from pipelines.core.params.ppo import PpoParams


class Learner(NamedTuple):
    """What is trained, by what, how fast."""

    actors: Actors
    policy: torch.optim.Optimizer
    value: torch.optim.Optimizer
    lr: float  # of the policy, in this iteration
    value_lr: float


class Targets(NamedTuple):
    """What the episodes of an iteration teach: tables (N episodes, T tokens)."""

    episodes: Episodes
    advantages: torch.Tensor  # whitened
    returns: torch.Tensor


class Pretraining(NamedTuple):
    """Text whose gradient is added to the policy's."""

    rows: packing.PackedRows
    coefficient: float


def take(
    learner: Learner,
    targets: Targets,
    minibatch: list[k_way.Responses],
    pretraining: Pretraining | None,
    step: int,
    params: PpoParams,
    context: StageContext,
) -> dict[str, float]:
    """Update policy and value once. Returns what was seen, as means over the minibatch's tokens; norms before clipping.

    Raises:
        ArtifactError: a loss or gradient is not finite; the model it is of was not updated.
    """
    actors, mask, world = learner.actors, targets.episodes.rollout.mask, context.world
    tokens = sum(int(mask[episodes.episodes_of(batch)].sum()) for batch in minibatch)
    seen = {"policy_loss": 0.0, "clip_fraction": 0.0, "approx_kl": 0.0, "value_loss": 0.0, "value_clip_fraction": 0.0}
    shares = [(batch, weight * world.size) for batch, weight in world.share(minibatch)]

    # 1. The policy's gradient, accumulated over forward passes: every token of the minibatch weighs the same.
    for batch, weight in shares:
        new = actors.log_probabilities("policy", batch, context, params.temperature).log_probabilities
        old, advantages = _flat(batch, targets, (targets.episodes.old, targets.advantages), context)
        part = policy_gradient.policy_loss(new, old, advantages, params.clip, tokens)
        (part.loss * weight).backward()  # type: ignore[no-untyped-call]
        seen["policy_loss"] += weight * float(part.loss.detach())
        seen["clip_fraction"] += weight * float(part.clip_fraction)
        seen["approx_kl"] += weight * float(part.approx_kl)

    # 2. The pre-training gradient on top of it (PPO-ptx), then the policy's step.
    if pretraining is not None:
        with actors.using("policy") as model:
            added = ptx.accumulate(model, pretraining.rows, step, params, pretraining.coefficient, context)
        seen |= {"ptx_loss": added.loss, "ptx_ratio": added.ptx_norm / max(added.ppo_norm, 1e-12)}
    trained = actors.trained("policy")
    rate, clip = learner.lr, params.clip_norm
    _, seen["grad_norm"] = training.update(trained, learner.policy, rate, clip, seen["policy_loss"], step, world)

    # 3. The value model's gradient and step.
    for batch, weight in shares:
        old, returns = _flat(batch, targets, (targets.episodes.values, targets.returns), context)
        fit = policy_gradient.value_loss(actors.values(batch, context), old, returns, params.value_clip, tokens)
        (fit.loss * weight).backward()  # type: ignore[no-untyped-call]
        seen["value_loss"] += weight * float(fit.loss.detach())
        seen["value_clip_fraction"] += weight * float(fit.clip_fraction)
    trained, rate = actors.trained("value"), learner.value_lr
    _, seen["value_grad_norm"] = training.update(trained, learner.value, rate, clip, seen["value_loss"], step, world)
    return {name: distributed.mean_of(world, value) for name, value in seen.items()}


def check_count(learner: Learner, planned: int) -> None:
    """Both optimizers have made as many steps as were planned: each counts its own.

    Raises:
        AssertionError: they have not, which no setting explains.
    """
    for name, optimizer in (("policy", learner.policy), ("value", learner.value)):
        made = {int(state["step"]) for state in optimizer.state.values()}
        assert made == {planned}, f"{name}: {made or 0} optimizer steps were made, {planned} were planned"


def _flat(
    batch: k_way.Responses, targets: Targets, tables: tuple[torch.Tensor, ...], context: StageContext
) -> list[torch.Tensor]:
    """The tables' entries for the tokens of a forward pass, (tokens,) each, on the device."""
    mask = targets.episodes.rollout.mask
    return [episodes.flat(table, mask, batch).to(context.device) for table in tables]
