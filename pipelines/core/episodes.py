"""Episodes of PPO: prompts, responses sampled by the policy, and what the four roles say of every token.

An episode is a prompt and one response. The K episodes of a prompt are one `segments.Sequence`, so the prompt is
encoded once for all of them and in all roles. Two shapes are used: tables (N episodes, T tokens), padded on the
right, and flat vectors over the response tokens of one forward pass, in the order of its responses. Scoring goes
through the very forward passes that the update will use, so that before an update the ratio of new to old
probabilities is 1 to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from pipelines.core import chats, distributed, k_way, policy_gradient, sampling, segments
from pipelines.core.actors import JUDGES, LEARNERS, Actors, Role
from pipelines.core.completions import Prompt
from pipelines.core.context import StageContext
from pipelines.core.params.ppo import PpoParams

if TYPE_CHECKING:
    from pipelines.core.reward_functions import Scores

Tell = Callable[[int, int], None]


class Rollout(NamedTuple):
    """What the policy said, [prompt][sample]."""

    prompts: list[Prompt]
    sequences: list[segments.Sequence]  # of each prompt, with its K responses
    responses: list[list[str]]
    ended: list[list[bool]]  # whether EOS came before the limit
    sampled: torch.Tensor  # (N, T) fp32: log-probabilities the tokens were drawn with
    mask: torch.Tensor  # (N, T) bool: where there is a token


class Ahead(NamedTuple):
    """A forward pass that scoring shares with the first update: its hidden states, with their graph."""

    batch: k_way.Responses
    group: tuple[Role, ...]
    states: list[torch.Tensor]


class Episodes(NamedTuple):
    """A rollout, scored. N episodes, prompt by prompt; tables are fp32 (N, T) on the CPU, 0 where there is no token."""

    rollout: Rollout
    minibatches: list[list[k_way.Responses]]  # forward passes of each optimizer step of an epoch
    old: torch.Tensor  # log-probabilities of the policy before this iteration's updates
    reference: torch.Tensor  # of the SFT model
    entropies: torch.Tensor  # of the policy, in nats
    values: torch.Tensor
    scores: torch.Tensor  # (N,): the reward of each response, with the rule for those that did not end applied
    proxy: torch.Tensor  # (N,): the same before that rule
    external: bool  # whether something else than the actors' own reward role gave them
    ahead: list[Ahead]  # at most one; whoever goes on from it takes it away
    spread: float | None = None  # of an ensemble: how far its members are apart (`reward_functions.Scores`)

    @property
    def log_ratios(self) -> torch.Tensor:
        """log pi - log pi_ref of each token."""
        return self.old - self.reference

    @property
    def kl(self) -> torch.Tensor:
        """(N,): of each response, the sum over its tokens, in nats; its mean estimates KL(pi || pi_ref) unbiased."""
        return policy_gradient.k1(self.log_ratios).sum(dim=1)


def prompts_of(seed: int, iteration: int, count: int, known: int) -> list[int]:
    """Numbers of the prompts of an iteration: epoch after epoch over all `known`, each epoch in an order of its own."""
    numbers = []
    for place in range(iteration * count, (iteration + 1) * count):
        epoch, inside = divmod(place, known)
        numbers.append(int(np.random.default_rng([seed, epoch]).permutation(known)[inside]))
    return numbers


def generate(
    actors: Actors,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    params: PpoParams,
    iteration: int,
    context: StageContext,
    tell: Tell,
) -> Rollout:
    """`samples_per_prompt` responses of the policy to each prompt; the processes share the prompts."""
    asked, world = [prompt.ids for prompt in prompts], context.world
    with actors.sampling() as model:
        found = sampling.sample(
            model,
            asked[world.rank :: world.size],
            count=params.samples_per_prompt,
            tokens=params.max_new_tokens,
            stops=[tokenizer.eos_token_id],
            pad=tokenizer.pad_token_id,
            temperature=params.temperature,
            seed=_dice(params.seed, iteration, world.rank),
            precision=context.precision,
            tell=tell,
        )
    # Process r has sampled for prompts r, r + size, ...: in turns, as dealt.
    dealt = distributed.from_all(world, list(zip(*found, strict=True)))
    ids, scores, ended = zip(*(dealt[n % world.size][n // world.size] for n in range(len(asked))), strict=True)
    sampled, mask = _table([row for of_prompt in scores for row in of_prompt])
    return Rollout(
        list(prompts),
        [segments.of_completions(prompt, responses) for prompt, responses in zip(asked, ids, strict=True)],
        [[chats.decode_response(tokenizer, one) for one in of_prompt] for of_prompt in ids],
        [list(of_prompt) for of_prompt in ended],
        sampled,
        mask,
    )


def passes(rollout: Rollout, params: PpoParams, pad: int, tokens: int) -> list[list[k_way.Responses]]:
    """The forward passes of each minibatch, of `tokens` at most: prompts in the order they came, which is random."""
    parts = np.array_split(np.arange(len(rollout.prompts)), params.minibatches)
    return [
        [
            batch._replace(numbers=[int(part[number]) for number in batch.numbers])
            for batch in k_way.batches([rollout.sequences[number] for number in part], tokens, pad)
        ]
        for part in parts
    ]


def score(
    actors: Actors,
    rollout: Rollout,
    proxy: Callable[[Rollout], Scores] | None,
    params: PpoParams,
    pad: int,
    context: StageContext,
) -> Episodes:
    """What policy, reference, value and reward say; no gradients, but of the pass that the first update goes on from.

    Args:
        proxy: what gives the rewards (N,), episode by episode; None: the actors' own reward role.
    """
    minibatches = passes(rollout, params, pad, actors.micro_tokens(params.micro_tokens))
    tables = {name: torch.zeros(rollout.mask.shape) for name in ("old", "reference", "entropies", "values")}
    rewards = torch.zeros(len(rollout.mask))
    ahead: list[Ahead] = []
    with torch.no_grad():
        every = [batch for minibatch in minibatches for batch in minibatch]
        for batch in every[context.world.rank :: context.world.size]:
            for group in actors.groups(LEARNERS) + actors.groups(JUDGES):
                # Processes that split a model pass through it together: none of them is ahead
                first = batch is every[0] and group == actors.groups(LEARNERS)[0] and context.world.size == 1
                with torch.set_grad_enabled(first):
                    states = actors.hidden(group, batch.rows, context)
                if first:
                    ahead.append(Ahead(batch, group, states))
                found = dict(zip(group, states, strict=True))
                if "policy" in found:
                    said = actors.log_probabilities("policy", batch, found["policy"], params.temperature, True)
                    assert said.entropies is not None
                    put(tables["old"], rollout.mask, batch, said.log_probabilities)
                    put(tables["entropies"], rollout.mask, batch, said.entropies)
                if "value" in found:
                    put(tables["values"], rollout.mask, batch, actors.values(batch, found["value"]))
                if "reference" in found:
                    said = actors.log_probabilities("reference", batch, found["reference"], params.temperature)
                    put(tables["reference"], rollout.mask, batch, said.log_probabilities)
                if "reward" in found:
                    rewards[episodes_of(batch)] = actors.rewards(batch, found["reward"]).cpu()
            context.stop_if_asked()
    for table in (*tables.values(), *([rewards] if proxy is None else [])):
        distributed.add_up(context.world, table)
    spread = None
    if proxy is not None:
        given = distributed.from_leader(context.world, lambda: proxy(rollout))
        rewards, spread = torch.tensor(given.values, dtype=torch.float32), given.spread
    ended = torch.tensor([end for of_prompt in rollout.ended for end in of_prompt])
    scores = torch.where(ended, rewards, rewards - params.missing_eos_penalty)
    return Episodes(
        rollout, minibatches, **tables, scores=scores, proxy=rewards, external=proxy is not None, ahead=ahead,
        spread=spread,
    )  # fmt: skip


def tokens_ahead(found: Episodes) -> int:
    """Tokens, of each of its roles, whose forward pass the first update need not make."""
    return sum(len(one.group) * int((one.batch.rows.documents != segments.PADDING).sum()) for one in found.ahead)


def credited(found: Episodes, params: PpoParams) -> torch.Tensor:
    """What each response is credited with, (N,): its score, or what that is above the others to its prompt."""
    scores = found.scores
    return policy_gradient.leave_one_out(scores, params.samples_per_prompt) if params.group_baseline else scores


def fit_values(actors: Actors, found: Episodes, rewards: torch.Tensor, discount: float) -> Episodes:
    """Bring the value model to the scale of the returns, by least squares on these episodes.

    It starts as the reward model, which is trained to read whole responses and says anything in the middle of one: as
    a baseline, that would drown the first advantages. `rewards`: (N, T), with the KL penalty.
    """
    mask = found.rollout.mask
    returns = policy_gradient.gae(rewards, torch.zeros_like(rewards), mask, discount, trace=1.0).returns
    slope, intercept = policy_gradient.line(found.values, returns, mask)
    actors.rescale_values(slope, intercept)
    return found._replace(values=torch.where(mask, found.values * slope + intercept, 0.0))


def episodes_of(batch: k_way.Responses) -> list[int]:
    """Numbers of the episodes of a forward pass, in the order of its responses; every prompt has as many."""
    return [number * size + k for number, size in zip(batch.numbers, batch.sizes, strict=True) for k in range(size)]


def flat(table: torch.Tensor, mask: torch.Tensor, batch: k_way.Responses) -> torch.Tensor:
    """A table's entries for the response tokens of a forward pass: (tokens,)."""
    rows = episodes_of(batch)
    return table[rows][mask[rows]]


def put(table: torch.Tensor, mask: torch.Tensor, batch: k_way.Responses, values: torch.Tensor) -> None:
    """The reverse of `flat`."""
    rows = episodes_of(batch)
    part = table[rows]
    part[mask[rows]] = values.float().cpu()
    table[rows] = part


def _dice(*numbers: int) -> int:
    """A seed for each iteration and process: none of them draws what another has drawn."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _table(rows: Sequence[Sequence[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different length as a table, and where it holds something."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    table = torch.zeros(mask.shape)
    table[mask] = torch.tensor([value for row in rows for value in row])
    return table, mask
