"""Which side of the split a row is on, and which rows go because their like is there already.

The side is a hash of seed and group, so a row never changes side when rows are added. Then, in this order:
the same row again goes (first wins); a training row whose prompt is held out goes. Rows whose source names its
side (`split:`) are exempt wherever they would be on two sides: that is the person's mistake to mend, and the leak
check will name it.
"""

from __future__ import annotations

import hashlib
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core.scratch import Records, parts_of
from pipelines.core.tables import PROMPT_TABLES, SPLITS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TRAIN = 0
HELD_BACK = 8192  # rows whose hashes wait in memory for the next write


def side(seed: int, group: str, validation_share: float, test_share: float) -> int:
    """0 train, 1 validation, 2 test: where a group's hash falls in [0, 1)."""
    digest = hashlib.blake2b(f"{seed}\0{group}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < test_share:
        return SPLITS.index("test")
    return SPLITS.index("validation") if place < test_share + validation_share else TRAIN


class Marks:
    """What is remembered of each row of a table: 2 bytes in memory, two hashes in a scratch file."""

    def __init__(self, place: Path) -> None:
        self.sides = array("B")  # index into SPLITS
        self.named = array("B")  # 1: the source names the side
        # `text`: hash of the normalised row; `prompt`: of the normalised prompt, 0: none
        self.hashes = Records(place, [("text", "u8"), ("prompt", "u8")])
        self._waiting = array("Q")

    def add(self, text: int, prompt: int, side: int, named: bool) -> None:
        """Remember one row."""
        self._waiting.extend((text, prompt))
        self.sides.append(side)
        self.named.append(named)
        if len(self._waiting) >= 2 * HELD_BACK:
            self.close()

    def close(self) -> None:
        """Write the hashes that wait."""
        import numpy as np

        self.hashes.append(np.frombuffer(self._waiting, np.uint64).view(self.hashes.kind))
        self._waiting = array("Q")


def numbers(values: array[int]) -> NDArray[np.uint8]:
    """An array of marks as numpy sees it, without a copy."""
    import numpy as np

    return np.frombuffer(values, np.uint8)


def first_of_each(marks: Marks) -> NDArray[np.bool_]:
    """Rows to keep: the first of each normalised text. [rows]

    Copies on different sides of which one was put there by name are all kept, for the leak check to report.
    """
    import numpy as np

    keep = np.zeros(len(marks.sides), bool)
    parts = parts_of(len(keep))
    for part in range(parts):
        rows, hashes = marks.hashes.part("text", part, parts)
        sides, named = numbers(marks.sides)[rows], numbers(marks.named)[rows] == 1
        _, first, owner, count = np.unique(hashes["text"], return_index=True, return_inverse=True, return_counts=True)
        keep[rows[first]] = True
        disputed = np.flatnonzero((count[owner] > 1) & np.isin(owner, owner[named]))
        # Within a disputed text, the first row of each side stays.
        _, first = np.unique(owner[disputed] * len(SPLITS) + sides[disputed], return_index=True)
        keep[rows[disputed[first]]] = True
    return keep


def prompts_held_out(marks: dict[str, Marks], keep: dict[str, NDArray[np.bool_]]) -> dict[str, NDArray[np.bool_]]:
    """Training rows whose prompt is held out in any of the prompt tables, by table. [rows]

    The same prompt lies on one side by its hash; this is for prompts whose groups come from a column.
    """
    import numpy as np

    tables = [table for table in PROMPT_TABLES if table in marks]
    gone = {table: np.zeros(len(keep[table]), bool) for table in tables}
    parts = parts_of(sum(map(len, gone.values())))
    for part in range(parts):
        train, away = {}, [np.zeros(0, np.uint64)]
        for table in tables:
            rows, hashes = marks[table].hashes.part("prompt", part, parts, given=True)
            own = keep[table][rows] & (numbers(marks[table].named)[rows] == 0)
            rows, prompts = rows[own], hashes["prompt"][own]
            trained = numbers(marks[table].sides)[rows] == TRAIN
            train[table] = rows[trained], prompts[trained]
            away.append(prompts[~trained])
        for table, (rows, prompts) in train.items():
            gone[table][rows] = np.isin(prompts, np.concatenate(away))
    return gone
