"""Options and texts of a model: a forward pass for each option as the reference; nothing is asked twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import model
from prompt_toys import chat_model

from pipelines.core import chats, prompt_calls
from pipelines.core.context import StageContext

OPTIONS = ["yes", "no, not at all", "area_3"]
SYSTEM = {"role": "system", "content": "Return the area of the shape, and nothing else. " * 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"), 256)


def asked(speaker: prompt_calls.Speaker, count: int, shared: bool) -> list[list[int]]:
    opening = [SYSTEM] if shared else []
    return [speaker.prompt([*opening, {"role": "user", "content": f"Is shape {n} " + "w " * n}]) for n in range(count)]


@pytest.mark.parametrize("shared", [True, False])
def test_options_are_what_each_would_be_alone(place: Path, context: StageContext, shared: bool) -> None:
    speaker = prompt_calls.Speaker("m", place, context, 200)
    prompts = asked(speaker, 7, shared)
    found = speaker.options(prompts, [OPTIONS] * 7, "test")
    plain = model(speaker.tokenizer, length=256)
    for ids, scored in zip(prompts, found, strict=True):
        for option, score, size in zip(OPTIONS, scored.log_probabilities, scored.tokens, strict=True):
            answer = chats.encode_response(speaker.tokenizer, option)
            logits = plain(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            alone = logits[range(len(answer)), answer].mean().item()
            assert score == pytest.approx(alone, abs=1e-4) and size == len(answer)
            assert answer[-1] == speaker.tokenizer.eos_token_id


def test_what_is_kept_is_not_asked_again(place: Path, context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def both(speaker: prompt_calls.Speaker) -> Any:
        prompts = asked(speaker, 3, shared=True)
        return speaker.options(prompts, [OPTIONS] * 3, "test"), speaker.texts(prompts, 2, 4, 1.0, 5, "test")

    first = both(prompt_calls.Speaker("m", place, context, 200))
    assert [len(one.texts) for one in first[1]] == [2, 2, 2] and all(0 < n <= 4 for one in first[1] for n in one.tokens)
    speaker = prompt_calls.Speaker("m", place, context, 200)
    with monkeypatch.context() as patch:
        patch.setattr(prompt_calls.Speaker, "model", property(lambda self: pytest.fail("the model was loaded")))
        assert both(speaker) == first
    other = prompt_calls.Speaker("m", place, context, 200)
    calls = len(list(prompt_calls.calls(context).iterdir()))
    prompts = asked(other, 3, shared=True)
    assert other.texts(prompts, 2, 4, 1.0, 6, "test") != first[1]
    other.content = "another model"  # the same tokens, asked of other weights
    other.options(prompts, [OPTIONS] * 3, "test")
    assert len(list(prompt_calls.calls(context).iterdir())) == calls + 2


def test_room_is_what_the_dial_and_the_context_leave(place: Path, context: StageContext) -> None:
    assert prompt_calls.Speaker("m", place, context, 200).room(10) == 200
    assert prompt_calls.Speaker("m", place, context, 999).room(10) == 246


@pytest.mark.parametrize("shared", [0, 40, 700])
def test_passes_hold_every_sequence_once_and_keep_to_their_bounds(shared: int) -> None:
    lengths = [shared + 10 + 37 * n % 300 for n in range(60)]
    made = prompt_calls.passes(lengths, shared)
    assert sorted(number for bins in made for one in bins for number in one) == list(range(60))
    for bins in made:
        widths = [shared + sum(lengths[number] - shared for number in one) for one in bins]
        assert len(bins) == 1 or len(bins) * max(widths) <= prompt_calls.PASS_TOKENS
        room = min(max(128, shared), prompt_calls.ROW_LIMIT)
        assert all(len(one) == 1 or width - shared <= room for one, width in zip(bins, widths, strict=True))
