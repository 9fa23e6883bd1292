"""The alignment tax: what is told where a model says nothing of a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.core import alignment_tax
from pipelines.core.context import StageContext


def test_a_run_to_compare_with_that_has_diverged_has_no_tax(
    context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {
        alignment_tax.SFT: [8.0, 4.0, 6.0], alignment_tax.POLICY: [9.0, 5.0, 6.0],
        alignment_tax.PLAIN: [9.0, math.nan, 6.0],
    }  # fmt: skip
    written: list[dict[str, Any]] = []
    held_out = SimpleNamespace(
        sizes=[4, 4, 4],
        groups=["a", "b", "c"],
        write=lambda place, found: written.append(found),
        bits_of_directory=lambda place, context, what: scores[place.name],
    )
    monkeypatch.setattr(alignment_tax.HeldOut, "of", lambda data, budget: held_out)
    asked: Callable[..., dict[str, float]] = alignment_tax.evaluate
    found = asked(tmp_path, 100, {column: Path(column) for column in scores}, tmp_path, context)
    assert found["alignment_tax_bits"] == pytest.approx(2 / 12)
    assert not any("ptx" in key for key in found) and set(written[0]) == {alignment_tax.SFT, alignment_tax.POLICY}
