"""Rankings of a feedback artifact: read, checked, and parted into what is trained on and what is held out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.core import preferences
from pipelines.core.errors import ArtifactError, DataError

COLUMNS = ["id", "group", "prompt", "responses", "ranks", "labeler"]
NAMED = 3  # ids that a message names at most


class Ranking(NamedTuple):
    """K responses to a prompt, ranked by one labeler."""

    id: str
    group: str
    prompt: str  # "" where there is none
    responses: tuple[str, ...]
    ranks: tuple[int, ...]  # 1 is best, ties share a rank
    labeler: str | None

    @property
    def pairs(self) -> list[preferences.Pair]:
        """The pairs it decides."""
        return preferences.pairs(self.ranks, self.responses)

    @property
    def undecided(self) -> int:
        """Pairs it leaves open: ties, and identical texts."""
        return len(self.ranks) * (len(self.ranks) - 1) // 2 - len(self.pairs)

    @property
    def task(self) -> str:
        """What was ranked: the prompt, or the responses where there is none."""
        return self.prompt.strip() or "\n".join(sorted(self.responses))


class Sides(NamedTuple):
    """Rankings to learn from, and rankings of prompts that are not learned from. Each decides at least one pair."""

    train: list[Ranking]
    held_out: list[Ranking]
    unseen: frozenset[str]  # labelers of whom no ranking is in `train`
    left_out: int  # rankings that decide nothing: all ties, or identical texts


def read(feedback: Path, split: str) -> list[Ranking]:
    """The rankings of one side, in order.

    Raises:
        ArtifactError: there is no such file.
        DataError: a ranking is not one: fewer than two responses, or not as many ranks; there are none.
    """
    import pyarrow.parquet as pq

    place = feedback / "comparisons" / f"{split}.parquet"
    if not place.exists():
        raise ArtifactError(f"{place} is missing: no comparisons to learn from. Make them with: dvc repro feedback")
    rankings = [_ranking(row, place.name) for row in pq.read_table(place, columns=COLUMNS).to_pylist()]
    if not rankings:
        raise DataError(f"comparisons/{place.name} has no rows; rankings to learn from and to measure with are needed")
    return rankings


def part(train: Sequence[Ranking], test: Sequence[Ranking], labelers: int, seed: int) -> Sides:
    """Part the rankings: `labelers` of those who ranked training prompts, chosen by hash, are kept out of training.

    Held out are all rankings of the test side, and those of the kept-out labelers on prompts that nobody else's
    training ranking shows. Who ranked nothing but test prompts is unseen as well, unless a training ranking without a
    name may be theirs. Rankings that decide no pair are left out on both sides.

    Raises:
        DataError: an id or a prompt is on both sides; more labelers are to be kept out than can be; nothing is left.
    """
    _refuse_shared(train, test)
    names = sorted({one.labeler for one in train if one.labeler is not None})
    if labelers >= len(names) > 1:
        raise DataError(
            f"reward.held_out_labelers: {labelers} labelers cannot be kept out of {len(names)} who ranked training "
            f"prompts ({', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}): at most {len(names) - 1}"
        )
    chosen = sorted(names, key=lambda name: _hash(f"{seed}:{name}"))[:labelers] if len(names) > 1 else []
    every = all(one.labeler is not None for one in train)
    apart = {one.labeler for one in test if one.labeler is not None}.difference(names) if every else frozenset[str]()
    unseen = frozenset(chosen) | apart
    seen = [one for one in train if one.labeler not in unseen]
    known = {key for one in seen for key in (one.task, one.group)}
    others = [one for one in train if one.labeler in unseen and not {one.task, one.group} & known]
    held_out = (*test, *others)
    sides = Sides(
        [one for one in seen if one.pairs],
        [one for one in held_out if one.pairs],
        unseen,
        sum(not one.pairs for one in (*seen, *held_out)),
    )
    if not sides.train:
        kept = f", those of {', '.join(sorted(unseen))} kept out" if unseen else ""
        raise DataError(
            f"comparisons/train.parquet: none of its {len(train)} rankings{kept} decides a pair (all are ties or "
            "identical responses): there is nothing to learn. Ask for rankings that prefer something."
        )
    if not sides.held_out:
        raise DataError(
            f"comparisons/test.parquet: none of its {len(test)} rankings decides a pair (all are ties or identical "
            "responses): there is nothing to measure. Add held-out rankings that prefer something."
        )
    return sides


def some(rankings: Sequence[Ranking], count: int | None) -> list[Ranking]:
    """At most `count` of them, chosen by hash of the id, in their order; None: all."""
    if count is None or count >= len(rankings):
        return list(rankings)
    chosen = {one.id for one in sorted(rankings, key=lambda one: (_hash(one.id), one.id))[:count]}
    return [one for one in rankings if one.id in chosen]


def longer_wins(rankings: Iterable[Ranking]) -> bool:
    """Whether, of all decided pairs of different length, the longer response wins at least half."""
    lead = 0
    for one in rankings:
        sizes = [len(text) for text in one.responses]
        lead += sum((sizes[better] > sizes[worse]) - (sizes[better] < sizes[worse]) for better, worse in one.pairs)
    return lead >= 0


def shown_first(ranking: Ranking, pair: preferences.Pair) -> int:
    """Which of a pair is the first: drawn by a hash that does not know who won."""
    low, high = sorted(pair)
    return low if _hash(f"{ranking.id}:{low}:{high}") % 2 else high


def _ranking(row: dict[str, Any], name: str) -> Ranking:
    responses, ranks = row["responses"] or [], row["ranks"] or []
    where = f"comparisons/{name}: ranking {row['id']!r}"
    if len(responses) < 2:
        raise DataError(f"{where} has {len(responses)} response(s); at least 2 are needed to compare")
    if len(ranks) != len(responses) or None in ranks:
        raise DataError(f"{where} has {len(responses)} responses and ranks {ranks}; one rank for each is needed")
    if None in responses:
        raise DataError(f"{where}: response {responses.index(None) + 1} is null; a text is needed, however short")
    return Ranking(row["id"], row["group"], row["prompt"] or "", tuple(responses), tuple(ranks), row["labeler"])


def _refuse_shared(train: Sequence[Ranking], test: Sequence[Ranking]) -> None:
    """A prompt that was learned from measures nothing; an id that stands twice cannot be paired."""
    twice = [id_ for id_, count in Counter(one.id for one in (*train, *test)).items() if count > 1]
    if twice:
        raise DataError(f"comparisons: {len(twice)} ids stand more than once, e.g. {', '.join(twice[:NAMED])}")
    first = {one.task: one.id for one in reversed(train)}
    shared = [f"{first[one.task]} and {one.id}" for one in test if one.task in first]
    if shared:
        raise DataError(
            f"{len(shared)} rankings in comparisons/test.parquet are of prompts that comparisons/train.parquet holds "
            f"as well (train and test: {'; '.join(shared[:NAMED])}). Remove them from one side, or give both one group."
        )


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest())
