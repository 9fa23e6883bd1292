"""Which questions stage `answers` asks, and what is found for each.

Questions are rows of `queries` that have accepted answers. What nothing answers are the user's queries without a
target; where there are none, questions whose target is hidden from the index, less those for which some other passage
spells an accepted answer.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.core import answer_metrics, assistant, grounding, reading, retrieval

# What `retrieval` imports by name; the deps in dvc.yaml are what imports say.
from pipelines.core import embedding, fusion, lexical, nearest, reranking  # noqa: F401  # isort: skip
from pipelines.core.errors import ArtifactError, DataError
from pipelines.core.labelers import drawn
from pipelines.core.params.answers import AnswersParams

COLUMNS = ["id", "group", "kind", "query", "target", "answers"]
THRESHOLD = "threshold.json"
CANDIDATES = 3  # for each question wanted, how many are looked at: one may be too long, or answered elsewhere
Problem = Callable[[str], str | None]


class Question(NamedTuple):
    """A question, what is accepted as its answer, and what there is to read."""

    id: str
    group: str
    kind: str
    text: str
    accepted: list[str]  # empty: nothing answers it
    target: str | None  # id of the document that answers it
    hidden: str | None  # id of a document that is kept out of the search
    found: list[Any]  # passages that were looked up, best first
    oracle: list[Any]  # passages of the target, best first


def opened(params: AnswersParams, rag: Path) -> tuple[Any, assistant.Settings]:
    """The index of stage `rag`, and how questions are put with what it finds.

    Raises:
        ArtifactError: the index is damaged, or there is no threshold beside it.
    """
    index = open_index(rag / "index", None)
    try:
        told = json.loads((rag / THRESHOLD).read_text(encoding="utf-8"))
        threshold, judged = told["threshold"], told.get("passages", assistant.JUDGED)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{rag.name}/{THRESHOLD} cannot be read ({error}). Run: dvc repro rag") from None
    embedder: str = index.manifest["embedder"]["sha256"]
    template = grounding.TEMPLATES[params.style]
    return index, assistant.Settings(
        template, params.passages, params.budget, threshold, params.max_new_tokens, embedder, judged
    )


def open_index(place: Path, embedder: str | None) -> Any:
    """An index folder; `embedder`: the one that it must have been made with.

    Raises:
        ArtifactError: it is damaged, or was made with another embedder.
    """
    try:
        return retrieval.Index.open(place, embedder=embedder)
    except ValueError as error:
        raise ArtifactError(str(error)) from None


def answerable(
    params: AnswersParams,
    data: Path,
    split: str,
    count: int,
    index: Any,
    settings: assistant.Settings,
    problem: Problem,
) -> list[Question]:
    """`count` questions of one side, or as many as there are, by hash of seed and id, with their passages.

    Args:
        problem: why a question cannot be asked; nothing where it can.

    Raises:
        ArtifactError: the data have no queries.
        DataError: none has accepted answers; a target that the index does not hold; one is too long (`too_long:
            refuse`), or all are.
    """
    return [_answered(row, settings, index) for row in _rows(params, data, split, count, problem)]


def unanswerable(
    params: AnswersParams, data: Path, index: Any, settings: assistant.Settings, problem: Problem
) -> list[Question]:
    """At most `params.unanswerable` questions of the test side that nothing answers, with what is found for them.

    Raises as `answerable`.
    """
    rows = (row for row in reading.rows(data, "queries", "test", COLUMNS) if row["target"] is None)
    given = [_nothing(row) for row in _first(rows, params, params.unanswerable, problem)]
    if given:
        return [looked_up(question, settings, index) for question in given]
    found: list[Question] = []
    for row in _rows(params, data, "test", CANDIDATES * params.unanswerable, problem):
        question = looked_up(_nothing(row), settings, index)
        if len(found) == params.unanswerable:
            break
        if not any(answer_metrics.contains(assistant.told(passage), row["answers"]) for passage in question.found):
            found.append(question)
    return found


def looked_up(question: Question, settings: assistant.Settings, index: Any) -> Question:
    """A question with what an index finds for it."""
    hidden = [] if question.hidden is None else [question.hidden]
    return question._replace(found=index.search(question.text, assistant.searched(settings), exclude=hidden))


def _nothing(row: dict[str, Any]) -> Question:
    """A question that nothing answers, since it has no target or its target is hidden."""
    name = row["id"] if row["target"] is None else f"{row['id']}:hidden"
    return Question(name, row["group"], row["kind"], row["query"], [], None, row["target"], [], [])


def _rows(params: AnswersParams, data: Path, split: str, count: int, problem: Problem) -> list[dict[str, Any]]:
    """Queries with accepted answers."""
    rows = reading.rows(data, "queries", split, COLUMNS)
    known: set[str] = set()

    def asked() -> Any:
        for row in rows:
            if row["answers"] and row["target"] is not None:
                known.add(row["kind"])
                if not params.kinds or row["kind"] in params.kinds:
                    yield row

    chosen = _first(asked(), params, count, problem)
    if not chosen:
        kinds = f" of kind {', '.join(params.kinds)}" if params.kinds else ""
        there = f"; there are answers for kind {', '.join(sorted(known))}" if known else ""
        raise DataError(
            f"queries/{split} has no question{kinds} with accepted answers{there}. Give some: a source with "
            "table: queries and the columns query, target (id of the knowledge row that answers it) and answers (a "
            "text or a list of texts) in params.yaml data.sources; or choose others with answers.kinds."
        )
    return chosen


def _first(rows: Any, params: AnswersParams, count: int, problem: Problem) -> list[dict[str, Any]]:
    """The first `count` rows in the order of their hashes that can be asked."""
    best = heapq.nsmallest(
        CANDIDATES * count, rows, key=lambda row: (drawn("answers", str(params.seed), row["id"]), row["id"])
    )
    found: list[dict[str, Any]] = []
    for row in best:
        if len(found) == count:
            break
        if (told := problem(row["query"])) is None:
            found.append(row)
        elif params.too_long == "refuse" or (row is best[-1] and not found):
            raise DataError(f"queries, id {row['id']}, {told} Or set answers.too_long: drop, if others are shorter.")
    return found


def _answered(row: dict[str, Any], settings: assistant.Settings, index: Any) -> Question:
    target = row["target"]
    oracle = index.search(
        row["query"], settings.passages, where=lambda chunk: chunk["document"] == target, distinct=False
    )
    if not oracle:
        raise DataError(
            f"queries, id {row['id']}: its target {target!r} is not in the index of stage rag, which was built from "
            "other data. Run: dvc repro rag"
        )
    asked = Question(row["id"], row["group"], row["kind"], row["query"], row["answers"], target, None, [], oracle)
    return looked_up(asked, settings, index)
