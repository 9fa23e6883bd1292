"""Adapters of every kind: they begin as the base, learn, and merge to what linear algebra says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import model, prepared, tokenizer
from test_tuning import IDS, loss_of, train

from pipelines.core import training
from pipelines.core.params.tuning import Tuning


@pytest.fixture(scope="module")
def known() -> Any:
    return tokenizer()


VARIANTS: list[dict[str, Any]] = [
    {}, {"lora_variant": "rslora"}, {"lora_variant": "dora"}, {"lora_init": "pissa"}, {"lora_init": "olora"},
    {"lora_init": "gaussian"}, {"lora_init": "orthogonal"}, {"lora_targets": ("q_proj", "down_proj"), "lora_alpha": 3},
    {"lora_variant": "rslora", "lora_init": "pissa"}, {"lora_variant": "dora", "lora_init": "pissa"},
]  # fmt: skip


@pytest.mark.parametrize("dials", VARIANTS, ids=str)
def test_adapters_begin_as_the_base_and_merge_to_what_algebra_says(known: Any, dials: dict[str, Any]) -> None:
    base = model(known)
    start = {name: value.detach().clone() for name, value in base.state_dict().items()}
    logits = base(input_ids=IDS).logits.detach()
    params = Tuning.model_validate({"method": "lora", "lora_rank": 4, "tuning": dials})
    torch.manual_seed(3)
    lm = prepared(base, params)
    torch.testing.assert_close(lm(input_ids=IDS).logits, logits, atol=1e-5, rtol=1e-4)
    train(lm, params)
    layers = {name: part for name, part in lm.named_modules() if hasattr(part, "lora_A")}
    ends = {name.rpartition(".")[2] for name in layers}
    assert ends == set(dials.get("lora_targets", ends)) and len(ends) in (2, 7)

    scale = params.lora_alpha / (math.sqrt(4) if dials.get("lora_variant") == "rslora" else 4)
    expected = {}
    for name, part in layers.items():
        plain = name.removeprefix("base_model.model.") + ".weight"
        delta = scale * part.lora_B["default"].weight @ part.lora_A["default"].weight
        residual = part.base_layer.weight
        moved = dials.get("lora_init") in ("pissa", "olora")
        assert torch.equal(residual, start[plain]) != moved, "only what begins in the base's directions takes them out"
        total = residual + delta
        if dials.get("lora_variant") == "dora":
            total = part.lora_magnitude_vector["default"].weight[:, None] * total / total.norm(dim=1, keepdim=True)
        expected[plain] = total.detach()
    after = lm.eval()(input_ids=IDS).logits.detach()
    assert not torch.allclose(after, logits, atol=1e-3), "it has learned something"
    merged = lm.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, after, atol=1e-4, rtol=1e-4)
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected.get(name, start[name]), atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_merged_before_any_step_is_the_base(known: Any, init: str) -> None:
    base = model(known)
    start = {name: value.detach().clone() for name, value in base.state_dict().items()}
    lm = prepared(base, Tuning.model_validate({"method": "lora", "lora_rank": 4, "tuning": {"lora_init": init}}))
    part = lm.base_model.model.model.layers[0].self_attn.q_proj
    if init == "pissa":  # the four largest singular directions, by torch's own decomposition
        left, values, right = torch.linalg.svd(start["model.layers.0.self_attn.q_proj.weight"])
        ours = 2 * part.lora_B["default"].weight @ part.lora_A["default"].weight
        torch.testing.assert_close(ours, left[:, :4] @ torch.diag(values[:4]) @ right[:4], atol=1e-5, rtol=1e-4)
    for name, value in lm.merge_and_unload().state_dict().items():
        torch.testing.assert_close(value, start[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("dials", VARIANTS, ids=str)
def test_variants_in_bf16(known: Any, dials: dict[str, Any]) -> None:
    """A bf16 base under autocast, as stages compute on such machines: fp32 adapters get finite gradients."""
    params = Tuning.model_validate({"method": "lora", "lora_rank": 4, "tuning": dials})
    lm = prepared(model(known).to(torch.bfloat16), params)
    with training.computing_in("bf16", "cpu", lm):
        loss_of(lm).backward()  # type: ignore[no-untyped-call]
    trained = [value for value in lm.parameters() if value.requires_grad]
    assert all(value.dtype == torch.float32 and value.grad is not None for value in trained)
    assert all(bool(value.grad.isfinite().all()) for value in trained if value.grad is not None)


def test_lora_dropout_is_on_what_adapters_read(known: Any) -> None:
    params = Tuning.model_validate({"method": "lora", "lora_rank": 4, "tuning": {"lora_dropout": 0.5}})
    lm = prepared(model(known), params)
    before = lm.train()(input_ids=IDS).logits
    assert torch.equal(before, lm(input_ids=IDS).logits), "adapters of zeros add nothing, dropped or not"
    train(lm, params)
    assert not torch.equal(lm(input_ids=IDS).logits, lm(input_ids=IDS).logits)
    assert torch.equal(lm.eval()(input_ids=IDS).logits, lm(input_ids=IDS).logits)


def test_pissa_on_transposed_layers(known: Any) -> None:
    """GPT-2 stores its matrices the other way round."""
    base = model(known, "gpt2")
    logits = base(input_ids=IDS).logits.detach()
    params = Tuning.model_validate({"method": "lora", "lora_rank": 4, "tuning": {"lora_init": "pissa"}})
    merged = prepared(base, params).merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits, atol=1e-5, rtol=1e-4)
