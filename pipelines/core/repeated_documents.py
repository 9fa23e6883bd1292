"""Queries about documents that the knowledge holds more than once: they are about the first, the one that stays.

Of two documents that are the same one goes, as of any two rows. Where rows are questions that bring their passage
along, as SQuAD's, most passages come several times, each under another id, and the questions name all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core.context import StageContext
from pipelines.core.intake import Taken
from pipelines.core.params.data import DataParams
from pipelines.core.split import Marks, first_of_each, side
from pipelines.core.tables import UNSPLIT, Staged, key_of, normalised, whole_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

QUERIES = "queries"


def retarget(params: DataParams, taken: Taken, work: Path, context: StageContext) -> None:
    """Let queries name the documents that stay, and be on the side, and in the group, that this gives them."""
    if not {UNSPLIT, QUERIES} <= set(taken.staged):
        return
    keep = first_of_each(taken.marks[UNSPLIT])
    renamed = {} if keep.all() else _renamed(taken.staged[UNSPLIT], taken.marks[UNSPLIT], keep)
    if not renamed:
        return
    staged, marks = taken.staged[QUERIES], taken.marks[QUERIES]
    fresh = Staged(work / "queries.renamed.arrow", staged.schema)
    told = Marks(work / "queries.renamed.hashes")
    moved = 0
    for first, batch in staged.batches():
        for place, row in enumerate(batch.to_pylist(), first):
            at, named = marks.sides[place], bool(marks.named[place])
            target = renamed.get(row["target"], row["target"])
            if target != row["target"]:
                moved += 1
                if row["group"] == _group(row["target"]):  # no group was given: see `pipelines.core.intake`
                    row["group"] = _group(target)
                    own = side(params.seed, row["group"], params.validation_share, params.test_share)
                    at = at if named else own
                row["target"] = target
            text = normalised(whole_text(QUERIES, row))
            fresh.add(row, len(text))
            told.add(key_of(text), 0 if target is None else key_of(normalised(target)), at, named)
    fresh.close()
    told.close()
    taken.staged[QUERIES], taken.marks[QUERIES] = fresh, told
    if moved:
        context.say(f"{moved:,} queries name a document that stands in knowledge before: they count for the first")


def _renamed(staged: Staged, marks: Marks, keep: NDArray[np.bool_]) -> dict[str, str]:
    """Ids of the documents that go, each with the id of the one that stays in its place.

    In memory: 8 bytes a document, and the ids of those that are there more than once.
    """
    import numpy as np

    hashes = np.concatenate([block["text"] for _, block in marks.hashes.blocks()])
    repeated = np.isin(hashes, hashes[~keep])
    stays: dict[int, str] = {}
    goes: dict[str, int] = {}
    for first, batch in staged.batches():
        for place in np.flatnonzero(repeated[first : first + batch.num_rows]).tolist():
            name, text = batch["id"][place].as_py(), int(hashes[first + place])
            if keep[first + place]:
                stays[text] = name
            else:
                goes.setdefault(name, text)
    for first, batch in staged.batches():  # an id that still names a document means that one
        for place in np.flatnonzero(keep[first : first + batch.num_rows]).tolist() if goes else ():
            goes.pop(batch["id"][place].as_py(), None)
    return {name: stays[text] for name, text in goes.items()}


def _group(target: str) -> str:
    """The group of a query that was given none."""
    return f"{key_of(normalised(target)):016x}"
