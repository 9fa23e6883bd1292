"""A snapshot is the model as it was in that step, however it is stored, and a kill changes no byte of it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from data_folder import write_corpus
from models import TEXTS, model, tokenizer
from pydantic import ValidationError
from safetensors.torch import save_file
from test_pretrain import TINY
from transformers import AutoModelForCausalLM

from pipelines import pretrain
from pipelines.core import artifacts, fine_tuning, snapshots
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError
from pipelines.core.params.pretrain import PretrainParams

SHORT = {**TINY, "tokens": 1536, "lr": 1e-2}  # six steps: snapshots of 0, 2 and 4
WEIGHTS = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    known = tokenizer()
    known.save_pretrained(root / "tokenizer")
    for architecture in ("llama", "gpt2"):
        model(known, architecture).save_pretrained(root / architecture)
        known.save_pretrained(root / architecture)
    return {"root": root, "data": write_corpus(root / "data", TEXTS), "tokenizer": root / "tokenizer"}


def params(inputs: dict[str, Path], base: str | None = "llama", **changes: Any) -> PretrainParams:
    return PretrainParams(**{**SHORT, "base": str(inputs["root"] / base) if base else None, **changes})


def context(root: Path, **more: Any) -> StageContext:
    return StageContext(stage="pretrain", root=root, fingerprint="f" * 64, **more)


def run(inputs: dict[str, Path], asked: PretrainParams, given: StageContext) -> Path:
    out = given.root / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    pretrain.run(asked, {key: inputs[key] for key in ("data", "tokenizer")}, out, given)
    return out


def weights(model: Any) -> WEIGHTS:
    return {name: value.detach().float().clone() for name, value in model.named_parameters()}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[int, WEIGHTS]:
    """The plain model in the steps that a snapshot is taken of: a copy of what is trained, merged there and then."""
    found: dict[int, WEIGHTS] = {}
    real = snapshots.save

    def save(lm: Any, base: str | None, step: int, given: StageContext) -> None:
        real(lm, base, step, given)
        plain = copy.deepcopy(lm)
        found[step] = weights(plain.merge_and_unload() if hasattr(plain, "merge_and_unload") else plain)

    monkeypatch.setattr(snapshots, "save", save)
    return found


def test_evenly_spaced_from_the_start_before_the_end() -> None:
    assert snapshots.due(12, 2) == [0, 4, 8]
    assert snapshots.due(16, 2) == [0, 5, 11]
    assert snapshots.due(2, 5) == [0, 1] and snapshots.due(1, 2) == [0]
    assert snapshots.due(12, 0) == []


@pytest.mark.parametrize(
    ("base", "method", "dials"),
    [
        ("llama", "lora", {"lora_init": "pissa"}),  # the base has moved, too
        ("gpt2", "lora", {"lora_variant": "rslora", "lora_alpha": 3}),  # transposed layers, another scale
        ("llama", "last_n", {"layers": 1}),
        (None, "full", {}),
    ],
)
def test_a_snapshot_is_the_model_of_its_step(
    inputs: dict[str, Path], tmp_path: Path, seen: dict[int, WEIGHTS], base: str | None, method: str, dials: Any
) -> None:
    given = context(tmp_path)
    out = run(inputs, params(inputs, base, method=method, tuning=dials), given)
    assert snapshots.steps(out) == [0, 2, 4] == sorted(seen)
    for step, expected in seen.items():
        found = weights(snapshots.load(out, step, given))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # Adapters come back to fp32's rounding, weights in bf16.
            torch.testing.assert_close(found[name], value, rtol=0 if method == "lora" else 2**-8, atol=1e-6)
    final = weights(AutoModelForCausalLM.from_pretrained(out / "model"))
    moved = {step: max(float((final[n] - was[n]).abs().max()) for n in final) for step, was in seen.items()}
    assert moved[0] > moved[4] > 1e-4, "the steps differ by far more than what is lost"


def test_adapters_are_peft_directories_of_the_named_base(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Whoever has the base can merge them with peft alone; over 4 bits the base is the one before quantising."""
    from peft import PeftModel

    given = context(tmp_path)
    asked = params(inputs, method="qlora")
    out = run(inputs, asked, given)
    assert {path.name for path in (out / "snapshots").rglob("*") if path.is_file()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    place = out / "snapshots" / "step-000004"
    config = json.loads((place / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == asked.base, "not the copy in the working folder"
    assert config["target_modules"] == sorted(config["target_modules"]), "a set's order is another one in each run"
    base = AutoModelForCausalLM.from_pretrained(str(asked.base))
    merged = weights(PeftModel.from_pretrained(base, place).merge_and_unload())
    found = weights(snapshots.load(out, 4, given))
    for name, value in merged.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_in_bf16_the_start_is_the_base_to_two_roundings(inputs: dict[str, Path], tmp_path: Path) -> None:
    given = context(tmp_path, precision="bf16")
    asked = params(inputs, method="lora")
    out = run(inputs, asked, given)
    found = snapshots.load(out, 0, given)
    assert found.dtype is torch.bfloat16
    base = weights(AutoModelForCausalLM.from_pretrained(str(asked.base), dtype=torch.bfloat16))
    final = weights(AutoModelForCausalLM.from_pretrained(out / "model"))
    for name, value in weights(found).items():
        # Half a unit in the last place (2^-8 of the value at most) when it was merged, half a one when taken apart.
        allowed = 2**-8 * (final[name].abs() + base[name].abs()) + 1e-6
        assert ((value - base[name]).abs() <= allowed).all(), name


@pytest.fixture(scope="module")
def still(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Outputs of runs that nothing disturbs, by method."""
    place = tmp_path_factory.mktemp("still")
    asked = {method: params(inputs, method=method, checkpoint_steps=3) for method in ("full", "lora")}
    return {method: run(inputs, one, context(place / method)) for method, one in asked.items()}


@pytest.mark.parametrize("moment", ["after a snapshot newer than the checkpoint", "after all was published"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_kill_changes_no_byte(
    inputs: dict[str, Path],
    still: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    moment: str,
) -> None:
    def die(*given: Any) -> None:
        if moment == "after all was published" or given[0] == 5:  # the step of a point of the curve
            raise KeyboardInterrupt

    asked, killed = params(inputs, method=method, checkpoint_steps=3), context(tmp_path)
    half = killed.work / "snapshots" / ".step-000002.partial"  # what another kill left
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if moment == "after all was published":
            patched.setattr(fine_tuning, "save", die)
        else:
            killed.curve = die
        run(inputs, asked, killed)
    newest = {path.name for path in (killed.work / "checkpoints").iterdir()}
    assert newest == ({"step-3"} if killed.curve is die else {"step-3", "step-6"})
    again = context(tmp_path)
    out = run(inputs, asked, again)
    assert any("resuming after step" in said for said in again.samples)
    assert artifacts.content_hash(out) == artifacts.content_hash(still[method])
    assert snapshots.steps(out) == [0, 2, 4]


def test_without_snapshots_everything_else_is_the_same(
    inputs: dict[str, Path], still: dict[str, Path], tmp_path: Path
) -> None:
    out = run(inputs, params(inputs, method="lora", snapshots=0), context(tmp_path))
    assert not (out / "snapshots").exists() and snapshots.steps(out) == []
    for path in (found for found in out.rglob("*") if found.is_file()):
        assert path.read_bytes() == (still["lora"] / path.relative_to(out)).read_bytes(), path


def test_refused(inputs: dict[str, Path], still: dict[str, Path], tmp_path: Path) -> None:
    given, lora, full = context(tmp_path), tmp_path / "lora", tmp_path / "full"
    shutil.copytree(still["lora"], lora)
    shutil.copytree(still["full"], full)
    with pytest.raises(ArtifactError, match=r"no snapshot of step 3; snapshots there are: 0, 2, 4"):
        snapshots.load(lora, 3, given)
    (lora / "snapshots/step-000002/adapter_model.safetensors").write_bytes(b"not one")
    with pytest.raises(ArtifactError, match="step-000002.*no adapters"):
        snapshots.load(lora, 2, given)
    (full / "snapshots/step-000002/model.safetensors").write_bytes(b"not one")
    with pytest.raises(ArtifactError, match="step-000002/model.safetensors is damaged"):
        snapshots.load(full, 2, given)
    save_file({"lm.weight": torch.zeros(2)}, full / "snapshots/step-000002/model.safetensors")
    with pytest.raises(ArtifactError, match=r"lm.weight \(2,\) is no weight of the model beside it"):
        snapshots.load(full, 2, given)
    shutil.rmtree(lora / "snapshots/final")
    with pytest.raises(ArtifactError, match=r"final has no adapter_model.safetensors; run `dvc repro pretrain`"):
        snapshots.load(lora, 0, given)
    shutil.rmtree(lora / "snapshots")
    with pytest.raises(ArtifactError, match="none; set pretrain.snapshots"):
        snapshots.load(lora, 0, given)
    dora: dict[str, Any] = {"method": "lora", "tuning": {"lora_variant": "dora"}}
    with pytest.raises(ValidationError, match="snapshots: 2; they need adapters that add.*accepted with it: 0"):
        params(inputs, **dora)
    params(inputs, **dora, snapshots=0)
