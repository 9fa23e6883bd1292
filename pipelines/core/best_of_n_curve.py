"""Best-of-n: what the gold judge thinks of the response that the reward model likes best among n.

The cheapest policy a reward model can make, and the one whose distance from its origin is known in closed form:
KL = log n - (n - 1) / n (Stiennon et al., "Learning to summarize from human feedback", 2020, appendix G.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def expected_gold(proxy: Sequence[float], gold: Sequence[float], n: int) -> float:
    """Gold score of the best by `proxy` of n responses, expected over all ways to draw n of the N there are.

    The unbiased estimator of Nakano et al., "WebGPT" (2021), appendix I, used by Gao et al., "Scaling laws for reward
    model overoptimization" (2022): with the responses in ascending order of the proxy, the i-th is the best of
    a draw in C(i - 1, n - 1) of C(N, n) cases. Responses that the proxy cannot tell apart share their gold.

    Raises:
        ValueError: n is not within 1..N.
    """
    total = len(proxy)
    if not 1 <= n <= total:
        raise ValueError(f"best of {n} needs as many responses, there are {total}")
    score, value = np.asarray(proxy, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    order = np.argsort(score, kind="stable")
    _, tied = np.unique(score[order], return_inverse=True)
    shared = np.bincount(tied, value[order]) / np.bincount(tied)
    ways = np.array([math.comb(place, n - 1) for place in range(total)], dtype=np.float64) / math.comb(total, n)
    return float(ways @ shared[tied])


def curve(proxy: Sequence[Sequence[float]], gold: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """`expected_gold` of each prompt (rows) for n = 1, 2, ... up to the fewest responses any prompt has (columns)."""
    most = min(len(one) for one in proxy)
    return np.array(
        [[expected_gold(ours, theirs, n) for n in range(1, most + 1)] for ours, theirs in zip(proxy, gold, strict=True)]
    )


def divergence(n: int) -> float:
    """KL of best-of-n from the policy it draws from, in nats."""
    return math.log(n) - (n - 1) / n
