"""A model and a tokenizer small enough for any test."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.core import language_models
from pipelines.core.params.tokenizer import TokenizerParams
from pipelines.tokenizer import _train

TEXTS = [f'def area_{n}(w, h):\n    """Return the area of shape {n}."""\n    return w * h * {n}\n' for n in range(60)]


def tokenizer(vocab_size: int = 300) -> Any:
    return _train(TokenizerParams(base=None, vocab_size=vocab_size), iter(TEXTS))


def model(known: Any, architecture: str = "llama", depth: int = 2, length: int = 64, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    return language_models.random_weights(architecture, depth, known, length, torch.float32, attention).eval()
