"""The report's tables of retrieval and of answers: each figure in its cell, and nothing where nothing was measured."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import answers, rag, report
from pipelines.core import artifacts, report_knowledge
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError
from pipelines.core.params.report import ReportParams
from pipelines.core.report_inputs import Stage

INDEX = {
    "documents": 18_000.0, "chunks": 109_000.0, "vectors": 18_001.0, "queries_judged": 1126.0, "query_ms_p50": 15.4,
    "query_ms_p95": 19.75, "index_bytes": 139_500_000.0, "index_seconds": 10.25, "vectors_made": 7.0,
}  # fmt: skip
TOLD = {"false_answer_rate": 0.75, "false_answer_rate_low": 0.6, "false_answer_rate_high": 0.9}
TOLD |= {"false_refusal_rate": 0.05, "questions_test": 40.0, "questions_validation": 10.0, "unanswerable_test": 24.0}
TOLD |= {"gain_over_closed_book": 0.2, "gain_over_closed_book_low": 0.1, "gain_over_closed_book_high": 0.3}
TOLD |= {"answer_score": 0.99, "answer_score_low": 0.98, "answer_score_high": 1.0}
ENDS = {"_low": -0.001, "_high": 0.001}


def ranked(prefix: str, start: float) -> dict[str, float]:
    """A retriever's measures: `start`, a hundredth more, two more, ..., each with an interval of two thousandths."""
    values = {f"{prefix}{name}": start + place / 100 for place, name in enumerate(rag.MEASURES)}
    ends = {f"{key}{end}": value + step for key, value in values.items() for end, step in ENDS.items()}
    return values | ends


def said(name: str, start: float, validation: float) -> dict[str, float]:
    """A model's scores, in the order of the columns: `start`, a hundredth more, ..., and those of no column."""
    columns = (
        "answer_score_closed_book", "answer_score", "answer_score_oracle", "exact_match", "chrf", "citation_precision",
        "citation_recall", "groundedness",
    )  # fmt: skip
    values = {f"{name}/{key}": start + place / 100 for place, key in enumerate(columns)}
    other = ("exact_match_oracle", "chrf_closed_book", "chrf_oracle", "own_citations", "dropped_citations")
    return values | {f"{name}/answer_score_validation": validation} | {f"{name}/{key}": 0.999 for key in other}


def asked(place: Path, models: list[str]) -> Path:
    place.mkdir()
    pq.write_table(pa.table({"model": [name for name in models for _ in range(2)], "f1": [0.5] * 2 * len(models)}),
                   place / "answers.parquet")  # fmt: skip
    return place


def rows(page: str) -> list[list[str]]:
    """Cells of every row of every table, heads and rules too; an interval has no-break spaces."""
    lines = [line for line in page.replace("\u00a0", " ").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_each_retriever_has_a_row_over_the_pool_and_over_all_documents() -> None:
    metrics = INDEX | ranked("", 0.6) | ranked("bm25_", 0.5) | ranked("reranked_", 0.7) | ranked("whole_", 0.4)
    metrics |= ranked("whole_dense_", 0.3)
    page = report_knowledge.retrieval(Stage("rag", None, metrics))
    pool, every = page.split("Over all documents:")
    head = ["", "MRR", "recall@1", "recall@5", "recall@10", "nDCG@10"]
    bm25 = ["0.500 (0.499 to 0.501)", "0.510 (0.509 to 0.511)", "0.520 (0.519 to 0.521)", "0.530 (0.529 to 0.531)",
            "0.540 (0.539 to 0.541)"]  # fmt: skip
    assert rows(pool)[0] == head and rows(pool)[2] == ["bm25", *bm25]
    assert [row[:2] for row in rows(pool)[3:]] == [
        ["hybrid", "0.600 (0.599 to 0.601)"], ["reranked", "0.700 (0.699 to 0.701)"],
    ]  # fmt: skip
    assert [(row[0], row[1], row[5]) for row in rows(every)[2:]] == [
        ("dense", "0.300 (0.299 to 0.301)", "0.340 (0.339 to 0.341)"),
        ("hybrid", "0.400 (0.399 to 0.401)", "0.440 (0.439 to 0.441)"),
    ]
    assert "over 1,126 queries." in pool
    assert every.splitlines()[-1] == (
        "A search, its query embedded: 15.40 ms at the median, 19.75 ms at the 95th percentile. The index: 18,000 "
        "documents, 109,000 chunks, 18,001 vectors, 7 of them made in this run, 139.5 MB, 10.25 s to build."
    )


def test_without_a_pool_all_documents_were_ranked() -> None:
    page = report_knowledge.retrieval(Stage("rag", None, INDEX | ranked("bm25_", 0.5)))
    assert "Over all documents:" in page and "pool" not in page and page.count("| bm25 |") == 1


def test_what_was_not_measured_is_an_empty_cell() -> None:
    metrics = {"chunks": 5.0, "mrr": 0.5, "recall_at_5": 0.25, "recall_at_5_low": 0.1}
    page = report_knowledge.retrieval(Stage("rag", None, metrics))
    assert rows(page)[2] == ["hybrid", "0.500", "", "0.250", "", ""], "no interval with one end"
    assert "over queries." in page and page.endswith("\n\nThe index: 5 chunks.")
    page = report_knowledge.retrieval(Stage("rag", None, INDEX))
    assert "was not measured" in page and "|" not in page and "109,000 chunks" in page


def test_each_model_has_a_row_in_the_order_in_which_it_was_asked(tmp_path: Path) -> None:
    metrics = TOLD | said("base", 0.1, 0.2) | said("int8", 0.2, 0.4) | said("sft", 0.3, 0.4)
    place = asked(tmp_path / "answers", ["base", "sft", "int8"])
    page = report_knowledge.answers(Stage("answers", place, metrics))
    head, _, *found = rows(page)
    assert head == ["model", "F1 closed book", "F1 retrieval", "F1 oracle", "exact match", "chrF", "precision",
                    "recall", "groundedness"]  # fmt: skip
    assert found == [
        ["base", *(f"0.1{place}0" for place in range(8))],
        ["**sft**", *(f"0.3{place}0" for place in range(8))],  # the first of equals
        ["int8", *(f"0.2{place}0" for place in range(8))],
    ]
    told = page.replace("\u00a0", " ")
    assert "Token F1 on 40 questions of the test side" in told
    assert "Chosen is **sft**, by its F1 of 0.400 on 10 questions of the validation side." in told
    assert "the chosen model's F1, 95 % interval in brackets: 0.200 (0.100 to 0.300)." in told
    assert "of 24 questions that nothing answers it answers 0.750 (0.600 to 0.900) all the same" in told
    assert told.endswith("of those that a document answers it refuses 0.050 (false refusals).")


def test_the_chosen_model_is_told_where_it_is_known(tmp_path: Path) -> None:
    metrics = said("base", 0.1, 0.2) | said("int8", 0.2, 0.5) | said("sft", 0.3, 0.4)
    page = report_knowledge.answers(Stage("answers", None, metrics))
    assert [row[0] for row in rows(page)[2:]] == ["base", "**int8**", "sft"], "by the validation side alone"
    assert "refuse" not in page and page.endswith("questions of the validation side.")
    tied = Stage("answers", None, said("base", 0.1, 0.4) | said("sft", 0.3, 0.4))
    assert "Chosen" not in report_knowledge.answers(tied) and "**" not in report_knowledge.answers(tied)
    bare = Stage("answers", None, {"a*b/answer_score": 0.5})
    assert rows(report_knowledge.answers(bare))[2] == [r"a\*b", "", "0.500", "", "", "", "", "", ""]
    (tmp_path / "answers.parquet").write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match=r"answers/answers\.parquet has no column model"):
        report_knowledge.answers(Stage("answers", tmp_path, metrics))
    pq.write_table(pa.table({"f1": [0.5]}), tmp_path / "answers.parquet")
    with pytest.raises(ArtifactError, match=r"answers/answers\.parquet has no column model"):
        report_knowledge.answers(Stage("answers", tmp_path, metrics))


def test_absent_stages_and_those_without_knowledge_have_no_section(tmp_path: Path, context: StageContext) -> None:
    others = [Stage("sft", None, {"rouge_l": 0.5}), Stage("prompts", None, {"task/zero_shot/score": 0.5})]
    empty = [Stage("rag", None, dict.fromkeys(rag.METRICS, 0.0)), Stage("answers", None, {"questions_test": 0.0})]
    for stage in [*others, *empty]:
        assert report_knowledge.retrieval(stage) == report_knowledge.answers(stage) == ""
    files = {"rag": INDEX | ranked("", 0.6), "answers": TOLD | said("sft", 0.3, 0.4), "sft": {"rouge_l": 0.5}}
    inputs = {f"metrics/{name}.json": tmp_path / f"{name}.json" for name in files}
    for name, metrics in files.items():
        artifacts.write_json(tmp_path / f"{name}.json", metrics)
    for names, titles in (("rag", ["Retrieval"]), ("sft", []), ("rag answers sft", ["Retrieval", "Answers"])):
        place = tmp_path / names
        place.mkdir()
        some = {key: path for key, path in inputs.items() if path.stem in names.split()}
        report.run(ReportParams(title="Sluice", samples=4), some, place, context)
        page = (place / "report.md").read_text()
        assert [line[3:] for line in page.splitlines() if line in ("## Retrieval", "## Answers")] == titles


def test_it_asks_for_what_the_stages_write() -> None:
    prefixes = {f"{start}{prefix}" for start in ("", "whole_") for prefix in report_knowledge.RETRIEVERS}
    assert set(rag.PREFIXES) <= prefixes and tuple(report_knowledge.MEASURES) == rag.MEASURES
    keys = [f"sft/{key}" for key in (*report_knowledge.COLUMNS, report_knowledge.VALIDATION)]
    assert all(any(fnmatchcase(key, pattern) for pattern in answers.OPTIONAL) for key in keys)
