"""The findings as tables: means over the seeds, the lowest and the highest of them beside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

SHOWN = (1, 4, 16, 32, 64)  # n of best-of-n
WIDEST = 32  # n of which slot errors are told
FITTED = ("best_of_n_gold", "best_of_n_proxy", "ppo_gold", "ppo_proxy")


def page(found: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    seeds = list(found["seeds"].values())
    parts = [over_optimisation(seeds), fits(seeds), tax(seeds), slot_errors(seeds)]
    told = f"Seeds {', '.join(found['seeds'])}; in brackets the lowest and the highest of them."
    return "\n\n".join([told, *parts]) + "\n"


def over_optimisation(seeds: Sequence[dict[str, Any]]) -> str:
    """Gold of best-of-n and of PPO without a KL penalty, by the rankings that the reward model has seen."""
    rows = []
    for size in seeds[0]["fits"]:
        runs = [seed["runs"][f"free-{size}"] for seed in seeds]
        drawn = [
            spread(fmean(row["gold"]) for seed in seeds for row in seed["best_of_n"][size]["curve"] if row["n"] == n)
            for n in SHOWN
        ]
        right = spread(seed["rewards"][size]["accuracy_gold"] for seed in seeds)
        ended = [spread(run["gold"] for run in runs), gain(runs), spread((run["kl"] for run in runs), 1)]
        rows.append([size, right, *drawn, *ended])
    heads = ["rankings", "right about gold", *(f"best of {n}" for n in SHOWN), "PPO, gold", "gain over SFT", "KL"]
    return table(heads, rows)


def fits(seeds: Sequence[dict[str, Any]]) -> str:
    """Coefficients a, b of Gao et al.'s forms."""
    rows = []
    for size in seeds[0]["fits"]:
        cells = []
        for which in FITTED:
            every = [seed["fits"][size][which] for seed in seeds]
            cells.append(", ".join(spread((one[name] for one in every), 2) for name in ("alpha", "beta")))
        rows.append([size, *cells])
    return table(["rankings", *(f"{which.replace('_', ' ')}: a, b" for which in FITTED)], rows)


def tax(seeds: Sequence[dict[str, Any]]) -> str:
    """Alignment tax and gold against the two coefficients."""
    rows = []
    for name in [name for name in seeds[0]["runs"] if name.startswith(("ptx-", "kl-"))]:
        runs = [seed["runs"][name] for seed in seeds]
        rows.append([
            name.replace("-", " "), spread(run["alignment_tax_bits"] for run in runs),
            spread(run["gold"] for run in runs), gain(runs), spread((run["kl"] for run in runs), 1),
        ])  # fmt: skip
    return table(["coefficient", "tax, bits a byte", "gold", "gain over SFT", "KL"], rows)


def slot_errors(seeds: Sequence[dict[str, Any]]) -> str:
    """1 - gold on held-out prompts."""
    largest = list(seeds[0]["fits"])[-1]
    best = [
        1 - fmean(row["gold"])
        for seed in seeds
        for row in seed["best_of_n"][largest]["curve"]
        if row["n"] == WIDEST
    ]  # fmt: skip
    any_run = [seed["runs"]["ptx-0.0"] for seed in seeds]
    rows = [
        ["SFT", errors(any_run, "gold_sft"), errors(any_run, "gold_greedy_sft")],
        [f"best of {WIDEST}", spread(best), ""],
    ]
    for title, name in (("PPO", "ptx-0.0"), ("PPO-ptx (1)", "ptx-1.0"), ("DPO", "dpo")):
        runs = [seed["runs"][name] for seed in seeds]
        rows.append([title, errors(runs, "gold"), errors(runs, "gold_greedy")])
    return table(["", "slot errors, sampled", "greedy"], rows)


def errors(runs: Sequence[dict[str, float]], name: str) -> str:
    """Slot errors, given what is right."""
    return spread(1 - run[name] for run in runs)


def gain(runs: Sequence[dict[str, float]]) -> str:
    """Gold gained over the SFT model, and of how many seeds the 95 % interval over prompts is on its side of zero."""
    values = [run["gold_gain"] for run in runs]
    sign = 1 if fmean(values) > 0 else -1
    sure = sum(min(sign * run["gold_gain_low"], sign * run["gold_gain_high"]) > 0 for run in runs)
    return f"{spread(values)}, {sure} of {len(runs)} sure"


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Mean (lowest to highest)."""
    known = list(values)
    low, high = number(min(known), digits), number(max(known), digits)
    return f"{number(fmean(known), digits)} ({low} to {high})" if len(known) > 1 else number(known[0], digits)


def number(value: float, digits: int) -> str:
    """.25, -.1, 12.0: no zero before the point."""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))
