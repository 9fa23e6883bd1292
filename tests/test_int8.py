"""Weight-only int8: the error bound, what rounding may not break, and directories that transformers loads."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from pipelines.core import int4, int8

IDS = torch.tensor([[1, 5, 9, 2, 7, 3, 8, 4]])


def tiny(kind: str = "llama", tied: bool = True, **more: object) -> torch.nn.Module:
    """A random decoder of two blocks, 64 wide, in fp32."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96}
    else:
        sizes |= {"num_key_value_heads": 2, "head_dim": 16}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, tie_word_embeddings=tied, **({"vocab_size": 96} | sizes | ids | more))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    """In fp32, without a gradient."""
    with torch.inference_mode():
        return model(ids).logits.float()


def test_no_weight_is_off_by_more_than_half_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(200, 300) * torch.logspace(-6, 6, 200)[:, None]
    codes, scale = int8.to_int8(weight)
    error = (weight - codes.float() * scale.float()[:, None]).abs()
    assert codes.dtype is torch.int8 and scale.dtype is torch.bfloat16
    assert (error <= scale.float()[:, None] / 2 * (1 + 1e-5)).all()
    assert codes.abs().amax() <= 127
    # The largest weight of a row uses the range: the scale is no wider than bf16's rounding asks for.
    assert (scale.float() <= weight.abs().amax(1) / 127 * (1 + 2**-7)).all()


@pytest.mark.parametrize("width", [256, 576, 2048])
def test_the_relative_error_of_gaussian_weights_is_that_of_uniform_rounding(width: int) -> None:
    torch.manual_seed(width)
    weight = torch.randn(256, width)
    codes, scale = int8.to_int8(weight)
    measured = ((weight - codes.float() * scale.float()[:, None]).norm() / weight.norm()).item()
    step = weight.abs().amax(1) / 127  # an error spread evenly over a step has its size / sqrt(12)
    predicted = math.sqrt(float((step**2 / 12).mean()))
    assert measured == pytest.approx(predicted, rel=0.02)


def test_a_row_of_zeros_stays_zero_and_an_outlier_hurts_its_own_row_alone() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    weight[1] = 0
    spoiled = weight.clone()
    spoiled[2, 5] = 1e4
    codes, scale = int8.to_int8(weight)
    others, scales = int8.to_int8(spoiled)
    assert codes[1].eq(0).all() and scale[1] == 1
    assert torch.equal(codes[[0, 1, 3]], others[[0, 1, 3]]) and torch.equal(scale[[0, 1, 3]], scales[[0, 1, 3]])
    assert others[2].count_nonzero() == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_the_layer_s_name(bad: float) -> None:
    model = tiny()
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[3, 4] = bad
    with pytest.raises(
        ValueError, match=r"layer model\.layers\.1\.mlp\.up_proj: 1 of 6144 weights are NaN or infinite"
    ):
        int8.quantize(model)


@pytest.mark.parametrize("rows", [1, int8.FEW_ROWS, int8.FEW_ROWS + 1])
@pytest.mark.parametrize(
    ("inputs", "outputs", "bias"), [(64, 48, False), (64, 48, True), (50, 13, False), (7, 3, True)]
)
def test_a_layer_is_the_product_with_what_it_stands_for(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(rows)
    layer = int8.Int8Linear(inputs, outputs, bias)
    layer.weight.data, layer.scale.data = int8.to_int8(torch.randn(outputs, inputs))
    if layer.bias is not None:
        layer.bias.data = torch.randn(outputs)
    x = torch.randn(1, rows, inputs).bfloat16()
    exact = torch.nn.functional.linear(x.float(), layer.dense().float(), layer.bias)
    assert torch.allclose(layer(x).float(), exact, atol=0.15, rtol=0.02)
    assert torch.allclose(layer.product()(x[0]).float(), exact[0], atol=0.15, rtol=0.02)


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("gpt2", True)])
def test_a_directory_loads_as_what_was_saved(kind: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(kind, tied)
    exact = logits(model)
    made = int8.quantize(model)
    assert (logits(made) - exact).norm() / exact.norm() < 0.05
    made.save_pretrained(tmp_path)
    loaded = int8.load(tmp_path)
    assert torch.equal(logits(loaded), logits(made))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(made))
    head, tokens = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert (head.weight.data_ptr() == tokens.weight.data_ptr()) is tied
    said = loaded.generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(said, made.generate(IDS, max_new_tokens=8, do_sample=False))
    # And what was loaded can be saved again.
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(int8.load(tmp_path / "again")), logits(made))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_head_and_the_embedding_it_is_tied_to_are_kept_together(name: str, tmp_path: Path) -> None:
    made = int8.quantize(tiny(), [name])
    made.save_pretrained(tmp_path)
    for one in (made, int8.load(tmp_path)):
        assert type(one.get_output_embeddings()) is torch.nn.Linear
        assert type(one.get_input_embeddings()) is torch.nn.Embedding
        assert one.get_output_embeddings().weight is one.get_input_embeddings().weight


def test_what_is_kept_is_not_touched_and_a_name_s_end_is_enough(tmp_path: Path) -> None:
    model = tiny()
    before = copy.deepcopy(model)
    made = int8.quantize(model, ["down_proj", "model.layers.0.self_attn.*"])
    kinds = {name: type(module) for name, module in made.named_modules()}
    assert kinds["model.layers.1.mlp.down_proj"] is torch.nn.Linear
    assert kinds["model.layers.0.self_attn.q_proj"] is torch.nn.Linear
    assert kinds["model.layers.1.self_attn.q_proj"] is int8.Int8Linear
    same = before.get_submodule("model.layers.1.mlp.down_proj").weight.bfloat16()
    assert torch.equal(made.get_submodule("model.layers.1.mlp.down_proj").weight, same)
    made.save_pretrained(tmp_path)
    assert type(int8.load(tmp_path).get_submodule("model.layers.1.mlp.down_proj")) is torch.nn.Linear


def test_keeping_the_embedding_keeps_a_tied_head() -> None:
    made = int8.quantize(tiny(), ["embed_tokens"])
    assert type(made.get_input_embeddings()) is torch.nn.Embedding
    assert made.get_output_embeddings().weight is made.get_input_embeddings().weight


def test_dense_is_the_same_model_with_plain_layers(tmp_path: Path) -> None:
    made = int8.quantize(tiny())
    said = logits(made)
    plain = int8.dense(copy.deepcopy(made))
    assert not any(isinstance(module, int8.Int8Linear | int8.Int8Embedding) for module in plain.modules())
    assert torch.allclose(logits(plain), said, atol=0.03 * float(said.abs().max()))


def test_a_classifier_keeps_its_head(tmp_path: Path) -> None:
    config = tiny().config
    config.num_labels = 1
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    made = int8.quantize(model)
    assert type(made.score) is torch.nn.Linear
    made.save_pretrained(tmp_path)
    assert torch.equal(logits(int8.load(tmp_path, classifier=True)), logits(made))


def test_a_quarter_of_the_bytes(tmp_path: Path) -> None:
    made = int8.quantize(tiny())
    made.save_pretrained(tmp_path)
    parameters = sum(value.numel() for value in tiny().parameters())
    size = (tmp_path / "model.safetensors").stat().st_size
    assert (
        parameters < size < 1.35 * parameters
    )  # a byte a weight; scales, norms and the header are much of a tiny model


@pytest.mark.parametrize("kind", ["gemma", "gemma3_text"])
@pytest.mark.parametrize("into", ["int8", "int4"])
def test_an_embedding_that_scales_its_rows_is_kept(kind: str, into: str) -> None:
    model = tiny(kind)
    exact = torch.log_softmax(logits(model), -1)
    smaller = int8.quantize(copy.deepcopy(model)) if into == "int8" else int4.quantize(copy.deepcopy(model), 32)
    found = torch.log_softmax(logits(smaller), -1)
    assert type(smaller.get_input_embeddings()) is type(model.get_input_embeddings())
    assert float((exact.exp() * (exact - found)).sum(-1).mean()) < (1e-3 if into == "int8" else 3e-2)
