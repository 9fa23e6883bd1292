"""Bad rows: what is wrong with one, and what becomes of all of them.

`refuse`: nothing of the data is taken; the first ten bad rows of a source are reported at once, so that a
person mends them together. `quarantine`: they are written aside with the reason, counted, and refused all the
same when they are more than the budget.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines.core.errors import DataError

SHOWN_ROWS = 10
SHOWN_CHARACTERS = 60
FLUSH_ROWS = 1024


class BadRow(Exception):
    """One row that is not what its table needs: the column, what was found there, what is accepted."""

    def __init__(self, column: str, found: str, accepted: str, raw: str | None = None) -> None:
        super().__init__(writable(f"found {found}; accepted: {accepted}"))
        self.column = writable(column)
        self.raw = None if raw is None else writable(raw)


def writable(text: str) -> str:
    """Text that UTF-8 can write: halves of characters (lone surrogates) are spelled out, `\\ud83d`."""
    return text.encode("utf-8", "backslashreplace").decode()


def shown(value: Any) -> str:
    """A short, one-line form of any value, for a message."""
    if value is None:
        return "null"
    kind = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number", str: "text"}
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    text = json.dumps(text, ensure_ascii=False) if isinstance(value, str) else text
    short = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
    return f"{kind.get(type(value), type(value).__name__)} {short}"


@dataclass
class Ledger:
    """Counts rows, keeps the bad ones. `place` is where quarantined rows wait (Parquet)."""

    policy: Literal["refuse", "quarantine"]
    budget: float
    place: Path
    good: int = 0
    bad: int = 0
    _messages: list[str] = field(default_factory=list)
    _aside: list[dict[str, Any]] = field(default_factory=list)
    _writer: Any = None

    def refuse(self, source: str, where: str, row: int, fault: BadRow, raw: str) -> None:
        """Note a bad row. `source` is the name in the outputs, `where` the path a person opens.

        Raises:
            DataError: under `refuse`, at the tenth bad row of a source.
        """
        self.bad += 1
        if len(self._messages) < SHOWN_ROWS:
            self._messages.append(f"{where}, row {row}, column {fault.column}: {fault}")
        if self.policy == "quarantine":
            self._aside.append(
                {"source": source, "row": row, "column": fault.column, "reason": str(fault), "raw": fault.raw or raw}
            )
            if len(self._aside) >= FLUSH_ROWS:
                self._flush()
        elif len(self._messages) == SHOWN_ROWS:
            self.end_of_source()

    def end_of_source(self) -> None:
        """Refuse the source if it had bad rows and the policy says so.

        Raises:
            DataError: one line for each of the first ten bad rows.
        """
        if self.policy == "refuse" and self._messages:
            more = "\n(perhaps more: reading stopped here)" if len(self._messages) == SHOWN_ROWS else ""
            raise DataError(
                "\n".join(self._messages) + more + "\nMend these rows, or set data.on_bad_row: quarantine in "
                "params.yaml to go on without them. Nothing was written."
            )

    @property
    def share(self) -> float:
        """Bad rows as a share of all rows read."""
        return self.bad / max(self.bad + self.good, 1)

    def finish(self) -> Path | None:
        """End of all sources: the file of quarantined rows, if there are any.

        Raises:
            DataError: the bad rows are more than the budget.
        """
        if self.share > self.budget:
            raise DataError(
                "\n".join(self._messages) + f"\n{self.bad} of {self.bad + self.good} rows are bad ({self.share:.2%}); "
                f"data.quarantine_budget accepts {self.budget:.2%}. Mend the rows or raise the budget. "
                "Nothing was written."
            )
        self._flush()
        if self._writer is None:
            return None
        self._writer.close()
        return self.place

    def _flush(self) -> None:
        """Append the waiting rows to the file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._aside:
            return
        columns = [("source", pa.string()), ("row", pa.int64()), ("column", pa.string())]
        schema = pa.schema([*columns, ("reason", pa.string()), ("raw", pa.string())])
        if self._writer is None:
            self.place.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self.place, schema, compression="zstd")
        self._writer.write_table(pa.Table.from_pylist(self._aside, schema=schema))
        self._aside.clear()
