"""Documents in, an index folder out that `retrieval.Index` opens; the same input gives the same bytes.

An index is always made whole, but what takes the time, its vectors, comes from a cache by the text they are of: when
one document in a hundred changes, one in a hundred is embedded, and the folder equals one that was made without.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.core import artifacts, chunking, embedding, lexical, near_chunks, nearest, reranking, retrieval
from pipelines.core.errors import DataError, ParamsError
from pipelines.core.vector_cache import SpanCache, VectorCache, key

ROW_GROUP = 64  # chunks of a Parquet row group: what is read to show one
BATCH = 2048  # chunks embedded between two visits to the cache, and to whoever watches
DOCUMENTS = 512  # read by the tokenizer at a time

Tell = Callable[[int, int], None]  # how many of how many chunks have their vectors; may raise to stop


@dataclass(frozen=True)
class Settings:
    """How an index is made."""

    embedder: str = "minilm-l6-v2"
    reranker: str | None = None  # directory or hub id of a cross-encoder that the folder carries along
    size: int = 200  # tokens of a chunk at most
    overlap: float = 0.15
    embedded_chunks: int | None = None  # of a document, from where it says more than its title; None: all
    exact_chunks: int = 50_000  # with more vectors than this those of the nearest cells are looked at
    fusion_k: float = 10.0
    dense_weight: float = 1.5


class Counts(NamedTuple):
    """What an index holds, and what it cost."""

    documents: int
    chunks: int
    vectors: int
    near_duplicates: int
    embedded: int  # vectors made now; the others were in the cache


class _Chunk(NamedTuple):
    """A row of chunks.parquet but for `vector` and `near`."""

    chunk: str
    document: str
    part: int
    title: str
    text: str
    url: str | None
    source: str | None
    start: int
    end: int
    line: int

    @property
    def read(self) -> str:
        """What BM25 reads: the title path, then the text."""
        return self.with_title(self.text)

    def with_title(self, text: str) -> str:
        """The title path, then a text."""
        return f"{self.title}\n{text}" if self.title else text


def build(
    documents: Iterable[Mapping[str, Any]],
    folder: Path,
    settings: Settings,
    *,
    cache: Path | None = None,
    precision: str = "fp32",
    tell: Tell = lambda done, total: None,
) -> Counts:
    """Fill a folder with the index of documents.

    Args:
        documents: rows with `id` and `text`, and `title`, `url`, `source` where they have any.
        folder: made if it is not there; its files are replaced.
        cache: folder of vectors and spans that earlier builds made, which this one adds to.
        precision: `fp32` or `bf16`, of the embedder.

    Raises:
        ParamsError: embedder or re-ranker names nothing, or cannot be used; chunks longer than the embedder's window.
        DataError: no document; one without an id; two with the same.
    """
    try:
        place = embedding.find(settings.embedder)
        embedder = embedding.Embedder(place, embedding.dtype(precision))
    except embedding.EmbedderUnusable as error:
        raise ParamsError(f"rag.embedder: {error}") from None
    window = embedder.settings.max_tokens
    if settings.size > window - 2:
        raise ParamsError(
            f"rag.chunk_tokens: {settings.size}; accepted: at most {window - 2}, as embedder {settings.embedder} "
            f"reads {window} tokens, two of them its own"
        )
    folder.mkdir(parents=True, exist_ok=True)
    reranker = _reranker(settings, folder / "reranker")  # refused before hours are spent on vectors
    sha = embedding.fingerprint(place)
    documents = _checked(documents)
    chunks, count, data = _chunks(documents, embedder, settings, SpanCache(cache, _chunker(settings, sha)))
    store = VectorCache(cache, f"{sha} {precision}", embedder.dimensions)
    meant = _meant(chunks, documents, settings.embedded_chunks)
    vectors, made = _vectors(list(meant.values()), embedder, store, tell)
    near = near_chunks.first_of_kind([chunk.text or chunk.title for chunk in chunks])

    _write_chunks(chunks, list(meant), near, folder / "chunks.parquet")
    np.save(folder / "vectors.npy", vectors)
    lexical.build((chunk.read for chunk in chunks), folder / "bm25")
    (folder / nearest.FILE).unlink(missing_ok=True)
    if len(vectors) > settings.exact_chunks:
        nearest.build(vectors, folder)
    _copy(place, embedding.files(place), folder / "embedder")
    counts = Counts(count, len(chunks), len(vectors), int((near != np.arange(len(near))).sum()), made)
    manifest = {
        "format": retrieval.FORMAT,
        "embedder": {
            "name": Path(settings.embedder).name if Path(settings.embedder).is_dir() else settings.embedder,
            "sha256": sha, "dimensions": embedder.dimensions, "max_tokens": window, "precision": precision,
        },
        "reranker": reranker,
        "chunker": {"size": settings.size, "overlap": settings.overlap, "version": chunking.VERSION},
        "bm25": {"k1": lexical.K1, "b": lexical.B, "variant": "lucene", "version": lexical.VERSION},
        "fusion": {"k": settings.fusion_k, "dense_weight": settings.dense_weight},
        "counts": {name: value for name, value in counts._asdict().items() if name != "embedded"},
        "embedded_chunks": settings.embedded_chunks,
        "row_group": ROW_GROUP,
        "data": data,
    }  # fmt: skip
    _seal(folder, manifest)
    return counts


def set_fusion(folder: Path, k: float, dense_weight: float) -> None:
    """Change how both rankings of an index are fused."""
    manifest = retrieval.read_manifest(folder)
    artifacts.write_json(folder / "manifest.json", {**manifest, "fusion": {"k": k, "dense_weight": dense_weight}})


def verify(folder: Path) -> None:
    """Hold every file of an index against the manifest's hashes.

    Raises:
        IndexDamaged: a file is missing or has other bytes.
    """
    for name, file in retrieval.read_manifest(folder)["files"].items():
        found = artifacts.content_hash(folder / name)
        if found != file["sha256"]:
            raise retrieval.IndexDamaged(
                f"{folder / name}: its SHA-256 is {found[:12]}, the manifest says {file['sha256'][:12]}; "
                "build the index again"
            )


def _checked(documents: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for number, row in enumerate(documents, 1):
        name = row.get("id")
        if not isinstance(name, str) or not name:
            raise DataError(f"knowledge, row {number}: id is {name!r}; accepted: a text that is not empty")
        if name in found:
            raise DataError(f"knowledge, row {number}: id {name!r} is an earlier row's, too; ids must differ")
        if not isinstance(row.get("text"), str):
            raise DataError(f"knowledge, id {name}: text is {row.get('text')!r}; accepted: a text")
        found[name] = row
    return [found[name] for name in sorted(found)]  # the order of rows is no part of what they say


def _chunker(settings: Settings, sha: str) -> str:
    return json.dumps([chunking.VERSION, settings.size, settings.overlap, sha])


def _chunks(
    documents: Sequence[Mapping[str, Any]], embedder: embedding.Embedder, settings: Settings, cache: SpanCache
) -> tuple[list[_Chunk], int, str]:
    """Chunks in the order of ids, how many documents have any, and the hash of all."""
    keys = [key(row.get("title") or "", row["text"]).hex() for row in documents]
    spans = {name: cache.known[name] for name in keys if name in cache.known}
    new = [(name, row) for name, row in zip(keys, documents, strict=True) if name not in spans]
    for first in range(0, len(new), DOCUMENTS):
        some = new[first : first + DOCUMENTS]
        for (name, row), tokens in zip(some, embedder.offsets([row["text"] for _, row in some]), strict=True):
            cut = chunking.chunks(row.get("title") or "", row["text"], tokens, settings.size, settings.overlap)
            spans[name] = [list(chunk) for chunk in cut]
    cache.keep(spans)
    digest = hashlib.sha256()
    found, count = list[_Chunk](), 0
    for name, row in zip(keys, documents, strict=True):
        digest.update(json.dumps([row["id"], name, row.get("url"), row.get("source")]).encode())
        text, line, at = row["text"], 1, 0
        said = [span for span in spans[name] if text[span[1] : span[2]].strip() or not span[2]]  # no blanks
        for part, (title, start, end) in enumerate(said):
            line, at = line + text.count("\n", min(at, start), start) - text.count("\n", start, max(at, start)), start
            found.append(
                _Chunk(f"{row['id']}#{part}", row["id"], part, title, text[start:end], row.get("url"),
                       row.get("source"), start, end, line)
            )  # fmt: skip
        count += bool(spans[name])
    if not found:
        raise DataError("knowledge has no document with a text; accepted: at least one. Add documents to data.sources.")
    return found, count, digest.hexdigest()


def _meant(chunks: Sequence[_Chunk], documents: Sequence[Mapping[str, Any]], most: int | None) -> dict[int, str]:
    """What the embedder reads, by number of the chunk: the title path and the text, but not an opening signature. Names
    of parameters draw a vector away from what is meant; BM25 reads them. The first `most` chunks of each document with
    more than that; of one that has no more, its first.
    """
    opening = {row["id"]: chunking.signature(row.get("title") or "", row["text"]) for row in documents}
    found: dict[int, str] = {}
    for document, numbers in groupby(range(len(chunks)), lambda number: chunks[number].document):
        mine = list(numbers)
        said = {n: chunks[n].text[max(0, opening[document] - chunks[n].start) :].strip() for n in mine}
        telling = [n for n in mine if said[n]][:most]
        found |= {n: chunks[n].with_title(said[n]) for n in telling} or {mine[0]: chunks[mine[0]].read}
    return found


def _vectors(
    texts: Sequence[str], embedder: embedding.Embedder, cache: VectorCache, tell: Tell
) -> tuple[NDArray[np.float16], int]:
    """Vectors of texts, (texts, dimensions), and how many were made now."""
    keys = [key(text) for text in texts]
    new = {name: text for name, text in zip(keys, texts, strict=True) if name not in cache.known}
    # By length, so that the texts of a batch fill rows well; a vector does not depend on its batch
    order = sorted(new, key=lambda name: (len(new[name]), name))
    tell(0, len(order))
    for first in range(0, len(order), BATCH):
        some = order[first : first + BATCH]
        cache.add(some, embedder.embed([new[name] for name in some]))
        tell(first + len(some), len(order))
    cache.tidy(keys)
    vectors = np.zeros((len(keys), embedder.dimensions), np.float16)
    for number, name in enumerate(keys):
        vectors[number] = cache.known[name]
    return vectors, len(order)


def _write_chunks(chunks: Sequence[_Chunk], chosen: Sequence[int], near: NDArray[np.int64], place: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = np.full(len(chunks), -1, np.int64)
    rows[list(chosen)] = np.arange(len(chosen))
    kinds = {"part": pa.int32(), "start": pa.int64(), "end": pa.int64(), "line": pa.int32()}
    columns = {
        name: pa.array([chunk[at] for chunk in chunks], kinds.get(name, pa.string()))
        for at, name in enumerate(_Chunk._fields)
    }
    table = pa.table({**columns, "near": pa.array(near, pa.int64()), "vector": pa.array(rows, pa.int64())})
    pq.write_table(table, place, row_group_size=ROW_GROUP, compression="lz4", write_statistics=False)


def _reranker(settings: Settings, target: Path) -> dict[str, str] | None:
    """Copy the re-ranker, once it has been seen to work; what the manifest says of it."""
    shutil.rmtree(target, ignore_errors=True)
    if settings.reranker is None:
        return None
    try:
        place = embedding.find(settings.reranker, "re-ranker")
        reranking.Reranker(place).scores("a query", ["a passage", "another one, which is longer"])
    except (ValueError, RuntimeError, IndexError) as error:  # tokens beyond its embedding, more labels, no weights
        raise ParamsError(f"rag.reranker: {error}") from None
    _copy(place, embedding.files(place), target)
    name = Path(settings.reranker).name if Path(settings.reranker).is_dir() else settings.reranker
    return {"name": name, "sha256": embedding.fingerprint(place)}


def _copy(place: Path, files: Sequence[Path], target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for path in files:
        own = target / path.relative_to(place)
        own.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, own)


def _seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with size and hash of every other file."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"):
        files[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": artifacts.content_hash(path),
        }
    artifacts.write_json(folder / "manifest.json", {**manifest, "files": files})
