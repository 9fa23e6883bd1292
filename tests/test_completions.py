"""Which stored prompts a stage takes: by hash, those that fit, as many as are asked for where there are so many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models import tokenizer

from pipelines.core import completions, reading
from pipelines.core.errors import DataError
from pipelines.core.labelers import drawn
from pipelines.tokenizer import CHAT_TEMPLATE

LIMITS = completions.Limits("feedback", 3, 24, "drop")


@pytest.fixture(scope="module")
def known() -> Any:
    made = tokenizer()
    made.chat_template = CHAT_TEMPLATE
    return made


def write(data: Path, short: set[int], count: int = 200) -> list[str]:
    """Prompts of which those at the places `short`, in the order of their hash, are not too long. The ids in order."""
    ids = sorted((f"p{number}" for number in range(count)), key=lambda id_: drawn("3", id_))
    rows = [
        {"id": id_, "group": id_, "prompt": "w?" if place in short else "area " * 40, "reference": None}
        for place, id_ in enumerate(ids)
    ]
    schema = pa.schema([(name, pa.string()) for name in ("id", "group", "prompt", "reference")])
    (data / "prompts").mkdir(parents=True)
    stored = sorted(rows, key=lambda row: row["id"])  # an order that says nothing of the hash
    pq.write_table(pa.Table.from_pylist(stored, schema), data / "prompts/train.parquet")
    return ids


def choose(data: Path, count: int, known: Any, limits: completions.Limits = LIMITS) -> tuple[list[str], int]:
    found, dropped = completions.choose(limits, data, "train", count, known, with_reference=False)
    return [prompt.id for prompt in found], dropped


def test_as_many_as_are_asked_for_however_many_are_too_long(tmp_path: Path, known: Any) -> None:
    ids = write(tmp_path, short={1, 30, 31, 90, 199})
    for count, places, dropped in ((1, [1], 1), (2, [1, 30], 29), (4, [1, 30, 31, 90], 87)):
        assert choose(tmp_path, count, known) == ([ids[place] for place in places], dropped)
    for count in (5, 6, 1000):
        assert choose(tmp_path, count, known) == ([ids[place] for place in (1, 30, 31, 90, 199)], 195)


def test_the_table_is_read_once_where_the_first_are_enough(
    tmp_path: Path, known: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = write(tmp_path, short=set(range(200)) - {2})
    real, calls = reading.rows, []

    def rows(*arguments: Any) -> Any:
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(reading, "rows", rows)
    assert choose(tmp_path, 5, known) == ([*ids[:2], *ids[3:6]], 1) and len(calls) == 1


def test_all_too_long(tmp_path: Path, known: Any) -> None:
    write(tmp_path, short=set())
    with pytest.raises(DataError, match=r"every prompt is too long, first prompts/train, id p\d+: \d+ tokens"):
        choose(tmp_path, 2, known)


def test_a_prompt_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    ids = write(tmp_path, short={0})
    made = tokenizer()
    made.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(DataError, match=f"prompts/train, id {ids[0]}: the chat template refuses this chat: no"):
        choose(tmp_path, 2, made)
