"""A few numbers a row, read back from the Parquet files that were written: what the leak check works on.

Independent of how rows were told apart before: texts come from the files, are normalised column by column by
Arrow, and hashed by pandas. 33 bytes a row, on disk; what must be looked at together comes in parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core.scratch import Records, parts_of
from pipelines.core.tables import PROMPT_TABLES, SPEAKER, SPLITS, UNSPLIT, flat, row_groups

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import NDArray

HASHES = ("id", "text", "prompt")
KIND = [*((name, "u8") for name in HASHES), ("side", "i1"), ("source", "i4"), ("row", "i4")]


class Facts:
    """`id`, `text`, `prompt` (64-bit hashes, 0: none), `side`, `source`, `row` of every row below a table's folder."""

    def __init__(self, folder: Path, key: str, scratch: Path) -> None:
        self.folder, self.key = folder, key
        self._files = ["all"] if key == UNSPLIT else list(SPLITS)
        self._sources: dict[str, int] = {}
        self._records = Records(scratch, KIND)
        for side, name in enumerate(self._files):
            for rows in row_groups(folder / f"{name}.parquet"):
                self._records.append(self._numbers(rows, side))

    @property
    def rows(self) -> int:
        """How many rows the table has."""
        return self._records.count

    def frames(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Chunks in which a table can be judged and what each is for, as `fact_expectations` knows it.

        A table of one part can be judged as a whole (empty). In a larger one rows of the same id are together, then
        those of the same text, and last comes the side of all rows, a byte each.
        """
        import numpy as np
        import pandas as pd

        parts = parts_of(self.rows)
        if parts == 1:
            yield "", self.part("id", 0, 1)
            return
        for part in range(parts):
            yield "id", self.part("id", part, parts)
        for part in range(parts if self.key != UNSPLIT else 0):
            yield "text", self.part("text", part, parts, given=True)
        yield "side", pd.DataFrame({"side": np.concatenate([block["side"] for _, block in self._records.blocks()])})

    def part(self, field: str, part: int, parts: int, given: bool = False) -> pd.DataFrame:
        """One part of the rows, by their place in the table: see `Records.part`."""
        import pandas as pd

        places, records = self._records.part(field, part, parts, given)
        columns = {name: records[name] for name in (*HASHES, "side", "row")}
        codes: NDArray[np.int32] = records["source"]
        sources = pd.Categorical.from_codes(codes, categories=pd.Index(list(self._sources)))
        return pd.DataFrame({**columns, "source": sources}, index=places)

    def repeated_ids(self, most: int) -> list[str]:
        """The first few rows whose id another row of the table has, as `source, row N: id "..."`."""
        parts = parts_of(self.rows)
        chosen: list[int] = []
        for part in range(parts):
            frame = self.part("id", part, parts)
            chosen = sorted([*chosen, *frame.index[frame["id"].duplicated(keep=False)][:most].tolist()])[:most]
        found, first = [], 0
        for name in self._files:
            for batch in row_groups(self.folder / f"{name}.parquet", ["id", "source", "row"]):
                here = [place - first for place in chosen if first <= place < first + batch.num_rows]
                shown = batch.take(here).to_pylist() if here else []
                found += [f'{row["source"]}, row {row["row"]}: id "{row["id"]}"' for row in shown]
                first += batch.num_rows
        return found

    def _numbers(self, batch: pa.Table, side: int) -> NDArray[np.void]:
        import numpy as np

        table = flat(self.key, batch)
        records = np.zeros(table.num_rows, self._records.kind)
        records["id"] = _hashed(table["id"], fold=False)
        if self.key != "comparisons":  # the same responses may be judged twice: comparisons leak by their prompts
            records["text"] = _hashed(table["text"])
        if self.key in PROMPT_TABLES:
            records["prompt"] = _hashed(_prompts(table))
        records["side"] = side
        names = table["source"].to_pylist()
        records["source"] = [self._sources.setdefault(name, len(self._sources)) for name in names]
        records["row"] = table["row"].to_numpy()
        return records


def together(tables: list[Facts], field: str) -> Iterator[pd.DataFrame]:
    """Rows of some tables that have a `field`, in parts of bounded size; those with the same are in one part."""
    import pandas as pd

    parts = parts_of(sum(table.rows for table in tables))
    for part in range(parts):
        yield pd.concat([table.part(field, part, parts, given=True) for table in tables], ignore_index=True)


def _prompts(table: pa.Table) -> pa.ChunkedArray:
    """Prompts without speakers' names; for comparisons without one, their responses in sorted order."""
    import pyarrow as pa
    import pyarrow.compute as pc

    prompts = pc.replace_substring_regex(table["prompt"], SPEAKER, "\n")
    if "responses" not in table.column_names or "" not in prompts.unique().to_pylist():
        return prompts
    pairs = zip(prompts.to_pylist(), table["responses"].to_pylist(), strict=True)
    return pa.chunked_array(
        [pa.array([prompt or "\n".join(sorted(answers)) for prompt, answers in pairs], pa.string())]
    )


def _hashed(texts: pa.ChunkedArray, fold: bool = True) -> NDArray[np.uint64]:
    """64-bit hashes of texts (NFKC, lower case, white space collapsed unless `fold` is False). [rows]"""
    import pandas as pd
    import pyarrow.compute as pc

    if fold:
        texts = pc.utf8_lower(pc.utf8_normalize(texts, "NFKC"))
        # Split and join is twice as fast as a regular expression.
        texts = pc.binary_join(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(texts)), " ")
    return pd.util.hash_array(texts.to_numpy(), categorize=False)
