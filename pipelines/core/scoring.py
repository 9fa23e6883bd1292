"""Bits that a language model, or a classical compressor, needs for held-out texts.

Bits per byte compares models with different tokenizers: the examples are the same bytes for all of them
(Gao et al., "The Pile", 2020, section 3.1).
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.core import context_window, packing
from pipelines.core.language_models import body_and_head

if TYPE_CHECKING:
    import torch

WINDOW = 1024  # longest context a text is scored in, in tokens
UNSCORED = -100  # a label that is context only: `losses.IGNORE`, without its import of torch
PRIMER_BYTES = 128 * 1024  # training text the compressor has read before it meets a held-out text
BATCH_TOKENS = 2048


def model_bits(
    model: Any, tokenizer: Any, texts: list[str], precision: str, tell: Callable[[int, int], None]
) -> list[float]:
    """Bits of each text under a causal model, from the document separator on.

    A text longer than the context is scored in windows that overlap by half, each token once, with at least
    half a window before it. Texts are padded on the right to the longest of their batch, which a causal model
    cannot see. `tell(done, total)` is called after each batch, in pieces of text.
    """
    import torch

    found = batches(model.config, tokenizer, texts)
    total = sum(map(len, found))
    bits = [0.0] * len(texts)
    with torch.inference_mode():
        done = 0
        for batch in found:
            for piece, value in zip(batch, _score(model, batch, precision), strict=True):
                bits[piece.text] += value
            done += len(batch)
            tell(done, total)
    return bits


class Piece(NamedTuple):
    """A window of a text."""

    text: int  # its number
    ids: list[int]
    labels: list[int]  # the next token, or UNSCORED where the window before has scored it


def batches(config: Any, tokenizer: Any, texts: list[str]) -> list[list[Piece]]:
    """The windows of all texts that fit a model's context, the longest first, in batches of `BATCH_TOKENS`."""
    window = min(WINDOW, context_window.length(config) or WINDOW)
    separator = packing.separator_id(tokenizer)
    pieces: list[Piece] = []
    for number, ids in enumerate(packing.encode(tokenizer, texts)):
        pieces += [Piece(number, *piece) for piece in _windows([separator, *ids], window)]
    return _batches(sorted(pieces, key=lambda piece: (-len(piece.ids), piece.text)))


def classical_bits(texts: list[str], primer: str) -> list[float]:
    """Bits that LZMA needs for each text once it has read `primer`: what a compressor makes of the same data.

    The difference of two compressed lengths, so whole bytes; `primer` is cut to its last `PRIMER_BYTES`.
    """
    known = primer.encode()[-PRIMER_BYTES:]
    base = _lzma_bytes(known)
    return [8.0 * (_lzma_bytes(known + text.encode()) - base) for text in texts]


def _lzma_bytes(data: bytes) -> int:
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA1, "preset": 9}]))


def _windows(ids: list[int], window: int) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of overlapping windows; every token but the first is a label exactly once."""
    stride = max(1, window // 2)
    pieces = []
    done = 1  # tokens [1, done) are scored
    start = 0
    while done < len(ids):
        end = min(start + window, len(ids) - 1)
        labels = [UNSCORED] * (done - 1 - start) + ids[done : end + 1]
        pieces.append((ids[start:end], labels))
        done = end + 1
        start = max(0, done - 1 - (window - stride))
    return pieces


def _batches(pieces: list[Piece]) -> list[list[Piece]]:
    """Consecutive pieces, sorted by length, of at most `BATCH_TOKENS` padded tokens."""
    found: list[list[Piece]] = []
    for piece in pieces:
        if found and (len(found[-1]) + 1) * len(found[-1][0].ids) <= BATCH_TOKENS:
            found[-1].append(piece)
        else:
            found.append([piece])
    return found


def _score(model: Any, batch: list[Piece], precision: str) -> list[float]:
    """Bits of the labels of each piece."""
    from pipelines.core import losses

    hidden, labels = hidden_states(model, batch, precision)
    _, head = body_and_head(model.get_base_model() if hasattr(model, "get_base_model") else model)
    scores = losses.label_log_probabilities(hidden.flatten(0, 1), head, labels.flatten())
    return [float(value) / -math.log(2) for value in scores.view_as(labels).double().sum(dim=1)]


def hidden_states(model: Any, batch: list[Piece], precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head reads, (pieces, longest, width), and the labels, (pieces, longest), `losses.IGNORE` on padding."""
    import torch

    from pipelines.core import losses, training

    longest = len(batch[0].ids)
    device = model.device
    ids = torch.zeros(len(batch), longest, dtype=torch.long, device=device)
    labels = torch.full((len(batch), longest), losses.IGNORE, device=device)
    for row, piece in enumerate(batch):
        ids[row, : len(piece.ids)] = torch.tensor(piece.ids)
        labels[row, : len(piece.labels)] = torch.tensor(piece.labels)
    body = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
    documents = torch.zeros_like(ids)
    positions = torch.arange(longest, device=device).expand_as(ids)
    mask_type = torch.bfloat16 if precision == "bf16" else torch.float32
    mask = packing.attention_mask(documents, mask_type)
    with training.computing_in(precision, device.type, model):
        states = body(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    return states.last_hidden_state.to(mask_type), labels
