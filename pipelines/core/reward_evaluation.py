"""What a reward model's scores of held-out rankings come to: rows, accuracies, calibration, best-of-n."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.core import best_of_n_curve, calibration, chats, k_way, segments, statistics
from pipelines.core.errors import DataError
from pipelines.core.preference_data import Ranking, shown_first
from pipelines.core.preferences import pairs, right

Scores = Sequence[Sequence[float]]  # of each ranking, of each response


class Samples(NamedTuple):
    """Responses of the SFT model to held-out prompts, with a gold judge's opinion of each."""

    groups: list[str]
    prompts: list[str]
    responses: list[list[str]]
    gold: list[list[float]]
    sequences: list[segments.Sequence]


def counts(rankings: Sequence[Ranking], scores: Scores) -> dict[str, list[Any]]:
    """Of each ranking the pairs it decides, and how many of them the scores put in the right order."""
    return {
        "id": [one.id for one in rankings],
        "group": [one.group for one in rankings],
        "pairs": [float(len(one.pairs)) for one in rankings],
        "right": [right(ours, one.pairs) for one, ours in zip(rankings, scores, strict=True)],
    }


def table(
    rankings: Sequence[Ranking], scores: Scores, log_probabilities: Scores, longer: bool, unseen: frozenset[str]
) -> dict[str, list[Any]]:
    """`counts`, those of the baselines, and the same once more for labelers that training has not seen (else 0).

    Args:
        longer: whether the length-only rule prefers the longer response.
    """
    rows = counts(rankings, scores)
    length = length_only(rankings, longer)
    rows["right_length_only"] = counts(rankings, length)["right"]
    rows["right_log_probability"] = counts(rankings, log_probabilities)["right"]
    rows["right_chance"] = [count / 2 for count in rows["pairs"]]
    for name in ("pairs", "right", "right_length_only", "right_chance"):
        kept = zip(rankings, rows[name], strict=True)
        rows[name.replace("pairs", "pairs_unseen").replace("right", "right_unseen")] = [
            value if one.labeler in unseen else 0.0 for one, value in kept
        ]
    return rows


def length_only(rankings: Sequence[Ranking], longer: bool) -> list[list[float]]:
    """Scores of the rule that knows nothing but the number of characters."""
    sign = 1.0 if longer else -1.0
    return [[sign * len(text) for text in one.responses] for one in rankings]


def accuracies(rows: dict[str, list[Any]]) -> dict[str, float]:
    """Shares of pairs in the right order, with 95 % intervals over groups of prompts."""
    pairs_, groups = np.array(rows["pairs"]), rows["group"]
    ours = statistics.bootstrap(np.array(rows["right"]), pairs_, group=groups)
    found = {
        "accuracy": ours.estimate,
        "accuracy_low": ours.low,
        "accuracy_high": ours.high,
        "accuracy_length_only": sum(rows["right_length_only"]) / pairs_.sum(),
        "accuracy_log_probability": sum(rows["right_log_probability"]) / pairs_.sum(),
        "pairs_test": float(pairs_.sum()),
    }
    kept = np.flatnonzero(rows["pairs_unseen"])
    if len(kept):
        values, weight = (np.array(rows[name])[kept] for name in ("right_unseen", "pairs_unseen"))
        unseen = statistics.bootstrap(values, weight, group=[groups[place] for place in kept])
        found |= {
            "accuracy_held_out_labelers": unseen.estimate,
            "accuracy_held_out_labelers_low": unseen.low,
            "accuracy_held_out_labelers_high": unseen.high,
        }
    return found


def by(
    name: str, key: Callable[[Ranking, int, int], int], rankings: Sequence[Ranking], scores: dict[str, Scores]
) -> list[dict[str, Any]]:
    """Accuracy of each of several scores over the pairs with the same key, such as the distance of their ranks.

    Args:
        key: of a ranking, the better and the worse response.
    """
    found: dict[int, dict[str, Any]] = {}
    for number, one in enumerate(rankings):
        for pair in one.pairs:
            row = found.setdefault(key(one, *pair), {"pairs": 0} | dict.fromkeys(scores, 0.0))
            row["pairs"] += 1
            for score, values in scores.items():
                row[score] += right(values[number], [pair])
    shares = {value: {score: row[score] / row["pairs"] for score in scores} for value, row in found.items()}
    return [{name: value, "pairs": found[value]["pairs"], **shares[value]} for value in sorted(found)]


def reliability(rankings: Sequence[Ranking], scores: Scores) -> list[calibration.Bin]:
    """The reliability curve over all pairs, which of them comes first being drawn by hash."""
    first, second, won = [], [], []
    for one, ours in zip(rankings, scores, strict=True):
        for pair in one.pairs:
            shown = shown_first(one, pair)
            first.append(ours[shown])
            second.append(ours[pair[0] + pair[1] - shown])
            won.append(float(shown == pair[0]))
    return calibration.reliability(calibration.probabilities(first, second), np.array(won))


def read_samples(feedback: Path, tokenizer: Any) -> Samples | None:
    """Samples with gold scores, where the feedback has them.

    Raises:
        DataError: a prompt has not one gold score for each response.
    """
    import pyarrow.parquet as pq

    place = feedback / "samples" / "test.parquet"
    if not place.exists():
        return None
    rows = pq.read_table(place, columns=["id", "group", "prompt", "responses", "gold"]).to_pylist()
    wrong = [row["id"] for row in rows if not row["responses"] or len(row["responses"]) != len(row["gold"] or ())]
    if wrong or not rows:
        told = f"row {wrong[0]!r} has not one gold score for each response" if wrong else "no rows"
        raise DataError(f"samples/{place.name}: {told}. Make it again with: dvc repro feedback")
    encoded = [k_way.encode(tokenizer, chats.messages_of(row["prompt"]), row["responses"]) for row in rows]
    groups, prompts, responses, gold = (
        [row[name] for row in rows] for name in ("group", "prompt", "responses", "gold")
    )
    return Samples(groups, prompts, responses, gold, encoded)


def write_curves(
    outputs: Path, rankings: Sequence[Ranking], scores: Scores, log_probabilities: Scores, longer: bool
) -> dict[str, float]:
    """Write `calibration.csv`, `by_k.csv` and `by_margin.csv`; the calibration error as a metric."""
    bins = reliability(rankings, scores)
    write_csv(outputs / "calibration.csv", [one._asdict() for one in bins])
    columns = {
        "accuracy": scores,
        "accuracy_length_only": length_only(rankings, longer),
        "accuracy_log_probability": log_probabilities,
    }
    k = by("k", lambda one, better, worse: len(one.responses), rankings, columns)
    margin = by("rank_distance", lambda one, better, worse: one.ranks[worse] - one.ranks[better], rankings, columns)
    write_csv(outputs / "by_k.csv", k)
    write_csv(outputs / "by_margin.csv", margin)
    return {"ece": calibration.expected_calibration_error(bins)}


def best_of_n(outputs: Path, samples: Samples, scores: Scores) -> dict[str, float]:
    """Write `best_of_n.csv`, and give its ends."""
    rows, found = best(samples, scores)
    write_csv(outputs / "best_of_n.csv", rows)
    return found


def best(samples: Samples, scores: Scores) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The best-of-n curve under gold, and its ends as metrics; with them, pairwise accuracy against gold.

    The oracle picks by gold itself; best-of-1 is a response drawn blindly.
    """
    ours, oracle = best_of_n_curve.curve(scores, samples.gold), best_of_n_curve.curve(samples.gold, samples.gold)
    rows = []
    for place in range(ours.shape[1]):
        gold = statistics.bootstrap(ours[:, place], group=samples.groups)
        ends = {"gold": gold.estimate, "gold_low": gold.low, "gold_high": gold.high}
        rows.append(
            {"n": place + 1, "kl": best_of_n_curve.divergence(place + 1), **ends, "oracle": oracle[:, place].mean()}
        )
    found = {
        "best_of_n_gold": rows[-1]["gold"],
        "best_of_1_gold": rows[0]["gold"],
        "best_of_n_oracle_gold": float(rows[-1]["oracle"]),
    }
    decided = [
        pairs([-value for value in gold], responses)
        for gold, responses in zip(samples.gold, samples.responses, strict=True)
    ]
    if total := sum(map(len, decided)):
        found["accuracy_gold"] = sum(map(right, scores, decided)) / total
    return rows, found


def write_csv(place: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows of the same columns; an empty cell where there is no number."""
    listed = list(rows)
    with place.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(listed[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(listed)
