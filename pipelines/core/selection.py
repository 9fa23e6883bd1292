"""Which rows stay: repeated rows, held-out prompts and near duplicates of held-out rows go, and are counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipelines.core import near_duplicates
from pipelines.core.context import StageContext
from pipelines.core.intake import Taken
from pipelines.core.params.data import DataParams
from pipelines.core.split import TRAIN, first_of_each, numbers, prompts_held_out
from pipelines.core.tables import UNSPLIT, Staged, flat

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def choose(
    params: DataParams, taken: Taken, context: StageContext
) -> tuple[dict[str, NDArray[np.bool_]], dict[str, int]]:
    """Which rows of each table stay (masks), and how many went: repeated, prompt held out, nearly held out."""
    keep = {key: first_of_each(marks) for key, marks in taken.marks.items()}
    removed = {"exact": sum(int((~mask).sum()) for mask in keep.values()), "prompt": 0, "near": 0}
    for key, gone in prompts_held_out(taken.marks, keep).items():
        removed["prompt"] += int(gone.sum())
        keep[key] &= ~gone
    for key in sorted(set(keep) - {UNSPLIT}):
        train = numbers(taken.marks[key].sides) == TRAIN
        texts = numbers(taken.marks[key].texts)

        def read(mask: NDArray[np.bool_], key: str = key) -> Iterator[tuple[NDArray[np.int64], list[str]]]:
            return selected(key, taken.staged[key], mask)

        for pair in near_duplicates.find(
            read, keep[key] & ~train, keep[key] & train, params.near_duplicate, context.threads
        ):
            # The very same row on two sides that were named is for the leak check to report, not for us to mend.
            if texts[pair.train] != texts[pair.held]:
                keep[key][pair.train] = False
                removed["near"] += 1
        context.stop_if_asked()
    return keep, removed


def selected(key: str, staged: Staged, mask: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], list[str]]]:
    """Numbers and whole texts of the rows that a mask selects, batch by batch."""
    import numpy as np

    for first, batch in staged.batches():
        chosen = np.flatnonzero(mask[first : first + batch.num_rows])
        if len(chosen):
            yield chosen + first, flat(key, batch.take(chosen))["text"].to_pylist()
