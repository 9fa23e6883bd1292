"""How well an index finds what answers a query, by each of its methods.

Nothing is trained on `queries`, so every side of the split may be measured. What is chosen by queries (the fusion of
both rankings; `relevance_threshold`) is chosen by a part of them, `tuning`: whole groups by hash, none of the test
side, which stage `answers` asks. All figures are of the others.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.core import reading, retrieval, retrieval_metrics
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError
from pipelines.core.params.rag import RagParams

DEPTH = 100  # documents of a ranking; a target further down counts as not found
WARM = 5  # searches before the first that is timed: they read the files
BLOCK = 64  # queries ranked or searched between two looks for a signal
TIMED = 100  # queries whose latency is measured
KS = (2.0, 5.0, 10.0, 20.0, 60.0)
WEIGHTS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
MAIN = "hybrid"
SIDES = ("train", "validation", "test")


class Query(NamedTuple):
    """A row of `queries`."""

    id: str
    group: str
    kind: str
    text: str
    target: str | None  # id of the document that answers it; None: none does
    answers: list[str] | None
    tuning: bool  # of the part that things are chosen by


class Queries(NamedTuple):
    """All queries of the data, and those that retrieval is measured on."""

    every: list[Query]
    measured: list[Query]  # of the kinds asked for, with a target

    @property
    def judged(self) -> list[Query]:
        """What all figures of rankings are of."""
        return [query for query in self.measured if not query.tuning]


Ranks = dict[str, NDArray[np.int64]]  # by method. [queries]


class Fusion(NamedTuple):
    """Reciprocal rank fusion: the sum of 1 / (k + rank by BM25) and dense_weight / (k + rank by vectors)."""

    k: float
    dense_weight: float


def drawn(*key: str) -> float:
    """A number in [0, 1) that belongs to a key."""
    return int.from_bytes(hashlib.blake2b("\0".join(key).encode(), digest_size=8).digest()) / 2**64


def queries(params: RagParams, data: Path) -> Queries:
    """Rows of all sides, in the order of their ids; none where the data have no such table."""
    every: list[Query] = []
    columns = ["id", "group", "kind", "query", "target", "answers"]
    for split in SIDES if (data / "queries").is_dir() else ():
        for row in reading.rows(data, "queries", split, columns):
            tuning = split != "test" and drawn("tuning", row["group"]) < params.tuning_share
            every.append(Query._make([*(row[name] for name in columns), tuning]))
    every.sort(key=lambda query: query.id)
    asked = [query for query in every if not params.kinds or query.kind in params.kinds]
    return Queries(every, [query for query in asked if query.target is not None])


def unmeasured(params: RagParams, queries: Queries) -> str:
    """Why no query judges an index; empty where some do."""
    if queries.judged:
        return ""
    known = sorted({query.kind for query in queries.every if query.target is not None})
    if not known:
        return "The data have no queries with a target: how well the index finds is not measured."
    if not queries.measured:
        return (
            f"No query of kind {', '.join(params.kinds)} (rag.kinds) has a target: how well the index finds is not "
            f"measured. Queries with a target are of kind {', '.join(known)}; rag.kinds: [] takes all."
        )
    return "All queries are in the part that fusion is chosen by: nothing judges the index. Lower rag.tuning_share."


def pool(params: RagParams, documents: Sequence[str], queries: Queries) -> list[str] | None:
    """Documents that are ranked: every measured target, and others by hash; None: the pool would be the whole."""
    if params.pool is None or params.pool >= len(documents):
        return None
    targets = {query.target for query in queries.measured}
    others = sorted((name for name in documents if name not in targets), key=lambda name: (drawn("pool", name), name))
    return sorted({*others[: max(params.pool - len(targets), 0)], *filter(None, targets)})


def opened(place: Path) -> Any:
    """An index that embeds a query once, however many rankings it is asked for.

    Raises:
        ArtifactError: the folder holds no index, or a damaged one.
    """
    try:
        index = retrieval.Index.open(place)
    except ValueError as error:
        raise ArtifactError(str(error)) from None
    index.embedder.query = cache(index.embedder.query)
    return index


def rankings(
    index: Any, queries: Sequence[Query], methods: Sequence[str], documents: Collection[str] | None,
    context: StageContext,
) -> dict[str, list[list[str]]]:  # fmt: skip
    """By method, of each query the first `DEPTH` documents.

    Raises:
        Stopped: a signal came.
    """
    found: dict[str, list[list[str]]] = {method: [] for method in methods}
    for first in range(0, len(queries), BLOCK):
        texts = [query.text for query in queries[first : first + BLOCK]]
        for method in methods:
            found[method] += index.rankings(texts, method, DEPTH, documents)
        context.progress(first + len(texts), len(queries), ranking=f"{len(documents or index.documents)} documents")
        context.stop_if_asked()
    return found


def ranks(
    index: Any, queries: Sequence[Query], methods: Sequence[str], documents: Collection[str] | None,
    context: StageContext,
) -> Ranks:  # fmt: skip
    """Rank of each query's target by every method, 0: not among the first `DEPTH`.

    Raises:
        Stopped: a signal came.
    """
    targets = [query.target or "" for query in queries]
    found = rankings(index, queries, methods, documents, context)
    return {method: retrieval_metrics.ranks(ranked, targets) for method, ranked in found.items()}


def figures(queries: Sequence[Query], ranks: Ranks, prefix: str = "") -> dict[str, float]:
    """Every measure of every method with its interval; nothing where no query was judged."""
    found: dict[str, float] = {}
    groups = [query.group for query in queries]
    for method, own in ranks.items() if queries else ():
        start = prefix if method == MAIN else f"{prefix}{method}_"
        found |= retrieval_metrics.figures(retrieval_metrics.scores(own), groups, start)
    return found


def tuned(index: Any, queries: Queries, documents: Collection[str] | None, context: StageContext) -> Fusion | None:
    """The best fusion for the queries of the tuning part; None where it has none.

    Raises:
        Stopped: a signal came.
    """
    asked = [query for query in queries.measured if query.tuning]
    found = rankings(index, asked, ("bm25", "dense"), documents, context)
    targets = [query.target or "" for query in asked]
    return choose_fusion(found["bm25"], found["dense"], targets) if asked else None


def choose_fusion(bm25: Sequence[Sequence[str]], dense: Sequence[Sequence[str]], targets: Sequence[str]) -> Fusion:
    """The constant and weight of reciprocal rank fusion with the highest MRR, the first of equals.

    Args:
        bm25, dense: of each query the documents by either method, best first.
        targets: of each query the document that answers it.
    """
    choices = [Fusion(k, weight) for k in KS for weight in WEIGHTS]
    total = np.zeros(len(choices))
    for first, second, target in zip(bm25, dense, targets, strict=True):
        names = list(dict.fromkeys([*first, *second]))
        if target not in names:
            continue
        place = {name: number for number, name in enumerate(names)}
        by = np.full((2, len(names)), np.inf)  # ranks by either method
        for row, ranking in enumerate((first, second)):
            by[row, [place[name] for name in ranking]] = np.arange(1, len(ranking) + 1)
        for number, (k, weight) in enumerate(choices):
            fused = 1.0 / (k + by[0]) + weight / (k + by[1])
            own = fused[place[target]]
            ties = int((fused == own).sum()) - 1  # with equal weights two swapped ranks tie: half of them come first
            total[number] += 1.0 / (1 + int((fused > own).sum()) + ties / 2)
    return choices[int(np.argmax(total))]


def latencies(index: Any, queries: Sequence[Query]) -> dict[str, float]:
    """Milliseconds of a search with the embedding of its query, of one after another: median and 95th percentile."""
    texts = [query.text for query in queries[:TIMED]]
    for text in texts[:WARM]:
        index.search(text)
    taken = []
    for text in texts:
        began = time.perf_counter()
        index.search(text)
        taken.append(1000 * (time.perf_counter() - began))
    middle, slow = np.percentile(taken, (50, 95)) if taken else (0.0, 0.0)
    return {"query_ms_p50": float(middle), "query_ms_p95": float(slow)}


def rows(queries: Sequence[Query], ranks: Ranks, documents: str) -> dict[str, list[Any]]:
    """Columns of evaluation.parquet: what each query is, and its measures by each method (the hybrid's plain).

    `documents` is a hash of what was ranked: measures are of the documents as much as of the queries.
    """
    columns: dict[str, list[Any]] = {
        "id": [query.id for query in queries],
        "group": [query.group for query in queries],
        "kind": [query.kind for query in queries],
        "query": [query.text for query in queries],
        "target": [query.target for query in queries],
        "documents": [documents] * len(queries),
        "judged": [1.0] * len(queries),  # a weight for gates: where there is no row, there is nothing to compare
    }
    for method, own in ranks.items():
        ending = "" if method == MAIN else f"_{method}"
        columns |= {f"{name}{ending}": values.tolist() for name, values in retrieval_metrics.scores(own).items()}
    return columns
