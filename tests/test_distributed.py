"""Several processes train what one process trains, in lockstep, and a killed run of theirs resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import own_environment, run_stage
from safetensors.numpy import load_file

from pipelines.core import artifacts, distributed
from pipelines.core.errors import ParamsError
from pipelines.core.params.compute import ComputeParams


def workspace(prepared: Path, place: Path, sharding: str | None, **pretrain: Any) -> Path:
    """The tiny chain up to pretrain; with `sharding`, two processes."""
    return adapted(Path(shutil.copytree(prepared, place, symlinks=True)), sharding, **pretrain)


def adapted(root: Path, sharding: str | None, **pretrain: Any) -> Path:
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["compute"] |= {"precision": "fp32", "threads": 1}
    if sharding is not None:
        params["compute"] |= {"processes": 2, "sharding": sharding}
    params["pretrain"] |= {"micro_batch": 2, "tokens": 8192, **pretrain}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


def weights(root: Path) -> dict[str, Any]:
    return load_file(root / "artifacts/pretrain/model/model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_train_what_one_does(sharding: str, prepared: Path, tmp_path: Path) -> None:
    alone, both = workspace(prepared, tmp_path / "one", None), workspace(prepared, tmp_path / "two", sharding)
    run_stage(alone, "pretrain")
    told = run_stage(both, "pretrain").stdout
    assert told.count("first training row") == 1, "only the first process speaks"
    expected, found = weights(alone), weights(both)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)
    one, two = (json.loads((root / "metrics/pretrain.json").read_text()) for root in (alone, both))
    assert two["bits_per_byte"] == pytest.approx(one["bits_per_byte"], abs=1e-4)
    assert not list((both / ".work").glob("*/*")), "scratch of the second process was left behind"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "sharding"), [("sft", "none"), ("sft", "full"), ("reward", "none"), ("reward", "full"), ("dpo", "none")]
)
def test_later_stages_train_on_two_processes_too(
    stage: str, sharding: str, chain: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    found = []
    for name, kind in (("one", None), ("two", sharding)):
        root = adapted(chain(stage, tmp_path / name), kind)
        shutil.rmtree(root / "artifacts" / stage)
        run_stage(root, stage)
        found.append(load_file(root / "artifacts" / stage / "model/model.safetensors"))
    one, two = found
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_killed_together_they_resume_to_the_same_bytes(sharding: str, prepared: Path, tmp_path: Path) -> None:
    still, killed = (workspace(prepared, tmp_path / name, sharding, checkpoint_steps=2) for name in ("still", "killed"))
    run_stage(still, "pretrain")
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines", "pretrain"], cwd=killed, env=own_environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        kept = set((killed / ".work/pretrain").glob("*/checkpoints/step-*"))
        while process.poll() is None and set((killed / ".work/pretrain").glob("*/checkpoints/step-*")) <= kept:
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(number)
        process.communicate(timeout=90)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
        assert not _left(killed), "a process outlived its launcher"
    told = run_stage(killed, "pretrain").stdout
    assert "resuming after step" in told
    assert artifacts.content_hash(killed / "artifacts/pretrain") == artifacts.content_hash(still / "artifacts/pretrain")


def _left(root: Path) -> list[str]:
    """Processes of a stage that still work in a folder, after a moment to end."""
    import psutil

    found = []
    for _ in range(50):
        found = [
            " ".join(process.info["cmdline"] or [])
            for process in psutil.process_iter(["cmdline", "cwd", "status"])
            if process.info["cwd"] == str(root) and "-m pipelines pretrain" in " ".join(process.info["cmdline"] or [])
        ]
        if not found:
            break
        time.sleep(0.1)
    return found


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused(prepared: Path, tmp_path: Path) -> None:
    root = workspace(prepared, tmp_path / "w", "none", micro_batch=4)
    run = run_stage(root, "pretrain", check=False)
    assert run.returncode == ParamsError.exit_code
    assert "pretrain.micro_batch: a step has 1 micro-batches, which 2 processes" in run.stderr
    assert "Traceback" not in run.stderr and not (root / "artifacts/pretrain").exists()


def test_nodes_are_started_by_torchrun() -> None:
    with pytest.raises(ParamsError, match="torchrun --nnodes 2 --nproc-per-node 4 .* -m pipelines pretrain"):
        distributed.launch("pretrain", ComputeParams(processes=4, nodes=2))


def test_a_launcher_that_started_another_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ParamsError, match="2 x 1 = 2, but the launcher started 3 processes"):
        distributed.join(ComputeParams(processes=2))


def test_alone_without_a_launcher() -> None:
    assert "WORLD_SIZE" not in os.environ
    assert distributed.join(ComputeParams()) == distributed.World()
