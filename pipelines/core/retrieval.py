"""Opens an index folder (`indexing.build` makes it) and searches it: by BM25, by vectors, or by both.

    manifest.json   versions, embedder, sizes and hashes of all files
    chunks.parquet  what is found, with its place
    vectors.npy     float16 (vectors, dimensions), of length 1
    ann.faiss       only of large indexes (`nearest`)
    bm25/           bm25s's files (`lexical`)
    embedder/       the model that made the vectors
    reranker/       a cross-encoder, where one was asked for

Both rankings are fused by reciprocal ranks (`fusion`). Everything large is memory-mapped.

Flat-importable, as a registered model carries it along: of the project it imports `embedding`, `fusion`, `lexical`,
`nearest` and `reranking` alone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
METHODS = ("bm25", "dense", "hybrid", "reranked")
DEPTH = 100  # documents of either ranking that are fused, unless more are asked for
RERANKED = 30  # passages a cross-encoder reads, unless more are asked for
DEEPEST = 32  # chunks of a ranking for each of those documents, at most: few and long ones would take all there are

Where = Callable[[Mapping[str, Any]], bool]
Numbers = NDArray[np.int64]
Scores = NDArray[np.float32]
Allowed = NDArray[np.bool_]


class IndexDamaged(ValueError):
    """A file of an index folder is missing or is not what the manifest says."""


class EmbedderMismatch(ValueError):
    """An index was made with another embedder than the one asked for."""


class Passage(NamedTuple):
    """A chunk that was found."""

    chunk: str  # its id
    document: str  # id of the document
    title: str  # title path: "numpy.flip > Parameters"
    text: str
    url: str | None  # of the document
    score: float  # of the ranking it was found by
    relevance: float  # cosine of query and passage; NaN where the passage has no vector
    start: int  # characters into the document's text
    end: int
    line: int  # of the document's text at which it starts, from 1
    source: str | None = None  # of the data, that the document came from: a file, as a rule


def _ours(name: str) -> Any:
    """A module of the project: `pipelines.core.NAME`, or `NAME` beside a registered model."""
    return import_module(f"{__package__}.{name}" if __package__ else name)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index, its files there and of the right sizes.

    Raises:
        IndexDamaged: a file is missing or unreadable, or has another size; or folder or terms are of another version.
    """
    place = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        expected = {folder / name: int(file["bytes"]) for name, file in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexDamaged(f"{place}: no manifest of an index: {error!r}; build the index again") from None
    if manifest.get("format") != FORMAT:
        raise IndexDamaged(f"{place}: format {manifest.get('format')!r}; accepted: {FORMAT}; build the index again")
    if lacking := [name for name in ("embedder", "fusion", "bm25", "row_group") if name not in manifest]:
        raise IndexDamaged(f"{place}: it has no {', no '.join(lacking)}; build the index again")
    if (found := manifest["bm25"].get("version")) != (accepted := _ours("lexical").VERSION):
        raise IndexDamaged(f"{place}: bm25.version {found!r}; accepted: {accepted}; build the index again")
    for path, size in expected.items():
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            said = "is missing" if found is None else f"has {found} bytes"
            raise IndexDamaged(f"{path} {said}; the manifest says {size} bytes; build the index again")
    return manifest


class Index:
    """An index folder, open. Reading is safe in several threads."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        import pyarrow.parquet as pq

        self.folder, self.manifest, self._reading = folder, manifest, threading.Lock()
        self.fusion_k, self.dense_weight = (float(manifest["fusion"][name]) for name in ("k", "dense_weight"))
        try:
            self._texts = pq.ParquetFile(folder / "chunks.parquet", memory_map=True)
            names = [name for name in self._texts.schema_arrow.names if name != "text"]  # read when it is shown
            self.chunks = self._texts.read(names)
            self._bm25 = _ours("lexical").Bm25(folder / "bm25", self.chunks.num_rows)
            self._vectors = np.load(folder / "vectors.npy", mmap_mode="r")
            self._nearest = _ours("nearest").Nearest(folder, self._vectors)
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, TokenError) as error:  # the last is numpy's
            raise IndexDamaged(f"{folder}: a file cannot be read: {error}; build the index again") from None
        documents = self.chunks["document"].combine_chunks().dictionary_encode()
        self.documents: list[str] = documents.dictionary.to_pylist()
        self._document = documents.indices.to_numpy().astype(np.int64)  # [chunks]
        self._vector = self.chunks["vector"].to_numpy()  # row of each chunk's vector, or -1. [chunks]
        self._chunk = np.flatnonzero(self._vector >= 0)  # of each vector
        self._near = self.chunks["near"].to_numpy()  # the first chunk that each nearly repeats, or itself. [chunks]
        self._number = {name: number for number, name in enumerate(self.documents)}

    @classmethod
    def open(cls, folder: Path, embedder: str | None = None) -> Index:
        """Open a folder that `indexing.build` filled.

        Args:
            embedder: refuse an index made with another one: its name, hash or directory.

        Raises:
            IndexDamaged: as `read_manifest`; `indexing.verify` looks at every byte.
            EmbedderMismatch: made with another embedder; both are named.
        """
        manifest = read_manifest(folder)
        made = manifest["embedder"]
        if embedder is not None and embedder not in (made["name"], made["sha256"]):
            embedding = _ours("embedding")
            try:
                known = embedding.fingerprint(embedding.find(embedder)) == made["sha256"]
            except embedding.EmbedderUnusable:
                known = False
            if not known:
                raise EmbedderMismatch(
                    f"{folder} was made with embedder {made['name']} ({made['sha256'][:12]}), asked for is {embedder}; "
                    "build the index with it, or ask for the one it has"
                )
        return cls(folder, manifest)

    @cached_property
    def embedder(self) -> Any:
        """The embedder of the folder, loaded when it is first needed."""
        embedding = _ours("embedding")
        return embedding.Embedder(self.folder / "embedder", embedding.dtype(self.manifest["embedder"]["precision"]))

    @cached_property
    def reranker(self) -> Any:
        """The cross-encoder of the folder. Raises ValueError where it has none."""
        if self.manifest.get("reranker") is None:
            raise ValueError(f"{self.folder} has no re-ranker; build it with one, or search by another method")
        return _ours("reranking").Reranker(self.folder / "reranker")

    def search(
        self,
        query: str,
        count: int = 10,
        *,
        method: str = "hybrid",
        where: Where | None = None,
        exclude: Collection[str] = (),
        distinct: bool = True,
    ) -> list[Passage]:
        """The best passages, best first.

        Args:
            where: on `document`, `title`, `url` and `source` of a document: whether it may be found.
            exclude: ids of documents that may not.
            distinct: without passages that nearly repeat a better one.

        Raises:
            ValueError: an empty query; no such method; `reranked` without a re-ranker.
        """
        self._check(query, method)
        vector = self.embedder.query(query)
        allowed, depth, seen = self._allowed(None, exclude, where), max(DEPTH, count), -1
        while True:
            found, scores = self._found(query, vector, method, depth, allowed)
            exhausted, seen = len(found) == seen and len(np.unique(self._document[found])) < depth, len(found)
            if distinct:
                kept = np.sort(np.unique(self._near[found], return_index=True)[1])
                found, scores = found[kept], scores[kept]
            if exhausted or len(found) >= count:
                break
            depth *= 4  # a hundred documents may all say the same
        if method == "reranked":
            return self._reranked(query, vector, found[: max(RERANKED, count)], count)
        return self._passages(found[:count], scores[:count], vector)

    def rankings(
        self, queries: Sequence[str], method: str, depth: int, documents: Collection[str] | None = None
    ) -> list[list[str]]:
        """Of each query the ids of the `depth` best documents, best first, by their best chunk.

        Args:
            documents: the pool; None: all.

        Raises:
            ValueError: as `search`.
        """
        allowed = self._allowed(documents, (), None)
        found = []
        for query in queries:
            self._check(query, method)
            # Words alone need no vector
            vector = np.zeros(0, np.float32) if method == "bm25" else self.embedder.query(query)
            numbers, _ = self._found(query, vector, method, depth, allowed)
            order = self._document[numbers].tolist()
            if method == "reranked":
                best = self._reranked(query, vector, numbers[:RERANKED], depth)
                order = [*(self._number[one.document] for one in best), *order]
            found.append([self.documents[number] for number in dict.fromkeys(order)][:depth])
        return found

    def duplicates(self, document: str) -> list[str]:
        """Ids of other documents of which a chunk nearly repeats one of the document's, sorted."""
        own = self._document == self._number.get(document, -1)
        near = np.isin(self._near, self._near[own])
        return sorted(self.documents[number] for number in np.unique(self._document[near & ~own]).tolist())

    def _check(self, query: str, method: str) -> None:
        if method not in METHODS:
            raise ValueError(f"method {method!r}; accepted: {', '.join(METHODS)}")
        if not query.strip():
            raise ValueError("the query is empty; ask for something")

    def _allowed(self, pool: Collection[str] | None, exclude: Collection[str], where: Where | None) -> Allowed | None:
        """Chunks that may be found, or None: all. [chunks]"""
        if pool is None and not exclude and where is None:
            return None
        good = np.full(len(self.documents), pool is None)
        good[[self._number[name] for name in pool or () if name in self._number]] = True
        good[[self._number[name] for name in exclude if name in self._number]] = False
        if where is not None:
            first = np.unique(self._document, return_index=True)[1]
            rows = self.chunks.select(["document", "title", "url", "source"]).take(first).to_pylist()
            good &= np.array([bool(where({**row, "title": row["title"].split(" > ")[0]})) for row in rows], bool)
        allowed: Allowed = good[self._document]
        return allowed

    def _found(
        self, query: str, vector: Scores, method: str, depth: int, allowed: Allowed | None
    ) -> tuple[Numbers, Scores]:
        """Chunks of the `depth` best documents and their scores, best first."""

        def lexical(count: int) -> tuple[Numbers, Scores]:
            found: tuple[Numbers, Scores] = self._bm25.search(query, count, allowed)
            return found

        def dense(count: int) -> tuple[Numbers, Scores]:
            rows, cosines = self._nearest.search(vector, count, None if allowed is None else allowed[self._chunk])
            return self._chunk[rows], cosines

        if method in ("bm25", "dense"):
            return self._deep(lexical if method == "bm25" else dense, depth)
        lists = [self._deep(one, max(DEPTH, depth))[0] for one in (lexical, dense)]
        fuse = _ours("fusion").fuse
        fused: tuple[Numbers, Scores] = fuse(lists, self._document, self.fusion_k, (1.0, self.dense_weight))
        return fused

    def _deep(self, ranked: Callable[[int], tuple[Numbers, Scores]], depth: int) -> tuple[Numbers, Scores]:
        """A ranking that reaches `depth` documents, if there are so many and they are not too long."""
        count, most = 2 * depth, DEEPEST * max(depth, DEPTH)
        while True:
            found, scores = ranked(count)
            if len(found) < count or count >= most or len(np.unique(self._document[found])) >= depth:
                return found, scores
            count *= 4

    def _reranked(self, query: str, vector: Scores, found: Numbers, count: int) -> list[Passage]:
        passages = self._passages(found, np.zeros(len(found), np.float32), vector)
        scores = self.reranker.scores(query, [f"{one.title}\n{one.text}" for one in passages])
        order = sorted(range(len(passages)), key=lambda place: (-scores[place], place))
        return [passages[place]._replace(score=float(scores[place])) for place in order[:count]]

    def _passages(self, found: Numbers, scores: Scores, vector: Scores) -> list[Passage]:
        """What chunks say, read from the file."""
        rows = self._vector[found]
        cosines = np.full(len(found), np.nan, np.float32)
        cosines[rows >= 0] = self._vectors[rows[rows >= 0]].astype(np.float32) @ vector
        size = int(self.manifest["row_group"])
        groups = sorted({number // size for number in found.tolist()})
        with self._reading:  # two threads in one ParquetFile end the process
            texts = self._texts.read_row_groups(groups, ["text"], use_threads=False)["text"]
        first = {group: place * size for place, group in enumerate(groups)}  # all but the file's last are full
        passages = []
        for number, row, score, cosine in zip(found.tolist(), self.chunks.take(found).to_pylist(), scores, cosines,
                                              strict=True):  # fmt: skip
            text = texts[first[number // size] + number % size].as_py()
            known = {name: row[name] for name in Passage._fields if name in row}
            passages.append(Passage(text=text, score=float(score), relevance=float(cosine), **known))
        return passages
