"""Rows about one object: an `Entry` in, rows of corpus, knowledge, demonstrations, prompts and queries out.

Demonstrations are of four kinds: `docstring` (write it for this code), `what` (does X do), `which` (function of P does
Y) and `parameter` (what is P of X). Their wording varies among templates, chosen by a hash of the row's id. A fifth of
the objects is kept out of the demonstrations: their questions are the prompts, and those that the knowledge answers
are queries too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.core.pydocs.entries import Entry, number
from pipelines.core.pydocs.files import STANDARD_LIBRARY

Row = dict[str, Any]
_LISTED_MEMBERS = 40
_PARAMETERS_ASKED = 2  # per object, or functions with twenty of them would be most of the table
_FRESH_ONE_IN = 5

_ASK_DOCSTRING = (
    "Write a one-line docstring for this {kind}.\n\n```python\n{code}\n```",
    "Summarise in one sentence what this {kind} does, as its docstring would.\n\n```python\n{code}\n```",
    "```python\n{code}\n```\n\nGive the first line of the docstring of this {kind}.",
    "Document the following Python {kind} in a single sentence:\n\n```python\n{code}\n```",
)
_ASK_WHAT = (
    "What does `{signature}` do?",
    "Explain in one sentence what `{signature}` does.",
    "In Python, what is `{signature}` for?",
    "Describe the {kind} `{signature}` briefly.",
)
_ASK_WHAT_IS = (
    "What is `{signature}`?",
    "Explain in one sentence what `{signature}` is.",
    "Describe the {kind} `{signature}` briefly.",
)
_ASK_WHICH = (
    "Which {kind} of {package} is described like this? {summary}",
    "Name the {kind} in {package} that fits this description: {summary}",
    "I am looking for a {kind} in {package}. Its documentation says: {summary} What is it called?",
)
_ASK_PARAMETER = (
    "What is the parameter `{parameter}` of `{signature}`?",
    "What does the argument `{parameter}` of `{signature}` mean?",
    "Explain the parameter `{parameter}` of `{signature}`.",
)


def corpus(entry: Entry) -> Row:
    """A document to read: signature, docstring, and for a class what its methods do."""
    return {"id": entry.name, "group": entry.group, "text": _document(entry)}


def knowledge(entry: Entry) -> Row:
    """A document to find, with the place in the source it was written at."""
    row = {"id": entry.name, "group": entry.group, "title": entry.name, "text": _document(entry)}
    return {**row, "url": entry.url}


def demonstrations(entry: Entry) -> Iterator[Row]:
    """Question and answer in chat form; nothing for the objects that are kept for prompts."""
    if not _is_fresh(entry):
        for kind, key, question, answer in _exchanges(entry):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            yield {"id": key, "group": entry.group, "kind": kind, "messages": messages}


def prompts(entry: Entry) -> Iterator[Row]:
    """The same questions about the objects that no demonstration is about, with the answer as the reference."""
    if _is_fresh(entry):
        for _, key, question, answer in _exchanges(entry):
            yield {"id": key, "group": entry.group, "prompt": question, "reference": answer}


def questions(entry: Entry) -> Iterator[Row]:
    """The prompts about an object that its knowledge row answers, as queries; a docstring for code is not one."""
    if _is_fresh(entry):
        for kind, key, question, answer in _exchanges(entry):
            if kind != "docstring":
                row = {"id": key, "group": entry.group, "kind": kind, "query": question}
                yield {**row, "target": entry.name, "answers": [answer]}


def _is_fresh(entry: Entry) -> bool:
    return not number(f"prompt:{entry.name}") % _FRESH_ONE_IN


def _document(entry: Entry) -> str:
    parts = [entry.signature, entry.text]
    if entry.members:
        shown = "\n".join(f"    {line}" for line in entry.members[:_LISTED_MEMBERS])
        parts.append(f"Methods and attributes:\n{shown}")
    return "\n\n".join(parts)


def _exchanges(entry: Entry) -> Iterator[tuple[str, str, str, str]]:
    """(kind, row id, question, answer)."""
    kind = "attribute" if entry.kind == "property" else entry.kind
    if entry.is_distinct:
        fields = {
            "kind": kind,
            "signature": entry.signature,
            "code": entry.code,
            "package": _shown(entry.package),
        }
        if entry.code:
            key = f"docstring:{entry.name}"
            yield "docstring", key, _worded(_ASK_DOCSTRING, key, **fields), entry.summary
        key = f"what:{entry.name}"
        templates = _ASK_WHAT if entry.kind in ("function", "method") else _ASK_WHAT_IS
        yield "what", key, _worded(templates, key, **fields), entry.summary
        # A description that two objects share has no single answer, one that spells the name needs no knowledge.
        if entry.shared == 1 and entry.kind != "module" and not _names_itself(entry):
            key = f"which:{entry.name}"
            yield "which", key, _worded(_ASK_WHICH, key, **fields, summary=entry.summary), f"`{entry.name}`"
    chosen = sorted(entry.parameters, key=lambda item: number(f"{entry.name}:{item[0]}"))[:_PARAMETERS_ASKED]
    for parameter, description in chosen:
        key = f"parameter:{entry.name}:{parameter}"
        question = _worded(_ASK_PARAMETER, key, parameter=parameter, signature=entry.signature)
        yield "parameter", key, question, description


def _shown(package: str) -> str:
    return "the Python standard library" if package == STANDARD_LIBRARY else f"the package {package}"


def _names_itself(entry: Entry) -> bool:
    last = entry.name.rpartition(".")[2]
    return f"`{last}" in entry.summary or f"{last}(" in entry.summary or entry.name in entry.summary


def _worded(templates: tuple[str, ...], key: str, **fields: str) -> str:
    return templates[number(key) % len(templates)].format(**fields)
