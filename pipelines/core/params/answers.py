"""Section `answers`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipelines.core.params.section import Section


class AnswersParams(Section):
    """Stage `answers`."""

    seed: int = Field(ge=0)
    models: tuple[str, ...] = Field(
        min_length=1, description="base, sft, ppo, student, or variants of stage quantize, such as int8"
    )
    style: Literal["plain", "instructed"] = Field(description="how a question is put (core/grounding.py)")
    passages: int = Field(ge=1, le=50, description="passages looked up for a question")
    budget: int = Field(ge=32, description="tokens of all of them in the prompt")
    kinds: tuple[str, ...] = Field(description="kinds of queries that are asked; empty: all that have answers")
    questions: int = Field(
        ge=1, description="held-out questions asked, each with passages, without, and with the right one"
    )
    validation_questions: int = Field(ge=1, description="questions by which the assistant's model is chosen")
    unanswerable: int = Field(ge=1, description="held-out questions that nothing answers")
    max_new_tokens: int = Field(ge=1)
    too_long: Literal["refuse", "drop"] = Field(description="questions that do not fit into a model's context")
    samples: int = Field(ge=0, le=32)

    @model_validator(mode="after")
    def _each_once(self) -> AnswersParams:
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"models: each model once (found {', '.join(self.models)})")
        return self
