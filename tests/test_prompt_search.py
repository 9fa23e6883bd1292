"""The search keeps to its budget and finds what is best; the rule takes the cheapest of those as good as the best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from prompt_toys import PARAMS, cell

from pipelines.core import prompt_choice, prompt_files, prompt_search
from pipelines.core.prompt_cells import Cell, Use
from pipelines.core.prompt_choice import Entry
from pipelines.core.prompt_tasks import Question, Task

FILES = prompt_files.load(Path(__file__).parents[1] / "mlflow/prompts")
FITS = [one for one in FILES.values() if one.kind == "entailment"]


def questions(side: str, count: int) -> list[Question]:
    return [
        Question(
            f"{side}{n}", f"{side}{n}", {"premise": f"p{n}", "hypothesis": f"{side} h"}, ("no", "yes"), n % 2, "no"
        )
        for n in range(count)
    ]


TASK = Task(
    "fits", "entailment", ("no", "yes"), questions("train", 12), questions("validation", 40), questions("test", 8)
)


@pytest.mark.parametrize("budget", [8, 32, 100, 400, 3000])
@pytest.mark.parametrize("candidates", [1, 5, 24])
def test_rounds_keep_to_the_budget(budget: int, candidates: int) -> None:
    plan = prompt_search.rounds(budget, candidates, 40)
    assert sum(count * asked for count, asked in plan if count > 1) <= budget
    assert plan[0][0] <= candidates and all(asked <= 40 for _, asked in plan)
    assert all(first == 2 * second for (first, _), (second, _) in zip(plan, plan[1:], strict=False))
    if plan[0][0] > 1:
        assert plan[0][1] >= prompt_search.FEWEST and plan[-1][0] == 2


def test_the_best_of_the_candidates_is_kept_and_written_as_a_file() -> None:
    every = prompt_search.candidates(PARAMS, TASK, FITS)
    names = {one.name for one in every}
    assert names == {"entailment-plain", "entailment-role"}, "neither reasons nor passages are searched"
    assert {one.instruction for one in every if one.name == "entailment-plain"} == set(
        FILES["entailment-plain"].instructions
    )
    assert {len(one.pool) for one in every} == {0, 1, 2} and len({str(one) for one in every}) == len(every)
    held_out = {one.id for one in (*TASK.validation, *TASK.test)}
    assert not {example.id for one in every for example in one.pool} & held_out
    asked = 0

    def ask(use: Use, some: Sequence[Question]) -> Cell:
        nonlocal asked
        asked += len(some)
        assert [one.id for one in some] == [one.id for one in TASK.validation[: len(some)]]
        good = use.instruction == FILES["entailment-plain"].instructions[2] and len(use.pool) == 2
        return cell([float(good)] * len(some))

    params = PARAMS.model_copy(update={"search": PARAMS.search.model_copy(update={"budget": 40 + 32 * 4 * 5})})
    found = prompt_search.search(params, TASK, FITS, ask)
    assert asked == found.asked <= 32 * 4 * 5 and found.candidates == 16
    file = prompt_search.as_file(TASK, found.use)
    assert file.name == "fits-tuned" and file.strategies == ["tuned"] and file.task == "fits"
    assert file.examples == [one.id for one in found.use.pool] and file.instructions == [found.use.instruction]
    assert prompt_files.parse("fits-tuned.yaml", prompt_files.write(file)) == file
    assert found.use.instruction == FILES["entailment-plain"].instructions[2] and len(found.use.pool) == 2


def test_the_rule_takes_the_cheapest_within_a_standard_error() -> None:
    use = prompt_search.candidates(PARAMS, TASK, FITS)[0]
    right, some, few = [1.0] * 38 + [0.0] * 2, [0.0] * 3 + [1.0] * 37, [1.0] * 31 + [0.0] * 9

    def chosen(*cells: Cell) -> tuple[int, int]:
        entries = [Entry("sft", use, one) for one in cells]
        best, tied = prompt_choice.choose(entries, TASK.validation)
        return next(number for number, one in enumerate(entries) if one is best), tied

    assert chosen(cell(right, 300), cell(some, 100), cell(few, 50)) == (1, 2)
    assert chosen(cell(few, 50), cell(right, 300)) == (1, 1)
    assert chosen(cell(right, 100), cell(right, 100)) == (0, 2)
    assert chosen(cell(some, 300), cell(right, 300)) == (0, 2)
