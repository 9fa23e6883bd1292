"""Section `pretrain`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipelines.core.params.section import Share
from pipelines.core.params.tuning import Tuning


class PretrainParams(Tuning):
    """Stage `pretrain`."""

    seed: int = Field(ge=0)
    base: str | None = Field(description="as in tokenizer.base; null: random weights")
    architecture: str = Field(description="base: null: a decoder-only model type of transformers")
    depth: int = Field(ge=1, le=96, description="base: null: layers; width, heads, lr and steps follow from it")
    tokens_per_parameter: float = Field(gt=0.0, description="base: null and tokens: null: length of the run")
    method: Literal["full", "last_n", "lora", "qlora"]
    tokens: int | None = Field(ge=1, description="training tokens; null: tokens_per_parameter x parameters")
    sequence_length: int = Field(ge=16)
    batch_tokens: int = Field(ge=16, description="tokens an optimizer step")
    micro_batch: int = Field(ge=1, description="sequences a forward pass; the rest is accumulated")
    lr: float | None = Field(gt=0.0, lt=1.0, description="peak; null: from the width")
    warmup_share: Share
    weight_decay: float = Field(ge=0.0, lt=1.0)
    clip_norm: float = Field(gt=0.0)
    eval_bytes: int = Field(ge=1024, description="held-out UTF-8 bytes scored before and after training")
    checkpoint_steps: int = Field(ge=1)
    checkpoint_seconds: float = Field(gt=0.0)
    snapshots: int = Field(ge=0, le=64, description="earlier states to keep, evenly, and the start; 0: none")
    samples: int = Field(ge=0, le=32)

    @model_validator(mode="after")
    def _arithmetic(self) -> PretrainParams:
        step = self.sequence_length * self.micro_batch
        if self.batch_tokens % step:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) must be a multiple of sequence_length * micro_batch ({step})"
            )
        if self.base is None and self.method != "full":
            raise ValueError(
                f"method: {self.method} needs a base model; random weights (base: null) are trained in full"
            )
        if self.snapshots and self.tuning.lora_variant == "dora":
            raise ValueError(
                f"snapshots: {self.snapshots}; they need adapters that add to the weights, which tuning.lora_variant: "
                "dora also scales; accepted with it: 0"
            )
        if self.base is not None and self.tokens is None:
            raise ValueError("tokens: null derives the run's length from depth, which needs base: null")
        return self
