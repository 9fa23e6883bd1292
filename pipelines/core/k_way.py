"""K responses to a prompt, in one forward pass: the prompt is encoded once, several prompts share a row.

What a model says of each response depends on the prompt and that response alone, whatever else is in the row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipelines.core import attention, chats, language_models, losses, segments
from pipelines.core.context import StageContext

ROW_TOKENS = 512  # rows are filled up to this: attention grows with the square of a row
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
    """The sequences in forward passes of at most `tokens` tokens, padding included; a longer one stands alone."""
    lengths = [len(one.ids) for one in sequences]
    bins = segments.bins(lengths, min(ROW_TOKENS, tokens))
    filled = [sum(lengths[number] for number in one) for one in bins]
    passes: list[list[list[int]]] = []
    for place in sorted(range(len(bins)), key=lambda place: (-filled[place], place)):
        if passes and (len(passes[-1]) + 1) * sum(lengths[number] for number in passes[-1][0]) <= tokens:
            passes[-1].append(bins[place])
        else:
            passes.append([bins[place]])
    return [_responses(sequences, one, pad) for one in passes]


def by_sequence(values: torch.Tensor, batch: Responses) -> list[list[float]]:
    """Values of the responses (N,), as numbers, sequence by sequence."""
    flat: list[float] = values.detach().double().cpu().tolist()
    ends = list(itertools.accumulate(batch.sizes))
    return [flat[end - size : end] for end, size in zip(ends, batch.sizes, strict=True)]


def over_all(
    sequences: Sequence[segments.Sequence], pad: int, tell: Tell, values: Callable[[Responses], torch.Tensor]
) -> list[list[float]]:
    """`values`, one for each response of a forward pass (N,), over all sequences and in their order.

    `tell(done, total)` is called after each pass, in sequences.
    """
    found: list[list[float]] = [[] for _ in sequences]
    done = 0
    with torch.inference_mode():
        for batch in batches(sequences, SCORED_TOKENS, pad):
            for number, part in zip(batch.numbers, by_sequence(values(batch), batch), strict=True):
                found[number] = part
            done += len(batch.numbers)
            tell(done, len(sequences))
    return found


def mean_log_probabilities(
    place: Path, sequences: Sequence[segments.Sequence], pad: int, context: StageContext, tell: Tell
) -> list[list[float]]:
    """What a causal model's directory thinks of each response: mean log-probability of its tokens, in nats.

    EOS counts. The mean, since the sum falls with every token and would only prefer the shorter one.
    """
    model = language_models.load(str(place), context.dtype, kind(context.device, sequences)).to(context.device).eval()
    _, head = language_models.body_and_head(model)

    def values(batch: Responses) -> torch.Tensor:
        hidden = segments.hidden_states(model, batch.rows, context)
        labels = batch.rows.labels.to(context.device)
        said = labels != losses.IGNORE
        each = losses.label_log_probabilities(hidden[said], head, labels[said])
        # Tokens come row by row, and in a row response by response, as the ends do: each belongs to the next end.
        ends = (batch.row * labels.shape[1] + batch.column).to(context.device)
        owner = torch.searchsorted(ends, said.flatten().nonzero()[:, 0])
        sums = each.new_zeros(len(ends)).index_add_(0, owner, each)
        counts = each.new_zeros(len(ends)).index_add_(0, owner, torch.ones_like(each))
        return sums / counts

    return over_all(sequences, pad, tell, values)


def _responses(sequences: Sequence[segments.Sequence], bins: Sequence[Sequence[int]], pad: int) -> Responses:
    """One forward pass of these bins, one row each."""
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
            start += len(branches)
    return Responses(segments.rows(sequences, bins, pad), numbers, sizes, torch.tensor(rows), torch.tensor(columns))
