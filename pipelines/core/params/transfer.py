"""Section `transfer`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pipelines.core.params.section import Section, Share
from pipelines.core.params.tuning import Tuning

SHARED = (
    "seed",
    "tasks",
    "mixing",
    "per_task",
    "seeds",
    "ablations",
    "heuristics",
    "checkpoint_steps",
    "checkpoint_seconds",
    "samples",
)


class Heuristic(Section):
    """How the pre-trained model answers a classification it was never trained on (GPT-1, section 5)."""

    task: str
    kind: Literal["acceptability", "words"]
    cue: str | None = Field(None, description="words: appended to the text; null: ' very', as in the paper")
    words: tuple[str, ...] = Field((), description="words: one a label, in the labels' order; the likeliest answers")

    @model_validator(mode="after")
    def _of_its_kind(self) -> Heuristic:
        if (self.kind == "words") != bool(self.words):
            raise ValueError("kind: words needs words: one a label; kind: acceptability has none")
        if self.kind == "acceptability" and self.cue is not None:
            raise ValueError("cue: only with kind: words")
        return self


class TransferParams(Tuning):
    """Stage `transfer`."""

    seed: int = Field(ge=0)
    tasks: tuple[str, ...] = Field(description="tasks to learn; empty: all tables of the data")
    transferred_layers: int | None = Field(ge=1, description="keep the first so many blocks of the base; null: all")
    auxiliary: float = Field(lt=float("inf"), description="weight of the language-model loss; 0: none")
    special_tokens: Literal["known", "drawn"] = Field(
        description="embeddings of start, delimiter and extract begin as known tokens' (document, newline), or drawn"
    )
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
    mixing: float | None = Field(
        ge=1.0,
        le=1e6,
        description="null: a model a task; else one model learns all, a task is drawn by examples^(1/mixing)",
    )
    per_task: tuple[dict[str, Any], ...] = Field(
        description="{task: NAME, key: value, ...}: keys above that are other for one task"
    )
    heuristics: tuple[Heuristic, ...] = Field(
        description="ablation zero_shot: other than the likeliest label after a cue: {task, kind, cue, words}"
    )
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
        if self.mixing is not None and self.method == "head":
            raise ValueError("mixing: method head trains nothing that tasks share; accepted: full, last_n, lora, qlora")
        if "auxiliary" in self.ablations and self.auxiliary == 0:
            raise ValueError("ablations: auxiliary leaves out the language-model loss; transfer.auxiliary is 0 already")
        asked = [one.task for one in self.heuristics]
        if twice := sorted({task for task in asked if asked.count(task) > 1}):
            raise ValueError(f"heuristics: one for each task at most (found two for {', '.join(twice)})")
        if asked and "zero_shot" not in self.ablations:
            raise ValueError("heuristics: only ablation zero_shot uses them: add it to transfer.ablations")
        return self

    @model_validator(mode="after")
    def _exceptions(self) -> TransferParams:
        own = [key for key in type(self).model_fields if key not in SHARED]
        if self.mixing is not None:  # one model: what is read of a task may differ, how it is learned may not
            own = ["examples", "eval_examples"]
        named = [one.get("task") for one in self.per_task]
        for number, one in enumerate(self.per_task):
            name, where = one.get("task"), f"per_task[{number}]"
            if not isinstance(name, str) or named.count(name) > 1:
                raise ValueError(f"{where}: expected task: NAME, each task once (found {name!r})")
            if self.tasks and name not in self.tasks:
                raise ValueError(f"{where}: task {name} is none of transfer.tasks: {', '.join(self.tasks)}")
            if strange := [key for key in one if key not in ("task", *own)]:
                raise ValueError(f"{where}: {', '.join(strange)}: accepted for one task: {', '.join(own)}")
            try:
                self.of(name)
            except ValidationError as error:
                first = error.errors()[0]
                told = first["msg"].removeprefix("Value error, ")
                if first["loc"]:
                    told = f"{'.'.join(map(str, first['loc']))}: {told} (found {first['input']!r})"
                raise ValueError(f"{where} ({name}): {told}") from None
        return self

    def of(self, task: str) -> TransferParams:
        """The dials of one task: those of all, with what `per_task` says of it."""
        changes = next((one for one in self.per_task if one["task"] == task), {})
        kept = {key: value for key, value in changes.items() if key != "task"}
        return TransferParams.model_validate({**self.model_dump(), **kept, "per_task": ()})
