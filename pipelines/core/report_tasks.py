"""The report's plots of fine-tuned task models: scores, confusion, by transferred blocks, and before fine-tuning.

In: a stage that wrote what `task_evaluation` measures. GPT-1 (Radford et al., 2018): table 5, and figure 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.core.report_inputs import Stage, cells, table
from pipelines.core.report_plots import BLUE, GREY, INK, ORANGE, Plot, svg
from pipelines.core.report_text import interval, number, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BARS = (
    ("score", "fine-tuned", BLUE),
    ("random", "without pre-training", ORANGE),
    ("tfidf", "TF-IDF, linear", GREY),
    ("majority", "majority", "#c2c6cc"),
)
FEW, MOST_NAMED = 12, 40  # classes whose counts, and whose names, can be read
LONGEST_NAME = 20  # characters


def of_stage(stage: Stage) -> list[Plot]:
    """The plots that the stage's metrics and tables allow; none for a stage without tasks."""
    # One slash: a score of a task, not of one of several ways to ask it (`TASK/STRATEGY/score`).
    scored = [key for key in stage.metrics if key.endswith("/score") and key.count("/") == 1]
    tasks = sorted(key.removesuffix("/score") for key in scored)
    if not tasks:
        return []
    plots = [_scores(stage, tasks)]
    tables = {task: cells(stage, f"confusion/{task}.csv") for task in tasks}
    plots += [_confusion(stage.name, task, rows) for task, rows in tables.items() if rows]
    if layers := table(stage, "layers.csv"):
        plots.append(_layers(stage, layers))
    if along := table(stage, "zero_shot.csv"):
        plots.append(_zero_shot(stage, along))
    return plots


def _scores(stage: Stage, tasks: list[str]) -> Plot:
    """A group of bars for each task."""
    shown = [bar for bar in BARS if any(f"{task}/{bar[0]}" in stage.metrics for task in tasks)]
    width = 0.8 / len(shown)

    def draw(axes: Axes) -> None:
        for number_of_bar, (key, name, color) in enumerate(shown):
            known = [(place, task) for place, task in enumerate(tasks) if f"{task}/{key}" in stage.metrics]
            heights = [stage.metrics[f"{task}/{key}"] for _, task in known]
            places = [place + (number_of_bar - (len(shown) - 1) / 2) * width for place, _ in known]
            ends = None if key != "score" else [_ends(stage, task) for _, task in known]
            error = None if ends is None else list(zip(*ends, strict=True))
            axes.bar(places, heights, width, color=color, label=name, yerr=error, ecolor=INK, capsize=3)
        axes.set_xticks(range(len(tasks)), tasks)
        axes.grid(visible=False, axis="x")
        axes.set(title=f"{stage.name}: score on held-out examples", ylabel="accuracy, or correlation")
        axes.set_ylim(top=1.25 * axes.get_ylim()[1])  # room for the legend
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")

    told = "; ".join(
        f"{task} {number(stage.metrics[f'{task}/score'])} "
        f"({interval(stage.metrics[f'{task}/score_low'], stage.metrics[f'{task}/score_high'])})"
        for task in tasks
    )
    caption = f"Scores of {stage.name} on held-out examples, beside baselines, with 95 % intervals: {told}."
    return Plot(f"{stage.name}-scores", caption, svg(draw, caption))


def _ends(stage: Stage, task: str) -> tuple[float, float]:
    """How far the interval reaches below and above the score; the median of several seeds may lie outside."""
    score, low, high = (stage.metrics[f"{task}/score{end}"] for end in ("", "_low", "_high"))
    return max(0.0, score - low), max(0.0, high - score)


def _confusion(stage: str, task: str, rows: list[list[str]]) -> Plot:
    """How often each class (row) was taken for each (column). Of many classes only what occurs is drawn, unnamed."""
    labels = [_short(label) for label in rows[0][1:]]
    counts = [[int(count) for count in row[1:]] for row in rows[1:]]
    most = max(max(row) for row in counts) or 1

    def draw(axes: Axes) -> None:
        axes.set_position((0.28, 0.28, 0.6, 0.6))
        for down, row in enumerate(counts):
            for across, count in enumerate(row):
                if not count and len(labels) > FEW:
                    continue
                wide = [across - 0.5, across + 0.5]
                axes.fill_between(wide, down - 0.5, down + 0.5, color=BLUE, alpha=count / most, linewidth=0)
                if count and len(labels) <= FEW:
                    axes.text(across, down, str(count), ha="center", va="center", fontsize=7)
        if len(labels) <= MOST_NAMED:
            axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
            axes.set_yticks(range(len(labels)), labels)
        axes.set(xlim=(-0.5, len(labels) - 0.5), ylim=(len(labels) - 0.5, -0.5))
        axes.grid(visible=False)
        axes.set(title=f"{task}: truth (rows), answer (columns)")

    right = sum(row[place] for place, row in enumerate(counts))
    total = sum(map(sum, counts))
    caption = f"Confusion of {stage}'s model for {task}: {right} of {total} held-out examples on the diagonal."
    return Plot(f"{stage}-confusion-{task}", caption, svg(draw, caption))


def _short(label: str) -> str:
    """A class's name, which may be any text, as the side of a plot has room for it."""
    line = " ".join(visible(label).split())
    return line if len(line) <= LONGEST_NAME else line[: LONGEST_NAME - 1] + "…"


def _layers(stage: Stage, rows: list[dict[str, str]]) -> Plot:
    """Score by the number of blocks that were transferred."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: int(row["layers"])):
        curves.setdefault(row["task"], []).append((int(row["layers"]), float(row["score"])))

    def draw(axes: Axes) -> None:
        for task, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.5, label=task)
        axes.legend(frameon=False, fontsize=8)
        axes.set(title=f"{stage.name}: score by transferred blocks", xlabel="blocks")

    told = "; ".join(f"{task} {number(points[0][1])} to {number(points[-1][1])}" for task, points in curves.items())
    caption = f"Score of {stage.name} by the number of blocks that were transferred, fewest to most: {told}."
    return Plot(f"{stage.name}-layers", caption, svg(draw, caption))


def _zero_shot(stage: Stage, rows: list[dict[str, str]]) -> Plot:
    """Answers without fine-tuning along pre-training: 0 is the majority, 1 the fine-tuned model."""
    curves: dict[str, list[tuple[int, float]]] = {}
    scores: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: int(row["step"])):
        scores.setdefault(row["task"], []).append(number(float(row["score"])))
        if row["relative"]:
            curves.setdefault(row["task"], []).append((int(row["step"]), float(row["relative"])))

    def draw(axes: Axes) -> None:
        for task, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.5, label=task)
        axes.axhline(0.0, color=GREY, linewidth=1)
        if curves:
            axes.legend(frameon=False, fontsize=8)
        title = f"{stage.name}: zero-shot, 0 = majority, 1 = fine-tuned"
        axes.set(title=title, xlabel="step of pre-training", ylabel="relative score")

    told = "; ".join(f"{task} {' to '.join(dict.fromkeys((of[0], of[-1])))}" for task, of in scores.items())
    caption = f"Zero-shot score of the model along its pre-training, first to last snapshot: {told}."
    return Plot(f"{stage.name}-zero-shot", caption, svg(draw, caption))
