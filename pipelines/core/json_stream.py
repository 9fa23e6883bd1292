"""Values out of a long JSON text, one at a time, without holding the text whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import IO, Any

from pipelines.core.errors import DataError
from pipelines.core.faults import SHOWN_CHARACTERS, shown

BLOCK = 1 << 20
LARGEST_VALUE = 1 << 26  # characters of one record
WHITE_SPACE = re.compile(r"\s*")


class JsonStream:
    """A reader that stands somewhere in the text and knows its line. A fault is a `DataError`."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self.decoder = json.JSONDecoder()

    def _more(self) -> bool:
        """Append a block; what was read already goes."""
        try:
            block = self.file.read(BLOCK)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}, after row {self.line}: not UTF-8 ({error.reason})") from None
        self.text, self.at = self.text[self.at :] + block, 0
        self.ended = not block
        return bool(block)

    def _pass(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            match = WHITE_SPACE.match(self.text, self.at)
            self._pass(match.end() if match else self.at)
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def take(self, accepted: str, told: str) -> str:
        """One of some characters."""
        found = self.peek()
        if not found or found not in accepted:
            raise self.broken(f"found {found!r}" if found else "the file ends", told)
        self._pass(self.at + 1)
        return found

    def value(self) -> Any:
        """One JSON value."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                why, place = str(error), 0  # nested too deeply, or a number of too many digits
                if isinstance(error, json.JSONDecodeError):
                    why, place = error.msg, error.pos - self.at
                    # A value that merely goes on in the next block looks broken too, until the file has ended.
                    if not self.ended and len(self.text) - self.at < LARGEST_VALUE and self._more():
                        continue
                line = self.line + self.text.count("\n", self.at, self.at + place)
                raise self.broken(why, "JSON", line) from None
            # A number may go on in the next block; everything else ends with its own last character.
            if end == len(self.text) and not self.ended and self._more():
                continue
            self._pass(end)
            return value

    def broken(self, found: str, told: str, line: int | None = None) -> DataError:
        """The fault at the place where the reader stands."""
        near = shown(self.text[self.at : self.at + SHOWN_CHARACTERS])
        return DataError(
            f"{self.path}, row {line or self.line}: broken JSON ({found}) near {near}; accepted: {told}. "
            "What follows cannot be read: mend the file, or write one object a line (.jsonl)."
        )
