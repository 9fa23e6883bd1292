"""A `data` artifact with a corpus, written by hand: for stages that read it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write_corpus(place: Path, texts: list[str], held_out: int = 12) -> Path:
    """The last `held_out` texts are the test side, the rest train."""
    (place / "corpus").mkdir(parents=True)
    sides = {"train": texts[:-held_out], "test": texts[-held_out:]}
    for side, part in sides.items():
        rows = {
            "id": [f"{side}-{n}" for n in range(len(part))],
            "group": [f"g{n}" for n in range(len(part))],
            "text": part,
        }
        pq.write_table(pa.table(rows), place / "corpus" / f"{side}.parquet")
    return place
