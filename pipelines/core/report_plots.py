"""The report's plots: curves of a stage's history, bits per byte with intervals, examples before and after.

In: a stage. Out: SVG text, the same bytes on every machine: fixed ids (a salt for the hash, ids that nobody
refers to dropped), no date, text left to the reader's fonts and placed by the font that matplotlib brings.
Ink is `currentColor`, so a plot follows the page, and on its own the reader's light or dark mode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipelines.core import statistics
from pipelines.core.errors import ArtifactError
from pipelines.core.report_inputs import Stage, history
from pipelines.core.report_text import interval, number

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

INK = "#010203"  # stands for currentColor until the SVG is written
BLUE, ORANGE, GREY = "#3b82c4", "#d9822b", "#8a8f98"  # legible on light and dark
NAMES = {"bits": "after training", "bits_before": "before training", "bits_classical": "classical compressor"}
SECOND_ARM = "plain_"  # of ppo: columns of the run without pre-training gradients
THEME = "<style>:root{color:#1f2328}@media (prefers-color-scheme:dark){:root{color:#e6e9ed}}</style>"
STYLE = {
    "svg.hashsalt": "sluice", "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9,
    "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "axes.titlecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.grid": True, "grid.color": INK, "grid.alpha": 0.12, "axes.axisbelow": True,
    "figure.facecolor": "none", "axes.facecolor": "none", "text.parse_math": False,
}  # fmt: skip


class Plot(NamedTuple):
    """A picture: `name` of its file, what it shows in a line, and the SVG."""

    name: str
    caption: str
    svg: str


def of_stage(stage: Stage) -> list[Plot]:
    """Every plot that a stage's `history.csv` and `evaluation.parquet` allow, curves first.

    Raises:
        ArtifactError: one of the two is malformed.
    """
    curves = history(stage)
    paired = f"{SECOND_ARM}kl" in curves  # of a policy; else it is a task whose name begins so
    second = {name: curves.pop(SECOND_ARM + name) for name in [*curves] if paired and SECOND_ARM + name in curves}
    plots = [_curve(stage.name, column, points, second.get(column, [])) for column, points in curves.items()]
    found = _bits(stage)
    if found is not None:
        sizes, bits, groups = found
        plots.append(_bars(stage.name, sizes, bits, groups))
        if {"bits", "bits_before"} <= set(bits):
            plots.append(_before_and_after(stage.name, sizes, bits))
    return plots


def _curve(
    stage: str, column: str, points: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]
) -> Plot:
    """A column over the steps, beside the same of the stage's second arm where it has one."""

    def draw(axes: Axes) -> None:
        for arm, color, name in ((second, GREY, "without"), (points, BLUE, "with pre-training gradients")):
            if arm:
                marker = "o" if len(arm) <= 50 else ""
                axes.plot(*zip(*arm, strict=True), color=color, marker=marker, markersize=3, linewidth=1.5, label=name)
        if second:
            axes.legend(frameon=False, fontsize=8, reverse=True)
        axes.set(title=f"{stage}: {_words(column)}", xlabel="step")

    first, last = points[0], points[-1]
    caption = f"{_words(column)} of {stage}: {number(first[1])} at step {first[0]:.0f}, "
    told = f"{number(last[1])} at step {last[0]:.0f}"
    if second:
        told += f" (without pre-training gradients {number(second[-1][1])})"
    return Plot(f"{stage}-{_slug(column)}", caption + f"{told}.", svg(draw, caption))


def _bits(stage: Stage) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]], list[str]] | None:
    """Bytes of the stage's examples, each column of bits, and groups. None where it scored no text by bits."""
    import numpy as np
    import pyarrow.parquet as pq

    place = stage.file("evaluation.parquet")
    names: list[str] = pq.read_schema(place).names if place is not None else []
    wanted = [name for name in sorted(names) if name.split("_")[0] == "bits"]
    if place is None or "bytes" not in names or not wanted:
        return None
    table = pq.read_table(place, columns=["bytes", "group", *wanted])
    columns = {name: np.asarray(table[name].to_numpy(), dtype=np.float64) for name in ["bytes", *wanted]}
    for name, values in columns.items():
        if not len(values) or not np.isfinite(values).all() or (name == "bytes" and (values <= 0).any()):
            raise ArtifactError(f"{stage.name}/evaluation.parquet: column {name} is empty or not all usable numbers")
    return columns.pop("bytes"), columns, table["group"].to_pylist()


def _bars(stage: str, sizes: NDArray[np.float64], bits: dict[str, NDArray[np.float64]], groups: list[str]) -> Plot:
    scored = {name: statistics.bootstrap(values, sizes, group=groups) for name, values in bits.items()}
    order = sorted(scored, key=lambda name: scored[name].estimate, reverse=True)

    def draw(axes: Axes) -> None:
        for place, name in enumerate(order):
            value, low, high = scored[name]
            ends = [[value - low], [high - value]]
            color = BLUE if name == "bits" else GREY
            axes.barh(place, value, height=0.6, color=color, xerr=ends, ecolor=INK, capsize=3)
            axes.annotate(
                number(round(value, 3)), (high, place), xytext=(6, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(order)), [_words(name).replace(" ", "\n", 1) for name in order])
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.2 * max(found.high for found in scored.values()))
        axes.set(title=f"{stage}: bits per byte, held-out text", xlabel="bits per byte (fewer is better)")

    told = [f"{_words(name)} {number(scored[name].estimate)} ({interval(*scored[name][1:])})" for name in order]
    caption = f"Bits per byte with 95 % intervals over {len(sizes):,} held-out examples: {', '.join(told)}."
    return Plot(f"{stage}-bits-per-byte", caption, svg(draw, caption))


def _before_and_after(stage: str, sizes: NDArray[np.float64], bits: dict[str, NDArray[np.float64]]) -> Plot:
    before, after = bits["bits_before"] / sizes, bits["bits"] / sizes

    def draw(axes: Axes) -> None:
        ends = [float(min(before.min(), after.min())), float(max(before.max(), after.max()))]
        axes.plot(ends, ends, color=GREY, linewidth=1, linestyle="--")
        axes.scatter(before, after, s=10, color=ORANGE, alpha=0.7, linewidths=0)
        axes.set(title=f"{stage}: bits per byte of each example", xlabel="before training", ylabel="after training")

    better = int((after < before).sum())
    caption = (
        f"Each held-out example of {stage} before and after training, in bits per byte: {better:,} of {len(sizes):,} "
        "lie below the dashed line and are said with fewer bits."
    )
    return Plot(f"{stage}-examples", caption, svg(draw, caption))


def svg(draw: Callable[[Axes], None], title: str) -> str:
    """Draw on axes of a fixed place (a layout engine would let fonts decide) and write the SVG."""
    import io
    from html import escape

    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(4.4, 2.9))
        FigureCanvasSVG(figure)
        draw(figure.add_axes((0.2, 0.17, 0.76, 0.71)))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    svg = text[text.index("<svg ") :].replace(INK, "currentColor")
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    label = escape(title, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).rstrip() + "\n"


def write(plot: Plot, place: Path) -> None:
    """Write a plot as a file of its own, which brings its colours along."""
    head, rest = plot.svg.split(">", 1)
    place.write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{head}>\n {THEME}{rest}', encoding="utf-8")


def _words(column: str) -> str:
    """A column's name as people say it."""
    return NAMES.get(column, column.replace("_", " "))


def _slug(column: str) -> str:
    """A column's name as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", column)
