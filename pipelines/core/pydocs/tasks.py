"""Labelled tasks and retrieval queries: the entries of one library in, rows of `tasks` and `queries` out.

Labels come from the documentation's own structure, never from a model: which package a summary is from
(`package`), whether a summary belongs to a signature (`entailment`), which of four does (`choice`), whether a "See
Also" line and a summary mean the same object (`similarity`). Wrong answers are summaries from the same module where
there are any, else from the library; they and their positions are chosen by hash.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.core.pydocs.entries import Entry, number
from pipelines.core.pydocs.names import Names

Row = dict[str, Any]
_CHOICES = 4
# "The same for Series.": only who reads the referrer too could tell what is meant.
_POINTS_BACK = re.compile(
    r"\b(?:this|same|equivalent|analogous|analogue?|inverse of|similar|corresponding|opposite|counterpart|related)\b"
)


class Neighbours:
    """Summaries of other objects, near ones first: what wrong answers are made of."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._near: dict[str, list[str]] = defaultdict(list)
        self._all = sorted({entry.summary for entry in entries if entry.is_distinct})
        for summary, scope in sorted({(entry.summary, entry.scope) for entry in entries if entry.is_distinct}):
            self._near[scope].append(summary)

    def others(self, entry: Entry, count: int, key: str) -> list[str]:
        """`count` distinct summaries other than the entry's, the same for the same key; fewer if there are no more."""
        picked: list[str] = []
        for pool in (self._near[entry.scope], self._all):
            start = number(key) % max(len(pool), 1)
            for summary in (*pool[start:], *pool[:start]):
                if len(picked) == count:
                    break
                if summary != entry.summary and summary not in picked:
                    picked.append(summary)
        return picked


def tasks(entries: Sequence[Entry], labels: Sequence[str]) -> Iterator[Row]:
    """One task an object, chosen by hash, for every object with a summary of its own.

    `labels` are the names of all packages of the source; with fewer than two there is nothing to classify.
    """
    neighbours = Neighbours(entries)
    for entry in entries:
        if not entry.is_distinct or entry.kind == "module":
            continue
        kind = number(f"task:{entry.name}") % 3
        if kind == 0 and len(labels) > 1:
            yield from _package(entry, labels)
        elif kind == 1 and entry.signature != entry.name:
            yield from _entailment(entry, neighbours)
        elif kind == 2:
            yield from _choice(entry, neighbours)


def _package(entry: Entry, labels: Sequence[str]) -> Iterator[Row]:
    text = entry.summary.lower()
    if not any(label.lower() in text for label in labels):  # the answer must not stand in the question
        columns = {"text": entry.summary, "label": entry.package}  # numbered with those of all sources together
        yield _row("package", entry.name, entry.group, columns)


def _entailment(entry: Entry, neighbours: Neighbours) -> Iterator[Row]:
    fits = number(f"fits:{entry.name}") % 2
    others = [entry.summary] if fits else neighbours.others(entry, 1, f"entailment:{entry.name}")
    if others:
        columns = {"premise": entry.signature, "hypothesis": others[0]}
        yield _row("entailment", entry.name, entry.group, {**columns, "label": fits, "label_text": _yes(fits)})


def _choice(entry: Entry, neighbours: Neighbours) -> Iterator[Row]:
    choices = neighbours.others(entry, _CHOICES - 1, f"choice:{entry.name}")
    if len(choices) == _CHOICES - 1:
        label = number(f"position:{entry.name}") % _CHOICES
        choices.insert(label, entry.summary)
        columns = {
            "context": entry.signature,
            "choices": choices,
            "label": label,
            "label_text": entry.summary,
        }
        yield _row("choice", entry.name, entry.group, columns)


def similarities(queries: Sequence[Row], entries: Sequence[Entry]) -> Iterator[Row]:
    """A "See Also" line against the summary of its target, or of another object near the target."""
    neighbours = Neighbours(entries)
    found = {entry.name: entry for entry in entries}
    for query in queries:
        target = found[query["target"]]
        same = number(f"same:{query['id']}") % 2
        others = [target.summary] if same else neighbours.others(target, 1, f"similarity:{query['id']}")
        if target.summary and others:
            columns = {"first": query["query"], "second": others[0], "label": same, "label_text": _yes(same)}
            yield _row("similarity", query["id"], query["group"], columns)


def queries(entries: Sequence[Entry], names: Names, texts: Mapping[str, str]) -> list[Row]:
    """Retrieval queries people wrote: the "See Also" descriptions, each with the object it describes.

    `texts` maps the id of every knowledge row to its text. A line goes if it is the target's own summary, stands in
    the target's or the referrer's text word for word, or describes more than one object.
    """
    found: dict[str, list[Row]] = defaultdict(list)
    folded: dict[str, str] = {}
    for entry in entries:
        for name, description in entry.see_also if entry.name in texts else ():
            target = _resolve(name, entry.name, names, texts)
            needle = fold(description)
            if not target or target == entry.name or len(needle) < 15 or _POINTS_BACK.search(needle):
                continue
            for document in (target, entry.name):
                if document not in folded:
                    folded[document] = fold(texts[document])
            if needle not in folded[target] and needle not in folded[entry.name]:
                row = {"id": f"{entry.name}->{target}", "group": "", "kind": "see-also", "query": description}
                found[needle].append({**row, "target": target, "answers": None, "referrer": entry.name})
    groups = {entry.name: entry.group for entry in entries}
    single = (rows[0] for _, rows in sorted(found.items()) if len({row["target"] for row in rows}) == 1)
    unique = {row["id"]: {**row, "group": groups[row["target"]]} for row in single}
    return [unique[key] for key in sorted(unique)]


def fold(text: str) -> str:
    """Text as it is compared for leaks: case, spacing, quotes and the final stop do not count."""
    return " ".join(text.replace("`", "").lower().split()).rstrip(".")


def _resolve(name: str, referrer: str, names: Names, known: Mapping[str, str]) -> str:
    """The id a "See Also" name means, looked up from the referrer outwards as a reader would; "" if none."""
    parts = referrer.split(".")
    scopes = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
    for path in (*(f"{scope}.{name}" for scope in scopes), name):
        owner, _, method = path.rpartition(".")
        for candidate in (path, names.aliases.get(path, ""), f"{names.aliases.get(owner, '')}.{method}"):
            if candidate in known:
                return candidate
    return ""


def _row(task: str, key: str, group: str, columns: Row) -> Row:
    return {"id": f"{task}:{key}", "group": group, "task": task, **columns}


def _yes(label: int) -> str:
    return "yes" if label else "no"
