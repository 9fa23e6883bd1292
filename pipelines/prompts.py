"""Stage `prompts`: ways to ask, compared on held-out tasks, and the one worth using for each task.

In: `data` (tables `tasks/NAME`, and `prompts` where there are references), `mlflow/prompts` (the prompts), the models
of `sft` and `ppo`, `rag` (the index, for strategy retrieval). Out: `models/TASK/` (the chosen prompt: `prompt.yaml`,
`examples.jsonl`, a card), `matrix.csv` (strategy x model x task, with intervals and tokens, on the validation side),
`evaluation.parquet` (one row a test question of any task: the choice and zero-shot), `found/` (what a search found,
as files for `mlflow/prompts`), `samples.md`.

Papers: Brown et al. (2020) for zero-shot and few-shot, Kojima et al. (2022) and Wang et al. (2023) for chains of
thought and self-consistency; the rest is named where it is used (`core/prompt_*.py`). Departures:

1. Options are compared by the mean log-probability of their tokens, EOS included, not by their sum (Brown et al. use
   both), and calibrated over the validation questions (Zhou et al., 2024).
2. A chain of thought asks for its answer in the same call, and a regular expression takes it out (Kojima et al. make
   a second call).
3. The choice is made on the validation side and looks at tokens too; the test side is asked once, about the choice and
   the zero-shot prompt of the same model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core import artifacts, reading
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError, DataError, ParamsError
from pipelines.core.params.prompts import PromptsParams
from pipelines.core.prompt_strategies import BASELINE, STRATEGIES

if TYPE_CHECKING:
    from pipelines.core.prompt_calls import Speaker
    from pipelines.core.prompt_cells import Find, Use
    from pipelines.core.prompt_files import PromptFile
    from pipelines.core.prompt_tasks import Task

RESUMES = True  # calls that a stopped run made are not made again
PROMPTS = "mlflow/prompts"

METRICS = frozenset({"tasks"})
OPTIONAL = frozenset(
    {
        # where there is a task
        "score", "score_zero_shot", "questions", "*/score", "*/score_low", "*/score_high", "*/tokens",
        "*/chosen", "*/chosen_low", "*/chosen_high", "*/chosen_gain", "*/chosen_gain_low", "*/chosen_gain_high",
        "*/chosen_tokens", "*/chosen_zero_shot", "*/chosen_zero_shot_tokens", "*/tied",
        # by strategy, by kind of task, by search
        "*/examples", "*/unparsed", "*/majority", "*/search_questions", "*/search_candidates",
    }
)  # fmt: skip
SCORES = frozenset({"score", "score_zero_shot", "score_majority", "examples_*"})


def run(params: PromptsParams, inputs: dict[str, Path], outputs: Path, context: StageContext) -> dict[str, float]:
    """Ask every question of the validation side in every way, choose, and judge the choice on the test side.

    Raises:
        ArtifactError: a model or the index cannot be read.
        DataError: a task that cannot be asked, or examples that are not there.
        ParamsError: a task or strategy that nothing fits, or a system text that a model does not take.
        UserError: a prompt's file holds a mistake.
        Stopped: a signal came; the calls made so far are kept.
    """
    import pandas as pd

    from pipelines.core import prompt_calls, prompt_choice, prompt_files, prompt_matrix, prompt_tasks, prompts_card

    # 1. Prompts, tasks and examples, all checked before a model is asked.
    speakers: dict[str, Speaker] = {name: _speaker(params, name, inputs, context) for name in params.models}
    files, tasks = _read(params, inputs, speakers[params.models[0]], context)
    if not tasks:
        context.say("the data have neither a labelled task nor prompts with references: no prompt to try")
        return {"tasks": 0.0}
    every = (*prompt_tasks.names(inputs["data"]), prompt_tasks.GENERATION)
    for told in prompt_files.unused(files, {task.name: task.kind for task in tasks}, every):
        context.say(f"warning: {told}")
    uses = {task.name: _uses(params, task, files, context) for task in tasks}
    _check_system_texts(uses, speakers)
    find = _finder(params, uses, inputs)
    if made := len(list(prompt_calls.calls(context).glob("*.json"))):
        context.say(f"resuming after {made} calls")

    # 2. The matrix on the validation side, the choice by the rule, and the test side, task by task.
    compared = [prompt_matrix.compare(params, task, uses[task.name], files, speakers, find, context) for task in tasks]

    # 3. Publish the choices, and what was measured.
    metrics: dict[str, float] = {}
    rows: list[dict[str, object]] = []
    scores: list[dict[str, list[float]]] = []
    for task, one in zip(tasks, compared, strict=True):
        own, chosen = one.metrics, one.judged.chosen
        metrics |= {f"{task.name}/{key}": value for key, value in own.items()}
        rows += prompt_choice.rows(task, one.entries, chosen)
        scores.append(prompt_choice.scores(task, one.judged))
        page = prompts_card.card(params, task, one.entries, one.judged, own)
        prompts_card.publish(outputs / "models" / task.name, task, one.judged, page)
        if one.found is not None:
            artifacts.write_text(outputs / "found" / f"{one.found.name}.yaml", prompt_files.write(one.found))
        told = f"{own['chosen']:.3f} on test, zero-shot {own['chosen_zero_shot']:.3f}"
        context.say(f"{task.name}: {chosen.use.strategy} ({chosen.use.name}) with {chosen.model}: {told}")
    pd.DataFrame(rows).to_csv(outputs / "matrix.csv", index=False, lineterminator="\n")
    reading.write_evaluation(outputs / "evaluation.parquet", prompt_choice.evaluation(tasks, scores))
    page = prompts_card.samples(tasks, [one.judged for one in compared], params.samples)
    context.say(page)
    artifacts.write_text(outputs / "samples.md", page)
    return {
        **metrics,
        "tasks": float(len(tasks)),
        "questions": float(sum(one.asked for one in compared)),
        "score": sum(one.metrics["chosen"] for one in compared) / len(tasks),
        "score_zero_shot": sum(one.metrics["chosen_zero_shot"] for one in compared) / len(tasks),
    }


def measure(
    params: PromptsParams, inputs: dict[str, Path], context: StageContext, model: Path, evaluation: Path
) -> None:
    """Ask the test questions with another prompt, such as today's champion; writes its column `score`.

    What calibrates it is a number a label: where the labels are others now, today's validation side gives it anew.

    Raises:
        ArtifactError: the directory holds no chosen prompt, or one of a task or model that is none of today's.
    """
    from functools import partial

    from pipelines.core import prompt_cells, prompt_choice, prompts_card

    name, model_of, use, prior, labels = prompts_card.read(model)
    first = _speaker(params, params.models[0], inputs, context)
    _, tasks = _read(params, inputs, first, context)
    asked = next((task for task in tasks if (task.name, task.kind) == (name, use.kind)), None)
    if asked is None or model_of not in inputs:
        told = f"a prompt for task {name} ({use.kind}) and model {model_of}, one of which is none of today's"
        raise ArtifactError(f"{model}: {told}")
    find = _finder(params, {name: [use]}, inputs)
    speaker = _speaker(params, model_of, inputs, context)
    ask = partial(prompt_cells.ask, params, use, asked, speaker=speaker, find=find)
    if prior and labels != asked.labels:
        prior = ask(questions=asked.validation).prior
    said = ask(questions=asked.test, prior=prior)
    scores = [{"score": said.scores if task is asked else [0.0] * len(task.test)} for task in tasks]
    reading.write_evaluation(evaluation, prompt_choice.evaluation(tasks, scores))


def _read(
    params: PromptsParams, inputs: dict[str, Path], first: Speaker, context: StageContext
) -> tuple[dict[str, PromptFile], list[Task]]:
    """Prompts and tasks; `first` tells which rows are too long, the same ones for every model."""
    from pipelines.core import prompt_files, prompt_tasks

    return prompt_files.load(inputs[PROMPTS]), prompt_tasks.load(params, inputs["data"], first.fits, context)


def _uses(params: PromptsParams, task: Task, files: dict[str, PromptFile], context: StageContext) -> list[Use]:
    """A task's rows of the matrix. A strategy without a prompt for the task is told and left out.

    Raises:
        ParamsError: there is no zero-shot prompt, with which the others are compared.
    """
    from pipelines.core import prompt_cells, prompt_files

    found = []
    for strategy in params.strategies:
        prompt = prompt_files.of(files, task.kind, task.name, strategy)
        if prompt is None and strategy == BASELINE:
            raise ParamsError(f"{PROMPTS}: no prompt of kind {task.kind} or task {task.name} has strategy {BASELINE}")
        if prompt is None:
            context.say(f"left out: {task.name}, {strategy}: no prompt of kind {task.kind} has it")
            continue
        found.append(prompt_cells.use_of(params, task, strategy, prompt))
    return found


def _check_system_texts(uses: dict[str, list[Use]], speakers: dict[str, Speaker]) -> None:
    """See that every model's chat template takes the system texts there are.

    Raises:
        ParamsError: one does not; the strategy, the file and the model are named.
    """
    with_system = {use.name: use for every in uses.values() for use in every if use.system}
    for use in with_system.values():
        for name, speaker in speakers.items():
            try:
                speaker.prompt([{"role": "system", "content": use.system or ""}, {"role": "user", "content": "?"}])
            except DataError as error:
                raise ParamsError(
                    f"prompts.strategies: {use.strategy}: {PROMPTS}/{use.name}.yaml has a system text; model {name}: "
                    f"{error}. Leave the strategy out, or give the model's tokenizer a template that takes one"
                ) from None


def _finder(params: PromptsParams, uses: dict[str, list[Use]], inputs: dict[str, Path]) -> Find | None:
    """What finds passages, where a strategy shows some."""
    from pipelines.core import prompt_retrieval

    wanted = any(STRATEGIES[use.strategy].passages for every in uses.values() for use in every)
    return prompt_retrieval.finder(inputs["rag"], params.passages) if wanted else None


def _speaker(params: PromptsParams, name: str, inputs: dict[str, Path], context: StageContext) -> Speaker:
    from pipelines.core import prompt_calls

    return prompt_calls.Speaker(name, inputs[name] / "model", context, params.max_prompt_tokens)
