"""Optimizer steps of PPO's policy and value model, each on the episodes of a minibatch."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from pipelines.core import distributed, episodes, k_way, packing, policy_gradient, ptx, training
from pipelines.core.actors import LEARNERS, Actors
from pipelines.core.context import StageContext
from pipelines.core.episodes import Episodes
from pipelines.core.params.ppo import PpoParams
from pipelines.core.phases import Phases


class Learner(NamedTuple):
    """What is trained, by what, how fast."""

    actors: Actors
    policy: torch.optim.Optimizer
    value: torch.optim.Optimizer
    lr: float  # of the policy, in this iteration
    value_lr: float

    def steps(self) -> tuple[Step, Step]:
        """What updates each of the two."""
        policy = Step("policy", self.policy, self.lr, "grad_norm")
        return policy, Step("value", self.value, self.value_lr, "value_grad_norm")


class Step(NamedTuple):
    """How one role is updated, and under which name the norm of its gradient is told."""

    role: Literal["policy", "value"]
    optimizer: torch.optim.Optimizer
    lr: float
    norm: str


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
    for group in actors.groups(LEARNERS):
        # 1. The gradients, accumulated over forward passes: every token of the minibatch weighs the same.
        for batch, share in world.share(minibatch):
            weight, loss = share * world.size, torch.zeros((), device=context.device)
            ahead = [one for one in targets.episodes.ahead if one.batch is batch and one.group == group]
            targets.episodes.ahead.clear()
            states = ahead[0].states if ahead else actors.hidden(group, batch.rows, context)
            for role, hidden in zip(group, states, strict=True):
                part, figures = _PARTS[role](actors, batch, hidden, targets, tokens, params)
                loss = loss + part * weight
                seen |= {name: seen[name] + weight * float(value) for name, value in figures.items()}
            loss.backward()  # type: ignore[no-untyped-call]

        # 2. The pre-training gradient on top of the policy's (PPO-ptx).
        if "policy" in group and pretraining is not None:
            with actors.using("policy") as model:
                trained = actors.trained("policy")
                added = ptx.accumulate(model, trained, pretraining.rows, step, params, pretraining.coefficient, context)
            seen |= {"ptx_loss": added.loss, "ptx_ratio": added.ptx_norm / max(added.ppo_norm, 1e-12)}

        # 3. The steps.
        for one in learner.steps():
            if one.role in group:
                told, trained = seen[f"{one.role}_loss"], actors.trained(one.role)
                _, norm = training.update(trained, one.optimizer, one.lr, params.clip_norm, told, step, world)
                seen[one.norm] = norm
    return {name: distributed.mean_of(world, value) for name, value in seen.items()}


def take_all(
    learner: Learner, targets: Targets, pretraining: Pretraining | None, iteration: int, params: PpoParams,
    phases: Phases, context: StageContext,
) -> dict[str, float]:  # fmt: skip
    """An iteration's steps, `epochs` times over its minibatches; means of what they tell."""
    found = targets.episodes
    ahead, first = episodes.tokens_ahead(found), iteration * params.epochs * params.minibatches
    seen: list[dict[str, float]] = []
    with phases.of("update"):
        for step, minibatch in enumerate(found.minibatches * params.epochs, first):
            seen.append(take(learner, targets, minibatch, pretraining, step, params, context))
    phases.end(iteration, found, pretraining is not None, ahead)
    return {name: sum(one[name] for one in seen) / len(seen) for name in seen[0]}


def check_count(learner: Learner, planned: int) -> None:
    """Both optimizers have made as many steps as were planned: each counts its own.

    Raises:
        AssertionError: they have not, which no setting explains.
    """
    for name, optimizer in (("policy", learner.policy), ("value", learner.value)):
        made = {int(state["step"]) for state in optimizer.state.values()}
        assert made == {planned}, f"{name}: {made or 0} optimizer steps were made, {planned} were planned"


def _of_policy(
    actors: Actors, batch: k_way.Responses, hidden: torch.Tensor, targets: Targets, tokens: int, params: PpoParams
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The policy's loss on a forward pass, a share of the minibatch's `tokens`, and what is told of it."""
    new = actors.log_probabilities("policy", batch, hidden, params.temperature).log_probabilities
    old, advantages = _flat(batch, targets, (targets.episodes.old, targets.advantages), hidden)
    part = policy_gradient.policy_loss(new, old, advantages, params.clip, tokens)
    told = {"policy_loss": part.loss.detach(), "clip_fraction": part.clip_fraction, "approx_kl": part.approx_kl}
    return part.loss, told


def _of_value(
    actors: Actors, batch: k_way.Responses, hidden: torch.Tensor, targets: Targets, tokens: int, params: PpoParams
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same of the value model."""
    old, returns = _flat(batch, targets, (targets.episodes.values, targets.returns), hidden)
    fit = policy_gradient.value_loss(actors.values(batch, hidden), old, returns, params.value_clip, tokens)
    return fit.loss, {"value_loss": fit.loss.detach(), "value_clip_fraction": fit.clip_fraction}


_PARTS = {"policy": _of_policy, "value": _of_value}


def _flat(
    batch: k_way.Responses, targets: Targets, tables: tuple[torch.Tensor, ...], hidden: torch.Tensor
) -> list[torch.Tensor]:
    """The tables' entries for the tokens of a forward pass, (tokens,) each, where its hidden states are."""
    mask = targets.episodes.rollout.mask
    return [episodes.flat(table, mask, batch).to(hidden.device) for table in tables]
