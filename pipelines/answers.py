"""Stage `answers`: the models asked with what stage `rag` finds, and the assistant that answers best.

In: `data` (its queries with accepted answers), `rag` (the index and its threshold of relevance), and the models of
`pretrain`, `sft`, `ppo`, `distill`, `quantize`. Out: `assistant/` (index, model, `assistant.json`, card: what `sluice
ask` opens and `sluice-rag` serves), `evaluation.parquet` (one row a question, of the assistant's model),
`answers.parquet` (one row a question, model and way of asking), `samples.md`.

Retrieval-augmented generation (Lewis et al., 2020) with the passages in the prompt (Ram et al., "In-Context
Retrieval-Augmented Language Models", 2023) and with citations (Gao et al., "Enabling Large Language Models to Generate
Text with Citations", 2023). What is particular here:

1. Every model answers every test question alone (`closed_book`), with what was found, and with passages of the
   document that answers it (`oracle`), greedily. The score is token F1 (SQuAD's).
2. The assistant's model is the one with the highest score on questions of the validation side, the first of equals.
3. Citations are judged by the document that is known to answer, not by a model that judges entailment: precision is the
   share of cited documents that are it. Marks that the model writes and attributions (`core/citing.py`) are told apart.
4. A question is refused where no passage reaches the threshold that stage `rag` has calibrated. `false_answer_rate` is
   over test questions that nothing answers: the user's, or else questions whose document is kept out of the search,
   which is hard, since documents about its neighbours stay.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pipelines.core import artifacts
from pipelines.core.context import StageContext
from pipelines.core.params.answers import AnswersParams

if TYPE_CHECKING:
    from pipelines.core.answers_evaluation import Answer
    from pipelines.core.answers_questions import Question
    from pipelines.core.assistant import Settings

RESUMES = True
METRICS = frozenset({"questions_test", "questions_validation", "unanswerable_test"})
OPTIONAL = frozenset(
    {
        *(f"answer_score{way}{end}" for way in ("", "_closed_book", "_oracle") for end in ("", "_low", "_high")),
        *(f"exact_match{way}" for way in ("", "_closed_book", "_oracle")),
        *(f"{key}{end}" for key in ("gain_over_closed_book", "false_answer_rate") for end in ("", "_low", "_high")),
        "citation_precision", "citation_recall", "citation_precision_own", "citation_recall_own", "own_citations",
        "dropped_citations", "groundedness", "false_refusal_rate", "refusal_j", "*/answer_score*", "*/exact_match*",
        "*/chrf*", "*/citation_*", "*/groundedness", "*/own_citations", "*/dropped_citations",
    }
)  # fmt: skip
SCORES = frozenset(
    {
        "answerable", "unanswerable", "answer", "answer_closed_book", "answer_oracle", "exact_match",
        "exact_match_closed_book", "exact_match_oracle", "cited", "cited_right", "groundedness", "refused",
        "false_answer",
    }
)  # fmt: skip


def run(params: AnswersParams, inputs: dict[str, Path], outputs: Path, context: StageContext) -> dict[str, float]:
    """Ask every model, choose the assistant's, measure it and publish the assistant.

    Raises:
        ParamsError: a model that there is none of.
        DataError: no questions with answers; one that does not fit into a model's context.
        ArtifactError: the data have no queries; the index is damaged.
        Stopped: a signal came; the answers so far are kept.
    """
    from pipelines.core import answers_card, answers_evaluation, answers_generation, answers_questions

    if not (inputs["rag"] / "index").is_dir():
        told = "Stage rag has no index, since the data have no knowledge: there is nothing to answer from."
        context.say(told)
        artifacts.write_text(outputs / "README.md", f"# No assistant\n\n{told}\n")
        return dict.fromkeys(METRICS, 0.0)

    # 1. What is asked, and what is found for it; all that can be refused is refused here.
    speakers = answers_generation.speakers(params, inputs)
    index, settings = answers_questions.opened(params, inputs["rag"])
    problem = partial(answers_generation.problem, speakers=speakers, settings=settings)
    tried = answers_questions.answerable(
        params, inputs["data"], "validation", params.validation_questions, index, settings, problem
    )
    asked = answers_questions.answerable(params, inputs["data"], "test", params.questions, index, settings, problem)
    nothing = answers_questions.unanswerable(params, inputs["data"], index, settings, problem)

    # 2. Every model on both sides: a model is chosen by the validation side, and all are judged on the test side.
    metrics: dict[str, float] = {}
    ways: dict[str, dict[str, list[Answer]]] = {}
    tests = [answers_evaluation.Asking(asked, way) for way in answers_evaluation.ENDINGS]
    for one in speakers:
        first = answers_evaluation.Asking(tried, answers_evaluation.RETRIEVAL)
        said, *rest = answers_evaluation.ask(one, [first, *tests], settings, one.name, context)
        metrics[f"{one.name}/answer_score_validation"] = fmean(answer.scores.f1 for answer in said)
        ways[one.name] = dict(zip(answers_evaluation.ENDINGS, rest, strict=True))
        metrics |= answers_evaluation.summary(one.name, ways[one.name])
    chosen = max(speakers, key=lambda one: metrics[f"{one.name}/answer_score_validation"])
    context.say(f"the assistant's model: {chosen.name}, the best of {', '.join(ways)} on {len(tried)} questions")

    # 3. The assistant's own figures, and what it says to what nothing answers.
    last = answers_evaluation.Asking(nothing, answers_evaluation.RETRIEVAL)
    (given,) = answers_evaluation.ask(chosen, [last], settings, f"{chosen.name}-nothing", context)
    columns = answers_evaluation.rows(asked, ways[chosen.name], nothing, given)
    metrics |= answers_evaluation.metrics(columns)
    metrics |= answers_evaluation.citation_metrics(ways[chosen.name][answers_evaluation.RETRIEVAL])
    metrics |= {
        "questions_test": float(len(asked)),
        "questions_validation": float(len(tried)),
        "unanswerable_test": float(len(nothing)),
    }
    _publish(inputs["rag"], chosen.place, settings, answers_card.card(params, chosen.name, settings, metrics), outputs)
    _write(params, asked, ways, chosen.name, nothing, given, columns, outputs, context)
    return metrics


def measure(
    params: AnswersParams, inputs: dict[str, Path], context: StageContext, model: Path, evaluation: Path
) -> None:
    """Ask another assistant, such as today's champion, with its own index, the questions that `run` asks."""
    from pipelines.core import answers_evaluation, answers_generation, answers_questions, assistant, reading

    today, ours = answers_questions.opened(params, inputs["rag"])
    speakers = answers_generation.speakers(params, inputs)
    problem = partial(answers_generation.problem, speakers=speakers, settings=ours)
    settings = assistant.read(model)
    index = answers_questions.open_index(model / "index", settings.embedder)
    one = answers_generation.speaker("champion", model / "model")
    asked = answers_questions.answerable(params, inputs["data"], "test", params.questions, today, ours, problem)
    nothing = answers_questions.unanswerable(params, inputs["data"], today, ours, problem)
    sides = [
        answers_evaluation.Asking(
            [answers_questions.looked_up(question, settings, index) for question in side],
            answers_evaluation.RETRIEVAL,
        )
        for side in (asked, nothing)
    ]
    answers, given = answers_evaluation.ask(one, sides, settings, None, context)
    ways = {answers_evaluation.RETRIEVAL: answers}
    reading.write_evaluation(evaluation, answers_evaluation.rows(asked, ways, nothing, given))


def _publish(rag: Path, model: Path, settings: Settings, card: str, outputs: Path) -> None:
    """The assistant's folder: it needs nothing beside it."""
    from pipelines.core import assistant

    shutil.copytree(rag / "index", outputs / "assistant" / "index")
    shutil.copytree(model, outputs / "assistant" / "model")
    artifacts.write_json(outputs / "assistant" / assistant.FILE, assistant.written(settings))
    artifacts.write_text(outputs / "assistant" / "README.md", card)


def _write(
    params: AnswersParams,
    asked: list[Question],
    ways: dict[str, dict[str, list[Answer]]],
    chosen: str,
    nothing: list[Question],
    given: list[Answer],
    columns: dict[str, list[Any]],
    outputs: Path,
    context: StageContext,
) -> None:
    """Rows of the assistant, rows of all models, and samples."""
    from pipelines.core import answers_card, reading

    reading.write_evaluation(outputs / "evaluation.parquet", columns)
    reading.write_evaluation(outputs / "answers.parquet", answers_card.table(asked, ways))
    page = answers_card.samples(asked, ways[chosen], nothing, given, params.samples)
    context.say(page)
    artifacts.write_text(outputs / "samples.md", page)
