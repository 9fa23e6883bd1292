"""Direct preference optimization: a policy that is its own reward model.

Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" (2023), equation 7.
With the implicit reward of a response y to a prompt x, up to a constant of x,

    r(x, y) = beta * (log pi(y | x) - log pi_ref(y | x)),

the loss of a pair is -log sigmoid(r(better) - r(worse)). All pairs of a prompt's K responses are one batch element
(`preferences.k_way_loss`); K = 2 is the paper's case.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from pipelines.core import (
    cards,
    distributed,
    k_way,
    language_models,
    losses,
    preferences,
    reading,
    reward_evaluation,
    segments,
    statistics,
)
from pipelines.core.context import StageContext
from pipelines.core.preference_data import Ranking
from pipelines.core.preferences import Pair
from pipelines.core.reward_evaluation import Scores

if TYPE_CHECKING:
    from pipelines.core.reward_examples import Encoded


def log_probabilities(model: Any, batch: k_way.Responses, context: StageContext) -> torch.Tensor:
    """Log-probability of each response as a whole, (N,) fp32, in nats, EOS counted; with a gradient."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    _, head = language_models.body_and_head(inner)
    labels = batch.rows.labels.to(context.device)
    said = labels != losses.IGNORE
    hidden = segments.hidden_states(model, batch.rows, context)[said]
    return k_way.per_response(losses.token_log_probabilities(hidden, head, labels[said]).log_probabilities, batch)


def implicit_rewards(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """r above, (N,), from the log-probabilities of N responses."""
    return beta * (policy - reference)


class Step(NamedTuple):
    """Of an optimizer step, before its update; the loss is this process's share, the others of all."""

    loss: float
    accuracy: float  # share of the pairs in the right order
    margin: float  # mean gap of the implicit rewards, each prompt weighing the same


def accumulate(
    model: Any,
    batches: Seq[k_way.Responses],
    decided: Seq[Seq[Pair]],
    reference: Scores,
    beta: float,
    context: StageContext,
) -> Step:
    """Add a step's gradient, over the forward passes that fall to this process.

    Args:
        decided: of each of the step's prompts, its pairs.
        reference: of each of its responses, the log-probability under the SFT model.
    """
    world = context.world
    loss = correct = margin = 0.0
    for batch, weight in world.share(batches):
        ours = [decided[number] for number in batch.numbers]
        chosen = preferences.flat(ours, batch.sizes, len(decided)).to(context.device)
        known = torch.tensor([value for number in batch.numbers for value in reference[number]], device=context.device)
        rewards = implicit_rewards(log_probabilities(model, batch, context), known, beta)
        part = preferences.k_way_loss(rewards, chosen) * (weight * world.size)
        part.backward()  # type: ignore[no-untyped-call]
        loss += float(part.detach())
        gaps = rewards[chosen.better] - rewards[chosen.worse]
        margin += weight * float((gaps.detach() * chosen.weights).sum())
        correct += weight * sum(map(preferences.right, k_way.by_sequence(rewards, batch), ours))
    correct, margin = (distributed.mean_of(world, total * world.size) for total in (correct, margin))
    return Step(loss, correct / sum(map(len, decided)), margin)


def evaluate(
    held_out: Encoded,
    reference: Scores,
    beta: float,
    longer: bool,
    tokenizer: Any,
    outputs: Path,
    context: StageContext,
) -> dict[str, float]:
    """The model in `outputs / "model"` as a reward model: write `rankings.parquet`, give the metrics.

    Args:
        reference: log-probabilities of the held-out responses under the SFT model.
        longer: whether the length-only rule prefers the longer response.
    """
    kind = k_way.kind(context.device, held_out.sequences)
    model = language_models.load(str(outputs / "model"), context.dtype, kind).to(context.device).eval()
    tell = k_way.teller(context, "after training")
    said = k_way.log_probabilities(model, held_out.sequences, tokenizer.pad_token_id, context, tell)
    scores = [
        implicit_rewards(torch.tensor(ours), torch.tensor(theirs), beta).tolist()
        for ours, theirs in zip(said, reference, strict=True)
    ]
    rows = table(held_out.rankings, scores, longer)
    reading.write_evaluation(outputs / "rankings.parquet", rows)
    return metrics(rows)


def table(rankings: Seq[Ranking], scores: Scores, longer: bool) -> dict[str, list[Any]]:
    """Of each ranking: the pairs it decides, how many of them the scores, and length alone, put right; their gaps."""
    rows = reward_evaluation.counts(rankings, scores)
    lengths = reward_evaluation.length_only(rankings, longer)
    rows["right_length_only"] = reward_evaluation.counts(rankings, lengths)["right"]
    rows["gap"] = [
        sum(ours[better] - ours[worse] for better, worse in one.pairs)
        for one, ours in zip(rankings, scores, strict=True)
    ]
    return rows


def metrics(rows: dict[str, list[Any]]) -> dict[str, float]:
    """Share of held-out pairs that the implicit reward puts in the right order, with its 95 % interval over groups of
    prompts; that of length alone; and how far apart it puts them on average (`margin`).
    """
    pairs = np.array(rows["pairs"])
    accuracy = statistics.bootstrap(np.array(rows["right"]), pairs, group=rows["group"])
    return {
        "accuracy": accuracy.estimate,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "accuracy_length_only": float(sum(rows["right_length_only"]) / pairs.sum()),
        "margin": float(sum(rows["gap"]) / pairs.sum()),
        "pairs_test": float(pairs.sum()),
    }


def example(one: Ranking, sequence: segments.Sequence, tokenizer: Any) -> str:
    """A ranking as the loss sees it, for the terminal: of each response the tokens that are learned from."""
    tokens = list(zip(sequence.ids, sequence.labels, sequence.branches, strict=True))
    prompt = tokenizer.decode([token for token, _, branch in tokens if branch == 0])
    lines = [f"first ranking, {len(one.pairs)} pairs; the prompt, of which nothing is learned:"]
    lines.append(f"  {cards.inline(prompt[-600:])}")
    for branch, rank in enumerate(one.ranks, 1):
        learned = [label for _, label, own in tokens if own == branch and label != segments.UNSUPERVISED]
        lines.append(f"  rank {rank}: {cards.inline(tokenizer.decode(learned)[:200])}")
    return "\n".join(lines)
