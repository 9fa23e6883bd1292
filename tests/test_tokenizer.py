"""The tokenizer gives every text back, stops nowhere by padding, and loads as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from data_folder import write_corpus
from models import TEXTS, model, tokenizer

from pipelines import tokenizer as stage
from pipelines.core import artifacts, chats, language_models, packing
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError
from pipelines.core.params.tokenizer import TokenizerParams


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "data", TEXTS)


def run(data: Path, place: Path, context: StageContext, base: str | None = None) -> dict[str, float]:
    place.mkdir(exist_ok=True)
    return stage.run(TokenizerParams(base=base, vocab_size=400), {"data": data}, place, context)


def loaded(place: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place)


def test_trained(data: Path, tmp_path: Path, context: StageContext) -> None:
    metrics = run(data, tmp_path / "a", context)
    assert set(metrics) == stage.METRICS and metrics["round_trip"] == 1.0 and metrics["bytes_per_token"] > 1.5
    known = loaded(tmp_path / "a")
    assert len(known) <= 400
    assert known.pad_token == "<|pad|>" and known.pad_token_id != known.eos_token_id
    chat = [{"role": "user", "content": "안녕 🙂"}, {"role": "assistant", "content": "hi"}]
    text = known.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\n안녕 🙂<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n"
    assert known(text)["input_ids"].count(known.eos_token_id) == 2
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "evaluation.parquet",
    }  # fmt: skip


def test_same_bytes_twice(data: Path, tmp_path: Path, context: StageContext) -> None:
    for name in "ab":
        run(data, tmp_path / name, context)
    assert artifacts.content_hash(tmp_path / "a") == artifacts.content_hash(tmp_path / "b")


def test_all_of_a_large_corpus_is_learned_from_and_measured(
    tmp_path: Path, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its beginning, such as the first of two languages, was all that the tokenizer and its figures knew."""
    korean = [f"{n}번째 글은 여러 나라의 말로 쓴 긴 문장입니다.\n" * 3 for n in range(60)]
    mixed = [*TEXTS[:48], *korean[:48], *TEXTS[48:], *korean[48:]]
    data = write_corpus(tmp_path / "data", mixed, held_out=24)
    monkeypatch.setattr(stage, "TRAIN_BYTES", sum(len(text.encode()) for text in TEXTS[:48]))
    monkeypatch.setattr(stage, "HELD_OUT_BYTES", 2048)
    run(data, tmp_path / "a", context)
    rows = pq.read_table(tmp_path / "a/evaluation.parquet").to_pandas()
    later = rows[rows["id"].isin([f"test-{n}" for n in range(12, 24)])]
    assert 0 < len(later) < len(rows) < 24
    assert (later["bytes"] / later["tokens"]).min() > 4, "Korean is not spelled byte by byte"


def test_a_base_models_own(data: Path, tmp_path: Path, context: StageContext) -> None:
    """Its padding was EOS: a spare special token takes over, and the vocabulary does not grow."""
    base = tokenizer()
    base.add_special_tokens({"additional_special_tokens": ["<spare>"]})
    base.pad_token = base.eos_token
    base.save_pretrained(tmp_path / "base")
    model(base).save_pretrained(tmp_path / "base")
    run(data, tmp_path / "a", context, str(tmp_path / "base"))
    known = loaded(tmp_path / "a")
    assert known.pad_token not in (known.eos_token, None) and len(known) == len(base)


def test_a_base_without_a_chat_template_gets_one_that_ends_a_turn_with_its_own_eos(
    data: Path, tmp_path: Path, context: StageContext
) -> None:
    """As GPT-2's: one special token, which is everything."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    ).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gpt2"}')
    metrics = run(data, tmp_path / "a", context, str(tmp_path / "base"))
    known = loaded(tmp_path / "a")
    assert metrics["vocabulary"] == len(known) == 301 and known.pad_token == "<|pad|>"
    chats.check_tokenizer(known)
    chat = chats.encode(known, chats.PROBE)
    assert chat.ids[-1] == known.eos_token_id and chat.supervised[-1]


def test_a_template_that_does_not_end_turns_with_eos_is_told_before_pretraining(
    data: Path, tmp_path: Path, context: StageContext
) -> None:
    """As that of Qwen's base models: refused where `sft` would refuse it, told where there is nothing to chat about."""
    base = tokenizer()
    base.chat_template, base.eos_token = stage.CHAT_TEMPLATE.replace("eos_token", "'<|im_end|>'"), "<|endoftext|>"
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    run(data, tmp_path / "a", context, str(tmp_path / "base"))
    assert any(
        line.startswith("warning: stage sft would refuse tokenizer.base") and "<|endoftext|>" in line
        for line in context.samples
    )
    (data / "demonstrations").mkdir()
    told = r"tokenizer.base \S+/base: the chat template does not end an answer with EOS .* copy .*: tokenizer.base and"
    with pytest.raises(ArtifactError, match=told):
        run(data, tmp_path / "b", context, str(tmp_path / "base"))


def test_a_template_that_tells_the_date_tells_always_the_same(
    data: Path, tmp_path: Path, context: StageContext
) -> None:
    """As those of Llama 3 and SmolLM3: a stage has no clock, and a run that goes on tomorrow must go on the same."""
    base = tokenizer()
    llama = "{% if not date_string is defined %}{% if strftime_now is defined %}"
    llama += "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}{{ date_string }}\n"
    for number, opening in enumerate((llama, "{%- set today = strftime_now('%d %B %Y') -%}{{ today }}\n")):
        base.chat_template = opening + stage.CHAT_TEMPLATE
        base.save_pretrained(tmp_path / "base")
        (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
        run(data, tmp_path / str(number), context, str(tmp_path / "base"))
        known = loaded(tmp_path / str(number))
        assert known.apply_chat_template(chats.PROBE, tokenize=False).startswith("26 Jul 2024\n<|im_start|>user\nOne?")
        chats.check_tokenizer(known)
        once = stage._without_a_clock(known.chat_template)
        assert once == known.chat_template, "a base that is ours already"
    named = stage._without_a_clock({"default": "{{ strftime_now('%d') }}", "tool_use": "-"})
    assert named["default"].startswith(stage.FIXED_DATE) and named["tool_use"] == "-"


@pytest.mark.parametrize(
    ("kind", "files", "told"),
    [
        ("LlamaTokenizer", {"tokenizer.model": "\n\x05abcde"}, "tiktoken"),
        (
            "PreTrainedTokenizerFast",
            {"tokenizer.json": '{"version": "1.0", "model": {"type": "Strange"}}'},
            "added_tokens",
        ),
        ("BioGptTokenizer", {"vocab.json": '{"<unk>": 0}', "merges.txt": "#version: 0.2\n"}, "sacremoses"),
        ("CTRLTokenizer", {"vocab.json": '{"<unk>": 0}', "merges.txt": "#version: 0.2\n"}, "tokenizer.json is needed"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_told(tmp_path: Path, kind: str, files: dict[str, str], told: str) -> None:
    for name, text in {**files, "tokenizer_config.json": f'{{"tokenizer_class": "{kind}"}}'}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ArtifactError, match=rf"base {tmp_path}: .*{told}"):
        language_models.load_tokenizer(str(tmp_path))


def test_one_that_composes_characters_is_no_loss(data: Path, tmp_path: Path, context: StageContext) -> None:
    """As those of Qwen: e and a combining acute come back as one character, which to Unicode is the same text."""
    from tokenizers import normalizers

    base = tokenizer()
    base.backend_tokenizer.normalizer = normalizers.NFC()
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    assert run(data, tmp_path / "a", context, str(tmp_path / "base"))["round_trip"] == 1.0


def test_one_that_loses_text_is_refused(data: Path, tmp_path: Path, context: StageContext) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[UNK]").save_pretrained(
        tmp_path / "b"
    )
    (tmp_path / "b" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ArtifactError, match="loses text"):
        run(data, tmp_path / "a", context, str(tmp_path / "b"))


def test_the_packaged_base_model(data: Path, tmp_path: Path, context: StageContext) -> None:
    metrics = run(data, tmp_path / "a", context, "smollm2-135m")
    known = loaded(tmp_path / "a")
    assert metrics["vocabulary"] == 49152 == len(known)
    assert known.pad_token_id != known.eos_token_id
    assert known.convert_ids_to_tokens(packing.separator_id(known)) == "<|endoftext|>"
    assert "<|im_start|>" in known.chat_template
