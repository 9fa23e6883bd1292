"""Section `distill`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pipelines.core.params.section import Section, Share

Weight = Field(0.0, ge=0.0, allow_inf_nan=False)


class Terms(Section):
    """What is matched, and what each part of the loss weighs; 0: it is not computed."""

    forward: float = Weight  # KL(teacher || student) of each token: Hinton et al. (2015)
    reverse: float = Weight  # KL(student || teacher)
    jsd: float = Weight  # generalised Jensen-Shannon divergence: Agarwal et al. (2024)
    labels: float = Weight  # cross-entropy of the token that people, or the teacher, wrote
    hidden: float = Weight  # states of matched blocks: Jiao et al., "TinyBERT" (2020)
    cosine: float = Weight  # the angle between them: Sanh et al., "DistilBERT" (2019)
    attention: float = Weight  # attention of matched blocks
    on_policy: float = Weight  # `on_policy_divergence` on what the student itself writes

    @property
    def of_logits(self) -> dict[Literal["forward", "reverse", "jsd"], float]:
        """The divergences that weigh something."""
        found: dict[Literal["forward", "reverse", "jsd"], float] = {
            "forward": self.forward,
            "reverse": self.reverse,
            "jsd": self.jsd,
        }
        return {name: weight for name, weight in found.items() if weight > 0}

    @property
    def of_features(self) -> bool:
        """Whether the teacher's inner states are needed."""
        return self.hidden + self.cosine + self.attention > 0

    @property
    def of_data(self) -> bool:
        """Whether anything is learned from texts and chats; else from the student's own answers alone."""
        return self.labels > 0 or bool(self.of_logits) or self.of_features


class DistillParams(Section):
    """Stage `distill`."""

    ALONE: ClassVar[bool] = True  # it trains in one process, whatever `compute.processes` says

    seed: int = Field(ge=0)
    teacher: str | None = Field(description="null: the policy of stage ppo; a directory or hub id")
    student: str = Field(min_length=1, description="layers | random | a directory or hub id of the same vocabulary")
    keep_layers: int | None = Field(ge=1, description="student: layers: how many of the teacher's blocks")
    depth: int | None = Field(ge=1, description="student: random: layers; all else follows, as in pretrain")
    fit: float | None = Field(gt=0.0, allow_inf_nan=False, description="ridge of the least squares; null: copied alone")
    weights: Terms
    temperature: float = Field(gt=0.0, allow_inf_nan=False, description="of the soft targets")
    beta: float = Field(gt=0.0, lt=1.0, description="of jsd: the teacher's share in the mixture")
    top_k: int | None = Field(ge=1, description="tokens kept of each of the teacher's answers; null: it runs each time")
    answers: Literal["people", "teacher", "both"] = Field(description="whose answers: teacher is sequence-level")
    examples: int | None = Field(ge=1, description="training demonstrations, chosen by hash of their id; null: all")
    texts: int = Field(ge=0, description="pieces of max_length tokens of the training corpus")
    max_length: int = Field(ge=16, description="longest chat, and length of a text's piece, in tokens")
    too_long: Literal["refuse", "drop"]
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1, description="sequences an optimizer step")
    micro_tokens: int = Field(ge=16, description="tokens a forward pass; the rest is accumulated")
    on_policy_divergence: Literal["forward", "reverse", "jsd"]
    on_policy_prompts: int = Field(ge=1, description="prompts the student answers for an optimizer step")
    train_embedding: bool = Field(description="false: the embedding, and the head that is tied to it, stay")
    lr: float | None = Field(gt=0.0, lt=1.0, description="peak; null: from the width")
    lr_no_teacher: float | None = Field(gt=0.0, lt=1.0, description="of the student without the teacher; null: lr")
    warmup_share: Share
    weight_decay: float = Field(ge=0.0, lt=1.0)
    clip_norm: float = Field(gt=0.0)
    judge: Literal["overlap", "slots"] = Field(description="what gold is; nothing is trained on it")
    eval_prompts: int = Field(ge=1, description="held-out prompts answered")
    eval_samples: int = Field(ge=1, description="samples a held-out prompt, beside a greedy answer")
    eval_bytes: int = Field(ge=1024, description="held-out UTF-8 bytes of the corpus scored")
    max_new_tokens: int = Field(ge=1)
    max_prompt_tokens: int = Field(ge=1)
    checkpoint_steps: int = Field(ge=1)
    checkpoint_seconds: float = Field(gt=0.0)
    samples: int = Field(ge=0, le=32)

    @model_validator(mode="after")
    def _terms_that_fit(self) -> DistillParams:
        weights = self.weights
        of_teacher = weights.of_logits or weights.of_features or weights.on_policy
        if not (of_teacher or (weights.labels and self.answers != "people")):
            raise ValueError(
                "weights: nothing of the teacher weighs more than 0; accepted: a weight of forward, reverse, jsd, "
                "hidden, cosine, attention or on_policy above 0, or answers: teacher with labels above 0"
            )
        if self.top_k is not None and self.temperature != 1.0:
            raise ValueError(
                f"top_k: kept tokens are those of temperature 1 (found temperature {self.temperature:g}); "
                "accepted: temperature: 1.0, or top_k: null"
            )
        if self.top_k is not None and weights.of_features:
            raise ValueError(
                "top_k: hidden, cosine and attention need the teacher in every step; accepted: top_k: null"
            )
        if self.answers != "people" and self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_new_tokens ({self.max_new_tokens}) must be less than max_length ({self.max_length}): with "
                f"answers: {self.answers} a prompt with the teacher's answer is one sequence"
            )
        return self

    @model_validator(mode="after")
    def _size_of_the_student(self) -> DistillParams:
        needs = {"layers": "keep_layers", "random": "depth"}
        for student, key in needs.items():
            value = getattr(self, key)
            if self.student == student and value is None:
                raise ValueError(f"{key}: student: {student} needs it; accepted: a whole number from 1")
            if self.student != student and value is not None:
                raise ValueError(f"{key}: used by student: {student} (found student: {self.student}); set it to null")
        if self.student != "layers" and self.fit is not None:
            raise ValueError(f"fit: used by student: layers (found student: {self.student}); set it to null")
        if self.student == "random" and not self.train_embedding:
            raise ValueError(
                "train_embedding: student: random begins with a random embedding, and false keeps it; accepted: true"
            )
        return self
