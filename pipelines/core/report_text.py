"""Markdown of the report: what comes from data is escaped here, whoever wrote it and whatever it holds.

In: names, numbers and texts. Out: Markdown (CommonMark with GitHub's tables) in which they say what they are
and do nothing: no link, no raw HTML, no table or heading of their own, no character that moves the ones around it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARKUP = re.compile(r"([\\`*_{}\[\]<>#~&!])")
_CODE = re.compile(r"((?<!`)(`+)(?!`).*?(?<!`)\2(?!`))")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_FENCE = re.compile(r" {0,3}(```|~~~)")
_HEADING = re.compile(r"(#{1,6})(?=\s)")
# Marks that turn the direction of the text after them, and what no UTF-8 page may hold.
_TURNING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFFFE, 0xFFFF}


def visible(text: str) -> str:
    """The text with each control character as its picture; tabs and newlines stay."""
    return "".join(character if character in "\n\t" else _picture(ord(character)) for character in text)


def words(text: str) -> str:
    """A text as prose on one line, no character of it markup."""
    return _MARKUP.sub(r"\\\1", " ".join(visible(text).split()))


def code(text: str) -> str:
    """A text on one line as a code span, however many backticks it holds."""
    line = visible(text).replace("\n", "⏎").replace("\t", " ")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    padding = " " if not line.strip() or line[0] in "` " or line[-1] in "` " else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table. Cells are Markdown; those of the columns `right` (from 0) are aligned to the right."""
    marks = ["---:" if column in right else "---" for column in range(len(head))]
    lines = [head, marks, *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def embedded(page: str, levels: int) -> str:
    """A Markdown page of an artifact as a part of another: its front matter and first title removed, its other
    headings `levels` deeper, its raw HTML and links shown as text."""
    lines: list[str] = []
    fence = ""
    titled = False
    for line in _FRONT_MATTER.sub("", visible(page)).split("\n"):
        mark = _FENCE.match(line)
        if mark and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
            lines.append(line)
        elif fence:
            lines.append(line)
        elif not titled and line.startswith("# "):
            titled = True
        else:
            lines.append(_HEADING.sub(lambda match: match[1] + "#" * min(levels, 6 - len(match[1])), _inert(line)))
    return "\n".join(lines).strip()


def number(value: float) -> str:
    """Four significant digits; whole numbers and large ones in full."""
    if value == int(value) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    if abs(value) >= 1000:
        return f"{value:,.1f}"
    return f"{value:#.4g}" if abs(value) >= 0.01 else f"{value:.3g}"


def figure(key: str, value: float) -> str:
    """A metric's value as people read it: a share in per cent, everything else as `number`."""
    return f"{value:.1%}" if key.endswith("_share") else number(value)


def interval(low: float, high: float) -> str:
    """The ends of an interval."""
    return f"{number(low)} to {number(high)}"


def _inert(line: str) -> str:
    """Outside code spans, no raw HTML, no link, no image."""
    pieces = _CODE.split(line)
    # split() gives text, whole code span, its fence, text, ...
    return "".join(
        piece.replace("<", r"\<").replace("](", r"]\(") if index % 3 == 0 else piece if index % 3 == 1 else ""
        for index, piece in enumerate(pieces)
    )


def _picture(point: int) -> str:
    if point < 0x20:
        return chr(0x2400 + point)
    if point == 0x7F:
        return "\u2421"
    if 0x80 <= point < 0xA0 or 0xD800 <= point < 0xE000 or point in _TURNING:
        return "\ufffd"
    return chr(point)
