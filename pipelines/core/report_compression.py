"""The report's plots of compressed models: size against quality, and size against speed, with the machine's limit.

In: a stage that wrote `pareto.csv` (name, of, bytes, bits_per_byte) and measured `NAME/decode_tokens_per_second`. A
token cannot be decoded before every weight was read once: bytes over the rate at which memory is read is the least time
it takes, whatever the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from pipelines.core.report_inputs import Stage, table
from pipelines.core.report_plots import BLUE, GREY, INK, ORANGE, Plot, svg
from pipelines.core.report_text import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = (BLUE, ORANGE)  # of a model and its variants: the policy, the student


class Point(NamedTuple):
    """One model."""

    name: str
    of: str  # what it was made from, itself included
    megabytes: float
    bits: float  # per byte
    speed: float | None  # tokens a second
    ends: tuple[float, float]  # lowest and highest of the rounds


def of_stage(stage: Stage) -> list[Plot]:
    """The plots that the stage's `pareto.csv` and metrics allow; none without it.

    Raises:
        ArtifactError: the file is malformed.
    """
    points = []
    for row in table(stage, "pareto.csv"):
        key = f"{row['name']}/decode_tokens_per_second"
        speed = stage.metrics.get(key)
        ends = tuple(stage.metrics.get(f"{key}_{end}", speed or 0.0) for end in ("low", "high"))
        size, bits = float(row["bytes"]) / 1e6, float(row["bits_per_byte"])
        points.append(Point(row["name"], row["of"], size, bits, speed, (ends[0], ends[1])))
    if not points:
        return []
    plots = [_quality(stage.name, points)]
    timed = [point for point in points if point.speed is not None]
    if timed and (rate := stage.metrics.get("memory_bytes_per_second")):
        plots.append(_speed(stage.name, timed, rate))
    return plots


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other is both smaller and better than, by size."""
    found: list[Point] = []
    for point in sorted(points, key=lambda one: (one.megabytes, one.bits)):
        if not found or point.bits < found[-1].bits:
            found.append(point)
    return found


def _quality(stage: str, points: Sequence[Point]) -> Plot:
    best = front(points)

    def draw(axes: Axes) -> None:
        axes.plot([one.megabytes for one in best], [one.bits for one in best], color=GREY, linewidth=1, zorder=1)
        _scatter(axes, points, [point.bits for point in points])
        axes.set(
            title=f"{stage}: size and quality", xlabel="megabytes of weights", ylabel="bits per byte, held-out text"
        )

    told = "; ".join(f"{one.name} {number(one.megabytes)} MB, {number(one.bits)}" for one in points)
    caption = f"Size against bits per byte of held-out text; the line joins what nothing else beats in both: {told}."
    return Plot(f"{stage}-pareto", caption, svg(draw, caption))


def _speed(stage: str, points: Sequence[Point], rate: float) -> Plot:
    from matplotlib.ticker import LogLocator, NullLocator

    def draw(axes: Axes) -> None:
        sizes = sorted(point.megabytes for point in points)
        grid = (
            [sizes[0] * (sizes[-1] / sizes[0]) ** (step / 30) for step in range(31)] if sizes[-1] > sizes[0] else sizes
        )
        axes.plot(grid, [rate / (size * 1e6) for size in grid], color=INK, linestyle="--", linewidth=1, label="limit")
        for point in points:
            assert point.speed is not None
            low, high = point.speed - point.ends[0], point.ends[1] - point.speed
            axes.errorbar(
                point.megabytes, point.speed, yerr=[[low], [high]], color=GREY, capsize=2, linewidth=1, zorder=1
            )
        _scatter(axes, points, [point.speed or 0.0 for point in points])
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.legend(frameon=False, fontsize=8)
        axes.set(
            title=f"{stage}: size and speed", xlabel="megabytes of weights", ylabel="tokens a second, one at a time"
        )

    told = "; ".join(f"{one.name} {number(one.speed or 0.0)}" for one in points)
    caption = (
        f"Size against tokens a second at batch 1, with the lowest and the highest round: {told}. Dashed, the "
        f"limit: bytes of the weights over the rate at which this machine reads memory, {number(rate / 1e9)} GB/s."
    )
    return Plot(f"{stage}-speed", caption, svg(draw, caption))


def _scatter(axes: Axes, points: Sequence[Point], heights: Sequence[float]) -> None:
    families = list(dict.fromkeys(point.of for point in points))
    sizes = [point.megabytes for point in points]
    for point, height in zip(points, heights, strict=True):
        color = COLORS[families.index(point.of) % len(COLORS)]
        axes.scatter(
            [point.megabytes], [height], color=color, s=28, zorder=2, marker="s" if point.name == point.of else "o"
        )
        left = point.megabytes > (min(sizes) + max(sizes)) / 2  # where a name to the right could leave the plot
        place, end = ((-5, 4), "right") if left else ((5, 4), "left")
        axes.annotate(
            point.name, (point.megabytes, height), textcoords="offset points", xytext=place, ha=end, fontsize=7
        )
