"""Hashes of a project's files: right, and not computed twice."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.core import artifacts, contents

MEMO = ".sluice/hashes/artifacts--sft.json"
PLAIN = artifacts.content_hash


def written(file: Path, text: str, age: float = 60.0) -> Path:
    """A file that was changed so many seconds ago."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    os.utime(file, (time.time() - age,) * 2)
    return file


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes `contents` has read."""
    names: list[str] = []

    def reading(place: Path, of_file: Callable[[Path], str] | None = None) -> str:
        if of_file is None:
            names.append(place.name)
        return PLAIN(place, of_file or artifacts.file_hash)

    monkeypatch.setattr(artifacts, "content_hash", reading)
    return names


def test_what_has_not_changed_is_not_read_again(tmp_path: Path, read: list[str]) -> None:
    place = tmp_path / "artifacts" / "sft"
    for name in ("model/weights", "model/config", "samples"):
        written(place / name, name)
    whole = contents.content_hash(tmp_path, place)
    assert sorted(read) == ["config", "samples", "weights"]
    assert whole == PLAIN(place)
    read.clear()
    assert contents.content_hash(tmp_path, place) == whole
    assert contents.content_hash(tmp_path, place / "model") == PLAIN(place / "model")
    assert contents.content_hash(tmp_path, place / "samples") == PLAIN(place / "samples")
    assert read == []
    written(place / "model" / "config", "other", age=30)
    assert contents.content_hash(tmp_path, place) == PLAIN(place) != whole
    assert read == ["config"]


def test_a_file_that_was_just_written_is_read_every_time(tmp_path: Path, read: list[str]) -> None:
    place = tmp_path / "artifacts" / "sft"
    file = written(place / "weights", "one", age=0)
    first = contents.content_hash(tmp_path, place)
    stat = file.stat()
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # within the clock's grain
    assert contents.content_hash(tmp_path, place) == PLAIN(place) != first
    assert read == ["weights", "weights"]


@pytest.mark.parametrize(("parts", "age", "readings"), [(0, 1.9, 2), (0, 2.1, 1), (1, 0.05, 2), (1, 0.2, 1)])
def test_a_clock_that_tells_parts_of_a_second_is_a_fine_one(
    parts: int, age: float, readings: int, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`parts`: of a second, in the file's time; `age`: seconds from then to when it is read first."""
    file = written(tmp_path / "artifacts/sft/weights", "one", age=0)
    changed = 1_700_000_000 * 10**9 + parts
    os.utime(file, ns=(changed, changed))
    monkeypatch.setattr(time, "time_ns", lambda: changed + int(age * 1e9))
    for _ in range(2):
        contents.content_hash(tmp_path, file)
    assert read == ["weights"] * readings


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large one that takes longer than the clock's grain, within which a time of change stays the same."""
    file = written(tmp_path / "artifacts/sft/weights", "one", age=0)
    stat, now = file.stat(), [time.time_ns()]
    monkeypatch.setattr(time, "time_ns", lambda: now[0])

    def slow(path: Path) -> str:
        found = PLAIN(path)
        file.write_text("two")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        now[0] += 2 * contents.GRAIN
        return found

    monkeypatch.setattr(artifacts, "content_hash", lambda place, of_file=slow: of_file(place))
    contents.content_hash(tmp_path, file)
    monkeypatch.undo()
    assert contents.content_hash(tmp_path, file) == PLAIN(file)


def test_files_that_are_gone_are_forgotten(tmp_path: Path) -> None:
    place = tmp_path / "artifacts" / "sft"
    gone = written(place / "old", "one")
    contents.content_hash(tmp_path, place)
    gone.unlink()
    written(place / "new", "two")
    assert contents.content_hash(tmp_path, place) == PLAIN(place)
    assert list(json.loads((tmp_path / MEMO).read_text())) == ["artifacts/sft/new"]


@pytest.mark.parametrize(
    "text", ["half a fi", "[]", '{"artifacts/sft/weights": []}', '{"files": {}, "content": "of another version"}']
)
def test_a_memo_that_is_not_ours_is_written_anew(tmp_path: Path, text: str) -> None:
    place = tmp_path / "artifacts" / "sft"
    written(place / "weights", "one")
    (tmp_path / MEMO).parent.mkdir(parents=True)
    (tmp_path / MEMO).write_text(text)
    assert contents.content_hash(tmp_path, place) == PLAIN(place)
    assert list(json.loads((tmp_path / MEMO).read_text())) == ["artifacts/sft/weights"]


def test_a_name_may_be_as_long_as_the_file_system_lets_it(tmp_path: Path, read: list[str]) -> None:
    """That of the memo would be longer: 80 Chinese characters are 240 bytes of the 255 that there are."""
    files = [written(tmp_path / "texts" / f"{'长' * 80}{n}.txt", f"text {n}") for n in range(2)]
    for file in files * 2:
        assert contents.content_hash(tmp_path, file) == PLAIN(file)
    assert read == [file.name for file in files]


def test_files_that_lie_elsewhere_are_hashed_as_they_are(tmp_path: Path) -> None:
    file = written(tmp_path / "elsewhere" / "chats.jsonl", "{}")
    root = tmp_path / "project"
    assert contents.content_hash(root, file) == artifacts.file_hash(file)
    assert not root.exists()
