"""Models and texts for the tests of GGUF files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import torch
from models import tokenizer

from pipelines import tokenizer as tokenizer_stage

SHAPE = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.1,
}  # fmt: skip


def directory(place: Path, architecture: str = "llama", more_rows: int = 0, **config: Any) -> Path:
    """A random model and its tokenizer, saved. Norms and biases are no ones and zeros, so that a lost one shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = tokenizer()
    ids = {f"{kind}_token_id": getattr(known, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = {**SHAPE, **ids, "vocab_size": len(known) + more_rows, **config}
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **config))
    for weight in lm.parameters():
        if weight.ndim == 1:
            weight.data += 0.2 * torch.randn_like(weight)
    lm.save_pretrained(place)
    known.save_pretrained(place)
    return place


def odd_strings(count: int = 200) -> list[str]:
    """Text to trip a tokenizer: scripts, emoji, spaces of all kinds, controls, special tokens spelled out."""
    draw = random.Random(0)
    pieces = [
        *tokenizer_stage.PROBES, *tokenizer_stage.SPECIAL, " ", "  ", "   ", "\n", "\r\n", "\t", "\u00a0", "\u3000",
        "\u200b", "\ufeff", "'s", "'LL", "don't", "I'Ve", "3", "33 333", "1,000.50", "x=1;", "!!", "...", "ﬁ", "Ⅷ", "½",
        "e\u0301", "\U0001f999", "\x1f", "def f(a):", "snake_case", "CamelCase", "ßẞ", "İ", "١٢٣", "[PAD3]", "Ġ", "Ċ",
    ]  # fmt: skip
    return ["", *("".join(draw.choices(pieces, k=draw.randint(1, 8))) for _ in range(count - 1))]


def field(file: Path, key: str) -> Any:
    return gguf.GGUFReader(file).fields[key].contents()


def same_tokenizer(ours: Any, theirs: Any, file: Path) -> None:
    assert theirs.get_vocab() == ours.get_vocab()
    told = json.loads(ours.backend_tokenizer.to_str())["model"]
    assert json.loads(theirs.backend_tokenizer.to_str())["model"]["merges"] == told["merges"]
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template"):
        assert getattr(theirs, name) == getattr(ours, name)
    special = {index for index, token in ours.added_tokens_decoder.items() if token.special}
    types = field(file, "tokenizer.ggml.token_type")
    assert {index for index, kind in enumerate(types) if kind == gguf.TokenType.CONTROL} == special
    chat = [{"role": "user", "content": "안녕 🙂"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == ours.apply_chat_template(chat, tokenize=False)
    strings = odd_strings()
    assert theirs(strings)["input_ids"] == ours(strings)["input_ids"]
