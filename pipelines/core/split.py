"""Which side of the split a row is on, and which rows go because their like is there already.

The side is a hash of seed and group, so a row never changes side when rows are added. Then, in this order:
the same row again goes (first wins); a training row whose prompt is held out goes. Rows whose source names its
side (`split:`) are exempt wherever they would be on two sides: that is the person's mistake to mend, and the leak
check will name it.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipelines.core.tables import PROMPT_TABLES, SPLITS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TRAIN = 0


def side(seed: int, group: str, validation_share: float, test_share: float) -> int:
    """0 train, 1 validation, 2 test: where a group's hash falls in [0, 1)."""
    digest = hashlib.blake2b(f"{seed}\0{group}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < test_share:
        return SPLITS.index("test")
    return SPLITS.index("validation") if place < test_share + validation_share else TRAIN


@dataclass
class Marks:
    """What is remembered of each row of a table while its text is on disk: 18 bytes."""

    texts: array[int] = field(default_factory=lambda: array("Q"))  # hash of the normalised row
    prompts: array[int] = field(default_factory=lambda: array("Q"))  # hash of the normalised prompt, 0: none
    sides: array[int] = field(default_factory=lambda: array("B"))  # index into SPLITS
    named: array[int] = field(default_factory=lambda: array("B"))  # 1: the source names the side

    def add(self, text: int, prompt: int, side: int, named: bool) -> None:
        """Remember one row."""
        self.texts.append(text)
        self.prompts.append(prompt)
        self.sides.append(side)
        self.named.append(named)


def numbers(values: array[int]) -> NDArray[np.uint64]:
    """An array of marks as numpy sees it, without a copy."""
    import numpy as np

    return np.frombuffer(values, dtype=values.typecode)


def first_of_each(marks: Marks) -> NDArray[np.bool_]:
    """Rows to keep: the first of each normalised text. [rows]

    Copies on different sides of which one was put there by name are all kept, for the leak check to report.
    """
    import numpy as np

    texts, sides, named = numbers(marks.texts), numbers(marks.sides), numbers(marks.named).astype(bool)
    keep = np.zeros(len(texts), bool)
    keep[np.unique(texts, return_index=True)[1]] = True
    _, owner, count = np.unique(texts, return_inverse=True, return_counts=True)
    disputed = (count[owner] > 1) & np.isin(owner, np.unique(owner[named]))
    rows = np.flatnonzero(disputed)
    # Within a disputed text, the first row of each side stays.
    _, first = np.unique(owner[rows] * len(SPLITS) + sides[rows], return_index=True)
    keep[rows[first]] = True
    return keep


def prompts_held_out(marks: dict[str, Marks], keep: dict[str, NDArray[np.bool_]]) -> dict[str, NDArray[np.bool_]]:
    """Training rows whose prompt is held out in any of the prompt tables, by table. [rows]

    The same prompt lies on one side by its hash; this is for prompts whose groups come from a column.
    """
    import numpy as np

    tables = [table for table in PROMPT_TABLES if table in marks]
    held = [
        numbers(marks[t].prompts)[(numbers(marks[t].sides) != TRAIN) & (numbers(marks[t].named) == 0) & keep[t]]
        for t in tables
    ]
    away = np.unique(np.concatenate(held)) if held else np.zeros(0, np.uint64)
    away = away[away != 0]
    return {
        t: np.isin(numbers(marks[t].prompts), away)
        & (numbers(marks[t].sides) == TRAIN)
        & (numbers(marks[t].named) == 0)
        & keep[t]
        for t in tables
    }
