"""Stage `rag`: an index of the knowledge, and how well it finds what answers a query.

In: `data` (its `knowledge`; its `queries`, where it has any). Out: `index/` (chunks, BM25, vectors, their embedder: all
that `retrieval.Index` needs; and a card), `threshold.json` (the relevance from which on a question is worth answering),
`evaluation.parquet` (one row a judged query: its measures by each method), `samples.md` (queries with what was found).

Documents are ranked by BM25 (Robertson & Zaragoza, *The Probabilistic Relevance Framework*, 2009), by vectors of their
chunks (Karpukhin et al., "Dense Passage Retrieval", 2020; the embedder: Reimers & Gurevych, "Sentence-BERT", 2019), and
by both, fused by reciprocal ranks (Cormack et al., 2009). What is particular here:

1. Nothing is trained, so queries of every side of the split are measured. Fusion and threshold are chosen by one part
   of them (whole groups by hash, `tuning_share`, none of the test side) and all figures are of the others.
2. The built-in queries are lines that people wrote under "See Also" about another object. The fixed `pool` of documents
   keeps their figures comparable while the knowledge grows; `whole_*` is the same over all documents.
3. Queries that nothing answers are the user's (no target), or else queries whose target, and what nearly repeats it, is
   hidden: hard ones, since documents about its neighbours stay.
4. Vectors are kept by the text they are of, in the scratch beside the run's own: a change of one per cent of the
   documents embeds one per cent, and a stage that was killed goes on where it was.
"""

from __future__ import annotations

import time
from pathlib import Path

from pipelines.core import artifacts, reading
from pipelines.core.context import StageContext
from pipelines.core.params.rag import RagParams

RESUMES = True  # vectors are kept
THRESHOLD, CACHE = "threshold.json", "embeddings"
PREFIXES = ("", "bm25_", "dense_", "reranked_", "whole_", "whole_bm25_", "whole_dense_")
MEASURES = ("mrr", "recall_at_1", "recall_at_5", "recall_at_10", "ndcg_at_10")
METRICS = frozenset({"documents", "chunks", "vectors", "near_duplicates", "queries", "queries_judged"})
OPTIONAL = frozenset(
    {
        *(f"{prefix}{name}{end}" for prefix in PREFIXES for name in MEASURES for end in ("", "_low", "_high")),
        "fusion_k", "fusion_dense_weight", "relevance_threshold", "false_answer_rate", "false_refusal_rate",
    }
)  # fmt: skip
SCORES = frozenset({"judged", "mrr*", "recall_at_*", "ndcg_at_*"})


def run(params: RagParams, inputs: dict[str, Path], outputs: Path, context: StageContext) -> dict[str, float]:
    """Build the index, choose how it ranks, measure it and publish it.

    Raises:
        ParamsError: `embedder` or `reranker` names nothing, or what it names cannot be used.
        DataError: a document that cannot be indexed.
        Stopped: a signal came; vectors that were made are kept.
    """
    from pipelines.core import indexing, rag_card, relevance_threshold, retrieval, retrieval_evaluation

    metrics = dict.fromkeys(METRICS, 0.0)
    if not (inputs["data"] / "knowledge").is_dir():
        told = "The data have no knowledge (a source with table: knowledge): there is nothing to index."
        context.say(told)
        artifacts.write_text(outputs / "README.md", f"# No index\n\n{told}\n")
        return metrics

    # 1. Chunks, BM25 and vectors.
    place = outputs / "index"
    metrics |= _build(params, inputs["data"], place, context)
    index = retrieval_evaluation.opened(place)

    # 2. How both rankings are fused, by the queries of the tuning part.
    asked = retrieval_evaluation.queries(params, inputs["data"])
    if unmeasured := retrieval_evaluation.unmeasured(params, asked):
        context.say(f"warning: {unmeasured}")
    pool = retrieval_evaluation.pool(params, index.documents, asked)
    fusion = retrieval_evaluation.tuned(index, asked, pool, context) if params.tune else None
    if fusion is not None:
        indexing.set_fusion(place, *fusion)
        index.fusion_k, index.dense_weight = fusion

    # 3. Every method, over the pool and over everything; then the relevance below which nothing is known.
    methods = ("bm25", "dense", "hybrid", *(("reranked",) if params.reranker else ()))
    of_pool = retrieval_evaluation.ranks(index, asked.judged, methods, pool, context)
    metrics |= retrieval_evaluation.figures(asked.judged, of_pool)
    if pool is not None:
        of_whole = retrieval_evaluation.ranks(index, asked.judged, methods[:3], None, context)
        metrics |= retrieval_evaluation.figures(asked.judged, of_whole, "whole_")
    chosen = relevance_threshold.choose(params, asked, index, context)
    metrics |= {
        "queries": float(len(asked.every)), "queries_judged": float(len(asked.judged)),
        "fusion_k": index.fusion_k, "fusion_dense_weight": index.dense_weight,
    } | relevance_threshold.metrics(chosen)  # fmt: skip
    if asked.judged:
        context.measure(**retrieval_evaluation.latencies(retrieval.Index.open(place), asked.judged))

    # 4. Publish what was measured beside the index.
    documents = artifacts.content_hash(inputs["data"] / "knowledge" / "all.parquet")
    columns = retrieval_evaluation.rows(asked.judged, of_pool, documents)
    reading.write_evaluation(outputs / "evaluation.parquet", columns)
    artifacts.write_json(outputs / THRESHOLD, relevance_threshold.told(chosen))
    card = rag_card.card(params, index.manifest, metrics, chosen, unmeasured, pool, fusion is not None)
    artifacts.write_text(place / "README.md", card)
    page = rag_card.samples(index, asked.judged[: params.samples])
    context.say(page)
    artifacts.write_text(outputs / "samples.md", page)
    return metrics


def measure(params: RagParams, inputs: dict[str, Path], context: StageContext, model: Path, evaluation: Path) -> None:
    """Ask another index, such as today's champion, with its own documents, what `run` asks.

    Raises:
        ArtifactError: the folder holds no index, or a damaged one.
    """
    from pipelines.core import retrieval_evaluation

    index = retrieval_evaluation.opened(model)
    asked = retrieval_evaluation.queries(params, inputs["data"])
    names = [row["id"] for row in reading.rows(inputs["data"], "knowledge", "all", ["id"])]
    # Today's documents are ranked as far as it holds them: what it does not hold it does not find.
    pool = retrieval_evaluation.pool(params, names, asked) or names
    found = retrieval_evaluation.ranks(index, asked.judged, ("bm25", "dense", "hybrid"), pool, context)
    documents = artifacts.content_hash(inputs["data"] / "knowledge" / "all.parquet")
    reading.write_evaluation(evaluation, retrieval_evaluation.rows(asked.judged, found, documents))


def _build(params: RagParams, data: Path, place: Path, context: StageContext) -> dict[str, float]:
    """Fill the folder of the index; its counts."""
    from pipelines.core import cpu, indexing

    settings = indexing.Settings(
        params.embedder, params.reranker, params.chunk_tokens, params.chunk_overlap, params.embedded_chunks,
        params.exact_chunks, params.fusion_k, params.dense_weight,
    )  # fmt: skip
    began = time.perf_counter()
    times: list[float] = []

    def tell(done: int, total: int) -> None:
        times.append(time.perf_counter())
        context.progress(done, total, embedding="chunks")
        context.stop_if_asked()

    counts = indexing.build(
        reading.rows(data, "knowledge", "all", ["id", "title", "text", "url", "source"]),
        place,
        settings,
        # Beside the scratch of this run, which goes when it ends: the next run needs most of the vectors, too.
        cache=context.work.parent / CACHE,
        precision=cpu.precision(context.precision),  # the embedder is on the CPU
        tell=tell,
    )
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    context.measure(index_seconds=seconds, index_bytes=float(size), vectors_made=float(counts.embedded))
    if counts.embedded:
        context.measure(vectors_per_second=counts.embedded / (times[-1] - times[0]))
    return {name: float(getattr(counts, name)) for name in ("documents", "chunks", "vectors", "near_duplicates")}
