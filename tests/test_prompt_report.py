"""The report's table and heat map of prompts."""

from __future__ import annotations

from pathlib import Path

from prompt_toys import PARAMS, cell
from test_prompt_search import FITS, TASK

from pipelines.core import prompt_choice, prompt_search, report_prompts, report_tasks
from pipelines.core.prompt_choice import Entry, Judged
from pipelines.core.report_inputs import Stage


def stage(place: Path) -> Stage:
    """What the stage writes of three cells, of which the second is chosen."""
    import pandas as pd

    use = prompt_search.candidates(PARAMS, TASK, FITS)[0]
    cells = {"zero_shot": cell([1.0] * 10 + [0.0] * 30), "role": cell([1.0] * 40, 20), "few_shot": cell([1.0] * 40, 90)}
    entries = [Entry("sft", use._replace(strategy=name), one) for name, one in cells.items()]
    chosen, tied = prompt_choice.choose(entries, TASK.validation)
    pd.DataFrame(prompt_choice.rows(TASK, entries, chosen)).to_csv(place / "matrix.csv", index=False)
    judged = Judged(chosen, tied, cell([1.0] * 6 + [0.0] * 2), cell([0.0] * 8), TASK.majority())
    found = {f"fits/{key}": value for key, value in prompt_choice.metrics(TASK, entries, judged).items()}
    return Stage("prompts", place, found)


def test_the_matrix_is_a_table_and_a_heat_map(tmp_path: Path) -> None:
    told = stage(tmp_path)
    page = report_prompts.text(told)
    assert "| fits | `role` | sft | 1 | 1 to 1 | 19 | 1 | chosen |" in page and page.count("chosen |") == 1 + 1
    assert "| fits | 0.7500 | 0 |" in page, "test side: the choice, and zero-shot"
    (plot,) = report_prompts.of_stage(told)
    assert plot.name == "prompts-matrix" and "fits role 1" in plot.caption
    assert plot.svg.count(">0.25<") == 1 and plot.svg.count(">1.00<") == 2
    assert report_tasks.of_stage(told) == [], "scores of strategies are no tasks of their own"


def test_other_stages_have_neither(tmp_path: Path) -> None:
    (tmp_path / "matrix.csv").write_text("a,b\n1,2\n")
    for other in (Stage("sft", tmp_path, {}), Stage("sft", None, {})):
        assert report_prompts.text(other) == "" and report_prompts.of_stage(other) == []
