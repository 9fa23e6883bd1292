"""The report's tables of retrieval and of the answers given from it, as stages `rag` and `answers` measured them.

In: a stage that tells of an index (`chunks`, and `mrr` and its like by method), or of models that answered
(`NAME/answer_score`; their order from `answers.parquet`, which metrics sorted by key have lost).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.core import report_text
from pipelines.core.errors import ArtifactError
from pipelines.core.report_inputs import Stage
from pipelines.core.report_text import number, words

Metrics = Mapping[str, float]
RETRIEVERS = {"bm25_": "bm25", "dense_": "dense", "": "hybrid", "reranked_": "reranked"}
WHOLE = "whole_"  # before a retriever's keys: over all documents, where a pool was ranked, too
MEASURES = {
    "mrr": "MRR",
    "recall_at_1": "recall@1",
    "recall_at_5": "recall@5",
    "recall_at_10": "recall@10",
    "ndcg_at_10": "nDCG@10",
}
SEARCH = {"query_ms_p50": "{} ms at the median", "query_ms_p95": "{} ms at the 95th percentile"}
INDEX = {
    "documents": "{} documents",
    "chunks": "{} chunks",
    "vectors": "{} vectors",
    "vectors_made": "{} of them made in this run",
    "index_megabytes": "{} MB",
    "index_seconds": "{} s to build",
}
SCORE, VALIDATION = "answer_score", "answer_score_validation"  # token F1 with what was found
COLUMNS = {
    "answer_score_closed_book": "F1 closed book",
    SCORE: "F1 retrieval",
    "answer_score_oracle": "F1 oracle",
    "exact_match": "exact match",
    "chrf": "chrF",
    "citation_precision": "precision",
    "citation_recall": "recall",
    "groundedness": "groundedness",
}


def retrieval(stage: Stage) -> str:
    """A row a retriever, over the pool and over all documents, and what a search costs; nothing without an index."""
    metrics = stage.metrics
    if not metrics.get("chunks"):
        return ""
    ranked, whole = _retrievers(metrics, ""), _retrievers(metrics, WHOLE)
    head = ["", *MEASURES.values()]
    parts = []
    if ranked:
        judged = _of(metrics, "queries_judged", "queries")
        parts.append(f"How high the one document that answers a query is ranked, with 95 % intervals, over {judged}.")
    else:
        parts.append("The data have no queries with a target: how well it finds was not measured.")
    if ranked and whole:
        pool = "Over the pool, a part of the documents that holds every one that answers:"
        parts += [pool, report_text.table(head, ranked)]
    if every := whole or ranked:
        parts += ["Over all documents:", report_text.table(head, every)]
    return "\n\n".join([*parts, _costs(metrics)])


def answers(stage: Stage) -> str:
    """A row a model, which one was chosen, and how it refuses; nothing for a stage in which no model answered.

    Raises:
        ArtifactError: `answers.parquet` is damaged.
    """
    metrics = stage.metrics
    names = [name for key in metrics for name, _, rest in [key.partition("/")] if rest == SCORE]
    if not names:
        return ""
    order = _order(stage)
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    chosen = _chosen(metrics, names, ordered=set(names) <= set(order))
    rows = [
        [f"**{words(name)}**" if name == chosen else words(name), *(_cell(metrics, f"{name}/{key}") for key in COLUMNS)]
        for name in names
    ]
    asked = _of(metrics, "questions_test", "questions of the test side")
    parts = [
        f"Token F1 on {asked}, asked alone (closed book), with what retrieval finds, and with the document that "
        "answers them (oracle). The rest is of the answers with retrieval; precision and recall are of citations.",
        report_text.table(["model", *COLUMNS.values()], rows, right=range(1, 1 + len(COLUMNS))),
        _choice(metrics, chosen),
        _refusals(metrics),
    ]
    return "\n\n".join(part for part in parts if part)


def _retrievers(metrics: Metrics, start: str) -> list[list[str]]:
    """Rows of the retrievers that were measured, their keys after `start`."""
    rows = [
        [name, *(_cell(metrics, f"{start}{prefix}{measure}") for measure in MEASURES)]
        for prefix, name in RETRIEVERS.items()
    ]
    return [row for row in rows if any(row[1:])]


def _costs(metrics: Metrics) -> str:
    """Time of a search, and size and time of the index, as far as they were measured."""
    known = dict(metrics)
    if "index_bytes" in known:
        known["index_megabytes"] = known["index_bytes"] / 1e6
    told = []
    for name, parts in (("A search, its query embedded", SEARCH), ("The index", INDEX)):
        if found := [text.format(number(known[key])) for key, text in parts.items() if key in known]:
            told.append(f"{name}: {', '.join(found)}.")
    return " ".join(told)


def _order(stage: Stage) -> list[str]:
    """Models in the order in which the stage asked them; none where it left no answers."""
    import pyarrow
    import pyarrow.parquet as pq

    place = stage.file("answers.parquet")
    try:
        return [] if place is None else [*dict.fromkeys(pq.read_table(place, columns=["model"])["model"].to_pylist())]
    except (pyarrow.ArrowException, KeyError) as error:
        raise ArtifactError(f"{stage.name}/answers.parquet has no column model: {error}") from None


def _chosen(metrics: Metrics, names: Sequence[str], ordered: bool) -> str | None:
    """The best model on the validation side, the first of equals; None where that is not known."""
    scores = {name: metrics[key] for name in names if (key := f"{name}/{VALIDATION}") in metrics}
    best = [name for name, score in scores.items() if score == max(scores.values())]
    return best[0] if len(best) == 1 or (best and ordered) else None


def _choice(metrics: Metrics, chosen: str | None) -> str:
    """Which model the assistant has and why, and what retrieval is worth to it."""
    told = []
    if chosen is not None:
        on = _of(metrics, "questions_validation", "questions of the validation side")
        told.append(f"Chosen is **{words(chosen)}**, by its F1 of {_cell(metrics, f'{chosen}/{VALIDATION}')} on {on}.")
    if gain := _cell(metrics, "gain_over_closed_book"):
        told.append(f"What retrieval adds to the chosen model's F1, 95 % interval in brackets: {gain}.")
    return " ".join(told)


def _refusals(metrics: Metrics) -> str:
    """How often the assistant answers what nothing answers, and refuses what a document answers."""
    told = []
    if answered := _cell(metrics, "false_answer_rate"):
        nothing = _of(metrics, "unanswerable_test", "questions that nothing answers")
        told.append(f"of {nothing} it answers {answered} all the same (false answers)")
    if refused := _cell(metrics, "false_refusal_rate"):
        told.append(f"of those that a document answers it refuses {refused} (false refusals)")
    return f"When the assistant should refuse: {'; '.join(told)}." if told else ""


def _cell(metrics: Metrics, key: str) -> str:
    """A share with its interval, where it has one; nothing where it was not measured."""
    if key not in metrics:
        return ""
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    # No break within: a narrow column has the figure on one line and its interval on the next.
    ends = "" if low is None or high is None else f" ({low:.3f}\u00a0to\u00a0{high:.3f})"
    return f"{metrics[key]:.3f}{ends}"


def _of(metrics: Metrics, key: str, what: str) -> str:
    """How many of what, as far as that is known."""
    return f"{number(metrics[key])} {what}" if key in metrics else what
