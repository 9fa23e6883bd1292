"""Section ppo: what does not add up is refused before any compute, and the message names the keys."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.core.params.ppo import PpoParams, reward_source
from pipelines.core.params.section import explain

PLAIN: dict[str, Any] = {
    "seed": 1, "method": "lora", "lora_rank": 4, "rewards": [], "judge": "overlap", "iterations": 12,
    "batch_prompts": 8, "samples_per_prompt": 4, "minibatches": 2, "epochs": 1, "micro_tokens": 512,
    "max_new_tokens": 16, "max_prompt_tokens": 64, "too_long": "drop", "temperature": 1.0, "kl_coefficient": 0.02,
    "kl_target": None, "kl_horizon": 10000, "clip": 0.2, "value_clip": 0.2, "discount": 1.0, "trace": 0.95,
    "missing_eos_penalty": 1.0, "group_baseline": True, "lr": None, "value_lr": None, "warmup_iterations": 3,
    "weight_decay": 0.0, "clip_norm": 1.0, "ptx_coefficient": 0.5, "ptx_rows": 4, "ptx_length": 128,
    "without_ptx": True, "kl_ceiling": 20.0,
    "entropy_floor": 0.2, "cap_share": 0.9, "eval_prompts": 32, "eval_samples": 4, "eval_bytes": 4096,
    "checkpoint_steps": 4, "checkpoint_seconds": 60.0, "samples": 2,
}  # fmt: skip


def told(**changes: Any) -> str:
    """The message of a section that is refused."""
    with pytest.raises(ValidationError) as error:
        PpoParams.model_validate(PLAIN | changes)
    return explain("params.yaml", error.value, (), lambda location: sorted(PpoParams.model_fields))


def test_plain_and_frozen() -> None:
    params = PpoParams.model_validate(PLAIN)
    assert params.episodes == 32 and params.rewards == ()
    with pytest.raises(ValidationError, match="frozen"):
        params.seed = 2  # type: ignore[misc]
    optional = {name for name, field in PpoParams.model_fields.items() if not field.is_required()}
    assert optional == {"tuning"}, "every other dial stands in params.yaml"


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_target": 6.0},
        {"kl_target": 6.0, "kl_horizon": 32},
        {"kl_coefficient": 0.0},
        {"ptx_coefficient": 0.0, "without_ptx": False},
        {"ptx_coefficient": 0.0, "without_ptx": False, "ptx_length": 4096},
        {"ptx_length": 512},
        {"warmup_iterations": 11},
        {"iterations": 1, "warmup_iterations": 0},
        {"missing_eos_penalty": 0.0},
        {"group_baseline": False, "samples_per_prompt": 1},
        {"trace": 0.0, "discount": 0.5, "entropy_floor": 0.0, "cap_share": 1.0},
        {"batch_prompts": 1, "minibatches": 1, "samples_per_prompt": 2},
        {"rewards": ["models/a", "my rewards/f.py:score", "my rewards/f.py:other", "/data/b", "~/c.py:d"]},
    ],
)
def test_accepted(changes: dict[str, Any]) -> None:
    PpoParams.model_validate(PLAIN | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_prompts": 7}, "batch_prompts (7) must be a multiple of minibatches (2)"),
        ({"batch_prompts": 1, "minibatches": 2}, "batch_prompts (1) must be a multiple of minibatches (2)"),
        ({"batch_prompts": 1, "samples_per_prompt": 1, "minibatches": 1}, "accepted: at least 2"),
        ({"warmup_iterations": 12}, "warmup_iterations (12) must be less than iterations (12)"),
        ({"kl_target": 0.0}, "kl_target: a target of 0 can never be met: "),
        ({"kl_target": -1.0}, "kl_target: a target of -1 can never be met: "),
        ({"kl_target": 6.0, "kl_coefficient": 0.0}, "kl_target needs kl_coefficient > 0"),
        ({"kl_target": 20.0}, "kl_ceiling (20), which stops the run, must be more than kl_target (20)"),
        ({"kl_target": 6.0, "kl_horizon": 31}, "kl_horizon (31) must be at least the episodes of an iteration"),
        ({"ptx_coefficient": 0.0}, "without_ptx: true needs ptx_coefficient > 0"),
        ({"ptx_length": 513}, "ptx_length (513) must be at most micro_tokens (512)"),
        ({"temperature": 0.0}, "temperature: Input should be greater than 0 (found 0.0)"),
        ({"temperature": 2.5}, "temperature: Input should be less than or equal to 2"),
        ({"kl_coefficient": -0.1}, "kl_coefficient: Input should be greater than or equal to 0"),
        ({"kl_ceiling": float("inf")}, "kl_ceiling: Input should be a finite number"),
        ({"missing_eos_penalty": float("inf")}, "missing_eos_penalty: Input should be a finite number"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty: Input should be greater than or equal to 0"),
        ({"samples_per_prompt": 1}, "group_baseline: true compares the responses to a prompt"),
        ({"clip": 1.0}, "clip: Input should be less than 1"),
        ({"judge": "human"}, "judge: Input should be 'overlap' or 'slots' (found 'human')"),
        ({"kl_coeficient": 0.1}, "kl_coeficient: no such key; accepted here: batch_prompts, "),
        ({"rewards": "f.py:g"}, "rewards: Input should be a valid tuple"),
        ({"rewards": ["a", " "]}, "rewards: a blank name; accepted: a reward model's directory, or"),
        ({"rewards": ["f.py"]}, "f.py is a file without a function: say which one, f.py:FUNCTION"),
        ({"rewards": ["f.py:"]}, "f.py:: '' is no name of a function"),
        ({"rewards": ["f.py:a.b"]}, "f.py:a.b: 'a.b' is no name of a function"),
        ({"rewards": ["f.py:g", "m", "f.py:g"]}, "f.py:g is named twice"),
        ({"rewards": ["m/", "./m"]}, "./m is named twice"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    assert message in told(**changes)


def test_every_mistake_of_a_value_is_told_at_once() -> None:
    assert len(told(clip=2.0, rewards=["f.py"], kl_target=0.0).splitlines()) == 3


def test_where_a_reward_comes_from() -> None:
    assert reward_source("a/b.py:f") == ("a/b.py", "f")
    assert reward_source("a/b:c.py:f") == ("a/b:c.py", "f")
    assert reward_source("a/b:c") == ("a/b:c", None)
