"""A tokenizer comes out of a GGUF file as it went in, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from data_folder import write_corpus
from gguf_files import directory, field, same_tokenizer
from models import TEXTS, model, tokenizer

from pipelines import tokenizer as tokenizer_stage
from pipelines.core import gguf_export, gguf_vocabulary, language_models
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError
from pipelines.core.params.tokenizer import TokenizerParams


def test_the_tokenizer_survives(tmp_path: Path, context: StageContext) -> None:
    """One trained by the stage: ids, ranks, special tokens, template, and the splitting of odd strings."""
    from transformers import AutoTokenizer

    data, place = write_corpus(tmp_path / "data", TEXTS), tmp_path / "m"
    place.mkdir()
    tokenizer_stage.run(TokenizerParams(base=None, vocab_size=400), {"data": data}, place, context)
    ours = AutoTokenizer.from_pretrained(place)
    model(ours).save_pretrained(place)
    file = tmp_path / "m.gguf"
    assert gguf_export.export(place, file, "f16").pre == "gpt-2"
    same_tokenizer(ours, language_models.load_tokenizer(str(file)), file)


def test_digits_that_stand_alone_come_back(tmp_path: Path) -> None:
    """The splitting rule of SmolLM2: without it the spaces before a number are another token."""
    from tokenizers import pre_tokenizers

    place = directory(tmp_path / "m")
    ours = language_models.load_tokenizer(str(place))
    ours.chat_template = tokenizer_stage.CHAT_TEMPLATE
    backend = ours.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), backend.pre_tokenizer])
    ours.save_pretrained(place)
    file = tmp_path / "m.gguf"
    assert gguf_export.export(place, file, "f16").pre == "smollm"
    same_tokenizer(ours, language_models.load_tokenizer(str(file)), file)
    words = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a   12")]
    theirs = language_models.load_tokenizer(str(file)).backend_tokenizer
    assert [piece for piece, _ in theirs.pre_tokenizer.pre_tokenize_str("a   12")] == words == ["a", "ĠĠĠ", "1", "2"]


def _rule(*steps: dict[str, Any], **changes: Any) -> dict[str, Any]:
    wrapped = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}
    return {"model": {"type": "BPE", "ignore_merges": False} | changes, "pre_tokenizer": wrapped, "normalizer": None}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def _split(pattern: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return (
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        BYTES | {"use_regex": False},
    )


def test_names_of_splitting_rules() -> None:
    """The patterns of the published tokenizers, and rules that have no name."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert gguf_vocabulary.splitting_rule(_rule(BYTES)) == "gpt-2"
    assert gguf_vocabulary.splitting_rule(_rule(DIGITS, BYTES)) == "smollm"
    assert gguf_vocabulary.splitting_rule(_rule(*_split(PRETOKENIZE_REGEX))) == "qwen2"
    llama3 = _split(gguf_vocabulary.LLAMA3)
    assert gguf_vocabulary.splitting_rule(_rule(*llama3, ignore_merges=True)) == "llama-bpe"
    refused = [
        (_rule(*llama3), "ignore_merges is False"),
        (_rule(BYTES, ignore_merges=True), "ignore_merges is True"),
        (_rule(BYTES | {"add_prefix_space": True}), "no name"),
        (_rule(DIGITS | {"individual_digits": False}, BYTES), "no name"),
        (_rule(*_split(r"\w+")), "no name"),
        (_rule(BYTES, type="Unigram"), "byte-level BPE"),
        (_rule(BYTES, byte_fallback=True), "byte-level BPE"),
        (_rule(BYTES) | {"normalizer": {"type": "Lowercase"}}, "normalizes text"),
    ]
    for told, message in refused:
        with pytest.raises(ArtifactError, match=message):
            gguf_vocabulary.splitting_rule(told)


def test_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    place = directory(tmp_path / "m")
    known = tokenizer()
    known.add_tokens(["<more>"])
    known.save_pretrained(place)
    with pytest.raises(ArtifactError, match="1 tokens of the tokenizer have no row .* 300 rows, for example '<more>'"):
        gguf_export.export(place, tmp_path / "m.gguf", "f16")


def test_a_special_token_that_nothing_writes_is_left_out(tmp_path: Path) -> None:
    place = directory(tmp_path / "m")
    known = tokenizer()
    known.add_tokens(["<image>"], special_tokens=True)
    known.save_pretrained(place)
    gguf_export.export(place, tmp_path / "m.gguf", "f16")
    assert len(field(tmp_path / "m.gguf", "tokenizer.ggml.tokens")) == 300


def test_rows_without_a_token_are_named(tmp_path: Path) -> None:
    gguf_export.export(directory(tmp_path / "m", more_rows=2), tmp_path / "m.gguf", "q8_0")
    assert field(tmp_path / "m.gguf", "tokenizer.ggml.tokens")[299:][1:] == ["[PAD300]", "[PAD301]"]
    types = field(tmp_path / "m.gguf", "tokenizer.ggml.token_type")
    assert types == 4 * [gguf.TokenType.CONTROL] + 296 * [gguf.TokenType.NORMAL] + 2 * [gguf.TokenType.UNUSED]


def test_what_is_put_around_a_text() -> None:
    """BOS before and EOS after can be said, another token and swallowed spaces cannot."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    def wrapped(single: str) -> Any:
        known = tokenizer()
        known.bos_token = "<|endoftext|>"
        ids = [(token, known.convert_tokens_to_ids(token)) for token in tokenizer_stage.SPECIAL]
        known.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
        return known

    cases = {"$A": (False, False), "<|endoftext|> $A": (True, False), "<|endoftext|> $A <|im_end|>": (True, True)}
    for single, expected in cases.items():
        found = gguf_vocabulary.read(wrapped(single), 300)
        assert (found.add_bos, found.add_eos) == expected
    with pytest.raises(ArtifactError, match="wraps a text as .*<|pad|>"):
        gguf_vocabulary.read(wrapped("<|pad|> $A"), 300)
    known = tokenizer()
    known.add_tokens([AddedToken("<mask>", lstrip=True)])
    with pytest.raises(ArtifactError, match="'<mask>' .id 300. swallows spaces"):
        gguf_vocabulary.read(known, 301)
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(ArtifactError, match="no EOS; without one llama.cpp ends a text at token 11"):
        gguf_vocabulary.read(endless, 300)


def test_several_chat_templates(tmp_path: Path) -> None:
    place = directory(tmp_path / "m")
    known = tokenizer()
    known.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    known.save_pretrained(place)
    gguf_export.export(place, tmp_path / "m.gguf", "f16")
    assert field(tmp_path / "m.gguf", "tokenizer.chat_template") == "{{ messages }}"
    assert field(tmp_path / "m.gguf", "tokenizer.chat_template.tool_use") == "{{ tools }}"
