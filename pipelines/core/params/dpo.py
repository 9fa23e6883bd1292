"""Section `dpo`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pipelines.core.params.section import Share
from pipelines.core.params.tuning import Tuning


class DpoParams(Tuning):
    """Stage `dpo`."""

    REFUSED: ClassVar[dict[tuple[str, object], str]] = {
        ("lora_dropout", None): "dpo never drops anything: both models of the ratio must read alike; leave it out",
    }

    seed: int = Field(ge=0)
    method: Literal["full", "last_n", "lora"]
    rankings: int | None = Field(ge=1, description="most rankings to train on, chosen by hash of the id; null: all")
    epochs: int = Field(ge=1)
    batch_prompts: int = Field(ge=1, description="prompts with their responses an optimizer step")
    micro_tokens: int = Field(ge=16, description="tokens a forward pass; the rest is accumulated")
    max_length: int = Field(ge=16, description="tokens of a prompt with one response")
    too_long: Literal["refuse", "drop"]
    beta: float = Field(gt=0.0, allow_inf_nan=False, description="what a nat away from the SFT model costs")
    lr: float | None = Field(gt=0.0, lt=1.0, description="peak; null: from the width")
    warmup_share: Share
    weight_decay: float = Field(ge=0.0, lt=1.0)
    clip_norm: float = Field(gt=0.0)
    judge: Literal["overlap", "slots"] = Field(description="what gold is; nothing is trained on it")
    eval_rankings: int | None = Field(ge=1, description="most held-out rankings to score; null: all")
    eval_prompts: int = Field(ge=1, description="held-out prompts answered")
    eval_samples: int = Field(ge=2, description="samples a held-out prompt; also N of best-of-N")
    eval_bytes: int = Field(ge=1024, description="held-out UTF-8 bytes of the corpus, for the alignment tax")
    max_new_tokens: int = Field(ge=1)
    max_prompt_tokens: int = Field(ge=1)
    checkpoint_steps: int = Field(ge=1)
    checkpoint_seconds: float = Field(gt=0.0)
    samples: int = Field(ge=0, le=32)

    @model_validator(mode="after")
    def _arithmetic(self) -> DpoParams:
        if self.rankings is not None and self.rankings < self.batch_prompts:
            raise ValueError(
                f"rankings ({self.rankings}) must be at least batch_prompts ({self.batch_prompts}): "
                "one optimizer step needs as many"
            )
        return self
