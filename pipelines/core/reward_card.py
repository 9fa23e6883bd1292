"""Pages for people beside a reward model: its card, and what it made of held-out answers."""

from __future__ import annotations

import collections.abc
from typing import TYPE_CHECKING, Any

from pipelines.core.params.reward import RewardParams
from pipelines.core.preference_data import Ranking

if TYPE_CHECKING:
    from pipelines.core.segments import Sequence


def samples(
    rankings: collections.abc.Sequence[Ranking], scores: collections.abc.Sequence[collections.abc.Sequence[float]]
) -> str:
    """Held-out prompts with their responses from the best to the worst by reward, each with its given rank."""
    parts = ["# Held-out rankings, best reward first", ""]
    for one, ours in zip(rankings, scores, strict=True):
        order = sorted(range(len(ours)), key=lambda number: -ours[number])
        parts += [f"**Prompt:** {_inline(one.prompt)}", "", "| reward | rank given | response |", "| --- | --- | --- |"]
        parts += [f"| {ours[n]:+.2f} | {one.ranks[n]} | {_inline(one.responses[n])} |" for n in order] + [""]
    return "\n".join(parts)


def example(one: Ranking, sequence: Sequence, tokenizer: Any) -> str:
    """A ranking as the loss sees it, for the terminal."""
    shared = [token for token, branch in zip(sequence.ids, sequence.branches, strict=True) if branch == 0]
    ranked = sorted(zip(one.ranks, one.responses, strict=True))
    listed = "\n".join(f"  rank {rank}: {_inline(text[:200])}" for rank, text in ranked)
    return (
        f"first ranking: {len(sequence.ids)} tokens with the prompt once, {len(ranked)} responses, {len(one.pairs)} "
        f"pairs; a reward is read at each response's {tokenizer.eos_token}:\n  "
        f"{_inline(tokenizer.decode(shared)[-600:])}\n{listed}"
    )


def card(params: RewardParams, model: Any, metrics: dict[str, float]) -> str:
    """Model card, with the front matter the hub reads."""
    how = params.words(where="") + (", and the head" if params.method in ("lora", "last_n") else "")
    unseen = "".join(
        f"| ... of labelers it has not seen | {metrics['accuracy_held_out_labelers']:.3f} "
        f"({metrics['accuracy_held_out_labelers_low']:.3f} to {metrics['accuracy_held_out_labelers_high']:.3f}) |\n"
        for _ in range("accuracy_held_out_labelers" in metrics)
    )
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-classification\n---\n\n"
        f"# sluice-reward\n\n{model.config.model_type}, {metrics['parameters'] / 1e6:.1f} million parameters, "
        "one label: the reward of a response, read at the EOS after prompt and response in the tokenizer's chat "
        "template. "
        f"Trained from the SFT model: {how}, on {metrics['comparisons_train']:,.0f} rankings "
        f"({metrics['pairs_train']:,.0f} pairs, {metrics['steps']:.0f} steps).\n\n"
        "| pairs of held-out prompts in the right order | |\n| --- | --- |\n"
        f"| this model | {metrics['accuracy']:.3f} "
        f"({metrics['accuracy_low']:.3f} to {metrics['accuracy_high']:.3f}) |\n{unseen}"
        f"| length alone | {metrics['accuracy_length_only']:.3f} |\n"
        f"| the SFT model's mean log-probability | {metrics['accuracy_log_probability']:.3f} |\n\n"
        f"{metrics['pairs_test']:,.0f} pairs of {metrics['prompts_test']:,.0f} prompts; 95 % intervals by bootstrap "
        f"over prompts. Expected calibration error {metrics['ece']:.3f}.\n\n"
        f"transformers gives the raw reward. `config.json` holds `reward_mean` ({metrics['reward_mean']:.4f}), what "
        "human-written demonstrations score on average: taken off, 0 is their level. `reward_std` "
        f"({metrics['reward_std']:.4f}) is their spread. Rewards compare responses to one prompt, not prompts.\n"
    )


def _inline(text: str) -> str:
    """A text on one line, as code that a table cell can hold."""
    return "`" + text.replace("\n", "⏎").replace("`", "'").replace("|", "¦") + "`"
