"""One raw record seen through its source's mapping of columns, and the kinds of value a field may hold.

Every refusal is a `BadRow` that names the file's own column, what was found and what is accepted.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from pipelines.core.faults import BadRow, shown
from pipelines.core.readers import Cells
from pipelines.core.transcripts import ANSWER, ROLES, SPEAKERS, with_our_line_ends

TURNS = re.compile(
    r"""\s*\[\s*\{\s*["'](?:role|content)["']\s*:"""
)  # how a cell of messages begins, as JSON or Python's
SPELLED = re.compile(r"(?<=\n\n)(?=(?:System|Human|Assistant):)")  # in a message, where it names no speaker


class Fields:
    """One record seen through its source's mapping. Every refusal names the file's own column."""

    def __init__(self, record: Mapping[str, Any], columns: Mapping[str, str | None]) -> None:
        self.record, self.columns = record, columns

    def column(self, field: str) -> str:
        """The file's column of a field."""
        return self.columns.get(field) or field

    def has(self, field: str) -> bool:
        """Whether the record has the field's column, or must have it because it is mapped; to null: it has none."""
        return self.columns[field] is not None if field in self.columns else field in self.record

    def maps(self, *fields: str) -> bool:
        """Whether the source names a column for one of the fields."""
        return any(self.columns.get(field) is not None for field in fields)

    def means(self, form: tuple[str, ...], other: tuple[str, ...]) -> bool:
        """Whether a record with columns of two forms has the first: what is mapped is meant, else what is given.

        The first field of each form is the one that has to be there.
        """
        if not self.has(form[0]):
            return False
        if self.maps(*form) != self.maps(*other):
            return self.maps(*form)
        return self.given(form[0]) or not self.given(other[0])

    def value(self, field: str) -> Any:
        """The value as it is; a missing column is refused. `answers.text` is a field of the object in `answers`."""
        column = self.column(field)
        if column in self.record:
            return self.record[column]
        found: Any = self.record
        for part in column.split("."):
            if found is None:
                return None
            if not isinstance(found, Mapping) or part not in found:
                there = ", ".join(map(str, self.record)) or "none"
                remedy = f"a column {column!r}, or columns: {{{field}: COLUMN}} in params.yaml"
                raise BadRow(column, f"no such column (there are: {there})", remedy)
            found = found[part]
        return found

    def known(self, field: str) -> Any:
        """The value, None where the record has no such column; a mapped one must be there."""
        return self.value(field) if self.has(field) else None

    def given(self, field: str) -> bool:
        """Whether the field is there and not empty, as those of the other kind are in a table of two kinds of rows."""
        value = self.known(field)
        return value is not None and not (value == "" and isinstance(self.record, Cells))

    def text(self, field: str) -> str:
        """Text that is not blank."""
        return filled(self.value(field), self.column(field))

    def optional(self, field: str) -> str | None:
        """Text, or None where the column is missing, null or (CSV) empty."""
        return self.key(field) if self.given(field) else None

    def key(self, field: str) -> str:
        """Text or a whole number: an identifier."""
        value = counted(self.value(field))
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise BadRow(self.column(field), shown(value), "text or a whole number")
        return self.text(field)

    def said(self, field: str) -> Any:
        """A text, or messages; a cell of a CSV file that begins as messages do has to be them, written as JSON."""
        value = self.value(field)
        if isinstance(self.record, Cells) and TURNS.match(value):
            return self.items(field)
        return with_our_line_ends(value) if isinstance(value, str) else value

    def texts(self, field: str) -> list[str] | None:
        """One text or a list of them (in a CSV file as JSON), or None as in `optional`; an empty list is refused."""
        if not self.given(field):
            return None
        value = self.value(field)
        if isinstance(value, list) or (isinstance(self.record, Cells) and value.startswith("[")):
            value = self.items(field)
            if not value:
                raise BadRow(self.column(field), "an empty list", "at least one text, or null")
            return [filled(item, self.column(field)) for item in value]
        return [filled(value, self.column(field))]

    def items(self, field: str) -> list[Any]:
        """A list; in a CSV file it is written as JSON."""
        value = self.value(field)
        if isinstance(self.record, Cells):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise BadRow(self.column(field), shown(value), "in a CSV file, a list written as JSON") from None
        if not isinstance(value, list):
            raise BadRow(self.column(field), shown(value), "a list")
        return value


def filled(value: Any, column: str) -> str:
    """Text that is not blank and that UTF-8 can write.

    Raises:
        BadRow: anything else.
    """
    if not isinstance(value, str):
        raise BadRow(column, shown(value), "text")
    if not value.strip():
        raise BadRow(column, "empty text" if not value else "blank text", "text that is not empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"half a character (a lone surrogate) at position {error.start + 1} of {shown(value)}"
        raise BadRow(column, half, "text that UTF-8 can write") from None
    return value


def one_name(text: str) -> str:
    """A person's name as it is compared: composed (NFC), no blanks around it. Two spellings would be two labelers."""
    return unicodedata.normalize("NFC", text).strip()


def conversation(value: Any, column: str) -> list[dict[str, str]]:
    """A conversation: `[{role, content}, ...]` with known roles and contents that are not empty."""
    if not isinstance(value, list) or not value:
        raise BadRow(column, shown(value), "a list of messages, at least one")
    messages = []
    for place, message in enumerate(value, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise BadRow(column, f"message {place}: {shown(message)}", f"role (one of {', '.join(ROLES)}) and content")
        content = filled(message.get("content"), f"{column}, content of message {place}")
        messages.append({"role": message["role"], "content": content})
    return messages


def prompt_of(value: Any, column: str) -> str:
    """A prompt as text: itself, one user message's content, or a transcript in hh-rlhf's form."""
    if isinstance(value, str) or not isinstance(value, list):
        return filled(value, column)
    return transcript(conversation(value, column), column)


def transcript(messages: list[dict[str, str]], column: str) -> str:
    """A conversation that waits for an answer, as text: one user message's content, or hh-rlhf's form, in which a
    space keeps what a message quotes from opening a turn.
    """
    if not messages or messages[-1]["role"] != "user":
        raise BadRow(column, "messages whose last is not the user's", "a conversation that waits for an answer")
    if len(messages) == 1:
        return messages[0]["content"]
    return "".join(f"\n\n{SPEAKERS[m['role']]}: {SPELLED.sub(' ', m['content'])}" for m in messages) + ANSWER


def counted(value: Any) -> Any:
    """A whole number that is written as 3.0, as pandas does in a column with gaps, as 3; anything else as it is."""
    exact = isinstance(value, float) and value.is_integer() and abs(value) <= 2**53  # beyond, neighbours are one float
    return int(value) if exact else value


def whole(item: Any, low: int) -> bool:
    """Whether a value is a whole number (not a boolean) of at least `low` that 32 bits hold."""
    return isinstance(item, int) and not isinstance(item, bool) and low <= item < 2**31
