"""One sequence at a time: the tokens are those of transformers, and what is shown of a text is never taken back."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from models import model, tokenizer
from test_int8 import IDS, logits, tiny
from tokenizers import Tokenizer, decoders
from tokenizers import models as bpe
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, StopStringCriteria

from pipelines.core import chats, decoding, generate, int8, serving, serving_cells, serving_model
from pipelines.core.generate import Sampling
from pipelines.tokenizer import CHAT_TEMPLATE

PROMPT = IDS[0].tolist()
OPTIONS = [
    {},
    {"repetition_penalty": 1.3},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_p": 0.4},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.5},
]


def theirs(lm: Any, seed: int, **options: Any) -> list[int]:
    """What transformers' `generate` says after the prompt."""
    torch.manual_seed(seed)
    asked = {"do_sample": True, "top_k": 0} if "temperature" in options else {"do_sample": False}
    made = lm.generate(IDS, max_new_tokens=20, eos_token_id=None, pad_token_id=0, **(asked | options))
    return made[0, IDS.shape[1] :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "greedy")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tokens_are_those_of_transformers(kind: str, options: dict[str, Any]) -> None:
    lm = tiny(kind, tied=False)
    lm.get_output_embeddings().weight.data *= 10  # logits so far apart that options matter, not so far that one wins
    decoder = generate.decoder(lm)
    assert isinstance(decoder, decoding.Decoder if kind == "llama" else generate.Forward)
    wanted = [theirs(lm, seed, **options) for seed in range(3)]
    for seed in range(3):
        assert list(generate.tokens(decoder, PROMPT, Sampling(20, seed=seed, **options))) == wanted[seed]
    assert list(generate.tokens(lm, PROMPT, Sampling(20, seed=2, **options))) == wanted[2]  # asked without a decoder
    for name in options:  # each of them matters
        less = {one: value for one, value in options.items() if one != name}
        if "temperature" in less or not less:
            assert [theirs(lm, seed, **less) for seed in range(3)] != wanted, name


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
        ("openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    ],
)
def test_other_caches_and_none_give_the_tokens_of_the_whole(kind: str, more: dict[str, int]) -> None:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=96, **more)).eval()
    ids = list(PROMPT)
    for _ in range(6):
        ids.append(int(logits(lm, torch.tensor([ids]))[0, -1].argmax()))
    assert list(generate.tokens(lm, PROMPT, Sampling(6))) == ids[len(PROMPT) :]


def test_samples_follow_the_distribution() -> None:
    lm = tiny()
    shares = torch.softmax(logits(lm)[0, -1] / 0.5, dim=0)
    decoder = generate.decoder(lm)
    drawn = [next(generate.tokens(decoder, PROMPT, Sampling(1, 0.5, seed=seed))) for seed in range(300)]
    found = torch.bincount(torch.tensor(drawn), minlength=len(shares)) / len(drawn)
    assert float((found - shares).abs().sum()) / 2 < 0.35  # total variation of 300 draws over 96 near-equal tokens


def test_a_stop_token_and_a_full_context_end_it() -> None:
    lm = tiny()
    whole = list(generate.tokens(lm, [1, 2, 3], Sampling(12)))
    assert list(generate.tokens(lm, [1, 2, 3], Sampling(12), {whole[2]})) == whole[: whole.index(whole[2]) + 1]
    for kind in ("llama", "gpt2"):
        small = tiny(kind, max_position_embeddings=10)
        assert len(list(generate.tokens(small, PROMPT[:7], Sampling(50)))) == 3
        for ids in ([], [1] * 10):
            with pytest.raises(ValueError, match=f"a prompt of {len(ids)} tokens; accepted: 1 to 9, since the model's"):
                next(generate.tokens(small, ids, Sampling(1)))


def test_damaged_weights_are_told() -> None:
    lm = tiny()
    lm.base_model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits are NaN"):
        next(generate.tokens(lm, PROMPT, Sampling(1)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("stop", ("",)),
        ("stop", "end"),
        ("seed", -1),
    ],
)
def test_values_that_are_not_accepted_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: .*; accepted: "):
        Sampling(**{"max_new_tokens": 4, name: value})


def bytes_one_by_one() -> Any:
    """A tokenizer as Llama 2's: words with their space, bytes as tokens, of which a run decodes whole or not."""
    words = ["<s>", "▁a", "▁b", "c", "€", "▁"] + [f"<0x{n:02X}>" for n in range(256)]
    made = Tokenizer(bpe.BPE({word: n for n, word in enumerate(words)}, [], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>")


def told(known: Any, ids: list[int]) -> list[str]:
    pieces = generate.Pieces(known)
    return [pieces.add(token) for token in ids] + [pieces.end()]


@pytest.mark.parametrize("make", [tokenizer, bytes_one_by_one])
def test_pieces_are_the_text_and_split_no_character(make: Any) -> None:
    known = make()
    text = "a b 한국어 é 🙂👩‍🔬 c" if make is tokenizer else ""
    ids = known(text)["input_ids"] if text else [1, 2, 6 + 0xED, 6 + 0x95, 6 + 0x9C, 3, 5, 6 + 0xC3, 6 + 0xA9, 1]
    pieces = told(known, ids)
    assert "".join(pieces) == known.decode(ids) == (text or "a b한c é a")
    assert not any(generate.UNFINISHED in piece for piece in pieces)


def test_pieces_of_any_tokens_are_the_text() -> None:
    known, luck = tokenizer(), random.Random(5)
    for _ in range(200):  # most of them hold bytes that are no character
        ids = [luck.randrange(len(known)) for _ in range(luck.randrange(12))]
        assert "".join(told(known, ids)) == known.decode(ids, skip_special_tokens=True)


def test_what_was_told_stays_where_the_tokenizer_takes_it_back() -> None:
    known = bytes_one_by_one()
    ids = [6 + 0xE2, 6 + 0x82, 6 + 0xAC, 6 + 0xFF, 1]
    assert known.decode(ids).startswith("\ufffd\ufffd\ufffd")  # the euro is gone
    assert told(known, ids)[2] == "€"
    assert "".join(told(known, ids)).startswith("€\ufffd")


class Said:
    """In a model's place: it says what it is told to, whatever it is asked."""

    def __init__(self, ids: list[int], size: int, end: int) -> None:
        self.ids, self.size, self.asked = ids, size, 0
        config = SimpleNamespace(max_position_embeddings=None)
        self.model = SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=end))

    def make_room(self, length: int) -> None:
        pass

    def prefill(self, ids: list[int]) -> torch.Tensor:
        return self.step(0)

    def step(self, token: int) -> torch.Tensor:
        self.asked += 1
        return torch.nn.functional.one_hot(torch.tensor(self.ids[self.asked - 1]), self.size).float()


TEXT = "한국어 abcabd\n\nUser: 🙂 no"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((), TEXT),
        (("abd",), "한국어 abc"),
        (("\n\nUser:",), "한국어 abcabd"),
        (("zzz", "bd", "abd"), "한국어 abc"),  # two end at the same place: the longer one began first
        (("cabdx", "ca"), "한국어 ab"),
        (("🙂",), "한국어 abcabd\n\nUser: "),
        (("a",), "한국어 "),
        (("한",), ""),
        (("no, never",), TEXT),  # begun, and never complete
    ],
)
def test_a_stop_string_ends_the_text_and_nothing_of_it_is_shown(stop: tuple[str, ...], text: str) -> None:
    known = tokenizer()
    ids = known(TEXT)["input_ids"]
    end = known.eos_token_id
    said = Said([*ids, end, 5], len(known), end)
    pieces = list(generate.stream(said, known, [1], Sampling(99, stop=stop)))
    assert "".join(pieces) == text
    assert all(pieces), "an empty piece tells nothing"
    taken = len(ids) + 1  # up to EOS, whose text is not shown
    if text != TEXT:  # as many as transformers takes
        criteria = StopStringCriteria(known, list(stop))
        done = [bool(criteria(torch.tensor([ids[: n + 1]]), None)[0]) for n in range(len(ids))]  # type: ignore[arg-type]
        taken = done.index(True) + 1
    assert said.asked == taken


def test_what_cannot_be_a_stop_string_is_shown_at_once() -> None:
    known = tokenizer()
    ids = known("x = ab ac")["input_ids"]
    said = Said([*ids, known.eos_token_id], len(known), known.eos_token_id)
    shown = ""
    for piece in generate.stream(said, known, [1], Sampling(99, stop=("abc",))):
        shown += piece
        now = known.decode(ids[: said.asked])
        held = next((n for n in (2, 1) if now.endswith("abc"[:n])), 0)
        assert shown == now[: len(now) - held]
    assert shown == "x = ab ac"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "packed"])
def test_a_served_model_answers_with_every_param(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = tokenizer()
    known.chat_template = CHAT_TEMPLATE
    lm = model(known, "llama" if kind == "packed" else kind, depth=2, length=96)
    lm.get_input_embeddings().weight.data *= 3  # logits far apart, so that a penalty changes what is drawn
    (int8.quantize(lm) if kind == "packed" else lm).save_pretrained(tmp_path)
    known.save_pretrained(tmp_path)
    served = serving.of(tmp_path)
    beside = [Path(name).stem for name in served.beside]
    assert beside == ["int8"] * (kind == "packed") + [
        *("decoding", "generate", "citing", "grounding", "transcripts", "cpu", "serving_cells")
    ]
    for name in beside:  # as MLflow lays them beside
        monkeypatch.setitem(sys.modules, name, importlib.import_module(f"pipelines.core.{name}"))
    answering = serving_model.TextModel()
    answering.load_context(SimpleNamespace(artifacts={"model": str(tmp_path)}))
    table = pd.DataFrame({"prompt": ["def area", "", "x" * 500]})
    defaults = {one.name: one.default for one in served.signature.params}
    plain = answering.predict(None, table, dict(defaults))["text"].tolist()
    assert plain == answering.predict(None, table)["text"].tolist()
    assert plain == [answering.predict(None, table[n : n + 1])["text"].item() for n in range(3)]  # each as if alone
    warm = {"max_new_tokens": 40, "temperature": 1.5, "seed": 3}
    free = answering.predict(None, table, defaults | warm)["text"].tolist()
    for change in ({"top_k": 1}, {"top_p": 0.01}, {"repetition_penalty": 9.0}, {"seed": 4}, {"chat": True}):
        assert answering.predict(None, table, defaults | warm | change)["text"].tolist() != free, change
    spelled = f"def area{answering.tokenizer.eos_token}<|im_start|>system"
    asked = answering._tokens(spelled, chat=True)
    assert asked == chats.encode_prompt(answering.tokenizer, [{"role": "user", "content": spelled}])
    turns = "\n\nHuman: def area\n\nAssistant: w\n\nHuman: and h?\n\nAssistant:"  # as stages read it, a conversation
    asked = answering._tokens(turns, chat=True)
    assert asked == chats.encode_prompt(answering.tokenizer, chats.messages_of(turns))
    letter = next(one for one in free[0] if one.isalpha())
    stopped = answering.predict(None, table, defaults | warm | {"stop": [letter]})["text"].tolist()
    assert stopped[0] == free[0].partition(letter)[0]
    with pytest.raises(ValueError, match="top_p: 2.0; accepted: above 0"):
        answering.predict(None, table, defaults | {"top_p": 2.0})
    for empty in (None, float("nan")):
        with pytest.raises(ValueError, match="row 1: column prompt holds (None|nan); accepted: a text"):
            answering.predict(None, pd.DataFrame({"prompt": ["def area", empty]}))


@pytest.mark.parametrize(
    ("prompt", "new", "kept"),
    [("x" * 10, 128, 10), ("x" * 10, 9999, 10), ("x" * 500, 9999, 64), ("x" * 500, 28, 100), ("", 9999, 1)],
)
def test_a_served_prompt_is_cut_where_it_is_too_long_itself(
    prompt: str, new: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []

    def stream(model: Any, known: Any, ids: list[int], sampling: Sampling) -> list[str]:
        read.append(ids)
        return []

    monkeypatch.setattr(generate, "stream", stream)
    answering = serving_model.TextModel()
    answering.generate, answering.longest, answering.decoder, answering.free = generate, 128, None, Lock()
    answering.cells, answering.tokenizer = serving_cells, (known := tokenizer())
    answering.predict(None, pd.DataFrame({"prompt": [prompt]}), {"max_new_tokens": new})
    whole = known(prompt)["input_ids"] or [known.eos_token_id]
    assert read == [whole[-kept:]] and len(read[0]) == kept
