"""What must hold before PPO's first update, or everything after it is wrong without showing.

Each law has been broken by a known implementation: dropout that makes the ratio other than 1, a sampler at another
temperature than the trainer, padding that a score depends on, a reward read at the wrong token.
"""

from __future__ import annotations

import torch

from pipelines.core import episodes, k_way, policy_gradient
from pipelines.core.actors import Actors
from pipelines.core.context import StageContext
from pipelines.core.episodes import Episodes
from pipelines.core.errors import ArtifactError
from pipelines.core.params.ppo import PpoParams

EXACT = 1e-6  # nats: the same numbers through the same operations
# Nats a token on average, and a reward or value as a share of 1 + its size: the same numbers through other
# operations. fp32 differs in the sixth digit; bf16 keeps eight bits of each of dozens of layers' results.
ROUNDING = {"fp32": 1e-3, "bf16": 0.1}


def check(actors: Actors, found: Episodes, params: PpoParams, eos: int, context: StageContext) -> dict[str, float]:
    """Hold the first iteration's episodes against the laws; the figures that were measured.

    Raises:
        ArtifactError: a law is broken; the message says which, and by how much.
    """
    mask, rounding = found.rollout.mask, ROUNDING[context.precision]
    batch = found.minibatches[0][0]
    measured = {
        "KL to the SFT model": float(found.log_ratios.abs().max()),
        "sampled and computed log-probabilities": float((found.rollout.sampled - found.old)[mask].abs().mean()),
    }
    _law(
        "the policy starts as the SFT model, so their KL is 0", measured["KL to the SFT model"], EXACT,
        "the reference is another model, or an adapter does not start at zero",
    )  # fmt: skip

    # The update's own forward pass, gradients and all, gives what scoring gave.
    new = actors.log_probabilities("policy", batch, context, params.temperature).log_probabilities
    old = episodes.flat(found.old, mask, batch).to(context.device)
    step = policy_gradient.policy_loss(new, old, torch.ones_like(old), params.clip, len(old))
    measured["ratio"] = float((new.detach() - old).abs().max())
    _law("before an update the ratio is 1", measured["ratio"], EXACT, "dropout, or another mode of the model")
    _law("before an update nothing is clipped", float(step.clip_fraction), 0.0, "the ratio is not 1")

    # The sampler draws from the distribution that is trained.
    _law(
        "the sampler's log-probabilities are the trainer's", measured["sampled and computed log-probabilities"],
        rounding, "another temperature, tokens left out when sampling, positions, or padding that is seen",
    )  # fmt: skip

    # Rewards stand at the token that ended the response.
    ended = [end for of_prompt in found.rollout.ended for end in of_prompt]
    last = batch.rows.ids[batch.row, batch.column].tolist()
    wrong = [
        token for token, one in zip(last, episodes.episodes_of(batch), strict=True) if ended[one] != (token == eos)
    ]
    _law("the reward is read where the response ends", float(len(wrong)), 0.0, f"found token {wrong[:1]} there")

    # A sequence alone in its row, beside padding, is worth what it is worth among others.
    measured |= _alone(actors, found, params, context)
    for name in ("log-probabilities", "values", "rewards"):
        _law(f"{name} do not depend on padding or on what else is in the batch", measured[name], rounding,
             "padding that is seen, or positions that do not start over")  # fmt: skip
    return measured


def _alone(actors: Actors, found: Episodes, params: PpoParams, context: StageContext) -> dict[str, float]:
    """How much the first prompt's episodes change when nothing is beside them but padding: means over tokens."""
    sequences, mask = found.rollout.sequences, found.rollout.mask
    longest = max(range(len(sequences)), key=lambda number: len(sequences[number].ids))
    first = next(number for number in range(len(sequences)) if number != longest or len(sequences) == 1)
    # Each in a row of its own, the shorter one padded to the longer; any token may stand where nobody looks.
    alone = k_way.of_bins(sequences, [[first], [longest]] if first != longest else [[first]], pad=0)
    measured: dict[str, float] = {}
    with torch.no_grad():
        said = actors.log_probabilities("policy", alone, context, params.temperature).log_probabilities.cpu()
        worth = actors.values(alone, context).cpu()
        pairs = {"log-probabilities": (said, found.old), "values": (worth, found.values)}
        for name, (here, table) in pairs.items():
            there = episodes.flat(table, mask, alone)
            measured[name] = float(((here - there).abs() / (1 + there.abs())).mean())
        measured["rewards"] = 0.0
        if actors.reward_head is not None:
            there = found.proxy[episodes.episodes_of(alone)]
            change = (actors.rewards(alone, context).cpu() - there).abs() / (1 + there.abs())
            measured["rewards"] = float(change.mean())
    return measured


def _law(said: str, found: float, most: float, cause: str) -> None:
    """Raise where a law is broken."""
    if not found <= most:
        raise ArtifactError(
            f"self-test before the first update: {said}, but found a difference of {found:.3g} (at most {most:g}): "
            f"{cause}. Nothing was trained."
        )
