"""What the answers of stage `answers` are worth: a row a question, and the figures over them.

Three ways of asking: `closed_book` (the question alone), `retrieval` (with the passages that were found, or a refusal
where none is relevant: the assistant as it is served) and `oracle` (with passages of the document that answers it: what
a perfect retriever would give). The score is token F1.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from pipelines.core import answer_metrics, answers_generation, assistant, citing, grounding, statistics
from pipelines.core.answers_generation import Speaker
from pipelines.core.answers_questions import Question
from pipelines.core.context import StageContext

RETRIEVAL = "retrieval"
ENDINGS = {RETRIEVAL: "", "closed_book": "_closed_book", "oracle": "_oracle"}  # of a way's keys and columns


class Answer(NamedTuple):
    """One answer, judged."""

    text: str  # with marks
    passages: list[Any]  # in the prompt
    refused: bool
    cited: citing.Cited
    scores: answer_metrics.Scores
    citations: answer_metrics.Citations
    groundedness: float


class Asking(NamedTuple):
    """Questions, and in which way they are asked."""

    questions: Sequence[Question]
    way: str


def ask(
    one: Speaker, asked: Sequence[Asking], settings: assistant.Settings, keep: str | None, context: StageContext
) -> list[list[Answer]]:
    """A model's answers, as the assistant would give them. It is loaded once for all that is asked.

    Args:
        keep: under which name batches are kept in the stage's scratch; null: they are not.

    Raises:
        DataError: a question that does not fit into the model's context.
        Stopped: a signal came; the batches so far are kept.
    """
    puts: list[list[assistant.Put | None]] = []
    for questions, way in asked:
        shown: list[list[Any]] = [{RETRIEVAL: q.found, "oracle": q.oracle, "closed_book": []}[way] for q in questions]
        puts.append([
            None
            if way == RETRIEVAL and assistant.irrelevant(found, settings)
            else answers_generation.put(question, found, one, settings)
            for question, found in zip(questions, shown, strict=True)
        ])  # fmt: skip
    prompts = [put.ids for some in puts for put in some if put is not None]
    said = iter(answers_generation.say(one, prompts, settings.max_new_tokens, keep, context))
    return [
        [
            _judged(question, *((next(said), put.passages) if put is not None else ("", [])), refused=put is None)
            for question, put in zip(asking.questions, some, strict=True)
        ]
        for asking, some in zip(asked, puts, strict=True)
    ]


def _judged(question: Question, said: str, passages: list[Any], refused: bool) -> Answer:
    told = [assistant.told(passage) for passage in passages]
    cited = citing.cite(said, told)
    bare = citing.unmarked(said)
    read = [passages[number - 1] for number in cited.numbers]
    scores = (
        answer_metrics.score(bare, question.accepted) if question.accepted else answer_metrics.Scores(0.0, 0.0, 0.0)
    )
    citations = answer_metrics.citations([passage.document for passage in read], question.target or "")
    grounded = answer_metrics.groundedness(bare, [told[number - 1] for number in cited.numbers])
    return Answer(
        grounding.REFUSAL if refused else cited.text, passages, refused or citing.unknowing(said), cited, scores,
        citations, grounded,
    )  # fmt: skip


def summary(name: str, ways: dict[str, list[Answer]]) -> dict[str, float]:
    """Means of a model's scores in each way of asking, its keys after `NAME/`."""
    found: dict[str, float] = {}
    for way, answers in ways.items():
        found |= {
            f"{name}/answer_score{ENDINGS[way]}": fmean(answer.scores.f1 for answer in answers),
            f"{name}/exact_match{ENDINGS[way]}": fmean(answer.scores.exact_match for answer in answers),
            f"{name}/chrf{ENDINGS[way]}": fmean(answer.scores.chrf for answer in answers),
        }
    return found | {f"{name}/{key}": value for key, value in citation_metrics(ways[RETRIEVAL]).items()}


def citation_metrics(answers: Sequence[Answer]) -> dict[str, float]:
    """Over answers to questions that a known document answers.

    `citation_precision`: of the documents cited, the share that is the one that answers (0 where none is cited).
    `citation_recall`: share of the questions whose answer cites it; a refusal does not. `groundedness`: over the
    answers that are no refusal. `_own`: of the marks that the model wrote itself alone, where it wrote any.
    """
    given = [answer for answer in answers if not answer.refused]
    own = [answer for answer in given if answer.cited.own]
    found = {
        "citation_precision": _precision(given),
        "citation_recall": sum(answer.citations.right for answer in given) / len(answers),
        "groundedness": fmean(answer.groundedness for answer in given) if given else 0.0,
        "own_citations": len(own) / len(answers),
        "dropped_citations": sum(answer.cited.dropped for answer in given) / len(answers),
    }
    if own:
        found |= {
            "citation_precision_own": _precision(own),
            "citation_recall_own": sum(answer.citations.right for answer in own) / len(answers),
        }
    return found


def _precision(answers: Sequence[Answer]) -> float:
    cited = sum(answer.citations.cited for answer in answers)
    return sum(answer.citations.right for answer in answers) / cited if cited else 0.0


def rows(
    questions: Sequence[Question], ways: dict[str, list[Answer]], nothing: Sequence[Question], given: Sequence[Answer]
) -> dict[str, list[Any]]:
    """Columns of evaluation.parquet: a row a question, those that nothing answers last.

    `answerable` and `unanswerable` are 1 where a score counts: sums are divided by them.
    """
    zeros, ones = [0.0] * len(nothing), [1.0] * len(questions)
    columns: dict[str, list[Any]] = {
        "id": [question.id for question in [*questions, *nothing]],
        "group": [question.group for question in [*questions, *nothing]],
        "answerable": [*ones, *zeros],
        "unanswerable": [0.0] * len(questions) + [1.0] * len(nothing),
    }
    for way, answers in ways.items():
        columns[f"answer{ENDINGS[way]}"] = [*(answer.scores.f1 for answer in answers), *zeros]
        columns[f"exact_match{ENDINGS[way]}"] = [*(answer.scores.exact_match for answer in answers), *zeros]
    mine = ways[RETRIEVAL]
    columns["cited"] = [*(float(answer.citations.cited) for answer in mine), *zeros]
    columns["cited_right"] = [*(float(answer.citations.right) for answer in mine), *zeros]
    columns["groundedness"] = [*(answer.groundedness for answer in mine), *zeros]
    columns["refused"] = [float(answer.refused) for answer in [*mine, *given]]
    columns["false_answer"] = [*([0.0] * len(questions)), *(float(not answer.refused) for answer in given)]
    return columns


def metrics(columns: dict[str, list[Any]]) -> dict[str, float]:
    """Figures of the assistant's model over `rows`, with 95 % intervals (bootstrap, groups drawn whole).

    `refusal_j` is 1 - `false_answer_rate` - `false_refusal_rate`, Youden's J (1950): 0 where refusals are as good as
    drawn by lot, 1 where they are all right.
    """
    values = {name: np.array(column, dtype=float) for name, column in columns.items() if name not in ("id", "group")}
    asked, nothing = values["answerable"] == 1, values["unanswerable"] == 1
    groups = np.array(columns["group"])
    intervals = {
        f"answer_score{ending}": statistics.bootstrap(values[f"answer{ending}"][asked], group=groups[asked])
        for ending in ENDINGS.values()
    }
    intervals["gain_over_closed_book"] = statistics.paired_bootstrap(
        values["answer"][asked], values["answer_closed_book"][asked], group=groups[asked]
    )
    if nothing.any():
        intervals["false_answer_rate"] = statistics.bootstrap(values["false_answer"][nothing], group=groups[nothing])
    found = {f"exact_match{ending}": float(values[f"exact_match{ending}"][asked].mean()) for ending in ENDINGS.values()}
    found["false_refusal_rate"] = float(values["refused"][asked].mean())
    if nothing.any():
        found["refusal_j"] = 1 - intervals["false_answer_rate"].estimate - found["false_refusal_rate"]
    for key, interval in intervals.items():
        found |= {key: interval.estimate, f"{key}_low": interval.low, f"{key}_high": interval.high}
    return found
