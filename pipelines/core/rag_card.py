"""Pages for people beside an index: its card, and queries with what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.core import cards
from pipelines.core.params.rag import RagParams
from pipelines.core.relevance_threshold import Chosen
from pipelines.core.retrieval_evaluation import Query

METHODS = {"bm25_": "BM25 alone", "dense_": "vectors alone", "": "both, fused", "reranked_": "both, re-ranked"}
COLUMNS = {"recall_at_1": "recall at 1", "recall_at_5": "at 5", "recall_at_10": "at 10", "mrr": "MRR",
           "ndcg_at_10": "nDCG at 10"}  # fmt: skip
SHOWN, LOOKED_AT = 3, 12  # documents of a sample, and passages among which these are
LINE = 160  # characters of a passage in a sample


def card(
    params: RagParams,
    manifest: Mapping[str, Any],
    metrics: Mapping[str, float],
    chosen: Chosen | None,
    unmeasured: str,
    ranked: Sequence[str] | None,
    tuned: bool,
) -> str:
    """Markdown, without figures of a machine.

    Args:
        manifest: the index's.
        unmeasured: why nothing judged it, if so.
        ranked: the pool; None: all documents.
        tuned: whether queries chose how both rankings are fused.
    """
    vectors = (
        "of every chunk"
        if params.embedded_chunks is None
        else f"of the first {params.embedded_chunks} of each document"
    )
    lines = [
        "# sluice-index\n",
        f"{metrics['documents']:,.0f} documents in {metrics['chunks']:,.0f} chunks of at most {params.chunk_tokens} "
        f"tokens; BM25 of all of them, vectors {vectors} ({metrics['vectors']:,.0f}) by "
        f"{manifest['embedder']['name']}. "
        f"{metrics['near_duplicates']:,.0f} chunks nearly repeat another and are left out of results.\n",
        "```python\nfrom pipelines.core import retrieval\n\nindex = retrieval.Index.open(path)\n"
        'passages = index.search("how do I flip an array?", 5)\n```\n',
    ]
    if unmeasured:
        return "\n".join([*lines, unmeasured]) + "\n"
    kinds = ", ".join(params.kinds) or "all kinds"
    pool = "all documents" if ranked is None else f"a pool of {len(ranked):,} documents, all targets among them"
    lines += [
        f"## How well it finds\n\n{metrics['queries_judged']:,.0f} queries ({kinds}), one document answers each; "
        f"ranked is {pool}. 95 % intervals by bootstrap over groups of queries.\n",
        _table(metrics, "recall_at_10"),
    ]
    if "whole_mrr" in metrics:
        lines += ["The same over all documents:\n", _table(metrics, "recall_at_10", "whole_")]
    how = ", chosen by queries that nothing is judged by" if tuned else ""
    lines.append(
        f"Fused by reciprocal ranks, constant {metrics['fusion_k']:g}, vectors weighing "
        f"{metrics['fusion_dense_weight']:g} times BM25{how}.\n"
    )
    if chosen is not None and chosen.mistakes is not None:
        nothing = "queries that nothing answers" if chosen.given else "queries whose document was hidden from the index"
        lines.append(
            f"## When it knows nothing\n\nBelow a relevance (cosine of query and best passage) of {chosen.value:.3f} a "
            "question is better not answered. The threshold, chosen by other queries, lets "
            f"{chosen.mistakes.false_answers:.1%} of {nothing} pass, and refuses "
            f"{chosen.mistakes.false_refusals:.1%} of those that have an answer.\n"
        )
    return "\n".join(lines)


def _table(metrics: Mapping[str, float], interval: str, prefix: str = "") -> str:
    """One row a method that was measured; `interval`: the column that shows its interval."""
    rows = ["| | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for method, told in METHODS.items():
        start = f"{prefix}{method}"
        if f"{start}mrr" not in metrics:
            continue
        cells = []
        for name in COLUMNS:
            key = f"{start}{name}"
            ends = f" ({metrics[f'{key}_low']:.3f} to {metrics[f'{key}_high']:.3f})" if name == interval else ""
            cells.append(f"{metrics[key]:.3f}{ends}")
        rows.append(f"| {told} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def samples(index: Any, queries: Sequence[Query]) -> str:
    """Queries with their target and the passages found for each, best first."""
    lines = ["# Queries and what was found", ""]
    for query in queries:
        lines.append(f"**Query:** {cards.inline(query.text)} (answered by {cards.inline(query.target or '')})\n")
        best: dict[str, Any] = {}  # passage of each document
        for one in index.search(query.text, LOOKED_AT):
            best.setdefault(one.document, one)
        for number, one in enumerate([*best.values()][:SHOWN], 1):
            mark = " **right**" if one.document == query.target else ""
            title = " ".join(one.title.split())  # on one line, whatever it holds
            known = f", relevance {one.relevance:.3f}" if one.relevance == one.relevance else ""
            lines.append(f"{number}. *{title}*{known}{mark}: {cards.inline(one.text[:LINE])}")
        lines.append("")
    return "\n".join(lines) + "\n"
