"""Answers to held-out prompts, batch by batch: the same ones however often the stage was killed in between."""

from __future__ import annotations

import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from models import model, tokenizer

from pipelines.core import completions, sampling
from pipelines.core.completions import Prompt
from pipelines.core.context import StageContext, Stopped
from pipelines.core.params.dpo import DpoParams
from pipelines.core.policy_answers import ask
from pipelines.tokenizer import CHAT_TEMPLATE

PARAMS = DpoParams(
    seed=5, method="full", lora_rank=4, rankings=None, epochs=1, batch_prompts=2, micro_tokens=128, max_length=64,
    too_long="refuse", beta=0.1, lr=None, warmup_share=0.0, weight_decay=0.0, clip_norm=1.0, judge="overlap",
    eval_rankings=None, eval_prompts=5, eval_samples=3, eval_bytes=1024, max_new_tokens=7, max_prompt_tokens=64,
    checkpoint_steps=1, checkpoint_seconds=1.0, samples=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model."""
    root, known = tmp_path_factory.mktemp("model"), tokenizer()
    known.chat_template = CHAT_TEMPLATE
    model(known, depth=2, length=128).save_pretrained(root)
    known.save_pretrained(root)
    return root


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, context: StageContext) -> list[int]:
    """How many prompts each batch had, two at most; a signal comes while the second is sampled, and never again."""
    monkeypatch.setattr(completions, "BATCH_PROMPTS", 2)
    real, found = sampling.sample, list[int]()

    def counted(speaker: Any, prompts: list[list[int]], **how: Any) -> sampling.Samples:
        found.append(len(prompts))
        context.signal_number = signal.SIGTERM if len(found) == 2 else 0
        return real(speaker, prompts, **how)

    monkeypatch.setattr(sampling, "sample", counted)
    return found


def prompts(*lengths: int) -> list[Prompt]:
    return [Prompt(f"p{n}", "g", "test", f"area {n} of w?", None, [1] * length) for n, length in enumerate(lengths)]


def test_a_kill_while_sampling_costs_one_batch(
    place: Path, tmp_path: Path, asked: list[int], context: StageContext
) -> None:
    """Five prompts: three batches."""
    five, elsewhere = prompts(3, 1, 2, 1, 3), StageContext("other", tmp_path, "1" * 64)
    whole = ask(PARAMS, five, place, "it", elsewhere)
    assert asked == [1, 2, 2]
    asked.clear()
    with pytest.raises(Stopped):
        ask(PARAMS, five, place, "it", context, keep="it")
    assert asked == [1, 2]
    context.signal_number = 0  # another process
    assert ask(PARAMS, five, place, "it", context, keep="it") == whole
    assert asked == [1, 2, 2]
    assert ask(PARAMS, five, tmp_path / "gone", "it", context, keep="it") == whole, "no model is loaded for nothing"
    asked.clear()
    with pytest.raises(Stopped):
        ask(PARAMS, five, place, "another", context, keep="another")
    assert asked == [1, 2], "answers of another model are kept apart"


def test_answers_stand_where_their_prompts_do(place: Path, tmp_path: Path, asked: list[int]) -> None:
    """Batches go by length; an answer to a prompt is what a batch of its own would have given it."""
    elsewhere = StageContext("other", tmp_path, "1" * 64)
    five = prompts(3, 1, 2, 1, 3)
    greedy = ask(PARAMS, five, place, "it", elsewhere).greedy
    for number, prompt in enumerate(five):
        alone = ask(PARAMS, [prompt], place, "it", elsewhere).greedy
        assert greedy.log_probabilities[number] == pytest.approx(alone.log_probabilities[0], abs=1e-4)
    scores = sorted(one for (one,) in greedy.log_probabilities)
    assert min(higher - lower for lower, higher in pairwise(scores)) > 1e-3, "or the order would not show"


def test_equal_prompts_get_samples_of_their_own(place: Path, tmp_path: Path, asked: list[int]) -> None:
    """In one batch, and in different ones."""
    same = prompts(1) * 4
    said = ask(PARAMS, same, place, "it", StageContext("other", tmp_path, "1" * 64))
    assert asked == [2, 2]
    assert len({str(one) for one in said.sampled.ids}) == 4 and len({str(one) for one in said.greedy.ids}) == 1
