"""What rankings say about themselves: how far labelers agree, and how much of them length alone explains.

Agreement is over pairs, as in InstructGPT (section 3.4: labelers agreed on 72.6 % of pairs): of two responses which
two labelers both put in an order, whether it is the same one. Kendall's tau-b is over whole rankings and knows ties
(Kendall, "The Treatment of Ties in Ranking Problems", 1945).

A pair's length verdict is by characters; two responses of one length are half a point either way, a coin's toss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple


class Counted(NamedTuple):
    """How many of so many pairs. `right` may be a half."""

    right: float
    pairs: int

    @property
    def share(self) -> float:
        """`right / pairs`; a half where there are no pairs."""
        return self.right / self.pairs if self.pairs else 0.5


def ordered_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """(better, worse) of every pair that is not tied, as numbers of responses."""
    return [
        (i, j) if ranks[i] < ranks[j] else (j, i) for i, j in combinations(range(len(ranks)), 2) if ranks[i] != ranks[j]
    ]


def agreement(rankings: Sequence[Sequence[int]]) -> Counted:
    """Pairs on which two labelers of one task agree, of those that both put in an order; over all pairs of labelers."""
    right = pairs = 0
    for first, second in combinations(rankings, 2):
        theirs = set(ordered_pairs(second))
        for better, worse in ordered_pairs(first):
            right += (better, worse) in theirs
            pairs += (better, worse) in theirs or (worse, better) in theirs
    return Counted(right, pairs)


def kendall_tau(tasks: Iterable[Sequence[Sequence[int]]]) -> float | None:
    """Mean tau-b over all pairs of labelers of all tasks; None where no two ranked the same.

    A ranking in which all is tied has no tau, and is left out.
    """
    from scipy.stats import kendalltau

    taus = [
        float(kendalltau(first, second).statistic)
        for rankings in tasks
        for first, second in combinations(rankings, 2)
        if len(set(first)) > 1 and len(set(second)) > 1
    ]
    return sum(taus) / len(taus) if taus else None


def longer_wins(responses: Sequence[str], ranks: Sequence[int]) -> Counted:
    """Pairs that are not tied in which the longer response is the better one."""
    right = 0.0
    pairs = ordered_pairs(ranks)
    for better, worse in pairs:
        difference = len(responses[better]) - len(responses[worse])
        right += 0.5 if difference == 0 else float(difference > 0)
    return Counted(right, len(pairs))


def total(counts: Iterable[Counted]) -> Counted:
    """The sum of counts."""
    found = list(counts)
    return Counted(sum(one.right for one in found), sum(one.pairs for one in found))


def length_only_accuracy(train: Counted, test: Counted) -> float:
    """Accuracy on `test` of the rule "the longer wins", or "the shorter wins", whichever does better on `train`."""
    return test.share if train.share >= 0.5 else 1.0 - test.share
