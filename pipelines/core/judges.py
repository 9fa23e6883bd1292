"""Gold judges: programs that say how good an answer is, so that over-optimisation can be measured against something.

Each looks at two aspects of an answer (numbers from 0 to 1), of which simulated labelers make their own mixtures
(`pipelines.core.labelers`); **gold** is one fixed mixture, without noise, that nothing is ever trained on.

| judge | aspects | gold | needs |
| --- | --- | --- | --- |
| `overlap` | chrF1 and ROUGE-L to the reference | their mean | an answer a person wrote |
| `slots` | attributes realised (`pipelines.core.slots`), brevity | attributes realised | attributes in the prompt |

`overlap` is blind to a good answer in other words, as every score against one reference is. Length does not pay:
both are F1. With the usual chrF, in which recall counts twice, the longer of two answers of a fine-tuned SmolLM2-135M
had the higher score in 68 % of the pairs; with chrF1 in 56 %. An empty answer is worth 0 under both judges.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pipelines.core import slots, text_scores
from pipelines.core.errors import DataError
from pipelines.core.faults import shown

Judge = Literal["overlap", "slots"]
LONG_WORDS = 60  # E2E's human answers: 22 words on average, 99 % have no more than 40, the longest 71


class Aspects(NamedTuple):
    """Two sides of an answer, each from 0 to 1: chrF and ROUGE-L, or attributes realised and brevity."""

    first: float
    second: float


def aspects(name: Judge, prompt: str, response: str, reference: str | None) -> Aspects:
    """What a judge looks at.

    Raises:
        DataError: `overlap` without a reference, `slots` with a prompt that lists no attributes.
    """
    if name == "overlap":
        if reference is None:
            raise DataError(
                f"judge: overlap needs a reference, and the prompt {shown(prompt)} has none. "
                "Give the prompts a column reference, or use labeler: file."
            )
        if not response:
            return Aspects(0.0, 0.0)
        return Aspects(text_scores.chrf(response, reference, beta=1), text_scores.rouge_l(response, reference))
    if not slots.asked(prompt):
        raise DataError(
            "judge: slots needs prompts that list attributes, such as name[Aromi], food[Chinese]; "
            f"found {shown(prompt)}"
        )
    return Aspects(
        slots.judge(prompt, response).score(),
        max(0.0, 1.0 - len(response.split()) / LONG_WORDS) if response else 0.0,
    )


def gold(name: Judge, prompt: str, response: str, reference: str | None) -> float:
    """How good an answer is, 0 to 1; raises as `aspects`."""
    return gold_of(name, aspects(name, prompt, response, reference))


def gold_of(name: Judge, found: Aspects) -> float:
    """Gold from what the judge looked at."""
    return (found.first + found.second) / 2 if name == "overlap" else found.first
