"""Text for a terminal: what a document or a model says may hold signs that steer one.

They clear the screen, rename the window, fill the clipboard, or turn the direction of the line that they stand in.
"""

from __future__ import annotations

import io

# Control characters, and marks that turn the direction of the text after them.
STEERING = [code for code in (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
            if chr(code) not in "\n\t"]  # fmt: skip
_NOTHING = dict.fromkeys(STEERING)


def clean(text: str) -> str:
    """A text without what steers."""
    return text.translate(_NOTHING)


def harmless(file: io.TextIOWrapper) -> io.TextIOWrapper:
    """A text file in the place of another one, which nobody may write to any more: it leaves out what steers."""
    encoding, errors, lines = file.encoding, file.errors, file.line_buffering
    return _Harmless(file.detach(), encoding=encoding, errors=errors, line_buffering=lines)


class _Harmless(io.TextIOWrapper):
    def write(self, text: str, /) -> int:
        super().write(clean(text))
        return len(text)
