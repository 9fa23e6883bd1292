"""What a policy is worth on held-out prompts, beside the SFT model that it started from.

Both models answer the same prompts with the same random numbers, `eval_samples` times at temperature 1 with no token
left out, and once greedily. What is compared:

* **gold**, what a judge says that nothing is trained on (`judges`): means, and a win rate, which over all pairs of an
  answer of the policy and one of the SFT model is the share with the higher gold, ties being one half. A sharper
  distribution wins samples without a better model behind it, so the greedy answers are compared too;
* **proxy**: what the policy was trained on;
* **KL** of the policy from the SFT model: log pi - log pi_sft of the policy's own answers, summed over their tokens;
* **best-of-n** at the same KL: the gold of the SFT model's answer that the proxy likes best among n (Gao et al.,
  "Scaling laws for reward model overoptimization", 2022). It needs no training: training has to beat it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipelines.core import best_of_n_curve, judges, language_models, reading, statistics
from pipelines.core.completions import Prompt
from pipelines.core.context import StageContext
from pipelines.core.policy_answers import Answers, Said, Scores, ask, held_out, kept, log_probabilities

if TYPE_CHECKING:
    from pipelines.core.policy_answers import Params

Proxy = Callable[[list[str], list[str]], Sequence[float]]  # of prompts, and responses of the same places


class Golds(NamedTuple):
    """What the judge says of the answers."""

    policy: Scores
    sft: Scores
    greedy: Scores
    greedy_sft: Scores


class Compared(NamedTuple):
    """The two models' answers, and what is known of them."""

    prompts: list[Prompt]
    policy: Said
    sft: Said
    reference: Scores  # log-probabilities of the policy's samples under the SFT model
    proxy: Scores  # of the samples
    proxy_sft: Scores
    gold: Golds | None  # None: the prompts cannot be judged


def evaluate(
    params: Params, prompts: list[Prompt], policy: Path, sft: Path, proxy: Proxy, outputs: Path, context: StageContext
) -> tuple[Compared, dict[str, float]]:
    """Ask both models, compare them, write `evaluation.parquet` (one row a prompt) and `best_of_n.csv`.

    Answers and scores are kept in the stage's scratch, for a run that goes on after a kill.

    Args:
        policy, sft: directories of models.

    Raises:
        ArtifactError: prompt and answer do not fit a model's context.
        Stopped: a signal came; what was finished is kept.
    """
    import pandas as pd

    ours = ask(params, prompts, policy, "the policy", context, keep="policy")
    theirs = ask(params, prompts, sft, "the SFT model", context, keep="sft")
    compared = Compared(
        prompts, ours, theirs,
        reference=kept(context, "reference", partial(log_probabilities, sft, prompts, ours.sampled, context)),
        proxy=kept(context, "proxy", partial(_scores, proxy, prompts, ours.sampled)),
        proxy_sft=kept(context, "proxy-sft", partial(_scores, proxy, prompts, theirs.sampled)),
        gold=golds(params.judge, prompts, ours, theirs),
    )  # fmt: skip
    rows = table(compared)
    curve, found = best_of_n(compared, rows)
    reading.write_evaluation(outputs / "evaluation.parquet", rows)
    pd.DataFrame(curve).to_csv(outputs / "best_of_n.csv", index=False, lineterminator="\n")
    return compared, metrics(rows) | found


def measure(params: Params, inputs: dict[str, Path], context: StageContext, model: Path, evaluation: Path) -> None:
    """Ask another policy, such as today's champion, what `evaluate` asks, and write its columns of gold."""
    sft = inputs["sft"] / "model"
    prompts = held_out(params, inputs["data"], language_models.load_tokenizer(str(sft)), context)
    asked = ((model, "the champion"), (sft, "the SFT model"))
    judged = golds(params.judge, prompts, *(ask(params, prompts, place, what, context) for place, what in asked))
    reading.write_evaluation(evaluation, _names(prompts) | _gold_columns(judged, len(prompts)))


def golds(judge: judges.Judge, prompts: Sequence[Prompt], policy: Said, sft: Said) -> Golds | None:
    """What the judge says of all answers; None where a prompt has no reference and the judge needs one."""
    if judge == "overlap" and any(prompt.reference is None for prompt in prompts):
        return None
    every = (policy.sampled, sft.sampled, policy.greedy, sft.greedy)
    return Golds(
        *(
            [
                [judges.gold(judge, prompt.text, text, prompt.reference) for text in texts]
                for prompt, texts in zip(prompts, answers.texts, strict=True)
            ]
            for answers in every
        )
    )


def table(found: Compared) -> dict[str, list[Any]]:
    """One row a prompt, the means over its answers. `judged` is 1; 0 where nothing can judge, and so are the golds."""
    said = {"": found.policy.sampled, "_sft": found.sft.sampled}
    rows = _names(found.prompts) | _gold_columns(found.gold, len(found.prompts))
    rows |= {"proxy": _means(found.proxy), "proxy_sft": _means(found.proxy_sft)}
    ours, theirs = _means(found.policy.sampled.log_probabilities), _means(found.reference)
    rows["kl"] = [own - other for own, other in zip(ours, theirs, strict=True)]
    for name, answers in said.items():
        rows[f"tokens{name}"] = [fmean(map(len, ids)) for ids in answers.ids]
        rows[f"ended{name}"] = [fmean(ended) for ended in answers.ended]
        rows[f"distinct{name}"] = [len(set(texts)) / len(texts) for texts in answers.texts]
    return rows


def win_share(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Share of all pairs of one of ours and one of theirs in which ours is higher; a tie is one half."""
    return fmean((one > other) + (one == other) / 2 for one in ours for other in theirs)


def metrics(rows: dict[str, list[Any]]) -> dict[str, float]:
    """Means over the prompts; where a gate or a reader needs them, 95 % intervals over groups of prompts."""
    means = {
        "kl": "kl", "proxy": "proxy", "proxy_sft": "proxy_sft", "response_tokens": "tokens",
        "response_tokens_sft": "tokens_sft", "eos_share": "ended",
    }  # fmt: skip
    if all(rows["judged"]):
        means |= {name: name for name in ("gold", "gold_sft", "gold_greedy", "gold_greedy_sft")}
    found = {key: fmean(rows[column]) for key, column in means.items()}
    if all(rows["judged"]):
        gold, sft, wins = (np.array(rows[name]) for name in ("gold", "gold_sft", "wins"))
        intervals = {
            "gold_win_rate": statistics.bootstrap(wins, group=rows["group"]),
            "gold_gain": statistics.paired_bootstrap(gold, sft, group=rows["group"]),
        }
        for key, (estimate, low, high) in intervals.items():
            found |= {key: estimate, f"{key}_low": low, f"{key}_high": high}
    return found


def best_of_n(found: Compared, rows: dict[str, list[Any]]) -> tuple[list[dict[str, float]], dict[str, float]]:
    """The curve of best-of-n of the SFT model's own answers, and where it has the policy's KL.

    Adds the column `gold_best_of_n` to the rows: each prompt's gold of best-of-n at the policy's mean KL, which lies
    between two whole n: `best_of_n_at_equal_kl` and the gold are interpolated in KL. A KL that the largest n does not
    reach is not extrapolated: the largest n stands, and `best_of_n_reached` is 0.
    """
    scores = best_of_n_curve.curve(found.proxy_sft, found.proxy_sft)
    many = range(1, scores.shape[1] + 1)
    divergences = [best_of_n_curve.divergence(n) for n in many]
    columns: dict[str, Sequence[float]] = {"n": many, "kl": divergences, "proxy": scores.mean(axis=0).tolist()}
    told: dict[str, float] = {}
    rows["gold_best_of_n"] = [0.0] * len(found.prompts)
    if found.gold is not None:
        judged = best_of_n_curve.curve(found.proxy_sft, found.gold.sft)
        intervals = [statistics.bootstrap(column, group=rows["group"]) for column in judged.T]
        columns |= dict(zip(("gold", "gold_low", "gold_high"), zip(*intervals, strict=True), strict=True))
        kl = fmean(rows["kl"])
        rows["gold_best_of_n"] = [float(np.interp(kl, divergences, one)) for one in judged]
        told = {
            "best_of_n_gold_at_equal_kl": fmean(rows["gold_best_of_n"]),
            "best_of_n_at_equal_kl": float(np.interp(kl, divergences, many)),
            "best_of_n_reached": float(kl <= divergences[-1]),
        }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)], told


def _scores(proxy: Proxy, prompts: Sequence[Prompt], answers: Answers) -> Scores:
    """What the proxy says of all answers."""
    counts = [len(texts) for texts in answers.texts]
    asked = [prompt.text for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
    values = iter(proxy(asked, [text for texts in answers.texts for text in texts]))
    return [[float(next(values)) for _ in range(count)] for count in counts]


def _names(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    return {"id": [prompt.id for prompt in prompts], "group": [prompt.group for prompt in prompts]}


def _gold_columns(found: Golds | None, count: int) -> dict[str, list[Any]]:
    """Means over a prompt's answers, and its share of pairs won beside that of a coin; zeros for `count` prompts that
    nothing can judge.
    """
    if found is None:
        names = ("judged", "gold", "gold_sft", "wins", "chance", "gold_greedy", "gold_greedy_sft")
        return {name: [0.0] * count for name in names}
    return {
        "judged": [1.0] * count,
        "gold": _means(found.policy),
        "gold_sft": _means(found.sft),
        "wins": [win_share(ours, theirs) for ours, theirs in zip(found.policy, found.sft, strict=True)],
        "chance": [0.5] * count,
        "gold_greedy": _means(found.greedy),
        "gold_greedy_sft": _means(found.greedy_sft),
    }


def _means(scores: Scores) -> list[float]:
    return [fmean(one) for one in scores]
