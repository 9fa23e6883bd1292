"""Sources: every format reads the same rows, and every bad input is named by file, row and column."""

from __future__ import annotations

import csv
import gzip
import json
import random
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_help import jsonl, params
from pydantic import ValidationError

from pipelines.core import chats, ranking_tasks, sources
from pipelines.core.errors import DataError
from pipelines.core.faults import BadRow, Ledger
from pipelines.core.params.data import FileSource, HubSource
from pipelines.core.readers import Cells
from pipelines.core.rows import PART_CHARACTERS, canonical, cut, identify

RECORDS = [{"prompt": 'Zwei, "drei"\nvier', "completion": "fünf"}, {"prompt": "여섯", "completion": "7 🙂"}]


def write(place: Path, records: list[dict[str, str]]) -> None:
    kind = place.name.removesuffix(".gz").rsplit(".", 1)[1]
    opener: Any = gzip.open if place.suffix == ".gz" else open
    if kind == "parquet":
        with opener(place, "wb") as file:
            pq.write_table(pa.Table.from_pylist(records), file)
        return
    with opener(place, "wt", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        elif kind == "json":
            json.dump(records, file, ensure_ascii=False, indent=1)
        else:
            writer = csv.DictWriter(file, list(records[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(records)


def source(path: Path | str, **more: Any) -> FileSource:
    return FileSource.model_validate({"path": str(path), "table": "demonstrations", **more})


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_reads_the_same_records(tmp_path: Path, kind: str, end: str) -> None:
    place = tmp_path / f"rows.{kind}{end}"
    write(place, RECORDS)
    assert [entry.record for entry in sources.read(source(place), tmp_path)] == RECORDS


def test_files_have_one_name_in_the_clone_and_in_a_run_s_worktree(tmp_path: Path) -> None:
    clone, worktree = tmp_path / "clone", tmp_path / "worktree"
    for place in (clone / "data" / "more", worktree):
        place.mkdir(parents=True)
    for name in ("a.jsonl", "more/b.jsonl"):
        write(clone / "data" / name, RECORDS)
    (worktree / "data").symlink_to(clone / "data")  # as `flows.workspace` links it
    for path in ("data", "data/a.jsonl", "data/*/b.jsonl", "data/more"):
        named = [[entry.source for entry in sources.read(source(path), root)] for root in (clone, worktree)]
        assert named[0] == named[1] and all(name.startswith("data/") for name in named[0])
    assert [entry.source for entry in sources.read(source(clone / "data"), worktree)][-1] == "data/more/b.jsonl"
    assert [entry.source for entry in sources.read(source(clone / "data/a.jsonl"), worktree)] == ["a.jsonl"] * 2


def test_long_json_is_read_in_pieces_as_the_library_reads_it_whole(tmp_path: Path) -> None:
    rng = random.Random(0)
    records = {f"k{n}": {"n": rng.random(), "text": "é\n" * rng.randrange(3000)} for n in range(900)}
    place = tmp_path / "rows.json"
    place.write_text(json.dumps(records, ensure_ascii=False, indent=2), encoding="utf-8")
    found = [entry.record for entry in sources.read(source(place), tmp_path)]
    assert place.stat().st_size > 3_000_000
    assert found == [{"key": key, **value} for key, value in records.items()]


def test_rows_are_lines(tmp_path: Path) -> None:
    write(tmp_path / "rows.csv", RECORDS)
    assert [entry.row for entry in sources.read(source("rows.csv"), tmp_path)] == [2, 4]
    write(tmp_path / "rows.json", RECORDS)
    assert [entry.row for entry in sources.read(source("rows.json"), tmp_path)] == [2, 6]


def test_text_by_document_separator_paragraph_and_line(tmp_path: Path) -> None:
    place = tmp_path / "all.txt"
    place.write_text("PEP: 1\na\n\nb\nPEP: 2\nc\n", encoding="utf-8")

    def read(**more: Any) -> list[Any]:
        given = FileSource.model_validate({"path": "all.txt", "table": "corpus", **more})
        return [(entry.row, entry.record["text"]) for entry in sources.read(given, tmp_path)]  # type: ignore[call-overload,index]

    assert read() == [(1, "PEP: 1\na\n\nb\nPEP: 2\nc")]
    assert read(separator=r"^PEP: \d+$") == [(1, "PEP: 1\na\n\nb"), (5, "PEP: 2\nc")]
    assert read(sample_by="paragraph") == [(1, "PEP: 1\na"), (4, "b\nPEP: 2\nc")]
    assert [row for row, _ in read(sample_by="line")] == [1, 2, 4, 5, 6]
    place.write_bytes(b"\r\na\r\nb\r\n \r\n\r\nc\r\n")
    assert read(sample_by="paragraph") == [(2, "a\r\nb"), (6, "c")]
    assert read(sample_by="line") == [(2, "a"), (3, "b"), (6, "c")]


def test_folder_and_glob_are_sorted_and_labelled_without_the_place(tmp_path: Path) -> None:
    for name in ("b.jsonl", "sub/a.jsonl", "a.jsonl", ".hidden.jsonl", "notes.pdf"):
        (tmp_path / "given" / name).parent.mkdir(parents=True, exist_ok=True)
        jsonl(tmp_path / "given" / name, RECORDS[:1])
    elsewhere = tmp_path / "repository"
    labels = [entry.source for entry in sources.read(source(tmp_path / "given"), elsewhere)]
    assert labels == ["given/a.jsonl", "given/b.jsonl", "given/sub/a.jsonl"]
    globbed = [entry.source for entry in sources.read(source("given/*.jsonl"), tmp_path)]
    assert globbed == ["given/a.jsonl", "given/b.jsonl"]
    given = params(
        {"path": "given/*.jsonl", "table": "demonstrations"},
        {"path": str(tmp_path / "given" / "b.jsonl"), "table": "demonstrations"},
        {"builder": "pydocs", "folders": ["src"]},
    )
    assert sources.local_paths(given, tmp_path) == [
        tmp_path / "given",
        tmp_path / "given" / "b.jsonl",
        tmp_path / "src",
    ]
    at_root = params({"path": "given/../*.pdf", "table": "corpus"}, {"path": "g*/a.jsonl", "table": "demonstrations"})
    with pytest.raises(DataError, match="no file matches"):
        sources.local_paths(at_root, tmp_path)
    assert sources.local_paths(params({"path": "g*/a.jsonl", "table": "prompts"}), tmp_path) == [
        tmp_path / "given/a.jsonl"
    ]
    assert not sources.names_hub(given)
    assert sources.names_hub(params({"hub": "a/b", "table": "corpus"}))


def test_links_to_folders_are_followed_and_stand_among_the_deps(tmp_path: Path) -> None:
    """DVC does not look behind them in a folder that is a dep: what changes there would not be noticed."""
    for name in ("given/a.jsonl", "far/b.jsonl", "far/.hidden/c.jsonl", "given/sub/d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        jsonl(tmp_path / name, RECORDS[:1])
    (tmp_path / "given/link").symlink_to("../far")
    (tmp_path / "given/again").symlink_to("sub")
    (tmp_path / "far/round").symlink_to("../given")
    given = {"path": "given", "table": "demonstrations"}
    assert [entry.source for entry in sources.read(source("given"), tmp_path)] == [
        "given/a.jsonl", "given/link/b.jsonl", "given/sub/d.jsonl",
    ]  # fmt: skip
    assert sources.local_paths(params(given), tmp_path) == [tmp_path / "given", tmp_path / "given/link"]
    for pattern in ("given/*/b.jsonl", "given/**/b.jsonl"):
        globbed = params(given | {"path": pattern})
        assert sources.local_paths(globbed, tmp_path) == [tmp_path / "given", tmp_path / "given/link"]


def test_brackets_in_the_repositorys_own_name_are_no_pattern(tmp_path: Path) -> None:
    root = tmp_path / "copy [2]"
    for name in ("given/a.jsonl", "given/b [old].jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        jsonl(root / name, RECORDS[:1])
    for path, files, deps in (
        ("given/*.jsonl", ["given/a.jsonl", "given/b [old].jsonl"], ["given"]),
        ("given/b [old].jsonl", ["given/b [old].jsonl"], ["given/b [old].jsonl"]),
        ("given", ["given/a.jsonl", "given/b [old].jsonl"], ["given"]),
    ):
        given = {"path": path, "table": "demonstrations"}
        assert [entry.source for entry in sources.read(source(path), root)] == files
        assert sources.local_paths(params(given), root) == [root / name for name in deps]


def test_a_file_name_that_utf8_cannot_write_is_spelled_out(tmp_path: Path) -> None:
    """As an archive of another encoding leaves it; the tables name the file of each row."""
    place = tmp_path / "given" / b"caf\xe9.jsonl".decode(errors="surrogateescape")
    place.parent.mkdir()
    jsonl(place, RECORDS[:1])
    for root, folder in ((tmp_path, "given"), (tmp_path / "elsewhere", tmp_path / "given")):
        assert [entry.source for entry in sources.read(source(folder), root)] == ["given/caf\\udce9.jsonl"]


def test_a_linked_folder_of_the_repository_keeps_its_name(tmp_path: Path) -> None:
    """As `data` of a worktree is a link to the clone's: rows of either say the same of where they came from."""
    clone, worktree = tmp_path / "clone", tmp_path / "clone/.sluice/worktrees/w"
    for root in (clone, worktree):
        root.mkdir(parents=True)
    (clone / "data").mkdir()
    (worktree / "data").symlink_to(clone / "data")
    jsonl(clone / "data/a.jsonl", RECORDS[:1])
    for root in (clone, worktree):
        for path in ("data", "data/a.jsonl", "data/*.jsonl"):
            assert [entry.source for entry in sources.read(source(path), root)] == ["data/a.jsonl"]
    assert sources.within(clone / "data/a.jsonl", worktree) is None
    assert sources.within(worktree / ".." / "w" / "x", worktree) == Path("x")


def test_hub_rows_are_streamed_through_datasets(tmp_path: Path) -> None:
    # `datasets` takes a folder where it takes a hub id, and reads both the same way.
    jsonl(tmp_path / "train.jsonl", RECORDS)
    given = HubSource.model_validate({"hub": str(tmp_path), "table": "demonstrations"})
    assert [(entry.row, entry.record) for entry in sources.read(given, tmp_path)] == list(enumerate(RECORDS, 1))
    missing = HubSource.model_validate({"hub": str(tmp_path), "table": "demonstrations", "hub_split": "absent"})
    with pytest.raises(DataError, match="hub_split"):
        list(sources.read(missing, tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("absent.jsonl", None, "no such file"),
        ("empty.jsonl", b"", "the file is empty"),
        ("header.csv", b"prompt,completion\n", "holds no row"),
        ("quoted.csv", b'a,"b"c\n1,2\n', "row 1: found a header that is broken CSV: .*accepted: quoted cells"),
        ("rows.xlsx", b"PK", r"unknown extension; accepted: \.jsonl"),
        ("rows.jsonl.gz", b"not gzip", "not a whole gzip file"),
        ("rows.parquet", b"PAR1 no", "not a Parquet file"),
        ("cut.json", b'[{"prompt": "a"},\n {"prompt": ', "row 2: broken JSON"),
        ("middle.json", b'[{"p": 1},\n{"p": 2},\n{"p": x},\n{"p": 4},\n{"p": 5}]', "middle.json, row 3: broken JSON"),
        ("none.json", b"[]", "holds no record"),
        ("deep.json", b"[" * 100_000, "row 1: broken JSON .*recursion"),
        ("digits.json", b'[{"prompt": "a"},\n {"prompt": 1' + b"0" * 5000 + b"}]", "row 2: broken JSON .*4300 digits"),
        ("two.json", b'[{"prompt": "a"}]\n[{"prompt": "b"}]', "row 2: broken JSON .more after the end. near .*a line"),
        (
            "lines.json",
            b'{"a": {"prompt": "a"}}\n{"a": {"prompt": "b"}}',
            "row 2: .*accepted: one object a file; .*\\.jsonl",
        ),
        ("parted.csv", b"prompt;completion\na;b\n", 'row 1: the header is one cell, .*accepted: .* delimiter: ";"'),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told) as caught:
        list(sources.read(source(name), tmp_path))
    assert name in str(caught.value)


def test_folder_without_readable_files(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "a.pdf").write_bytes(b"x")
    with pytest.raises(DataError, match="given: the folder holds no file that can be read; accepted: .jsonl"):
        list(sources.read(source("given"), tmp_path))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"prompt": "a", "completion": ', "broken JSON at character"),
        (b'{"prompt": "a\xff", "completion": "b"}', "byte 0xff at position 14 of the line; accepted: UTF-8"),
        (b"[1]", "a list .*accepted: an object"),
        (b'{"prompt": 1' + b"0" * 5000 + b"}", "broken JSON .*4300 digits.*accepted: one JSON object a line"),
    ],
)
def test_bad_lines_do_not_end_the_reading(tmp_path: Path, line: bytes, told: str) -> None:
    good = json.dumps(RECORDS[0]).encode()
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([good, line, good]))
    entries = list(sources.read(source("rows.jsonl"), tmp_path))
    assert [isinstance(entry.record, BadRow) for entry in entries] == [False, True, False]
    with pytest.raises(BadRow, match=told):
        raise entries[1].record  # type: ignore[misc]


def test_bad_csv_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"prompt,completion\na,b\na,b,c\na,\xff\na,b\n")
    records = [entry.record for entry in sources.read(source("rows.csv"), tmp_path)]
    assert [str(record) if isinstance(record, BadRow) else "good" for record in records] == [
        "good",
        "found 3 cells; accepted: 2 cells, as in the header",
        "found byte 0xff at position 3 of the line; accepted: UTF-8",
        "good",
    ]


def test_lines_that_an_open_quotation_mark_takes_along_are_bad_rows_too(tmp_path: Path) -> None:
    """Counted as one, they were all gone while the budget of the quarantine was kept."""
    head = "prompt,completion\na,b\n"
    for end, told in (("", "unexpected end of data"), ('i,"j"\nk,l\n', "expected after"), ('i"\nk,l\n', "1 cells")):
        (tmp_path / "rows.csv").write_text(f'{head}"c,d\ne,f\n{end}')
        found = [(entry.row, entry.record) for entry in sources.read(source("rows.csv"), tmp_path)]
        lost = [(row, record) for row, record in found if isinstance(record, BadRow)]
        assert [row for row, _ in lost] == [3, 4, 5][: 3 if end else 2]
        assert told in str(lost[0][1]) and "took this line along, in row 3" in str(lost[1][1])
        assert [record.raw for _, record in lost][:2] == ['"c,d', "e,f"]
        assert [row for row, record in found if not isinstance(record, BadRow)] == ([2, 6] if end else [2])


def test_a_csv_row_with_two_faults_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b'prompt,completion\na,"\xff"b\nc,d\n')
    first, second = sources.read(source("rows.csv"), tmp_path)
    assert isinstance(first.record, BadRow) and second.record == {"prompt": "c", "completion": "d"}
    (tmp_path / "rows.csv").write_bytes(b'prompt,completion\n"a,b\n\xff,d\ne"\nf,g\n')
    *bad, last = sources.read(source("rows.csv"), tmp_path)
    assert [entry.row for entry in bad] == [2, 3, 4] and last.record == {"prompt": "f", "completion": "g"}


def test_csv_with_other_marks_between_and_around_its_cells(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('prompt;completion\n"a;b";"c\nd"\n')
    found = [entry.record for entry in sources.read(source("rows.csv", delimiter=";"), tmp_path)]
    assert found == [{"prompt": "a;b", "completion": "c\nd"}]
    (tmp_path / "one.csv").write_text("prompt|completion\na\n")
    with pytest.raises(DataError, match="if there is one column, delimiter: ','"):
        list(sources.read(source("one.csv"), tmp_path))
    assert [entry.record for entry in sources.read(source("one.csv", delimiter=","), tmp_path)] == [
        {"prompt|completion": "a"}
    ]
    (tmp_path / "glue.tsv").write_text('prompt\tcompletion\n"Yes" he said\t"a\n"b\t"c"\n')
    found = [entry.record for entry in sources.read(source("glue.tsv", quotes=False), tmp_path)]
    assert found == [{"prompt": '"Yes" he said', "completion": '"a'}, {"prompt": '"b', "completion": '"c"'}]
    refused = [str(entry.record) for entry in sources.read(source("glue.tsv"), tmp_path)]
    assert all("broken CSV" in told and "quotes: false" in told for told in refused)
    for mark in ('"', "\n", ";;", ""):
        with pytest.raises(ValidationError, match="delimiter"):
            source("rows.csv", delimiter=mark)


def test_lines_of_json_under_another_name_are_told_theirs(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"prompt": "a", "completion": {"text": "b"}}\n')
    first, second = (entry.record for entry in sources.read(source("rows.json"), tmp_path))
    assert isinstance(first, BadRow) and second == {"key": "completion", "text": "b"}
    assert 'found text "a" under the key text "prompt"' in str(first) and "is named .jsonl" in str(first)


def test_values_of_parquet_that_python_cannot_hold_are_bad_rows(tmp_path: Path) -> None:
    """Text that is not UTF-8, which no writer need refuse, and a time after the year 9999."""
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    text = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffb")])
    times = pa.array([0, 0, 2**58], pa.timestamp("ms"))
    pq.write_table(pa.table({"prompt": text, "completion": ["x", "y", "z"], "at": times}), tmp_path / "rows.parquet")
    found = [entry.record for entry in sources.read(source("rows.parquet"), tmp_path)]
    assert not isinstance(found[0], BadRow) and found[0]["prompt"] == "a"
    assert [record.column for record in found[1:] if isinstance(record, BadRow)] == ["prompt", "at"]
    assert "string that cannot be read ('utf-8' codec" in str(found[1])


def test_blank_lines_of_a_csv_file_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"prompt,completion\r\na,b\r\n\r\nc,d\r\n\r\n")
    entries = list(sources.read(source("rows.csv"), tmp_path))
    assert [(entry.row, entry.record) for entry in entries] == [
        (2, {"prompt": "a", "completion": "b"}),
        (4, {"prompt": "c", "completion": "d"}),
    ]


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SYSTEM = {"role": "system", "content": "s"}
HALF = r"half a character \(a lone surrogate\) at position 5 of text .bad \\ud83d.; accepted: text that UTF-8 can write"


@pytest.mark.parametrize(
    ("table", "record", "column", "told"),
    [
        ("corpus", {"body": "a"}, "text", "no such column .there are: body"),
        ("corpus", {"text": None}, "text", "found null; accepted: text"),
        ("corpus", {"text": 5}, "text", "found a number 5; accepted: text"),
        ("corpus", {"text": " \n"}, "text", "blank text"),
        ("corpus", {"text": "bad \ud83d"}, "text", HALF),
        ("demonstrations", {"messages": [{"role": "\ud83d", "content": "a"}]}, "messages", r"role.: .\\ud83d"),
        ("demonstrations", {"prompt": "a", "completion": ""}, "completion", "empty text"),
        ("demonstrations", {"prompt": "a"}, "completion", "no such column"),
        ("demonstrations", {"messages": MESSAGES[:1]}, "messages", "found the roles user"),
        ("demonstrations", {"messages": [MESSAGES[1], *MESSAGES]}, "messages", "roles assistant, user, assistant; "),
        ("demonstrations", {"messages": [SYSTEM, MESSAGES[1], *MESSAGES]}, "messages", "a user's message first"),
        ("demonstrations", {"prompt": MESSAGES[1:], "completion": "a"}, "prompt", "found the roles assistant; "),
        ("demonstrations", {"prompt": [SYSTEM], "completion": "a"}, "prompt", "a user's message first"),
        ("demonstrations", {"messages": [{"role": "robot", "content": "a"}]}, "messages", "role .one of system"),
        (
            "demonstrations",
            {"messages": [MESSAGES[0], {"role": "assistant", "content": None}]},
            "messages",
            "found null",
        ),
        (
            "demonstrations",
            {"messages": [*MESSAGES[:1], {**MESSAGES[1], "weight": 0}, *MESSAGES]},
            "messages, message 2",
            "weight 0, an answer that is not to be learned from; accepted: answers that are all learned from",
        ),
        (
            "demonstrations",
            {"messages": [MESSAGES[0], {**MESSAGES[1], "tool_calls": [{"id": "c1"}]}]},
            "messages, message 2",
            "a call of a tool, a list .*; accepted: what is said as text alone",
        ),
        (
            "demonstrations",
            {"prompt": MESSAGES[:1], "completion": [{**MESSAGES[1], "function_call": {"name": "f"}}]},
            "completion, message 1",
            "a call of a tool, ",
        ),
        (
            "demonstrations",
            {"prompt": [MESSAGES[0], {**MESSAGES[1], "weight": 0}, MESSAGES[0]], "completion": "a"},
            "prompt, message 2",
            "weight 0, an answer that is not to be learned from",
        ),
        ("prompts", {"prompt": MESSAGES}, "prompt", "last is not the user's"),
        ("prompts", {"prompt": "a", "reference": " "}, "reference", "blank text"),
        ("comparisons", {"prompt": "a", "responses": ["b", "c"], "ranks": [1]}, "ranks", "1 values .* 2 responses"),
        ("comparisons", {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 3]}, "ranks", "accepted: a ranking"),
        ("comparisons", {"prompt": "a", "responses": ["b", "c"], "ranks": [0, 1]}, "ranks", "accepted: a ranking"),
        ("comparisons", {"prompt": "a", "responses": ["b"], "ranks": [1]}, "responses", "at least 2"),
        ("comparisons", {"prompt": "a", "responses": ["b", "c"], "scores": [1, "x"]}, "scores", "accepted: numbers"),
        ("comparisons", {"prompt": "a"}, "responses", "chosen with rejected"),
        ("comparisons", {"chosen": "a", "rejected": "b"}, "prompt", "prompt: null"),
        (
            "comparisons",
            {"chosen": [MESSAGES[1]], "rejected": [MESSAGES[1]]},
            "prompt",
            "^found no such column.*null. if there",
        ),
        (
            "comparisons",
            {"prompt": "b", "chosen": MESSAGES, "rejected": MESSAGES},
            "prompt",
            "what the messages before",
        ),
        (
            "comparisons",
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: b\n\nAssistant: c",
                "rejected": "\n\nHuman: hi\n\nAssistant: d",
            },
            "chosen",
            "goes on after it parts",
        ),
        (
            "comparisons",
            {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi \n\nAssistant: b"},
            "chosen",
            "the same up to the last Assistant: turn",
        ),
        ("comparisons", {"prompt": "a", "chosen": "b", "rejected": "c", "votes": [1]}, "votes", "a number, or two"),
        (
            "comparisons",
            {"prompt": "a", "chosen": "b", "rejected": "c", "votes": [1, 4]},
            "votes",
            "1 for the chosen and 4 for the rejected one; accepted: no fewer for the chosen; .* swap them",
        ),
        ("comparisons", {"prompt": "a", "chosen": "b", "rejected": "c", "votes": 2**31}, "votes", "a number, or two"),
        ("comparisons", {"prompt": "a", "chosen": "b", "rejected": "c", "votes": "5"}, "votes", "text .5.; .*a list"),
        ("comparisons", {"prompt": "a", "chosen": "b", "rejected": "c", "labeler": "bad \ud83d"}, "labeler", HALF),
        ("tasks", {"text": "a", "label": 1.5}, "label", "as text or as a whole number"),
        ("tasks", {"text": "a", "label": True}, "label", "found a boolean"),
        ("tasks", {"context": "a", "choices": ["b", "c"], "label": 2}, "label", "0 to 1"),
        ("tasks", {"context": "a", "choices": ["b"], "label": 0}, "choices", "at least two choices"),
        ("tasks", {"context": "a", "choices": [], "label": 0}, "choices", "at least two choices"),
        ("tasks", {"body": "a", "label": 1}, "text", r"premise \+ hypothesis"),
    ],
)
def test_bad_rows(table: str, record: dict[str, Any], column: str, told: str) -> None:
    with pytest.raises(BadRow, match=told) as caught:
        canonical(table, record, {})
    assert caught.value.column.startswith(column)


def test_a_chat_may_begin_with_the_system() -> None:
    chat = [SYSTEM, *MESSAGES]
    for record in ({"messages": chat}, {"prompt": chat[:-1], "completion": "a"}):
        assert canonical("demonstrations", record, {})[0]["messages"] == chat


def test_what_openai_s_format_says_beside_the_text_may_say_nothing() -> None:
    """As Parquet writes the keys of other rows; a weight of 1 is what is done anyway."""
    chat = [MESSAGES[0] | {"tool_calls": None, "name": "Zoë"}, MESSAGES[1] | {"weight": 1, "tool_calls": []}]
    assert canonical("demonstrations", {"messages": chat}, {})[0]["messages"] == MESSAGES
    assert canonical("demonstrations", {"messages": [MESSAGES[0] | {"weight": 0}, MESSAGES[1]]}, {})


@pytest.mark.parametrize("field", ["id", "group"])
def test_names_that_cannot_be_written_are_refused(field: str) -> None:
    with pytest.raises(BadRow, match=HALF) as caught:
        identify({field: "bad \ud83d"}, {}, None)
    assert caught.value.column == field


def test_columns_inside_of_objects() -> None:
    """As the hub's SQuAD has its answers; a name with a point in it is that column first of all."""
    record = {"question": "a?", "about": {"doc": 7}, "answers": {"text": ["b", "c"], "answer_start": [1]}, "x.y": "z"}
    columns: dict[str, str | None] = {"query": "question", "target": "about.doc", "answers": "answers.text"}
    row = canonical("queries", record, columns)[0]
    assert (row["query"], row["target"], row["answers"]) == ("a?", "7", ["b", "c"])
    assert canonical("queries", record | {"answers": None}, columns)[0]["answers"] is None
    assert canonical("corpus", record, {"text": "x.y"}) == [{"text": "z"}]
    assert identify(record, {}, "about.doc")[1] == "7"
    for column in ("answers.words", "question.text", "nothing.text"):
        with pytest.raises(BadRow, match="no such column .there are: question, about"):
            canonical("corpus", record, {"text": column})


def test_comparisons_out_of_columns_inside_of_objects() -> None:
    about = {"prompt": "p", "responses": ["a", "b"], "ranks": None, "scores": [0.1, 0.9], "votes": [4, 1]}
    columns: dict[str, str | None] = {name: f"of.{name}" for name in ("prompt", "responses", "ranks", "scores")}
    row = comparison({"of": about}, columns)
    assert (row["prompt"], row["responses"], row["ranks"]) == ("p", ["a", "b"], [2, 1])
    pair = {"chosen": "a", "rejected": "b", "of": about}
    row = comparison(pair, {"prompt": "of.prompt", "votes": "of.votes"})
    assert (row["prompt"], row["votes"]) == ("p", [4, 1])
    chat = {name: [MESSAGES[0], {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    with pytest.raises(BadRow, match="what the messages before"):
        comparison(chat | {"of": about}, {"prompt": "of.prompt"})
    for missing in (pair, chat):  # a mapped column that is not there is a slip of the pen
        with pytest.raises(BadRow, match="no such column"):
            comparison(missing, {"prompt": "of.text"})


def test_columns_that_are_mapped_are_meant_whatever_else_a_file_has() -> None:
    """A file's own column text, messages or responses was read instead, without a word."""
    record = {"text": "t", "s1": "a", "s2": "b", "label": 1}
    found = canonical("tasks", record, {"premise": "s1", "hypothesis": "s2"})[0]
    assert (found["premise"], found["hypothesis"], "text" in found) == ("a", "b", False)
    with pytest.raises(BadRow, match="no such column .*: a column 'hypothesis'"):
        canonical("tasks", record, {"premise": "s1"})
    own = {"text": "t", "premise": "a", "hypothesis": "b", "label": 1}
    assert canonical("tasks", own, {"text": "text"})[0]["text"] == "t"
    with pytest.raises(BadRow, match=r"several kinds of task: text; premise \+ hypothesis; accepted: one; map"):
        canonical("tasks", own, {})
    chat = {"messages": MESSAGES, "ask": "x", "say": "y", "prompt": "q"}
    asked = canonical("demonstrations", chat, {"prompt": "ask", "completion": "say"})[0]["messages"]
    assert [message["content"] for message in asked] == ["x", "y"]
    for columns in ({}, {"messages": "messages", "prompt": "ask"}):
        assert canonical("demonstrations", chat, columns)[0]["messages"] == MESSAGES
    ranked = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "good": "c", "bad": "d"}
    pair = canonical("comparisons", ranked, {"chosen": "good", "rejected": "bad"})[0]
    assert pair["responses"] == ["c", "d"] and canonical("comparisons", ranked, {})[0]["responses"] == ["a", "b"]


def test_whole_numbers_of_pandas_are_ids_and_votes() -> None:
    """A column in which one is missing is one of floats."""
    row = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "labeler": 7.0, "id": 3.0, "worker": 12.0}
    assert comparison(row)["labeler"] == "7" and comparison(row | {"labeler": None})["labeler"] is None
    assert identify(row, {}, "worker") == ("3", "12")
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for votes, want in ((3.0, [3, 0]), ([3.0, 1.0], [3, 1]), (None, None)):
        assert comparison(pair | {"votes": votes})["votes"] == want
    assert comparison(Cells(pair | {"votes": "3.0"}))["votes"] == [3, 0]
    for value in (1.5, float("nan"), float("inf"), 2.0**54):
        with pytest.raises(BadRow, match="found a number .*; accepted: text or a whole number"):
            identify({"id": value}, {}, None)


def test_a_column_of_one_of_our_names_can_be_something_else() -> None:
    """Where null is the field's column: a field need not be there for it."""
    record = {"prompt": "a", "completion": "b", "kind": ["x"], "id": 1.5}
    with pytest.raises(BadRow, match="a list .*accepted: text"):
        canonical("demonstrations", record, {})
    with pytest.raises(BadRow, match="a number 1.5; accepted: text"):
        identify(record, {}, None)
    columns = {"kind": None, "id": None}
    assert canonical("demonstrations", record, columns)[0]["kind"] == "demonstration"
    assert identify(record, columns, None) == (None, None)
    assert source("rows.jsonl", columns=columns).columns == columns
    with pytest.raises(ValidationError, match="columns: completion: null is only for the prompt of .*: id, kind,"):
        source("rows.jsonl", columns={"completion": None})


def test_a_prompt_may_have_a_reference() -> None:
    assert canonical("prompts", {"prompt": "a", "reference": "b"}, {}) == [{"prompt": "a", "reference": "b"}]
    assert canonical("prompts", {"prompt": "a", "gold": "b"}, {"reference": "gold"})[0]["reference"] == "b"
    for record in ({"prompt": "a"}, {"prompt": "a", "reference": None}, Cells({"prompt": "a", "reference": ""})):
        assert canonical("prompts", record, {}) == [{"prompt": "a", "reference": None}]


def test_mapped_columns_are_named_as_the_file_names_them() -> None:
    with pytest.raises(BadRow, match="found null") as caught:
        canonical("demonstrations", {"q": "a", "a": None}, {"prompt": "q", "completion": "a"})
    assert caught.value.column == "a"


def comparison(record: dict[str, Any], columns: dict[str, str | None] | None = None) -> dict[str, Any]:
    return canonical("comparisons", record, columns or {})[0]


def test_scores_become_dense_ranks_with_ties() -> None:
    responses = ["a", "b", "c", "d", "e"]
    found = comparison({"prompt": "p", "responses": responses, "scores": [88.0, 95.0, 80.0, 77.0, 77.0]})
    assert found["ranks"] == [2, 1, 3, 4, 4]
    for ranks in ([1, 2, 2, 3, 4], [1, 2, 2, 4, 5], [1.0, 2.0, 2.0, 4.0, 5.0]):
        found = comparison({"prompt": "p", "responses": responses, "ranks": ranks, "labeler": 7})
        assert (found["ranks"], found["labeler"]) == ([1, 2, 2, 3, 4], "7")


@pytest.mark.parametrize("spelled", ["Zoë", "Zoe\u0308", " Zoë ", "Zoë\n"])
def test_a_labeler_is_one_whatever_the_spelling(spelled: str) -> None:
    """Kept out of training under one name, they would have taught it under the other."""
    row = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "labeler": spelled}
    assert comparison(row)["labeler"] == "Zoë"
    task = ranking_tasks.task("p", ["a", "b"])
    line = json.dumps({"task": task.id, "labeler": spelled, "ranks": [1, 2]})
    assert ranking_tasks.read(line, {task.id: task}, "r.jsonl")[0].labeler == "Zoë"


def test_of_ranks_and_scores_the_one_that_is_mapped_or_given_counts() -> None:
    row = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "scores": [0.1, 0.9]}
    with pytest.raises(BadRow, match=r"\[0.1, 0.9\], another order than ranks's; accepted: columns: {ranks: COLUMN}"):
        comparison(row)
    assert comparison(row, {"ranks": "ranks"})["ranks"] == [1, 2]
    assert comparison(row, {"scores": "scores"})["ranks"] == [2, 1]
    assert comparison(row | {"scores": None})["ranks"] == [1, 2] == comparison(row | {"scores": [9, 1]})["ranks"]
    assert comparison(row | {"ranks": None})["ranks"] == [2, 1]
    with pytest.raises(BadRow, match="found null; accepted: a list"):
        comparison(row | {"ranks": None, "scores": None})


def test_pairs_in_every_form_of_the_ecosystem() -> None:
    want = {"responses": ["good", "bad"], "ranks": [1, 2], "labeler": None}
    plain = comparison({"prompt": "p", "chosen": "good", "rejected": "bad", "votes": 3})
    assert plain == want | {"prompt": "p", "votes": [3, 0]}
    user = [{"role": "user", "content": "p"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("good", "bad")]
    assert comparison({"prompt": user, "chosen": answers[0], "rejected": answers[1]})["prompt"] == "p"
    implicit = comparison({"chosen": user + answers[0], "rejected": user + answers[1]})
    assert implicit == want | {"prompt": "p", "votes": None}
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant:"
    transcript = comparison({"chosen": start + " good", "rejected": start + " bad"})
    assert transcript == want | {"prompt": start, "votes": None}
    assert comparison({"chosen": "good", "rejected": "bad"}, {"prompt": None})["prompt"] == ""


def test_rows_of_both_forms_in_one_table() -> None:
    """As pandas and Parquet put K ranked responses beside pairs, chats beside prompts: each row lacks the other's."""
    names = ("prompt", "responses", "ranks", "scores", "chosen", "rejected", "votes", "labeler")
    empty: dict[str, Any] = dict.fromkeys(names)
    for nothing in (empty, Cells(dict.fromkeys(names, ""))):
        kind = type(nothing)
        pair = comparison(kind(nothing | {"prompt": "p", "chosen": "good", "rejected": "bad"}))
        assert (pair["responses"], pair["ranks"]) == (["good", "bad"], [1, 2])
        ranked = kind(nothing | {"prompt": "p", "responses": '["a", "b", "c"]', "scores": "[1, 3, 3]"})
        if kind is dict:
            ranked |= {"responses": ["a", "b", "c"], "scores": [1, 3, 3]}
        assert comparison(ranked)["ranks"] == [2, 1, 1]
        with pytest.raises(BadRow, match="accepted: .*a list") as caught:
            comparison(kind(nothing | {"prompt": "p"}))
        assert caught.value.column == "responses"
    chat = canonical("demonstrations", {"messages": MESSAGES, "prompt": None, "completion": None}, {})
    plain = canonical("demonstrations", {"messages": None, "prompt": "q", "completion": "a"}, {})
    assert chat == plain and chat[0]["messages"] == MESSAGES
    with pytest.raises(BadRow, match="found null; accepted: a list") as caught:
        canonical("demonstrations", {"messages": None, "prompt": None, "completion": None}, {})
    assert caught.value.column == "messages"


CHAT = [SYSTEM, MESSAGES[0], {"role": "assistant", "content": "hello"}, {"role": "user", "content": "more"}]
START = "\n\nSystem: s\n\nHuman: q\n\nAssistant: hello\n\nHuman: more\n\nAssistant:"


@pytest.mark.parametrize(
    ("prompt", "shared"),
    [
        ("more", CHAT),  # the last question alone, as in many tables
        (CHAT, CHAT),
        (CHAT[1:2], CHAT),
        (CHAT[:2], CHAT[2:]),  # TRL: the messages of chosen go on where the prompt ends
        (START, CHAT),
        ("\n\nSystem: s\n\nHuman: q\n\nAssistant:", CHAT[2:]),
        (None, CHAT),
    ],
)
def test_all_of_the_conversation_is_the_prompt(prompt: Any, shared: list[dict[str, str]]) -> None:
    chosen, rejected = ([*shared, {"role": "assistant", "content": text}] for text in ("good", "bad"))
    found = comparison({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert (found["prompt"], found["responses"]) == (START, ["good", "bad"])


def test_a_transcript_is_the_same_messages_in_every_table() -> None:
    row = canonical("demonstrations", {"prompt": START + " ", "completion": "good"}, {})[0]
    assert row["messages"] == [*CHAT, {"role": "assistant", "content": "good"}]
    for prompt in (START, "Human: hi\n\nAssistant:", "Say\n\nHuman: x\n\nAssistant:", "plain "):
        assert canonical("demonstrations", {"prompt": prompt, "completion": "good"}, {})[0]["messages"][:-1] == (
            chats.messages_of(canonical("prompts", {"prompt": prompt}, {})[0]["prompt"])
        )
    with pytest.raises(BadRow, match="empty text"):
        canonical("demonstrations", {"prompt": "\n\nHuman: \n\nAssistant:", "completion": "good"}, {})


def test_a_transcript_with_the_line_ends_of_windows_is_one() -> None:
    """As git makes of a CSV file there; it was one message of the user's, or no pair."""
    there = START.replace("\n", "\r\n")
    assert canonical("prompts", {"prompt": there}, {})[0]["prompt"] == START
    row = canonical("demonstrations", Cells({"prompt": there, "completion": "good\r\n"}), {})[0]
    assert row["messages"] == [*CHAT, {"role": "assistant", "content": "good\r\n"}]
    for record in ({}, {"prompt": "more"}, {"prompt": there}):
        found = comparison(record | {"chosen": there + " good", "rejected": there + " bad"})
        assert (found["prompt"], found["responses"]) == (START, ["good", "bad"])
    assert comparison({"prompt": there, "responses": ["a", "b"], "ranks": [1, 2]})["prompt"] == START
    assert canonical("prompts", {"prompt": "a\r\nb"}, {})[0]["prompt"] == "a\r\nb"


@pytest.mark.parametrize("columns", [{}, {"prompt": None}])
@pytest.mark.parametrize("prompt", ["more", START])
def test_a_transcript_beside_a_prompt_is_still_one(prompt: str, columns: dict[str, str | None]) -> None:
    found = comparison({"prompt": prompt, "chosen": START + " good", "rejected": START + " bad"}, columns)
    assert (found["prompt"], found["responses"]) == (START, ["good", "bad"])


def test_messages_in_a_csv_file_are_written_as_json() -> None:
    """As pandas writes lists into cells they are no JSON; neither form is what somebody said."""

    def cells(**record: Any) -> Cells:
        return Cells({name: value if isinstance(value, str) else json.dumps(value) for name, value in record.items()})

    user, (good, bad) = MESSAGES[:1], ([{"role": "assistant", "content": text}] for text in ("good", "bad"))
    want = {"prompt": "q", "responses": ["good", "bad"]}
    for record in (
        cells(chosen=user + good, rejected=user + bad),
        cells(prompt="q", chosen=user + good, rejected=user + bad),
        cells(prompt=user, chosen=good, rejected=bad),
        cells(prompt=user, chosen="good", rejected="bad"),
        cells(prompt=user, responses=["good", "bad"], ranks=[1, 2]),
    ):
        assert {name: comparison(record)[name] for name in want} == want
    assert canonical("prompts", cells(prompt=CHAT), {})[0]["prompt"] == START
    assert canonical("demonstrations", cells(prompt=user, completion=good), {})[0]["messages"] == user + good
    assert canonical("prompts", cells(prompt='[{"a": 1}] is what?'), {})[0]["prompt"] == '[{"a": 1}] is what?'
    long = "[" + "1" * 5000 + "]"
    for table, record, column in (
        ("comparisons", cells(prompt="q", chosen=str(user + good), rejected=str(user + bad)), "chosen"),
        ("comparisons", cells(prompt=str(user), chosen="good", rejected="bad"), "prompt"),
        ("prompts", cells(prompt=str(user)), "prompt"),
        ("demonstrations", cells(prompt="q", completion=str(good)), "completion"),
        ("comparisons", cells(prompt="q", responses=["good", "bad"], ranks=long), "ranks"),
    ):
        with pytest.raises(BadRow, match="accepted: in a CSV file, a list written as JSON") as caught:
            canonical(table, record, {})
        assert caught.value.column == column
    with pytest.raises(BadRow, match="found a list .*accepted: text"):
        comparison(cells(prompt="q", chosen=user + good, rejected="bad"))


@pytest.mark.parametrize(("cell", "votes"), [("5", [5, 0]), ("", None), ("[3, 1]", [3, 1])])
def test_votes_in_a_csv_file_are_text(cell: str, votes: list[int] | None) -> None:
    row = {"prompt": "p", "chosen": "good", "rejected": "bad", "votes": cell}
    assert comparison(Cells(row))["votes"] == votes


def test_long_documents_are_cut_at_paragraph_ends_and_lose_nothing() -> None:
    rng = random.Random(1)
    paragraphs = [" ".join(["word"] * rng.randrange(1, 60)) for _ in range(200)]
    text = "\n\n".join(paragraphs)
    parts = cut(text, 1000)
    assert "\n\n".join(parts) == text and max(map(len, parts)) <= 1000 and len(parts) > 20
    unbroken = cut("x" * 2500, 1000)
    assert "".join(unbroken) == "x" * 2500 and max(map(len, unbroken)) <= 1000


def test_a_file_that_is_one_long_document_is_cut_in_its_own_time() -> None:
    """Not in that of its length times its parts: forty megabytes took nine seconds, a gigabyte over an hour."""
    text = ("word " * 15 + "\n") * 520_000
    start = time.process_time()
    parts = cut(text)
    assert time.process_time() - start < 2
    assert "\n".join(parts) == text and max(map(len, parts)) <= PART_CHARACTERS


def test_first_ten_bad_rows_are_told_together(tmp_path: Path) -> None:
    ledger = Ledger("refuse", 0.0, tmp_path / "q.parquet")
    with pytest.raises(DataError) as caught:
        for row in range(1, 50):
            ledger.refuse("a.jsonl", "/data/a.jsonl", row, BadRow("text", "null", "text"), "{}")
    lines = str(caught.value).splitlines()
    assert lines[9] == "/data/a.jsonl, row 10, column text: found null; accepted: text"
    assert ledger.bad == 10 and "on_bad_row: quarantine" in lines[-1]
