"""Ranking tasks: round trips through each tool's own export format, and every file that cannot be used."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

import pytest

from pipelines.core import ranking_tasks
from pipelines.core.errors import DataError
from pipelines.core.ranking_tasks import Ranking, export, read, read_tasks

TASKS = [
    ranking_tasks.task("What is 雨?\n\nSay it.", ["rain", "", "a very long answer", "snow"]),
    ranking_tasks.task("2 + 2", ["4", "5", "four", "22"]),
]
BY_ID = {one.id: one for one in TASKS}
FIRST, SECOND = TASKS
RANKS = {FIRST.id: [1, 3, 2, 2], SECOND.id: [1, 2, 1, 3]}


def test_ids_belong_to_the_texts() -> None:
    assert ranking_tasks.task(FIRST.prompt, FIRST.responses).id == FIRST.id != SECOND.id
    assert ranking_tasks.task(FIRST.prompt, FIRST.responses[::-1]).id != FIRST.id
    assert ranking_tasks.task("a", ["b", "c"]).id != ranking_tasks.task("ab", ["c"]).id
    assert FIRST.id == "c730a4696ee7fe44"  # a change would orphan every ranking people have made


def label_studio(tasks: list[dict[str, Any]], people: list[Any]) -> list[dict[str, Any]]:
    """What Label Studio's export "JSON" makes of imported tasks when people have put the answers into buckets."""
    found = []
    for number, imported in enumerate(tasks, 1):
        ranks = RANKS[imported["data"]["task"]]
        buckets = {str(rank): [str(n) for n, own in enumerate(ranks, 1) if own == rank] for rank in range(1, 5)}
        result = {
            "value": {"ranker": {"_": [], **buckets}},
            "id": "pA2Y0cBMhq", "from_name": "rank", "to_name": "results", "type": "ranker", "origin": "manual",
        }  # fmt: skip
        annotations = [
            {
                "id": 7, "completed_by": who, "result": [result], "was_cancelled": False, "ground_truth": False,
                "created_at": "2026-01-05T10:00:00.000000Z", "lead_time": 21.4, "task": number, "project": 3,
            }
            for who in people
        ]  # fmt: skip
        skipped = {"id": 8, "completed_by": 9, "result": [], "was_cancelled": True}
        found.append(
            {"id": number, "annotations": [*annotations, skipped], "drafts": [], "predictions": [], **imported}
        )
    return found


def test_label_studio_round_trip() -> None:
    imported = json.loads(export(TASKS, "label-studio"))
    assert imported[0]["data"]["items"][1] == {"id": "2", "title": "Answer 2", "body": "(an empty answer)"}
    people = [{"id": 1, "email": "ada@example.org", "first_name": ""}, 4]
    exported = json.dumps(label_studio(imported, people))
    want = [Ranking(one.id, who, RANKS[one.id]) for one in TASKS for who in ("ada@example.org", "4")]
    assert read(exported, BY_ID, "e.json") == want
    interface = ElementTree.fromstring(ranking_tasks.label_studio_config(4))
    assert [tag.get("name") for tag in interface.iter("Bucket")] == ["1", "2", "3", "4"]
    assert {tag.get("value") for tag in interface if tag.get("value")} == {"$prompt", "$items"}
    assert {"$prompt", "$items"} == {f"${key}" for key in imported[0]["data"]} - {"$task"}


def test_label_studio_order_without_buckets() -> None:
    """As its template "LLM Ranker" exports a plain order: the ids, best first, under the tag's name."""
    result = {
        "type": "ranker",
        "from_name": "rank",
        "to_name": "results",
        "value": {"ranker": {"rank": ["3", "1", "4", "2"]}},
    }
    record = {"id": 1, "data": {"task": SECOND.id}, "annotations": [{"completed_by": 2, "result": [result]}]}
    assert read(json.dumps([record]), BY_ID, "e.json") == [Ranking(SECOND.id, "2", [2, 4, 1, 3])]


def test_argilla_round_trip() -> None:
    records = json.loads(export(TASKS, "argilla"))
    assert set(records[0]) == {"id", "fields", "metadata", "suggestions", "responses", "vectors"}
    for record in records:  # as `records.to_json` writes what two users answered, with ranks
        ranking = [{"value": f"response_{n}", "rank": rank} for n, rank in enumerate(RANKS[record["id"]], 1)]
        users = ("0f0b6a6e-ada", "77c1-ben")
        record["responses"] = {
            "ranking": [{"value": ranking[::-1], "user_id": user} for user in users],
            "comment": [{"value": "fine", "user_id": users[0]}],
        }
        record["_server_id"] = "8c0f"
    want = [Ranking(one.id, who, RANKS[one.id]) for one in TASKS for who in ("0f0b6a6e-ada", "77c1-ben")]
    assert read(json.dumps(records), BY_ID, "a.json") == want


def test_argilla_s_client_leaves_the_ranks_out() -> None:
    """Argilla 2: `UserResponse.from_model` takes the names alone, which the page sends in the question's order."""
    record = json.loads(export(TASKS, "argilla"))[0]
    names = [f"response_{n}" for n in range(1, 5)]
    record["responses"] = {"ranking": [{"value": names, "user_id": "u1", "status": "submitted"}]}
    with pytest.raises(DataError, match=r"a\.json, record 1: the ranking by u1 has no ranks, .* records of its server"):
        read(json.dumps([record]), BY_ID, "a.json")
    record["responses"] = {"colours": [{"value": ["red", "blue"], "user_id": "u1"}]}
    assert read(json.dumps([record]), BY_ID, "a.json") == []


def test_records_of_argilla_s_server() -> None:
    ranking = [{"value": f"response_{n}", "rank": rank} for n, rank in enumerate([2, 1, 4, 4], 1)]
    answered = [{"user_id": "u1", "status": "submitted", "values": {"ranking": {"value": ranking}}}]
    record = {"id": "5f0c-of-the-server", "external_id": FIRST.id, "fields": {"prompt": "…"}, "responses": answered}
    assert read(json.dumps([record]), BY_ID, "a.json") == [Ranking(FIRST.id, "u1", [2, 1, 3, 3])]


def test_argilla_1_records() -> None:
    ranking = [{"value": f"response-{n}", "rank": rank} for n, rank in enumerate([2, 1, 4, 4], 1)]
    answered = [
        {"user_id": "u1", "status": "submitted", "values": {"ranking": {"value": ranking}}},
        {"user_id": "u2", "status": "discarded", "values": {"ranking": {"value": ranking}}},
    ]
    record = {"external_id": FIRST.id, "fields": {"prompt": "…"}, "responses": answered}
    assert read(json.dumps([record]), BY_ID, "a.json") == [Ranking(FIRST.id, "u1", [2, 1, 3, 3])]


def test_our_own_lines() -> None:
    assert read_tasks(export(TASKS, "jsonl"), "t.jsonl") == TASKS
    lines = [
        {"task": FIRST.id, "labeler": "ada", "ranks": [1, 2, 2, 4]},  # competition ranks
        {"task": FIRST.id, "labeler": 7, "ranks": None, "scores": [0.5, 3, 3, -1]},  # as pandas writes two columns
        {"task": SECOND.id, "labeler": "ada", "ranks": [2, 1, 3, 4]},
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n\n"
    assert [(one.labeler, one.ranks) for one in read(text, BY_ID, "r.jsonl")] == [
        ("ada", [1, 2, 2, 3]), ("7", [2, 1, 1, 3]), ("ada", [2, 1, 3, 4]),
    ]  # fmt: skip
    edited = export(TASKS, "jsonl").replace("snow", "hail")
    with pytest.raises(DataError, match=r"t\.jsonl, line 1: task \w+ has other texts than when it was made"):
        read_tasks(edited, "t.jsonl")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_only_line_feeds_end_a_line(mark: str) -> None:
    tasks = [ranking_tasks.task(f"a{mark}b", [f"c{mark}", "d"]), SECOND]
    assert read_tasks(export(tasks, "jsonl"), "t.jsonl") == tasks
    text = json.dumps({"task": SECOND.id, "labeler": f"a{mark}b", "ranks": [1, 2, 3, 4]}, ensure_ascii=False)
    assert read(text + "\r\n", BY_ID, "r") == [Ranking(SECOND.id, f"a{mark}b", [1, 2, 3, 4])]


def line(**changes: Any) -> str:
    return json.dumps({"task": SECOND.id, "labeler": "ada", "ranks": [1, 2, 3, 4]} | changes)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (line(ranks=[1, 2, 3]), r"line 1, task \w+, ranks: found 3 values; accepted: one for each of the 4 responses"),
        (line(ranks=[1]), r"ranks: found 1 values; accepted: one for each of the 4"),
        (line(ranks=[1, 2, 9, 9]), r"ranks: found a list \[1, 2, 9, 9\]; accepted: a ranking"),
        (line(labeler=None), r"line 1, task \w+, labeler: found none; accepted: the name of who ranked"),
        (line(labeler=" "), "labeler: found none"),
        (line(labeler="\ud83d"), r"labeler: found half a character .*ud83d.; accepted: text that UTF-8 can write"),
        (
            f"{line()}\n{line(labeler='ben')}\n{line()}",
            r"line 3, task \w+, labeler: found a second ranking by ada; accepted: one a task; the first is r, line 1",
        ),
        (
            line(task="feed"),
            "1 of 1 rankings are of other answers than those sampled now .0 match.*seed.*labeler: data",
        ),
        (f"{line()}\n{line(task='feed')}", r"1 of 2 rankings .* \(1 match\), first: r, line 2: task feed"),
        (line(task=["feed"]), "1 of 1 rankings are of other answers"),
        ('{"task": ', "r, line 1: broken JSON"),
        ('{"prompt": "a", "responses": ["b"]}', "r, line 1: found an object .*accepted: JSON lines"),
        ("[{", "r, line 1: broken JSON"),
        (
            '[{"prompt": "a", "rank": {}, "annotator": 1}]',
            r"record 1: found .*accepted: .*Label Studio's export \"JSON\"",
        ),
        ('[{"data": {}, "annotations": [{"completed_by": 1, "result": []}]}]', "0 results of type ranker"),
    ],
)
def test_refused(text: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read(text, BY_ID, "r")


@pytest.mark.parametrize(
    ("ranker", "told"),
    [
        ({"1": ["1", "2"], "2": ["3", "5"]}, r'an unknown response text "5"; accepted: the task\'s responses, 1 to 4'),
        ({"_": ["4"], "1": ["1", "2"], "2": ["3"]}, "ranks of 3 responses; accepted: one for each of the 4"),
        ({"good": ["1"], "bad": ["2", "3", "4"]}, r"the buckets bad, good; accepted: ranks \(1, 2, ...\)"),
    ],
)
def test_buckets_that_do_not_rank(ranker: dict[str, list[str]], told: str) -> None:
    result = {"type": "ranker", "value": {"ranker": ranker}}
    record = {"data": {"task": SECOND.id}, "annotations": [{"completed_by": 2, "result": [result]}]}
    with pytest.raises(DataError, match=told):
        read(json.dumps([record]), BY_ID, "r")
