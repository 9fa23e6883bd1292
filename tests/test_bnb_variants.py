"""bitsandbytes on a CPU: the code book, double quantization, and four silent failures, each with its guard."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from models import tokenizer
from scipy.stats import norm
from test_int8 import IDS, logits, tiny
from transformers import AutoModelForCausalLM

from pipelines.core import bnb_variants
from pipelines.core.errors import ArtifactError


def saved(place: Path, **more: int) -> Path:
    """A random decoder 128 wide with its tokenizer."""
    model = tiny(hidden_size=128, intermediate_size=192, head_dim=32, **more)
    model.save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("bnb") / "source")


@pytest.fixture(scope="module")
def made(source: Path) -> Path:
    bnb_variants.nf4(source, source.parent / "nf4")
    return source.parent / "nf4"


def test_the_code_book_is_that_of_the_paper() -> None:
    """QLoRA, appendix E: quantiles of the normal distribution, 8 on one side and 9 on the other, zero among both."""
    offset = 0.9677083
    up = norm.ppf(torch.linspace(offset, 0.5, 9)[:-1])
    down = norm.ppf(torch.linspace(offset, 0.5, 8)[:-1])
    book = torch.tensor(sorted([*up, 0.0, *(-down)]), dtype=torch.float32)
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(64, 64), quant_type="nf4", requires_grad=False)
    layer.to("cpu")
    assert torch.allclose(layer.weight.quant_state.code, book / book.max(), atol=1e-3)


def test_scales_are_quantized_again_in_blocks_of_256_around_their_mean() -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 256)
    codes, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    exact = weight.view(-1, 64).abs().amax(1)
    assert float(state.offset) == pytest.approx(float(exact.mean()), rel=1e-6)
    ours = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert state.absmax.dtype is torch.uint8 and state.state2.blocksize == 256
    centred = (exact - exact.mean()).view(-1, 256)
    assert ((ours - exact).view(-1, 256).abs().amax(1) <= centred.abs().amax(1) / 30).all()  # dynamic 8 bits
    back = bnb.functional.dequantize_4bit(codes, state)
    assert float((back - weight).norm() / weight.norm()) == pytest.approx(0.092, abs=0.003)


def test_bits_a_parameter_are_measured(tmp_path: Path) -> None:
    model = tiny(hidden_size=1024, intermediate_size=2048, head_dim=256)
    model.save_pretrained(tmp_path / "source")
    tokenizer().save_pretrained(tmp_path / "source")
    bnb_variants.nf4(tmp_path / "source", tmp_path / "nf4")
    # 4 + 8 / 64 + 32 / (64 x 256), and the code books and states of each layer
    assert 4.1269 < bnb_variants.bits_per_parameter(tmp_path / "nf4") < 4.15
    with pytest.raises(ArtifactError, match="no layer in 4 bits"):
        bnb_variants.bits_per_parameter(tmp_path / "source")


def test_training_after_an_evaluation_still_has_a_gradient(made: Path) -> None:
    model = bnb_variants.load(made)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(2, 3, 128, dtype=torch.bfloat16, requires_grad=True)
    model.eval()
    with torch.no_grad():
        model(IDS)  # unguarded, this repacks the weights
    layer(x).sum().backward()
    assert x.grad is not None and bool((x.grad != 0).any())


def test_the_weights_are_the_same_after_a_forward(made: Path) -> None:
    model = bnb_variants.load(made)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    before = layer.weight.data.clone()
    model(IDS)
    assert torch.equal(layer.weight.data, before)
    assert torch.equal(logits(model), logits(bnb_variants.load(made)))


def test_a_directory_is_what_was_in_memory(source: Path, made: Path, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    loaded = bnb_variants.load(made)
    weight = whole.get_submodule("model.layers.1.mlp.gate_proj").weight
    codes, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    theirs = bnb_variants.weight_of(loaded.get_submodule("model.layers.1.mlp.gate_proj"))
    assert torch.equal(theirs, bnb.functional.dequantize_4bit(codes, state).float())
    assert (logits(loaded) - logits(whole)).norm() / logits(whole).norm() < 0.35
    assert loaded.generate(IDS, max_new_tokens=4, do_sample=False).shape[1] == IDS.shape[1] + 4


def test_codes_and_scales_of_our_own_are_stored(source: Path, tmp_path: Path) -> None:
    torch.manual_seed(9)
    chosen = {}
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"):
        plain = AutoModelForCausalLM.from_pretrained(source).get_submodule(name).weight
        grid = bnb_variants.grid(torch.randn(plain.shape) * 3)  # of another weight
        chosen[name] = torch.randint(0, 16, plain.shape, dtype=torch.uint8), grid
    bnb_variants.nf4(source, tmp_path / "own", chosen=chosen)
    model, nearest = bnb_variants.load(tmp_path / "own"), bnb_variants.load(source.parent / "nf4")
    for name, layer in model.named_modules():
        if (found := bnb_variants.weight_of(layer)) is None:
            continue
        if name not in chosen:
            assert torch.equal(found, bnb_variants.weight_of(nearest.get_submodule(name)))  # type: ignore[arg-type]
            continue
        codes, (book, scales, _) = chosen[name]
        assert torch.allclose(found, book[codes.long()] * scales.repeat_interleave(64, dim=1), rtol=2**-8)  # bf16


def test_shapes_that_fail_later_are_refused_before(tmp_path: Path) -> None:
    place = saved(tmp_path / "odd", num_key_value_heads=1)
    odd = tiny(hidden_size=96, intermediate_size=192, head_dim=32)
    odd.save_pretrained(place)
    with pytest.raises(ArtifactError, match=r"layer model\.layers\.0\.self_attn\.q_proj has 96 inputs"):
        bnb_variants.nf4(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    bnb_variants.nf4(place, tmp_path / "out", keep=["self_attn.*", "gate_proj", "up_proj"])
    kept = bnb_variants.load(tmp_path / "out")
    assert type(kept.get_submodule("model.layers.0.self_attn.q_proj")) is torch.nn.Linear
    assert isinstance(kept.get_submodule("model.layers.0.mlp.down_proj"), bnb.nn.Linear4bit)


def test_llm_int8_keeps_each_weight_within_half_a_step(source: Path, tmp_path: Path) -> None:
    bnb_variants.llm_int8(source, tmp_path / "int8")
    model = bnb_variants.load(tmp_path / "int8")
    whole = AutoModelForCausalLM.from_pretrained(source)
    weight = whole.get_submodule("model.layers.0.mlp.up_proj").weight
    theirs = bnb_variants.weight_of(model.get_submodule("model.layers.0.mlp.up_proj"))
    assert theirs is not None
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert ((weight - theirs).abs() <= steps * 0.52 + weight.abs() / 256).all()  # in bf16 before it was rounded
    assert (logits(model) - logits(whole)).norm() / logits(whole).norm() < 0.1


def test_dynamic_int8_changes_a_copy_and_keeps_the_head() -> None:
    model = tiny()
    exact = logits(model)
    made = bnb_variants.dynamic_int8(model)
    assert torch.equal(logits(model), exact) and not torch.equal(logits(made), exact)
    assert type(made.get_output_embeddings()) is torch.nn.Linear
