"""Samples are what the model says, token by token, whatever they are drawn beside."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import model, prepared, tokenizer

from pipelines.core import attention, continuation, sampling
from pipelines.core.branch_cache import SPARE, Layout, layout
from pipelines.core.errors import ArtifactError, DataError

ARCHITECTURES = ["llama", "gpt2", "qwen3", "gpt_neox"]
NEVER = 100_000  # no token: a sample that can only end at its limit


@pytest.fixture(scope="module")
def known() -> Any:
    return tokenizer()


def wild(known: Any, architecture: str = "llama", length: int = 128, **other: Any) -> Any:
    """A model whose continuations are not one token again and again, grouped keys included where it has them."""
    lm = model(known, architecture, length=length, **other)
    torch.manual_seed(1)
    with torch.no_grad():
        for value in lm.parameters():
            value.add_(torch.randn_like(value) * 0.08)
    return lm


def some_prompts(lengths: list[int]) -> list[list[int]]:
    return [random.Random(number).choices(range(10, 290), k=length) for number, length in enumerate(lengths)]


def sample(lm: Any, prompts: list[list[int]], **other: Any) -> sampling.Samples:
    options: dict[str, Any] = {
        "count": 3, "tokens": 12, "stops": [NEVER], "pad": 3, "temperature": 1.0, "seed": 7, "precision": "fp32",
        "tell": lambda done, total: None,
    }  # fmt: skip
    return sampling.sample(lm, prompts, **options | other)


def scores(lm: Any, prompt: list[int], new: list[int], temperature: float) -> torch.Tensor:
    """Log-probabilities of new tokens by one plain forward of the whole text."""
    logits = lm(input_ids=torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float() / temperature, dim=1).gather(1, torch.tensor(new)[:, None])[:, 0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_generate_token_by_token(known: Any, architecture: str) -> None:
    lm = wild(known, architecture)
    prompts = some_prompts([5, 1, 17, 3])
    found = sample(lm, prompts, count=1, tokens=40, temperature=0)
    kinds = set()
    for prompt, (new,), (sure,) in zip(prompts, found.ids, found.log_probabilities, strict=True):
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": NEVER, "pad_token_id": 3}
        assert new == lm.generate(input_ids=ids, attention_mask=ids * 0 + 1, **settings)[0, len(prompt) :].tolist()
        torch.testing.assert_close(torch.tensor(sure), scores(lm, prompt, new, 1.0), atol=1e-4, rtol=0)
        kinds.update(new)
    assert len(kinds) > 4, "a model that repeats one token shows nothing"


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probabilities_are_those_of_a_plain_forward(known: Any, architecture: str, temperature: float) -> None:
    """Across the growth of the cache, samples that end and their branches being taken by others."""
    lm = wild(known, architecture)
    prompts = some_prompts([9, 2, 21])
    found = sample(lm, prompts, tokens=70, stops=list(range(0, 290, 40)), temperature=temperature)
    lengths = set()
    for prompt, ids, log_probabilities in zip(prompts, found.ids, found.log_probabilities, strict=True):
        for new, given in zip(ids, log_probabilities, strict=True):
            torch.testing.assert_close(torch.tensor(given), scores(lm, prompt, new, temperature), atol=1e-4, rtol=0)
            lengths.add(len(new))
    assert len(lengths) > 3


def test_a_sample_depends_on_its_prompt_and_number_only(known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the batch, the layout of the cache, its growth or the branches that others leave; but on the seed."""
    lm = wild(known)
    prompts = some_prompts([4, 30, 11, 11, 2, 19])
    options: dict[str, Any] = {"count": 4, "tokens": 40, "stops": [*range(0, 290, 30)]}
    found = sample(lm, prompts, **options)
    assert len({len(new) for ids in found.ids for new in ids}) > 5, "they end at different times"
    for name, value in {"BRANCHES": 4, "PROMPT_TOKENS": 40, "KEPT_TOKENS": 200, "BLOCK": 3}.items():
        with monkeypatch.context() as patch:
            patch.setattr(sampling, name, value)
            assert sample(lm, prompts, **options).ids == found.ids, name
    for width in (1, 2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "widest", lambda *_, width=width: width)
            assert sample(lm, prompts, **options).ids == found.ids, width
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "layout", lambda samples, count, widest: found_layout(6, 4))
        patch.setattr(sampling, "BLOCK", 1000)
        assert sample(lm, prompts, **options).ids == found.ids, "no branch is ever left"
    fewer = sample(lm, prompts, **options | {"count": 2})
    assert fewer.ids == [ids[:2] for ids in found.ids]
    assert sample(lm, prompts[:3], **options).ids == found.ids[:3]
    assert sample(lm, prompts, **options | {"seed": 8}).ids != found.ids
    same = sample(lm, [prompts[0]] * 2, **options)
    assert len({tuple(new) for ids in same.ids for new in ids}) == 8, "every sample has a stream of its own"


def found_layout(prompts: int, count: int) -> Layout:
    return Layout(list(range(prompts)), [[n * count + k for k in range(count)] for n in range(prompts)])


def test_each_token_is_drawn_with_a_random_number_of_its_own(known: Any) -> None:
    """A number used twice would tie a token to the one before, and no frequency of single tokens would show it."""
    lm = wild(known)
    prompts = some_prompts([9, 2])
    found = sample(lm, prompts, count=2, tokens=40, seed=5)
    for number, prompt in enumerate(prompts):
        for one, new in enumerate(found.ids[number]):
            numbers = torch.from_numpy(np.random.default_rng([5, number, one]).random(40, dtype=np.float32))[:, None]
            logits = lm(input_ids=torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
            shares = torch.softmax(logits.detach().double(), dim=1)
            ends = shares.cumsum(dim=1)
            chosen = torch.tensor(new)[:, None]
            assert ((ends - shares).gather(1, chosen) < numbers + 1e-4).all()
            assert (ends.gather(1, chosen) > numbers - 1e-4).all()


def test_a_greedy_sample_beside_the_drawn_ones(known: Any) -> None:
    """Both are what calls of their own give; the greedy one is each prompt's last."""
    lm, prompts = wild(known), some_prompts([9, 2, 5])
    both = sample(lm, prompts, count=3, tokens=12, seed=5, greedy=True)
    drawn = sample(lm, prompts, count=3, tokens=12, seed=5)
    largest = sample(lm, prompts, count=1, tokens=12, seed=5, temperature=0.0)
    for number in range(len(prompts)):
        assert both.ids[number] == drawn.ids[number] + largest.ids[number]
        alone = drawn.log_probabilities[number] + largest.log_probabilities[number]
        for one, other in zip(both.log_probabilities[number], alone, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
    assert len({tuple(ids) for ids in both.ids[0]}) == 4, "or nothing was drawn"


def test_sampled_first_tokens_follow_the_model(known: Any) -> None:
    """The whole path: 3,000 samples of one prompt against the model's softmax, over the tokens likely enough."""
    lm = wild(known)
    (prompt,) = some_prompts([6])
    drawn = Counter(new[0] for new in sample(lm, [prompt], count=3000, tokens=1).ids[0])
    wanted = torch.softmax(lm(input_ids=torch.tensor([prompt])).logits[0, -1], dim=0)
    likely = (wanted * 3000 >= 8).nonzero()[:, 0].tolist()
    chi_square = sum(
        (drawn[token] - 3000 * float(p)) ** 2 / (3000 * float(p)) for token in likely for p in [wanted[token].detach()]
    )
    freedom = len(likely)
    assert freedom > 10 and chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_samples_share_the_encoding_of_their_prompt(known: Any) -> None:
    lm = wild(known)
    seen: list[int] = []
    handle = lm.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    sample(lm, some_prompts([20, 20]), count=5, tokens=8)
    handle.remove()
    assert seen == [40] + [10] * 7, "prompts once, then one token a sample; the last token drawn is not read"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_all_prompts_begin_with_is_encoded_once(known: Any, architecture: str) -> None:
    lm = wild(known, architecture)
    beginning = some_prompts([9])[0]
    prompts = [beginning + more for more in ([40, 41, 42], [50], [40, 60, 61, 62, 63])]
    seen: list[int] = []
    handle = lm.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    found = sample(lm, prompts, count=2, tokens=6)
    handle.remove()
    assert seen[:2] == [9, 3 * 5], "the beginning once, then what is left, padded to the longest"
    for prompt, ids, logs in zip(prompts, found.ids, found.log_probabilities, strict=True):
        for new, said in zip(ids, logs, strict=True):
            torch.testing.assert_close(torch.tensor(said), scores(lm, prompt, new, 1.0), atol=2e-4, rtol=1e-4)


def test_a_stop_ends_a_sample(known: Any) -> None:
    lm = wild(known)
    prompts = some_prompts([5, 8])
    free = sample(lm, prompts, tokens=20)
    stop = free.ids[0][1][4]
    found = sample(lm, prompts, tokens=20, stops=[stop, NEVER])
    for number, (before, after) in enumerate(zip(free.ids, found.ids, strict=True)):
        for one, (long, short) in enumerate(zip(before, after, strict=True)):
            cut = long.index(stop) + 1 if stop in long else 20
            assert short == long[:cut] and found.ended[number][one] == (stop in long)
            assert len(found.log_probabilities[number][one]) == len(short)
    last = sample(lm, prompts, tokens=5, stops=[stop])
    assert last.ended[0][1] and len(last.ids[0][1]) == 5, "a stop as the last token allowed is an end"


def test_branches_that_end_make_room(known: Any) -> None:
    """The model is asked for fewer tokens once half the samples have ended."""
    lm = wild(known)
    seen: list[int] = []
    lm.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    found = sample(lm, some_prompts([3] * 8), count=4, tokens=40, stops=list(range(0, 290, 12)))
    lengths = [len(new) for ids in found.ids for new in ids]
    for step, asked in enumerate(seen[1:], 1):
        going = sum(length > step for length in lengths)
        assert going <= asked < max(2 * going, 2) * 1.25 + 1, (step, going, asked)
    assert len(seen) == max(lengths) or max(lengths) == 40


def test_layouts_by_hand() -> None:
    assert layout([0, 1, 2, 3, 4, 5, 6, 7], 4, 9) == Layout([0, 1], [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert layout([0, 1, 2, 3], 4, 2) == Layout([0, 0], [[0, 1], [2, 3]])
    assert layout([0, 1, 2, 4, 9], 4, 4) == Layout([0, 0, 0, 1, 2], [[0], [1], [2], [4], [9]])
    assert layout([3, 0, 1, 2, 5, 6, 7], 4, 4) == Layout([0, 1], [[0, 1, 2, 3], [5, 6, 7, SPARE]])


@pytest.mark.parametrize("seed", range(30))
def test_a_layout_holds_every_sample_once(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 9)
    samples = draw.sample(range(6 * count), draw.randint(1, 6 * count))
    found = layout(samples, count, draw.randint(1, 9))
    assert sorted(n for row in found.branches for n in row if n != SPARE) == sorted(samples)
    assert len({len(row) for row in found.branches}) == 1
    assert all(
        n // count == owner for owner, row in zip(found.owners, found.branches, strict=True) for n in row if n >= 0
    )
    assert len(samples) >= 0.8 * sum(len(row) for row in found.branches)


def test_adapters_take_part(known: Any) -> None:
    """A model wrapped by peft samples as the merged one does, and its training mode is given back."""
    lm = prepared(wild(known))
    torch.manual_seed(5)
    for name, value in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.2)
    prompts = some_prompts([4, 9])
    with lm.disable_adapter():
        without = sample(lm, prompts)
    lm.train()
    found = sample(lm, prompts)
    assert lm.training and found.ids != without.ids
    assert sample(lm.merge_and_unload(), prompts).ids == found.ids


@pytest.mark.parametrize("kind", ["sdpa", "eager", "grouped"])
def test_the_attention_a_model_was_loaded_with_stays(known: Any, kind: str) -> None:
    name = attention.choose("cpu", 1) if kind == "grouped" else kind
    lm = wild(known, attention=name)
    assert sample(lm, some_prompts([4, 9])).ids == sample(wild(known), some_prompts([4, 9])).ids
    assert lm.config._attn_implementation == name


def test_computing_in_bf16(known: Any) -> None:
    """Weights in fp32 or bf16: the log-probabilities are near those of the fp32 model for the same tokens."""
    for dtype in (torch.float32, torch.bfloat16):
        lm = wild(known)
        prompts = some_prompts([4, 9])
        found = sample(lm.to(dtype), prompts, precision="bf16", tokens=20)
        lm.float()
        for prompt, ids, given in zip(prompts, found.ids, found.log_probabilities, strict=True):
            for new, one in zip(ids, given, strict=True):
                torch.testing.assert_close(torch.tensor(one), scores(lm, prompt, new, 1.0), atol=0.15, rtol=0.05)


def test_progress_is_told_in_prompts(known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(sampling, "BRANCHES", 6)
    sample(wild(known), some_prompts([3] * 5), tokens=2, tell=lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert sample(wild(known), []) == sampling.Samples([], [], [])


def test_refusals(known: Any) -> None:
    lm = wild(known, length=32)
    with pytest.raises(ArtifactError, match="longest prompt has 25 tokens; with 8 new ones that is 33, .* 32 tokens"):
        sample(lm, some_prompts([3, 25]), tokens=8)
    sample(lm, some_prompts([24]), tokens=8)
    with pytest.raises(DataError, match="prompt 1 of 2 has no token"):
        sample(lm, [[4], []])
    lm.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ArtifactError, match="llama cannot be sampled from: it has layers of linear_attention"):
        sample(lm, [[4]])
    lm.config.layer_types, lm.config.sliding_window = None, 10
    with pytest.raises(ArtifactError, match="context is 10 tokens"):
        sample(lm, [[4]], tokens=10)
    with pytest.raises(ArtifactError, match="bloom cannot be sampled from: its attention makes masks of its own"):
        sample(bloom(), [[4]])


def bloom() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("bloom", vocab_size=100, hidden_size=16, n_layer=1, n_head=2)
    return AutoModelForCausalLM.from_config(config)


def test_a_continuation_holds_nothing_of_the_prompt(known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the prompt is longer than the context: its end is read, and half the context is left for new text."""
    given: dict[str, Any] = {}

    def ends_at_once(model: Any, prompts: list[list[int]], **options: Any) -> sampling.Samples:
        given.update(prompts=prompts, **options)
        ids = [[[known.convert_tokens_to_ids("h"), known.eos_token_id]] for _ in prompts]
        return sampling.Samples(ids, [], [])

    monkeypatch.setattr(sampling, "sample", ends_at_once)
    lm = model(known, length=64)
    prompts = ["Return the area of a shape.", "w"]
    assert continuation.greedy(lm, known, prompts, 8) == ["h", "h"]
    whole = given["prompts"]
    lm.config = SimpleNamespace(max_position_embeddings=12)
    assert continuation.greedy(lm, known, prompts, 8) == ["h", "h"]
    assert given["tokens"] == 6 and given["prompts"] == [whole[0][-6:], whole[1]]
