"""The nearest of many vectors by cosine: all of them looked at, or beyond some number those of the nearest cells.

faiss does both (Douze et al., "The Faiss library", 2024). Vectors are compared in float16, as they lie in their file.
The cells of a large index (IVF: Sivic & Zisserman, 2003) are found by k-means on a sample and lie in `ann.faiss`,
memory-mapped, a byte a dimension; the best by these bytes are compared once more as they are. Flat-importable: imports
nothing of the project.
"""

from __future__ import annotations

from functools import cached_property
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE = "ann.faiss"
CELLS = 4.0  # times the square root of the vectors
PROBED = 128  # cells looked at, of 4,000 at a million vectors, where every vector may be found
SAMPLE = 64  # vectors a cell that k-means sees
BLOCK = 65_536  # vectors read at a time
COMPARED = 128  # of the best by their bytes, or twice as many as are asked for, are compared as they are
FEW = 0.05  # share of vectors that may be found below which they are compared one by one


def build(vectors: NDArray[np.float16], folder: Path) -> None:
    """Write the cells of vectors (n, dimensions). The same vectors and threads give the same bytes."""
    import faiss

    count, dimensions = vectors.shape
    cells = max(1, min(int(CELLS * count**0.5), count // 2))
    coarse = faiss.IndexFlatIP(dimensions)
    index = faiss.IndexIVFScalarQuantizer(
        coarse, dimensions, cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT, False
    )
    index.cp.seed, index.cp.niter, index.cp.spherical = 1234, 10, True
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, SAMPLE
    chosen = np.sort(np.random.default_rng(0).permutation(count)[: cells * SAMPLE])
    index.train(vectors[chosen].astype(np.float32))
    for first in range(0, count, BLOCK):
        index.add(np.asarray(vectors[first : first + BLOCK], np.float32))
    faiss.write_index(index, str(folder / FILE))


class Nearest:
    """Vectors of an index folder, to be searched."""

    def __init__(self, folder: Path, vectors: NDArray[np.float16]) -> None:
        self.vectors = vectors
        self.cells = folder / FILE if (folder / FILE).exists() else None

    @cached_property
    def _index(self) -> Any:
        """faiss's index: of the cells' file, or of all vectors as they are."""
        import faiss

        if self.cells is not None:
            cells: Any = faiss.read_index(str(self.cells), faiss.IO_FLAG_MMAP)
            cells.parallel_mode = 1  # threads share the cells of a query; by default they share queries
            return cells
        kind, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        index = faiss.IndexScalarQuantizer(self.vectors.shape[1], kind, metric)
        # Its codes are float16: the file's bytes, as they are
        faiss.copy_array_to_vector(np.ascontiguousarray(self.vectors).view(np.uint8).reshape(-1), index.codes)
        index.ntotal = len(self.vectors)
        return index

    def search(
        self, query: NDArray[np.float32], count: int, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows of the `count` nearest vectors and their cosines, best first; equal ones in the order of rows.

        Args:
            query: of length 1. [dimensions]
            allowed: rows that may be found; None: all. [vectors]
        """
        size = len(self.vectors) if allowed is None else int(allowed.sum())
        count = min(count, size)
        if not count:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        if allowed is not None and size <= FEW * len(self.vectors):
            rows = np.flatnonzero(allowed)
            cosines = self.vectors[rows].astype(np.float32) @ query
        else:
            rows, cosines = self._searched(query, count, allowed)
        order = np.lexsort((rows, -cosines))[:count]
        return rows[order], cosines[order]

    def _searched(
        self, query: NDArray[np.float32], count: int, allowed: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        faiss: Any = import_module("faiss")  # its type stubs describe the C++ below, which takes other arguments
        bits = None if allowed is None else np.packbits(allowed, bitorder="little")
        chosen = {} if bits is None else {"sel": faiss.IDSelectorBitmap(bits)}
        if self.cells is None:
            params = faiss.SearchParameters(**chosen) if chosen else None
            cosines, rows = self._index.search(query[None], count, params=params)
            found = rows[0] >= 0
            return rows[0][found], cosines[0][found]
        # What may be found may lie in few cells, far from the query: the fewer rows, the more cells are looked at
        share = 1.0 if allowed is None else float(allowed.mean())
        probed, cells = ceil(PROBED / share), int(self._index.nlist)
        while True:
            params = faiss.SearchParametersIVF(nprobe=probed, **chosen)
            _, rows = self._index.search(query[None], max(2 * count, COMPARED), params=params)
            best = np.sort(rows[0][rows[0] >= 0])
            if len(best) >= count or probed >= cells:
                return best, self.vectors[best].astype(np.float32) @ query
            probed = cells
