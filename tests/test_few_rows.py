"""Products with reordered weights: the same bits, for any number of rows; nothing is left behind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipelines.core import few_rows

needs_bf16 = pytest.mark.skipif(not few_rows._helps("bf16"), reason="this processor has no products in bf16")


def layers(dtype: torch.dtype) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(96, 200, bias=False), torch.nn.Linear(200, 72)).to(dtype)


@needs_bf16
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 7, 33, 256, 257])
def test_the_same_bits(dtype: torch.dtype, rows: int) -> None:
    model, given = layers(dtype), torch.randn(rows, 1, 96, dtype=dtype)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(given)
        with few_rows.quick(model, "bf16"):
            assert all("forward" in vars(part) for part in model)
            found = model(given)
        assert not any("forward" in vars(part) for part in model)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


@needs_bf16
def test_weights_are_those_of_the_moment() -> None:
    model, given = layers(torch.bfloat16), torch.ones(2, 96, dtype=torch.bfloat16)
    with torch.inference_mode():
        for _ in range(2):
            model[0].weight.data.mul_(2.0)
            with few_rows.quick(model, "bf16"):
                found = model(given)
            assert torch.equal(found, model(given))


def test_in_fp32_nothing_happens() -> None:
    model = layers(torch.float32)
    with few_rows.quick(model, "fp32"):
        assert not any("forward" in vars(part) for part in model)


def test_an_error_leaves_nothing_behind() -> None:
    model = layers(torch.bfloat16)
    with pytest.raises(RuntimeError), few_rows.quick(model, "bf16"):
        model(torch.ones(2, 95, dtype=torch.bfloat16))
    assert not any("forward" in vars(part) for part in model)


@needs_bf16
def test_weights_that_are_not_used_are_not_reordered(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    reorder = torch.ops.mkldnn._reorder_linear_weight
    noted = SimpleNamespace(
        _reorder_linear_weight=lambda weight, rows: (seen.append(len(weight)), reorder(weight, rows))[1],
        _linear_pointwise=torch.ops.mkldnn._linear_pointwise,
        _is_mkldnn_bf16_supported=lambda: True,
    )
    monkeypatch.setattr(torch.ops, "mkldnn", noted)
    model = layers(torch.bfloat16)
    with torch.inference_mode(), few_rows.quick(model, "bf16"):
        for _ in range(2):
            model[0](torch.ones(2, 96, dtype=torch.bfloat16))
    assert seen == [200]
