"""Guards stop a run that goes wrong in the very iteration that shows it, and leave a healthy one alone."""

from __future__ import annotations

import dataclasses
import re

import pytest
from rollouts import PARAMS

from pipelines.core.guards import Fired, Guards, check, watch
from pipelines.core.params.ppo import PpoParams

LIMITS = Guards(kl_ceiling=10.0, entropy_floor=0.5, cap_share=0.4, episodes=64, steps=4)
HEALTHY = {
    "kl": 2.0, "kl_k3": 0.1, "entropy": 2.0, "capped_share": 0.1, "clip_fraction": 0.1, "explained_variance": 0.3,
}  # fmt: skip


def history(key: str, values: list[float]) -> list[dict[str, float]]:
    """Healthy but for one key; what a value model does not explain, it errs by."""
    rows = [HEALTHY | {key: value} for value in values]
    return [row | {"value_loss": 1.0 - row["explained_variance"]} for row in rows]


def first_to_fire(rows: list[dict[str, float]], limits: Guards = LIMITS) -> int | None:
    """Number, from 1, of the iteration after which the run would have been stopped."""
    return next((length for length in range(1, len(rows) + 1) if check(limits, rows[:length]) is not None), None)


@pytest.mark.parametrize(
    ("key", "values", "fires", "told"),
    [
        ("kl", [0.0, 4.0, 10.0, 10.5, 2.0], 4, ["10.50", "above 10", "ppo.kl_ceiling"]),
        ("kl", [12.25], 1, ["12.25", "ppo.kl_coefficient"]),
        ("entropy", [3.0, 2.0, 1.5, 1.25, 3.0], 4, ["1.250", "below 1.500", "ppo.entropy_floor"]),
        ("capped_share", [0.1, 0.3, 0.4, 0.5], 4, ["50%", "40%", "ppo.cap_share", "ppo.max_new_tokens"]),
        ("capped_share", [0.7, 0.5, 0.9, 0.95], 4, ["95%", "at the start"]),
        # Means over four steps, of the first of which nothing is clipped: 0.225 is 0.3 of the later three.
        ("clip_fraction", [0.1, 0.7, 0.7, 0.7, 0.7, 0.23], 6, ["30%", "5 iterations", "ppo.lr", "ppo.epochs"]),
        ("clip_fraction", [0.23, 0.7, 0.7, 0.7, 0.7], 5, ["30%"]),
        ("clip_fraction", [0.7, 0.7, 0.7, 0.7, 0.22, 0.7, 0.7, 0.7, 0.7, 0.7], 10, ["30%"]),
        ("explained_variance", [-0.6, -2.0, -0.6, -0.5, -1.0, -1.0, -1.0, -1.0, -1.25], 9, ["-1.25", "ppo.value_lr"]),
        ("kl", [-0.2, 0.1, -0.2, -0.2, -0.2, -0.2, -0.3], 7, ["-0.30", "not what is trained"]),
    ],
)
def test_fires_in_that_iteration_and_none_before(key: str, values: list[float], fires: int, told: list[str]) -> None:
    rows = history(key, values)
    assert first_to_fire(rows) == fires
    fault = check(LIMITS, rows[:fires])
    assert fault is not None
    for part in told:
        assert part in fault.problem
    named = re.findall(r"ppo\.(\w+)", fault.problem)
    assert set(named) <= set(PpoParams.model_fields), "a person must find the keys in params.yaml"


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("kl", [0.0, 5.0, 9.0, 10.0] * 3),
        ("kl", [-0.05] * 8),  # chance
        ("kl", [-3.0, -3.0, -3.0, -3.0, 0.1] * 2),
        ("entropy", [2.0, 1.0, 1.5, 4.0] * 2),
        ("entropy", [1e-3] * 8),  # low from the start is how the model is, not what PPO made of it
        ("capped_share", [0.9] * 8),  # so is a model that never ends
        ("clip_fraction", [0.22] * 8),
        ("clip_fraction", [0.7, 0.7, 0.7, 0.7, 0.1] * 3),
        ("explained_variance", [-0.5] * 8),
        ("explained_variance", [-5.0, -4.0, -3.0, -2.0, 0.1] * 2),
        ("explained_variance", [-9.0, -8.0, -9.0, -5.0, -4.0, -3.0, -2.0, -1.0]),  # bad, and on its way
    ],
)
def test_a_healthy_run_passes(key: str, values: list[float]) -> None:
    assert first_to_fire(history(key, values)) is None


def test_what_chance_makes_of_few_responses_is_no_alarm() -> None:
    """Of a model that ends four answers in ten within the limit every other batch has more without an end."""
    few = dataclasses.replace(LIMITS, episodes=4)
    rows = history("capped_share", [0.6, 0.67, 0.55, 0.72, 0.64, 0.7, 0.66, 0.61])
    assert first_to_fire(rows) is None
    assert first_to_fire(history("capped_share", [0.25, 0.75, 0.0, 0.5, 0.75, 0.25, 0.75]), few) is None
    assert first_to_fire(history("capped_share", [0.0, 1.0, 1.0, 1.0]), few) == 3, "a hack is no chance"
    near = history("kl", [-0.2, -0.1, -0.3, -0.15, -0.2, -0.2])
    assert first_to_fire(near) == 5 and first_to_fire(near, few) is None


def test_clipping_is_told_of_the_steps_that_can_clip() -> None:
    """The same share of all tokens is the larger share of the later steps' the fewer there are."""
    for steps, most in ((2, 0.15), (4, 0.225), (8, 0.2625)):
        limits = dataclasses.replace(LIMITS, steps=steps)
        assert first_to_fire(history("clip_fraction", [most - 0.01] * 8), limits) is None
        assert first_to_fire(history("clip_fraction", [most + 0.01] * 8), limits) == 5
    alone = dataclasses.replace(LIMITS, steps=1)
    assert first_to_fire(history("clip_fraction", [0.0] * 8), alone) is None


def test_a_task_that_is_solved_is_no_alarm() -> None:
    """When all episodes earn the same, the small error of the values is many times what is left to explain."""
    rows = history("explained_variance", [0.0, -2.0, -9.0, -20.0, -60.0, -70.0, -80.0])
    assert first_to_fire(rows) == 6
    assert first_to_fire([row | {"value_loss": 1.0 / number} for number, row in enumerate(rows, 1)]) is None


def test_nothing_is_wrong_before_the_first_iteration() -> None:
    assert check(LIMITS, []) is None


def test_the_limits_are_those_given() -> None:
    wide = Guards(kl_ceiling=50.0, entropy_floor=0.0, cap_share=1.0, episodes=64, steps=4)
    for key, values in (("kl", [12.0]), ("entropy", [2.0, 1e-6]), ("capped_share", [0.0, 1.0])):
        rows = history(key, values)
        assert check(LIMITS, rows) is not None and check(wide, rows) is None


@pytest.mark.parametrize(
    ("key", "values", "good"),
    [
        ("kl", [0.0, 4.0, 11.0], 1),  # the third rollouts are of the policy after two updates
        ("kl", [11.0], -1),
        ("entropy", [2.0, 2.0, 2.0, 0.5], 2),
        ("capped_share", [0.1, 0.1, 0.9], 1),
        ("explained_variance", [0.0, *[-1.0] * 5], 4),  # of values before the update
        ("kl", [-3.0] * 5, 3),
        ("clip_fraction", [0.2] * 5, 4),  # of two steps; the fifth update is too large, which nothing is kept of
    ],
)
def test_the_models_that_it_condemns_are_those_it_has_measured(key: str, values: list[float], good: int) -> None:
    params = PARAMS.model_copy(update={"kl_ceiling": 10.0, "entropy_floor": 0.5, "cap_share": 0.4})
    with pytest.raises(Fired, match=f"ppo stopped after iteration {len(values)}: ") as raised:
        watch(params, history(key, values), "")
    assert raised.value.good == good
