"""Section `reward`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pipelines.core.params.section import Share
from pipelines.core.params.tuning import MOVES_BASE, Tuning


class RewardParams(Tuning):
    """Stage `reward`."""

    REFUSED: ClassVar[dict[tuple[str, object], str]] = {
        ("lora_init", init): "stage ppo puts the adapter on the SFT model as it is, and this would take directions out "
        "of it; accepted: default, gaussian, orthogonal"
        for init in MOVES_BASE
    }

    seed: int = Field(ge=0)
    method: Literal["full", "last_n", "head", "lora"]
    rankings: int | None = Field(ge=1, description="most rankings to train on, chosen by hash of the id; null: all")
    epochs: int = Field(ge=1)
    batch_prompts: int = Field(ge=1, description="prompts an optimizer step, with all rankings of each")
    micro_tokens: int = Field(ge=16, description="tokens a forward pass; the rest is accumulated")
    max_length: int = Field(ge=16, description="tokens of a prompt with one response")
    too_long: Literal["refuse", "drop"]
    lr: float | None = Field(gt=0.0, lt=1.0, description="peak; null: from the width")
    warmup_share: Share
    weight_decay: float = Field(ge=0.0, lt=1.0)
    clip_norm: float = Field(gt=0.0)
    held_out_labelers: int = Field(ge=0, description="how many labelers are kept out of training, chosen by hash")
    eval_rankings: int | None = Field(ge=1, description="most held-out rankings to score; null: all")
    calibration_demonstrations: int = Field(ge=2, description="demonstrations whose mean reward becomes 0")
    checkpoint_steps: int = Field(ge=1)
    checkpoint_seconds: float = Field(gt=0.0)
    samples: int = Field(ge=0, le=32)

    @model_validator(mode="after")
    def _arithmetic(self) -> RewardParams:
        if self.rankings is not None and self.rankings < self.batch_prompts:
            raise ValueError(
                f"rankings ({self.rankings}) must be at least batch_prompts ({self.batch_prompts}): "
                "one optimizer step needs as many"
            )
        return self
