"""What stops a PPO run before it spoils the policy: each guard looks at the curves so far and says why.

A run that has gone wrong goes on to produce numbers, and its proxy reward often rises while it does.

Most of what an iteration tells is measured on its rollouts, before its update: it is of the models that the checkpoint
after the iteration before holds, and a guard that it sets off condemns them. Clipping is of the update itself, which
no checkpoint holds yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from pipelines.core.errors import ArtifactError

if TYPE_CHECKING:
    from pipelines.core.params.ppo import PpoParams

CLIPPED = 0.3  # share of tokens beyond the clip from which the steps are no longer small: the usual rule of thumb
NOISE = -0.5  # explained variance: a value model that adds half the variance of the returns; chance makes a tenth
PATIENCE = 5  # iterations in a row, for what a single batch may show by chance
CHANCE = 3.0  # standard errors: how far a mean over the episodes of an iteration may come by chance
BELOW_ZERO = -0.05  # nats a response: a mean KL of samples is never negative but by chance, or by a mistake
Row = Mapping[str, float]


@dataclass(frozen=True)
class Guards:
    """Limits, from the params."""

    kl_ceiling: float  # nats a response
    entropy_floor: float  # share of the first iteration's entropy
    cap_share: float  # largest share of responses that reach the limit of tokens without EOS
    episodes: int  # of an iteration
    steps: int  # optimizer steps of an iteration


class Fault(NamedTuple):
    """What a guard has found."""

    problem: str  # with the params to change
    of_update: bool = False  # whether the iteration's update is at fault; else the models that made its rollouts


class Fired(ArtifactError):
    """A guard has stopped a run."""

    def __init__(self, message: str, good: int) -> None:
        super().__init__(message)
        self.good = good  # iterations after which the models were not yet condemned; below 1: not after any


def watch(params: PpoParams, history: Sequence[Row], prefix: str) -> None:
    """Stop a run that is being spoiled; what is left of it is for the caller to see to.

    Args:
        history: rows of all runs so far.
        prefix: of the run's columns; none: the policy's own, else the one without the pre-training gradient.

    Raises:
        Fired: a guard has something to say of the latest iteration.
    """
    rows = [{key.removeprefix(prefix): value for key, value in row.items()} for row in history if f"{prefix}kl" in row]
    steps = params.epochs * params.minibatches
    limits = Guards(params.kl_ceiling, params.entropy_floor, params.cap_share, params.episodes, steps)
    if (fault := check(limits, rows)) is not None:
        which = " without the pre-training gradient" if prefix else ""
        good = len(rows) - (1 if fault.of_update else 2)
        raise Fired(f"ppo{which} stopped after iteration {len(rows)}: {fault.problem}", good)


def check(guards: Guards, history: Sequence[Row]) -> Fault | None:
    """What is wrong after the latest iteration; None while all is well.

    Before an iteration's first step the ratio is 1, so of that step nothing is clipped: the guard on clipping looks at
    the mean over the later ones. Of iterations of a single step it cannot tell.

    Args:
        history: one row an iteration, in order, with the keys kl, kl_k3, entropy, capped_share, clip_fraction,
            explained_variance, value_loss.
    """
    if not history:
        return None
    first, last = history[0], history[-1]
    if last["kl"] > guards.kl_ceiling:
        return Fault(
            f"KL to the SFT model is {last['kl']:.2f} nats a response, above {guards.kl_ceiling:g} (ppo.kl_ceiling): "
            "the policy leaves what the reward model was trained on. Lower ppo.lr or raise ppo.kl_coefficient."
        )
    floor = guards.entropy_floor * first["entropy"]
    if last["entropy"] < floor:
        return Fault(
            f"entropy is {last['entropy']:.3f} nats a token, below {floor:.3f} (ppo.entropy_floor x that of the first "
            "iteration): the policy says one and the same. Lower ppo.lr or raise ppo.kl_coefficient."
        )
    if last["capped_share"] > guards.cap_share and _risen([row["capped_share"] for row in history], guards.episodes):
        return Fault(
            f"{last['capped_share']:.0%} of the responses reach ppo.max_new_tokens without an end, more than "
            f"{guards.cap_share:.0%} (ppo.cap_share) and than at the start: the reward pays for length. Mend the "
            "reward, raise ppo.missing_eos_penalty, or raise ppo.max_new_tokens."
        )
    recent = history[-PATIENCE:]
    if len(recent) < PATIENCE:
        return None
    if guards.steps > 1 and all(row["clip_fraction"] * guards.steps / (guards.steps - 1) > CLIPPED for row in recent):
        return Fault(
            f"more than {CLIPPED:.0%} of the tokens were clipped in the steps after an iteration's first, {PATIENCE} "
            "iterations in a row: the steps are too large. Lower ppo.lr, or ppo.epochs.",
            of_update=True,
        )
    explained = [row["explained_variance"] for row in recent]
    # Where all episodes have come to earn the same, a small error is large beside what is left to explain.
    worse = last["value_loss"] > first["value_loss"]
    if max(explained) < NOISE and explained[-1] <= explained[0] and worse:
        return Fault(
            f"the value model has been far worse than a constant for {PATIENCE} iterations and does not learn "
            f"(explained variance {explained[-1]:.2f}): advantages are noise. Lower ppo.value_lr or "
            "raise ppo.batch_prompts."
        )
    # The sum of log-ratios over a response varies by twice its KL: of few episodes the mean is often below zero.
    error = math.sqrt(2 * fmean(row["kl_k3"] for row in recent) / (PATIENCE * guards.episodes))
    if all(row["kl"] < BELOW_ZERO for row in recent) and fmean(row["kl"] for row in recent) < -CHANCE * error:
        return Fault(
            f"KL has been negative for {PATIENCE} iterations ({last['kl']:.2f} nats a response): what is sampled is "
            "not what is trained. This is a defect, not a setting: please report it."
        )
    return None


def _risen(shares: Sequence[float], episodes: int) -> bool:
    """Whether the last share, or the last few together, is above the first iteration's by more than chance.

    Of a model that seldom ends within the limit every other iteration has more such responses than the first.
    """
    first, *later = shares
    for now in filter(None, (later[-1:], later[-PATIENCE:])):
        among = (first + sum(now)) / (1 + len(now))
        error = math.sqrt(among * (1 - among) * (1 + 1 / len(now)) / episodes)
        if fmean(now) - first > CHANCE * error:
            return True
    return False
