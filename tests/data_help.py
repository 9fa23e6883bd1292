"""Small data sets and runs of the stage `data`, for its tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from pipelines import data
from pipelines.core.context import StageContext
from pipelines.core.params.data import DataParams

WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heath",
    "inlet",
    "jetty",
    "knoll",
    "lagoon",
    "marsh",
    "north",
    "ocean",
    "prairie",
]


def params(*sources: dict[str, Any], **changes: Any) -> DataParams:
    """Parameters with large held-out shares, so that small tables have rows on every side."""
    given = {
        "seed": 3,
        "sources": sources,
        "validation_share": 0.2,
        "test_share": 0.3,
        "near_duplicate": 0.8,
        "on_bad_row": "refuse",
        "quarantine_budget": 0.1,
        "min_rows": 1,
    }
    return DataParams.model_validate(given | changes)


def run(root: Path, given: DataParams, name: str = "out", threads: int = 1) -> tuple[Path, dict[str, float]]:
    """One run of the stage into `root/name`."""
    outputs = root / name
    outputs.mkdir()
    return outputs, data.run(given, {}, outputs, StageContext("data", root, "f" * 64, threads=threads))


def jsonl(place: Path, rows: list[Any]) -> Path:
    """Write JSON lines; text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    place.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return place


def sentence(number: int, words: int = 12) -> str:
    """A sentence of its own for each number."""
    rng = random.Random(number)
    return f"{number} " + " ".join(rng.choice(WORDS) for _ in range(words))
