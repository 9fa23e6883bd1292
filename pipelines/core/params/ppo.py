"""Section `ppo`."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import ClassVar, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from pipelines.core.params.tuning import MOVES_BASE, Tuning


class RewardSource(NamedTuple):
    """Where a reward comes from: a function of a Python file, or a reward model's directory (`function` is None)."""

    path: str
    function: str | None


def reward_source(name: str) -> RewardSource:
    """An entry of `ppo.rewards`: `path/to/file.py:function`, or a directory."""
    path, colon, function = name.rpartition(":")
    return RewardSource(path, function) if colon and path.endswith(".py") else RewardSource(name, None)


class PpoParams(Tuning):
    """Stage `ppo`."""

    REFUSED: ClassVar[dict[tuple[str, object], str]] = {
        ("lora_dropout", None): "ppo never drops anything: the ratio must be 1 before the first update; leave it out",
        ("unfreeze", True): "ppo trains policy and value from the first iteration; leave it out",
        ("layer_decay", None): "ppo trains each model at one rate; leave it out",
        ("optimizer", "adamw8bit"): "ppo has two optimizers in full precision; accepted: adamw",
        **{
            ("lora_init", init): "the reference is the same backbone without adapters, and this would take directions "
            "out of it; accepted: default, gaussian"
            for init in (*MOVES_BASE, "orthogonal")
        },
    }

    seed: int = Field(ge=0)
    method: Literal["full", "lora"]
    rewards: tuple[str, ...] = Field(
        description="empty: the reward stage's model; else directories of reward models, `file.py:function`; their mean"
    )
    judge: Literal["overlap", "slots"] = Field(description="what gold is; nothing is trained on it")
    iterations: int = Field(ge=1, description="generate, score, update")
    batch_prompts: int = Field(ge=1, description="prompts an iteration")
    samples_per_prompt: int = Field(ge=1, description="episodes of each prompt")
    minibatches: int = Field(ge=1, description="optimizer steps an epoch over the batch")
    epochs: int = Field(ge=1, description="over each batch")
    micro_tokens: int = Field(ge=16, description="tokens a forward pass; the rest is accumulated")
    max_new_tokens: int = Field(ge=1)
    max_prompt_tokens: int = Field(ge=1)
    too_long: Literal["refuse", "drop"]
    temperature: float = Field(gt=0.0, le=2.0)
    kl_coefficient: float = Field(ge=0.0, allow_inf_nan=False, description="penalty a nat, on every token")
    kl_target: float | None = Field(allow_inf_nan=False, description="nats a response; null: a fixed coefficient")
    kl_horizon: int = Field(ge=1, description="kl_target: episodes over which the coefficient adapts")
    clip: float = Field(gt=0.0, lt=1.0, description="of the probability ratio, about 1")
    value_clip: float = Field(gt=0.0, allow_inf_nan=False, description="of the values, about those before the update")
    discount: float = Field(gt=0.0, le=1.0)
    trace: float = Field(ge=0.0, le=1.0, description="lambda of generalised advantage estimation")
    missing_eos_penalty: float = Field(
        ge=0.0, allow_inf_nan=False, description="taken off the score of a response that did not end"
    )
    group_baseline: bool = Field(description="scores count as what they are above the prompt's other responses")
    lr: float | None = Field(gt=0.0, lt=1.0, description="peak, of the policy; null: from the width")
    value_lr: float | None = Field(gt=0.0, lt=1.0, description="peak, of the value model; null: from the width")
    warmup_iterations: int = Field(ge=0, description="from a tenth of the peak to all of it")
    weight_decay: float = Field(ge=0.0, lt=1.0)
    clip_norm: float = Field(gt=0.0)
    ptx_coefficient: float = Field(ge=0.0, allow_inf_nan=False, description="of the pre-training loss; 0: plain PPO")
    ptx_rows: int = Field(ge=1, description="rows of pre-training text an optimizer step")
    ptx_length: int = Field(ge=16, description="tokens of such a row")
    without_ptx: bool = Field(description="run a second arm without it from the same start: the alignment tax")
    kl_ceiling: float = Field(gt=0.0, allow_inf_nan=False, description="nats a response; more stops the run")
    entropy_floor: float = Field(ge=0.0, lt=1.0, description="share of the first iteration's; less stops the run")
    cap_share: float = Field(gt=0.0, le=1.0, description="responses that did not end; more stops the run")
    eval_prompts: int = Field(ge=1, description="held-out prompts answered")
    eval_samples: int = Field(ge=2, description="samples a held-out prompt; also N of best-of-N")
    eval_bytes: int = Field(ge=1024, description="held-out UTF-8 bytes of the corpus, for the alignment tax")
    checkpoint_steps: int = Field(ge=1, description="iterations")
    checkpoint_seconds: float = Field(gt=0.0)
    samples: int = Field(ge=0, le=32)

    @field_validator("rewards")
    @classmethod
    def _named_well(cls, rewards: tuple[str, ...]) -> tuple[str, ...]:
        accepted = "accepted: a reward model's directory, or path/to/file.py:function"
        for name in rewards:
            source = reward_source(name)
            if not source.path.strip():
                raise ValueError(f"a blank name; {accepted}")
            if source.function is None and name.endswith(".py"):
                raise ValueError(f"{name} is a file without a function: say which one, {name}:FUNCTION; {accepted}")
            if source.function is not None and not source.function.isidentifier():
                raise ValueError(f"{name}: {source.function!r} is no name of a function; {accepted}")
        known = [(PurePosixPath(source.path), source.function) for source in map(reward_source, rewards)]
        twice = [name for number, name in enumerate(rewards) if known[number] in known[:number]]
        if twice:
            raise ValueError(f"{twice[0]} is named twice: a member that counts double would only hide a disagreement")
        return rewards

    @field_validator("kl_target")
    @classmethod
    def _can_be_met(cls, kl_target: float | None) -> float | None:
        if kl_target is not None and kl_target <= 0:
            raise ValueError(
                f"a target of {kl_target:g} can never be met: whatever learns has moved away from where it started. "
                "Accepted: more than 0 nats a response, or null: kl_coefficient stays what it is"
            )
        return kl_target

    @model_validator(mode="after")
    def _batch(self) -> PpoParams:
        if self.batch_prompts % self.minibatches:
            raise ValueError(
                f"batch_prompts ({self.batch_prompts}) must be a multiple of minibatches ({self.minibatches}): all "
                "episodes of a prompt go through one optimizer step, and each step gets as many prompts"
            )
        if self.episodes < 2:
            raise ValueError(
                "batch_prompts * samples_per_prompt is 1: an advantage is what one episode has over others of its "
                "batch; accepted: at least 2"
            )
        if self.group_baseline and self.samples_per_prompt < 2:
            raise ValueError(
                "group_baseline: true compares the responses to a prompt, and samples_per_prompt is 1; accepted: at "
                "least 2, or group_baseline: false"
            )
        if self.warmup_iterations >= self.iterations:
            raise ValueError(
                f"warmup_iterations ({self.warmup_iterations}) must be less than iterations ({self.iterations}): "
                "the peak rate would never be reached"
            )
        return self

    @model_validator(mode="after")
    def _controller(self) -> PpoParams:
        if self.kl_target is None:
            return self
        if self.kl_coefficient == 0.0:
            raise ValueError("kl_target needs kl_coefficient > 0: the controller multiplies it, and 0 stays 0")
        if self.kl_target >= self.kl_ceiling:
            raise ValueError(
                f"kl_ceiling ({self.kl_ceiling:g}), which stops the run, must be more than kl_target "
                f"({self.kl_target:g}), where it is to settle"
            )
        if self.kl_horizon < self.episodes:
            raise ValueError(
                f"kl_horizon ({self.kl_horizon}) must be at least the episodes of an iteration, batch_prompts * "
                f"samples_per_prompt ({self.episodes}): the controller would overshoot"
            )
        return self

    @model_validator(mode="after")
    def _pretraining(self) -> PpoParams:
        if self.ptx_coefficient == 0.0 and self.without_ptx:
            raise ValueError(
                "without_ptx: true needs ptx_coefficient > 0: with 0 no arm has a pre-training gradient, and the "
                "second would be the first once more"
            )
        if self.ptx_coefficient > 0.0 and self.ptx_length > self.micro_tokens:
            raise ValueError(
                f"ptx_length ({self.ptx_length}) must be at most micro_tokens ({self.micro_tokens}): a row goes "
                "through one forward pass"
            )
        return self

    @property
    def episodes(self) -> int:
        """Episodes of an iteration."""
        return self.batch_prompts * self.samples_per_prompt
