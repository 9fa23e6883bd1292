"""What of a model is trained: the keys `method`, `lora_rank` and `tuning` that all training sections share."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pipelines.core.params.section import Section

Method = Literal["full", "last_n", "head", "lora", "qlora"]
Init = Literal["default", "gaussian", "orthogonal", "olora", "pissa"]
ADAPTERS: tuple[Method, ...] = ("lora", "qlora")
WHOLE: tuple[Method, ...] = ("full", "last_n")
USED_BY: dict[str, tuple[Method, ...]] = {
    **dict.fromkeys(("lora_alpha", "lora_targets", "lora_dropout", "lora_variant", "lora_init"), ADAPTERS),
    **dict.fromkeys(("unfreeze", "layer_decay"), WHOLE),
    "layers": ("last_n",),
}
MOVES_BASE: tuple[Init, ...] = ("olora", "pissa")  # the frozen weights give up what the adapters begin with


class Dials(Section):
    """Finer dials. None of them set: LoRA as in the QLoRA paper's code, or all weights at one rate."""

    lora_alpha: int | None = Field(None, ge=1, description="lora, qlora; null: 2 x lora_rank")
    lora_targets: Literal["all-linear"] | tuple[str, ...] | None = Field(
        None, min_length=1, description="lora, qlora: names of linear layers; null: all-linear, those of the blocks"
    )
    lora_dropout: float | None = Field(None, ge=0.0, lt=1.0, description="lora, qlora: on what adapters read; null: 0")
    lora_variant: Literal["plain", "dora", "rslora"] | None = Field(None, description="lora, qlora; null: plain")
    lora_init: Init | None = Field(None, description="lora, qlora: how adapters begin; null: default, B = 0")
    layers: int | None = Field(None, ge=1, description="last_n: blocks from the top; null: a quarter of them")
    unfreeze: bool | None = Field(
        None, description="full, last_n: top block first, one more each equal share; null: no"
    )
    layer_decay: float | None = Field(
        None, gt=0.0, le=1.0, description="full, last_n: rate of block i from the top is lr x this^i; null: 1"
    )
    optimizer: Literal["adamw", "adamw8bit"] | None = Field(
        None, description="adamw8bit: paged 8-bit moments, on CUDA; null: adamw"
    )


class Tuning(Section):
    """What the sections of the training stages inherit; each says which methods it has and which dials it refuses."""

    REFUSED: ClassVar[dict[tuple[str, object], str]] = {}  # (dial, value; None: any) -> why, and what is accepted

    method: Method
    lora_rank: int = Field(ge=1, le=1024)
    tuning: Dials = Dials()

    @model_validator(mode="after")
    def _dials_that_are_used(self) -> Tuning:
        for dial, value in self.tuning:
            if value is None:
                continue
            if self.method not in USED_BY.get(dial, (self.method,)):
                users = ", ".join(USED_BY[dial])
                raise ValueError(
                    f"tuning.{dial}: method {self.method} does not use it, method {users} does; leave it out"
                )
            for refused in (None, value):
                if (why := self.REFUSED.get((dial, refused))) is not None:
                    raise ValueError(f"tuning.{dial}: {why} (found {value!r})")
        return self

    @model_validator(mode="after")
    def _dials_that_fit_together(self) -> Tuning:
        dials = self.tuning
        if self.method == "qlora" and dials.lora_init not in (None, "default", "gaussian"):
            raise ValueError(
                f"tuning.lora_init: {dials.lora_init} needs the base's weights, which method qlora has packed in "
                "4 bits; accepted: default, gaussian; or method: lora"
            )
        if dials.lora_init == "orthogonal" and self.lora_rank % 2:
            raise ValueError(f"tuning.lora_init: orthogonal needs an even lora_rank (found {self.lora_rank})")
        if dials.unfreeze and dials.layers == 1:
            raise ValueError(
                "tuning.unfreeze: there is one block to train, tuning.layers: 1; accepted: layers of 2 or more"
            )
        return self

    @property
    def lora_alpha(self) -> int:
        """Numerator of the adapters' scale; by default twice the rank, as in the QLoRA paper's code."""
        return self.tuning.lora_alpha or 2 * self.lora_rank

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained, and the weights themselves stay as they are."""
        return self.method in ADAPTERS

    def words(self, where: str = " on every linear layer") -> str:
        """What was trained, for a card. `where`: on which layers adapters are, when no dial says it."""
        dials = self.tuning
        if self.method == "last_n":
            return f"the top {dials.layers or 'quarter of the'} block(s) and the final norm"
        if not self.adapted:
            return "the head alone" if self.method == "head" else "all weights"
        name = {"dora": "DoRA", "rslora": "rank-stabilised LoRA"}.get(dials.lora_variant or "", "LoRA")
        begun = f" begun by {dials.lora_init}" if dials.lora_init not in (None, "default") else ""
        if isinstance(dials.lora_targets, tuple):
            where = f" on {', '.join(dials.lora_targets)}"
        if self.method == "qlora":
            where = f"{'' if dials.lora_targets in (None, 'all-linear') else where} over the base in 4 bits"
        end = " into the base as it was before" if self.method == "qlora" else ""
        return f"{name} of rank {self.lora_rank}{begun}{where}, merged{end}"
