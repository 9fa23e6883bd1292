"""Texts that share rows without seeing one another, and completions that share one encoding of their prompt.

A row holds several sequences (documents), side by side. A sequence is a plain text, or a prefix with K branches
that continue it: a branch sees the prefix and itself, never another branch, and its positions go on where the
prefix ends. So a row gives each text the result it would have alone, without padding between texts and with
a shared prompt computed once. What all sequences begin with, such as a system's message, can open the row, for
all of them to see.
"""

from __future__ import annotations

import collections.abc
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.core.chats import Chat

if TYPE_CHECKING:
    import torch

    from pipelines.core.context import StageContext

PADDING = -1  # the document number of what fills a row
COMMON = -2  # and of what all sequences of a row begin with
ROW = 256  # tokens of a packed row where no text needs more: attention's cost grows with it, what is shared is saved
UNSUPERVISED = -100  # `losses.IGNORE`, without its import of torch


class Sequence(NamedTuple):
    """One text, or a prefix and its branches, token by token."""

    ids: list[int]
    labels: list[int]  # the token that this one predicts, or UNSUPERVISED
    branches: list[int]  # 0: the prefix, or the whole of a plain text; 1 to K: what continues it


class Rows(NamedTuple):
    """Sequences in rows, padded on the right. All tensors are int64 of shape (rows, length)."""

    ids: torch.Tensor
    labels: torch.Tensor  # UNSUPERVISED on padding
    positions: torch.Tensor  # from 0 in each sequence; in each branch from where its prefix ends
    documents: torch.Tensor  # number of the sequence within its row, PADDING on padding
    branches: torch.Tensor


def of_chat(chat: Chat) -> Sequence:
    """A chat to learn from; its last token, which predicts nothing, is left out."""
    labels = [token if kept else UNSUPERVISED for token, kept in zip(chat.ids[1:], chat.supervised[1:], strict=True)]
    return Sequence(chat.ids[:-1], labels, [0] * len(labels))


def of_completions(prompt: list[int], responses: collections.abc.Sequence[list[int]]) -> Sequence:
    """A prompt and its responses, each token of which is a label.

    Each branch begins with the prompt's last token, since a token can predict only one other: the prefix is the
    prompt without it. A branch ends with its response's last token (EOS), which is unsupervised.
    """
    prefix, last = prompt[:-1], prompt[-1]
    ids, labels, branches = list(prefix), [UNSUPERVISED] * len(prefix), [0] * len(prefix)
    for number, response in enumerate(responses, 1):
        ids += [last, *response]
        labels += [*response, UNSUPERVISED]
        branches += [number] * (len(response) + 1)
    return Sequence(ids, labels, branches)


def bins(lengths: collections.abc.Sequence[int], budget: int) -> list[list[int]]:
    """Which sequences share a row of at most `budget` tokens: best-fit decreasing, the same for the same lengths.

    A sequence longer than the budget has a row of its own. Rows come in the order in which they were opened.
    """
    found: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        fits = [place for place, free in enumerate(room) if free >= lengths[number]]
        if fits:
            place = min(fits, key=lambda p: (room[p], p))
            found[place].append(number)
            room[place] -= lengths[number]
        else:
            found.append([number])
            room.append(budget - lengths[number])
    return found


def rows(
    sequences: collections.abc.Sequence[Sequence],
    bins: collections.abc.Sequence[collections.abc.Sequence[int]],
    pad_id: int,
    shared: int = 0,
) -> Rows:
    """One row for each bin, as long as the longest needs; the first `shared` tokens of its sequences only once."""
    import torch

    length = shared + max(sum(len(sequences[number].ids) - shared for number in one) for one in bins)
    columns: list[list[list[int]]] = [[] for _ in Rows._fields]
    for one in bins:
        first = sequences[one[0]]
        opening = (first.ids, first.labels, positions(first), [COMMON] * shared, first.branches)
        row: list[list[int]] = [list(part[:shared]) for part in opening]
        for document, number in enumerate(one):
            sequence = sequences[number]
            parts = (
                sequence.ids,
                sequence.labels,
                positions(sequence),
                [document] * len(sequence.ids),
                sequence.branches,
            )
            for column, part in zip(row, parts, strict=True):
                column.extend(part[shared:])
        missing = length - len(row[0])
        for all_rows, column, filler in zip(columns, row, (pad_id, UNSUPERVISED, 0, PADDING, 0), strict=True):
            all_rows.append(column + [filler] * missing)
    return Rows(*(torch.tensor(column, dtype=torch.long) for column in columns))


class MicroBatch(NamedTuple):
    """Rows of plain texts: text `texts[row][number]` is branch `number + 1` of that row."""

    rows: Rows
    texts: list[list[int]]


def micro_batches(sequences: collections.abc.Sequence[Sequence], tokens: int, pad_id: int) -> list[MicroBatch]:
    """Plain texts packed into rows, and rows into batches of at most `tokens` tokens (but one row at least).

    What all texts begin with and nothing is learned from, such as a system's message, is the prefix of each row:
    computed once in it, and the result is what each text would give alone.
    """
    shared = shared_prefix(sequences)
    lengths = [len(sequence.ids) - shared for sequence in sequences]
    budget = max(*lengths, ROW - shared)
    packed = sorted(bins(lengths, budget), key=lambda one: -sum(lengths[number] for number in one))
    found: list[list[list[int]]] = []
    for one in packed:
        width = shared + sum(lengths[number] for number in (found[-1][0] if found else one))
        if found and (len(found[-1]) + 1) * width <= tokens:
            found[-1].append(one)
        else:
            found.append([one])
    return [
        MicroBatch(
            rows([_joined(sequences, one, shared) for one in texts], [[n] for n in range(len(texts))], pad_id), texts
        )
        for texts in found
    ]


def shared_prefix(sequences: collections.abc.Sequence[Sequence]) -> int:
    """How many tokens all the sequences begin with, none of which predicts anything that is supervised."""
    first = min(sequences, key=lambda sequence: len(sequence.ids))
    for place, token in enumerate(first.ids):
        if any(one.ids[place] != token or one.labels[place] != UNSUPERVISED for one in sequences):
            return place
    return 0


def _joined(sequences: collections.abc.Sequence[Sequence], chosen: list[int], shared: int) -> Sequence:
    """Plain texts as branches of the prefix they share (which may be empty)."""
    first = sequences[chosen[0]]
    ids, labels, branches = first.ids[:shared], first.labels[:shared], [0] * shared
    for branch, number in enumerate(chosen, 1):
        ids = ids + sequences[number].ids[shared:]
        labels = labels + sequences[number].labels[shared:]
        branches = branches + [branch] * (len(ids) - len(branches))
    return Sequence(ids, labels, branches)


def positions(sequence: Sequence) -> list[int]:
    """Position of each token: on from 0 in the prefix, and in each branch on from the prefix's end."""
    prefix = sum(branch == 0 for branch in sequence.branches)
    found, place, previous = [], 0, 0
    for branch in sequence.branches:
        if branch != previous:
            place, previous = prefix, branch
        found.append(place)
        place += 1
    return found


def attention_mask(documents: torch.Tensor, branches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask (rows, 1, length, length): 0 where a token may look, the type's minimum elsewhere.

    A token sees itself and earlier tokens of its own sequence that are in its own branch or in the prefix, and what
    all sequences of its row begin with.
    `documents`, `branches`: int64 (rows, length).
    """
    import torch

    length = documents.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    common = (documents == COMMON)[:, None, :]
    allowed = allowed & ((documents[:, :, None] == documents[:, None, :]) | common)
    if branches.any():
        allowed &= (branches[:, :, None] == branches[:, None, :]) | (branches == 0)[:, None, :]
    mask = torch.zeros(allowed.shape, dtype=dtype, device=documents.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def hidden_states(model: Any, rows: Rows, context: StageContext) -> torch.Tensor:
    """Last hidden states (rows, length, width) of a model's body, in the context's type.

    `model`: a causal language model or a classifier of transformers, wrapped by peft or not.
    """
    from pipelines.core import training

    body = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
    ids, positions, documents, branches = (
        part.to(context.device) for part in (rows.ids, rows.positions, rows.documents, rows.branches)
    )
    mask = attention_mask(documents, branches, context.dtype)
    with training.computing_in(context.precision, context.device, model):
        states = body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    hidden: torch.Tensor = states.last_hidden_state.to(context.dtype)
    return hidden
