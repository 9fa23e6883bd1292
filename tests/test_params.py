"""Params are checked before any compute, and a mistake names its key, what was found and what is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.core.errors import ParamsError
from pipelines.core.params import whole

ROOT = Path(__file__).parents[1]


def changed(tmp_path: Path, key: str, value: Any) -> Path:
    raw = yaml.safe_load((ROOT / "profiles/default.yaml").read_text())
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    place = raw
    *parents, last = key.split(".")
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    place[last] = value
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "params.yaml"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("pretrain.lr", -1, "pretrain.lr: Input should be greater than 0 (found -1)"),
        ("pretrain.dept", 4, "pretrain.dept: no such key; accepted here: architecture, base"),
        ("tokeniser", {}, "tokeniser: no such key; accepted here: answers, compute, "),
        ("data.seed", "x", "data.seed: Input should be a valid integer"),
        ("data.sources", [], "data.sources:"),
        ("data.sources", [{"tabel": "corpus"}], "a source needs one of the keys builder: pydocs, path: FILE or hub"),
        ("data.sources.0.stdlb", True, "data.sources.0.stdlb: no such key; accepted here: builder"),
        ("data.test_share", 0, "test_share must be > 0"),
        ("data.validation_share", 0.99, "validation_share + test_share"),
        ("pretrain.batch_tokens", 1000, "must be a multiple of sequence_length * micro_batch"),
        ("pretrain.base", None, "method: lora needs a base model"),
        ("tokenizer.base", None, "pretrain.base (smollm2-135m) and tokenizer.base (None) differ"),
        ("compute.device", "tpu", "compute.device: Input should be 'auto', 'cpu' or 'cuda' (found 'tpu')"),
    ],
)
def test_refused(tmp_path: Path, key: str, value: Any, told: str) -> None:
    with pytest.raises(ParamsError) as error:
        whole.load(changed(tmp_path, key, value))
    assert told in str(error.value)
    assert str(error.value).startswith("params.yaml: ")


def test_several_mistakes_are_told_together(tmp_path: Path) -> None:
    path = changed(tmp_path, "pretrain.lr", -1)
    path.write_text(path.read_text().replace("depth: 4", "depth: 0"))
    with pytest.raises(ParamsError) as error:
        whole.load(path)
    assert len(str(error.value).splitlines()) == 2


def test_exponents_without_a_dot_are_numbers(tmp_path: Path) -> None:
    """PyYAML reads 3e-4 as a string, DVC as a number; both must mean the same here."""
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text().replace("lr: 5.0e-4", "lr: 3e-4"))
    assert whole.load(path).pretrain.lr == pytest.approx(3e-4)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """The last one would win without a word."""
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text().replace("  lr: 5.0e-4", "  lr: 5.0e-4\n  lr: 1.0e-4", 1))
    with pytest.raises(ParamsError, match=r"(?s)params\.yaml is not valid YAML: 'lr' stands twice.*line \d+"):
        whole.load(path)


@pytest.mark.parametrize("text", [None, "a: [", "- a\n- b\n", "\x00"])
def test_a_file_that_is_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ParamsError, match=r"params\.yaml"):
        whole.load(tmp_path / "params.yaml")


def test_frozen() -> None:
    every = whole.load(ROOT / "params.yaml")
    with pytest.raises(ValueError, match="frozen"):
        every.pretrain.seed = 1  # type: ignore[misc]
