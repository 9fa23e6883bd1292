"""Dials, cells and data small enough for the tests of stage `prompts`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models import model, tokenizer

from pipelines.core.params.prompts import PromptsParams
from pipelines.core.prompt_cells import Cell
from pipelines.tokenizer import CHAT_TEMPLATE

DEFAULT: dict[str, Any] = {
    "seed": 3, "models": ("sft",), "tasks": (), "strategies": ("zero_shot",), "examples": 2, "pool": 16,
    "eval_examples": 6, "test_examples": 8, "max_prompt_tokens": 480, "too_long": "refuse", "max_new_tokens": 4,
    "votes": 3, "temperature": 1.0, "passages": 2, "search": {}, "samples": 1,
}  # fmt: skip


def params(**changed: Any) -> PromptsParams:
    return PromptsParams(**{**DEFAULT, **changed})


PARAMS = params()


def chat_model(place: Path, length: int) -> Path:
    """A random model that chats, in a directory."""
    known = tokenizer()
    known.chat_template = CHAT_TEMPLATE
    model(known, length=length).save_pretrained(place)
    known.save_pretrained(place)
    return place


def cell(scores: list[float], tokens: int = 10) -> Cell:
    """A cell with these scores, and so many tokens a question."""
    count = len(scores)
    return Cell(scores, [0] * count, ["x"] * count, [tokens - 1] * count, [1] * count, [0] * count, 0, 0, 0, [], [])
