"""K responses to a prompt, in one forward pass: the prompt is encoded once, several prompts share a row.

What a model says of each response depends on the prompt and that response alone, whatever else is in the row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipelines.core import attention, chats, language_models, losses, segments
from pipelines.core.context import StageContext

ROW_TOKENS = 256  # a row is filled up to this at most: attention's work grows with the square of it
WIDTHS = 12  # of rows that are tried, from half of that on: which one leaves least empty depends on the sequences
FEW = 64  # sequences for which they are: many fill rows of any width
ATTENTION = 1200  # tokens of a row from which a token takes twice as long
PASS = 64  # tokens whose time a forward pass takes whatever it reads
SCORED_TOKENS = 4096  # tokens of a forward pass without gradients

Tell = Callable[[int, int], None]


class Responses(NamedTuple):
    """Sequences of one forward pass, and where each of their N responses ends: at its EOS."""

    rows: segments.Rows
    numbers: list[int]  # of the sequences, in the order of their responses below
    sizes: list[int]  # responses of each
    row: torch.Tensor  # (N,) int64
    column: torch.Tensor  # (N,)


def teller(context: StageContext, what: str) -> Tell:
    """Shows how far scoring is, and stops it after a forward pass when a signal has come."""

    def tell(done: int, total: int) -> None:
        context.progress(done, total, scoring=what)
        context.stop_if_asked()

    return tell


def encode(tokenizer: Any, messages: Sequence[Mapping[str, str]], responses: Sequence[str]) -> segments.Sequence:
    """A prompt and its responses, each with EOS."""
    prompt = chats.encode_prompt(tokenizer, messages)
    return segments.of_completions(prompt, [chats.encode_response(tokenizer, one) for one in responses])


def longest(sequence: segments.Sequence) -> int:
    """Tokens of the prompt with its longest response: what the context must hold."""
    return max(segments.positions(sequence)) + 1


def kind(device: str, sequences: Sequence[segments.Sequence]) -> str:
    """The attention implementation for rows of these sequences."""
    return attention.choose(device, max(ROW_TOKENS, *(len(one.ids) for one in sequences)))


def batches(sequences: Sequence[segments.Sequence], tokens: int, pad: int) -> list[Responses]:
    """The sequences in forward passes of at most `tokens` tokens, padding included; a longer one stands alone.

    What they all begin with opens each row, once.
    """
    if not sequences:
        return []
    shared = segments.shared_prefix(sequences) if len(sequences) > 1 else 0
    lengths = [len(one.ids) - shared for one in sequences]
    widest = max(1, min(ROW_TOKENS, tokens) - shared)
    narrowest = max(1, widest // 2)
    step = max(1, (widest - narrowest) // (WIDTHS if len(lengths) <= FEW else 1))
    ways = (passes(lengths, width, shared, tokens) for width in range(widest, narrowest - 1, -step))
    return [of_bins(sequences, bins, pad, shared) for bins in min(ways, key=partial(_work, lengths, shared))]


def passes(lengths: Sequence[int], width: int, shared: int, tokens: int) -> list[list[list[int]]]:
    """Which sequences share a row of at most `shared + width` tokens, and which rows a forward pass of `tokens`.

    `lengths`: tokens of each behind the `shared` ones that all begin with. What is longer stands alone.
    """
    found: list[list[list[int]]] = []
    for row in sorted(segments.bins(lengths, width), key=lambda one: -sum(lengths[number] for number in one)):
        if found and (len(found[-1]) + 1) * _filled(found[-1][0], lengths, shared) <= tokens:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def _filled(row: Sequence[int], lengths: Sequence[int], shared: int) -> int:
    """Tokens of a row; the first row of a forward pass is its longest."""
    return shared + sum(lengths[number] for number in row)


def _work(lengths: Sequence[int], shared: int, passes: Sequence[Sequence[Sequence[int]]]) -> float:
    """What forward passes cost, about, in tokens of short rows."""
    sizes = [(len(rows), _filled(rows[0], lengths, shared)) for rows in passes]
    return sum(PASS + rows * length * (1 + length / ATTENTION) for rows, length in sizes)


def by_sequence(values: torch.Tensor, batch: Responses) -> list[list[float]]:
    """Values of the responses (N,), as numbers, sequence by sequence."""
    flat: list[float] = values.detach().double().cpu().tolist()
    ends = list(itertools.accumulate(batch.sizes))
    return [flat[end - size : end] for end, size in zip(ends, batch.sizes, strict=True)]


def over_all(
    sequences: Sequence[segments.Sequence], pad: int, tell: Tell, values: Callable[[Responses], torch.Tensor]
) -> list[list[float]]:
    """`values`, one for each response of a forward pass (N,), over all sequences and in their order.

    Equal sequences, such as one task that several labelers ranked, are computed once. `tell(done, total)` is called
    after each pass, in different sequences.
    """
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    first = [known.setdefault((tuple(one.ids), tuple(one.branches)), number) for number, one in enumerate(sequences)]
    asked = sorted(set(first))
    found: dict[int, list[float]] = {}
    with torch.inference_mode():
        for batch in batches([sequences[number] for number in asked], SCORED_TOKENS, pad):
            for place, part in zip(batch.numbers, by_sequence(values(batch), batch), strict=True):
                found[asked[place]] = part
            tell(len(found), len(asked))
    return [list(found[number]) for number in first]


def per_response(values: torch.Tensor, batch: Responses) -> torch.Tensor:
    """Sums over each response's tokens, (N,), of values of the response tokens of a forward pass, (tokens,)."""
    said = batch.rows.labels != losses.IGNORE
    # Tokens come row by row, and in a row response by response, as the ends do: each belongs to the next end.
    ends = batch.row * said.shape[1] + batch.column
    owner = torch.searchsorted(ends, said.flatten().nonzero()[:, 0])
    return values.new_zeros(len(ends)).index_add(0, owner.to(values.device), values)


def token_log_probabilities(model: Any, batch: Responses, context: StageContext) -> torch.Tensor:
    """What a causal model thinks of the response tokens of a forward pass: (tokens,) fp32, in nats; no gradient."""
    _, head = language_models.body_and_head(model.get_base_model() if hasattr(model, "get_base_model") else model)
    labels = batch.rows.labels.to(context.device)
    said = labels != losses.IGNORE
    hidden = segments.hidden_states(model, batch.rows, context)
    return losses.label_log_probabilities(hidden[said], head, labels[said])


def log_probabilities(
    model: Any, sequences: Sequence[segments.Sequence], pad: int, context: StageContext, tell: Tell
) -> list[list[float]]:
    """What a causal model thinks of each response: the sum of its tokens' log-probabilities, in nats. EOS counts."""

    def values(batch: Responses) -> torch.Tensor:
        return per_response(token_log_probabilities(model, batch, context), batch)

    return over_all(sequences, pad, tell, values)


def mean_log_probabilities(
    place: Path, sequences: Sequence[segments.Sequence], pad: int, context: StageContext, tell: Tell
) -> list[list[float]]:
    """As `log_probabilities`, of a model's directory, and the mean over a response's tokens."""
    model = language_models.load(str(place), context.dtype, kind(context.device, sequences)).to(context.device).eval()
    return mean_log_probabilities_of(model, sequences, pad, context, tell)


def mean_log_probabilities_of(
    model: Any, sequences: Sequence[segments.Sequence], pad: int, context: StageContext, tell: Tell
) -> list[list[float]]:
    """What a causal model thinks of each response: the mean over its tokens, in nats.

    The mean, since the sum falls with every token and would only prefer the shorter one.
    """

    def values(batch: Responses) -> torch.Tensor:
        each = token_log_probabilities(model, batch, context)
        return per_response(each, batch) / per_response(torch.ones_like(each), batch)

    return over_all(sequences, pad, tell, values)


def of_bins(
    sequences: Sequence[segments.Sequence], bins: Sequence[Sequence[int]], pad: int, shared: int = 0
) -> Responses:
    """One forward pass of these bins, one row each, after the first `shared` tokens of all."""
    numbers, sizes, rows, columns = [], [], [], []
    for row, one in enumerate(bins):
        start = 0
        for number in one:
            branches = sequences[number].branches
            last = {branch: place for place, branch in enumerate(branches) if branch}
            numbers.append(number)
            sizes.append(len(last))
            rows += [row] * len(last)
            columns += [start + last[branch] for branch in sorted(last)]
            start += len(branches) - shared
    return Responses(
        segments.rows(sequences, bins, pad, shared), numbers, sizes, torch.tensor(rows), torch.tensor(columns)
    )
