"""A model and a tokenizer small enough for any test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from pipelines.core import language_models, tuning
from pipelines.core.context import StageContext
from pipelines.core.params.tokenizer import TokenizerParams
from pipelines.core.params.tuning import Tuning
from pipelines.tokenizer import _train

LORA = Tuning(method="lora", lora_rank=4)

TEXTS = [f'def area_{n}(w, h):\n    """Return the area of shape {n}."""\n    return w * h * {n}\n' for n in range(60)]
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def tokenizer(vocab_size: int = 300) -> Any:
    return _train(TokenizerParams(base=None, vocab_size=vocab_size), iter(TEXTS))


def model(known: Any, architecture: str = "llama", depth: int = 2, length: int = 64, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    return language_models.random_weights(architecture, depth, known, length, torch.float32, attention).eval()


def windowed(place: Path, target: Path, window: int) -> Path:
    """A copy of a model directory that says that its attention reaches `window` tokens back, as Mistral's does."""
    shutil.copytree(place, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"sliding_window": window}))
    return target


def prepared(lm: Any, params: Tuning = LORA, head: str | None = None, root: Path = Path()) -> Any:
    """The model as a stage prepares it for training; the context is used for messages alone."""
    return tuning.prepare(lm, params, StageContext(stage="test", root=root, fingerprint="0" * 64), head=head)
