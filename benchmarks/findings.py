"""The findings of the literature on over-optimisation and the alignment tax, small: restaurant descriptions (E2E).

`python -m benchmarks.e2e FOLDER && make run PROFILE=e2e` first, in a workspace; then, from that workspace,
`python -m benchmarks.findings OUT [--seeds 1 2] [--iterations 30]`. Every part that has ended is kept in OUT, so a run
that was stopped goes on; one of other params, iterations or inputs needs a folder of its own. Writes OUT/findings.json,
OUT/findings.md and OUT/*.png.

Gold is the judge `slots` (attributes realised less those wrong, a share of those asked for). The reward models learn
from simulated labelers who look at the same attributes, and at brevity, with slips: the proxy is a proxy of gold.

1. Gold and proxy over KL, for best-of-n and PPO, with reward models of several sizes of data (Gao et al., "Scaling laws
   for reward model overoptimization", 2022; d is the root of the KL, fits of section 3.1: best-of-n d (a - b d),
   reinforcement learning d (a - b log d)). PPO runs without a KL penalty, as there.
2. Alignment tax and gold against the coefficient of the pre-training gradient, and against the KL coefficient
   without it (Ouyang et al., 2022, section 4.2 and figures 33, 34).
3. Slot errors of SFT, best-of-n, PPO, PPO-ptx and DPO on held-out prompts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

SIZES = (24, 96, 384)  # prompts with a ranking, of which each reward model learns
PTX = (0.0, 0.3, 1.0, 3.0)  # coefficients of the pre-training gradient
KL = (0.02, 0.1, 0.5)  # coefficients of the KL penalty, without it
SAMPLES = 64  # of each held-out prompt, for best-of-n
PROMPTS = 96
STAGES = ("feedback", "reward", "ppo", "dpo")
DRAWN = (1, 2, 4, 8, 16, 32, 64)  # n
FREE = {"kl_coefficient": 0.0, "kl_ceiling": 1e6, "entropy_floor": 0.0, "cap_share": 1.0, "lr": 6.4e-5}


def kept(place: Path, make: Callable[[], Any]) -> Any:
    """What `make` gave, from the file if it is there."""
    if not place.exists():
        made = make()
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return json.loads(place.read_text(encoding="utf-8"))


@cache
def precision() -> str:
    """What the workspace's stages compute with on this machine."""
    from pipelines.core import hardware
    from pipelines.core.params import whole

    return hardware.choose(whole.load(Path("params.yaml")).compute, Path()).precision


def stage(name: str, out: Path, inputs: dict[str, Path], changes: dict[str, Any]) -> dict[str, Any]:
    """A stage of the workspace with some params changed, its output in `out`: metrics and curves."""
    import hashlib
    import importlib

    from pipelines.core.context import StageContext
    from pipelines.core.params import whole

    said = getattr(whole.load(Path("params.yaml")), name)
    params = type(said).model_validate(said.model_dump() | changes)
    fingerprint = hashlib.sha256(str(out).encode()).hexdigest()
    context = StageContext(name, out.parent / "work", fingerprint, precision=precision())
    context.root.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    metrics = importlib.import_module(f"pipelines.{name}").run(params, inputs, out, context)
    return {"metrics": metrics, "history": context.history}


def paths(root: Path, seed: int, size: int) -> dict[str, Path]:
    """What the stages read: the workspace's data and SFT model, and what is made here."""
    done = Path("artifacts")
    here = root / f"seed-{seed}"
    return {
        "data": done / "data", "sft": done / "sft", "pretrain": done / "pretrain",
        "feedback": here / "feedback", "reward": here / f"reward-{size}",
    }  # fmt: skip


def prepare(root: Path, seed: int) -> dict[str, dict[str, float]]:
    """Simulated rankings, and a reward model for each size of data; the metrics of each."""
    inputs = paths(root, seed, SIZES[-1])
    asked = {
        "seed": seed, "labeler": "reference", "prompts": SIZES[-1], "test_prompts": PROMPTS, "completions": 5,
        "shared_share": 0.0,
    }  # fmt: skip
    kept(inputs["feedback"].with_suffix(".json"), partial(stage, "feedback", inputs["feedback"], inputs, asked))
    found = {}
    for size in SIZES:
        place = paths(root, seed, size)["reward"]
        changes = {"seed": seed, "rankings": size, "held_out_labelers": 0, "batch_prompts": 8}
        made = kept(place.with_name(place.name + ".json"), partial(stage, "reward", place, inputs, changes))
        found[str(size)] = made["metrics"]
    return found


def best_of_n(root: Path, seed: int) -> dict[str, Any]:
    """Gold and proxy of best-of-n for each reward model, over the same samples; the samples' own mean and spread."""
    import numpy as np

    from pipelines.core import best_of_n_curve, completions, judges, language_models, policy_answers, reward_functions
    from pipelines.core.context import StageContext
    from pipelines.core.params import whole

    inputs = paths(root, seed, SIZES[-1])
    context = StageContext("ppo", root / "work", f"bon-{seed}", precision=precision())
    tokenizer = language_models.load_tokenizer(str(inputs["sft"] / "model"))
    limits = completions.Limits("ppo", seed, 128, "drop")
    prompts, _ = completions.choose(limits, inputs["data"], "test", PROMPTS, tokenizer, with_reference=False)
    params = whole.load(Path("params.yaml")).ppo.model_copy(update={"eval_samples": SAMPLES, "seed": seed})
    said = policy_answers.ask(params, prompts, inputs["sft"] / "model", "the SFT model", context)
    texts = said.sampled.texts
    gold = [[judges.gold("slots", p.text, t, None) for t in ts] for p, ts in zip(prompts, texts, strict=True)]
    found: dict[str, Any] = {
        "gold_mean": float(np.mean(gold)), "gold_std": float(np.std(gold)),
        "greedy": [judges.gold("slots", p.text, t[0], None) for p, t in zip(prompts, said.greedy.texts, strict=True)],
    }  # fmt: skip
    for size in SIZES:
        place = str(paths(root, seed, size)["reward"] / "model")
        rewards = reward_functions.load((place,), context.root, tokenizer, context)
        asked = [prompt.text for prompt, ts in zip(prompts, texts, strict=True) for _ in ts]
        flat = reward_functions.score(rewards, asked, [t for ts in texts for t in ts], call=1).values
        proxy = [flat[at * SAMPLES : (at + 1) * SAMPLES] for at in range(len(prompts))]
        curve = [
            {
                "n": n,
                "kl": best_of_n_curve.divergence(n),
                "gold": [best_of_n_curve.expected_gold(p, g, n) for p, g in zip(proxy, gold, strict=True)],
                "proxy": [best_of_n_curve.expected_gold(p, p, n) for p in proxy],
            }
            for n in DRAWN
        ]
        found[str(size)] = {"proxy_mean": float(np.mean(flat)), "proxy_std": float(np.std(flat)), "curve": curve}
    return found


def policies(root: Path, seed: int, iterations: int) -> dict[str, Any]:
    """PPO in all its variants, and DPO, from the same SFT model."""
    common = {
        "seed": seed, "iterations": iterations, "without_ptx": False, "eval_prompts": PROMPTS, "eval_samples": 4,
        "checkpoint_steps": iterations, "checkpoint_seconds": 1e9, "samples": 0,
    }  # fmt: skip
    asked = {f"free-{size}": (size, FREE | {"ptx_coefficient": 0.0}) for size in SIZES}
    asked |= {f"ptx-{one}": (SIZES[-1], {"ptx_coefficient": one}) for one in PTX}
    asked |= {f"kl-{one}": (SIZES[-1], {"ptx_coefficient": 0.0, "kl_coefficient": one}) for one in KL}
    found = {}
    for name, (size, changes) in asked.items():
        out, inputs = root / f"seed-{seed}" / name, paths(root, seed, size)
        make = partial(stage, "ppo", out, inputs, common | changes)
        found[name] = kept(out.with_name(f"{name}.json"), make)
        print(f"seed {seed}, {name}: {shown(found[name])}", flush=True)
    out = root / f"seed-{seed}" / "dpo"
    changes = {"seed": seed, "eval_prompts": PROMPTS, "eval_samples": 4, "samples": 0}
    found["dpo"] = kept(out.with_name("dpo.json"), partial(stage, "dpo", out, paths(root, seed, SIZES[-1]), changes))
    print(f"seed {seed}, dpo: {shown(found['dpo'])}", flush=True)
    return found


def shown(one: dict[str, Any]) -> str:
    """The figures of a run that a reader looks for."""
    keys = ("gold", "gold_sft", "gold_greedy", "gold_greedy_sft", "kl", "proxy", "alignment_tax_bits")
    return ", ".join(f"{key} {one['metrics'][key]:.3f}" for key in keys if key in one["metrics"])


def fits(root: Path, seed: int, size: int, sampled: dict[str, Any], ppo: dict[str, Any]) -> dict[str, Any]:
    """Gao et al.'s forms through gold and proxy over the root of the KL, in standard deviations of SFT's samples."""
    import numpy as np

    scale = sampled[str(size)]
    unit = {"gold": sampled["gold_std"], "proxy": scale["proxy_std"]}
    found: dict[str, Any] = {}
    for which in ("gold", "proxy"):
        of_n = [(row["kl"], float(np.mean(row[which]))) for row in scale["curve"]]
        start = of_n[0][1]
        points = [(kl**0.5, (value - start) / unit[which]) for kl, value in of_n[1:]]
        found[f"best_of_n_{which}"] = linear(points, basis_of("best_of_n"))
        curve = "score" if which == "proxy" else "gold"
        # Each point is another batch of training prompts, the first one, too: where the curve begins is fitted.
        points = [(row["kl"] ** 0.5, row[curve] / unit[which]) for row in ppo["history"] if row["kl"] > 0.05]
        found[f"ppo_{which}"] = linear(points, basis_of("ppo"), begins=True)
    return found


def linear(
    points: list[tuple[float, float]], basis: Callable[[Any], tuple[Any, Any]], begins: bool = False
) -> dict[str, Any]:
    """Least squares of value = a x basis_1(d) + b x basis_2(d); the points, the coefficients, the residual's spread.

    Args:
        begins: fit what the value is at d = 0, too, and tell the points from there.
    """
    import numpy as np

    design = np.array([[*basis(d), float(begins)] for d, _ in points])
    values = np.array([value for _, value in points])
    (alpha, beta, start), *_ = np.linalg.lstsq(design, values, rcond=None)
    rest = float(np.std(values - design @ (alpha, beta, start)))
    points = [(d, value - float(start)) for d, value in points]
    return {"points": points, "alpha": float(alpha), "beta": float(beta), "start": float(start), "residual": rest}


def basis_of(way: str) -> Callable[[Any], tuple[Any, Any]]:
    """What Gao et al. add up: d and -d^2 for best-of-n, d and -d log d for reinforcement learning."""
    import numpy as np

    return (lambda d: (d, -d * d)) if way == "best_of_n" else (lambda d: (d, -d * np.log(d)))


def plot(out: Path, found: dict[str, Any]) -> None:
    """Gold and proxy over the root of the KL, a panel for each size of the reward model's data."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, panels = plt.subplots(2, len(SIZES), figsize=(4 * len(SIZES), 6), sharey=True, squeeze=False)
    for row, way in enumerate(("best_of_n", "ppo")):
        for column, size in enumerate(SIZES):
            panel = panels[row][column]
            for which, colour in (("proxy", "tab:orange"), ("gold", "tab:blue")):
                for seed in found["seeds"].values():
                    fit = seed["fits"][str(size)][f"{way}_{which}"]
                    x, y = np.array(fit["points"]).T
                    line = np.linspace(max(0.05, min(x)), max(x), 50)
                    first, second = basis_of(way)(line)
                    panel.plot(x, y, ".", color=colour, alpha=0.5)
                    panel.plot(line, fit["alpha"] * first + fit["beta"] * second, color=colour)
            panel.set_title(f"{way.replace('_', '-')}, {size} rankings")
            panel.set_xlabel("root of KL, nats")
    figure.supylabel("standard deviations over SFT; orange: proxy, blue: gold", fontsize="medium")
    figure.tight_layout()
    figure.savefig(out / "over-optimisation.png", dpi=120)


def main() -> None:
    """Make what is missing, and print."""
    from benchmarks import findings_tables
    from pipelines.core import artifacts
    from pipelines.core.params import whole

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--iterations", type=int, default=30, help="of each run of PPO, 64 episodes each")
    options = parser.parse_args()
    options.out = options.out.resolve()
    asked: dict[str, Any] = {"iterations": options.iterations}
    asked |= {name: artifacts.content_hash(Path("artifacts") / name) for name in ("data", "sft")}
    asked |= {name: getattr(whole.load(Path("params.yaml")), name).model_dump(mode="json") for name in STAGES}
    if kept(options.out / "asked.json", lambda: asked) != asked:
        parser.error(f"{options.out} holds runs of other params, iterations or inputs (asked.json); name another")
    found: dict[str, Any] = {"seeds": {}}
    for seed in options.seeds:
        rewards = prepare(options.out, seed)
        sampled = kept(options.out / f"seed-{seed}" / "best-of-n.json", partial(best_of_n, options.out, seed))
        runs = policies(options.out, seed, options.iterations)
        every = {str(size): fits(options.out, seed, size, sampled, runs[f"free-{size}"]) for size in SIZES}
        told = {name: one["metrics"] for name, one in runs.items()}
        found["seeds"][str(seed)] = {"fits": every, "runs": told, "best_of_n": sampled, "rewards": rewards}
    (options.out / "findings.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(options.out, found)
    page = findings_tables.page(found)
    (options.out / "findings.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
