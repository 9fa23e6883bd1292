"""The split, duplicates and near duplicates: laws, and brute force as the reference."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator

import numpy as np
import pytest
from data_help import WORDS
from numpy.typing import NDArray

from pipelines.core import near_duplicates
from pipelines.core.near_duplicates import GRAM, bands_for, find
from pipelines.core.split import Marks, first_of_each, prompts_held_out, side
from pipelines.core.tables import key_of, normalised


def test_shares_are_kept_and_the_seed_matters() -> None:
    sides = np.array([side(1, f"g{n}", 0.1, 0.2) for n in range(20_000)])
    assert [round(float((sides == s).mean()), 2) for s in range(3)] == pytest.approx([0.7, 0.1, 0.2], abs=0.011)
    other = np.array([side(2, f"g{n}", 0.1, 0.2) for n in range(20_000)])
    assert 0.3 < (sides != other).mean() < 0.6


def test_hash_of_text_is_pinned() -> None:
    # A row's side and id must survive any change of Python, platform or library.
    assert key_of(normalised("  Straße\n ﬁn ")) == key_of("strasse fin")
    assert f"{key_of('sluice'):016x}" == "bdb0bad6a6f84551"
    assert [side(17, group, 0.02, 0.04) for group in ("a", "g13", "g16")] == [0, 1, 2]


def marks(rows: list[tuple[int, int, int, int]]) -> Marks:
    return Marks(*(array(kind, column) for kind, column in zip("QQBB", zip(*rows, strict=True), strict=True)))


def test_first_copy_stays_and_named_sides_are_left_to_the_leak_check() -> None:
    # (text, prompt, side, named)
    rows = [(7, 0, 0, 0), (8, 0, 0, 0), (7, 0, 2, 0), (8, 0, 2, 1), (8, 0, 2, 1), (8, 0, 0, 0)]
    assert first_of_each(marks(rows)).tolist() == [True, True, False, True, False, False]


def test_held_out_prompts_leave_training_in_every_table() -> None:
    tables = {
        "demonstrations": marks([(1, 5, 0, 0), (2, 6, 0, 0), (3, 5, 0, 1)]),
        "prompts": marks([(4, 5, 2, 0), (5, 6, 0, 0)]),
        "corpus": marks([(6, 0, 2, 0), (7, 0, 0, 0)]),
    }
    gone = prompts_held_out(tables, {name: np.ones(len(m.texts), bool) for name, m in tables.items()})
    assert {name: mask.tolist() for name, mask in gone.items()} == {
        "demonstrations": [True, False, False],  # the last one is on its side by name
        "prompts": [False, False],
    }


def documents(count: int) -> list[str]:
    """Texts of 3 to 80 words, many of them edits of an earlier one, from none to half of their words changed."""
    rng = random.Random(5)
    texts: list[list[str]] = []
    for _ in range(count):
        if texts and rng.random() < 0.6:
            text = list(rng.choice(texts))
            for _ in range(rng.randrange(max(len(text) // 8, 2))):
                text[rng.randrange(len(text))] = rng.choice(WORDS)
        else:
            text = [f"{rng.choice(WORDS)}{rng.randrange(40)}" for _ in range(rng.randrange(3, 80))]
        texts.append(text)
    return [" ".join(text) for text in texts]


def jaccard(first: str, second: str) -> float:
    sets = [
        {tuple(words[at : at + GRAM]) for at in range(max(len(words) - GRAM + 1, 1))}
        for words in (first.casefold().split(), second.casefold().split())
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_near_duplicates_are_those_of_brute_force(threshold: float) -> None:
    texts = documents(500)
    held = np.arange(len(texts)) % 4 == 0

    def read(mask: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], list[str]]]:
        for first in range(0, len(texts), 100):
            rows = np.flatnonzero(mask[first : first + 100]) + first
            yield rows, [texts[row] for row in rows]

    want = {}
    for train in np.flatnonzero(~held):
        for away in np.flatnonzero(held):
            if (similarity := jaccard(texts[train], texts[away])) >= threshold:
                want.setdefault(int(train), (int(away), similarity))
    found = find(read, held, ~held, threshold, threads=1)
    assert len(want) > 20
    assert {pair.train for pair in found} == set(want)
    assert all(jaccard(texts[p.train], texts[p.held]) == pytest.approx(p.similarity) for p in found)
    assert found == find(read, held, ~held, threshold, threads=3)


def test_bands_miss_at_most_what_they_promise() -> None:
    for threshold in (0.3, 0.5, 0.8, 0.95, 1.0):
        bands = bands_for(threshold)
        assert bands.bands * bands.rows <= near_duplicates.LARGEST_SKETCH
        if threshold >= 0.5:
            assert (1 - threshold**bands.rows) ** bands.bands <= near_duplicates.MISSED
