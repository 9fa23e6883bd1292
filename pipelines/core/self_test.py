"""What must hold before PPO's first update, or everything after it is wrong without showing.

Each law has been broken by a known implementation: dropout that makes the ratio other than 1, a sampler at another
temperature than the trainer, padding that a score depends on, a reward read at the wrong token.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from pipelines.core import episodes, k_way, policy_gradient, segments
from pipelines.core.actors import LEARNERS, Actors, Role
from pipelines.core.context import StageContext
from pipelines.core.episodes import Episodes
from pipelines.core.errors import ArtifactError
from pipelines.core.params.ppo import PpoParams

EXACT = 1e-6  # nats: the same numbers through the same operations
# Nats a token on average, and a reward or value as a share of 1 + its size: the same numbers through other
# operations. Of 30 random layers they differ by 4e-6 in fp32 and 5e-3 in bf16; activations of trained ones are larger.
ROUNDING = {"fp32": 1e-3, "bf16": 0.1}
# Rounding errs to both sides, so of it the mean with its sign keeps less than a fifth. What is left out in sampling
# (top-p) errs to one side: each token that is drawn is more likely than the trainer thinks.
ONE_SIDED = 0.2
CHANCE = 3.0  # standard errors: how far the mean of few tokens is from 0 by rounding alone
PADDING = 5  # columns


def check(actors: Actors, found: Episodes, params: PpoParams, eos: int, context: StageContext) -> dict[str, float]:
    """Hold the first iteration's episodes against the laws; the figures that were measured.

    Raises:
        ArtifactError: a law is broken; the message says which, and by how much.
    """
    mask, rounding = found.rollout.mask, ROUNDING[context.precision]
    measured = {"KL to the SFT model": float(found.log_ratios.abs().max())}
    _law(
        "the policy starts as the SFT model, so their KL is 0", measured["KL to the SFT model"], EXACT,
        "the reference is another model, an adapter does not start at zero, or dropout",
    )  # fmt: skip

    measured["ratio"], clipped = _ratio(actors, found, params, context)
    _law("before an update the ratio is 1", measured["ratio"], EXACT, "dropout, or another mode of the model")
    _law("before an update nothing is clipped", clipped, 0.0, "the ratio is not 1")

    # The sampler draws from the distribution that is trained.
    apart = (found.rollout.sampled - found.old)[mask]
    measured["sampled and computed log-probabilities"] = float(apart.abs().mean())
    measured["the same with its sign"] = float(apart.mean())
    law = "the sampler's log-probabilities are the trainer's"
    _law(
        law, measured["sampled and computed log-probabilities"], rounding,
        "another temperature, tokens left out when sampling, positions, or padding that is seen",
    )  # fmt: skip
    sided = ONE_SIDED * rounding + CHANCE * float(apart.std(correction=0)) / len(apart) ** 0.5
    _law(law, abs(measured["the same with its sign"]), sided, "tokens left out when sampling (top-p)")

    # Rewards stand at the token that ended the response.
    wrong = _misread(found, eos)
    _law(
        "the reward is read where the response ends", float(len(wrong)), 0.0,
        f"{len(wrong)} of {len(mask)} responses, the first one number {wrong[:1]}",
    )  # fmt: skip

    # A sequence alone in its row, beside padding, is worth what it is worth among others.
    alone = _alone(actors, found, params, context)
    for name, change in alone.items():
        _law(f"{name} do not depend on padding or on what else is in the batch", change, rounding,
             "padding or another text is seen, or positions do not start over")  # fmt: skip
    return measured | alone


def _ratio(actors: Actors, found: Episodes, params: PpoParams, context: StageContext) -> tuple[float, float]:
    """How far a forward pass with gradients, as in an update, is from one without, as in scoring; what it would clip.

    One pass of scoring had gradients, where the update goes on from it: it is made again without.
    """
    group = actors.groups(LEARNERS)[0]
    batch = found.ahead[0].batch if found.ahead else found.minibatches[-1][-1]
    with torch.set_grad_enabled(not found.ahead):
        states = dict(zip(group, actors.hidden(group, batch.rows, context), strict=True))
    new = actors.log_probabilities("policy", batch, states["policy"], params.temperature).log_probabilities
    old = episodes.flat(found.old, found.rollout.mask, batch).to(context.device)
    step = policy_gradient.policy_loss(new, old, torch.ones_like(old), params.clip, len(old))
    return float((new.detach() - old).abs().max()), float(step.clip_fraction)


def _misread(found: Episodes, eos: int) -> list[int]:
    """Episodes whose reward is not read at the last of their tokens, or whose last token contradicts their end."""
    rollout = found.rollout
    lengths = rollout.mask.sum(dim=1).tolist()
    ended = [end for of_prompt in rollout.ended for end in of_prompt]
    prompts = [len(one.ids) for one, said in zip(rollout.prompts, rollout.ended, strict=True) for _ in said]
    wrong = []
    for batch in (one for minibatch in found.minibatches for one in minibatch):
        tokens = batch.rows.ids[batch.row, batch.column].tolist()
        places = batch.rows.positions[batch.row, batch.column].tolist()
        for token, place, number in zip(tokens, places, episodes.episodes_of(batch), strict=True):
            if place != prompts[number] + lengths[number] - 1 or (token == eos) != ended[number]:
                wrong.append(number)
    return wrong


def _alone(actors: Actors, found: Episodes, params: PpoParams, context: StageContext) -> dict[str, float]:
    """How much the first prompts' episodes change with nothing but padding beside them, each role alone: means."""
    sequences, mask = found.rollout.sequences, found.rollout.mask
    alone = k_way.of_bins(sequences, [[number] for number in range(min(2, len(sequences)))], pad=0)
    fillers = (0, segments.UNSUPERVISED, 0, segments.PADDING, 0)
    wider = [functional.pad(part, (0, PADDING), value=one) for part, one in zip(alone.rows, fillers, strict=True)]
    alone = alone._replace(rows=segments.Rows(*wider))

    def change(here: torch.Tensor, there: torch.Tensor) -> float:
        return float(((here.cpu() - there).abs() / (1 + there.abs())).mean())

    def states(role: Role) -> torch.Tensor:
        return actors.hidden((role,), alone.rows, context)[0]

    with torch.no_grad():
        said = actors.log_probabilities("policy", alone, states("policy"), params.temperature).log_probabilities
        measured = {
            "log-probabilities": change(said, episodes.flat(found.old, mask, alone)),
            "values": change(actors.values(alone, states("value")), episodes.flat(found.values, mask, alone)),
        }
        if not found.external:
            rewards = actors.rewards(alone, states("reward"))
            measured["rewards"] = change(rewards, found.proxy[episodes.episodes_of(alone)])
    return measured


def _law(said: str, found: float, most: float, cause: str) -> None:
    """Raise where a law is broken."""
    if not found <= most:
        raise ArtifactError(
            f"self-test before the first update: {said}, but found a difference of {found:.3g} (at most {most:g}): "
            f"{cause}. Nothing was trained."
        )
