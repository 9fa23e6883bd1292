"""What a document or a model says steers no terminal, not where a stage shows it either."""

from __future__ import annotations

import io
import sys

import pytest

from pipelines import __main__ as entry
from pipelines.core import runner, terminal

TEXT = "a\x1b]52;c;eA==\x07\x1b[2J\x9b\r\u202eb\u2066\tc\n한 🙂 \ud800\n"


def test_what_steers_is_left_out_and_all_else_stays() -> None:
    assert terminal.clean(TEXT) == "a]52;c;eA==[2Jb\tc\n한 🙂 \ud800\n"


def test_what_a_stage_shows_steers_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="utf-8", errors="backslashreplace"))
    monkeypatch.setattr(sys, "argv", ["pipelines", "rag"])
    monkeypatch.setattr(runner, "main", lambda name, root: print(TEXT, end="", flush=True) or 0)
    assert entry.main() == 0
    assert shown.getvalue().decode() == "a]52;c;eA==[2Jb\tc\n한 🙂 \\ud800\n"
