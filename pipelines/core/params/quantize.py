"""Section `quantize`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipelines.core.params.section import Section, Share

Variant = Literal["int8", "llm-int8", "dynamic-int8", "int4", "nf4", "gguf-f16", "gguf-q8_0", "gguf-q4_0"]
OfClassifier = Literal["int8", "int4"]  # the formats of ours: bitsandbytes' are made here of what continues text alone
CALIBRATED: tuple[Variant, ...] = ("int4", "nf4")


class Aware(Section):
    """Quantization-aware fine-tuning, for when rounding a trained model fails its gate; no variants: none."""

    variants: tuple[Literal["int8", "int4", "nf4"], ...] = Field((), description="which are fine-tuned")
    steps: int = Field(200, ge=1)
    batch_size: int = Field(4, ge=1, description="calibration rows an optimizer step")
    lr: float = Field(1.0e-5, gt=0.0, lt=1.0)
    warmup_share: Share = 0.1
    clip_norm: float = Field(1.0, gt=0.0)


class QuantizeParams(Section):
    """Stage `quantize`."""

    seed: int = Field(ge=0)
    model: str | None = Field(description="null: the policy of stage ppo; a directory or hub id")
    variants: tuple[Variant, ...] = Field(description="of the model")
    student_variants: tuple[Variant, ...] = Field(description="of the student of stage distill")
    reward_variants: tuple[OfClassifier, ...] = Field(description="of the reward model")
    keep_in_high_precision: tuple[str, ...] = Field(description="names or patterns of layers, such as *.down_proj")
    group_size: Literal[32, 64, 128] = Field(description="int4: weights of a row that share a scale")
    calibration_rows: int = Field(ge=1, description="chats and pieces of the corpus that int4 and nf4 are fitted to")
    calibration_length: int = Field(ge=16, description="tokens of such a row at most")
    calibrate: bool = Field(
        description="false: int4 and nf4 round to the nearest (docs/notes.md: 9 per cent of the bits)"
    )
    aware: Aware
    eval_bytes: int = Field(ge=1024, description="held-out UTF-8 bytes of the corpus scored")
    judge: Literal["overlap", "slots"] = Field(description="what gold is")
    eval_prompts: int = Field(ge=1, description="held-out prompts answered by each variant")
    eval_samples: int = Field(ge=1, description="samples a prompt, beside a greedy answer")
    max_new_tokens: int = Field(ge=1)
    max_prompt_tokens: int = Field(ge=1)
    too_long: Literal["refuse", "drop"]
    samples: int = Field(ge=0, le=32)

    @model_validator(mode="after")
    def _aware_of_what_is_made(self) -> QuantizeParams:
        for key in ("variants", "student_variants", "reward_variants"):
            named = getattr(self, key)
            if len(set(named)) < len(named):
                raise ValueError(f"{key}: each variant once (found {', '.join(named)})")
        absent = [name for name in self.aware.variants if name not in self.variants]
        if absent:
            raise ValueError(f"aware.variants: {', '.join(absent)} is none of variants ({', '.join(self.variants)})")
        return self
