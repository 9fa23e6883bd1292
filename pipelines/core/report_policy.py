"""The report's plots of a policy: what it gained for its distance from the SFT model, and what that cost.

In: a stage that wrote what `policy_evaluation` and `alignment_tax` measure. Gao et al., "Scaling laws for reward model
overoptimization" (2022): against the square root of KL, the proxy goes on rising where gold has turned.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING

from pipelines.core.report_inputs import Stage, numbers
from pipelines.core.report_plots import BLUE, GREY, INK, ORANGE, Plot, svg
from pipelines.core.report_text import interval, number
from pipelines.core.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TAXES = {
    "alignment_tax_bits": "this policy",
    "alignment_tax_bits_without_ptx": "without\npre-training\ngradients",
}


def of_stage(stage: Stage) -> list[Plot]:
    """The plots that the stage's metrics, `history.csv` and `best_of_n.csv` allow; none for what is no policy.

    Raises:
        ArtifactError: one of the files is malformed.
    """
    plots = []
    if "kl" in stage.metrics and (curve := numbers(stage, "best_of_n.csv")):
        plots.append(_against_kl(stage, curve, numbers(stage, "history.csv")))
    if all(f"alignment_tax_bits{end}" in stage.metrics for end in ("", "_low", "_high")):
        plots.append(_tax(stage))
    return plots


def _against_kl(stage: Stage, best_of_n: Sequence[dict[str, float]], history: Sequence[dict[str, float]]) -> Plot:
    """Gold on the left, the proxy on the right; iterations, best-of-n, and the policy on held-out prompts."""
    metrics = stage.metrics
    has_gold = "gold" in metrics

    def draw(axes: Axes) -> None:
        axes.set_position((0.16, 0.17, 0.67, 0.71))
        right = axes.twinx()
        right.spines["right"].set_visible(True)
        right.grid(visible=False)
        sides = [(axes, BLUE, "gold", "gold")] * has_gold + [(right, ORANGE, "proxy", "score")]
        for side, color, column, of_iteration in sides:
            seen = [row for row in history if "kl" in row and of_iteration in row]
            side.scatter([_distance(row["kl"]) for row in seen], [row[of_iteration] for row in seen], s=12, color=color)
            drawn = [(_distance(row["kl"]), row[column]) for row in best_of_n]
            side.plot(*zip(*drawn, strict=True), color=color, linestyle="--", linewidth=1.2)
            side.plot(_distance(metrics["kl"]), metrics[column], "*", color=color, markersize=12, markeredgecolor=INK)
            side.set_ylabel(column, color=color)
            side.tick_params(axis="y", labelcolor=color)
        if not has_gold:
            axes.set_yticks([])
        axes.set(title=f"{stage.name}: against distance from SFT", xlabel="√KL (KL in nats a response)")

    caption = (
        f"What {stage.name} gained for its distance from the SFT model: {'gold (blue, left) and ' * has_gold}the "
        "reward it was measured by (orange, right). Stars: the policy on held-out prompts, KL "
        f"{number(metrics['kl'])}; dashed: best-of-n of the SFT model on the same prompts"
        f"{'; points: each iteration on its training prompts' * any('kl' in row for row in history)}."
    )
    return Plot(f"{stage.name}-against-kl", caption, svg(draw, caption))


def _distance(kl: float) -> float:
    """Square root of a KL, of which an estimate can be a little below 0."""
    return sqrt(max(0.0, kl))


def _tax(stage: Stage) -> Plot:
    """Bits per byte more than the SFT model on held-out text, of each arm."""
    arms = [
        (name + _stopped(stage, key), Interval(*(stage.metrics[f"{key}{end}"] for end in ("", "_low", "_high"))))
        for key, name in TAXES.items()
        if key in stage.metrics
    ]

    def draw(axes: Axes) -> None:
        axes.set_position((0.28, 0.17, 0.66, 0.71))
        for place, (_, (value, low, high)) in enumerate(reversed(arms)):
            color = BLUE if place + 1 == len(arms) else GREY
            ends = [[value - low], [high - value]]
            axes.barh(place, value, height=0.5, color=color, xerr=ends, ecolor=INK, capsize=3)
        axes.set_yticks(range(len(arms)), [name for name, _ in reversed(arms)])
        axes.axvline(0.0, color=INK, linewidth=0.8)
        axes.grid(visible=False, axis="y")
        axes.set(title=f"{stage.name}: alignment tax", xlabel="bits per byte more than SFT, held-out text")

    told = "; ".join(
        f"{' '.join(name.split())} {number(value)} ({interval(low, high)})" for name, (value, low, high) in arms
    )
    caption = f"Alignment tax of {stage.name}, in bits per byte of held-out text, with 95 % intervals: {told}."
    return Plot(f"{stage.name}-alignment-tax", caption, svg(draw, caption))


def _stopped(stage: Stage, key: str) -> str:
    """After how many iterations the run that a tax is of was stopped, if it was."""
    after = stage.metrics.get("without_ptx_stopped_after")
    return "" if after is None or "without_ptx" not in key else f",\nstopped after\niteration {after:.0f}"
