"""The index by hand: embedding beside sentence-transformers, update beside rebuild, latency and recall at any size.

    python -m benchmarks.retrieval embedding --knowledge artifacts/data/knowledge/all.parquet --precision bf16
    python -m benchmarks.retrieval update    --knowledge ... --documents 2000
    python -m benchmarks.retrieval latency   --knowledge ... --chunks 100000     (1000000 takes ten minutes to build)

`embedding` takes turns, and tells processor time beside wall time: where others compute, too, the former is the
sounder ratio. `latency` mixes pairs of real vectors with noise, and real sentences; queries are real, and their
embedding is part of what is timed. Threads spin between two products, as those of `sluice ask` do.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch

from pipelines.core import embedding, environment, indexing, lexical, nearest, retrieval
from pipelines.core.vector_cache import VectorCache, key

EMBEDDER = "minilm-l6-v2"
QUERIES = (
    "how do I flip an array upside down", "read a table from a csv file", "sort a list of dictionaries by a key",
    "open a socket and wait for a connection", "parse a date from text", "compute the standard deviation along an axis",
    "numpy.linalg.norm", "run a function in another process", "compress bytes with gzip", "match a regular expression",
    "plot a histogram", "join two data frames on a column", "draw random numbers from a normal distribution",
    "write json to a file", "what does functools.lru_cache do", "iterate over two lists at once",
)  # fmt: skip


def main() -> None:
    """Measure one thing and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["embedding", "update", "latency"])
    parser.add_argument("--knowledge", type=Path, default=Path("artifacts/data/knowledge/all.parquet"))
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of our embedder; the peer's is fp32"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows = pd.read_parquet(asked.knowledge).sample(frac=1, random_state=0)[["id", "title", "text", "url"]]
    documents: list[dict[str, Any]] = rows.to_dict("records")  # type: ignore[assignment]
    {"embedding": embed, "update": update, "latency": latency}[asked.what](documents, asked)


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, wall seconds, processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    found = run()
    return found, time.perf_counter() - wall, time.process_time() - processor


def embed(documents: list[dict[str, Any]], asked: argparse.Namespace) -> None:
    """Texts as chunks have them, by both, in turns."""
    from sentence_transformers import SentenceTransformer

    texts = [f"{row['title']}\n{row['text'][:900]}" for row in documents[: asked.texts]]
    place = embedding.find(EMBEDDER)
    ours = embedding.Embedder(place, embedding.dtype(asked.precision))
    peer = SentenceTransformer(str(place), device="cpu")
    peer.encode(texts[:8])
    ours.embed(texts[:8])
    ratios = []
    for _ in range(asked.rounds):
        expected, *theirs = timed(lambda: peer.encode(texts, normalize_embeddings=True))
        found, *own = timed(lambda: ours.embed(texts))
        ratios.append([one / other for one, other in zip(theirs, own, strict=True)])
        print(
            f"sentence-transformers {theirs[0]:.2f} s ({theirs[1]:.2f} s of processors), "
            f"ours {own[0]:.2f} ({own[1]:.2f})"
        )
    wall, processor = np.median(ratios, axis=0)
    cosine = float((found * expected).sum(1).min())
    print(
        f"{len(texts)} texts: {wall:.2f} times as fast, {processor:.2f} in processor time, lowest cosine {cosine:.6f}"
    )


def update(documents: list[dict[str, Any]], asked: argparse.Namespace) -> None:
    """One document in a hundred changes."""
    rows = documents[: asked.documents]
    changed = [
        {**row, "text": f"{row['text']}\n\nChanged."} if number % 100 == 0 else row for number, row in enumerate(rows)
    ]
    settings = indexing.Settings(embedder=EMBEDDER)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        indexing.build(rows, folder / "first", settings, cache=folder / "cache")
        counts, wall, _ = timed(lambda: indexing.build(changed, folder / "update", settings, cache=folder / "cache"))
        whole, rebuilt, _ = timed(lambda: indexing.build(changed, folder / "rebuild", settings))
        same = retrieval.read_manifest(folder / "update") == retrieval.read_manifest(folder / "rebuild")
        print(f"rebuild of {whole.documents} documents, {whole.chunks} chunks: {rebuilt:.1f} s")
        print(
            f"update, {counts.embedded} chunks embedded: {wall:.1f} s, {rebuilt / wall:.1f} times as fast, "
            f"same bytes: {same}"
        )


def latency(documents: list[dict[str, Any]], asked: argparse.Namespace) -> None:
    """Searches one after another, by each method; recall of the approximate index if there is one."""
    embedder = embedding.Embedder(embedding.find(EMBEDDER))
    draw = np.random.default_rng(0)
    real = embedder.embed([f"{row['title']}\n{row['text'][:300]}" for row in documents[:1000]])
    sentences = [line.strip() for row in documents for line in row["text"].split(". ") if 20 < len(line) < 200]
    first, second = draw.integers(0, len(real), (2, asked.chunks))
    share = draw.random((asked.chunks, 1), dtype=np.float32)
    noise = draw.standard_normal((asked.chunks, real.shape[1]), dtype=np.float32) * 0.02
    vectors = share * real[first] + (1 - share) * real[second] + noise
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    chosen = draw.integers(0, len(sentences), (asked.chunks, 3))
    rows = [
        {"id": f"{number:07}", "text": ". ".join([str(number), *(sentences[one] for one in some)])}
        for number, some in enumerate(chosen.tolist())
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        identity = f"{embedding.fingerprint(embedding.find(EMBEDDER))} fp32"
        VectorCache(folder / "cache", identity, real.shape[1]).add([key(row["text"]) for row in rows], vectors)
        settings = indexing.Settings(embedder=EMBEDDER, embedded_chunks=1, size=254)
        counts, wall, _ = timed(lambda: indexing.build(rows, folder / "index", settings, cache=folder / "cache"))
        size = sum(path.stat().st_size for path in (folder / "index").rglob("*") if path.is_file())
        print(f"{counts.chunks} chunks, {counts.embedded} embedded: built in {wall:.1f} s, {size / 1e6:.0f} MB")
        index = retrieval.Index.open(folder / "index")
        print("| method | p50 ms | p95 ms |\n| --- | --- | --- |")
        for method in ("bm25", "dense", "hybrid"):
            index.search(QUERIES[0], method=method)
            taken = [1e3 * timed(partial(index.search, q, method=method))[1] for q in QUERIES * asked.rounds]
            print(f"| {method} | {median(taken):.1f} | {np.percentile(taken, 95):.1f} |")
        parts(index, asked.rounds)


def parts(index: retrieval.Index, rounds: int) -> None:
    """What a search is made of, and how many of the ten nearest the cells find."""
    asked = [index.embedder.query(query) for query in QUERIES]
    stored = np.load(index.folder / "vectors.npy", mmap_mode="r")
    near, words = nearest.Nearest(index.folder, stored), lexical.Bm25(index.folder / "bm25", index.chunks.num_rows)
    steps: dict[str, Callable[[int], Any]] = {
        "query's vector": lambda at: index.embedder.query(QUERIES[at]),
        "nearest vectors": lambda at: near.search(asked[at], 200),
        "BM25": lambda at: words.search(QUERIES[at], 200),
    }
    for name, step in steps.items():
        step(0)
        taken = [1e3 * timed(partial(step, at))[1] for at in range(len(QUERIES)) for _ in range(rounds)]
        print(f"| ... {name} | {median(taken):.1f} | {np.percentile(taken, 95):.1f} |")
    if near.cells is None:
        return
    exact = nearest.Nearest(index.folder / "bm25", stored)  # a folder without cells: all vectors
    hits = [len({*near.search(one, 10)[0].tolist()} & {*exact.search(one, 10)[0].tolist()}) for one in asked]
    print(f"recall@10 of the approximate index against exact search: {np.mean(hits) / 10:.3f}")


if __name__ == "__main__":
    if os.environ.get("GOMP_SPINCOUNT") != environment.SPIN_ALONE:  # read when torch is loaded: before this line
        again = [sys.executable, "-m", "benchmarks.retrieval", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, "GOMP_SPINCOUNT": environment.SPIN_ALONE})
    main()
