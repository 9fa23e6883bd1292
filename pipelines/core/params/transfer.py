"""Section `transfer`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipelines.core.params.section import Share
from pipelines.core.params.tuning import Tuning


class TransferParams(Tuning):
    """Stage `transfer`."""

    seed: int = Field(ge=0)
    tasks: tuple[str, ...] = Field(description="tasks to learn; empty: all tables of the data")
    transferred_layers: int | None = Field(ge=1, description="keep the first so many blocks of the base; null: all")
    auxiliary: float = Field(lt=float("inf"), description="weight of the language-model loss; 0: none")
    dropout: Share = Field(description="on what the linear head reads")
    examples: int | None = Field(ge=1, description="training rows a task, chosen by hash of the id; null: all")
    eval_examples: int | None = Field(ge=1, description="most validation rows, and most test rows; null: all")
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1, description="examples an optimizer step")
    micro_tokens: int = Field(ge=16, description="tokens a forward pass; the rest is accumulated")
    max_length: int = Field(ge=16, description="tokens of a sequence, the three special ones included")
    lr: float | None = Field(gt=0.0, lt=1.0, description="peak; null: from the width")
    warmup_share: Share
    weight_decay: float = Field(ge=0.0, lt=1.0)
    clip_norm: float = Field(gt=0.0)
    seeds: int = Field(ge=1, description="runs of each task; the median is reported")
    ablations: tuple[Literal["auxiliary", "random", "layers", "zero_shot"], ...]
    checkpoint_steps: int = Field(ge=1)
    checkpoint_seconds: float = Field(gt=0.0)
    samples: int = Field(ge=0, le=32)

    @field_validator("auxiliary")
    @classmethod
    def _weight(cls, value: float) -> float:
        if not value >= 0:
            raise ValueError("a weight of at least 0 is needed (0: no language-model loss; GPT-1: 0.5)")
        return value

    @model_validator(mode="after")
    def _arithmetic(self) -> TransferParams:
        if self.auxiliary > 0 and self.method == "head":
            raise ValueError(f"auxiliary ({self.auxiliary}): head trains no language model: set transfer.auxiliary: 0")
        kept, trained = self.transferred_layers, self.tuning.layers  # only method last_n has the latter
        if kept is not None and trained is not None and trained > kept:
            raise ValueError(
                f"tuning.layers ({trained}) must be at most transferred_layers ({kept}), the blocks that are kept"
            )
        if "auxiliary" in self.ablations and self.auxiliary == 0:
            raise ValueError("ablations: auxiliary leaves out the language-model loss; transfer.auxiliary is 0 already")
        return self
