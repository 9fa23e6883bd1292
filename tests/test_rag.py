"""Stage `rag` on small documents with an embedder of two layers: files, figures, the same bytes, a kill, a champion."""

from __future__ import annotations

import json
import shutil
import signal
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from test_embedding import WORDS, tiny
from test_reward import write

from pipelines import rag
from pipelines.core import (
    embedding,
    gates,
    indexing,
    policy,
    rag_card,
    relevance_threshold,
    retrieval,
    retrieval_evaluation,
)
from pipelines.core.artifacts import content_hash
from pipelines.core.context import StageContext, Stopped
from pipelines.core.errors import ArtifactError, DataError, ParamsError
from pipelines.core.params.rag import RagParams

TINY: dict[str, Any] = {
    "embedder": "", "reranker": None, "chunk_tokens": 24, "chunk_overlap": 0.1, "embedded_chunks": 1,
    "exact_chunks": 100_000, "fusion_k": 10.0, "dense_weight": 1.5, "tune": True, "tuning_share": 0.4,
    "kinds": ["line"], "pool": 45, "threshold_queries": 10, "samples": 2,
}  # fmt: skip
FILES = {"index/README.md", "evaluation.parquet", "threshold.json", "samples.md"}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny(tmp_path_factory.mktemp("embedder") / "tiny"))


def documents(count: int = 60) -> list[dict[str, Any]]:
    draw = np.random.default_rng(1)
    return [
        {"id": f"d{n:02}", "group": f"d{n:02}", "source": "s", "row": n, "title": f"word{n}", "url": f"f.py#L{n + 1}",
         "text": "\n\n".join(" ".join(draw.choice(WORDS, 12)) + "." for _ in range(4))} for n in range(count)
    ]  # fmt: skip


def data(place: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Documents, and of each a query that names it on one of three sides."""
    rows = documents() if rows is None else rows
    write(place / "knowledge" / "all.parquet", rows)
    for split, numbers in (("train", range(30)), ("validation", range(30, 38)), ("test", range(38, 50))):
        asked = [
            {"id": f"q{n:02}", "group": f"g{n // 2}", "kind": "line", "query": f"word{n} {rows[n]['text'][:20]}",
             "target": f"d{n:02}", "answers": ["an answer"] if n % 3 else None} for n in numbers
        ]  # fmt: skip
        write(place / "queries" / f"{split}.parquet", asked)
    return place


def params(embedder: str, **changes: Any) -> RagParams:
    return RagParams.model_validate(TINY | {"embedder": embedder} | changes)


def run(root: Path, given: RagParams, source: Path, name: str = "out") -> tuple[Path, dict[str, float], StageContext]:
    """One run of the stage into `root/name`."""
    context = StageContext("rag", root, f"{len(name)}" * 64)
    outputs = root / name
    outputs.mkdir()
    return outputs, rag.run(given, {"data": source}, outputs, context), context


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, embedder: str) -> tuple[Path, Path, dict[str, float], StageContext]:
    root = tmp_path_factory.mktemp("rag")
    source = data(root / "data")
    return source, *run(root, params(embedder), source)


def test_files_metrics_and_the_same_bytes(
    made: tuple[Path, Path, dict[str, float], StageContext], tmp_path: Path, embedder: str
) -> None:
    source, outputs, metrics, context = made
    found = {path.relative_to(outputs).as_posix() for path in outputs.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith("index/")} | {"index/README.md"} == FILES
    assert metrics.keys() >= rag.METRICS
    assert not [key for key in metrics if not any(fnmatchcase(key, name) for name in rag.METRICS | rag.OPTIONAL)]
    assert metrics["documents"] == 60 and metrics["vectors"] == 60 < metrics["chunks"]
    assert {"query_ms_p50", "query_ms_p95", "index_seconds", "index_bytes", "vectors_per_second"} <= set(
        context.measured
    )
    indexing.verify(outputs / "index")
    again, same, _ = run(tmp_path, params(embedder), source)
    assert content_hash(again) == content_hash(outputs) and same == metrics
    written = "".join((outputs / name).read_text() for name in FILES if not name.endswith("parquet"))
    assert str(source.parent) not in written and f"{metrics['recall_at_10']:.3f}" in written


def test_figures_are_those_of_the_judged_queries(
    made: tuple[Path, Path, dict[str, float], StageContext], embedder: str
) -> None:
    """Ranks counted here, by searching the published index query by query."""
    source, outputs, metrics, _ = made
    rows = pq.read_table(outputs / "evaluation.parquet").to_pylist()
    assert len(rows) == metrics["queries_judged"] < metrics["queries"] == 50
    assert {row["id"] for row in rows} >= {f"q{n:02}" for n in range(38, 50)}, "no query of the test side is tuned on"
    index = retrieval.Index.open(outputs / "index")
    assert (index.fusion_k, index.dense_weight) == (metrics["fusion_k"], metrics["fusion_dense_weight"])
    hits = {"bm25": 0, "dense": 0, "hybrid": 0}
    for row in rows:
        for method in hits:
            ranked = index.rankings([row["query"]], method, 10)[0]
            hits[method] += row["target"] in ranked
    assert metrics["whole_recall_at_10"] == pytest.approx(hits["hybrid"] / len(rows))
    assert metrics["whole_bm25_recall_at_10"] == pytest.approx(hits["bm25"] / len(rows))
    assert metrics["whole_dense_recall_at_10"] == pytest.approx(hits["dense"] / len(rows))
    assert metrics["mrr"] == pytest.approx(np.mean([row["mrr"] for row in rows]))
    assert metrics["bm25_mrr"] == pytest.approx(np.mean([row["mrr_bm25"] for row in rows]))
    assert metrics["bm25_recall_at_10"] >= 0.9, "every query names its document"
    assert all(metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"] for name in rag.MEASURES)


@pytest.mark.parametrize(
    ("changes", "told", "never"),
    [
        ({"pool": 55}, "ranked is a pool of 55 documents", "all documents."),
        ({"pool": 3500}, "ranked is all documents. 95 %", "a pool of"),
        ({"pool": 20}, "ranked is a pool of 50 documents, all targets", "20 documents"),
        ({"tuning_share": 0.0}, "times BM25.\n", "chosen by queries"),
    ],
)
def test_a_card_says_what_was_ranked_and_chosen(
    changes: dict[str, Any], told: str, never: str, tmp_path: Path, embedder: str
) -> None:
    outputs, _, _ = run(tmp_path, params(embedder, **changes), data(tmp_path / "data"))
    page = (outputs / "index/README.md").read_text()
    assert told in page and never not in page


def test_a_title_writes_no_line_of_the_samples() -> None:
    passage = retrieval.Passage("c", "d", "a\n\n**Query:** `b`", "text", None, 1.0, 0.5, 0, 4, 1)
    index = SimpleNamespace(search=lambda query, count: [passage])
    asked = retrieval_evaluation.Query("q", "g", "line", "what?", "d", None, False)
    page = rag_card.samples(index, [asked])
    assert page.count("\n**Query:**") == 1 and "1. *a **Query:** `b`*, relevance 0.500 **right**: `text`" in page


def test_the_threshold_that_is_published_makes_the_mistakes_that_are_told(
    made: tuple[Path, Path, dict[str, float], StageContext], embedder: str
) -> None:
    source, outputs, metrics, _ = made
    told = json.loads((outputs / "threshold.json").read_text())
    assert told["threshold"] == metrics["relevance_threshold"] and told["unanswerable"] == "hidden"
    index = retrieval.Index.open(outputs / "index")
    answered = [query for query in retrieval_evaluation.queries(params(embedder), source).judged if query.answers]
    asked = sorted(answered, key=lambda query: retrieval_evaluation.drawn("threshold", query.id))[
        : TINY["threshold_queries"]
    ]
    assert len(answered) > len(asked)

    def passed(query: retrieval_evaluation.Query, hidden: list[str]) -> bool:
        found = index.search(query.text, relevance_threshold.BEST_OF, exclude=hidden)
        return max((one.relevance for one in found if one.relevance == one.relevance), default=-1) >= told["threshold"]

    assert metrics["false_refusal_rate"] == pytest.approx(np.mean([not passed(query, []) for query in asked]))
    assert metrics["false_answer_rate"] == pytest.approx(
        np.mean([passed(query, [query.target or "", *index.duplicates(query.target or "")]) for query in asked])
    )


def test_a_killed_stage_keeps_its_vectors_and_a_change_embeds_what_changed(
    tmp_path: Path, embedder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = documents()
    source = data(tmp_path / "data", rows)
    monkeypatch.setattr(indexing, "BATCH", 20)
    context = StageContext("rag", tmp_path, "2" * 64)
    real, texts = embedding.Embedder.embed, list[int]()

    def counted(own: Any, some: Any, *rest: Any) -> Any:
        texts.append(len(some))
        context.signal_number = signal.SIGTERM if len(texts) == 2 else 0
        return real(own, some, *rest)

    monkeypatch.setattr(embedding.Embedder, "embed", counted)
    (tmp_path / "out").mkdir()
    with pytest.raises(Stopped):
        rag.run(params(embedder), {"data": source}, tmp_path / "out", context)
    assert texts == [20, 20]
    shutil.rmtree(context.work)  # as the runner does when a stage has ended: the vectors lie beside it
    after, _, _ = run(tmp_path, params(embedder), source, "resumed")
    assert texts == [20, 20, 20]
    rows[3]["text"] = "open a socket by key. " + rows[3]["text"]
    changed, _, measured = run(tmp_path, params(embedder), data(tmp_path / "changed-data", rows), "changed")
    assert texts == [20, 20, 20, 1] and measured.measured["vectors_made"] == 1
    monkeypatch.setattr(embedding.Embedder, "embed", real)
    fresh_root = tmp_path / "fresh"
    fresh_root.mkdir()
    fresh, _, _ = run(fresh_root, params(embedder), tmp_path / "changed-data")
    assert content_hash(fresh) == content_hash(changed) != content_hash(after)


def test_a_champion_is_asked_todays_queries_about_todays_documents(
    made: tuple[Path, Path, dict[str, float], StageContext], tmp_path: Path, embedder: str
) -> None:
    source, outputs, _, context = made
    rag.measure(params(embedder), {"data": source}, context, outputs / "index", tmp_path / "same.parquet")
    assert pq.read_table(tmp_path / "same.parquet").equals(pq.read_table(outputs / "evaluation.parquet"))
    old, _, _ = run(tmp_path, params(embedder), data(tmp_path / "old", documents()[:50]))
    rag.measure(params(embedder), {"data": source}, context, old / "index", tmp_path / "old.parquet")
    rule = policy.Comparison(score="mrr", per="judged", lower_is_better=False, not_worse_than="champion", margin=0.05)
    own = policy.ModelPolicy(stage="rag", model="index", gate=[rule], promote="auto")
    baselines = {"champion": gates.Baseline("champion v1", tmp_path / "old.parquet")}
    verdict = gates.evaluate("sluice-index", own, {}, outputs / "evaluation.parquet", baselines)
    assert verdict.rows[0].value is not None
    hashes = {gates.rows_hash(place, own, rag.SCORES) for place in (tmp_path / "old.parquet",
              outputs / "evaluation.parquet")}  # fmt: skip
    assert len(hashes) == 1
    assert gates.rows_hash(old / "evaluation.parquet", own, rag.SCORES) not in hashes, "other documents were ranked"
    with pytest.raises(ArtifactError, match="manifest.json"):
        rag.measure(params(embedder), {"data": source}, context, tmp_path, tmp_path / "none.parquet")


def test_data_without_queries_or_without_knowledge(tmp_path: Path, embedder: str) -> None:
    source = data(tmp_path / "data")
    shutil.rmtree(source / "queries")
    outputs, metrics, _ = run(tmp_path, params(embedder, pool=None), source)
    assert metrics["queries_judged"] == 0 and "mrr" not in metrics and metrics["documents"] == 60
    assert json.loads((outputs / "threshold.json").read_text()) == {"threshold": None}
    assert pq.read_table(outputs / "evaluation.parquet").num_rows == 0
    assert "The data have no queries with a target" in (outputs / "index" / "README.md").read_text()
    shutil.rmtree(source / "knowledge")
    outputs, metrics, _ = run(tmp_path, params(embedder), source, "empty")
    assert metrics == dict.fromkeys(rag.METRICS, 0.0)
    assert "table: knowledge" in (outputs / "README.md").read_text()


def test_queries_that_judge_nothing_are_told(tmp_path: Path, embedder: str) -> None:
    """The default measures one kind of the built-in queries; a user's own are of another."""
    source = data(tmp_path / "data")
    for name, changes, told in (
        ("kinds", {"kinds": ["see-also"]}, "No query of kind see-also (rag.kinds) has a target: how well the index "
         "finds is not measured. Queries with a target are of kind line; rag.kinds: [] takes all."),
        ("all tuning", {"tuning_share": 0.999}, "Lower rag.tuning_share."),
    ):  # fmt: skip
        if name == "all tuning":
            nothing = {"id": "t", "group": "t", "kind": "line", "query": "word1", "target": None, "answers": None}
            write(source / "queries" / "test.parquet", [nothing])
        outputs, metrics, context = run(tmp_path, params(embedder, pool=None, **changes), source, name)
        assert metrics["queries_judged"] == 0 and metrics["queries"] > 0
        assert any(one.startswith("warning: ") and one.endswith(told) for one in context.samples)
        assert (outputs / "index" / "README.md").read_text().endswith(f"{told}\n")


def test_without_a_threshold_it_is_told(tmp_path: Path, embedder: str) -> None:
    """Every question is answered then, which the README says of none."""
    source = data(tmp_path / "data")
    for name, changes, told in (("none", {"tuning_share": 0.0}, True), ("some", {}, False)):
        outputs, _, context = run(tmp_path, params(embedder, pool=None, **changes), source, name)
        assert (json.loads((outputs / "threshold.json").read_text())["threshold"] is None) == told
        assert any("an assistant will answer whatever it is asked" in one for one in context.samples) == told


def test_what_is_refused(tmp_path: Path, embedder: str) -> None:
    source = data(tmp_path / "data")
    with pytest.raises(ParamsError, match=r"rag.embedder: embedder 'nowhere' is neither"):
        run(tmp_path, params("nowhere"), source)
    with pytest.raises(ParamsError, match=r"rag.chunk_tokens: 900"):
        run(tmp_path, params(embedder, chunk_tokens=900), source, "long")
    with pytest.raises(DataError, match="knowledge, row 2: id 'd00'"):
        run(tmp_path, params(embedder), data(tmp_path / "twice-data", [documents()[0]] * 60), "twice")
    for key, value in (("tuning_share", 1.0), ("pool", 0), ("dense_weight", 0.0), ("embedded_chunks", 0)):
        with pytest.raises(ValidationError, match=key):
            params(embedder, **{key: value})


def test_a_re_ranker_is_measured_beside_the_others(tmp_path: Path, embedder: str) -> None:
    reranker = str(tiny(tmp_path / "cross", labels=1))
    source = data(tmp_path / "data")
    outputs, metrics, _ = run(tmp_path, params(embedder, reranker=reranker, samples=0), source)
    assert "reranked_mrr" in metrics and "whole_reranked_mrr" not in metrics
    assert "mrr_reranked" in pq.read_table(outputs / "evaluation.parquet").column_names
