"""What a compressed model has lost: it and the original say the same held-out texts, token by token.

* bits of each text, and so what it loses in bits per byte;
* KL(original || variant) of the next token, in nats, and the share of places where both find the same token likeliest;
* of each layer that was made smaller: how far its outputs are from the original's, on the same inputs.

The original's hidden states are kept (width x 2 bytes a token), its logits are formed again chunk by chunk: those of
all tokens would take vocabulary x 4 bytes each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from pipelines.core import int8, losses, scoring
from pipelines.core.language_models import body_and_head

CHUNK = 64  # tokens whose logits of both models exist at one time: at V = 49152, 25 MB; more is slower


class Reference(NamedTuple):
    """The original, on held-out texts."""

    batches: list[list[scoring.Piece]]
    hidden: list[torch.Tensor]  # of each batch, (pieces, longest, width)
    labels: list[torch.Tensor]  # (pieces, longest)
    head: torch.Tensor  # (vocabulary, width)
    texts: int


class Lost(NamedTuple):
    """A variant beside the original."""

    bits: list[float]  # of each text
    kl: float  # nats a token
    agreement: float  # share of places with the same likeliest token


@torch.inference_mode()
def reference(model: Any, tokenizer: Any, texts: list[str]) -> Reference:
    """What the original says of the texts, computed in its own type."""
    precision = _precision(model)
    found = scoring.batches(model.config, tokenizer, texts)
    hidden, labels = zip(*(scoring.hidden_states(model, batch, precision) for batch in found), strict=True)
    return Reference(found, list(hidden), list(labels), body_and_head(model)[1].detach(), len(texts))


@torch.inference_mode()
def own_bits(original: Reference) -> list[float]:
    """Bits of each text for the original itself."""
    bits = [0.0] * original.texts
    for batch, hidden, labels in zip(original.batches, original.hidden, original.labels, strict=True):
        rows, tokens, numbers = _scored(batch, hidden, labels)
        for part in _chunks(len(rows)):
            _add_bits(bits, _log_softmax(rows[part] @ original.head.t()), tokens[part], numbers[part])
    return bits


@torch.inference_mode()
def compare(original: Reference, model: Any) -> Lost:
    """A variant, dense or with packed layers, beside the original; computed in its own type."""
    precision = _precision(model)
    bits = [0.0] * original.texts
    divergence, same, count = 0.0, 0, 0
    head = model.get_output_embeddings()
    for batch, theirs in zip(original.batches, original.hidden, strict=True):
        hidden, labels = scoring.hidden_states(model, batch, precision)
        rows, tokens, numbers = _scored(batch, hidden, labels)
        wanted = theirs[labels != losses.IGNORE]
        for part in _chunks(len(rows)):
            ours = _log_softmax(head(rows[part].to(model.dtype)))
            exact = _log_softmax(wanted[part] @ original.head.t())
            divergence += float((exact.exp() * (exact - ours)).sum())
            same += int((exact.argmax(1) == ours.argmax(1)).sum())
            count += len(ours)
            _add_bits(bits, ours, tokens[part], numbers[part])
    return Lost(bits, divergence / count, same / count)


def _scored(
    batch: list[scoring.Piece], hidden: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the places of a batch that are scored: states, tokens to be said, and numbers of the texts."""
    kept = labels != losses.IGNORE
    numbers = torch.tensor([piece.text for piece in batch])[:, None].expand_as(labels)
    return hidden[kept], labels[kept], numbers[kept]


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, count, CHUNK))


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), dim=1)


def _add_bits(bits: list[float], said: torch.Tensor, tokens: torch.Tensor, numbers: torch.Tensor) -> None:
    """Add what each token costs, by log probabilities (tokens, vocabulary), to its text's bits."""
    costs = said.gather(1, tokens[:, None])[:, 0].double() / -math.log(2)
    for number, value in zip(numbers.tolist(), costs.tolist(), strict=True):
        bits[number] += value


@torch.inference_mode()
def layer_errors(
    model: Any, variant: Any, rows: Sequence[list[int]], weight_of: Callable[[Any], torch.Tensor | None]
) -> dict[str, float]:
    """Of each layer whose weight has changed: ||x W^T - x W'^T|| / ||x W^T|| over the rows' tokens, in fp32.

    Args:
        model: the original, dense; x are its own inputs of the layer.
        variant: the same architecture with other layers in the place of linear ones.
        rows: token ids.
        weight_of: the weight (out, in) that a layer stands for; None for what is no linear layer.
    """
    others = dict(variant.named_modules())
    sums: dict[str, list[float]] = {}

    def look(name: str, wrong: torch.Tensor, weight: torch.Tensor) -> Any:
        def hook(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            inputs = given[0].flatten(0, -2).float()
            error, size = (float((inputs @ part.t()).square().sum()) for part in (wrong, weight))
            of_layer = sums.setdefault(name, [0.0, 0.0])
            of_layer[0] += error
            of_layer[1] += size

        return hook

    hooks = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | Conv1D) or name not in others:
            continue
        theirs, weight = weight_of(others[name]), int8.rows_of(module).float()
        if theirs is not None and not torch.equal(theirs.float(), weight):
            hooks.append((module, look(name, theirs.float() - weight, weight)))
    with _hooks(hooks):
        for ids in rows:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    return {name: math.sqrt(error / size) if size else 0.0 for name, (error, size) in sums.items()}


def _precision(model: Any) -> str:
    return "bf16" if model.dtype is torch.bfloat16 else "fp32"


@contextmanager
def _hooks(wanted: list[tuple[Any, Any]]) -> Iterator[None]:
    placed = [module.register_forward_pre_hook(hook) for module, hook in wanted]
    try:
        yield
    finally:
        for hook in placed:
            hook.remove()
