"""One task of stage `prompts`: its row of the matrix, what a search finds, the choice, and the test side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pipelines.core import prompt_cells, prompt_choice, prompt_search
from pipelines.core.context import StageContext
from pipelines.core.prompt_calls import Speaker
from pipelines.core.prompt_cells import Cell, Find, Use
from pipelines.core.prompt_choice import Entry, Judged
from pipelines.core.prompt_files import PromptFile
from pipelines.core.prompt_tasks import Question, Task

if TYPE_CHECKING:
    from pipelines.core.params.prompts import PromptsParams


class Compared(NamedTuple):
    """What is known of a task."""

    entries: list[Entry]  # of the validation side
    judged: Judged
    found: PromptFile | None  # by a search
    metrics: dict[str, float]
    asked: int  # questions, test side and search included


def compare(
    params: PromptsParams,
    task: Task,
    uses: Sequence[Use],
    files: Mapping[str, PromptFile],
    speakers: Mapping[str, Speaker],
    find: Find | None,
    context: StageContext,
) -> Compared:
    """Ask the validation side in every way, choose, and judge the choice on the test side.

    Args:
        uses: rows of the matrix, zero-shot among them; a search adds one.
        files: every prompt, for the search.
        speakers: by model; the search asks the first.

    Raises:
        DataError, Stopped: see `prompt_cells.ask`.
    """
    every, found, asked = list(uses), None, 0
    metrics: dict[str, float] = {}
    if params.search.budget:
        first = next(iter(speakers.values()))

        def ask(use: Use, questions: Sequence[Question]) -> Cell:
            return prompt_cells.ask(params, use, task, questions, first)

        fits = [one for one in files.values() if one.kind == task.kind and one.task in (None, task.name)]
        ended = prompt_search.search(params, task, fits, ask)
        found, asked = prompt_search.as_file(task, ended.use), ended.asked
        context.say(f"{task.name}: search kept one of {ended.candidates} prompts after {asked} questions")
        metrics = {"search_questions": float(asked), "search_candidates": float(ended.candidates)}
        every.append(ended.use)
    entries = [
        Entry(name, use, _validated(params, task, use, speaker, find, context))
        for use in every
        for name, speaker in speakers.items()
    ]
    chosen, tied = prompt_choice.choose(entries, task.validation)
    plain = prompt_choice.baseline(entries, chosen.model)
    test, zero_shot = (
        prompt_cells.ask(params, one.use, task, task.test, speakers[one.model], prior=one.cell.prior, find=find)
        for one in (chosen, plain)
    )
    judged = Judged(chosen, tied, test, zero_shot, task.majority())
    metrics |= prompt_choice.metrics(task, entries, judged)
    asked += len(entries) * len(task.validation) + 2 * len(task.test)
    return Compared(entries, judged, found, metrics, asked)


def _validated(
    params: PromptsParams, task: Task, use: Use, speaker: Speaker, find: Find | None, context: StageContext
) -> Cell:
    """A cell of the matrix; says where examples or passages did not fit."""
    cell = prompt_cells.ask(params, use, task, task.validation, speaker, find=find)
    whole = len(use.pool) if use.how == "given" else min(use.shots, len(use.pool))
    missing = sum(number < whole for number in cell.shown), sum(map(bool, cell.left_out))
    for short, what in zip(missing, (f"{whole} examples", f"{params.passages} passages"), strict=True):
        if short:
            context.say(
                f"warning: {task.name}, {use.strategy}, {speaker.name}: {short} of {len(cell.shown)} questions had no "
                f"room for {what} (prompts.max_prompt_tokens: {params.max_prompt_tokens}) and were shown fewer"
            )
    return cell
