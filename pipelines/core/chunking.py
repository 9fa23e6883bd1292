"""Documents in, chunks out: spans of a document's text, cut where its structure allows, with the titles above them.

1. A text falls into paragraphs under headings: Markdown's, MediaWiki's, underlined ones (numpydoc, reStructuredText,
   there with a line above, too) and Google's `Args:`. A fenced block is one paragraph: as CommonMark has it, to a line
   of as many of its signs. So is a table.
2. A paragraph that is longer than a chunk falls into sentences, these into lines, these into words, these into pieces;
   a fenced block and a table into lines at once, as a stop in a cell or in quotes ends nothing.
3. Chunks are filled with what comes next. Where a heading follows, a chunk that is half full ends: sections stay whole
   where they can, and do not become chunks of three words where they cannot.
4. A chunk that begins inside a section repeats the end of the one before, whole sentences up to `overlap`.

Spans cover all of a text but blanks. Sizes are tokens of the embedder, or characters where those are more: a token may
stand for a megabyte without a blank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION = 3  # of the cuts: another one makes other chunks
CHARACTERS = 8  # of a token at most, as sizes count it; English has 4
TITLE = 160  # characters of a title path

_UNDERLINE = re.compile(r"\s*([-=~^*+#\"'])\1{2,}\s*")
_MARKDOWN = re.compile(r" {0,3}(#{1,6})\s+(.*)")
_WIKI = re.compile(r"(={2,6})(?!=)(.*)(?<!=)\1\s*")
_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)", re.DOTALL)
_GOOGLE = re.compile(
    r"(Args|Arguments|Parameters|Params|Keyword Args|Keyword Arguments|Other Parameters|Returns?|Yields?|Raises|"
    r"Attributes|Methods|Methods and attributes|Examples?|Notes?|References?|Usage|Warnings?):\s*"
)
_LEVELS = {"=": 1, "-": 2, "~": 3}
_ROW = re.compile(r"\s*(?:\||\+[-=]{2})")  # of a table: Markdown's, a grid of reStructuredText
# Also Arabic, Urdu and Hindi; behind a Chinese or Japanese one its closing bracket.
_SENTENCE = re.compile(
    r"(?<=[.!?؟۔।])[\"')\]]*\s+(?=[^\sa-z])|(?<=[。！？])(?![。！？」』”’）])|(?<=[。！？][」』”’）])"
)
_LINE = re.compile(r"(?<=\n)")
_WORD = re.compile(r"(?<=\s)(?=\S)")
_CUTS = (_SENTENCE, _LINE, _WORD)

Sizes = Callable[[int, int], int]  # tokens of a span


class Chunk(NamedTuple):
    """A span of a document's text."""

    title: str  # path: the document's title, then the headings above
    start: int
    end: int


class _Piece(NamedTuple):
    """What is never cut: its span, its section, and whether a heading opens it."""

    start: int
    end: int
    section: int
    opens: bool


def chunks(title: str, text: str, tokens: NDArray[np.int64], size: int, overlap: float) -> list[Chunk]:
    """The chunks of a document, in order. None for a document without a title and without text.

    Args:
        tokens: where the tokens of the text begin, in characters, ascending.
        size: of a chunk at most, in tokens.
        overlap: share of `size` that a chunk may repeat of the one before, in [0, 1).
    """
    if not text.strip():
        return [Chunk(title.strip()[:TITLE], 0, 0)] if title.strip() else []

    def measure(start: int, end: int) -> int:
        inside = int(np.searchsorted(tokens, end) - np.searchsorted(tokens, start))
        return max(inside, -(-(end - start) // CHARACTERS), 1)

    paths: list[str] = []
    pieces: list[_Piece] = []
    for path, opens, start, end, verbatim in _paragraphs(title, text):
        if opens or not paths:
            paths.append(path)
        spans = _cut(text, start, end, size, measure, _CUTS.index(_LINE) if verbatim else 0)
        pieces += [_Piece(*span, len(paths) - 1, opens and not at) for at, span in enumerate(spans)]
    runs = _filled(pieces, size, int(overlap * size), measure)
    return [Chunk(paths[run[0].section], run[0].start, run[-1].end) for run in runs]


def signature(title: str, text: str) -> int:
    """Where an opening paragraph ends that only repeats the title, alone or with arguments and what comes back:
    `area(w, h) -> float`. 0 where none does.
    """
    opening = text[: end if (end := text.find("\n\n")) >= 0 else len(text)]
    if not title or not opening.startswith(title):
        return 0
    rest, depth = opening[len(title) :].strip(), 0
    if rest.startswith("("):
        for place, letter in enumerate(rest):
            depth += (letter == "(") - (letter == ")")
            if not depth:
                rest = rest[place + 1 :].strip()
                break
    return len(opening) if not rest or rest.startswith("->") else 0


def _filled(pieces: Sequence[_Piece], size: int, overlap: int, measure: Sizes) -> Iterator[list[_Piece]]:
    """Runs of pieces, each one chunk; the first pieces of a run may be the last of the one before."""
    run: list[_Piece] = []
    fresh = 0
    for piece in pieces:
        if run and (
            measure(run[0].start, piece.end) > size or (piece.opens and 2 * measure(run[0].start, run[-1].end) > size)
        ):
            yield run
            kept: list[_Piece] = []
            for last in reversed(run[len(run) - fresh :]):
                # A repeated end belongs to the section that goes on, and leaves room for what is new
                repeated = measure(last.start, run[-1].end)
                if piece.opens or last.section != piece.section or repeated > overlap:
                    break
                if measure(last.start, piece.end) > size:
                    break
                kept.insert(0, last)
            run, fresh = kept, 0
        run.append(piece)
        fresh += 1
    if run:
        yield run


def _paragraphs(title: str, text: str) -> Iterator[tuple[str, bool, int, int, bool]]:
    """(title path, whether a heading opens it, start, end, whether it is code or a table) of paragraphs; a heading
    belongs to what follows it.
    """
    above: list[tuple[int, str]] = []
    lines = text.splitlines(keepends=True)
    path, opens, start, at = _path(title, above), False, -1, 0
    end, fence = -1, ""
    bare = verbatim = False  # nothing but a heading yet; code or a table
    for number, line in enumerate(lines):
        before, fence = fence, _fence(lines, number, fence)
        found = None if before or fence else _heading(lines, number)
        kind = bool(before or fence or _ROW.match(line))
        other = kind != verbatim and not (bare or before)
        if start >= 0 and not before and (found or other or not (bare or line.strip())):
            yield path, opens, start, end, verbatim
            start, opens = -1, False
        if found:
            above = [*(one for one in above if one[0] < found[0]), found]
            path, opens = _path(title, above), True
        rule = _UNDERLINE.fullmatch(line) is not None or _overlined(lines, number)  # of a heading, or its words
        bare = bool(found) or (bare and (rule or not line.strip()))
        verbatim = kind
        if line.strip():
            start = at + len(line) - len(line.lstrip()) if start < 0 else start
            end = at + len(line.rstrip())
        at += len(line)
    if start >= 0:
        yield path, opens, start, end, verbatim


def _heading(lines: Sequence[str], number: int) -> tuple[int, str] | None:
    """Level and words of a heading that begins at a line."""
    line = lines[number]
    if match := _MARKDOWN.match(line):
        # Not by the expression, which would try every way to share out a run of blanks
        words = match[2].rstrip().rstrip("#").rstrip()
        return (len(match[1]), words[:TITLE]) if words else None
    if (match := _WIKI.fullmatch(line)) and match[2].strip("= "):  # no rule of a table
        return len(match[1]), match[2].strip()[:TITLE]
    if match := _GOOGLE.fullmatch(line):
        return 7, match[1]  # below all others
    if number + 1 < len(lines) and _overlined(lines, number + 1):
        return 0, lines[number + 1].strip()  # above all others: a document's title, its parts
    sign = _underline(lines, number)
    return (_LEVELS.get(sign, 4), line.strip()) if sign else None


def _underline(lines: Sequence[str], number: int) -> str:
    """The sign by which the next line makes a heading of this one; empty where it does not."""
    words = lines[number].strip()
    following = lines[number + 1] if number + 1 < len(lines) else ""
    before = lines[number - 1].strip() if number else ""
    match = _UNDERLINE.fullmatch(following) if words and not before and len(words) <= TITLE else None
    if not match or _UNDERLINE.fullmatch(lines[number]):
        return ""
    # Below a longer line it begins a fenced block
    return "" if match[1] == "~" and len(following.strip()) < len(words) else match[1]


def _overlined(lines: Sequence[str], number: int) -> bool:
    """Whether a line stands between two of one sign, equally long and no shorter; nothing before them."""
    if not 0 < number < len(lines) - 1 or (number > 1 and lines[number - 2].strip()):
        return False
    above, words, below = (line.strip() for line in lines[number - 1 : number + 2])
    if above != below or not 0 < len(words) <= min(len(above), TITLE):
        return False
    return _UNDERLINE.fullmatch(above) is not None and _UNDERLINE.fullmatch(words) is None


def _fence(lines: Sequence[str], number: int, fence: str) -> str:
    """What opened the fenced block that goes on behind a line, `fence` the one before it; empty where none does."""
    match = _FENCE.match(lines[number])
    if fence:
        return "" if match and match[1].startswith(fence) and not match[2].strip() else fence
    underlines = number and _underline(lines, number - 1) == "~" and not _MARKDOWN.match(lines[number - 1])
    return match[1] if match and not underlines else ""


def _path(title: str, above: Sequence[tuple[int, str]]) -> str:
    """The title and the headings, one after another; a heading that repeats the title once. Where there is no room for
    all, those between the first and the last go, the highest first.
    """
    names = [title.strip(), *(words for _, words in above)]
    names = [name for at, name in enumerate(names) if name and name not in names[:at]]
    while len(names) > 2 and len(" > ".join(names)) > TITLE:
        del names[1]
    return " > ".join(names)[:TITLE]


def _cut(text: str, start: int, end: int, size: int, measure: Sizes, level: int) -> list[tuple[int, int]]:
    """Spans of at most `size`, as large as the first kind of cut that gives such, or as a cut anywhere."""
    if measure(start, end) <= size:
        return [(start, end)]
    if level == len(_CUTS):
        # Tokens are at least as many as pieces of so many characters, so half of a span is some progress
        step = max(min(size * CHARACTERS, (end - start + 1) // 2), 1)
        spans = [(first, min(first + step, end)) for first in range(start, end, step)]
        return [one for span in spans for one in (_cut(text, *span, size, measure, level) if step > 1 else [span])]
    places = [match.end() for match in _CUTS[level].finditer(text, start, end)]
    edges = [start, *(place for place in places if start < place < end), end]
    spans = list(zip(edges, edges[1:], strict=False))
    if level == len(_CUTS) - 1:  # words are put together again: they are no units of their own
        spans = _joined(spans, size, measure)
    return [one for span in spans for one in _cut(text, *_stripped(text, *span), size, measure, level + 1)]


def _joined(spans: Sequence[tuple[int, int]], size: int, measure: Sizes) -> list[tuple[int, int]]:
    """Neighbours together as long as they fit."""
    found: list[tuple[int, int]] = []
    for start, end in spans:
        if found and measure(found[-1][0], end) <= size:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without blanks around it; an only-blank one ends where it starts."""
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), start + len(part.rstrip()) if part.strip() else start
