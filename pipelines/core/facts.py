"""A few numbers a row, read back from the Parquet files that were written: what the leak check works on.

Independent of how rows were told apart before: texts come from the files, are normalised column by column by
Arrow, and hashed by pandas. 30 bytes a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core.tables import PROMPT_TABLES, SPEAKER, SPLITS, UNSPLIT, flat, row_groups

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import NDArray


def facts(folder: Path, key: str) -> pd.DataFrame:
    """`id`, `text`, `prompt` (64-bit hashes, 0: none), `side`, `source`, `row` of every row below a table's folder."""
    import pandas as pd

    names = ["all"] if key == UNSPLIT else SPLITS
    parts = []
    for side, name in enumerate(names):
        parts += [_numbers(key, rows, side) for rows in row_groups(folder / f"{name}.parquet")]
    joined = pd.concat(parts, ignore_index=True)
    joined["source"] = joined["source"].astype("category")
    return joined


def _numbers(key: str, batch: pa.Table, side: int) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    table = flat(key, batch)
    none = np.zeros(table.num_rows, np.uint64)
    return pd.DataFrame(
        {
            "id": _hashed(table["id"], fold=False),
            # The same responses may be judged twice: comparisons leak by their prompts.
            "text": none if key == "comparisons" else _hashed(table["text"]),
            "prompt": _hashed(_prompts(table)) if key in PROMPT_TABLES else none,
            "side": np.full(table.num_rows, side, np.int8),
            "source": pd.Categorical(table["source"].to_pandas()),
            "row": table["row"].to_numpy().astype(np.int32),
        }
    )


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


def repeated_ids(folder: Path, key: str, frame: pd.DataFrame, most: int) -> list[str]:
    """The first few rows whose id another row of the table has, as `source, row N: id "..."`."""

    chosen = frame.index[frame["id"].duplicated(keep=False)][:most].tolist()
    found, first = [], 0
    for name in ("all",) if key == UNSPLIT else SPLITS:
        for batch in row_groups(folder / f"{name}.parquet", ["id", "source", "row"]):
            here = [place - first for place in chosen if first <= place < first + batch.num_rows]
            found += (
                [f'{r["source"]}, row {r["row"]}: id "{r["id"]}"' for r in batch.take(here).to_pylist()] if here else []
            )
            first += batch.num_rows
    return found
