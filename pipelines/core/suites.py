"""What every table must fulfil, as Great Expectations' expectations: row by row, as a whole, and across tables."""

from __future__ import annotations

import sys
from typing import Any

from pipelines.core.tables import SPLITS

LONGEST_TEXT = 1_000_000  # characters of one example; a longer one is a whole file by mistake
UNREADABLE_SHARE = 0.02  # replacement and control characters: more of them is a wrong encoding or binary data
REQUIRED = {
    "corpus": ("text",),
    "demonstrations": ("prompt", "completion"),
    "prompts": ("prompt",),
    "comparisons": ("text",),
    "knowledge": ("title", "text"),
    "queries": ("kind", "query"),
}


def row_expectations(key: str, columns: list[str], scores: bool = False) -> list[Any]:
    """What every row of a table must fulfil. `columns` are those of its chunks; `scores`: a task's labels are real."""
    import great_expectations.expectations as gxe

    from pipelines.core.expectations import ExpectRanksToOrderResponses

    table = key.split("/")[0]
    skipped = {"id", "group", "source", "row", "label", "label_text", "choices", "unreadable"}
    required = REQUIRED.get(table) or tuple(name for name in columns if name not in skipped)
    found: list[Any] = [gxe.ExpectTableColumnsToMatchSet(column_set=columns, exact_match=True)]
    for name in dict.fromkeys(("id", "group", *required)):
        found += [
            gxe.ExpectColumnValuesToNotBeNull(column=name),
            gxe.ExpectColumnValuesToBeOfType(column=name, type_="str"),
            gxe.ExpectColumnValueLengthsToBeBetween(column=name, min_value=1, max_value=LONGEST_TEXT),
        ]
    found.append(gxe.ExpectColumnValuesToBeBetween(column="unreadable", max_value=UNREADABLE_SHARE))
    if table == "prompts":
        found += [
            gxe.ExpectColumnValuesToMatchRegex(column="reference", regex=r"\S"),  # null, or an answer
            gxe.ExpectColumnValueLengthsToBeBetween(column="reference", max_value=LONGEST_TEXT),
        ]
    if table == "queries":
        found += [
            gxe.ExpectColumnValuesToMatchRegex(column="target", regex=r"\S"),  # null, or an id
            gxe.ExpectColumnValueLengthsToBeBetween(column="target", max_value=LONGEST_TEXT),
        ]
    if table == "comparisons":
        found.append(ExpectRanksToOrderResponses(column_A="responses", column_B="ranks"))
    if table == "tasks":
        found.append(gxe.ExpectColumnValuesToNotBeNull(column="label"))
        # A score is any finite number, a class or a choice is counted from 0.
        bounds = {"min_value": -sys.float_info.max, "max_value": sys.float_info.max} if scores else {"min_value": 0}
        found.append(gxe.ExpectColumnValuesToBeBetween(column="label", **bounds))
    return found


def fact_expectations(key: str, min_rows: int, about: str) -> list[Any]:
    """What a whole table must fulfil: unique ids, nothing held out in train, enough rows a side.

    `about` picks one of the three (`id`, `text`, `side`), for the chunks of `Facts.frames`; empty: all of them.
    """
    import great_expectations.expectations as gxe
    from great_expectations.expectations.row_conditions import Column

    from pipelines.core.expectations import ExpectHeldOutRowsToBeAbsentFromTrain

    found: dict[str, list[Any]] = {"id": [gxe.ExpectColumnValuesToBeUnique(column="id")]}
    if key == "knowledge":
        found["side"] = [gxe.ExpectTableRowCountToBeBetween(min_value=min_rows)]
    else:
        found["text"] = [ExpectHeldOutRowsToBeAbsentFromTrain(key="text")]
    if key not in ("knowledge", "queries"):  # nothing is trained on queries: they measure retrieval and its answers
        found["side"] = [
            gxe.ExpectTableRowCountToBeBetween(min_value=min_rows, row_condition=Column("side") == SPLITS.index(name))
            for name in ("train", "test")
        ]
    return found.get(about, []) if about else [one for group in found.values() for one in group]


def target_expectations() -> list[Any]:
    """What the targets of queries must fulfil. The column holds those that are no id of a knowledge row, else null."""
    import great_expectations.expectations as gxe

    return [gxe.ExpectColumnValuesToBeNull(column="target")]


def prompt_expectations() -> list[Any]:
    """What demonstrations, prompts and comparisons must fulfil together: no held-out prompt is trained on."""
    from pipelines.core.expectations import ExpectHeldOutRowsToBeAbsentFromTrain

    return [ExpectHeldOutRowsToBeAbsentFromTrain(key="prompt")]
