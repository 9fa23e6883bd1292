"""Ranking tasks for people: out to Label Studio and Argilla, rankings back in.

A **task** is a prompt and the answers to rank; its id is a hash of both, so that a ranking can never be taken for one
of other answers. Three formats, told apart by what they hold:

* `jsonl`, our own: a task is a line `{"task", "prompt", "responses"}`; a ranking `{"task", "labeler", "ranks"}`, or
  `"scores"`, higher is better, in the order of the responses.
* `label-studio`: the task list that Label Studio imports, for a `List` ranked with a `Ranker` whose buckets are the
  ranks (answers in one bucket are tied); back comes its export "JSON" (not JSON-MIN). A `Ranker` without buckets is
  read too: its one list is an order without ties. https://labelstud.io/tags/ranker.html
* `argilla`: records as `rg.Dataset.records.from_json` reads them, for a ranking question over `response_1` and so on;
  back come those of Argilla's server (`SERVER`), or of an Argilla 1 export. What the client of Argilla 2 exports
  (`records.to_json`) holds the responses' names in the question's order and no ranks; it is read where it has ranks.
  https://docs.argilla.io/latest/reference/argilla/records/records/
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pipelines.core.comparisons import dense_ranks, ranks_of_scores
from pipelines.core.errors import DataError
from pipelines.core.faults import BadRow, shown
from pipelines.core.fields import filled, one_name, whole

Format = Literal["jsonl", "label-studio", "argilla"]
EMPTY = "(an empty answer)"  # annotation tools do not show, or refuse, an item without text
TOLD = 10
SERVER = 'GET /api/v1/datasets/ID/records?include=responses, the list under "items"'
ACCEPTED = (
    'JSON lines {"task", "labeler", "ranks" or "scores"}, Label Studio\'s export "JSON" (tasks with annotations), '
    f"or the records of Argilla's server ({SERVER})"
)


class Task(NamedTuple):
    """Answers to one prompt that somebody is to rank."""

    id: str
    prompt: str
    responses: tuple[str, ...]


class Ranking(NamedTuple):
    """One labeler's dense ranks of a task's responses, in their order: 1 is best, ties share a rank."""

    task: str
    labeler: str
    ranks: list[int]


class _Raw(NamedTuple):
    """A ranking as a file has it: values in the order of the responses, or by the response's number from 1."""

    where: str
    task: Any
    labeler: Any
    values: list[Any] | dict[str, Any]
    scores: bool = False


def task(prompt: str, responses: Sequence[str]) -> Task:
    """A task with its id."""
    key = json.dumps([prompt, *responses], ensure_ascii=False)
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8)
    return Task(digest.hexdigest(), prompt, tuple(responses))


def export(tasks: Iterable[Task], format: Format) -> str:
    """Tasks as text in the format that the tool imports."""
    if format == "jsonl":
        lines = ({"task": one.id, "prompt": one.prompt, "responses": list(one.responses)} for one in tasks)
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write = _label_studio_task if format == "label-studio" else _argilla_record
    return json.dumps([write(one) for one in tasks], ensure_ascii=False, indent=1) + "\n"


def label_studio_config(responses: int) -> str:
    """The labeling interface for Label Studio: one bucket a rank."""
    names = ["Best", *(f"Rank {rank}" for rank in range(2, responses + 1))]
    buckets = [f'    <Bucket name="{rank}" title="{name}"/>' for rank, name in enumerate(names, 1)]
    lines = [
        "<View>",
        '  <Text name="prompt" value="$prompt"/>',
        '  <List name="results" value="$items" title="Answers"/>',
    ]
    return "\n".join([*lines, '  <Ranker name="rank" toName="results">', *buckets, "  </Ranker>", "</View>", ""])


def read_tasks(text: str, name: str) -> list[Task]:
    """Tasks as `export(tasks, "jsonl")` wrote them. `name` is the file's, for messages.

    Raises:
        DataError: a line is no task, or has been edited (its id is not that of its texts).
    """
    found = []
    for where, record in _lines(text, name):
        try:
            own = task(record["prompt"], record["responses"])
        except (KeyError, TypeError):
            raise DataError(f"{where}: found {shown(record)}; accepted: a task (task, prompt, responses)") from None
        if own.id != record.get("task"):
            raise DataError(f"{where}: task {record.get('task')} has other texts than when it was made ({own.id})")
        found.append(own)
    return found


def read(text: str, tasks: Mapping[str, Task], name: str) -> list[Ranking]:
    """Rankings of `tasks` (by id) out of a file in any of the formats, in the file's order.

    Raises:
        DataError: the text is none of the formats; or the first ten rankings that are not whole, not of these tasks,
            without a labeler, or given twice.
    """
    rankings: list[Ranking] = []
    problems: list[str] = []
    strangers: list[str] = []
    first: dict[tuple[str, str], str] = {}
    for raw in _parse(text, name):
        labeler = "" if raw.labeler is None else one_name(str(raw.labeler))
        if not isinstance(raw.task, str) or raw.task not in tasks:
            strangers.append(f"{raw.where}: task {raw.task}")
            continue
        try:
            if not labeler:
                raise BadRow("labeler", "none", "the name of who ranked")
            filled(labeler, "labeler")
            if (raw.task, labeler) in first:
                earlier = first[raw.task, labeler]
                raise BadRow("labeler", f"a second ranking by {labeler}", f"one a task; the first is {earlier}")
            ranks = _ranks(raw, len(tasks[raw.task].responses))
        except BadRow as fault:
            problems.append(f"{raw.where}, task {raw.task}, {fault.column}: {fault}")
            continue
        first[raw.task, labeler] = raw.where
        rankings.append(Ranking(raw.task, labeler, ranks))
    if strangers:
        known = len(rankings) + len(problems)
        raise DataError(
            f"{name}: {len(strangers)} of {known + len(strangers)} rankings are of other answers than those sampled "
            f"now ({known} match), first: {strangers[0]}. The SFT model, the prompts, feedback.seed or the sampling "
            "params have changed since the tasks were exported. Rank the tasks of this run, or give the rankings with "
            "their prompts and responses to data.sources as table: comparisons and set feedback.labeler: data."
        )
    if problems:
        more = [f"and {len(problems) - TOLD} more"] if len(problems) > TOLD else []
        raise DataError("\n".join([*problems[:TOLD], *more]))
    return rankings


def _ranks(raw: _Raw, count: int) -> list[int]:
    """Dense ranks in the order of the responses.

    Raises:
        BadRow: not one value for each response, or values that do not rank.
    """
    if isinstance(raw.values, dict):
        unknown = sorted(raw.values.keys() - {str(number) for number in range(1, count + 1)})
        if unknown:
            raise BadRow("ranking", f"an unknown response {shown(unknown[0])}", f"the task's responses, 1 to {count}")
        if len(raw.values) != count:
            raise BadRow("ranking", f"ranks of {len(raw.values)} responses", f"one for each of the {count} responses")
        # Tools may leave a rank empty: only the order counts, and less is better.
        given = [raw.values[str(number)] for number in range(1, count + 1)]
        if not all(whole(rank, 0) for rank in given):
            raise BadRow("ranking", shown(given), "a whole number as the rank of each response")
        return ranks_of_scores([-rank for rank in given], "ranking")
    column = "scores" if raw.scores else "ranks"
    if len(raw.values) != count:
        raise BadRow(column, f"{len(raw.values)} values", f"one for each of the {count} responses")
    return ranks_of_scores(raw.values, column) if raw.scores else dense_ranks(raw.values, column)


def _parse(text: str, name: str) -> Iterator[_Raw]:
    """Rankings of a file in whichever format it is."""
    if not text.lstrip().startswith("["):
        for where, record in _lines(text, name):
            ranks, scores = record.get("ranks"), record.get("scores")  # of a table with both columns one is null
            values = scores if ranks is None else ranks
            if "task" not in record or not isinstance(values, list):
                raise DataError(f"{where}: found {shown(record)}; accepted: {ACCEPTED}")
            yield _Raw(where, record["task"], record.get("labeler"), values, ranks is None)
        return
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}, line {error.lineno}: broken JSON: {error.msg}; accepted: {ACCEPTED}") from None
    for number, record in enumerate(records, 1):
        where = f"{name}, record {number}"
        if not isinstance(record, dict) or not ({"data", "annotations"} <= set(record) or "fields" in record):
            raise DataError(f"{where}: found {shown(record)}; accepted: {ACCEPTED}")
        try:
            yield from _annotations(where, record) if "annotations" in record else _answers(where, record)
        except (KeyError, TypeError, AttributeError) as error:
            told = f"{type(error).__name__} {error}"
            raise DataError(f"{where}: not as the tool exports it ({told}); accepted: {ACCEPTED}") from None


def _lines(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """`(where, record)` of JSON lines; blank ones are skipped. Only `\\n` ends a line: a text may hold U+2028."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{name}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: broken JSON: {error.msg}; accepted: {ACCEPTED}") from None
            if not isinstance(record, dict):
                raise DataError(f"{where}: found {shown(record)}; accepted: {ACCEPTED}")
            yield where, record


def _label_studio_task(one: Task) -> dict[str, Any]:
    items = [
        {"id": str(number), "title": f"Answer {number}", "body": text or EMPTY}
        for number, text in enumerate(one.responses, 1)
    ]
    return {"data": {"task": one.id, "prompt": one.prompt, "items": items}}


def _annotations(where: str, record: dict[str, Any]) -> Iterator[_Raw]:
    """Rankings of one task of Label Studio's export; skipped annotations are no rankings."""
    for annotation in record["annotations"]:
        if annotation.get("was_cancelled"):
            continue
        who = annotation.get("completed_by")
        if isinstance(who, dict):
            who = who.get("email") or who.get("username") or who.get("id")
        results = [result for result in annotation.get("result", []) if result.get("type") == "ranker"]
        if len(results) != 1:
            raise DataError(f"{where}: {len(results)} results of type ranker in an annotation; accepted: 1")
        columns: dict[str, list[Any]] = results[0]["value"]["ranker"]
        placed = {column: items for column, items in columns.items() if column != "_"}  # "_": items left in the list
        if placed.keys() and all(column.isdecimal() for column in placed):
            values = {str(item): int(column) for column, items in placed.items() for item in items}
        elif len(placed) == 1:
            values = {str(item): rank for rank, item in enumerate(next(iter(placed.values())), 1)}
        else:
            found = ", ".join(sorted(placed)) or "none"
            raise DataError(f"{where}: the buckets {found}; accepted: ranks (1, 2, ...), or one list in order")
        yield _Raw(where, record["data"].get("task"), who, values)


def _argilla_record(one: Task) -> dict[str, Any]:
    answers = {f"response_{number}": text or EMPTY for number, text in enumerate(one.responses, 1)}
    return {
        "id": one.id,
        "fields": {"prompt": one.prompt, **answers},
        "metadata": {},
        "suggestions": {},
        "responses": {},
        "vectors": {},
    }


def _answers(where: str, record: dict[str, Any]) -> Iterator[_Raw]:
    """Rankings of one Argilla record: the client keys responses by question, the server and version 1 by user."""
    given = record.get("responses") or {}
    if isinstance(given, dict):
        pairs = [(one.get("user_id"), one) for answers in given.values() for one in answers]
    else:
        done = [user for user in given if user.get("status") == "submitted"]
        pairs = [(user.get("user_id"), one) for user in done for one in (user.get("values") or {}).values()]
    for who, one in pairs:
        value = one.get("value")
        if one.get("status", "submitted") != "submitted" or not isinstance(value, list):
            continue  # a draft, or another kind of question
        if value and all(isinstance(item, str) and re.fullmatch(r"response[_-]\d+", item) for item in value):
            raise DataError(
                f"{where}: the ranking by {who} has no ranks, which Argilla's Python client leaves out of what it "
                f"exports; accepted: the records of its server ({SERVER})"
            )
        if not all(isinstance(item, dict) and "rank" in item for item in value):
            continue
        values = {re.sub(r"^response[_-]", "", str(item.get("value"))): item["rank"] for item in value}
        yield _Raw(where, record.get("external_id") or record.get("id"), who, values)
