"""Section `sft`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.core.params.section import Share
from pipelines.core.params.tuning import Tuning


class SftParams(Tuning):
    """Stage `sft`."""

    seed: int = Field(ge=0)
    method: Literal["full", "last_n", "lora", "qlora"]
    kinds: tuple[str, ...] = Field(description="kinds of demonstrations to use; empty: all")
    examples: int | None = Field(ge=1, description="training demonstrations, chosen by hash of their id; null: all")
    epochs: int = Field(ge=1, le=100)
    batch_size: int = Field(ge=1, description="demonstrations an optimizer step")
    micro_tokens: int = Field(ge=16, description="tokens a forward pass; the rest is accumulated")
    max_length: int = Field(ge=16, description="longest chat, in tokens")
    too_long: Literal["refuse", "drop"]
    lr: float | None = Field(gt=0.0, lt=1.0, description="peak; null: from the width")
    warmup_share: Share
    weight_decay: float = Field(ge=0.0, lt=1.0)
    clip_norm: float = Field(gt=0.0)
    dropout: Share = Field(description="on what each block adds to the residual stream")
    validate_steps: int = Field(ge=1)
    eval_prompts: int = Field(ge=1, description="held-out prompts answered; as many for the validation loss")
    max_new_tokens: int = Field(ge=1)
    few_shot: int = Field(ge=0, le=32, description="demonstrations before the prompt, for the baseline")
    checkpoint_steps: int = Field(ge=1)
    checkpoint_seconds: float = Field(gt=0.0)
    samples: int = Field(ge=0, le=32)
