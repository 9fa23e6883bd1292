"""Files to raw rows: JSONL, JSON, CSV, TSV, Parquet and plain text, each optionally gzipped, one row at a time.

Each reader yields `(row, record)`: the 1-based line on which the row starts (Parquet: its number) and a
dictionary, or the `BadRow` that says why there is none. A fault after which the rest of a file cannot be
trusted (a broken archive, broken JSON inside an array) is a `DataError` at once.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from pipelines.core.errors import DataError
from pipelines.core.faults import BadRow, shown
from pipelines.core.json_stream import BLOCK, JsonStream

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.core.params.data import FileSource

Raw = tuple[int, dict[str, Any] | BadRow]
READERS = {
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), "text"),
}
LARGEST_CELL = 1 << 30
QUOTED = "quoted cells as in RFC 4180; where a quotation mark is text, quotes: false in data.sources"
LINES = "a file of one record a line is named .jsonl"


class Cells(dict[str, Any]):
    """A row of a CSV file: every value is text; a field that holds a list is written as JSON."""


def kind_of(path: Path) -> str | None:
    """The format by the file's extension (before `.gz`), or None."""
    name = path.name.lower().removesuffix(".gz")
    return READERS.get(Path(name).suffix)


def read(path: Path, source: FileSource) -> Iterator[Raw]:
    """Rows of one file of a source, which says how CSV and text files are cut.

    Raises:
        DataError: unknown extension, no such file, empty or unreadable file.
    """
    kind = kind_of(path)
    if kind is None:
        raise DataError(f"{path}: unknown extension; accepted: {', '.join(READERS)}, each also with .gz")
    try:
        with opened(path) as file:
            if not file.peek(1):
                raise DataError(f"{path}: the file is empty; accepted: at least one row. Remove it or fill it.")
            if kind == "jsonl":
                yield from _jsonl(file)
            elif kind == "json":
                yield from _json(file, path)
            elif kind in ("csv", "tsv"):
                yield from _csv(file, path, source.delimiter, source.quotes, "," if kind == "csv" else "\t")
            elif kind == "parquet":
                yield from _parquet(file, path)
            else:
                yield from _text(file, path.name, source.sample_by, source.separator)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}). Copy or download it again.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked if its name ends in `.gz`."""
    with path.open("rb") as file:
        if path.name.lower().endswith(".gz"):
            # GzipFile reads in small steps by itself; the buffer also gives it `peek`.
            yield io.BufferedReader(gzip.GzipFile(fileobj=file), BLOCK)
        else:
            yield file


def _decoded(line: bytes, first: bool) -> str | BadRow:
    """One line as text, without a byte order mark."""
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at position {error.start + 1} of the line"
        return BadRow("(line)", found, "UTF-8", line.decode("utf-8", "backslashreplace"))


def _record(value: Any) -> dict[str, Any] | BadRow:
    """A parsed JSON value as a record."""
    if isinstance(value, dict):
        return value
    return BadRow("(row)", shown(value), 'an object such as {"text": "..."}')


def _jsonl(file: IO[bytes]) -> Iterator[Raw]:
    for number, line in enumerate(file, 1):
        text = _decoded(line, number == 1)
        if isinstance(text, BadRow):
            yield number, text
        elif text.strip():
            try:
                yield number, _record(json.loads(text))
            except (ValueError, RecursionError) as error:
                told = f"at character {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else error
                found = f"broken JSON {told} in {shown(text.strip())}"
                yield number, BadRow("(line)", found, "one JSON object a line", text.rstrip("\n"))


def _json(file: IO[bytes], path: Path) -> Iterator[Raw]:
    """An array of records, or an object of records (its keys become the column `key`), read piece by piece."""
    stream = JsonStream(io.TextIOWrapper(file, encoding="utf-8-sig"), path)
    opening = stream.take("[{", "an array [...] or an object {...} of records")
    closing = "]" if opening == "[" else "}"
    if stream.peek() == closing:
        raise DataError(f"{path}: holds no record; accepted: at least one")
    while True:
        key = None
        if opening == "{":
            key = stream.value()
            stream.take(":", "a colon after the key")
        stream.peek()
        row = stream.line
        value = stream.value()
        record = _record(value)
        if key is not None and isinstance(record, dict):
            record = {"key": key, **record}
        elif key is not None:
            accepted = f'a record such as {{"text": "..."}} under each key; {LINES}'
            record = BadRow("(row)", f"{shown(value)} under the key {shown(key)}", accepted)
        yield row, record
        if stream.take("," + closing, "a comma or the end") == closing:
            break
    if stream.peek():
        told = "one array a file" if opening == "[" else f"one object a file; {LINES}"
        raise stream.broken("more after the end", told)


def _csv(file: IO[bytes], path: Path, given: str | None, quotes: bool, usual: str) -> Iterator[Raw]:
    """Rows under a header line. Quoted cells may hold line ends; blank lines are skipped."""
    delimiter = given or usual
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    faults: list[BadRow] = []
    held: list[str] = []  # lines of the row that is being read

    def lines() -> Iterator[str]:
        for number, line in enumerate(file, 1):
            text = _decoded(line, number == 1)
            if isinstance(text, BadRow):
                faults.append(text)
                text = line.decode("utf-8", "replace")
            held.append(text)
            yield text

    def lost(row: int, found: str, accepted: str) -> Iterator[Raw]:
        # An open quotation mark takes the lines behind it along, which may have been rows of their own.
        for place, line in enumerate(held):
            told = f"{found}, which took this line along, in row {row}" if place else found
            yield row + place, BadRow("(row)", told, accepted, line.rstrip("\r\n"))

    limit = csv.field_size_limit(LARGEST_CELL)
    try:
        reader = csv.reader(lines(), delimiter=delimiter, quoting=quoting, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{path}, row 1: found a header that is broken CSV: {error}; accepted: {QUOTED}") from None
        if len(set(header)) < len(header) or faults:
            raise DataError(f"{path}, row 1: the header {shown(header)} must be UTF-8 with distinct column names")
        if given is None and delimiter == "," and len(header) == 1 and (other := re.search("[;\t|]", header[0])):
            raise DataError(
                f"{path}, row 1: the header is one cell, {shown(header[0])}; accepted: cells with commas between them. "
                f"If these have another mark between them, say so in data.sources: delimiter: {shown(other[0])[5:]}; "
                "if there is one column, delimiter: ','"
            )
        while True:
            row = reader.line_num + 1
            held.clear()
            faults.clear()
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield from lost(row, f"broken CSV: {error}", QUOTED)
                continue
            if cells is None:
                return
            if cells and len(cells) != len(header):
                yield from lost(row, f"{len(cells)} cells", f"{len(header)} cells, as in the header")
            elif faults:
                yield row, faults[0]
            elif cells:
                yield row, Cells(zip(header, cells, strict=True))
    finally:
        csv.field_size_limit(limit)


def _parquet(file: IO[bytes], path: Path) -> Iterator[Raw]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
            for record in _records(batch):
                row += 1
                yield row, record
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}, after row {row}: not a Parquet file that can be read: {error}") from None


def _records(batch: pa.RecordBatch) -> list[dict[str, Any] | BadRow]:
    """A batch as records. Parquet's text need not be UTF-8, nor its times what Python can tell: such rows are bad."""
    try:
        found: list[dict[str, Any] | BadRow] = batch.to_pylist()
        return found
    except (ValueError, OverflowError):
        return [_record_of(batch.slice(place, 1)) for place in range(batch.num_rows)]


def _record_of(row: pa.RecordBatch) -> dict[str, Any] | BadRow:
    record = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            record[name] = column[0].as_py()
        except (ValueError, OverflowError) as error:
            found = f"{column.type} that cannot be read ({error})"
            return BadRow(name, found, "text in UTF-8, times of the years 1 to 9999")
    return record


def _text(file: IO[bytes], name: str, sample_by: str, separator: str | None) -> Iterator[Raw]:
    """Rows `{text, file}`: a document (the whole file, or up to the next separator), a paragraph or a line."""
    first_line = re.compile(separator) if separator else None
    start, held, fault = 1, [], None  # type: int, list[str], BadRow | None

    def done() -> Iterator[Raw]:
        text = "".join(held).strip("\r\n")
        if fault is not None:
            yield start, fault
        elif text.strip():
            yield start, {"text": text, "file": name}

    for number, line in enumerate(file, 1):
        decoded = _decoded(line, number == 1)
        text = decoded if isinstance(decoded, str) else ""
        between = sample_by == "paragraph" and not text.strip() and not isinstance(decoded, BadRow)
        first = first_line is not None and first_line.search(text.rstrip("\r\n")) is not None
        if held and (sample_by == "line" or between or first):
            yield from done()
            held, fault = [], None
        if between:
            continue
        if not held:
            start = number
        held.append(text)
        if isinstance(decoded, BadRow) and fault is None:
            start, fault = number, decoded
    yield from done()
