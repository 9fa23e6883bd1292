"""Snapshots along pre-training: what was trained by some earlier steps, kept beside the final model.

They show what a model learns when: GPT-1 follows its zero-shot answers along pre-training (section 5, figure 2
right). In the output of `pretrain`:

* `snapshots/step-000123/`, after so many steps; step 0 is the start. All weights, or the top blocks (`full`,
  `last_n`): `model.safetensors` in bf16, with what is trained and nothing else. Adapters (`lora`, `qlora`): a peft
  directory, `adapter_config.json` and `adapter_model.safetensors`, in the adapters' fp32.
* `snapshots/final/`, of adapters alone: the last ones, which `model/` has merged.

Nothing reads the base model again, which may be a file that takes long: the final model is base + B_final A_final, so
base + B A of a step is the final model - B_final A_final + B A. In bf16 this is approximate: what merging rounded
away of the base, half a unit in the last place of each weight, does not come back.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from pipelines.core import artifacts
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError

FOLDER = "snapshots"
FINAL = "final"
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"  # peft's name


def due(total: int, count: int) -> list[int]:
    """After which of `total` steps to keep what is trained: the start and `count` more, evenly, before the end.

    None if `count` is 0; fewer where there are fewer steps.
    """
    return sorted({round(total * part / (count + 1)) for part in range(count + 1)} - {total}) if count else []


def save(model: Any, base: str | None, step: int, context: StageContext) -> None:
    """Keep what is trained after `step` steps in the stage's working folder, whole or not at all.

    It stays there when the stage is killed: a run that resumes from a later checkpoint finds it, one that resumes from
    an earlier one makes the same bytes again. Every process must ask; the first one writes.

    Args:
        base: what the params name as the base model, for the adapter's configuration.
    """
    from pipelines.core import training

    state = training.trained_state(model)
    if context.world.leads:
        with artifacts.published(context.work / FOLDER / _name(step)) as draft:
            _write(model, state, base, draft)


def publish(model: Any, base: str | None, outputs: Path, context: StageContext) -> None:
    """Copy the snapshots to the stage's output, and write the final adapters beside them; nothing if there are none.

    Copied, not moved: a run that is killed from here on resumes after its last step and copies again.

    Args:
        model: after training, its adapters not yet merged.
    """
    from pipelines.core import training

    kept = context.work / FOLDER
    if not kept.exists():
        return
    place = outputs / FOLDER
    shutil.copytree(kept, place, ignore=shutil.ignore_patterns(".*"))  # not what a kill left half written
    if hasattr(model, "peft_config"):
        (place / FINAL).mkdir()
        _write(model, training.trained_state(model), base, place / FINAL)


def steps(place: Path) -> list[int]:
    """Steps of the snapshots in an output of `pretrain`, in order; the final model is not one of them."""
    return sorted(int(found.name.removeprefix("step-")) for found in (place / FOLDER).glob("step-*"))


def load(place: Path, step: int, context: StageContext) -> Any:
    """The causal language model as it was after `step` steps, in the context's type and on its device.

    Args:
        place: output of `pretrain`.

    Raises:
        ArtifactError: there is no such snapshot, or it does not fit the final model beside it.
    """
    from pipelines.core import attention, language_models

    snapshot = place / FOLDER / _name(step)
    if not snapshot.is_dir():
        there = ", ".join(map(str, steps(place))) or "none; set pretrain.snapshots and run `dvc repro pretrain`"
        raise ArtifactError(f"{place} has no snapshot of step {step}; snapshots there are: {there}")
    kind = attention.choose(context.device, attention.LONGEST)
    model = language_models.load(str(place / "model"), context.dtype, kind).to(context.device)
    if (snapshot / WEIGHTS).exists():
        _put_weights(model, snapshot / WEIGHTS)
    else:
        model = _exchange_adapters(model, place / FOLDER / FINAL, snapshot)
    return model.eval()


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _write(model: Any, state: dict[str, Any], base: str | None, place: Path) -> None:
    """What is trained, by name, as files that belong to their content alone."""
    import torch
    from safetensors.torch import save_file

    if not hasattr(model, "peft_config"):
        held = {name: value.to("cpu", torch.bfloat16).contiguous() for name, value in state.items()}
        save_file(held, place / WEIGHTS, metadata={"format": "pt"})
        return
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    save_file({name: value.cpu().contiguous() for name, value in found.items()}, place / ADAPTER)
    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.init_lora_weights = True  # else peft would take PiSSA's or OLoRA's directions out of the base once more
    config.target_modules = sorted(config.target_modules)  # a set, whose order changes from run to run
    config.save_pretrained(place)


def _put_weights(model: Any, file: Path) -> None:
    """Give the model the weights of a file; the others stay.

    Raises:
        ArtifactError: the file is damaged, or the model has no weight of that name and shape.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        held = load_file(file)
    except SafetensorError as error:
        raise ArtifactError(f"{file} is damaged ({error}); run `dvc repro pretrain`") from None
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in held.items():
            if name not in weights or weights[name].shape != value.shape:
                raise ArtifactError(f"{file}: {name} {tuple(value.shape)} is no weight of the model beside it")
            weights[name].copy_(value)


def _exchange_adapters(model: Any, old: Path, new: Path) -> Any:
    """The model with what one adapter added taken away and what another adds put in its place, rounded once.

    Raises:
        ArtifactError: an adapter is missing or does not fit the model.
    """
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from safetensors import SafetensorError

    if missing := [place for place in (old, new) if not (place / ADAPTER).is_file()]:  # peft would ask the hub
        raise ArtifactError(f"{missing[0]} has no {ADAPTER}; run `dvc repro pretrain`")
    try:
        adapted = PeftModel.from_pretrained(model, str(old), adapter_name="old")
        adapted.load_adapter(str(new), adapter_name="new")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{new}, {old}: no adapters of the model beside them: {error}") from None
    with torch.no_grad():
        for layer in adapted.modules():
            if isinstance(layer, LoraLayer):
                weight = layer.get_base_layer().weight
                change = layer.get_delta_weight("new").float() - layer.get_delta_weight("old").float()
                weight.copy_(weight.float() + change)
    return adapted.unload()
