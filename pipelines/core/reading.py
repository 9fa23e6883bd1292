"""What later stages read of the `data` artifact, and how every stage writes its `evaluation.parquet`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.core.errors import ArtifactError

BATCH_ROWS = 1024
FEWEST = 16  # documents of a sample, on average
EXAMPLE_BYTES = 1024  # a held-out example is this much of a document, whatever the tokenizer


def rows(data: Path, table: str, split: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of one side of a table, in order, a batch in memory at a time.

    Raises:
        ArtifactError: the data have no such table.
    """
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(_file(data, table, split)).iter_batches(BATCH_ROWS, columns=columns):
        yield from batch.to_pylist()


def texts(data: Path, split: str) -> Iterator[str]:
    """Texts of the corpus, in order."""
    return (row["text"] for row in rows(data, "corpus", split, ["text"]))


def corpus_bytes(data: Path, split: str) -> int:
    """UTF-8 bytes of one side of the corpus, read column by column."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    batches = pq.ParquetFile(_file(data, "corpus", split)).iter_batches(BATCH_ROWS, columns=["text"])
    return sum(pc.sum(pc.binary_length(batch["text"])).as_py() or 0 for batch in batches)


def sample(data: Path, split: str, share: float, seed: int) -> Iterator[str]:
    """Texts of about `share` of the documents: see `sample_rows`."""
    return (row["text"] for row in sample_rows(data, split, share, seed))


def sample_rows(data: Path, split: str, share: float, seed: int) -> Iterator[dict[str, Any]]:
    """About `share` of the documents (id, group, text), by hash of seed and id: the same ones however the rest changes.

    In order. Documents can be long and few: of any corpus some `FEWEST` are given, or a small share might be none.
    """
    import pyarrow.parquet as pq

    share = max(share, FEWEST / max(1, pq.read_metadata(_file(data, "corpus", split)).num_rows))
    for row in rows(data, "corpus", split, ["id", "group", "text"]):
        if _uniform(f"{seed}:{row['id']}") < share:
            yield row


def held_out_examples(data: Path, budget: int) -> list[dict[str, str]]:
    """Beginnings of test documents (id, group, text), about `budget` bytes of them, chosen by hash of the id.

    Each is at most `EXAMPLE_BYTES` long, so that the same examples are scored whatever the tokenizer.

    Raises:
        ArtifactError: the data have no held-out corpus.
    """
    found = ((_uniform(row["id"]), row) for row in rows(data, "corpus", "test", ["id", "group", "text"]))
    total = corpus_bytes(data, "test")
    # A first cut by hash keeps few rows in memory; it is wide enough, since cut documents are short.
    cut = 1.0 if total <= 64 * budget else 64 * budget / total
    kept = sorted(((rank, row) for rank, row in found if rank < cut), key=lambda item: (item[0], item[1]["id"]))
    examples: list[dict[str, str]] = []
    size = 0
    for _, row in kept:
        if size >= budget:
            break
        text = row["text"].encode()[:EXAMPLE_BYTES].decode(errors="ignore")
        examples.append({"id": row["id"], "group": row["group"], "text": text})
        size += len(text.encode())
    if not examples:
        raise ArtifactError("the corpus has no test rows: raise data.test_share or add text")
    return examples


def write_evaluation(place: Path, columns: dict[str, list[Any]]) -> None:
    """Write per-example rows as Parquet: `id`, `group`, then the scores."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), place, compression="zstd", store_schema=False)


def _file(data: Path, table: str, split: str) -> Path:
    """Where one side of a table lies; see `rows`."""
    place = data / table / f"{split}.parquet"
    if not place.exists():
        there = sorted(p.name for p in data.iterdir() if p.is_dir()) if data.is_dir() else []
        raise ArtifactError(
            f"the data have no table {table} ({table}/{split}.parquet); there are: {', '.join(there) or 'none'}. "
            f"Name a source with table: {table} in params.yaml data.sources."
        )
    return place


def _uniform(key: str) -> float:
    """A number in [0, 1) that belongs to a key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) / 2**64
