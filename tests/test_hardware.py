"""The machine's own rate, which the speed of training is told beside."""

from __future__ import annotations

import time

import pytest

from pipelines.core import hardware


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Times at which the machine was measured, each of which takes a second of a clock that moves by itself."""
    now = [100.0]
    asked: list[float] = []

    def matmul_rate(*_: object, **__: object) -> float:
        asked.append(now[0])
        now[0] += 1.0
        return 1000.0 + len(asked)

    monkeypatch.setattr(hardware, "matmul_rate", matmul_rate)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return asked


@pytest.mark.parametrize(("step_seconds", "samples"), [(20.0, 8), (1.0, 4), (0.1, 1)])
def test_samples_take_a_tenth_of_the_work_at_the_most(products: list[float], step_seconds: float, samples: int) -> None:
    rates = hardware.Rates("cpu", "fp32", steps=40)
    for step in range(40):
        rates.sample(step, step * step_seconds)
    assert len(products) == samples
    assert rates.mean() == 1000.0 + (samples + 1) / 2


def test_without_a_sample_there_is_no_rate() -> None:
    assert hardware.Rates("cpu", "fp32", steps=4).mean() is None


def test_the_first_step_of_a_resumed_run_is_measured_whatever_its_number(products: list[float]) -> None:
    rates = hardware.Rates("cpu", "fp32", steps=80)
    rates.sample(13, 50.0)
    assert len(rates.found) == 1
