"""Search for a prompt on the validation side: instructions x numbers of examples x example sets, with a budget.

Successive halving (Jamieson & Talwalkar, AISTATS 2016): candidates in the order of a hash are asked the same few
questions, the better half goes on to twice as many, until one is left, which is then asked all of them. `budget` bounds
the questions asked, the last round included; what is asked twice is counted twice, although it is computed once. The
validation side has then been looked at many times: only the test side says what the found prompt is worth.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pipelines.core import prompt_cells, prompt_rendering
from pipelines.core.prompt_cells import Cell, Use
from pipelines.core.prompt_files import PromptFile
from pipelines.core.prompt_strategies import SEARCH, STRATEGIES
from pipelines.core.prompt_tasks import Question, Task

if TYPE_CHECKING:
    from pipelines.core.params.prompts import PromptsParams

FEWEST = 4  # questions of the first round: fewer cannot tell two prompts apart at all
SETS = 3  # example sets of each number of examples

Ask = Callable[[Use, Sequence[Question]], Cell]


class Found(NamedTuple):
    """What a search ended with."""

    use: Use
    asked: int  # questions, the last round aside
    candidates: int
    rounds: int


def search(params: PromptsParams, task: Task, files: Sequence[PromptFile], ask: Ask) -> Found:
    """The prompt that is left, of those that the files of the task allow.

    Args:
        files: prompts for the task.
        ask: a use, of the first so many validation questions.
    """
    every = sorted(candidates(params, task, files), key=lambda use: _place(params, use))
    plan = rounds(params.search.budget - len(task.validation), len(every), len(task.validation))
    going, asked = every[: plan[0][0]], 0
    for number, (count, questions) in enumerate(plan):
        going = going[:count]
        if len(going) > 1:
            scores = [ask(use, task.validation[:questions]).score for use in going]
            asked += questions * len(going)
            # Of equally good ones those that came first: the order is of a hash, and says nothing of the prompt.
            order = sorted(range(len(going)), key=lambda place: (-scores[place], place))
            left = plan[number + 1][0] if number + 1 < len(plan) else 1
            going = [going[place] for place in order[:left]]
    return Found(going[0], asked, plan[0][0], len(plan))


def rounds(budget: int, candidates: int, questions: int) -> list[tuple[int, int]]:
    """Candidates and questions of each round: as many candidates, a power of two, as the budget has questions for.

    Each round asks as many questions as the one before, of half as many candidates; never more than there are.
    """
    size = 1
    while 2 * size <= candidates and 2 * size * FEWEST * (int(math.log2(size)) + 1) <= budget:
        size *= 2
    count = max(1, int(math.log2(size)))
    share = budget // count
    return [(size >> number, min(questions, share // (size >> number))) for number in range(count)]


def candidates(params: PromptsParams, task: Task, files: Sequence[PromptFile]) -> list[Use]:
    """Every use that is searched: prompts that choose an option or write an answer at once, and show no passage."""
    found = []
    for prompt in files:
        if any(STRATEGIES[name].reasons or STRATEGIES[name].passages for name in prompt.strategies):
            continue
        sets: list[tuple[prompt_rendering.Example, ...]] = [()]
        pool = [one.example() for one in task.pool]
        for count in sorted({1, params.examples // 2, params.examples} - {0}) if pool else []:
            for number in range(SETS):
                choose = prompt_rendering.chooser(pool, "fixed", count, params.seed + number)
                sets.append(tuple(choose(dict.fromkeys(pool[0].columns, ""))))
        instructions: list[str | None] = [*prompt.instructions] or [None]
        for instruction, shown in itertools.product(instructions, _once(sets)):
            found.append(prompt_cells.use(prompt, SEARCH, instruction, "given", shown, 0, params.seed))
    return found


def as_file(task: Task, use: Use) -> PromptFile:
    """The found prompt as a file for mlflow/prompts, of strategy `tuned` and this task alone."""
    return PromptFile(
        name=re.sub("[^a-z0-9]+", "-", f"{task.name}-tuned".lower()).strip("-"),
        kind=task.kind,  # type: ignore[arg-type]  # one of the kinds that a file may have
        task=task.name,
        strategies=["tuned"],
        system=use.system,
        instructions=[use.instruction] if use.instruction else [],
        template=use.template,
        variables=list(dict.fromkeys(prompt_rendering.VARIABLE.findall(use.template))),
        examples=[one.id for one in use.pool],
        notes=f"Found by search, from {use.name}. Ids are training rows of the data it was found on.",
    )


def _once(sets: Sequence[tuple[prompt_rendering.Example, ...]]) -> list[tuple[prompt_rendering.Example, ...]]:
    """Each set once: a small pool gives the same again."""
    return list({tuple(one.id for one in shown): shown for shown in sets}.values())


def _place(params: PromptsParams, use: Use) -> str:
    shown = [one.id for one in use.pool]
    return prompt_rendering.hashed(params.seed, use.name, use.instruction, *shown)
