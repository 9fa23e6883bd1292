"""A checkpoint is whole or absent, the newest two are kept, and one that does not fit is never used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.core import artifacts
from pipelines.core.checkpoint import Checkpoints


def checkpoints(place: Path, fingerprint: str = "f") -> Checkpoints:
    return Checkpoints(place / "c", fingerprint, steps=5, seconds=1e9)


def test_newest_comes_back_and_two_are_kept(tmp_path: Path) -> None:
    ours = checkpoints(tmp_path)
    assert ours.newest() is None
    for step in (5, 10, 100):
        ours.save(step, {"step": step, "w": torch.full((3,), float(step)), "history": [{"loss": 0.5}]})
    state = checkpoints(tmp_path).newest()
    assert state is not None and state["step"] == 100 and state["w"].tolist() == [100.0] * 3
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step-10", "step-100"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "manifest", "no manifest"])
def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = checkpoints(tmp_path)
    for step in (5, 10):
        ours.save(step, {"step": step, "w": torch.ones(100)})
    state, manifest = (tmp_path / "c/step-10" / name for name in ("state.pt", "manifest.json"))
    data = bytearray(state.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
    elif damage == "truncate":
        state.write_bytes(data[:-10])
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        manifest.unlink()
    found = ours.newest()
    assert found is not None and found["step"] == 5
    assert "step-10 is damaged" in capsys.readouterr().err
    assert list((tmp_path / "c").glob("unusable-step-10-*")), "kept for whoever wants to look"


def test_another_fingerprints_is_never_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints(tmp_path).save(5, {"step": 5})
    assert checkpoints(tmp_path, "other").newest() is None
    assert "other params, inputs or code" in capsys.readouterr().err


def test_due_by_steps_and_by_time(tmp_path: Path) -> None:
    assert [checkpoints(tmp_path).due(step) for step in (4, 5, 6, 10)] == [False, True, False, True]
    assert Checkpoints(tmp_path, "f", steps=1000, seconds=0.0).due(3)


def test_published_is_whole_or_absent(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with pytest.raises(RuntimeError), artifacts.published(place) as draft:
        (draft / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with artifacts.published(place) as draft:
        (draft / "whole").write_text("1")
    before = artifacts.content_hash(place)
    with pytest.raises(RuntimeError), artifacts.published(place) as draft:
        (draft / "half").write_text("x")
        raise RuntimeError
    assert artifacts.content_hash(place) == before
    with artifacts.published(place) as draft:
        (draft / "whole").write_text("2")
    assert artifacts.content_hash(place) != before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_content_hash_sees_names_and_bytes_not_the_place(tmp_path: Path) -> None:
    for name, file, text in (("a", "x", "1"), ("b", "x", "1"), ("c", "y", "1"), ("d", "x", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    hashes = [artifacts.content_hash(tmp_path / name) for name in "abcd"]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
