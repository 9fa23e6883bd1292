"""The tables as Arrow: schemas, the text that stands for a row, and files that are written in a steady rhythm.

A table key is a table's name, or `tasks/NAME` for one labelled task. Every row carries `id`, `group`, and where
it came from (`source`, `row`).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "validation", "test")
PROMPT_TABLES = ("demonstrations", "prompts", "comparisons")
UNSPLIT = "knowledge"
BATCH_ROWS = 2048
BATCH_CHARACTERS = 1 << 20  # a batch in memory is this much text and its columns, however large the corpus
ROW_GROUP = 1024
COMMON = ("id", "group", "source", "row")
SPEAKER = r"(?:^|\n\n)(?:System|Human|Assistant):"  # of a transcript in hh-rlhf's form; read by re and by RE2


def schema(key: str, columns: tuple[str, ...] = (), scores: bool = False) -> pa.Schema:
    """Columns of a table. `columns` are the text columns of a task; its labels are classes, or real `scores`."""
    import pyarrow as pa

    text, message = pa.string(), pa.struct([("role", pa.string()), ("content", pa.string())])
    own = {
        "corpus": [("text", text)],
        "demonstrations": [("kind", text), ("messages", pa.list_(message))],
        "prompts": [("prompt", text), ("reference", text)],
        "comparisons": [
            *(("prompt", text), ("responses", pa.list_(text)), ("ranks", pa.list_(pa.int32()))),
            *(("labeler", text), ("votes", pa.list_(pa.int32()))),
        ],
        "knowledge": [("title", text), ("text", text), ("url", text)],
        "queries": [
            *(("kind", text), ("query", text), ("target", text)),
            *(("answers", pa.list_(text)), ("referrer", text)),
        ],
    }.get(key)
    if own is None:
        own = [(name, pa.list_(text) if name == "choices" else text) for name in columns]
        own += [("label", pa.float64() if scores else pa.int64()), ("label_text", text)]
    return pa.schema([("id", text), ("group", text), ("source", text), ("row", pa.int64()), *own])


def normalised(text: str) -> str:
    """What two texts must share to count as the same: NFKC, case folded, white space collapsed."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(plain.casefold().split())


def key_of(text: str) -> int:
    """64-bit hash of a text, the same on every machine and run."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def whole_text(key: str, row: dict[str, Any]) -> str:
    """Everything of a row that makes two rows the same example, one part a line."""
    if key == "demonstrations":
        return "\n".join(message["content"] for message in row["messages"])
    if key == "prompts":
        return str(row["prompt"])  # asked once, whatever answers people wrote to it: the first reference stays
    if key == "comparisons":
        judged = [str(row["ranks"]), row["labeler"] or ""]
        return "\n".join([row["prompt"], *row["responses"], *judged])
    if key == "queries":
        return f"{row['query']}\n{row['target'] or ''}"
    if key == "knowledge":
        return f"{row['title']}\n{row['text']}"
    skipped = {*COMMON, "label", "label_text"}
    parts = [row[name] for name in row if name not in skipped]
    return "\n".join("\n".join(part) if isinstance(part, list) else part for part in parts)


def prompt_text(key: str, row: dict[str, Any]) -> str | None:
    """The prompt that must stay on one side in all tables, of a query its target; None in a table without prompts.

    A conversation is the same prompt whether it came as messages (demonstrations) or as a transcript: speakers'
    names are left out. Where comparisons have no prompt, the responses in any order: A over B and B over A belong
    together.
    """
    if key == "demonstrations":
        return re.sub(SPEAKER, "\n", "\n".join(message["content"] for message in row["messages"][:-1]))
    if key == "comparisons" and not row["prompt"]:
        return "\n".join(sorted(row["responses"]))
    if key == "queries":
        target: str | None = row["target"]
        return target
    return re.sub(SPEAKER, "\n", row["prompt"]) if key in PROMPT_TABLES else None


def flat(key: str, batch: pa.Table) -> pa.Table:
    """A table's texts as plain columns, computed column by column: what is validated and compared.

    `text` is the whole example, `prompt` the prompt (prompt tables), `completion` the last message.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    batch = batch.combine_chunks()
    columns = {name: batch[name] for name in COMMON}
    if key == "demonstrations":
        messages = pa.concat_arrays(batch["messages"].chunks or [pa.array([], batch.schema.field("messages").type)])
        ends = messages.offsets.to_numpy() - messages.offsets[0].as_py()
        contents = messages.flatten().field("content")
        earlier = np.ones(len(contents), bool)
        earlier[ends[1:] - 1] = False
        heads = pa.ListArray.from_arrays((ends - np.arange(len(ends))).astype(np.int32), contents.filter(earlier))
        columns["prompt"] = pc.binary_join(heads, "\n")
        columns["completion"] = contents.take(pa.array(ends[1:] - 1))
        columns["text"] = pc.binary_join(pa.ListArray.from_arrays(ends.astype(np.int32), contents), "\n")
        return pa.table(columns)
    own = [name for name in batch.column_names if name not in {*COMMON, "votes"}]
    columns |= {name: batch[name] for name in own if name != "text"}
    judged = {"label", "label_text", "url", "kind", "answers", "referrer", "labeler", "ranks", "reference"}
    parts = [batch[name] for name in own if name not in judged]
    texts = [pc.binary_join(part, "\n") if pa.types.is_list(part.type) else part for part in parts]
    # A query without a target is the query and an empty line, as in `whole_text`.
    joined = pc.binary_join_element_wise(*texts, "\n", null_handling="replace", null_replacement="")
    columns["text"] = texts[0] if len(texts) == 1 else joined
    return pa.table(columns)


class Staged:
    """Rows of one table on their way: appended to a scratch file, read back batch by batch in the same order."""

    def __init__(self, place: Path, schema: pa.Schema) -> None:
        self.place, self.schema = place, schema
        self._rows: list[dict[str, Any]] = []
        self._characters = 0
        self._writer: Any = None

    def add(self, row: dict[str, Any], characters: int) -> None:
        """Append a row of about so many characters."""
        self._rows.append(row)
        self._characters += characters
        if len(self._rows) >= BATCH_ROWS or self._characters >= BATCH_CHARACTERS:
            self._flush()

    def close(self) -> None:
        """No more rows."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._writer is None:
            self.place.parent.mkdir(parents=True, exist_ok=True)
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            self._writer = pa.ipc.new_stream(self.place, self.schema, options=options)
        if self._rows:
            columns = [pa.array([row[f.name] for row in self._rows], f.type) for f in self.schema]
            self._writer.write_batch(pa.record_batch(columns, schema=self.schema))
        self._rows, self._characters = [], 0

    def batches(self) -> Iterator[tuple[int, pa.Table]]:
        """`(number of the first row, batch)` in the order of `add`."""
        import pyarrow as pa

        first = 0
        with pa.OSFile(str(self.place)) as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                yield first, pa.Table.from_batches([batch])
                first += batch.num_rows


class Published:
    """A Parquet file of row groups of one fixed size, so that the same rows are the same bytes."""

    def __init__(self, place: Path, schema: pa.Schema) -> None:
        import pyarrow.parquet as pq

        place.parent.mkdir(parents=True, exist_ok=True)
        self.place, self.rows = place, 0
        self._waiting: list[pa.Table] = []
        self._count = 0
        self._writer = pq.ParquetWriter(place, schema, compression="zstd", compression_level=3)

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        import pyarrow as pa

        self._waiting.append(table)
        self._count += table.num_rows
        self.rows += table.num_rows
        if self._count >= ROW_GROUP:
            held = pa.concat_tables(self._waiting)
            whole = self._count - self._count % ROW_GROUP
            self._write(held.slice(0, whole))
            # A slice would keep the whole batch alive; `take` copies the few rows that stay.
            self._waiting = [held.take(pa.array(range(whole, self._count), pa.int64()))]
            self._count -= whole

    def close(self) -> None:
        """Write what waits and the footer."""
        import pyarrow as pa

        if self._count:
            self._write(pa.concat_tables(self._waiting))
        self._writer.close()

    def _write(self, table: pa.Table) -> None:
        """Row group by row group, each in one piece: pages end where pieces do, which is where rows happened to."""
        for first in range(0, table.num_rows, ROW_GROUP):
            self._writer.write_table(table.slice(first, ROW_GROUP).combine_chunks(), row_group_size=ROW_GROUP)


def row_groups(place: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A published file, one row group in memory at a time."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(place) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, columns)
