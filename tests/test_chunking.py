"""Chunks: they cover the text, fit, end where sentences and sections do, and say where they stand."""

from __future__ import annotations

import random
import re
import time

import numpy as np
import pytest

from pipelines.core import chunking

DOCUMENT = """numpy.flip(m, axis=None)

Reverse the order of elements. The shape of the array is preserved.

Parameters
----------
m : array_like
    Input array.
axis : None or int
    Axis along which to flip over.

Returns
-------
out : array_like
    A view of `m` with the entries of axis reversed.
"""
HARD = [
    *("a" * 20_000, "가나다 " * 3000, "한" * 3000, "🎉" * 3000, " x ", "one giant line " * 3000, "one. Two! " * 900),
    *("# A\n\n## B\n\n## C\ntext", "```\n\n" + "code\n\n" * 300, "=====\n-----\n", "# \n#\n", "\t\n a\n\n"),
    "x\r\ny\x0bz\u2028w " * 300,
]


def tokens(text: str) -> np.ndarray:
    """Where words and signs begin, as a word-piece tokenizer would have it."""
    return np.array([match.start() for match in re.finditer(r"\w+|[^\w\s]", text)], np.int64)


def cut(text: str, size: int = 50, overlap: float = 0.15, title: str = "T") -> list[chunking.Chunk]:
    return chunking.chunks(title, text, tokens(text), size, overlap)


def check(text: str, size: int, overlap: float) -> None:
    """Every character but blanks lies in a chunk; chunks go forward and are no larger than they may be."""
    found = cut(text, size, overlap)
    covered = np.zeros(len(text), bool)
    starts = tokens(text)
    for chunk in found:
        covered[chunk.start : chunk.end] = True
        inside = np.searchsorted(starts, chunk.end) - np.searchsorted(starts, chunk.start)
        assert max(int(inside), (chunk.end - chunk.start) / chunking.CHARACTERS) <= size
        assert text[chunk.start : chunk.end].strip() or not text.strip()
    assert all(covered[at] for at, character in enumerate(text) if not character.isspace())
    for one, other in zip(found, found[1:], strict=False):
        assert one.start < other.start and one.end < other.end


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_no_text_is_lost_or_too_long_whatever_it_is_made_of(text: str) -> None:
    for size, overlap in ((16, 0.0), (50, 0.15), (200, 0.5)):
        check(text, size, overlap)


def test_no_text_is_lost_in_any_mix_of_structure() -> None:
    parts = [
        "a",
        "bc. ",
        "D",
        "\n",
        "\n\n",
        "# H\n",
        "---\n",
        "```\n",
        " ",
        "Args:\n",
        "가",
        "🎉",
        "   x",
        "。",
        "w" * 300,
    ]
    draw = random.Random(0)
    for _ in range(600):
        text = "".join(draw.choice(parts) for _ in range(draw.randrange(120)))
        check(text, draw.choice([5, 16, 50]), draw.choice([0.0, 0.15, 0.5]))


def test_a_document_that_fits_is_one_chunk_and_sections_part_where_it_does_not() -> None:
    assert cut(DOCUMENT, 200) == [chunking.Chunk("T", 0, len(DOCUMENT.rstrip()))]
    found = cut(DOCUMENT, 45)
    assert [chunk.title for chunk in found] == ["T", "T > Parameters", "T > Returns"]
    assert [DOCUMENT[chunk.start :].split("\n")[0] for chunk in found[1:]] == ["Parameters", "Returns"]


def test_title_paths_follow_the_levels_of_headings() -> None:
    text = "# Guide\n\nfirst words\n\n## Install\n\nsecond words\n\n### Linux\n\nthird words\n\n"
    text += "## Use\n\nit so\n\nArgs:\n    x: y and more of it\n"
    found = cut(text, 8, 0.0, "Guide")
    paths = {text[chunk.start : chunk.end].split("\n")[-1].strip(): chunk.title for chunk in found}
    assert paths["first words"] == "Guide"
    assert paths["second words"] == "Guide > Install"
    assert paths["third words"] == "Guide > Install > Linux"
    assert found[-1].title == "Guide > Use > Args"
    fenced = "```\n# no heading\n```\n\n" + "word " * 8
    assert {chunk.title for chunk in cut(fenced, 9)} == {"T"}


def test_a_long_path_keeps_its_ends() -> None:
    parts = [f"{'#' * (at + 1)} {letter * 60}\n\n{'words ' * 12}\n\n" for at, letter in enumerate("abc")]
    found = cut("".join([*parts, "#### What is it?\n\n", "last " * 12]), 21, 0.0)
    assert found[1].title == f"T > {'a' * 60} > {'b' * 60}"
    path = f"T > {'b' * 60} > {'c' * 60}"
    assert [chunk.title for chunk in found[2:]] == [path, f"{path} > What is it?"]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("Install\n~~~~~~~\n\nfirst\n\n## Use\n\nlast words", "T > Use"),  # underlined, not fenced
        ("First example\n~~~\n# no heading\n~~~\n\n## Use\n\nlast words", "T > Use"),  # fenced, not underlined
        ("# A\n~~~~\n# no heading\n~~~~\n\n## Use\n\nlast words", "T > A > Use"),
        ("````md\n```\n# no heading\n```\n````\n\n# Use\n\nlast words", "T > Use"),
        ("```\n~~~\n# no heading\n```\n\n# Use\n\nlast words", "T > Use"),
        ("```\n```py\n# no heading\n```\n\n# Use\n\nlast words", "T > Use"),
        ("```one line``` of code\n\n# Use\n\nlast words", "T > Use"),
        ("~~~\n`````\n# no heading\n~~~~~ \n# Use\n\nlast words", "T > Use"),
        ("```\n# never closed\n\nlast words", "T"),
    ],
)
def test_fenced_blocks_end_where_they_end(text: str, path: str) -> None:
    found = cut(text, 6, 0.0)
    assert found[-1].title == path and text[found[-1].start : found[-1].end].endswith("last words")
    assert not any("no heading" in chunk.title for chunk in found)


def test_an_encyclopedia_s_extract_has_its_sections() -> None:
    text = "Seoul is a city.\n\n\n== History ==\nOld words.\n\n=== 조선 ===\nNew words.\n\n"
    text += "==Names==\na == b ==\n====\n== ==\n=====  =====  =====\nA      B      C\n=====  =====  ====="
    titles = dict.fromkeys(chunk.title for chunk in cut(text, 12, 0.0, "Seoul"))
    assert list(titles) == ["Seoul", "Seoul > History", "Seoul > History > 조선", "Seoul > Names"]


def test_a_line_above_a_heading_belongs_to_it() -> None:
    text = "=====\n Guide\n=====\n\nfirst words are few\n\nPart\n====\n\nsecond words are more and more\n\n"
    text += "*****\nOther\n*****\n\nlast"
    found = cut(text, 20, 0.0, "T")
    assert [chunk.title for chunk in found] == ["T > Guide", "T > Guide > Part", "T > Other"]
    assert [text[chunk.start :][:6] for chunk in found] == ["=====\n", "Part\n=", "*****\n"]
    for plain in ("---\ntitle: x\n---\n\nwords", "=====\n-----\n=====\n\nwords", "some\nwords\n===\nx\n==="):
        assert {chunk.title for chunk in cut(plain, 5)} == {"T"}, plain


@pytest.mark.parametrize(
    "block",
    [
        "```py\n" + 'print("Hello. World! Are you there?")  # Yes. No.\n' * 20 + "```",
        "| Attack | What it does. And why |\n| --- | --- |\n"
        + "| XSS | It runs a script. It steals. Or worse |\n" * 20,
        "+-----+-----+\n" + "| a. B | Yes. It is |\n+-----+-----+\n" * 20,
    ],
)
def test_lines_of_code_and_rows_of_tables_stay_whole(block: str) -> None:
    for text in (block, f"# Use\n{block}\nSo it goes. On.", f"Like this:\n{block}"):
        found = cut(text, 60, 0.3)
        assert len(found) > 3
        for chunk in found:
            assert chunk.start == 0 or text[chunk.start - 1] == "\n"
            assert chunk.end == len(text.rstrip()) or text[chunk.end] == "\n"


def test_a_block_between_sentences_stays_whole_where_it_fits() -> None:
    code = "```\n" + "x = 1\n" * 8 + "```"
    text = "One sentence stands here. " * 6 + f"\n{code}\n" + "Another sentence stands there. " * 6
    assert any(code in text[chunk.start : chunk.end] for chunk in cut(text, 50, 0.0))


@pytest.mark.parametrize("stop", ["。", "。」", "؟ ", "। ", "? "])
def test_sentences_of_other_scripts_end(stop: str) -> None:
    text = "".join(f"{'한' * 3} {'व' * 2} {number}{stop}" for number in range(60))
    found = cut(text, 30, 0.0)
    assert len(found) > 3 and all(text[chunk.start : chunk.end].endswith(stop.strip()) for chunk in found)


def test_chunks_end_with_sentences_and_repeat_whole_ones() -> None:
    text = " ".join(f"This is the sentence of number {number}." for number in range(30))
    found = cut(text, 40, 0.3)
    for one, other in zip(found, found[1:], strict=False):
        assert text[other.start :].startswith("This is") and text[one.start : one.end].endswith(".")
        repeated = text[other.start : one.end]
        assert repeated.count("sentence") == 1 and len(tokens(repeated)) <= 12
    assert all(other.start > one.end for one, other in zip(cut(text, 40, 0.0), cut(text, 40, 0.0)[1:], strict=False))


def test_a_title_alone_is_a_chunk_and_nothing_is_none() -> None:
    assert cut("", title="only a title") == [chunking.Chunk("only a title", 0, 0)]
    assert cut(" \n ", title=" ") == []
    assert len(cut("x", title="t" * 1000)[0].title) == chunking.TITLE
    found = chunking._heading(["# " + "a" * 1000], 0)
    assert found is not None and len(found[1]) == chunking.TITLE, "a megabyte would be copied for every heading below"


def test_headings_are_what_one_expression_would_find() -> None:
    whole = re.compile(r" {0,3}(#{1,6})\s+(.*?)\s*#*\s*")
    heads = ["#", "##", "######", "#######", "   #", "    #", "\t#", "x #"]
    gaps = ["", " ", "  ", "\t", "\u00a0"]
    words = ["", "a", "A B", "C#", "C #", "#", "# #", "a ## b", "제목", "a\tb #x", "-"]
    ends = ["", "#", " #", " ##  ", "###", "\t# \t", " # #", "\u3000"]
    breaks = ["", "\n", "\r\n", "\u2028", "\x0c"]
    lines = [head + gap + word + end for head in heads for gap in gaps for word in words for end in ends]
    for line in (line + ended for line in lines for ended in breaks):
        if match := whole.fullmatch(line):
            expected = (len(match[1]), match[2]) if match[2] else None
            assert chunking._heading([line, "text"], 0) == expected, repr(line)
        else:
            assert chunking._heading([line, "text"], 0) is None, repr(line)


HOSTILE = {
    "blanks inside a heading": "# a" + " " * 2000 + "b",  # as a cube
    "signs inside a heading": "# a" + " #" * 2000 + " " * 2000 + "b",
    "blanks": " " * 20_000 + "x",
    "number signs": "#" * 20_000 + " " * 20_000 + "x",
    "quotes": "." + "'" * 20_000 + "x",
    "quotes after stops": ".')" * 20_000,
    "blanks after a stop": "." + " " * 20_000 + "a",
    "signs of a section": "== a" + " ==" * 20_000 + " " * 20_000 + "x",
    "signs of a fence": "`" * 20_000 + " `" * 10_000,
    "a section's name and blanks": "Args:" + " " * 20_000 + "x",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_text_takes_more_than_its_length(text: str) -> None:
    """Less than a tenth of a second each; what is quadratic or worse takes many."""
    starts, began = tokens(text), time.process_time()
    chunking.chunks("T", text, starts, 50, 0.15)
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    ("title", "text", "length"),
    [
        ("m.area", "m.area(w, h=(1, 2)) -> float\n\nMultiplies.", len("m.area(w, h=(1, 2)) -> float")),
        ("m.area", "m.area\n\nMultiplies.", 6),
        ("m.area", "m.area(\n    w,\n    h,\n)\n\nMultiplies.", len("m.area(\n    w,\n    h,\n)")),
        ("m.area", "m.area(w)", 9),
        ("Area", "Area is what a surface has (see there)\n\nMore.", 0),
        ("Area", "Area (geometry) is what a surface has.", 0),
        ("Area", "The area.", 0),
        ("", "area(w)\n\nMultiplies.", 0),
    ],
)
def test_a_signature_is_the_title_with_arguments_and_nothing_else(title: str, text: str, length: int) -> None:
    assert chunking.signature(title, text) == length
