"""The strategies of prompting that stage `prompts` compares, each a way to ask the same question.

Radford et al. (2019) and Brown et al. (2020) for zero-shot and few-shot; Kojima et al., "Large Language Models are
Zero-Shot Reasoners" (2022), for the chain of thought without examples; Wang et al. (2023) for self-consistency;
Lewis et al. (2020) for passages that were found for the question.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from pipelines.core.prompt_rendering import How

Name = Literal[
    "zero_shot", "few_shot", "few_shot_random", "few_shot_similar", "role", "chain_of_thought", "self_consistency",
    "retrieval", "tuned",
]  # fmt: skip
NAMES: tuple[Name, ...] = get_args(Name)
BASELINE: Name = "zero_shot"
SEARCH = "search"  # the cell of what the search found; not asked for by name


class Strategy(NamedTuple):
    """How a prompt is used."""

    words: str
    examples: How = "none"
    reasons: bool = False  # writes an answer, from which an option is taken; else the likeliest option is the answer
    votes: bool = False  # several sampled answers, the most frequent counts
    passages: bool = False


STRATEGIES: dict[str, Strategy] = {
    "zero_shot": Strategy("the question alone"),
    "few_shot": Strategy("the same answered examples before every question", "fixed"),
    "few_shot_random": Strategy("answered examples, drawn anew for each question", "random"),
    "few_shot_similar": Strategy("the answered examples that are most like the question", "similar"),
    "role": Strategy("a system text that says who answers"),
    "chain_of_thought": Strategy("reasons first, then the answer, which is taken out of the text", reasons=True),
    "self_consistency": Strategy("several sampled chains of thought, which vote", reasons=True, votes=True),
    "retrieval": Strategy("passages of the knowledge before the question", passages=True),
    "tuned": Strategy("a prompt that was found by search and kept", "given"),
    SEARCH: Strategy("instruction and examples found on the validation side", "given"),
}
