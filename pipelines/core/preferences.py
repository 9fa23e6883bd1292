"""Who beats whom in a ranking, and the loss that teaches it: Bradley-Terry over all pairs of K responses.

Ouyang et al., "Training language models to follow instructions with human feedback" (2022), section 3.5:

    loss = - 1 / C(K, 2) * sum over pairs of log sigmoid(reward of the better - reward of the worse)

All pairs of one ranking are one batch element, whatever K: a response takes part in K - 1 pairs, and as separate
examples they would make one epoch into K - 1. Tied pairs are dropped, and the mean is over the pairs that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

Pair = tuple[int, int]  # number of the better response, number of the worse one


class Pairs(NamedTuple):
    """The pairs of several rankings over one flat vector of rewards. Shapes (P,)."""

    better: torch.Tensor  # int64: where the better one's reward stands
    worse: torch.Tensor
    weights: torch.Tensor  # fp32: what the pair counts; a ranking's pairs share its part of the mean evenly

    def to(self, device: str) -> Pairs:
        """The same, on a device."""
        return Pairs(*(part.to(device) for part in self))


def pairs(ranks: Sequence[float], responses: Sequence[str] | None = None) -> list[Pair]:
    """Every pair that a ranking decides: ties are left out, and so are identical texts that were ranked apart.

    Args:
        ranks: 1 is best; ties share a rank.
        responses: the texts, where there are any to compare.
    """
    return [
        (better, worse)
        for better, high in enumerate(ranks)
        for worse, low in enumerate(ranks)
        if high < low and (responses is None or responses[better] != responses[worse])
    ]


def flat(decided: Sequence[Sequence[Pair]], sizes: Sequence[int], rankings: int) -> Pairs:
    """Pairs of several rankings, for `k_way_loss`.

    Args:
        decided: of each ranking its pairs.
        sizes: of each ranking its number of responses; their rewards follow one another in this order.
        rankings: number that the mean is over: of the whole optimizer step, where this is a part of it.

    Raises:
        ValueError: a ranking decides nothing; it would count in the mean and teach nothing.
    """
    import torch

    better: list[int] = []
    worse: list[int] = []
    weights: list[float] = []
    start = 0
    for number, (ours, size) in enumerate(zip(decided, sizes, strict=True)):
        if not ours:
            raise ValueError(f"ranking {number} has no pair that is not tied")
        better += [start + one for one, _ in ours]
        worse += [start + other for _, other in ours]
        weights += [1.0 / (len(ours) * rankings)] * len(ours)
        start += size
    return Pairs(torch.tensor(better), torch.tensor(worse), torch.tensor(weights))


def k_way_loss(rewards: torch.Tensor, chosen: Pairs) -> torch.Tensor:
    """The loss above in nats, over the rankings of `chosen`: a scalar.

    Args:
        rewards: (N,), one a response.
        chosen: as `flat` makes them; all weights of an optimizer step add up to 1.
    """
    from torch.nn.functional import logsigmoid

    gaps = rewards[chosen.better] - rewards[chosen.worse]
    return -(logsigmoid(gaps) * chosen.weights).sum()


def right(scores: Sequence[float], decided: Sequence[Pair]) -> float:
    """How many pairs a score puts in the right order; a pair it cannot tell apart counts one half."""
    return sum(
        0.5 if scores[better] == scores[worse] else float(scores[better] > scores[worse]) for better, worse in decided
    )
