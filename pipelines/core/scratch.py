"""Fixed-width records in a scratch file: what is known of each row of a table, without a place in memory for it.

Plain reads, no memory map: a mapped page counts as the process's own until the system wants it back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike, NDArray

BLOCK_BYTES = 1 << 20  # read at a time
PART_RECORDS = 1 << 16  # looked at together where records of equal value must meet


class Records:
    """Records of one numpy type, appended in order, read back block by block, by number, or by value."""

    def __init__(self, place: Path, kind: DTypeLike) -> None:
        import numpy as np

        self.place, self.kind, self.count = place, np.dtype(kind), 0
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"")

    def append(self, records: NDArray[Any]) -> None:
        """Append records. They are on disk when this returns."""
        with self.place.open("ab") as file:
            file.write(records.astype(self.kind, copy=False).tobytes())
        self.count += len(records)

    def blocks(self, records: int | None = None) -> Iterator[tuple[int, NDArray[Any]]]:
        """`(number of the first record, records)` in the order of `append`; about 1 MB unless told how many."""
        import numpy as np

        most = records or max(BLOCK_BYTES // self.kind.itemsize, 1)
        with self.place.open("rb", buffering=0) as file:
            for first in range(0, self.count, most):
                yield first, np.fromfile(file, self.kind, min(most, self.count - first))

    def at(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """The records of some numbers, in any order. [numbers]"""
        import numpy as np

        own, back = np.unique(numbers, return_inverse=True)
        size = self.kind.itemsize
        with self.place.open("rb", buffering=0) as file:
            found = b"".join(os.pread(file.fileno(), size, number * size) for number in own.tolist())
        return np.frombuffer(found, self.kind)[back]

    def part(self, field: str, part: int, parts: int, given: bool = False) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Numbers (ascending) and records of one part of `parts`; equal hashes (uint64) in `field` share a part.

        One pass over the file, so that memory stays the same and each further part costs a read. With `given`, records
        whose `field` is 0, for none, are left out: they would all be in the first part.
        """
        import numpy as np

        numbers, records = [np.zeros(0, np.int64)], [np.zeros(0, self.kind)]
        for first, block in self.blocks():
            own = (block[field] >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32) == part
            here = np.flatnonzero(own & (block[field] != 0) if given else own)
            numbers.append(here + first)
            records.append(block[here])
        return np.concatenate(numbers), np.concatenate(records)


def parts_of(records: int) -> int:
    """In how many parts so many records are looked at."""
    return max(-(-records // PART_RECORDS), 1)
