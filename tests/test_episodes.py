"""Episodes: which prompts, what is sampled, and what the four roles say, against plain forward passes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from models import tokenizer
from test_ppo_params import PLAIN
from test_reward_adapter import ARCHITECTURES, MEAN, disturb, store

from pipelines.core import actors, distributed, episodes, k_way, losses, segments
from pipelines.core.actors import Actors
from pipelines.core.completions import Prompt
from pipelines.core.context import StageContext
from pipelines.core.distributed import World
from pipelines.core.params.ppo import PpoParams

METHODS = ("shared", "separate")
PARAMS = PpoParams.model_validate(
    PLAIN
    | {"batch_prompts": 6, "samples_per_prompt": 3, "max_new_tokens": 8, "micro_tokens": 64, "missing_eos_score": None}
    | {"ptx_rows": 3, "ptx_length": 32}
)
COOL = PARAMS.model_copy(update={"temperature": 0.7})


class Case(NamedTuple):
    """A rollout made by hand, and its episodes one by one."""

    rollout: episodes.Rollout
    said: list[tuple[list[int], list[int]]]  # (prompt, response) of each episode

    def ragged(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """A vector for each episode as a table (N, T)."""
        table = torch.zeros(self.rollout.mask.shape)
        for number, row in enumerate(rows):
            table[number, : len(row)] = row
        return table


def case(seed: int = 0, prompts: int = 6, samples: int = 3) -> Case:
    """Prompts that begin alike, with responses of 1 to 7 random tokens."""
    draw = random.Random(seed)
    asked, said = [], []
    for number in range(prompts):
        ids = [5, 6, 7, *draw.choices(range(10, 290), k=draw.randint(1, 9))]
        asked.append(Prompt(str(number), str(number), "train", f"prompt {number}", None, ids))
        said.append([draw.choices(range(10, 290), k=draw.randint(1, 7)) for _ in range(samples)])
    flat = [(prompt.ids, one) for prompt, of_prompt in zip(asked, said, strict=True) for one in of_prompt]
    longest = max(len(one) for _, one in flat)
    mask = torch.tensor([[place < len(one) for place in range(longest)] for _, one in flat])
    sequences = [segments.of_completions(prompt.ids, one) for prompt, one in zip(asked, said, strict=True)]
    texts = [[f"{number}.{k}" for k in range(samples)] for number in range(prompts)]
    ended = [[draw.random() < 0.5 for _ in range(samples)] for _ in range(prompts)]
    return Case(episodes.Rollout(asked, sequences, texts, ended, torch.zeros(mask.shape), mask), flat)


def roles(root: Path, method: str, context: StageContext, reward: bool = True) -> Actors:
    """Actors whose policy has left the SFT model, and whose value model the reward model."""
    if method == "shared":
        made = actors.shared(root / "sft", root / "reward" if reward else None, 4, 64, 7, context)
    else:
        made = actors.separate(root / "sft", root / "reward/model" if reward else None, 64, 7, context)
    torch.manual_seed(11)
    for role in ("policy", "value"):
        disturb(made._named[role].items(), scale=0.02)
    return made


def plain_logits(made: Actors, role: Any, prompt: list[int], said: list[int], temperature: float) -> torch.Tensor:
    """(tokens, vocabulary): what each token of a response is drawn from, by transformers, with nothing beside it."""
    with made.using(role) as lm:
        logits: torch.Tensor = lm(input_ids=torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=1)


def plain_scores(made: Actors, role: Any, prompt: list[int], said: list[int], temperature: float) -> torch.Tensor:
    return plain_logits(made, role, prompt, said, temperature)[range(len(said)), said]


def plain_hidden(made: Actors, role: Any, prompt: list[int], said: list[int]) -> torch.Tensor:
    """(prompt + response, width)."""
    with made.using(role) as model:
        body = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
        hidden: torch.Tensor = body(input_ids=torch.tensor([prompt + said])).last_hidden_state[0]
    return hidden


def plain_values(made: Actors, prompt: list[int], said: list[int]) -> torch.Tensor:
    hidden = plain_hidden(made, "value", prompt, said)[len(prompt) - 1 : -1]
    return hidden @ made.value_head.weight[0] + made.value_head.bias


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
    for batch in (one for minibatch in episodes.passes(made.rollout, params, 0) for one in minibatch):
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
    found = episodes.passes(made.rollout, params, 0)
    each = [sorted(number for batch in minibatch for number in batch.numbers) for minibatch in found]
    assert sorted(number for one in each for number in one) == list(range(6))
    assert [len(one) for one in each] == [6 // minibatches] * minibatches, "each step learns from as many"
    every = [batch for minibatch in found for batch in minibatch]
    assert all(batch.rows.ids.numel() <= micro_tokens or len(batch.numbers) == 1 for batch in every)
    assert (len(every) > minibatches) == (micro_tokens < 200)


# --- sampling ------------------------------------------------------------------------------------------------


def generate(made: Actors, known: Any, context: StageContext, iteration: int = 0) -> episodes.Rollout:
    seen: list[tuple[int, int]] = []
    asked = case().rollout.prompts
    found = episodes.generate(made, known, asked, COOL, iteration, context, lambda *told: seen.append(told))
    assert found.prompts == asked and seen and all(done == total for done, total in seen[-1:])
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
    flat = [
        (prompt.ids, ids)
        for prompt, of_prompt in zip(found.prompts, responses(found), strict=True)
        for ids in of_prompt
    ]
    assert found.mask.sum(dim=1).tolist() == [len(ids) for _, ids in flat] and found.mask[:, 0].all()
    for row, mask, (prompt, ids) in zip(found.sampled, found.mask, flat, strict=True):
        with torch.no_grad():
            expected = plain_scores(made, "policy", prompt, ids, 0.7)
        torch.testing.assert_close(row[mask], expected, atol=1e-4, rtol=1e-4)
        assert not row[~mask].any() and mask.tolist() == sorted(mask.tolist(), reverse=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_rollout_holds_together(places: dict[str, Path], context: StageContext, method: str) -> None:
    known = tokenizer()
    made = roles(places["llama"], method, context)
    often = Counter(token for of_prompt in responses(generate(made, known, context)) for one in of_prompt for token in one)
    known.eos_token = known.convert_ids_to_tokens(often.most_common(1)[0][0])  # so that some end and some do not
    found = generate(made, known, context)
    check_sampled(found, made)
    flat = [ids for of_prompt in responses(found) for ids in of_prompt]
    ended = [end for of_prompt in found.ended for end in of_prompt]
    assert True in ended and False in ended
    for ids, end, text in zip(flat, ended, [one for texts in found.responses for one in texts], strict=True):
        assert ids.count(known.eos_token_id) == end == (ids[-1] == known.eos_token_id)
        assert end or len(ids) == COOL.max_new_tokens
        assert text == known.decode(ids[:-1] if end else ids).strip()


def test_every_iteration_draws_anew(places: dict[str, Path], known: Any, context: StageContext) -> None:
    made = roles(places["llama"], "shared", context)
    first, again, other = (responses(generate(made, known, context, iteration)) for iteration in (0, 0, 1))
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True)), "of the same prompts"
    assert all(len({tuple(ids) for ids in of_prompt}) == 3 for of_prompt in first), "and of one prompt"


def test_two_processes_share_the_prompts(
    places: dict[str, Path], known: Any, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each has sampled comes back to the prompt that it was sampled for."""
    made, dealt = roles(places["llama"], "shared", context), {}

    def from_all(world: World, value: Any) -> list[Any]:
        dealt[world.rank] = value
        return [dealt[0], dealt.get(1, value)]

    monkeypatch.setattr(distributed, "from_all", from_all)
    for rank in (0, 1):
        context.world = World(rank, 2)
        found = generate(made, known, context)
    assert len(dealt[0]) == len(dealt[1]) == 3
    check_sampled(found, made)
    same = [case().rollout.prompts[0]] * 2
    twice = episodes.generate(made, known, same, COOL, 0, context._replace_world(World()), lambda *told: None)
    assert responses(twice)[0] != responses(twice)[1]
