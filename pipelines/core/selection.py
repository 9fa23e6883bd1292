"""Which rows stay: repeated rows, held-out prompts and near duplicates of held-out rows go, and are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipelines.core import near_duplicates
from pipelines.core.context import StageContext
from pipelines.core.intake import Taken
from pipelines.core.params.data import DataParams, PydocsSource
from pipelines.core.split import TRAIN, first_of_each, numbers, prompts_held_out
from pipelines.core.tables import SPLITS, UNSPLIT, Staged, flat

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def choose(
    params: DataParams, taken: Taken, context: StageContext
) -> tuple[dict[str, NDArray[np.bool_]], dict[str, int]]:
    """Which rows of each table stay (masks), and how many went: repeated, prompt held out, nearly held out."""
    import numpy as np

    keep = {key: first_of_each(marks) for key, marks in taken.marks.items()}
    removed = {"exact": sum(int((~mask).sum()) for mask in keep.values()), "prompt": 0, "near": 0}
    for key, gone in prompts_held_out(taken.marks, keep).items():
        removed["prompt"] += int(gone.sum())
        keep[key] &= ~gone
    for key in sorted(set(keep) - {UNSPLIT}):
        train = numbers(taken.marks[key].sides) == TRAIN
        hashes = taken.marks[key].hashes

        def read(mask: NDArray[np.bool_], key: str = key) -> Iterator[tuple[NDArray[np.int64], list[str]]]:
            return selected(key, taken.staged[key], mask)

        scratch = hashes.place.with_suffix(".near")
        pairs = near_duplicates.find(
            read, keep[key] & ~train, keep[key] & train, params.near_duplicate, context.threads, scratch
        )
        rows = np.array([(pair.train, pair.held) for pair in pairs], np.int64).reshape(-1, 2)
        # The very same row on two sides that were named is for the leak check to report, not for us to mend.
        gone = rows[hashes.at(rows[:, 0])["text"] != hashes.at(rows[:, 1])["text"], 0]
        keep[key][gone] = False
        removed["near"] += len(gone)
        context.stop_if_asked()
    return keep, removed


def rare_classes(params: DataParams, taken: Taken, keep: dict[str, NDArray[np.bool_]]) -> dict[str, list[str]]:
    """Let rows go whose class has fewer than `min_rows` of them in train; returns the classes, by table.

    Of tables that only the builder made: packages of a folder are classes, and one that says little, or whose few
    rows are held out, is no mistake of anybody's. A held-out class that train lacks could not be measured.
    """
    import numpy as np

    found = {}
    for key in sorted(set(taken.labels) - _named(params)):
        labels, staged = taken.labels[key], taken.staged[key]
        if not labels.classes:
            continue
        trained = keep[key] & (numbers(taken.marks[key].sides) == TRAIN)
        counts: Counter[str] = Counter()
        for first, batch in staged.batches():
            counts.update(batch.take(np.flatnonzero(trained[first : first + batch.num_rows]))["label_text"].to_pylist())
        rare = {name for name in labels.classes if counts[name] < params.min_rows}
        for first, batch in staged.batches() if rare else ():
            gone = [name in rare for name in batch["label_text"].to_pylist()]
            keep[key][first : first + batch.num_rows] &= ~np.array(gone, bool)
        if rare:
            labels.classes -= rare
            found[key] = sorted(rare)
    return found


def too_small(params: DataParams, taken: Taken, keep: dict[str, NDArray[np.bool_]]) -> dict[str, str]:
    """Tables that only the builder made, with fewer than `min_rows` rows in train or test, and how many they have.

    Nobody asked for these by name: a folder of source without "See Also" lines has no similarity task, and that
    is no mistake. A table that a file or hub source names is judged instead, and refused; so is the corpus.
    """
    found = {}
    for key, mask in keep.items():
        if key in _named(params) or key in ("corpus", "queries", UNSPLIT):
            continue
        sides = numbers(taken.marks[key].sides)[mask]
        train, test = int((sides == TRAIN).sum()), int((sides == SPLITS.index("test")).sum())
        if min(train, test) < params.min_rows:
            found[key] = f"{train} rows in train and {test} in test"
        elif key in taken.labels and len(taken.labels[key].classes) == 1:
            found[key] = f"rows of one class alone, {next(iter(taken.labels[key].classes))}"
    return found


def _named(params: DataParams) -> set[str]:
    """Tables that a file or hub source names."""
    return {
        f"tasks/{source.task}" if source.table == "tasks" else source.table
        for source in params.sources
        if not isinstance(source, PydocsSource)
    }


def selected(key: str, staged: Staged, mask: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], list[str]]]:
    """Numbers and whole texts of the rows that a mask selects, batch by batch."""
    import numpy as np

    for first, batch in staged.batches():
        chosen = np.flatnonzero(mask[first : first + batch.num_rows])
        if len(chosen):
            yield chosen + first, flat(key, batch.take(chosen))["text"].to_pylist()
