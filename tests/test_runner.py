"""The runner: one clear message for a user's mistake, an exit code that says what it was, nothing half-written."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import socket
import string
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import own_environment, run_stage

from pipelines.core import artifacts, context, graph, runner, single_writer
from pipelines.core.errors import ParamsError
from pipelines.core.params import whole
from pipelines.core.params.ppo import PpoParams


def refused(root: Path, stage: str, *told: str, code: int = 2, reached: bool = False) -> str:
    """Run a stage that must fail: message, exit code, no traceback, nothing published or registered."""
    run = run_stage(root, stage, check=False)
    assert run.returncode == code, run.stdout + run.stderr
    assert "Traceback" not in run.stderr, run.stderr
    for part in told:
        assert part in run.stderr, run.stderr
    assert not (root / "artifacts" / stage).exists() and not (root / "metrics" / f"{stage}.json").exists()
    assert not list((root / "artifacts").glob(".*")) if (root / "artifacts").exists() else True
    live = json.loads((root / f".sluice/live/{stage}.json").read_text())
    assert live["state"] == "failed" and live["exit_code"] == code and told[0] in live["message"]
    return run.stderr


@pytest.fixture
def workspace(make_workspace: Callable[[], Path]) -> Path:
    return make_workspace()


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def only_source(workspace: Path, name: str, texts: Sequence[str] = ()) -> None:
    """Let `data` read nothing but that file of the working folder, with these texts, if there are any."""
    if texts:
        (workspace / name).write_text("\n".join(json.dumps({"text": text}) for text in texts))
    params = (workspace / "params.yaml").read_text()
    start, end = params.index("  sources:"), params.index("  validation_share:")
    source = f"  sources:\n  - {{path: {name}, table: corpus}}\n"
    (workspace / "params.yaml").write_text(params[:start] + source + params[end:])


def noticed(workspace: Path, name: str) -> None:
    """Make the file a dep of `data`."""
    edit(workspace / "dvc.yaml", "    - pipelines/data.py\n", f"    - pipelines/data.py\n    - {name}\n")


def test_a_typo_in_params(workspace: Path) -> None:
    edit(workspace / "params.yaml", "weight_decay:", "wieght_decay:")
    refused(workspace, "data", "pretrain.wieght_decay: no such key", "weight_decay")


def test_a_negative_rate(workspace: Path) -> None:
    edit(workspace / "params.yaml", "lr: 1.0e-3", "lr: -1")
    refused(workspace, "pretrain", "pretrain.lr: Input should be greater than 0 (found -1)")


def test_a_gate_on_a_metric_that_does_not_exist(workspace: Path) -> None:
    edit(workspace / "mlflow/registry.yaml", "metric: bits_per_byte,", "metric: bits_per_bite,")
    refused(workspace, "data", "no metric 'bits_per_bite'", "bits_per_byte", code=3)


def test_an_input_that_is_not_there(workspace: Path) -> None:
    refused(workspace, "pretrain", "its input data is missing", "dvc repro pretrain")


def test_a_file_that_does_not_exist(workspace: Path) -> None:
    only_source(workspace, "nowhere.jsonl")
    refused(workspace, "data", "nowhere.jsonl")


def test_a_file_dvc_would_not_notice(workspace: Path) -> None:
    """A local source that is no dep of the stage: DVC would never run it again when the file changes."""
    only_source(workspace, "mine.jsonl", [f"Sentence number {n} about nothing in particular." for n in range(200)])
    refused(workspace, "data", "mine.jsonl", "deps", "sluice run")
    noticed(workspace, "mine.jsonl")
    run_stage(workspace, "data")


def test_a_reward_dvc_would_not_notice(tmp_path: Path) -> None:
    """A file or directory that ppo.rewards names and that is no dep, nor inside one."""
    section = PpoParams.model_construct(rewards=("mine/r.py:f", "artifacts/reward/model", "judge"))
    every = whole.Params.model_construct(ppo=section)
    code, inputs = ("pipelines/ppo.py",), {"reward": "artifacts/reward"}

    def told() -> str:
        spec = graph.StageSpec("ppo", code, inputs, "artifacts/ppo", "metrics/ppo.json", ("reward",))
        with pytest.raises(ParamsError) as error:
            runner._check_files(tmp_path, spec, every)
        return str(error.value)

    assert told().startswith(f"ppo.rewards: mine/r.py:f: no such file ({tmp_path}/mine/r.py)")
    for name in ("mine", "artifacts/reward/model", "judge"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "mine/r.py").write_text("")
    assert "ppo.rewards reads mine/r.py, which is not among the deps of stage ppo" in told()
    code = (*code, "mine/r.py")
    assert "ppo.rewards reads judge, which is not among the deps of stage ppo" in told() and "- judge" in told()
    inputs["judge"] = "judge"
    spec = graph.StageSpec("ppo", code, inputs, "artifacts/ppo", "metrics/ppo.json", ("reward",))
    runner._check_files(tmp_path, spec, every)


def test_distill_trains_in_one_process(tmp_path: Path) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(Path(__file__).parents[1] / name, tmp_path)
    edit(tmp_path / "params.yaml", "  processes: 1 ", "  processes: 2 ")
    asked = {stage for stage in graph.load(tmp_path) if runner._processes(stage, tmp_path) is not None}
    assert asked == {"pretrain", "sft", "reward", "ppo", "dpo", "transfer"}


def test_no_such_stage_and_no_stage(workspace: Path) -> None:
    run = run_stage(workspace, "nosuch", check=False)
    assert run.returncode == 2 and "no stage 'nosuch' in dvc.yaml; there are: data" in run.stderr
    bare = subprocess.run([sys.executable, "-m", "pipelines"], cwd=workspace, capture_output=True, text=True)
    assert bare.returncode == 64 and bare.stderr.startswith("usage:")


def torch_on_a_full_disk() -> Exception:
    """What torch.save raises, as of a checkpoint: a fault of the archive that it could not end."""

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if len(data) > 1000:  # the end of the archive has room
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    with pytest.raises(RuntimeError) as error:
        torch.save({"weights": torch.zeros(1000)}, Full())
    return error.value


def torch_without_memory() -> Exception:
    """What torch raises where the kernel gives no more."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    return error.value


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "model.safetensors"), "the disk is full (model.safetensors)"),
        (PermissionError(errno.EACCES, "Permission denied", "artifacts"), "no permission to write or read artifacts"),
        (OSError(errno.EROFS, "Read-only file system", "artifacts"), "no permission"),
        (torch_on_a_full_disk(), "the disk is full"),
        (MemoryError(), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "not enough memory"),
        (torch_without_memory(), "not enough memory"),
    ],
)
def test_the_machines_fault_is_told_as_one(
    error: Exception, told: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Raised in the middle of a stage that has written half its output."""
    from pipelines import tokenizer

    def fail(params: Any, inputs: Any, outputs: Path, context: Any) -> dict[str, float]:
        (outputs / "half").write_text("x")
        raise error

    (workspace / "artifacts/data").mkdir(parents=True)
    monkeypatch.setattr(tokenizer, "run", fail)
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(own_environment()))
    assert runner.main("tokenizer", workspace) == 2
    shown = capsys.readouterr().err
    assert told in shown and "Traceback" not in shown
    assert [path.name for path in (workspace / "artifacts").iterdir()] == ["data"]


def test_a_folder_in_which_nothing_can_be_written_is_told(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Already the first thing that a stage writes, how far it is."""

    def live(run: context.StageContext, *_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(run.root / ".sluice"))

    monkeypatch.setattr(context.StageContext, "live", live)
    monkeypatch.setattr(os, "environ", dict(own_environment()))
    assert runner.main("tokenizer", workspace) == 2
    shown = capsys.readouterr().err
    assert "error: tokenizer: no permission to write or read" in shown and "Read-only file system" in shown


def test_a_terminal_that_cannot_write_a_sample_does_not_end_the_stage(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a Latin-1 locale; a stage shows what it has made when hours may have gone into it."""
    from pipelines import tokenizer

    def say(params: Any, inputs: Any, outputs: Path, context: Any) -> dict[str, float]:
        context.say("⟦안녕⟧")
        raise ParamsError("so far")

    def ctrl_c(_: float) -> None:
        raise KeyboardInterrupt

    (workspace / "artifacts/data").mkdir(parents=True)
    shown = io.BytesIO()
    monkeypatch.setattr(tokenizer, "run", say)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="latin-1"))
    monkeypatch.setattr(os, "environ", dict(own_environment()))
    assert runner.main("tokenizer", workspace) == 2
    assert shown.getvalue() == rb"\u27e6\uc548\ub155\u27e7" + b"\n"


@pytest.mark.slow
def test_a_real_full_disk(workspace: Path) -> None:
    """On a file system of 96 kB, where this machine lets us mount one."""
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase, k=7)) for _ in range(4000)]
    only_source(workspace, "mine.jsonl", [" ".join(draw.choices(words, k=80)) for _ in range(400)])
    noticed(workspace, "mine.jsonl")
    disk = workspace / "artifacts"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root: test_the_machines_fault_is_told_as_one covers the message")
    try:
        run = run_stage(workspace, "data", check=False)
        assert run.returncode == 2 and "the disk is full" in run.stderr and "Traceback" not in run.stderr, run.stderr
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_store_is_away(prepared: Path, tmp_path: Path) -> None:
    """Training goes on; the record waits in the spool, nothing is registered."""
    root = Path(shutil.copytree(prepared, tmp_path / "w", symlinks=True))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    run = subprocess.run(
        [sys.executable, "-m", "pipelines", "pretrain"], cwd=root, capture_output=True, text=True,
        env=own_environment() | {"MLFLOW_TRACKING_URI": address},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert address in run.stderr and "warning" in run.stderr and "Traceback" not in run.stderr
    assert (root / "artifacts/pretrain/model/model.safetensors").exists()
    assert list((root / ".sluice/spool").glob("pretrain-*")), "the record is kept"


def test_a_stage_that_is_being_made_is_not_made_beside_it(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when a `dvc repro` was killed, which leaves its trainer running, and typed again."""
    from pipelines import tokenizer

    began = []

    def run(*_: Any) -> dict[str, float]:
        began.append(True)
        raise ParamsError("so far")

    def ctrl_c(_: float) -> None:
        raise KeyboardInterrupt

    (workspace / "artifacts/data").mkdir(parents=True)
    monkeypatch.setattr(tokenizer, "run", run)
    monkeypatch.setattr(single_writer, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(os, "environ", dict(own_environment()))
    with single_writer.of_stage(workspace, "tokenizer"), single_writer.of_stage(workspace, "sft"):
        assert runner.main("tokenizer", workspace) == 2
        assert f"tokenizer is being made here by process {os.getpid()}" in capsys.readouterr().err
        assert not began and [path.name for path in (workspace / "artifacts").iterdir()] == ["data"]
        with monkeypatch.context() as impatient:
            impatient.setattr(time, "sleep", ctrl_c)
            assert runner.main("tokenizer", workspace) == 130
        told = capsys.readouterr().err.splitlines()
        assert told[0] == f"tokenizer: waiting for process {os.getpid()}, which is making it here"
        assert told[1].startswith("error: tokenizer: stopped by SIGINT") and not began
    assert runner.main("tokenizer", workspace) == 2 and began, "it ends with its holder"


def test_metrics_of_a_speed_do_not_change_on_a_second_run(prepared: Path, tmp_path: Path) -> None:
    """`dvc repro --force` of an unchanged stage leaves dvc.lock unchanged: same output, same metrics file."""
    root = Path(shutil.copytree(prepared, tmp_path / "w", symlinks=True))
    files = [root / "artifacts/tokenizer", root / "metrics/tokenizer.json"]
    before = [artifacts.content_hash(file) for file in files]
    shutil.rmtree(files[0])
    run_stage(root, "tokenizer")
    assert [artifacts.content_hash(file) for file in files] == before


def test_a_stopped_stage_is_told_what_comes_next(prepared: Path) -> None:
    assert "resumes from its checkpoint" in runner._what_next("pretrain", prepared)
    assert "goes on with what this one has finished" in runner._what_next("feedback", prepared)
    assert "starts over" in runner._what_next("data", prepared)
