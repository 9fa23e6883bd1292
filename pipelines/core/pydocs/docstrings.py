"""Docstrings: raw text in, summary, clean text, parameters and "See Also" lines out.

Understands the three styles in use: numpydoc (underlined sections, numpydoc.readthedocs.io/en/latest/format.html),
Google (`Args:` and an indented block) and reST field lists (`:param x:`). What is no prose (a signature line, version
directives, placeholders of a template, "See base class") never becomes a summary.
"""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

from pipelines.core.pydocs.prose import PLACEHOLDER, SENTENCE_MARKS, columns, first_sentence, is_prose, legible, plain

SUMMARY_LENGTH = (20, 200)  # columns; shorter says nothing, longer is no summary

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_SIGNATURE = re.compile(r"[A-Za-z_][\w.]*(\(.*\)(?:\s*->\s*\S.*)?)$")
_DIRECTIVE = re.compile(
    r"\.\. (?:(?:deprecated|version\w+|currentmodule|module|index|\w*author|seealso|plot|autosummary|autoclass)"
    r"::|_[^:]+:|\|)"
)
_RULE = re.compile(r"(?:-{3,}|={3,}|~{3,})$")
_GOOGLE = re.compile(
    r"(Args|Arguments|Parameters|Params|Keyword Args|Keyword Arguments|Other Parameters|Returns?|Yields?|Raises|"
    r"Attributes|Examples?|Notes?|Shape|Inputs?|Outputs?|References?|See Also|Usage|Warnings?|Todo):$"
)
_GOOGLE_ENTRY = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*(?:\([^)]*\)[^)]*)*\))?\s*:\s*(.*)$")
_NUMPY_ENTRY = re.compile(r"\*{0,2}([A-Za-z_]\w*)(?:\s*:.*)?$")
_FIELD = re.compile(r"\s*:(?:param|parameter|arg|argument|keyword)\s+(?:[^:`]+\s)?\\?\*{0,2}(\w+)\s*:\s*(.*)$")
_FIELDS_BEGIN = re.compile(r"\n\s*[:@](?:param|parameter|arg|type|return|rtype|raise|keyword)")
_SEE_ALSO = re.compile(r"(?::\w+:)?`?~?([A-Za-z_][\w.]*)`?(?:\s+:\s*(.*))?$")
_NO_SUMMARY = re.compile(
    r"(?:args|arguments|parameters?|params|returns?|examples?|notes?|usage|raises|attributes|yields|see also|warning)"
    r"\s*:(?:\s|$)|"
    r"(?:see (?:the )?(?:base|parent|super|docs?\b|documentation|help|also|above|below|\S+ for|`|[\w.]+\.?$))|"
    r"(?:inherited|overrid|overload|todo|fixme|xxx\b|deprecated\b|internal\b|not implemented|for internal|"
    r"private\b|documentation for|alias (?:for|of|to)|same as|like `?\w[\w.]*`?[,.]|this is an? \(?internal|"
    r"copyright|license|author|initialize self|constructor\.)",
    re.IGNORECASE,
)
_PARAMETERS = {
    "parameters", "other parameters", "args", "arguments", "params", "keyword args", "keyword arguments",
}  # fmt: skip


class Docstring(NamedTuple):
    """One docstring, taken apart.

    `summary` is one clean sentence, or "" if there is none worth keeping; `text` is the whole without "See Also"
    and version notes; `parameters` and `see_also` are (name, description); `signature` is "(a, b=1)" if the
    docstring starts with one, as those of compiled functions do.
    """

    summary: str
    text: str
    parameters: tuple[tuple[str, str], ...]
    see_also: tuple[tuple[str, str], ...]
    signature: str


NO_DOCSTRING = Docstring("", "", (), (), "")


def parse(raw: str) -> Docstring:
    """Take a docstring apart, as written in the source (indented, any of the three styles)."""
    if not raw.replace("\n", "").isprintable():
        raw = _CONTROL.sub("", raw)
    lines = [line.rstrip() for line in inspect.cleandoc(raw).split("\n")]
    signature, lines = _leading_signature(lines)
    sections = _sections(_without_directives(lines))
    kept: list[str] = []
    parameters: list[tuple[str, str]] = []
    see_also: list[tuple[str, str]] = []
    for title, header, body in sections:
        if title == "see also":
            see_also += _see_also(body)
            continue
        if title in _PARAMETERS:
            parameters += _google_entries(body) if len(header) == 1 else _numpy_entries(body)
        kept += header + body
    parameters += _field_entries(lines)
    text = plain("\n".join(_without_blank_runs(kept)))
    if not legible(text):
        return NO_DOCSTRING
    return Docstring(
        summary=_summary(sections[0][2]),
        text=text,
        parameters=tuple(dict(reversed(parameters)).items())[::-1],
        see_also=tuple(see_also),
        signature=signature,
    )


def _leading_signature(lines: list[str]) -> tuple[str, list[str]]:
    """Split off "name(a, b) -> c" lines at the top; the first one is the signature."""
    if "--" in lines[:40] and lines[0].endswith("(") or lines[1:2] == ["--"]:  # CPython's own form, over several lines
        end = lines.index("--")
        lines = [
            " ".join(line.strip() for line in lines[:end]).replace("( ", "(").replace(", )", ")"),
            *lines[end + 1 :],
        ]
    signature, at = "", 0
    while at < len(lines) and (not lines[at] or (match := _SIGNATURE.match(lines[at]))):
        if lines[at] and not signature and match:
            signature = match[1]
        at += 1
    return signature, lines[at:]


def _without_directives(lines: list[str]) -> list[str]:
    """Drop version notes, labels and other directives with their indented blocks, and lines that are placeholders."""
    kept: list[str] = []
    dropped_indent = -1
    if not any(".. " in line or "{" in line or "%(" in line for line in lines):
        return lines
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if dropped_indent >= 0 and (not line or indent > dropped_indent):
            continue
        dropped_indent = -1
        if line.lstrip().startswith("..") and _DIRECTIVE.match(line.lstrip()):
            dropped_indent = indent
        elif not (("{" in line or "%(" in line) and not PLACEHOLDER.sub("", line).strip(" -*")):
            kept.append(line)
    return kept


def _sections(lines: list[str]) -> list[tuple[str, list[str], list[str]]]:
    """Cut into (lower-case title, header lines, body); the first is the untitled lead."""
    found: list[tuple[str, list[str], list[str]]] = [("", [], [])]
    at = 0
    while at < len(lines):
        line = lines[at]
        following = lines[at + 1] if at + 1 < len(lines) else ""
        if line and not line[0].isspace():
            if following[:3] in ("---", "===", "~~~") and _RULE.match(following):
                found.append((line.strip().rstrip(":").lower(), [line, following], []))
                at += 2
                continue
            if line.endswith(":") and following[:1].isspace() and _GOOGLE.match(line):
                found.append((line[:-1].lower(), [line], []))
                at += 1
                continue
        found[-1][2].append(line)
        at += 1
    return found


def _summary(lead: list[str]) -> str:
    text = "\n".join(lead).strip()
    paragraph = _FIELDS_BEGIN.split(text.split("\n\n", 1)[0], maxsplit=1)[0]
    if len(paragraph) > 4000 or _NO_SUMMARY.match(paragraph):
        return ""
    sentence = first_sentence(plain(paragraph)).replace("``", "`").removesuffix("...").strip()
    if not is_prose(sentence) or not SUMMARY_LENGTH[0] <= columns(sentence) <= SUMMARY_LENGTH[1]:
        return ""
    return sentence if sentence.endswith(SENTENCE_MARKS) else sentence + "."


def _description(lines: list[str]) -> str:
    """The first sentence of a parameter's or See Also line's description, or "" if it is none."""
    text = "\n".join(line.strip() for line in lines).strip().split("\n\n", 1)[0]
    sentence = first_sentence(plain(text)).replace("``", "`")
    sentence = sentence[:1].upper() + sentence[1:]
    if not 15 <= columns(sentence) <= 300 or not is_prose(sentence):
        return ""
    return sentence if sentence.endswith(SENTENCE_MARKS) else sentence + "."


def _entries(body: list[str], entry: re.Pattern[str]) -> list[tuple[str, str]]:
    """Entries at the body's own indent that match, each with what is indented below it."""
    indent = min((len(line) - len(line.lstrip()) for line in body if line), default=0)
    found: list[tuple[str, list[str]]] = []
    for line in body:
        if line and not line[indent].isspace():
            match = entry.match(line[indent:])
            first = match[2] if match and entry.groups > 1 else ""
            found.append((match[1] if match else "", [first]))
        elif found:
            found[-1][1].append(line)
    return [(name, text) for name, lines in found if name and (text := _description(lines))]


def _numpy_entries(body: list[str]) -> list[tuple[str, str]]:
    return _entries(body, _NUMPY_ENTRY)


def _google_entries(body: list[str]) -> list[tuple[str, str]]:
    return _entries(body, _GOOGLE_ENTRY)


def _field_entries(lines: list[str]) -> list[tuple[str, str]]:
    found: list[tuple[str, list[str]]] = []
    inside = False
    for line in lines:
        match = _FIELD.match(line) if ":" in line else None
        if match:
            found.append((match[1], [match[2]]))
        elif inside and (not line or not line[0].isspace()):
            inside = False
        elif inside:
            found[-1][1].append(line)
        inside = inside or bool(match)
    return [(name, text) for name, body in found if (text := _description(body))]


def _see_also(body: list[str]) -> list[tuple[str, str]]:
    """Lines "name : description" with their continuation; lines that name several objects say nothing of one."""
    found: list[tuple[str, str]] = []
    for line in body:
        match = _SEE_ALSO.match(line.strip())
        if match and not line[0].isspace():
            found.append((match[1], match[2] or ""))
        elif line and line[0].isspace() and found and found[-1][0]:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
        else:
            found.append(("", ""))
    return [(name, text) for name, description in found if name and (text := _description([description]))]


def _without_blank_runs(lines: list[str]) -> list[str]:
    kept = [line for at, line in enumerate(lines) if line or (at > 0 and lines[at - 1])]
    while kept and not kept[0]:
        kept.pop(0)
    while kept and not kept[-1]:
        kept.pop()
    return kept
