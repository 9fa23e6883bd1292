"""Prose out of markup: reST roles, links and footnote marks as plain text, first sentences, and what is no prose."""

from __future__ import annotations

import re

from pipelines.core.suites import UNREADABLE_SHARE

_ROLE = re.compile(r":(?:[a-zA-Z][\w+-]*:){1,2}`([^`]+)`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]+>`__?")
_RELATIVE = re.compile(r"`((?:~\.?|\.)[A-Za-z_][\w.]*(?:\(\))?)`")  # Sphinx's default role, as matplotlib uses it
_SHORTHAND = re.compile(r"^_[a-z]\w*\.")  # "_orm.Session": a prefix that SQLAlchemy's documentation expands
_FOOTNOTE = re.compile(r"\s*\[[\w#*]+\]_(?!\w)")
_REFERENCE = re.compile(r"`([^`]+)`__?(?!\w)")
_MARK = re.compile(r"[\W\d_](?<! )")
PLACEHOLDER = re.compile(r"%\([^)\s]*\)[sd]|(?<!\{)\{[a-zA-Z_]\w*\}(?!\})")
_SENTENCE_END = re.compile(r"(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bvs\.)(?<!\bcf\.)(?<=[.!?])\s+|(?<=[。！？])\s*(?!$)")
_WIDE = re.compile(r"[\u3041-\u30ff\u3400-\u9fff\uac00-\ud7a3]")  # kana, Chinese characters, Hangul
_UNSPACED = re.compile(r"[\u3041-\u30ff\u3400-\u9fff]")  # scripts without spaces between words
SENTENCE_MARKS = (".", "!", "?", "。", "！", "？")
UNREADABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]")  # stage `data` accepts a small share of them


def plain(text: str) -> str:
    """ReST roles, links and footnote marks as plain text: ":class:`~x.Y`" is "Y"."""
    if ":`" in text:
        text = _ROLE.sub(_role_text, text)
    if "`_" in text:
        text = _REFERENCE.sub(r"`\1`", _LINK.sub(r"\1", text))
    if "`." in text or "`~" in text:
        text = _RELATIVE.sub(lambda match: f"`{_role_text(match)}`", text)
    return _FOOTNOTE.sub("", text) if "]_" in text else text


def first_sentence(text: str) -> str:
    """The first sentence of a paragraph, on one line."""
    line = " ".join(text.split())
    for end in _SENTENCE_END.finditer(line):
        if line[end.end()] in "`\"'([" or _opens(line[end.end()]):
            return line[: end.start()]
    return line


def columns(text: str) -> int:
    """The length of a text, of which a syllable of Korean or a sign of Chinese or Japanese is two."""
    return len(text) if text.isascii() else len(text) + len(_WIDE.findall(text))


def legible(text: str) -> bool:
    """Whether people can read a text: U+FFFD is left where an editor did not know a file's encoding and saved it."""
    return len(UNREADABLE.findall(text)) <= UNREADABLE_SHARE * len(text)


def is_prose(sentence: str) -> bool:
    """Whether a line reads as a sentence: it starts as one, is mostly letters, and holds no template or markup."""
    if not (sentence[:1] == "`" or _opens(sentence[:1])) or sentence.endswith((":", ",", "...", "::", "：", "，")):
        return False
    if PLACEHOLDER.search(sentence) or any(mark in sentence for mark in (">>>", "\\", "|", "::", "--", "==")):
        return False
    marks = len(_MARK.findall(sentence))
    return (
        marks <= 0.25 * len(sentence)
        and ",," not in sentence
        and (sentence.count(" ") >= 2 or _UNSPACED.search(sentence) is not None)
        and sentence.count("`") % 2 == 0
        and legible(sentence)
    )


def _opens(character: str) -> bool:
    """Whether a sentence may begin so: with a capital, or a letter of a script that has none."""
    return character.isupper() or (character.isalpha() and not character.islower())


def _role_text(match: re.Match[str]) -> str:
    target = match[1]
    if "<" in target:
        return target.partition("<")[0].strip()
    if target.startswith("~"):
        return target.rpartition(".")[2].lstrip("~")
    return _SHORTHAND.sub("", target.lstrip("!."))
