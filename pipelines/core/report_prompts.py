"""The report's table and heat map of prompts: strategy x task and model, as stage `prompts` measured them.

In: a stage that wrote `matrix.csv` (task, strategy, model, score, low, high, tokens, chosen), of the validation side.
What the choice is worth on the test side stands in the stage's metrics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.core import report_text
from pipelines.core.report_inputs import Stage, table
from pipelines.core.report_plots import BLUE, Plot, svg
from pipelines.core.report_text import code, interval, number, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, str]
COLUMNS = frozenset({"task", "strategy", "model", "score", "low", "high", "prompt_tokens", "answer_tokens", "chosen"})


def rows(stage: Stage) -> list[Row]:
    """Cells of the matrix; none for a stage without one.

    Raises:
        ArtifactError: the file is malformed.
    """
    found = table(stage, "matrix.csv")
    return found if found and set(found[0]) >= COLUMNS else []


def of_stage(stage: Stage) -> list[Plot]:
    """The heat map, where there is a matrix.

    Raises:
        ArtifactError: see `rows`.
    """
    cells = rows(stage)
    if not cells:
        return []
    several = len({cell["model"] for cell in cells}) > 1

    def column(cell: Row) -> str:
        return f"{cell['task']}, {cell['model']}" if several else cell["task"]

    across = list(dict.fromkeys(column(cell) for cell in cells))
    down = list(dict.fromkeys(cell["strategy"] for cell in cells))

    def draw(axes: Axes) -> None:
        axes.set_position((0.3, 0.33, 0.66, 0.55))
        for cell in cells:
            x, y, score = across.index(column(cell)), down.index(cell["strategy"]), float(cell["score"])
            axes.fill_between([x - 0.5, x + 0.5], y - 0.5, y + 0.5, color=BLUE, alpha=0.75 * score, linewidth=0)
            weight = "bold" if cell["chosen"] == "1" else "normal"
            axes.text(x, y, f"{score:.2f}", ha="center", va="center", fontsize=7, fontweight=weight)
        axes.set_xticks(range(len(across)), across, rotation=35, ha="right", fontsize=7)
        axes.set_yticks(range(len(down)), [name.replace("_", " ") for name in down], fontsize=7)
        axes.set(xlim=(-0.5, len(across) - 0.5), ylim=(len(down) - 0.5, -0.5))
        axes.grid(visible=False)
        axes.set(title=f"{stage.name}: score on the validation side")

    told = "; ".join(
        f"{column(cell)} {cell['strategy'].replace('_', ' ')} {number(float(cell['score']))}"
        for cell in cells
        if cell["chosen"] == "1"
    )
    caption = f"Score of each strategy on held-out validation questions, bold where it was chosen: {told}."
    return [Plot(f"{stage.name}-matrix", caption, svg(draw, caption))]


def text(stage: Stage) -> str:
    """The matrix as a table, and what the choices are worth on the test side; nothing without a matrix.

    Raises:
        ArtifactError: see `rows`.
    """
    cells = rows(stage)
    if not cells:
        return ""
    grid = [
        [
            words(cell["task"]), code(cell["strategy"]), words(cell["model"]), number(float(cell["score"])),
            interval(float(cell["low"]), float(cell["high"])), f"{float(cell['prompt_tokens']):.0f}",
            f"{float(cell['answer_tokens']):.0f}", "chosen" if cell["chosen"] == "1" else "",
        ]
        for cell in cells
    ]  # fmt: skip
    head = ["task", "strategy", "model", "score", "95 % interval", "prompt tokens", "answer tokens", ""]
    judged = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        keys = {
            name: f"{task}/{name}" for name in ("chosen", "chosen_zero_shot", "chosen_gain_low", "chosen_gain_high")
        }
        if set(keys.values()) <= set(stage.metrics):
            value = {name: stage.metrics[key] for name, key in keys.items()}
            gain = interval(value["chosen_gain_low"], value["chosen_gain_high"])
            known = [words(task), number(value["chosen"]), number(value["chosen_zero_shot"]), gain]
            judged.append(known)
    parts = [
        "Validation side, on which the choice is made: the best cell, and of those within a standard error of it "
        "the one with the fewest tokens. Scores are accuracy, of generations chrF.",
        report_text.table(head, grid, right=(3, 5, 6)),
    ]
    if judged:
        parts += [
            "Test side, asked once:",
            report_text.table(["task", "chosen", "zero-shot, same model", "gain, 95 %"], judged, right=(1, 2)),
        ]
    return "\n\n".join(parts)
