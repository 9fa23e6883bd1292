"""Simulated labelers: programs with tastes and slips that rank answers as InstructGPT's people did.

Nobody ranks the default run's answers, yet what people bring (labelers who differ, ties, noise, a gold opinion that
no one of them holds) is what the reward model has to be measured against. So each name in `labelers` is a person:

* a **taste**: what of an answer counts, a mixture of the judge's two aspects (`pipelines.core.judges`). Its weight is
  drawn by hash of the name: 0.2 to 0.8 of chrF against ROUGE-L, or 0.6 to 0.95 of attributes against brevity;
* **slips**: an error drawn by hash of (name, prompt's id, response) from a normal distribution, whose deviation,
  `SLIP` of the scale's seven points, is scaled by 0.75 to 1.25, drawn by hash of the name. The same labeler sees the
  same answer the same way, so identical answers tie. With 0.25 two labelers agree on 97 % of the pairs of a fine-tuned
  SmolLM2-135M's answers (0.5: 84 %, 0.65: 76 %, 0.8: 73 %), people on 72.6 and 77.3 % (InstructGPT, section 3.4): with
  slips like people's, a reward model needs the thousands of rankings that a default run cannot afford;
* the paper's **Likert scale**: whole points from 1 to 7 (InstructGPT, section 3.6). Answers with the same point tie.

The taste is stretched before it is rounded (square root of an overlap, which is mostly low): people use the whole
of a scale. Everything is a function of names and texts: no state, no random generator, no order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

from pipelines.core.comparisons import ranks_of_scores
from pipelines.core.judges import Aspects, Judge

POINTS = 7
SLIP = 0.25
WEIGHTS: dict[Judge, tuple[float, float]] = {"overlap": (0.2, 0.8), "slots": (0.6, 0.95)}


class Labeler(NamedTuple):
    """A simulated person."""

    name: str
    weight: float  # of the judge's first aspect
    slip: float  # standard deviation, in points of the Likert scale


def labeler(name: str, judge: Judge) -> Labeler:
    """The person behind a name."""
    low, high = WEIGHTS[judge]
    weight = low + (high - low) * drawn("taste", judge, name)
    return Labeler(name, weight, SLIP * (0.75 + 0.5 * drawn("slip", name)))


def rank(who: Labeler, judge: Judge, prompt_id: str, responses: Sequence[str], seen: Sequence[Aspects]) -> list[int]:
    """Dense ranks of a prompt's answers as a labeler grades them."""
    graded = [points(who, judge, prompt_id, *answer) for answer in zip(responses, seen, strict=True)]
    return ranks_of_scores(graded, who.name)


def points(who: Labeler, judge: Judge, prompt_id: str, response: str, seen: Aspects) -> int:
    """The Likert point that a labeler gives to an answer, 1 to 7."""
    liked = who.weight * seen.first + (1 - who.weight) * seen.second
    stretched = math.sqrt(liked) if judge == "overlap" else liked
    slip = NormalDist(0.0, who.slip).inv_cdf(drawn("answer", who.name, prompt_id, response))
    return min(POINTS, max(1, round(1 + (POINTS - 1) * stretched + slip)))


def assigned(names: Sequence[str], prompt_id: str, shared_share: float, seed: int) -> list[str]:
    """Who ranks a prompt's answers: one of `names` by hash, or, for a share of the prompts, all of them."""
    if drawn("shared", str(seed), prompt_id) < shared_share:
        return list(names)
    return [names[int(drawn("labeler", str(seed), prompt_id) * len(names))]]


def drawn(*key: str) -> float:
    """A number in (0, 1) that belongs to a key."""
    digest = hashlib.blake2b("\0".join(key).encode("utf-8", "surrogatepass"), digest_size=7).digest()
    return (int.from_bytes(digest) + 0.5) / 2**56
