"""Section `prompts`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipelines.core.params.section import Section
from pipelines.core.prompt_strategies import BASELINE, NAMES, Name


class Search(Section):
    """Search for instruction and examples on the validation side."""

    budget: int = Field(0, ge=0, description="questions asked at most; 0: no search")


class PromptsParams(Section):
    """Stage `prompts`."""

    seed: int = Field(ge=0)
    models: tuple[Literal["sft", "ppo"], ...] = Field(min_length=1, description="whose models are asked")
    tasks: tuple[str, ...] = Field(description="labelled tasks, and `generation`; []: all that the data have")
    strategies: tuple[Name, ...] = Field(description="rows of the matrix; zero_shot, the baseline, is always one")
    examples: int = Field(ge=1, description="answered examples before a question of the few-shot strategies")
    pool: int = Field(ge=1, description="training rows a task that examples are chosen from")
    eval_examples: int = Field(ge=2, description="validation rows a task: a cell of the matrix")
    test_examples: int = Field(ge=2, description="test rows a task, for what was chosen and for zero-shot")
    max_prompt_tokens: int = Field(ge=16, description="what does not fit loses examples, then passages")
    too_long: Literal["refuse", "drop"] = Field(description="drop: rows of more than half of it are passed over")
    max_new_tokens: int = Field(ge=1, description="of an answer that is written")
    votes: int = Field(ge=2, description="self_consistency: sampled answers a question")
    temperature: float = Field(gt=0.0, le=2.0, description="self_consistency: of the samples")
    passages: int = Field(ge=1, description="retrieval: passages a question")
    search: Search
    samples: int = Field(ge=0, le=32)

    @model_validator(mode="after")
    def _one_of_each(self) -> PromptsParams:
        for key, values in (("models", self.models), ("tasks", self.tasks), ("strategies", self.strategies)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: one is named twice in {list(values)}")
        if 0 < self.search.budget < self.eval_examples + 32:
            least = f"0 (no search), or at least {self.eval_examples + 32}: eval_examples for the last round, and 32"
            raise ValueError(f"search.budget: {self.search.budget}; accepted: {least}")
        if BASELINE not in self.strategies:
            raise ValueError(f"strategies: {BASELINE} is missing: the others are compared with it (of {list(NAMES)})")
        return self
