"""4-bit weights: error bounds, packing, directories that load."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_int8 import IDS, logits, tiny
from transformers import AutoModelForCausalLM

from pipelines.core import decoding, int4, int8


def test_no_weight_is_off_by_more_than_half_a_step_and_the_rounding_of_the_grid() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 128) * torch.logspace(-4, 4, 64)[:, None]
    found = int4.grid(weight, 32)
    exact = int4.from_int4(int4.to_int4(weight, found), found)
    scales, zeros = (part.float().repeat_interleave(32, dim=1) for part in found)
    # bf16 keeps 8 bits: the zero point is off by its size / 512, the scale's ends by 7.5 scales / 256
    bound = scales / 2 + zeros.abs() / 256 + scales * 8 / 128
    assert ((weight - exact).abs() <= bound).all()


def test_packing_and_what_codes_stand_for() -> None:
    codes = torch.arange(32, dtype=torch.uint8).view(2, 16) % 16
    assert torch.equal(int4.unpack(int4.pack(codes)), codes)
    assert int4.pack(codes)[0, 0] == 0 + (1 << 4)
    found = int4.Grid(torch.full((2, 1), 0.5).bfloat16(), torch.full((2, 1), 3.0).bfloat16())
    assert int4.from_int4(codes, found)[0].tolist() == [3 + (code - 8) / 2 for code in range(16)]


def test_groups_of_equal_weights_zeros_and_bad_shapes() -> None:
    weight = torch.full((4, 64), 0.5)
    weight[1] = 0
    found = int4.grid(weight, 32)
    assert torch.equal(int4.from_int4(int4.to_int4(weight, found), found), weight)
    with pytest.raises(ValueError, match=r"48 inputs are no multiple of group_size 32"):
        int4.grid(torch.randn(4, 48), 32)
    weight[2, 3] = float("inf")
    with pytest.raises(ValueError, match="1 of 256 weights are NaN or infinite"):
        int4.grid(weight, 32)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (96, 40), (64, 7)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_packed_product_is_that_of_the_dense_weight(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(inputs)
    layer = int4.Int4Linear(inputs, outputs, 32, bias)
    weight = torch.randn(outputs, inputs)
    found = int4.grid(weight, 32)
    layer.weight.data, layer.scales.data, layer.zeros.data = int4.pack(int4.to_int4(weight, found)), *found
    if layer.bias is not None:
        layer.bias.data = torch.randn(outputs)
    x = torch.randn(3, inputs).bfloat16()
    exact = torch.nn.functional.linear(x.float(), layer.dense().float(), layer.bias)
    for said in (layer(x), layer.product()(x)):
        assert torch.allclose(said.float(), exact, atol=0.15, rtol=0.03)


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen2", False)])
def test_a_directory_loads_as_what_was_saved(kind: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(kind, tied)
    exact = logits(model)
    made = int4.quantize(model, 32, keep=["layers.0.mlp.down_proj"])
    assert (logits(made) - exact).norm() / exact.norm() < 0.3
    made.save_pretrained(tmp_path)
    loaded = int4.load(tmp_path)
    assert torch.equal(logits(loaded), logits(made))
    assert type(loaded.get_submodule("model.layers.0.mlp.down_proj")) is torch.nn.Linear
    assert type(loaded.get_submodule("model.layers.1.mlp.down_proj")) is int4.Int4Linear
    assert isinstance(loaded.get_output_embeddings(), int8.Int8Linear)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(made))
    said = loaded.generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(said, made.generate(IDS, max_new_tokens=6, do_sample=False))
    plain = int4.dense(copy.deepcopy(loaded))
    assert torch.allclose(logits(plain), logits(loaded), atol=0.05 * float(exact.abs().max()))
    decoder = decoding.Decoder(loaded, 16)
    got = torch.stack([decoder.prefill([1])] + [decoder.step(token) for token in IDS[0, 1:].tolist()])
    assert (got - logits(loaded)[0]).norm() / got.norm() < 0.03
