"""The mathematics of PPO for language models, as pure functions of tensors.

Tables are fp32 (N episodes, T tokens), padded on the right, with a bool mask; flat vectors are (tokens,). Schulman et
al., "Proximal Policy Optimization Algorithms" (2017); Schulman et al., "High-dimensional continuous control using
generalized advantage estimation" (2016); Ziegler et al., "Fine-tuning language models from human preferences" (2019);
Ouyang et al., "Training language models to follow instructions with human feedback" (2022).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

LARGEST_ERROR = 0.2  # of the adaptive controller, as a share of its target: Ziegler et al., section 2.2


class Estimates(NamedTuple):
    """What generalized advantage estimation gives, (N, T); 0 where there is no token."""

    advantages: torch.Tensor
    returns: torch.Tensor  # advantages + values: what the value model is fitted to


class PolicyLoss(NamedTuple):
    """Sums over tokens divided by `count`: parts of an optimizer step add up."""

    loss: torch.Tensor
    clip_fraction: torch.Tensor  # share of tokens whose ratio is beyond the clip
    approx_kl: torch.Tensor  # of the old policy from the new one, in nats a token (k3)


class ValueLoss(NamedTuple):
    """As `PolicyLoss`."""

    loss: torch.Tensor
    clip_fraction: torch.Tensor  # share of tokens whose clipped error is the larger


def k1(log_ratios: torch.Tensor) -> torch.Tensor:
    """KL(pi || ref), token by token, from tokens drawn from pi: unbiased, and negative for single tokens.

    Schulman, "Approximating KL divergence" (2020). `log_ratios`: log pi - log ref of the tokens, any shape.
    """
    return log_ratios


def k3(log_ratios: torch.Tensor) -> torch.Tensor:
    """The same, unbiased too, and never negative: ref / pi - 1 - log(ref / pi)."""
    return torch.expm1(-log_ratios) + log_ratios


def token_rewards(
    log_ratios: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, kl_coefficient: float
) -> torch.Tensor:
    """Reward of each token, (N, T): the KL penalty, and at an episode's last token its score (InstructGPT, eq. 2).

    Args:
        log_ratios: (N, T), log pi - log pi_ref of the sampled tokens.
        scores: (N,), rewards of whole responses.
        mask: (N, T) bool; every episode has a token, and none after the first gap.
    """
    rewards = torch.where(mask, -kl_coefficient * k1(log_ratios), 0.0)
    last = mask.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def leave_one_out(scores: torch.Tensor, group: int) -> torch.Tensor:
    """Each score less the mean of the others to the same prompt, (N,): a baseline that no action of its own moves.

    Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!" (2019); for language models Ahmadian et al., "Back
    to basics" (2024). The policy's gradient stays unbiased, and how easy a prompt is no longer is noise in it.

    Args:
        scores: (N,), prompt after prompt.
        group: responses of each prompt, at least 2.
    """
    of_prompts = scores.view(-1, group)
    others = (of_prompts.sum(dim=1, keepdim=True) - of_prompts) / (group - 1)
    return (of_prompts - others).flatten()


def gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, discount: float, trace: float) -> Estimates:
    """Advantages and returns; an episode ends with its last token, after which nothing is worth anything.

        delta_t = r_t + discount * V_(t+1) - V_t,    A_t = delta_t + discount * trace * A_(t+1)

    Args:
        rewards, values: (N, T); values of the state before each token.
        trace: lambda; 1 gives returns to go less values, 0 the one-step error.
    """
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    following = next_value = torch.zeros_like(rewards[:, 0])
    for step in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, step] + discount * next_value - values[:, step]
        following = torch.where(mask[:, step], delta + discount * trace * following, 0.0)
        advantages[:, step] = following
        next_value = values[:, step]
    return Estimates(advantages, torch.where(mask, advantages + values, 0.0))


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Shifted and scaled to mean 0 and (biased) variance 1 over all tokens of the whole batch, (N, T); 0 elsewhere."""
    known = values[mask]
    spread = known.var(correction=0).clamp(min=1e-8).sqrt()
    return torch.where(mask, (values - known.mean()) / spread, 0.0)


def policy_loss(new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, clip: float, count: int) -> PolicyLoss:
    """The clipped surrogate objective, negated: PPO, equation 7.

    Args:
        new, old: (tokens,), log-probabilities of the tokens now, with a gradient, and when they were drawn.
        advantages: (tokens,).
        count: tokens of the whole optimizer step, of which these may be a part.
    """
    log_ratio = new - old
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).sum() / count
    with torch.no_grad():
        beyond = ((ratio - 1).abs() > clip).sum() / count
        distance = (torch.expm1(log_ratio) - log_ratio).sum() / count
    return PolicyLoss(loss, beyond, distance)


def value_loss(new: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float, count: int) -> ValueLoss:
    """Half the squared error, or that of the value kept within `clip` of the old one if it is larger.

    As lm-human-preferences, the code of Ziegler et al. (2019). Shapes and `count` as in `policy_loss`.
    """
    near = old + (new - old).clamp(-clip, clip)
    plain, clipped = (new - returns).square(), (near - returns).square()
    loss = 0.5 * torch.maximum(plain, clipped).sum() / count
    return ValueLoss(loss, (clipped > plain).sum() / count)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over all tokens: 1 is perfect, 0 no better than a constant."""
    spread = float(returns[mask].var(correction=0))
    return 1.0 - float((returns - values)[mask].var(correction=0)) / spread if spread > 0 else 0.0


def line(values: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """Slope (at least 0) and intercept of the straight line through values that comes nearest to the targets.

    Least squares over all tokens. With them a value model that orders states well but has another scale explains what
    it can, and never less than a constant would.
    """
    known, wanted = values[mask].double(), targets[mask].double()
    spread = float(known.var(correction=0))
    slope = 0.0
    if spread > 0:
        slope = max(0.0, float(((known - known.mean()) * (wanted - wanted.mean())).mean()) / spread)
    return slope, float(wanted.mean()) - slope * float(known.mean())


def next_coefficient(coefficient: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The KL coefficient for the next iteration, so that `kl` comes to `target`: Ziegler et al. (2019), section 2.2.

    Args:
        kl, target: nats a response.
        horizon: episodes in which a steady error of 1 would multiply the coefficient by e, roughly.
        episodes: of this iteration.
    """
    error = min(max(kl / target - 1, -LARGEST_ERROR), LARGEST_ERROR)
    return coefficient * (1 + error * episodes / horizon)
