"""Killed at any moment and run again, a stage ends with the bytes of a run that was never disturbed.

A new stage joins with one line in `STAGES`.
"""

from __future__ import annotations

import glob
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import own_environment, run_stage

from pipelines.core import artifacts, environment, graph

pytestmark = pytest.mark.slow
TRAINING = ("pretrain", "sft", "reward", "ppo", "dpo", "distill", "transfer")
STAGES = (*TRAINING, "feedback", "quantize", "rag", "answers", "prompts")
MOMENTS = ("at once", "a first checkpoint", "half the steps", "scoring after training")
MOMENTS_OF = {
    "feedback": ("at once", "a first batch"),
    "quantize": ("at once", "a first variant", "a first measure"),
    "rag": ("at once", "first vectors", "ranking"),
    "answers": ("at once", "first answers"),
    "prompts": ("at once", "a first call"),
}  # no training


def start(root: Path, stage: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", stage], cwd=root, env=own_environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def reached(root: Path, stage: str, moment: str) -> bool:
    """Whether the stage has come to a moment of its run."""
    place = root / environment.STATE / "live" / f"{stage}.json"
    live = json.loads(place.read_text()) if place.exists() else {"step": 0, "total": None, "shown": {}}

    def there(pattern: str) -> bool:
        # Not pathlib's, which raises where the stage renames a folder that it is reading
        return bool(glob.glob(pattern, root_dir=root / environment.WORK / stage, recursive=True))

    saved = there("*/checkpoints/**/step-*/manifest.json")
    training = bool({"loss", "kl"} & set(live["shown"]))
    scoring = str(live["shown"].get("scoring", ""))
    return {
        "a first batch": there("*/samples/batch-*.json"),
        "a first variant": there("*/variants/*/config.json"),
        "a first measure": there("*/evaluation/measured-*.json"),
        "first answers": there("*/answers/*.json"),
        "a first call": there("*/calls/*.json"),
        "first vectors": there("embeddings/vectors-*/*.npy"),
        "ranking": "ranking" in live["shown"],
        "at once": place.exists(),
        "a first checkpoint": saved,
        "half the steps": training and live["step"] >= live["total"] / 2,
        "scoring after training": saved and ("after" in scoring or "held-out text" in scoring),
    }[moment]


@pytest.fixture
def before(chain: Callable[[str, Path], Path], tmp_path: Path) -> Callable[[str], tuple[Path, str]]:
    """A workspace in which a stage has not run, though all before it have, and the hash of what it makes."""

    def make(stage: str) -> tuple[Path, str]:
        root = chain(stage, tmp_path / "w")
        spec = graph.stage(root, stage)
        undisturbed = artifacts.content_hash(root / spec.output)
        shutil.rmtree(root / spec.output)
        (root / spec.metrics).unlink()
        (root / environment.STATE / "live" / f"{stage}.json").unlink()
        shutil.rmtree(root / environment.WORK / stage, ignore_errors=True)  # vectors of `rag` outlive its run
        for figures in (root / environment.STATE / "measured").glob(f"{stage}-*"):  # so do what was measured
            figures.unlink()
        return root, undisturbed

    return make


@pytest.mark.parametrize("stage", STAGES)
def test_killed_again_and_again(stage: str, before: Callable[[str], tuple[Path, str]]) -> None:
    root, undisturbed = before(stage)
    output = root / graph.stage(root, stage).output
    for moment in MOMENTS_OF.get(stage, MOMENTS):
        process = start(root, stage)
        while process.poll() is None and not reached(root, stage, moment):
            time.sleep(0.01)
        assert process.poll() is None, f"ended before {moment}: {process.communicate()[0]}"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists(), "an output that is not whole was published"
        assert not (root / graph.stage(root, stage).metrics).exists()
    told = run_stage(root, stage).stdout
    if stage == "rag":
        assert json.loads((root / "metrics/rag.json").read_text())["vectors_made"] == 0, "they were there"
    else:
        assert "resuming after" in told
    assert artifacts.content_hash(output) == undisturbed
    left = (root / environment.WORK / stage).glob("*/*")
    assert not [one for one in left if one.parent.name != "embeddings"], "checkpoints outlived the output"


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_saves_first(stage: str, before: Callable[[str], tuple[Path, str]]) -> None:
    root, undisturbed = before(stage)
    process = start(root, stage)
    moment = "half the steps" if stage not in MOMENTS_OF else MOMENTS_OF[stage][-1]
    while process.poll() is None and not reached(root, stage, moment):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "the next run" in told and "starts over" not in told and "Traceback" not in told
    run_stage(root, stage)
    assert artifacts.content_hash(root / graph.stage(root, stage).output) == undisturbed


@pytest.mark.parametrize("stage", TRAINING)
def test_a_damaged_checkpoint_is_not_used(stage: str, before: Callable[[str], tuple[Path, str]]) -> None:
    root, undisturbed = before(stage)
    process = start(root, stage)
    while process.poll() is None and not reached(root, stage, "a first checkpoint"):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for state in (root / environment.WORK / stage).glob("*/checkpoints/**/step-*/state.pt"):
        state.write_bytes(state.read_bytes()[:-7])
    run = run_stage(root, stage)
    assert "is damaged" in run.stderr and "set aside" in run.stderr
    assert artifacts.content_hash(root / graph.stage(root, stage).output) == undisturbed
