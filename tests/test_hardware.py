"""The machine's own rate, which the speed of training is told beside."""

from __future__ import annotations

import os
import time
from pathlib import Path

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


def test_the_rate_is_that_of_all_processes(products: list[float]) -> None:
    """Their work is counted together, so what one of them measures on its share of the cores is not all there is."""
    rates = hardware.Rates("cpu", "fp32", steps=1, processes=2)
    rates.sample(0, 0.0)
    assert rates.mean() == 2 * 1001.0


@pytest.mark.parametrize(("rate", "rows"), [(1e9, 256), (5e9, 512), (60e9, 1024), (9e11, 2048)])
def test_no_product_takes_long_on_a_slow_processor(monkeypatch: pytest.MonkeyPatch, rate: float, rows: int) -> None:
    """In bf16, where the processor has no products of it, one of 2,048 rows takes a minute."""
    asked = []

    def seconds(device: str, precision: str, rows: int, repeats: int) -> float:
        asked.append((rows, repeats))
        return 2 * rows**3 / rate

    monkeypatch.setattr(hardware, "_product_seconds", seconds)
    assert hardware.matmul_rate("cpu", "bf16", repeats=3) == pytest.approx(rate)
    assert asked[-1] == (rows, 3) and all(2 * size**3 / rate <= hardware.PRODUCT_SECONDS for size, _ in asked)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
    ],
)
def test_a_container_s_quota_counts(
    files: dict[str, str], quota: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is lent two of 64 cores by the clock sees all of them: 64 threads would wait for one another."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert hardware._quota(tmp_path) == quota
    monkeypatch.setattr(hardware, "_quota", lambda _: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert hardware.cores() == (2 if quota else 64)


def test_without_a_sample_there_is_no_rate() -> None:
    assert hardware.Rates("cpu", "fp32", steps=4).mean() is None


def test_the_first_step_of_a_resumed_run_is_measured_whatever_its_number(products: list[float]) -> None:
    rates = hardware.Rates("cpu", "fp32", steps=80)
    rates.sample(13, 50.0)
    assert len(rates.found) == 1
