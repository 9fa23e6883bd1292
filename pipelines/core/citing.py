"""Citations of an answer: marks `[n]` that a model wrote, or that are put behind the sentences a passage supports.

Small models seldom write marks. An answer without one that names a passage is attributed: a sentence to the passage
that holds most of its words in the same order, if those are at least `SUPPORT` of them (longest common subsequence,
ROUGE-L recall; Lin, 2004). `Cited.own` says which of the two it was.

This file imports nothing of the project: a registered model carries it along.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

# Of 200 questions of the built-in data the accepted answer is supported by its own document at this bound in 93 of 100,
# as at 0.6, and by the best of six documents next to it in 33, where 0.6 gives 50.
SUPPORT = 0.8
# `a[1]` in code is no citation, so a mark follows no letter, digit or closing bracket, but for letters of Thai,
# Chinese, Japanese and Korean, which put no blank before it.
_MARK = re.compile(
    r"(?:(?<![\w\])])|(?<=[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]))"
    r"\[\s*\d{1,3}(?:\s*[,;]\s*\d{1,3})*\s*\](?:\[\s*\d{1,3}\s*\])*"
)
_NUMBER = re.compile(r"\d+")
_CODE = re.compile(r"```.*?(?:```|(\Z))|`[^`\n]*`", re.DOTALL)  # group 1: a block that was cut off
_SENTENCE = re.compile(r"(?<=[.!?。！？])[\"')\]]*\s+|(?<=[。！？])|\n+")
_SIGNS = "\u3040-\u30ff\u3400-\u9fff"  # a word each, also beside Latin letters
_WORD = re.compile(rf"[{_SIGNS}]|[^\W{_SIGNS}]+(?:[._][^\W{_SIGNS}]+)*")  # a name such as numpy.flip is one word
_UNKNOWING = re.compile(r"\b(?:i|we) (?:do not|don['’]t) know\b|\bi(?: am|['’]m) not sure\b", re.IGNORECASE)


class Cited(NamedTuple):
    """An answer with its marks."""

    text: str
    numbers: list[int]  # of the passages that are cited, from 1, in order
    own: bool  # whether the model wrote the marks
    dropped: int  # marks of the model's that name no passage


def quoted(text: str) -> str:
    """A document's text with what looks like a citation made harmless: `[1]` becomes `(1)`."""
    return _MARK.sub(lambda mark: mark[0].replace("[", "(").replace("]", ")"), text).strip()


def unknowing(answer: str) -> bool:
    """Whether an answer says that it is none."""
    return not answer.strip() or bool(_UNKNOWING.search(answer))


def citations(answer: str) -> list[int]:
    """Numbers of the marks in an answer, each once, in order; what stands in code is no mark."""
    marks = _MARK.findall(_CODE.sub(lambda code: " " * len(code[0]), answer))
    return list(dict.fromkeys(int(number) for mark in marks for number in _NUMBER.findall(mark)))


def cite(answer: str, passages: Sequence[str]) -> Cited:
    """Marks of the model's own that name a passage; where there is none, a mark behind each supported sentence.

    No mark is put into code, of which it would be a part.

    Args:
        passages: texts, with their titles, in the order of their numbers.
    """
    written = citations(answer)
    known = [number for number in written if 1 <= number <= len(passages)]
    text = _without(answer, set(written) - set(known))
    if known:
        return Cited(text, known, True, len(written) - len(known))
    numbers: list[int] = []
    marked, done = "", 0
    code = [(match.start(), match.end() + (match[1] is not None)) for match in _CODE.finditer(text)]
    for start, end in _spans(text):
        if any(first < end < last for first, last in code):
            continue
        shares = [support(text[start:end], passage) for passage in passages]
        if (best := max(shares, default=0.0)) >= SUPPORT:
            numbers.append(shares.index(best) + 1)
            marked, done = f"{marked}{text[done:end]} [{numbers[-1]}]", end
    return Cited(marked + text[done:], list(dict.fromkeys(numbers)), False, len(written))


def unmarked(answer: str) -> str:
    """An answer without any mark: what is scored."""
    return _without(answer, citations(answer))


def _without(answer: str, numbers: Collection[int]) -> str:
    """The answer without marks of these numbers; code is left alone."""
    if not numbers:
        return answer.strip()
    code = [match.span() for match in _CODE.finditer(answer)]
    left, done = "", 0
    for mark in _MARK.finditer(answer):
        if any(start <= mark.start() < end for start, end in code):
            continue
        before, kept = answer[done : mark.start()], [one for one in _NUMBER.findall(mark[0]) if int(one) not in numbers]
        # With a mark goes the blank before it; other blanks may be the indentation of code
        left += f"{before}[{', '.join(kept)}]" if kept else before.rstrip(" \t")
        done = mark.end()
    return (left + answer[done:]).strip()


def sentences(text: str) -> list[str]:
    """Sentences of a text, and its lines."""
    return [text[start:end] for start, end in _spans(text)]


def ends(text: str) -> list[int]:
    """Where the sentences of a text end, but for the last one."""
    return [match.start() for match in _SENTENCE.finditer(text) if match.start()]


def _spans(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text begin and end, white space left out."""
    breaks = [(match.start(), match.end()) for match in _SENTENCE.finditer(text)]
    starts = [0, *(end for _, end in breaks)]
    stops = [*(start for start, _ in breaks), len(text)]
    return [
        (start + len(part) - len(part.lstrip()), stop)
        for start, stop in zip(starts, stops, strict=True)
        if (part := text[start:stop]).strip()
    ]


def words(text: str) -> list[str]:
    """Words, case folded; a dotted name is one, and so is each character of a script without spaces."""
    return _WORD.findall(text.casefold())


def support(sentence: str, passage: str) -> float:
    """Share of a sentence's words that stand in the passage in the same order, others between them (0 to 1)."""
    asked, told = words(sentence), words(passage)
    if not asked:
        return 0.0
    lengths = [0] * (len(asked) + 1)  # of the longest common subsequence with the first words of the sentence
    for word in told:
        before = 0
        for place, other in enumerate(asked, 1):
            above = lengths[place]
            lengths[place] = before + 1 if word == other else max(above, lengths[place - 1])
            before = above
    return lengths[-1] / len(asked)
