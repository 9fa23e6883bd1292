"""Sources to rows on disk: every row mapped, checked, given its group and side, and remembered by a few bytes.

What `data` holds in memory of a row is two bytes of its `Marks`; the row itself goes to a scratch file in the order
it came, and so do the hashes by which rows are told apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.core import sources
from pipelines.core.context import StageContext
from pipelines.core.faults import BadRow, Ledger, shown, writable
from pipelines.core.params.data import DataParams, PydocsSource, Source
from pipelines.core.rows import TASK_SHAPES, canonical, identify
from pipelines.core.sources import Entry
from pipelines.core.split import Marks, side
from pipelines.core.tables import SPLITS, Staged, key_of, normalised, prompt_text, schema, whole_text

REPORT_ROWS = 2000
MOST_LABELS = 1000
RAW_CHARACTERS = 100_000


@dataclass
class Labels:
    """A task's text columns and classes, which its first row decides and every other must share."""

    shape: tuple[str, ...]
    named: bool  # classes are told as text and numbered here, in sorted order
    scores: bool = False  # labels are real numbers, not classes
    classes: set[str] = field(default_factory=set)

    def check(self, row: dict[str, Any], column: str, limited: bool) -> None:
        """Refuse a row of another shape or with another type of label than the task's first; if `limited`, of one class
        too many.
        """
        if _shape(row) != self.shape:
            raise BadRow(
                "(row)", f"the columns {', '.join(_shape(row))}", f"{', '.join(self.shape)}, as in the task's first row"
            )
        if isinstance(row["label"], float) != self.scores:
            found, accepted = ("class", "score") if self.scores else ("score", "class")
            raise BadRow(column, f"a {found}", f"a {accepted}, as in the task's first row (label_type of its sources)")
        if (row["label"] is None) != self.named:
            found = shown(row["label_text"] if row["label"] is None else row["label"])
            kind = "text" if self.named else "a whole number"
            raise BadRow(column, found, f"{kind}, as in the task's first row")
        if "choices" in self.shape or self.scores or row["label_text"] in self.classes:
            return
        if limited and len(self.classes) >= MOST_LABELS:
            raise BadRow(column, f"class number {len(self.classes) + 1}", f"at most {MOST_LABELS} classes in a task")
        self.classes.add(row["label_text"])


@dataclass
class Taken:
    """What came in: rows on disk and what is remembered of them, by table key; labels by task key."""

    staged: dict[str, Staged] = field(default_factory=dict)
    marks: dict[str, Marks] = field(default_factory=dict)
    labels: dict[str, Labels] = field(default_factory=dict)
    skipped_files: int = 0
    grouped: int = 0  # rows of the source at hand whose group is a column of this name, which the source does not name


def take_in(params: DataParams, work: Path, ledger: Ledger, context: StageContext) -> Taken:
    """Read every source once.

    Raises:
        DataError: see `pipelines.core.sources.read` and `pipelines.core.faults.Ledger`.
    """
    taken = Taken()
    for source in params.sources:
        for table, entry in _entries(source, taken, context):
            _take(params, source, table, entry, taken, work, ledger)
            if (ledger.good + ledger.bad) % REPORT_ROWS == 0:
                context.progress(ledger.good + ledger.bad, None, bad_rows=ledger.bad)
                context.stop_if_asked()
        ledger.end_of_source()
        if taken.grouped:
            told = "rows stay together by their column group; if it means something else, columns: {group: null}"
            context.say(f"{getattr(source, 'path', None) or getattr(source, 'hub', None)}: {taken.grouped:,} {told}")
            taken.grouped = 0
    for key, staged in taken.staged.items():
        staged.close()
        taken.marks[key].close()
    return taken


def _entries(source: Source, taken: Taken, context: StageContext) -> Iterator[tuple[str, Entry]]:
    """Raw rows of a source with the table they belong to."""

    def skip(path: str, reason: str) -> None:
        taken.skipped_files += 1
        context.say(f"pydocs: {path} is left out: {reason}")

    if isinstance(source, PydocsSource):
        yield from sources.build(source, context.threads, skip)
    else:
        for entry in sources.read(source, context.root):
            yield source.table, entry


def _take(
    params: DataParams, source: Source, table: str, entry: Entry, taken: Taken, work: Path, ledger: Ledger
) -> None:
    """One raw row into its table, or into the ledger of bad ones."""
    columns: dict[str, str | None] = {} if isinstance(source, PydocsSource) else source.columns
    label_type = "class" if isinstance(source, PydocsSource) else source.label_type
    try:
        if isinstance(entry.record, BadRow):
            raise entry.record
        rows = canonical(table, entry.record, columns, label_type)
        own_id, group = identify(entry.record, columns, None if isinstance(source, PydocsSource) else source.group)
        key = table
        if table == "tasks":
            key = f"tasks/{entry.record['task'] if isinstance(source, PydocsSource) else source.task}"
            limited = not isinstance(source, PydocsSource)  # of what is built, small classes go: see `selection`
            _labels(taken, key, rows[0]).check(rows[0], columns.get("label") or "label", limited)
    except BadRow as fault:
        ledger.refuse(entry.source, entry.where, entry.row, fault, _raw(entry.record))
        return
    ledger.good += 1
    taken.grouped += group is not None and not isinstance(source, PydocsSource) and source.group is None
    if key not in taken.staged:
        own = (taken.labels[key].shape, taken.labels[key].scores) if table == "tasks" else ()
        taken.staged[key] = Staged(work / f"{key.replace('/', '.')}.arrow", schema(key, *own))
        taken.marks[key] = Marks(work / f"{key.replace('/', '.')}.hashes")
    given = None if isinstance(source, PydocsSource) else source.split
    whole = [normalised(whole_text(key, row)) for row in rows]
    if table == "comparisons" and own_id is not None:  # two people who agree, or one asked twice, are two rankings
        whole = [f"{text}\n{own_id}" for text in whole]
    prompt = prompt_text(key, rows[0])
    prompt_key = 0 if prompt is None else key_of(normalised(prompt))
    if group is None:
        group = f"{prompt_key or key_of(' '.join(whole)):016x}"
    at = side(params.seed, group, params.validation_share, params.test_share)
    for part, (row, text) in enumerate(zip(rows, whole, strict=True)):
        text_key = key_of(text)
        base = own_id or f"{text_key:016x}"
        row |= {
            "id": base if part == 0 or own_id is None else f"{base}-{part + 1}",
            "group": group,
            "source": entry.source,
            "row": entry.row,
        }
        taken.staged[key].add(row, len(text))
        taken.marks[key].add(text_key, prompt_key, SPLITS.index(given) if given else at, given is not None)


def _labels(taken: Taken, key: str, row: dict[str, Any]) -> Labels:
    if key not in taken.labels:
        taken.labels[key] = Labels(_shape(row), row["label"] is None, isinstance(row["label"], float))
    return taken.labels[key]


def _shape(row: dict[str, Any]) -> tuple[str, ...]:
    return next(shape for shape in TASK_SHAPES if all(name in row for name in shape))


def _raw(record: dict[str, Any] | BadRow) -> str:
    """A record as JSON for the quarantine; a line that could not be read carries its own text."""
    import json

    if isinstance(record, BadRow):
        return ""
    return writable(json.dumps(record, ensure_ascii=False, default=repr)[:RAW_CHARACTERS])
