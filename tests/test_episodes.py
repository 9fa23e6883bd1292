"""Episodes: which prompts, what is sampled, and what the four roles say, against plain forward passes."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tokenizer
from rollouts import METHODS, PARAMS, case, plain_hidden, plain_logits, plain_scores, plain_values, roles, states
from test_reward_adapter import ARCHITECTURES, MEAN, store

from pipelines.core import distributed, episodes, k_way, losses, ppo_step, segments
from pipelines.core.actors import Actors
from pipelines.core.completions import Prompt
from pipelines.core.context import StageContext
from pipelines.core.distributed import World
from pipelines.core.reward_functions import Scores

COOL = PARAMS.model_copy(update={"temperature": 0.7})


@pytest.fixture(scope="module")
def known() -> Any:
    return tokenizer()


@pytest.fixture(scope="module")
def places(known: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {one: store(known, tmp_path_factory.mktemp(one), one) for one in ARCHITECTURES}


# --- which prompts, and how they are laid out ----------------------------------------------------------------


def order(seed: int, count: int, known: int, epochs: int) -> list[list[int]]:
    """The prompts of some epochs, taken `count` at a time."""
    taken = [episodes.prompts_of(seed, iteration, count, known) for iteration in range(-(-known * epochs // count))]
    assert {len(one) for one in taken} == {count}
    numbers = [number for one in taken for number in one]
    return [numbers[first : first + known] for first in range(0, known * epochs, known)]


@pytest.mark.parametrize(("count", "known"), [(1, 9), (3, 9), (4, 9), (9, 9), (20, 9), (4, 1)])
def test_an_epoch_is_every_prompt_once(count: int, known: int) -> None:
    found = order(1, count, known, 3)
    assert [sorted(epoch) for epoch in found] == [list(range(known))] * 3
    assert found == order(1, 1, known, 3), "the batch's size changes nothing"
    if known > 1:
        assert found[0] != found[1] != found[2] != found[0], "another order each time"
        assert order(1, count, known, 1) != order(2, count, known, 1)


@pytest.mark.parametrize("micro_tokens", [16, 64, 4096])
@pytest.mark.parametrize("seed", range(4))
def test_tables_and_flat_vectors(seed: int, micro_tokens: int) -> None:
    """What is taken from a table stands at the labels of the forward pass, and goes back to where it was."""
    made = case(seed, prompts=4, samples=1 + seed)
    params = PARAMS.model_copy(update={"micro_tokens": micro_tokens})
    tokens = made.ragged([torch.tensor(said) for _, said in made.said])
    noise = torch.where(made.rollout.mask, torch.randn(tokens.shape), 0.0)
    again = torch.zeros(tokens.shape)
    for batch in (
        one for minibatch in episodes.passes(made.rollout, params, 0, params.micro_tokens) for one in minibatch
    ):
        labels = batch.rows.labels[batch.rows.labels != losses.IGNORE]
        assert episodes.flat(tokens, made.rollout.mask, batch).tolist() == labels.tolist()
        last = [made.said[number][1][-1] for number in episodes.episodes_of(batch)]
        assert batch.rows.ids[batch.row, batch.column].tolist() == last
        episodes.put(again, made.rollout.mask, batch, episodes.flat(noise, made.rollout.mask, batch))
    assert torch.equal(again, noise)


@pytest.mark.parametrize("micro_tokens", [16, 64, 200, 4096])
@pytest.mark.parametrize("minibatches", [1, 2, 3])
def test_each_prompt_is_in_one_minibatch(minibatches: int, micro_tokens: int) -> None:
    made = case(5)
    params = PARAMS.model_copy(update={"micro_tokens": micro_tokens, "minibatches": minibatches})
    found = episodes.passes(made.rollout, params, 0, params.micro_tokens)
    each = [sorted(number for batch in minibatch for number in batch.numbers) for minibatch in found]
    assert sorted(number for one in each for number in one) == list(range(6))
    assert [len(one) for one in each] == [6 // minibatches] * minibatches, "each step learns from as many"
    every = [batch for minibatch in found for batch in minibatch]
    assert all(batch.rows.ids.numel() <= micro_tokens or len(batch.numbers) == 1 for batch in every)
    assert (len(every) > minibatches) == (micro_tokens <= 16 or micro_tokens == 64 and minibatches == 1)


# --- sampling ------------------------------------------------------------------------------------------------


def generate(
    made: Actors, known: Any, context: StageContext, iteration: int = 0, asked: list[Prompt] | None = None
) -> episodes.Rollout:
    seen: list[tuple[int, int]] = []
    asked = asked or case().rollout.prompts
    found = episodes.generate(made, known, asked, COOL, iteration, context, lambda *told: seen.append(told))
    assert found.prompts == asked and seen[-1][0] == seen[-1][1]
    return found


def responses(found: episodes.Rollout) -> list[list[list[int]]]:
    """Tokens of the responses, [prompt][sample], from the sequences."""
    said: list[list[list[int]]] = []
    for one in found.sequences:
        said.append([[] for _ in range(max(one.branches))])
        for label, branch in zip(one.labels, one.branches, strict=True):
            if label != losses.IGNORE:
                said[-1][branch - 1].append(label)
    return said


def check_sampled(found: episodes.Rollout, made: Actors) -> None:
    """Each row of the tables is about the response of its place, to the prompt of its place."""
    said = zip(found.prompts, responses(found), strict=True)
    flat = [(prompt.ids, ids) for prompt, of_prompt in said for ids in of_prompt]
    assert found.mask.sum(dim=1).tolist() == [len(ids) for _, ids in flat]
    for row, mask, (prompt, ids) in zip(found.sampled, found.mask, flat, strict=True):
        with torch.no_grad():
            expected = plain_scores(made, "policy", prompt, ids, 0.7)
        torch.testing.assert_close(row[mask], expected, atol=1e-4, rtol=1e-4)
        assert mask[: len(ids)].all() and not row[len(ids) :].any()


@pytest.mark.parametrize("method", METHODS)
def test_a_rollout_holds_together(places: dict[str, Path], context: StageContext, method: str) -> None:
    known = tokenizer()
    made = roles(places["llama"], method, context)
    often = Counter(token for one in generate(made, known, context).sequences for token in one.labels)
    ends = next(token for token, _ in often.most_common() if token != losses.IGNORE)
    known.eos_token = known.convert_ids_to_tokens(ends)  # so that some end and some do not
    found = generate(made, known, context)
    check_sampled(found, made)
    assert len({tuple(one) for one in found.ended}) > 1
    for of_prompt, ended, texts in zip(responses(found), found.ended, found.responses, strict=True):
        for ids, end, text in zip(of_prompt, ended, texts, strict=True):
            assert ids.count(ends) == end == (ids[-1] == ends) and (end or len(ids) == COOL.max_new_tokens)
            assert text == known.decode(ids, skip_special_tokens=True).strip()


def test_every_iteration_draws_anew(places: dict[str, Path], known: Any, context: StageContext) -> None:
    made = roles(places["llama"], "shared", context)
    first, again, other = (responses(generate(made, known, context, iteration)) for iteration in (0, 0, 1))
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True)), "of the same prompts"
    assert all(len({tuple(ids) for ids in of_prompt}) == 3 for of_prompt in first), "and of one prompt"


def test_two_processes_share_the_prompts(
    places: dict[str, Path], known: Any, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each has sampled comes back to the prompt that it was sampled for, and neither draws what the other does."""
    made = roles(places["llama"], "shared", context)
    dealt: dict[int, Any] = {}

    def from_all(world: World, value: Any) -> list[Any]:
        dealt[world.rank] = value
        return [dealt[0], dealt.get(1, value)]

    monkeypatch.setattr(distributed, "from_all", from_all)
    for asked in (case().rollout.prompts, case().rollout.prompts[:1] * 2):
        dealt.clear()
        for rank in (0, 1):
            context.world = World(rank, 2)
            found = generate(made, known, context, asked=asked)
        assert len(dealt[0]) == len(dealt[1]) == len(asked) / 2
        check_sampled(found, made)
    assert responses(found)[0] != responses(found)[1]


# --- scoring -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "architecture", "temperature"),
    [("shared", "llama", 1.0), *((method, one, 0.7) for method in METHODS for one in ARCHITECTURES)],
)
def test_scores_are_those_of_each_text_alone(
    places: dict[str, Path], context: StageContext, method: str, architecture: str, temperature: float
) -> None:
    made, known = roles(places[architecture], method, context), case()
    params = PARAMS.model_copy(update={"temperature": temperature})
    found = episodes.score(made, known.rollout, None, params, 0, context)
    close = partial(torch.testing.assert_close, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        spread = [plain_logits(made, "policy", *one, temperature) for one in known.said]
        old = known.ragged([one[range(len(ids)), ids] for one, (_, ids) in zip(spread, known.said, strict=True)])
        reference = known.ragged([plain_scores(made, "reference", *one, temperature) for one in known.said])
        values = known.ragged([plain_values(made, *one) for one in known.said])
        assert made.reward_head is not None
        ends = torch.stack([plain_hidden(made, "reward", *one)[-1] for one in known.said])
        rewards = (ends @ made.reward_head.t())[:, 0] - MEAN
    close(found.old, old)
    close(found.reference, reference)
    close(found.entropies, known.ragged([-(one.exp() * one).sum(dim=1) for one in spread]))
    close(found.values, values)
    close(found.proxy, rewards)
    assert torch.equal(found.scores, found.proxy) and not found.external
    close(found.kl, (old - reference).sum(dim=1))
    assert (old - reference).abs().mean() > 1e-2 and found.kl.shape == (18,)
    assert len({tuple(batch.numbers) for one in found.minibatches for batch in one}) > 2, "several forward passes"


@pytest.mark.parametrize("penalty", [0.0, 1.5])
@pytest.mark.parametrize("external", [True, False])
def test_the_score_of_a_response_that_does_not_end(
    places: dict[str, Path], context: StageContext, external: bool, penalty: float
) -> None:
    made, known = roles(places["llama"], "shared", context, reward=not external), case()
    params = PARAMS.model_copy(update={"missing_eos_penalty": penalty})
    asked: list[episodes.Rollout] = []

    def proxy(rollout: episodes.Rollout) -> Scores:
        asked.append(rollout)
        return Scores([number / 8 for number in range(18)], 0.5)

    found = episodes.score(made, known.rollout, proxy if external else None, params, 0, context)
    assert found.external == external and len(asked) == external and all(one is known.rollout for one in asked)
    if external:
        assert found.proxy.tolist() == [number / 8 for number in range(18)]
    assert found.spread == (0.5 if external else None)
    ended = [end for of_prompt in known.rollout.ended for end in of_prompt]
    rule = [one if end else one - penalty for one, end in zip(found.proxy.tolist(), ended, strict=True)]
    assert found.scores.tolist() == pytest.approx(rule) and 0 < sum(ended) < 18


def test_rows_are_as_wide_as_leaves_least_empty() -> None:
    """Six sequences of 59 tokens: rows of 256 would be two, of four and of two; in rows of two nothing is empty."""
    sequences = [segments.of_completions([number, 7, 8], [[9] * 56]) for number in range(6)]
    assert {len(one.ids) for one in sequences} == {59}
    (batch,) = k_way.batches(sequences, 512, pad=0)
    assert batch.rows.ids.shape == (3, 2 * 59) and sorted(batch.numbers) == list(range(6))
    assert k_way.batches([], 512, pad=0) == []
    long = segments.of_completions([3, 7, 8], [[9] * 700])
    alone, *others = k_way.batches([*sequences, long], 512, pad=0)
    assert alone.numbers == [6] and alone.rows.ids.shape == (1, len(long.ids)), "a long one widens no row but its own"
    assert max(one.rows.ids.numel() for one in others) <= 512


def test_the_first_update_goes_on_from_the_pass_that_scored_it(
    places: dict[str, Path], context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, known = roles(places["llama"], "shared", context), case()
    found = episodes.score(made, known.rollout, None, PARAMS, 0, context)
    first, asked = found.minibatches[0], []
    assert [one.batch is first[0] for one in found.ahead] == [True]
    assert episodes.tokens_ahead(found) == 2 * int((first[0].rows.documents != segments.PADDING).sum())
    hidden = made.hidden
    monkeypatch.setattr(made, "hidden", lambda *given: (asked.append(given[1]), hidden(*given))[1])
    optimizers = (torch.optim.SGD(made.trained(role), lr=0.0) for role in ("policy", "value"))
    learner = ppo_step.Learner(made, *optimizers, 0.0, 0.0)
    targets = ppo_step.Targets(found, found.old, found.values)
    for _ in range(2):
        told = ppo_step.take(learner, targets, first, None, 0, PARAMS, context)
        assert told["approx_kl"] == 0.0
    assert [one is batch.rows for one, batch in zip(asked, [*first[1:], *first], strict=True)] == [True] * len(asked)
    assert found.ahead == []


def test_two_processes_share_the_scoring(
    places: dict[str, Path], context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fills in its part, and the parts add up to the whole."""
    made, known = roles(places["llama"], "shared", context), case()
    whole = episodes.score(made, known.rollout, None, PARAMS, 0, context)
    added: list[int] = []
    monkeypatch.setattr(distributed, "add_up", lambda world, table: added.append(world.rank))
    parts = []
    for rank in (0, 1):
        context.world = World(rank, 2)
        parts.append(episodes.score(made, known.rollout, None, PARAMS, 0, context))
    assert added == [0] * 5 + [1] * 5
    for name in ("old", "reference", "entropies", "values", "proxy"):
        one, two = (getattr(part, name) for part in parts)
        assert torch.equal(one + two, getattr(whole, name)) and one.any() and two.any()


# --- the value model's scale ---------------------------------------------------------------------------------


def rewards_of(returns: torch.Tensor, mask: torch.Tensor, discount: float) -> torch.Tensor:
    """The rewards of which these are the returns: each is its reward and the next one, discounted."""
    following = torch.nn.functional.pad(torch.where(mask, returns, 0.0), (0, 1))[:, 1:]
    return torch.where(mask, returns - discount * following, 0.0)


def fitted(made: Actors, slope: float, level: float, noise: float, discount: float, context: StageContext) -> float:
    """Fit to returns of this line through the values; the mean squared error, as a share of a constant's."""
    rollout = case().rollout
    before = episodes.score(made, rollout, None, PARAMS, 0, context)
    torch.manual_seed(3)
    targets = slope * before.values + level + noise * torch.randn(rollout.mask.shape)
    returns = torch.where(rollout.mask, targets, 0.0)
    found = episodes.fit_values(made, before, rewards_of(returns, rollout.mask, discount), discount)
    assert torch.equal(found.proxy, before.proxy) and not found.values[~rollout.mask].any()
    (batch,) = k_way.batches(rollout.sequences, 4096, 0)
    with torch.no_grad():
        here = made.values(batch, states(made, "value", batch, context))
        there = episodes.flat(found.values, rollout.mask, batch)
        torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
    left = (returns - found.values)[rollout.mask].square().mean()
    return float(left / returns[rollout.mask].var(correction=0))


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("method", METHODS)
def test_values_are_fitted_to_the_returns(
    places: dict[str, Path], context: StageContext, method: str, discount: float
) -> None:
    """The value model itself moves onto the line, and where there is none it is as good as a constant."""
    made = roles(places["llama"], method, context)
    assert fitted(made, 2.5, -4.0, 0.0, discount, context) < 1e-6
    assert 0.1 < fitted(made, 1.0, 0.0, 2.0, discount, context) < 1
    assert fitted(made, -1.0, 0.0, 0.0, discount, context) == pytest.approx(1.0), "what is upside down is not used"
