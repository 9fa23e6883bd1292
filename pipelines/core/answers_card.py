"""Pages of stage `answers` for people: the assistant's card, samples, and the table of all answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.core import assistant, cards, citing
from pipelines.core.answers_evaluation import ENDINGS, RETRIEVAL, Answer
from pipelines.core.answers_questions import Question
from pipelines.core.params.answers import AnswersParams

WAYS = {"closed_book": "the question alone", RETRIEVAL: "with what is found", "oracle": "with the right document"}


def card(params: AnswersParams, chosen: str, settings: assistant.Settings, metrics: Mapping[str, float]) -> str:
    """What the assistant is, how it was chosen and measured, and what it cannot do."""
    rows = [
        f"| {WAYS[way]} | {_interval(metrics, f'answer_score{end}')} | {metrics[f'exact_match{end}']:.1%} |"
        for way, end in sorted(ENDINGS.items(), key=lambda item: list(WAYS).index(item[0]))
    ]
    columns = ("answer_score_validation", "answer_score_closed_book", "answer_score", "answer_score_oracle")
    every = []
    for name in params.models:
        scores = (f"{metrics[f'{name}/{column}']:.3f}" for column in columns)
        every.append(f"| {' | '.join([name, *scores])} |")
    refusal = "No threshold: every question is answered."
    if settings.threshold is not None:
        refusal = (
            f"Where no passage reaches a cosine of {settings.threshold:.3f} it says that it does not know: to "
            f"{metrics['false_refusal_rate']:.1%} of the questions that a document answers."
        )
    if "false_answer_rate" in metrics:
        refusal += (
            f" To {_interval(metrics, 'false_answer_rate')} of those that nothing answers it answers all the same."
        )
    return "\n".join([
        "# Assistant", "",
        f"Answers questions from the passages of `index/` with the model `{chosen}` in `model/`, and cites them. The "
        f"model is the best of {', '.join(params.models)} on {metrics['questions_validation']:.0f} questions of the "
        "validation side.", "",
        f"| {metrics['questions_test']:.0f} test questions | token F1 (95 %) | exact match |", "| --- | --- | --- |",
        *rows, "",
        f"More with passages than without: {_interval(metrics, 'gain_over_closed_book')}. {refusal}", "",
        f"Citations: {metrics['own_citations']:.1%} of the answers have marks that the model wrote itself. In the "
        f"others a sentence is attributed to the passage that has at least {citing.SUPPORT:.0%} of its words in their "
        "order: that shows where it may come from, not that the model took it from there. Of the documents cited "
        f"{metrics['citation_precision']:.1%} are the one that answers; {metrics['citation_recall']:.1%} of the "
        f"answers cite it. {metrics['groundedness']:.1%} of the answers' word trigrams stand in the passages they "
        "cite.", "",
        "| model | F1, validation | alone | with what is found | with the right document |",
        "| --- | --- | --- | --- | --- |", *every, "",
        "Passages are quoted, line by line, and their special tokens and marks are made harmless. A document can still "
        "mislead the model by what it says. Read the sources.", "",
        "```python", "from pathlib import Path", "from pipelines.core.assistant import Assistant", "",
        'print(Assistant.open(Path("assistant")).answer("What does numpy.flip do?"))', "```", "",
    ])  # fmt: skip


def _interval(metrics: Mapping[str, float], key: str) -> str:
    return f"{metrics[key]:.3f} ({metrics[f'{key}_low']:.3f} to {metrics[f'{key}_high']:.3f})"


def table(questions: Sequence[Question], ways: Mapping[str, Mapping[str, Sequence[Answer]]]) -> dict[str, list[Any]]:
    """Columns of answers.parquet: a row a model, way of asking and question."""
    rows = [
        {
            "id": question.id, "group": question.group, "kind": question.kind, "model": name, "way": way,
            "answer": answer.text, "refused": answer.refused, "f1": answer.scores.f1,
            "exact_match": answer.scores.exact_match, "chrf": answer.scores.chrf, "cited": answer.citations.cited,
            "cited_right": answer.citations.right, "own_marks": answer.cited.own, "groundedness": answer.groundedness,
        }
        for name, of_model in ways.items()
        for way, answers in of_model.items()
        for question, answer in zip(questions, answers, strict=True)
    ]  # fmt: skip
    return {column: [row[column] for row in rows] for column in rows[0]}


def samples(
    questions: Sequence[Question],
    ways: Mapping[str, Sequence[Answer]],
    nothing: Sequence[Question],
    given: Sequence[Answer],
    count: int,
) -> str:
    """The first questions with sources and answers, and the first that nothing answers."""
    lines = ["# Questions, sources and answers"]
    for number, question in enumerate(questions[:count]):
        answer = ways[RETRIEVAL][number]
        lines += [f"\n**Question:** {cards.inline(question.text)}\n", *_sources(answer)]
        lines += [f"- *{told}*: {cards.inline(ways[way][number].text)}" for way, told in WAYS.items()]
        lines.append(f"- *accepted*: {cards.inline(question.accepted[0])}")
    for question, answer in list(zip(nothing, given, strict=True))[:count]:
        lines += [f"\n**Question that nothing answers:** {cards.inline(question.text)}\n", *_sources(answer)]
        lines.append(f"- *answer*: {cards.inline(answer.text)}")
    return "\n".join(lines) + "\n"


def _sources(answer: Answer) -> list[str]:
    return [
        f"{number}. {cards.inline(passage.title)}, {passage.url or 'no url'}, line {assistant.line_of(passage)}"
        f"{' (cited)' if number in answer.cited.numbers else ''}"
        for number, passage in enumerate(answer.passages, 1)
    ]
