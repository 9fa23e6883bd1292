"""A snapshot is the model as it was in that step, however it is stored, and a kill changes no byte of it."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from data_folder import write_corpus
from models import TEXTS, model, tokenizer
from pydantic import ValidationError
from test_pretrain import TINY
from transformers import AutoModelForCausalLM

from pipelines import pretrain
from pipelines.core import artifacts, snapshots
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
        ("llama", "lora", {}),
        ("llama", "lora", {"lora_init": "pissa"}),  # the base has moved, too
        ("gpt2", "lora", {"lora_variant": "rslora", "lora_alpha": 3}),  # transposed layers, another scale
        ("llama", "full", {}),
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
    assert str(given.work) not in (place / "adapter_config.json").read_text()
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


@pytest.mark.parametrize("moment", [1, 3, 5, 6])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_kill_changes_no_byte(inputs: dict[str, Path], tmp_path: Path, method: str, moment: int) -> None:
    """Before and after a first checkpoint (after step 3); after a snapshot that is newer than it; after the last."""
    asked = params(inputs, method=method, checkpoint_steps=3)
    still = run(inputs, asked, context(tmp_path / "still"))

    def die(step: int, metrics: dict[str, float]) -> None:
        if step == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(inputs, asked, context(tmp_path / "killed", curve=die))
    again = context(tmp_path / "killed")
    out = run(inputs, asked, again)
    assert any("resuming after step 3" in said for said in again.samples) == (moment > 3)
    assert artifacts.content_hash(out) == artifacts.content_hash(still)
    assert snapshots.steps(out) == [0, 2, 4]


def test_what_a_kill_left_half_written_is_not_published(inputs: dict[str, Path], tmp_path: Path) -> None:
    killed = context(tmp_path)
    half = killed.work / "snapshots" / ".step-000009.partial"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    out = run(inputs, params(inputs, method="full"), killed)
    assert {path.name for path in (out / "snapshots").iterdir()} == {"step-000000", "step-000002", "step-000004"}


def test_none_are_kept_when_none_are_asked_for(inputs: dict[str, Path], tmp_path: Path) -> None:
    for method in ("full", "lora"):
        given = context(tmp_path / method)
        assert not (run(inputs, params(inputs, method=method, snapshots=0), given) / "snapshots").exists()


def test_snapshots_change_nothing_else(inputs: dict[str, Path], tmp_path: Path) -> None:
    hashes = set()
    for count in (0, 3):
        out = run(inputs, params(inputs, method="lora", snapshots=count), context(tmp_path / str(count)))
        shutil.rmtree(out / "snapshots", ignore_errors=True)
        hashes.add(artifacts.content_hash(out))
    assert len(hashes) == 1


def test_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    given = context(tmp_path)
    out = run(inputs, params(inputs, method="lora"), given)
    with pytest.raises(ArtifactError, match=r"no snapshot of step 3; snapshots there are: 0, 2, 4"):
        snapshots.load(out, 3, given)
    (out / "snapshots/step-000002/adapter_model.safetensors").write_bytes(b"not one")
    with pytest.raises(ArtifactError, match="step-000002.*no adapters"):
        snapshots.load(out, 2, given)
    shutil.rmtree(out / "snapshots/final")
    with pytest.raises(ArtifactError, match=r"final has no adapter_model.safetensors; run `dvc repro pretrain`"):
        snapshots.load(out, 0, given)
    shutil.rmtree(out / "snapshots")
    with pytest.raises(ArtifactError, match="none; set pretrain.snapshots"):
        snapshots.load(out, 0, given)
    with pytest.raises(ValidationError, match="snapshots: 2; they need adapters that add.*accepted with it: 0"):
        params(inputs, method="lora", tuning={"lora_variant": "dora"})
    params(inputs, method="lora", tuning={"lora_variant": "dora"}, snapshots=0)
