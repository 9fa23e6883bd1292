"""LoRA's product in one kernel: the numbers of peft's own forward, backward and merges."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers.pytorch_utils import Conv1D

from pipelines.core import low_rank


def adapted(kind: str, **how: Any) -> Any:
    """A layer of 6 x 10 with an adapter of rank 3, none of whose parts is zero."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 10) if kind == "linear" else Conv1D(10, 6)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], fan_in_fan_out=kind == "conv1d", **how)
    model: Any = inject_adapter_in_model(config, torch.nn.Sequential(layer))
    torch.nn.init.normal_(model[0].lora_B["default"].weight)
    return model


def outcome(model: Any) -> dict[str, torch.Tensor]:
    """What comes out for a batch of 2 x 4, and all gradients of its sum of squares."""
    x = torch.arange(48.0).view(2, 4, 6).div(10).sin().requires_grad_()
    torch.manual_seed(7)  # of dropout
    y = model(x)
    y.square().sum().backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found}


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_same_numbers_and_gradients(kind: str, dropout: float) -> None:
    theirs = adapted(kind, lora_dropout=dropout)
    ours = copy.deepcopy(theirs)
    low_rank.fuse(ours)
    expected, found = outcome(theirs), outcome(ours)
    assert found.keys() == expected.keys() >= {"y", "x", "0.lora_A.default.weight", "0.lora_B.default.weight"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_to_the_same_bits(safe: bool, dtype: torch.dtype) -> None:
    theirs = adapted("linear")
    theirs[0].get_base_layer().to(dtype)
    ours = copy.deepcopy(theirs)
    low_rank.fuse(ours)
    for model in (theirs, ours):
        model[0].merge(safe_merge=safe)
    assert torch.equal(ours[0].get_base_layer().weight, theirs[0].get_base_layer().weight)
    for model in (theirs, ours):
        model[0].unmerge()
    assert torch.equal(ours[0].get_base_layer().weight, theirs[0].get_base_layer().weight)


def test_under_autocast_it_stays_in_the_bases_type() -> None:
    model = adapted("linear")
    model[0].get_base_layer().to(torch.bfloat16)
    model[0].cast_input_dtype_enabled = False  # as in `training.computing_in`
    x = torch.ones(1, 2, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        low_rank.fuse(model)
        after = model(x)
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after, before, atol=0.05, rtol=0.02)


def test_adapters_of_another_kind_stay_as_they_are() -> None:
    model = adapted("linear", use_dora=True)
    kind = type(model[0].lora_variant["default"])
    low_rank.fuse(model)
    assert type(model[0].lora_variant["default"]) is kind


def test_parts_of_a_batch_pass_through_adapters_of_their_own() -> None:
    model = adapted("linear")
    model[0].update_layer("other", r=2, lora_alpha=3, config=LoraConfig(r=2, lora_alpha=3))
    torch.nn.init.normal_(model[0].lora_B["other"].weight)
    low_rank.fuse(model)
    x, layer = torch.arange(72.0).view(6, 2, 6).sin(), model[0]
    expected = []
    for part, name in zip(x.chunk(3), ("default", None, "other"), strict=True):
        layer.enable_adapters(name is not None)
        if name is not None:
            layer.set_adapter(name)
        expected.append(model(part))
    with torch.no_grad(), low_rank.side_by_side(("default", None, "other")):
        layer.set_adapter("default")
        torch.testing.assert_close(model(x), torch.cat(expected))
        torch.testing.assert_close(model(x.flatten(0, 1)), torch.cat(expected).flatten(0, 1))
    assert torch.equal(model(x[:2]), expected[0]), "outside, all of a batch passes through the active one"


@pytest.mark.parametrize("changed", ["dora", "layers", "experts"])
def test_where_adapters_cannot_stand_side_by_side(changed: str) -> None:
    model = adapted("linear")
    low_rank.fuse(model)
    assert low_rank.fits_side_by_side(model)
    if changed == "dora":
        model = adapted("linear", use_dora=True)
        low_rank.fuse(model)
    elif changed == "layers":
        model.append(adapted("linear")[0])
        model[1].update_layer("other", r=2, lora_alpha=3, config=LoraConfig(r=2, lora_alpha=3))
        low_rank.fuse(model)
    else:
        model.add_module("experts", torch.nn.Linear(6, 10))
    assert not low_rank.fits_side_by_side(model)
