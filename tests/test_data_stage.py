"""The stage `data` as a whole: what it writes, what it refuses, that it is the same twice; and the two expectations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from data_help import jsonl, params, run, sentence
from pydantic import ValidationError

from pipelines import data
from pipelines.core import intake, scratch, tables
from pipelines.core.artifacts import content_hash
from pipelines.core.data_card import card
from pipelines.core.errors import DataError
from pipelines.core.tables import SPLITS

CORPUS = {"path": "corpus.jsonl", "table": "corpus"}


def table(outputs: Path, key: str) -> dict[str, list[dict[str, Any]]]:
    return {name: pq.read_table(outputs / key / f"{name}.parquet").to_pylist() for name in SPLITS}


def every_table(root: Path) -> tuple[dict[str, Any], ...]:
    """Sources of all tables, 60 rows each."""
    many = range(60)
    jsonl(root / "corpus.jsonl", [{"text": sentence(n)} for n in many])
    jsonl(root / "demos.jsonl", [{"prompt": sentence(n), "completion": sentence(n + 500)} for n in many])
    asked = [{"question": sentence(n)} | ({"reference": "an answer"} if n % 2 else {}) for n in many]
    jsonl(root / "prompts.jsonl", asked)
    ranked = [{"prompt": sentence(n), "responses": [f"r{n}", f"s{n}", f"t{n}"], "scores": [n, 3, 3]} for n in many]
    jsonl(root / "ranked.jsonl", ranked)
    jsonl(root / "facts.jsonl", [{"id": n, "title": f"Title {n}", "text": sentence(n)} for n in many])
    jsonl(root / "asked.jsonl", [{"query": sentence(n), "target": n if n % 3 else None} for n in many])
    jsonl(root / "topics.jsonl", [{"text": sentence(n), "label": "ab"[n % 2]} for n in many])
    return (
        CORPUS,
        {"path": "demos.jsonl", "table": "demonstrations"},
        {"path": "prompts.jsonl", "table": "prompts", "columns": {"prompt": "question"}},
        {"path": "ranked.jsonl", "table": "comparisons"},
        {"path": "facts.jsonl", "table": "knowledge"},
        {"path": "asked.jsonl", "table": "queries"},
        {"path": "topics.jsonl", "table": "tasks", "task": "topic"},
    )


def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, chunks and parts of a few rows, as if the tables were large."""
    monkeypatch.setattr(tables, "BATCH_ROWS", 7)
    monkeypatch.setattr(data, "CHUNK_ROWS", 30)
    monkeypatch.setattr(scratch, "PART_RECORDS", 30)


def test_every_table_is_written_and_the_same_bytes_come_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = params(*every_table(tmp_path))
    outputs, metrics = run(tmp_path, given)
    split = ("corpus", "demonstrations", "prompts", "comparisons", "queries", "tasks/topic")
    files = {f"{key}/{name}.parquet" for key in split for name in SPLITS} | {"knowledge/all.parquet"}
    found = {path.relative_to(outputs).as_posix() for path in outputs.rglob("*") if path.is_file()}
    assert found == files | {"README.md", "manifest.json", "validation.json"}
    assert set(metrics) == data.METRICS
    for key in split:
        counted = [metrics[f"rows_{key.split('/')[0]}_{name}"] for name in SPLITS]
        assert counted == [len(rows) for rows in table(outputs, key).values()] and sum(counted) == 60, key
    manifest = json.loads((outputs / "manifest.json").read_text())
    assert set(manifest) == files
    assert all(manifest[name]["sha256"] == content_hash(outputs / name) for name in files)
    written = "".join(p.read_text() for p in outputs.iterdir() if p.suffix in (".json", ".md"))
    assert str(tmp_path) not in written
    assert (tmp_path / ".sluice/documents/data/validation/index.html").exists()

    small_parts(monkeypatch)
    again, _ = run(tmp_path, given, "again", threads=2)
    assert content_hash(again) == content_hash(outputs)

    # The same prompt is on the same side in the three prompt tables.
    sides = {name: set() for name in SPLITS}  # type: dict[str, set[str]]
    for name in SPLITS:
        own = {row["prompt"] for row in table(outputs, "prompts")[name]}
        assert own == {row["messages"][0]["content"] for row in table(outputs, "demonstrations")[name]}
        assert own == {row["prompt"] for row in table(outputs, "comparisons")[name]}
        sides[name] = own
    assert all(sides.values())
    references = [row["reference"] for rows in table(outputs, "prompts").values() for row in rows]
    assert sorted(references, key=str) == [None] * 30 + ["an answer"] * 30
    labels = {(r["label"], r["label_text"]) for rows in table(outputs, "tasks/topic").values() for r in rows}
    assert labels == {(0, "a"), (1, "b")}


def test_the_card_tells_small_shares_as_they_are() -> None:
    given = params(CORPUS, validation_share=0.004, test_share=0.07)
    told = card(
        given,
        {"corpus": dict.fromkeys(SPLITS, 1)},
        {"corpus": ["text"]},
        dict.fromkeys(("exact", "prompt", "near"), 0),
        0,
    )
    assert "0.4% validation, 7% test of the groups" in told


def test_rows_keep_their_side_when_rows_are_added(tmp_path: Path) -> None:
    rows = [{"text": sentence(n), "doc": f"d{n // 3}"} for n in range(90)]
    given = params(CORPUS | {"group": "doc"})
    jsonl(tmp_path / "corpus.jsonl", rows[30:])
    before = table(run(tmp_path, given)[0], "corpus")
    jsonl(tmp_path / "corpus.jsonl", rows)
    after = table(run(tmp_path, given, "more")[0], "corpus")
    for name in SPLITS:
        assert {row["text"] for row in before[name]} <= {row["text"] for row in after[name]}
    groups = [{row["group"] for row in after[name]} for name in SPLITS]
    assert all(groups) and not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])


def test_rankings_that_people_gave_twice_are_two(tmp_path: Path) -> None:
    """Four of five preferred the first: of rows without a labeler's name their ids alone say that they are four."""
    rows = [
        {"id": f"{n}-{vote}", "prompt": sentence(n), "responses": ["a", "b"], "ranks": [1, 2] if vote else [2, 1]}
        for n in range(20)
        for vote in range(5)
    ]
    jsonl(tmp_path / "ranked.jsonl", rows)
    outputs, metrics = run(tmp_path, params({"path": "ranked.jsonl", "table": "comparisons"}))
    found = [row["ranks"] for side in table(outputs, "comparisons").values() for row in side]
    assert found.count([1, 2]) == 80 and found.count([2, 1]) == 20 and metrics["duplicates_exact"] == 0
    jsonl(tmp_path / "ranked.jsonl", [{**row, "id": "the same"} for row in rows[:2]] + rows[5:] + rows[5:])
    with pytest.raises(DataError, match="column id: values are not unique"):
        run(tmp_path, params({"path": "ranked.jsonl", "table": "comparisons"}), "again")


def test_duplicates_go_and_near_duplicates_of_held_out_rows_leave_training(tmp_path: Path) -> None:
    plain = [sentence(n, 60) for n in range(60)]
    near = [f"{text} and an end" for text in plain]
    jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in [*plain, plain[0].upper() + " ", *near]])
    outputs, metrics = run(tmp_path, params(CORPUS))
    found = {name: {row["text"] for row in rows} for name, rows in table(outputs, "corpus").items()}
    held = found["validation"] | found["test"]
    assert metrics["duplicates_exact"] == 1 and metrics["leaks"] == 0
    assert metrics["duplicates_near"] > 10
    assert sum(map(len, found.values())) == 120 - metrics["duplicates_near"]
    for text, twin in zip(plain, near, strict=True):
        assert not ({text, twin} & held and {text, twin} & found["train"])


@pytest.mark.parametrize("table_of", ["corpus", "prompts"])
def test_a_leak_between_named_sides_is_refused_with_both_rows(tmp_path: Path, table_of: str) -> None:
    field = "text" if table_of == "corpus" else "prompt"
    jsonl(tmp_path / "train.jsonl", [{field: sentence(n)} for n in range(20)])
    jsonl(tmp_path / "test.jsonl", [{field: sentence(n).upper()} for n in range(18, 25)])
    sides = [{"path": f"{name}.jsonl", "table": table_of, "split": name} for name in ("train", "test")]
    with pytest.raises(DataError) as caught:
        run(tmp_path, params(*sides))
    told = str(caught.value)
    assert "2 held-out rows have the same example as a training row" in told
    assert "test.jsonl, row 1 (held out) is in train.jsonl, row 19" in told


def conversations(count: int, first: int = 0) -> tuple[list[dict[str, Any]], list[str]]:
    """Three turns each, as messages that end with an answer, and as transcripts that wait for it."""
    messages, transcripts = [], []
    for n in range(first, first + count):
        texts = [sentence(n * 10 + turn) for turn in range(4)]
        turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
        messages.append({"messages": turns})
        transcripts.append("\n\nHuman: {}\n\nAssistant: {}\n\nHuman: {}\n\nAssistant:".format(*texts))
    return messages, transcripts


def test_a_conversation_is_one_prompt_in_messages_and_in_transcripts(tmp_path: Path) -> None:
    messages, transcripts = conversations(40)
    jsonl(tmp_path / "demos.jsonl", messages)
    jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in transcripts])
    pairs = [{"chosen": f"{text} yes", "rejected": f"{text} no"} for text in transcripts]
    jsonl(tmp_path / "pairs.jsonl", pairs)
    tables = {"demos": "demonstrations", "prompts": "prompts", "pairs": "comparisons"}
    sources = [{"path": f"{name}.jsonl", "table": of} for name, of in tables.items()]
    outputs, metrics = run(tmp_path, params(*sources))
    assert metrics["duplicates_prompt"] == 0, "the hash alone puts them on one side"
    for name in SPLITS:
        first = {row["messages"][0]["content"] for row in table(outputs, "demonstrations")[name]}
        for other in ("prompts", "comparisons"):
            assert {row["prompt"].split("\n\n")[1][7:] for row in table(outputs, other)[name]} == first

    # Sides that were named, against that: the leak check knows them too.
    jsonl(tmp_path / "held.jsonl", [{"prompt": transcripts[3]}, *({"prompt": sentence(n)} for n in range(9))])
    named = [
        {"path": "demos.jsonl", "table": "demonstrations", "split": "train"},
        {"path": "held.jsonl", "table": "prompts", "split": "test"},
    ]
    with pytest.raises(DataError, match="prompts of all tables: 1 held-out rows have the same prompt") as caught:
        run(tmp_path, params(*named), "leak")
    assert "held.jsonl, row 1 (held out) is in demos.jsonl, row 4" in str(caught.value)


def test_named_sides_are_obeyed(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"text": sentence(n)} for n in range(20)])
    jsonl(tmp_path / "test.jsonl", [{"text": sentence(n)} for n in range(20, 25)])
    sides = [{"path": f"{name}.jsonl", "table": "corpus", "split": name} for name in ("train", "test")]
    _, metrics = run(tmp_path, params(*sides))
    assert [metrics[f"rows_corpus_{name}"] for name in SPLITS] == [20, 0, 5]


def test_bad_rows_are_refused_with_file_row_and_column_and_nothing_is_written(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": sentence(n), "completion": sentence(n + 90)} for n in range(60)]
    rows[6] = '{"prompt": "a", '
    rows[9] = {"prompt": "a", "completion": None}
    rows[11] = {"prompt": "a", "answer": "b"}
    jsonl(tmp_path / "demos.jsonl", rows)
    with pytest.raises(DataError) as caught:
        run(tmp_path, params({"path": "demos.jsonl", "table": "demonstrations"}))
    lines = str(caught.value).splitlines()
    where = tmp_path / "demos.jsonl"
    assert lines[0].startswith(f"{where}, row 7, column (line): found broken JSON at character")
    assert lines[1] == f"{where}, row 10, column completion: found null; accepted: text"
    assert lines[2].startswith(f"{where}, row 12, column completion: found no such column (there are: prompt, answer)")
    assert list((tmp_path / "out").iterdir()) == []


def test_quarantine_sets_rows_aside_within_its_budget(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": sentence(n)} for n in range(60)]
    rows[6], rows[20] = "{broken", {"text": 5}
    jsonl(tmp_path / "corpus.jsonl", rows)
    outputs, metrics = run(tmp_path, params(CORPUS, on_bad_row="quarantine"))
    aside = pq.read_table(outputs / "quarantine.parquet").to_pylist()
    assert [(row["source"], row["row"], row["column"], row["raw"]) for row in aside] == [
        ("corpus.jsonl", 7, "(line)", "{broken"),
        ("corpus.jsonl", 21, "text", '{"text": 5}'),
    ]
    assert (metrics["bad_rows"], metrics["bad_row_share"]) == (2, 2 / 60)
    with pytest.raises(
        DataError, match=r"2 of 60 rows are bad \(3.33%\); data.quarantine_budget accepts 2.00%"
    ) as caught:
        run(tmp_path, params(CORPUS, on_bad_row="quarantine", quarantine_budget=0.02), "refused")
    assert "corpus.jsonl, row 7" in str(caught.value)
    assert list((tmp_path / "refused").iterdir()) == []


def test_text_that_cannot_be_written_is_set_aside_spelled_out(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": sentence(n)} for n in range(60)]
    rows[6], rows[20] = r'{"text": "bad \ud83d"}', r'"\ud83d"'
    jsonl(tmp_path / "corpus.jsonl", rows)
    outputs, metrics = run(tmp_path, params(CORPUS, on_bad_row="quarantine"))
    aside = pq.read_table(outputs / "quarantine.parquet").to_pylist()
    assert [(row["row"], row["raw"]) for row in aside] == [(7, r'{"text": "bad \ud83d"}'), (21, "")]
    assert "half a character" in aside[0]["reason"] and r'found text "\ud83d"' in aside[1]["reason"]
    assert metrics["bad_rows"] == 2


def test_verdicts_that_fail_name_source_row_and_value(tmp_path: Path) -> None:
    jsonl(tmp_path / "corpus.jsonl", [{"text": sentence(n)} for n in range(60)])
    with pytest.raises(DataError, match=r"corpus \(whole\): test has \d+ rows; data.min_rows accepts at least 100"):
        run(tmp_path, params(CORPUS, min_rows=100))
    jsonl(tmp_path / "facts.jsonl", [{"id": f"n{n % 59}", "title": f"{n}", "text": sentence(n)} for n in range(60)])
    twice = '\n  facts.jsonl, row 1: id "n0"\n  facts.jsonl, row 60: id "n0"'
    with pytest.raises(
        DataError, match=f"not unique .2 rows.:{twice}\n  .*from none: columns: .id: COLUMN. or .id: null"
    ):
        run(tmp_path, params({"path": "facts.jsonl", "table": "knowledge"}), "ids")
    outputs, _ = run(tmp_path, params({"path": "facts.jsonl", "table": "knowledge", "columns": {"id": None}}), "none")
    assert len({row["id"] for row in pq.read_table(outputs / "knowledge/all.parquet").to_pylist()}) == 60
    broken = [{"text": sentence(n) + ("\ufffd" * 9 if n == 30 else "")} for n in range(60)]
    jsonl(tmp_path / "corpus.jsonl", broken)
    told = r"column unreadable: more than 2% of a text is control .*\n  corpus.jsonl, row 31: .* number 0\.\d+\n  Mend"
    with pytest.raises(DataError, match=told):
        run(tmp_path, params(CORPUS), "unreadable")
    texts = [sentence(n) * (20_000 if n == 5 else 1) for n in range(60)]
    jsonl(tmp_path / "facts.jsonl", [{"id": n, "title": f"{n}", "text": text} for n, text in enumerate(texts)])
    with pytest.raises(DataError, match=r"not of 1 to 1,000,000 characters \(1 rows\):\n  facts.jsonl, row 6: "):
        run(tmp_path, params({"path": "facts.jsonl", "table": "knowledge"}), "long")


def test_a_corpus_that_is_one_document_is_told_how_to_be_many(tmp_path: Path) -> None:
    """Its parts are of one group, so that no amount of text gives the test side a row."""
    (tmp_path / "book.txt").write_text("\n\n".join(sentence(n, 200) for n in range(60)))
    source = {"path": "book.txt", "table": "corpus"}
    with pytest.raises(DataError, match="has 0 rows; .*A text file is one document, .*sample_by: paragraph"):
        run(tmp_path, params(source))
    outputs, _ = run(tmp_path, params(source | {"sample_by": "paragraph"}), "parted")
    assert sum(map(len, table(outputs, "corpus").values())) == 60


def test_faults_between_parts_of_a_table_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch)
    jsonl(tmp_path / "facts.jsonl", [{"id": f"n{n % 57}", "title": f"{n}", "text": sentence(n)} for n in range(60)])
    named = "".join(f'\n  facts.jsonl, row {n + 1}: id "n{n % 57}"' for n in (0, 1, 2, 57, 58))
    with pytest.raises(DataError, match=f"not unique .6 rows.:{named}\n") as caught:
        run(tmp_path, params({"path": "facts.jsonl", "table": "knowledge"}), "ids")
    assert "row 60" not in str(caught.value)
    jsonl(tmp_path / "train.jsonl", [{"text": sentence(n)} for n in range(60)])
    jsonl(tmp_path / "test.jsonl", [{"text": sentence(n)} for n in range(50, 90)])
    given = [{"path": f"{name}.jsonl", "table": "corpus", "split": name} for name in ("train", "test")]
    with pytest.raises(DataError, match="10 held-out rows have the same example as a training row"):
        run(tmp_path, params(*given), "leak")


def test_a_column_named_group_may_mean_something_else(tmp_path: Path) -> None:
    """Of two groups, such as those of a trial, one is all of a side."""
    rows = [{"text": sentence(n), "group": ["control", "treated"][n % 2]} for n in range(60)]
    jsonl(tmp_path / "corpus.jsonl", rows)
    with pytest.raises(DataError, match=r"has 0 rows; .* or else a column named group: .* columns: \{group: null\}"):
        run(tmp_path, params(CORPUS, seed=0))
    outputs, _ = run(tmp_path, params(CORPUS | {"columns": {"group": None}}, seed=0), "none")
    assert all(table(outputs, "corpus").values())
    with pytest.raises(ValidationError, match="named by the source itself: group: doc"):
        params(CORPUS | {"columns": {"group": "doc"}})


def test_labels_of_a_task_are_of_one_kind(tmp_path: Path) -> None:
    topics = {"path": "topics.jsonl", "table": "tasks", "task": "topic"}
    rows: list[Any] = [{"text": sentence(n), "label": n % 2} for n in range(60)]
    rows[40] = {"text": "a", "label": "yes"}
    rows[41] = {"premise": "a", "hypothesis": "b", "label": 1}
    jsonl(tmp_path / "topics.jsonl", rows)
    with pytest.raises(DataError) as caught:
        run(tmp_path, params(topics))
    told = str(caught.value)
    assert 'row 41, column label: found text "yes"; accepted: a whole number' in told
    assert "row 42, column (row): found the columns premise, hypothesis; accepted: text" in told


def test_documents_longer_than_a_part_share_their_group(tmp_path: Path) -> None:
    texts = ["\n\n".join(sentence(n * 1000 + p, 40) for p in range(90)) for n in range(12)]
    jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in texts])
    outputs, _ = run(tmp_path, params(CORPUS))
    for rows in table(outputs, "corpus").values():
        for group in {row["group"] for row in rows}:
            parts = [row["text"] for row in rows if row["group"] == group]
            assert len(parts) > 1 and "\n\n".join(parts) in texts


def test_builder_rows_become_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the runner works in the repository
    source = tmp_path / "library"
    source.mkdir()
    for n in range(30):
        body = "".join(f'def f{n}_{k}(a, b):\n    """{sentence(n * 40 + k)}."""\n    return a\n\n\n' for k in range(4))
        (source / f"m{n}.py").write_text(f'"""Module about {sentence(n)}."""\n\n\n{body}')
    folder = {
        "builder": "pydocs",
        "stdlib": False,
        "folders": ["library"],
        "tables": ["corpus", "demonstrations", "knowledge"],
    }
    first, metrics = run(tmp_path, params(folder), threads=1)
    assert metrics["rows_knowledge"] == 150 and metrics["rows_demonstrations_train"] > 0
    second, _ = run(tmp_path, params(folder), "second", threads=2)
    assert content_hash(first) == content_hash(second)


def test_packages_of_two_builders_are_classes_of_one_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbered by each for itself, the same number stood for two packages, and transfer refused the table."""
    monkeypatch.chdir(tmp_path)
    for place, name in enumerate(("alpha", "beta", "gamma")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        body = "".join(
            f'def f{k}(a):\n    """Return {sentence(place * 90 + k)}."""\n    return a\n\n\n' for k in range(90)
        )
        (tmp_path / name / "m.py").write_text(body)
    built = {"builder": "pydocs", "stdlib": False, "tables": ["corpus", "tasks"]}
    both = params(built | {"folders": ["gamma", "beta"]}, built | {"folders": ["beta", "alpha"]})
    outputs, _ = run(tmp_path, both)
    rows = [row for rows in table(outputs, "tasks/package").values() for row in rows]
    assert {(row["label"], row["label_text"]) for row in rows} == {(0, "alpha"), (1, "beta"), (2, "gamma")}


def test_packages_that_say_little_are_no_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of one may be held out, and transfer refused the table; of a thousand, the data were refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(intake, "MOST_LABELS", 2)
    for place, (name, count) in enumerate((("alpha", 90), ("beta", 90), ("gamma", 8))):
        body = "".join(
            f'def f{k}(a):\n    """Return {sentence(place * 90 + k)}."""\n    return a\n\n\n' for k in range(count)
        )
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(body)
    built = {"builder": "pydocs", "stdlib": False, "tables": ["corpus", "tasks"]}
    outputs, _ = run(tmp_path, params(built | {"folders": ["alpha", "beta", "gamma"]}, min_rows=5))
    rows = [row for rows in table(outputs, "tasks/package").values() for row in rows]
    assert {(row["label"], row["label_text"]) for row in rows} == {(0, "alpha"), (1, "beta")}
    outputs, _ = run(tmp_path, params(built | {"folders": ["alpha", "gamma"]}, min_rows=5), "two")
    assert sorted(path.name for path in (outputs / "tasks").iterdir()) == ["choice", "entailment"]


def test_a_class_too_many_is_a_bad_row_and_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MOST_LABELS", 2)
    jsonl(tmp_path / "t.jsonl", [{"text": sentence(n), "label": "other" if n == 9 else "ab"[n % 2]} for n in range(60)])
    source = {"path": "t.jsonl", "table": "tasks", "task": "topic"}
    with pytest.raises(DataError, match=r"row 10, column label: found class number 3; accepted: at most 2 classes"):
        run(tmp_path, params(source))
    outputs, _ = run(tmp_path, params(source, on_bad_row="quarantine", quarantine_budget=0.05), "aside")
    assert sum(map(len, table(outputs, "tasks/topic").values())) == 59


def judged(expectation: Any, frame: pd.DataFrame) -> Any:
    from pipelines.core.validation import Judge

    judge = Judge()
    judge.check("one", lambda: [expectation], frame)
    return judge.verdicts["one"][0]


@pytest.mark.parametrize("ranks", [[1, 3], [0, 1], [2, 2], [1], [1, 2, 3], None])
def test_ranks_that_do_not_order_the_responses_fail(ranks: list[int] | None) -> None:
    from pipelines.core.expectations import ExpectRanksToOrderResponses

    frame = pd.DataFrame({"source": ["a", "b"], "row": [1, 2], "responses": [["x", "y"]] * 2, "ranks": [[1, 1], ranks]})
    expectation = ExpectRanksToOrderResponses(column_A="responses", column_B="ranks")
    verdict = judged(expectation, frame)
    assert not verdict.success and verdict.observed["unexpected_count"] == 1
    assert verdict.examples[0].startswith("b, row 2: responses")


def test_ranks_with_ties_pass() -> None:
    from pipelines.core.expectations import ExpectRanksToOrderResponses

    frame = pd.DataFrame({"source": ["a"], "row": [1], "responses": [["x", "y", "z"]], "ranks": [[2, 1, 2]]})
    assert judged(ExpectRanksToOrderResponses(column_A="responses", column_B="ranks"), frame).success


@pytest.mark.parametrize(("keys", "leaks"), [([5, 6, 7], 0), ([5, 6, 5], 1), ([0, 6, 0], 0), ([6, 6, 5], 0)])
def test_held_out_rows_in_train_fail(keys: list[int], leaks: int) -> None:
    from pipelines.core.expectations import ExpectHeldOutRowsToBeAbsentFromTrain

    frame = pd.DataFrame({"source": ["a", "b", "c"], "row": [1, 2, 3], "side": [0, 0, 2], "text": keys})
    verdict = judged(ExpectHeldOutRowsToBeAbsentFromTrain(key="text"), frame)
    assert (verdict.success, verdict.observed["observed_value"]) == (leaks == 0, leaks)
    assert verdict.examples == (["c, row 3 (held out) is in a, row 1"] if leaks else [])


def test_verdicts_of_chunks_add_up() -> None:
    import great_expectations.expectations as gxe

    from pipelines.core.validation import Judge

    judge = Judge()
    for chunk in ([1, 2, 99], [3, 4, 5]):
        frame = pd.DataFrame({"source": "a", "row": chunk, "value": chunk})
        judge.check("two", lambda: [gxe.ExpectColumnValuesToBeBetween(column="value", max_value=9)], frame)
    record = judge.record()["two"][0]
    assert not record["success"]
    assert record["observed"] == {"element_count": 6, "unexpected_count": 1, "missing_count": 0}
    assert record["examples"] == ["a, row 99: value a number 99"]
