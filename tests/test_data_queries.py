"""The table `queries`: how its rows are read, which are refused, and that a target is a document of the knowledge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from data_help import jsonl, params, run, sentence

from pipelines.core.errors import DataError
from pipelines.core.faults import BadRow
from pipelines.core.readers import Cells
from pipelines.core.rows import canonical
from pipelines.core.tables import SPLITS

FACTS = {"path": "facts.jsonl", "table": "knowledge"}
ASKED = {"path": "asked.jsonl", "table": "queries"}


def facts(root: Path, count: int = 40) -> None:
    jsonl(root / "facts.jsonl", [{"id": f"d{n}", "title": f"Title {n}", "text": sentence(n)} for n in range(count)])


def asked(root: Path, rows: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    """Rows of `queries` after a run of the stage on these raw ones, with the side each is on."""
    facts(root)
    jsonl(root / "asked.jsonl", rows)
    outputs, metrics = run(root, params(FACTS, ASKED | more))
    found = {name: pq.read_table(outputs / "queries" / f"{name}.parquet").to_pylist() for name in SPLITS}
    assert [metrics[f"rows_queries_{name}"] for name in SPLITS] == [len(rows) for rows in found.values()]
    return sorted(
        ({**row, "side": name} for name, rows in found.items() for row in rows), key=lambda row: int(row["row"])
    )


def test_rows_with_and_without_a_target(tmp_path: Path) -> None:
    found = asked(
        tmp_path,
        [
            {"query": "one?", "target": "d1", "answers": "yes"},
            {"query": "two?", "target": "d2", "answers": ["yes", "indeed"], "kind": "hard"},
            {"query": "three?", "target": "d3"},
            {"query": "nobody knows?", "target": None, "answers": None},
            {"query": "nor this?"},
        ],
    )
    own = [(row["kind"], row["query"], row["target"], row["answers"], row["referrer"]) for row in found]
    assert own == [
        ("question", "one?", "d1", ["yes"], None),
        ("hard", "two?", "d2", ["yes", "indeed"], None),
        ("question", "three?", "d3", None, None),
        ("question", "nobody knows?", None, None, None),
        ("question", "nor this?", None, None, None),
    ]


def test_questions_about_one_document_share_its_side_unless_a_group_is_named(tmp_path: Path) -> None:
    rows = [{"query": sentence(n), "target": f"d{n % 40}", "who": f"w{n % 7}"} for n in range(120)]
    found = asked(tmp_path, rows)
    sides = {
        target: {row["side"] for row in found if row["target"] == target} for target in {f"d{n}" for n in range(40)}
    }
    assert all(len(own) == 1 for own in sides.values()) and set.union(*sides.values()) == set(SPLITS)
    jsonl(tmp_path / "asked.jsonl", rows)
    outputs, _ = run(tmp_path, params(FACTS, ASKED | {"group": "who"}), "named")
    groups = {row["group"] for name in SPLITS for row in pq.read_table(outputs / f"queries/{name}.parquet").to_pylist()}
    assert groups == {f"w{n}" for n in range(7)}


def test_a_target_that_is_no_document_is_refused_by_row_and_value(tmp_path: Path) -> None:
    rows = [{"query": sentence(n), "target": f"d{n}"} for n in range(30)]
    rows[4]["target"], rows[8]["target"] = "d400", "D8"
    with pytest.raises(DataError) as caught:
        asked(tmp_path, rows)
    told = str(caught.value)
    assert "targets that are no id in knowledge" in told and "(2 rows)" in told
    assert 'asked.jsonl, row 5: target text "d400"' in told and 'asked.jsonl, row 9: target text "D8"' in told
    assert list((tmp_path / "out").iterdir()) != [], "judged from the files, which the runner then throws away"

    jsonl(tmp_path / "asked.jsonl", rows[:3])
    with pytest.raises(DataError, match=r"no id in knowledge.*\(3 rows\)"):
        run(tmp_path, params(ASKED), "alone")


def test_queries_about_a_document_that_comes_twice_are_about_the_first(tmp_path: Path) -> None:
    """SQuAD: each row has its passage, and an id by which its question names it."""
    rows = [
        {"id": f"q{n}", "title": "A title", "text": sentence(n % 20, 30 + n % 20), "question": sentence(1000 + n)}
        for n in range(100)
    ]
    jsonl(tmp_path / "squad.jsonl", rows)
    knowledge = {"path": "squad.jsonl", "table": "knowledge"}
    queries = {"path": "squad.jsonl", "table": "queries", "columns": {"query": "question", "target": "id", "id": "id"}}
    outputs, metrics = run(tmp_path, params(queries, knowledge))
    known = pq.read_table(outputs / "knowledge/all.parquet").to_pylist()
    assert [row["id"] for row in known] == [f"q{n}" for n in range(20)] and metrics["duplicates_exact"] == 80
    sides: dict[str, set[str]] = {}
    found = [(name, row) for name in SPLITS for row in pq.read_table(outputs / f"queries/{name}.parquet").to_pylist()]
    for name, row in found:
        assert row["target"] == f"q{int(row['id'][1:]) % 20}"
        sides.setdefault(row["target"], set()).add(name)
    assert len(found) == 100 and all(len(own) == 1 for own in sides.values()), "a document's side is its queries'"
    # The same when a group, or a side, was named.
    jsonl(tmp_path / "squad.jsonl", [row | {"who": f"w{n % 7}"} for n, row in enumerate(rows)])
    outputs, _ = run(tmp_path, params(queries | {"group": "who", "split": "test"}, knowledge), "named")
    table = pq.read_table(outputs / "queries/test.parquet").to_pylist()
    assert {row["group"] for row in table} == {f"w{n}" for n in range(7)} and len(table) == 100


def test_a_query_about_a_quarantined_document_is_refused(tmp_path: Path) -> None:
    documents: list[Any] = [{"id": f"d{n}", "title": f"Title {n}", "text": sentence(n)} for n in range(40)]
    documents[3]["text"] = None
    jsonl(tmp_path / "facts.jsonl", documents)
    jsonl(tmp_path / "asked.jsonl", [{"query": sentence(n), "target": f"d{n}"} for n in range(10)])
    with pytest.raises(DataError, match='asked.jsonl, row 4: target text "d3"'):
        run(tmp_path, params(FACTS, ASKED, on_bad_row="quarantine"))


@pytest.mark.parametrize(
    ("record", "column", "told"),
    [
        ({"target": "d1"}, "query", "no such column"),
        ({"query": " ", "target": "d1"}, "query", "blank text"),
        ({"query": "a?", "target": ["d1"]}, "target", "a list"),
        ({"query": "a?", "target": "d1", "answers": []}, "answers", "an empty list"),
        ({"query": "a?", "target": "d1", "answers": ["yes", ""]}, "answers", "empty text"),
        ({"query": "a?", "target": "d1", "answers": 5}, "answers", "a number 5; accepted: text"),
        ({"query": "a?", "answers": "yes"}, "answers", "accepted: answers only beside a target"),
    ],
)
def test_bad_rows(record: dict[str, Any], column: str, told: str) -> None:
    with pytest.raises(BadRow) as caught:
        canonical("queries", record, {})
    assert caught.value.column == column and told in str(caught.value)


def test_cells_of_a_csv_file() -> None:
    empty = canonical("queries", Cells({"query": "a?", "target": "", "answers": "", "kind": ""}), {})[0]
    assert (empty["target"], empty["answers"], empty["kind"]) == (None, None, "question")
    listed = canonical("queries", Cells({"query": "a?", "target": "7", "answers": '["x", "y"]'}), {})[0]
    assert (listed["target"], listed["answers"]) == ("7", ["x", "y"])
    plain = canonical("queries", Cells({"query": "a?", "target": "7", "answers": "x, y"}), {})[0]
    assert plain["answers"] == ["x, y"]
