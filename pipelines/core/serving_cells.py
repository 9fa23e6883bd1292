"""Cells of what a served model is asked. Logged beside every file that serves: it imports nothing of the project."""

from __future__ import annotations

from typing import Any


def text(value: Any, number: int, column: str) -> str:
    """The text of a cell.

    Raises:
        ValueError: the cell is empty, or holds something else, or half a character, as JSON can.
    """
    if not isinstance(value, str):
        raise ValueError(f"row {number}: column {column} holds {value!r}; accepted: a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise ValueError(f"row {number}: column {column} holds {half!r}, half a character; accepted: a text") from None
    return value


def texts(value: Any, number: int, column: str) -> list[str]:
    """The texts of a cell that holds a list.

    Raises:
        ValueError: the cell is empty, or holds something else, as a list or in it.
    """
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ValueError(f"row {number}: column {column} holds {value!r}; accepted: a list of texts")
    return [text(one, number, column) for one in value]
