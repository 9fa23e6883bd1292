"""Labelled examples as token sequences a pre-trained decoder reads from left to right (GPT-1, section 3.3, figure 1).

* classification: `start text extract`
* entailment: `start premise delimiter hypothesis extract`
* similarity: `start first delimiter second extract` and `start second delimiter first extract`
* choice: `start context delimiter candidate extract`, one sequence a candidate

The hidden state of `extract`, always the last token, is what the classifier reads. A sequence that is too long is
cut by one rule: the three learned tokens stay; a single text loses its end; of two texts the longer one loses its
last token, again and again (of equal ones the second), as transformers' `longest_first`; in a choice the context is
cut to what the longest candidate leaves, the same for all candidates, and a candidate only if it does not fit alone.

A served model carries a copy of this file (`serving_task.py`): it imports nothing of the project.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Kind = Literal["classification", "entailment", "similarity", "choice"]
Tokens = Sequence[int]
SPELLINGS = ("<|start|>", "<|delimiter|>", "<|extract|>")
SHORTEST = 5  # tokens of a sequence: three learned ones, and one of each of two texts


class Special(NamedTuple):
    """Ids of the three learned tokens (section 3.3: embeddings for delimiter, start and end)."""

    start: int
    delimiter: int
    extract: int


class Sequences(NamedTuple):
    """The token sequences of one example, and whether its text was cut."""

    ids: tuple[tuple[int, ...], ...]
    truncated: bool


def add_special(tokenizer: Any) -> Special:
    """Add the three learned tokens to a tokenizer, or find them there; the caller resizes the embeddings."""
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPELLINGS], special_tokens=True)
    return Special(*(tokenizer.convert_tokens_to_ids(text) for text in SPELLINGS))


def sequences(
    kind: Kind, parts: Sequence[Tokens], choices: Sequence[Tokens], special: Special, max_length: int
) -> Sequences:
    """What the model reads of one example, none longer than `max_length` tokens, the learned ones included.

    Args:
        parts: token ids of the text, of the two texts, or of the context of a choice.
        choices: token ids of the candidates; empty unless a choice.
        max_length: at least `SHORTEST`.
    """
    if kind == "classification":
        room = max_length - 2
        kept = parts[0][:room]
        return Sequences(((special.start, *kept, special.extract),), len(kept) < len(parts[0]))
    room = max_length - 3
    if kind == "choice":
        candidates = [tokens[:room] for tokens in choices]
        context = parts[0][: room - max(map(len, candidates))]
        cut = len(context) < len(parts[0]) or any(len(tokens) > room for tokens in choices)
        return Sequences(tuple(_pair(context, one, special) for one in candidates), cut)
    first, second = longest_first(parts[0], parts[1], room)
    cut = len(first) + len(second) < len(parts[0]) + len(parts[1])
    # Neither text of a similar pair comes first by nature: both orders are read (figure 1).
    orders = [(first, second), (second, first)] if kind == "similarity" else [(first, second)]
    return Sequences(tuple(_pair(*order, special) for order in orders), cut)


def longest_first(first: Tokens, second: Tokens, room: int) -> tuple[Tokens, Tokens]:
    """Beginnings of two texts, `room` tokens together: the longer loses tokens until both fit, of equals the second.

    Nothing is cut while `len(first) + len(second) <= room`.
    """
    # In closed form: a text no longer than its half stays whole, else both keep a half; the first has the odd one.
    kept = min(len(first), max((room + 1) // 2, room - len(second)))
    return first[:kept], second[: room - kept]


def _pair(before: Tokens, after: Tokens, special: Special) -> tuple[int, ...]:
    return (special.start, *before, special.delimiter, *after, special.extract)
