"""Demonstrations, chosen and encoded: what people said an assistant should answer.

Which ones belongs to their ids, not to their order, so adding rows to the data changes few of them.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pipelines.core import chats, reading
from pipelines.core.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TABLE = "demonstrations"


class Demonstration(NamedTuple):
    """One chat that ends with the assistant."""

    id: str
    group: str
    messages: list[chats.Message]
    chat: chats.Chat

    @property
    def prompt(self) -> list[chats.Message]:
        """What came before the last answer."""
        return self.messages[:-1]

    @property
    def reference(self) -> str:
        """The last answer."""
        return self.messages[-1]["content"]


class Chosen(NamedTuple):
    """Demonstrations of one split, and how many were dropped because they are too long."""

    kept: list[Demonstration]
    dropped: int


def choose(
    data: Path,
    split: str,
    tokenizer: Any,
    kinds: Sequence[str],
    count: int | None,
    longest: int,
    too_long: Literal["refuse", "drop"],
    section: str = "sft",
    dial: str = "max_length",
) -> Chosen:
    """At most `count` demonstrations of the kinds (none named: all), those whose hashed ids come first.

    Args:
        longest: tokens of a chat that are accepted.
        too_long: whether a longer one stops the stage, or is left out and counted.
        section: of `params.yaml`, for messages; `dial` of it sets `longest`.

    Raises:
        ArtifactError: the data have no demonstrations.
        DataError: no row, or none of a kind; a chat that cannot be learned from; one that is too long, or all of them.
    """
    rows = _first_by_hash(data, split, kinds, count)
    kept: list[Demonstration] = []
    long: list[tuple[str, int]] = []
    for row in rows:
        where = f"{TABLE}/{split}.parquet, row {row['id']}"
        try:
            chat = chats.encode(tokenizer, row["messages"])
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if len(chat.ids) > longest:
            long.append((row["id"], len(chat.ids)))
            if too_long == "refuse":
                raise DataError(
                    f"{where}: {len(chat.ids)} tokens, accepted are {longest}. Shorten it, raise {section}.{dial} "
                    f"(up to the model's context), or set {section}.too_long: drop"
                )
        else:
            kept.append(Demonstration(row["id"], row["group"], row["messages"], chat))
    if long:
        told = f"{TABLE}/{split}.parquet: {len(long)} of {len(rows)} chats are longer than {longest} tokens"
        first = f"the first is row {long[0][0]} with {long[0][1]}"
        if not kept:
            raise DataError(f"{told} ({first}), so none is left: raise {section}.{dial} or use shorter chats")
        print(f"{told} and dropped; {first}", flush=True)
    return Chosen(kept, len(long))


def order(count: int, epochs: int, seed: int) -> NDArray[np.int64]:
    """Which of `count` comes when, (epochs x count,): each epoch all of them, in a new seeded order."""
    import numpy as np

    return np.concatenate([np.random.default_rng([seed, epoch]).permutation(count) for epoch in range(epochs)])


def _first_by_hash(data: Path, split: str, kinds: Sequence[str], count: int | None) -> list[dict[str, Any]]:
    """Rows of the kinds by ascending hash of their id; no more than `count` of them are held in memory."""
    seen: set[str] = set()

    def wanted() -> Any:
        for row in reading.rows(data, TABLE, split, ["id", "group", "kind", "messages"]):
            seen.add(row["kind"])
            if not kinds or row["kind"] in kinds:
                yield row

    def place(row: dict[str, Any]) -> tuple[bytes, str]:
        return hashlib.blake2b(row["id"].encode(), digest_size=8).digest(), row["id"]

    rows = sorted(wanted(), key=place) if count is None else heapq.nsmallest(count, wanted(), key=place)
    if not seen:
        share = "lower data.validation_share and test_share" if split == "train" else f"raise data.{split}_share"
        raise DataError(
            f"{TABLE}/{split}.parquet has no row; accepted: at least one. Give data.sources with table: {TABLE} more "
            f"rows, {share}, or give a source split: {split}."
        )
    missing = sorted(set(kinds) - seen)
    if missing:
        there = ", ".join(sorted(seen))
        raise DataError(f"{TABLE}/{split}.parquet has no kind {', '.join(missing)}; there are: {there}")
    return rows


def marked(example: Demonstration, tokenizer: Any) -> str:
    """A demonstration as the loss sees it: what is learned stands between ⟦ and ⟧."""
    pieces = []
    previous = False
    for token, supervised in zip(example.chat.ids, example.chat.supervised, strict=True):
        pieces.append(("⟦" if supervised else "⟧") * (supervised != previous) + tokenizer.decode([token]))
        previous = supervised
    text = "".join(pieces) + "⟧" * previous
    return f"first training example, supervised where ⟦ ⟧ stand ({sum(example.chat.supervised)} tokens):\n{text}"
