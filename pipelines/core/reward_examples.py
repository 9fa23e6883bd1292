"""What stages `reward` and `dpo` read, as tokens: rankings to learn from, rankings held out, demonstrations.

A ranking, or a demonstration, is as long as its prompt with its longest response. Rankings that do not fit are refused
or dropped; demonstrations are a sample of many, and those that do not fit are passed over.
"""

from __future__ import annotations

import hashlib
import heapq
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.core import chats, preference_data, reading
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError, DataError
from pipelines.core.preference_data import Ranking
from pipelines.core.preferences import Pair

if TYPE_CHECKING:
    from pipelines.core.params.dpo import DpoParams
    from pipelines.core.params.reward import RewardParams
    from pipelines.core.segments import Sequence


class Encoded(NamedTuple):
    """Rankings and their tokens."""

    rankings: list[Ranking]
    sequences: list[Sequence]
    dropped: int  # rankings left out because they are too long


class Elements(NamedTuple):
    """What a batch is made of: a prompt with its responses, and the pairs that all who ranked them decided."""

    sequences: list[Sequence]
    pairs: list[list[Pair]]


class Examples(NamedTuple):
    """Both sides."""

    train: Encoded
    held_out: Encoded
    unseen: frozenset[str]  # labelers of whom nothing is in `train`
    left_out: int  # rankings that decide nothing


def gather(
    params: RewardParams | DpoParams, labelers: int, feedback: Path, tokenizer: Any, context: StageContext
) -> Examples:
    """Who is held out, and both sides as tokens.

    Args:
        labelers: how many are kept out of training, chosen by hash.

    Raises:
        ArtifactError: there are no comparisons; the tokenizer cannot mark the end of a response.
        DataError: as `preference_data.read` and `part`; rankings that are too long.
    """
    chats.check_tokenizer(tokenizer)
    sides = preference_data.part(
        preference_data.read(feedback, "train"),
        preference_data.read(feedback, "test"),
        labelers,
        params.seed,
    )
    if sides.unseen:
        more = " (more: reward.held_out_labelers)" if labelers else ""
        theirs = [one for one in sides.held_out if one.labeler in sides.unseen]
        context.say(
            f"labelers kept out of training: {', '.join(sorted(sides.unseen))}; held out are {len(theirs)} rankings of "
            f"theirs, of {len({one.group for one in theirs})} groups of prompts{more}"
        )
    elif labelers:
        context.say("fewer than two labelers are named in the training comparisons: none is kept out")
    train = preference_data.some(sides.train, params.rankings)
    held_out = preference_data.some(sides.held_out, params.eval_rankings)
    return Examples(
        _encoded(params, train, tokenizer, "training", context),
        _encoded(params, held_out, tokenizer, "held-out", context),
        sides.unseen,
        sides.left_out,
    )


def by_prompt(train: Encoded) -> Elements:
    """One element for each prompt and its responses, however many labelers ranked them: one forward pass for all.

    The order of the responses is the first labeler's; others may have had them in another one.
    """
    found: dict[tuple[str, ...], tuple[Ranking, Sequence, list[Pair]]] = {}
    for one, sequence in zip(train.rankings, train.sequences, strict=True):
        first, _, decided = found.setdefault((one.prompt, *sorted(one.responses)), (one, sequence, []))
        if one.responses == first.responses:
            decided.extend(one.pairs)
        else:
            place = [first.responses.index(text) for text in one.responses]
            decided.extend((place[better], place[worse]) for better, worse in one.pairs)
    return Elements([sequence for _, sequence, _ in found.values()], [decided for *_, decided in found.values()])


def drawn(seed: int, step: int, steps: int, count: int) -> list[int]:
    """Numbers of the prompts of a step: in `steps` steps each of `count` once, in an order of the epoch's own.

    No step is more than one larger than another: a small last one would be a noisy one.
    """
    import numpy as np

    epoch, place = divmod(step, steps)
    order = np.random.default_rng([seed, epoch]).permutation(count)
    numbers: list[int] = np.array_split(order, steps)[place].tolist()
    return numbers


def demonstrations(params: RewardParams, data: Path, tokenizer: Any) -> list[Sequence]:
    """Some of the training demonstrations, chosen by hash of the id: the chat up to the last answer, and that answer.

    Raises:
        ArtifactError: the data have none.
        DataError: fewer than two fit `max_length`; one is no chat for the template.
    """
    from pipelines.core import k_way

    rows = reading.rows(data, "demonstrations", "train", ["id", "messages"])
    chosen = heapq.nsmallest(params.calibration_demonstrations, rows, key=lambda row: (_hash(row["id"]), row["id"]))
    if not chosen:
        raise ArtifactError("the data have no demonstrations, whose mean reward is to become 0")
    found = []
    for row in chosen:
        try:
            found.append(k_way.encode(tokenizer, row["messages"][:-1], [row["messages"][-1]["content"]]))
        except DataError as error:
            raise DataError(f"demonstrations/train, id {row['id']}: {error}") from None
    fitting = [one for one in found if k_way.longest(one) <= params.max_length]
    if len(fitting) < 2:
        remedy = "Raise reward.max_length, or reward.calibration_demonstrations: longer ones are passed over."
        raise DataError(
            f"demonstrations/train: of {len(found)} chosen ones {len(fitting)} have at most reward.max_length = "
            f"{params.max_length} tokens; their mean reward needs 2 or more. "
            + (remedy if len(found) > 1 else "Give data.sources more rows of table: demonstrations.")
        )
    return fitting


def _encoded(
    params: RewardParams | DpoParams, chosen: list[Ranking], tokenizer: Any, what: str, context: StageContext
) -> Encoded:
    """The rankings that fit `max_length`.

    Raises:
        DataError: one does not fit and `too_long` is `refuse`, or none fits; one is no chat for the template.
    """
    from pipelines.core import k_way

    kept, sequences, long = [], [], []
    for one in chosen:
        try:
            sequence = k_way.encode(tokenizer, chats.messages_of(one.prompt), one.responses)
        except DataError as error:
            raise DataError(f"comparisons: {what} ranking {one.id!r}: {error}") from None
        length = k_way.longest(sequence)
        if length > params.max_length:
            long.append(f"{what} ranking {one.id!r} has {length} tokens with its longest response")
        else:
            kept.append(one)
            sequences.append(sequence)
    section = context.stage
    accepted = f"{section}.max_length accepts {params.max_length}"
    if long and (params.too_long == "refuse" or not kept):
        shorter = f"shorten them, or set {section}.too_long: drop" if kept else "or shorten them"
        raise DataError(
            f"comparisons: {long[0]}, {accepted} ({len(long)} of {len(chosen)} are too long). "
            f"Raise {section}.max_length, {shorter}."
        )
    if long:
        context.say(f"{len(long)} of {len(chosen)} dropped: {long[0]}, {accepted}")
    return Encoded(kept, sequences, len(long))


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
