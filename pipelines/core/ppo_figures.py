"""What an iteration of PPO tells: the point it adds to the curves, and a page of its rollouts for a person."""

from __future__ import annotations

import torch

from pipelines.core import cards, judges, policy_gradient, slots
from pipelines.core.episodes import Episodes


def figures(found: Episodes, kl_coefficient: float, returns: torch.Tensor, judge: judges.Judge) -> dict[str, float]:
    """Means over the episodes of an iteration, before its updates. `reward` is the score less the KL penalty.

    `gold` is what the judge says, which nothing is trained on; only of prompts it can judge, and absent without any.
    `reward_spread` is how far the members of an ensemble are apart; absent where one reward alone scores.
    `kl` sums over a response's tokens and averages over responses; `kl_k3` is the same by the estimator that is
    never negative (Schulman, "Approximating KL divergence", 2020).

    Args:
        returns: (N, T).
    """
    mask = found.rollout.mask
    tokens = mask.sum(dim=1).float()
    ended = [end for of_prompt in found.rollout.ended for end in of_prompt]
    gold = [value for of_prompt in golds(found, judge) for value in of_prompt]
    return {
        "score": float(found.proxy.mean()),
        "reward": float(totals(found, kl_coefficient).mean()),
        **({} if found.spread is None else {"reward_spread": found.spread}),
        **({"gold": sum(gold) / len(gold)} if gold else {}),
        "kl": float(found.kl.mean()),
        "kl_k3": float(policy_gradient.k3(found.log_ratios).sum(dim=1).mean()),
        "entropy": float(found.entropies[mask].mean()),
        "response_tokens": float(tokens.mean()),
        "capped_share": 1.0 - sum(ended) / len(ended),
        "explained_variance": policy_gradient.explained_variance(found.values, returns, mask),
        "sampler_gap": float((found.rollout.sampled - found.old)[mask].abs().mean()),
    }


def golds(found: Episodes, judge: judges.Judge) -> list[list[float]]:
    """Gold scores of each prompt's responses; of prompts that the judge can judge."""
    return [
        [judges.gold(judge, prompt.text, response, prompt.reference) for response in responses]
        for prompt, responses in zip(found.rollout.prompts, found.rollout.responses, strict=True)
        if (prompt.reference is not None if judge == "overlap" else slots.asked(prompt.text))
    ]


def totals(found: Episodes, kl_coefficient: float) -> torch.Tensor:
    """Of each episode the score less the KL penalty: (N,)."""
    return found.scores - kl_coefficient * found.kl


def page(found: Episodes, kl_coefficient: float, count: int, title: str) -> str:
    """A few rollouts with score, KL and total (the score less the KL penalty), as Markdown."""
    lines = [f"# {title}"]
    earned = totals(found, kl_coefficient).tolist()
    first = 0
    for prompt, responses in list(zip(found.rollout.prompts, found.rollout.responses, strict=True))[:count]:
        lines.append(f"\n**Prompt:** {cards.inline(prompt.text)}\n")
        for number, response in enumerate(responses, first):
            told = f"score {found.scores[number]:+.3f}, KL {found.kl[number]:.3f}, total {earned[number]:+.3f}"
            lines.append(f"- {told}: {cards.inline(response)}")
        first += len(responses)
    return "\n".join(lines)
