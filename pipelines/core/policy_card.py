"""Pages for people beside a policy: its model card, and what it and the SFT model answer to held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.core import cards
from pipelines.core.policy_answers import Scores
from pipelines.core.policy_evaluation import Compared


def samples(found: Compared, count: int) -> str:
    """Answers of both models to the first `count` held-out prompts, with what gold and the proxy say of them.

    Greedy ones, which the proxy is not asked about, and the first sample of each.
    """
    lines = ["# Answers to held-out prompts, greedy and sampled"]
    policy, sft, gold = found.policy, found.sft, found.gold
    for number, prompt in enumerate(found.prompts[:count]):

        def line(who: str, text: str, score: Scores | None, proxy: Scores | None, number: int = number) -> str:
            both = (("gold", score), ("reward", proxy))
            told = ", ".join(f"{name} {scores[number][0]:.2f}" for name, scores in both if scores is not None)
            return f"- *{who}*{told and f' ({told})'}: {cards.inline(text)}"

        lines += [
            f"\n**Prompt:** {cards.inline(prompt.text)}\n",
            line("SFT, greedy", sft.greedy.texts[number][0], gold and gold.greedy_sft, None),
            line("policy, greedy", policy.greedy.texts[number][0], gold and gold.greedy, None),
            line("SFT, sampled", sft.sampled.texts[number][0], gold and gold.sft, found.proxy_sft),
            line("policy, sampled", policy.sampled.texts[number][0], gold and gold.policy, found.proxy),
        ]
        if prompt.reference is not None:
            lines.append(f"- *a person*: {cards.inline(prompt.reference)}")
    return "\n".join(lines) + "\n"


def card(model_type: str, how: str, metrics: Mapping[str, float]) -> str:
    """Model card, with the front matter the hub reads.

    Args:
        how: sentences that say how the policy was trained.
        metrics: of the stage; those of gold, and of a second arm, may be missing.
    """
    rows = [
        ("gold of samples at temperature 1", "gold", "gold_sft"),
        ("gold of greedy answers", "gold_greedy", "gold_greedy_sft"),
        ("reward of samples", "proxy", "proxy_sft"),
        ("tokens of samples", "response_tokens", "response_tokens_sft"),
    ]
    told = "".join(
        f"| {name} | {metrics[ours]:.3f} | {metrics[theirs]:.3f} |\n" for name, ours, theirs in rows if ours in metrics
    )
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# sluice-policy\n\n{model_type}, {metrics['parameters'] / 1e6:.1f} million parameters. {how}\n\n"
        f"| answers to {metrics['prompts_test']:,.0f} held-out prompts | this model | the SFT model |\n"
        f"| --- | --- | --- |\n{told}\n"
        f"{_gold(metrics)}KL from the SFT model: {metrics['kl']:.3f} nats a response. {metrics['eos_share']:.0%} of "
        f"the samples end by themselves. 95 % intervals by bootstrap over groups of prompts.\n\n{_tax(metrics)}\n\n"
        "It was trained to be preferred, not to be right, and states wrong things fluently.\n"
    )


def _gold(metrics: Mapping[str, float]) -> str:
    """Win rate, and the policy that costs no training; nothing where the prompts cannot be judged."""
    if "gold_win_rate" not in metrics:
        return ""
    far = "" if metrics["best_of_n_reached"] else ", the most there are, which does not reach it"
    return (
        f"A sample of it is better than one of the SFT model's in {metrics['gold_win_rate']:.1%} of the pairs "
        f"({metrics['gold_win_rate_low']:.1%} to {metrics['gold_win_rate_high']:.1%}). Best-of-n of the SFT model at "
        f"the same KL (n = {metrics['best_of_n_at_equal_kl']:.1f}{far}) has gold "
        f"{metrics['best_of_n_gold_at_equal_kl']:.3f}.\n\n"
    )


def _tax(metrics: Mapping[str, float]) -> str:
    """What it costs on ordinary text."""

    def told(key: str) -> str:
        return f"{metrics[key]:+.4f} ({metrics[f'{key}_low']:+.4f} to {metrics[f'{key}_high']:+.4f})"

    plain = ""
    if "alignment_tax_bits_without_ptx" in metrics:
        plain = f"; without pre-training gradients {told('alignment_tax_bits_without_ptx')}"
    if "without_ptx_stopped_after" in metrics:
        plain += f" when it was stopped, after iteration {metrics['without_ptx_stopped_after']:.0f}"
    return f"Alignment tax, in bits per byte of held-out text: {told('alignment_tax_bits')}{plain}."
