"""The split, duplicates and near duplicates: laws, and brute force as the reference."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_help import WORDS
from numpy.typing import NDArray

from pipelines.core import minhash, near_duplicates, scratch
from pipelines.core.minhash import GRAM, bands_for
from pipelines.core.near_duplicates import find
from pipelines.core.scratch import Records, parts_of
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


def marks(place: Path, rows: list[tuple[int, int, int, int]]) -> Marks:
    found = Marks(place)
    for text, prompt, at, named in rows:
        found.add(text, prompt, at, bool(named))
    found.close()
    return found


def test_first_copy_stays_and_named_sides_are_left_to_the_leak_check(tmp_path: Path) -> None:
    # (text, prompt, side, named)
    rows = [(7, 0, 0, 0), (8, 0, 0, 0), (7, 0, 2, 0), (8, 0, 2, 1), (8, 0, 2, 1), (8, 0, 0, 0)]
    assert first_of_each(marks(tmp_path / "m", rows)).tolist() == [True, True, False, True, False, False]


def test_rows_are_chosen_the_same_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    spread = 1 << 55  # the part a hash is in is told by its upper bits
    tables = {
        name: marks(
            tmp_path / name,
            [
                (rng.randrange(300) * spread, rng.randrange(200) * spread, rng.randrange(3), int(rng.random() < 0.2))
                for _ in range(1000)
            ],
        )
        for name in ("demonstrations", "prompts")
    }
    keep = {name: first_of_each(own) for name, own in tables.items()}
    gone = prompts_held_out(tables, keep)
    assert all(0 < mask.sum() < 1000 for mask in (*keep.values(), *gone.values()))
    monkeypatch.setattr(scratch, "PART_RECORDS", 64)
    assert parts_of(1000) == 16
    for name, own in tables.items():
        assert (first_of_each(own) == keep[name]).all()
        assert (prompts_held_out(tables, keep)[name] == gone[name]).all()


def test_records_come_back_as_they_were_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "BLOCK_BYTES", 64)
    values = np.random.default_rng(0).integers(0, 2**64, 100, dtype=np.uint64)
    values[:20] = 0
    records = Records(tmp_path / "r", [("hash", "u8"), ("more", "u1")])
    for own in np.split(values, [30, 99]):
        some = np.zeros(len(own), records.kind)
        some["hash"] = own
        records.append(some)
    assert records.count == len(values)
    assert np.concatenate([block["hash"] for _, block in records.blocks()]).tolist() == values.tolist()
    assert [first for first, _ in records.blocks(40)] == [0, 40, 80]
    assert records.at(np.array([99, 3, 50, 99]))["hash"].tolist() == values[[99, 3, 50, 99]].tolist()
    assert len(records.at(np.zeros(0, np.int64))) == 0
    every = [records.part("hash", part, 3) for part in range(3)]
    assert sorted(np.concatenate([numbers for numbers, _ in every])) == list(range(100))
    assert all((values[numbers] == own["hash"]).all() and len(own) > 15 for numbers, own in every)
    assert sum(len(records.part("hash", part, 3, given=True)[0]) for part in range(3)) == 80


def test_held_out_prompts_leave_training_in_every_table(tmp_path: Path) -> None:
    tables = {
        "demonstrations": marks(tmp_path / "d", [(1, 5, 0, 0), (2, 6, 0, 0), (3, 5, 0, 1)]),
        "prompts": marks(tmp_path / "p", [(4, 5, 2, 0), (5, 6, 0, 0)]),
        "corpus": marks(tmp_path / "c", [(6, 0, 2, 0), (7, 0, 0, 0)]),
    }
    gone = prompts_held_out(tables, {name: np.ones(len(m.sides), bool) for name, m in tables.items()})
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
def test_near_duplicates_are_those_of_brute_force(
    threshold: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    found = find(read, held, ~held, threshold, 1, tmp_path / "near")
    assert len(want) > 20
    assert {pair.train for pair in found} == set(want)
    assert all(jaccard(texts[p.train], texts[p.held]) == pytest.approx(p.similarity) for p in found)
    assert found == find(read, held, ~held, threshold, 3, tmp_path / "near")
    assert not (tmp_path / "near").exists()
    # Blocks of a few rows in place of the whole table: the same pairs.
    for name, few in {"BLOCK_ROWS": 37, "SEARCHED_ROWS": 101, "BLOCK_PAIRS": 53, "HELD_GRAMS": 999}.items():
        monkeypatch.setattr(near_duplicates, name, few)
    assert found == find(read, held, ~held, threshold, 1, tmp_path / "near")


def test_what_many_rows_have_in_common_makes_no_two_alike(tmp_path: Path) -> None:
    """Chats with one long system message: nearly all of a row is that, and no row repeats another."""
    rng = random.Random(7)
    system = " ".join(rng.choice(WORDS) + str(n) for n in range(300))
    texts = [f"{system} " + " ".join(rng.choice(WORDS) + str(rng.randrange(99)) for _ in range(30)) for _ in range(80)]
    texts += [texts[0] + " once", system]  # held-out row 0 again, but for a word; and the message alone
    held = np.arange(len(texts)) % 4 == 0

    def read(mask: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], list[str]]]:
        rows = np.flatnonzero(mask)
        yield rows, [texts[row] for row in rows]

    held[80:] = False
    found = find(read, held, ~held, 0.8, 1, tmp_path / "near")
    assert [(pair.train, pair.held) for pair in found] == [(80, 0)]
    alike = jaccard(
        texts[0].removeprefix(" ".join(system.split()[:-4])), texts[80].removeprefix(" ".join(system.split()[:-4]))
    )
    assert found[0].similarity == pytest.approx(alike)


def test_texts_without_blanks_nearly_repeat_one_another_too(tmp_path: Path) -> None:
    text = "返回所有给定数字的总和如果没有数字则抛出异常这是一个测试用的函数它不做别的事情"
    texts = [text, text[:20] + "它" + text[20:], "別の文書には別のことが書いてありますので重複ではありません"]

    def read(mask: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], list[str]]]:
        rows = np.flatnonzero(mask)
        yield rows, [texts[row] for row in rows]

    held = np.array([True, False, False])
    assert [(pair.train, pair.held) for pair in find(read, held, ~held, 0.7, 1, tmp_path / "near")] == [(1, 0)]


def test_bands_miss_at_most_what_they_promise() -> None:
    for threshold in (0.3, 0.5, 0.8, 0.95, 1.0):
        bands = bands_for(threshold)
        assert bands.bands * bands.rows <= minhash.LARGEST_SKETCH
        if threshold >= 0.5:
            assert (1 - threshold**bands.rows) ** bands.bands <= minhash.MISSED
