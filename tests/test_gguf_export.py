"""A model directory exported as GGUF computes as before, and is written whole or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import directory, field, same_tokenizer
from torch.nn.functional import kl_div
from typer.testing import CliRunner

from pipelines.core import gguf_export, gguf_vocabulary, language_models, variants
from pipelines.core.errors import ArtifactError, ParamsError

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "grouped queries, untied": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "one key head, wide": ("llama", {"num_key_value_heads": 1, "head_dim": 64}),
    "rows without a token": ("llama", {"num_key_value_heads": 2, "more_rows": 20}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 64}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 128}),
}


def logs(base: Path, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of every next token, (rows, length, vocabulary), of a directory or a GGUF file."""
    with torch.no_grad():
        lm = language_models.load(str(base), torch.float32, "sdpa").eval()
        return lm(ids).logits.log_softmax(-1)  # type: ignore[no-any-return]


def compare(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """Share of positions with the same top token, and mean KL in nats."""
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    return same, kl_div(theirs, ours, log_target=True, reduction="none").sum(-1).mean().item()


@pytest.mark.parametrize("name", VARIANTS)
def test_f16_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    architecture, config = VARIANTS[name]
    place = directory(tmp_path / "m", architecture, **config)
    report = gguf_export.export(place, tmp_path / "m.gguf", "f16")
    ids = torch.randint(0, 300, (4, 60), generator=torch.Generator().manual_seed(1))
    same, divergence = compare(logs(place, ids), logs(tmp_path / "m.gguf", ids))
    assert same >= 0.99 and divergence < 1e-4
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert ("output.weight" in names) != config.get("tie_word_embeddings", False)
    lm = language_models.load(str(place), torch.float32, "sdpa")
    assert report.parameters == lm.num_parameters() and report.bytes == (tmp_path / "m.gguf").stat().st_size


def test_fewer_bits_cost_more(tmp_path: Path) -> None:
    place = directory(tmp_path / "m", num_key_value_heads=2)
    ids = torch.randint(0, 300, (4, 60), generator=torch.Generator().manual_seed(1))
    ours, costs, sizes = logs(place, ids), [], []
    for kind in ("f16", "q8_0", "q4_0"):
        report = gguf_export.export(place, tmp_path / f"{kind}.gguf", kind)
        assert report.kept_in_f16 == ()
        costs.append(compare(ours, logs(tmp_path / f"{kind}.gguf", ids))[1])
        sizes.append(report.bytes)
    assert costs[0] < costs[1] < 0.01 < costs[2] < 1.0
    assert sizes[0] > sizes[1] > sizes[2]
    assert report.tensors == {"F32": 5, "Q4_0": 15, "Q8_0": 1}  # the output matrix hurts most: 8 bits


def test_blocks_worked_by_hand(tmp_path: Path) -> None:
    """Q8_0: scale max|w| / 127. Q4_0: scale (largest by size) / -8, levels -8..7. Scales are f16."""
    place = directory(tmp_path / "m")
    row = language_models.load(str(place), torch.float32, "sdpa").state_dict()["model.layers.0.mlp.up_proj.weight"]
    block = row[0, :32].numpy()
    for kind in ("q8_0", "q4_0"):
        gguf_export.export(place, tmp_path / "m.gguf", kind)
        found = {one.name: one for one in gguf.GGUFReader(tmp_path / "m.gguf").tensors}["blk.0.ffn_up.weight"]
        back = gguf.dequantize(found.data, found.tensor_type)[0, :32]
        peak = block[np.abs(block).argmax()]
        scale = abs(peak) / 127 if kind == "q8_0" else peak / -8
        levels = np.round(block / scale).clip(*((-127, 127) if kind == "q8_0" else (-8, 7)))
        assert np.allclose(back, levels * np.float16(scale), atol=1e-6)


def test_rows_that_make_no_blocks_stay_in_f16(tmp_path: Path) -> None:
    """Width 120 is no multiple of 32; the attention output reads 4 x 32 and the vocabulary does not matter."""
    place = directory(tmp_path / "m", hidden_size=120, head_dim=32, num_hidden_layers=1)
    report = gguf_export.export(place, tmp_path / "m.gguf", "q4_0")
    wide = {f"blk.0.{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")}
    assert set(report.kept_in_f16) == wide | {"token_embd.weight", "output.weight"}
    assert report.tensors == {"F16": 7, "F32": 3, "Q4_0": 2}
    assert gguf_export.export(place, tmp_path / "m.gguf", "f16").kept_in_f16 == ()


def test_rows_permuted() -> None:
    """Two heads of width 4, halves (0 1 | 2 3) to pairs (0 2)(1 3), by hand."""
    rows = torch.arange(8.0)
    assert gguf_export.permute(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert gguf_export.permute(rows[:, None], 2).squeeze(1).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_hyperparameters(tmp_path: Path) -> None:
    place = directory(tmp_path / "m", "mistral", num_key_value_heads=2, sliding_window=64, rms_norm_eps=1e-5)
    gguf_export.export(place, tmp_path / "a.gguf", "q8_0")
    expected = {
        "general.architecture": "llama", "general.name": "a", "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0,
        "llama.context_length": 64, "llama.embedding_length": 128, "llama.feed_forward_length": 256,
        "llama.block_count": 2, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 32, "llama.rope.freq_base": 10000.0, "llama.vocab_size": 300,
        "llama.attention.key_length": 32,
    }  # fmt: skip
    assert {key: field(tmp_path / "a.gguf", key) for key in expected} == expected
    assert field(tmp_path / "a.gguf", "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)


def test_stretched_positions(tmp_path: Path) -> None:
    """Llama 3.1 divides the slow frequencies by the factor and leaves the fast ones; linear has keys."""
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "rope_theta": 500.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    gguf_export.export(directory(tmp_path / "a", rope_parameters=llama3), tmp_path / "a.gguf", "f16")
    found = {one.name: one.data for one in gguf.GGUFReader(tmp_path / "a.gguf").tensors}["rope_freqs.weight"]
    lengths = 2 * np.pi * 500.0 ** (np.arange(0, 32, 2) / 32)  # tokens a turn
    smooth = ((64 / lengths - 1) / (4 - 1)).clip(0, 1)  # 0: slower than one turn in 64 tokens; 1: than four
    assert np.allclose(found, 1 / ((1 - smooth) / 8 + smooth), rtol=1e-5) and found[0] == 1 and found[-1] == 8
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    gguf_export.export(directory(tmp_path / "b", rope_parameters=linear), tmp_path / "b.gguf", "f16")
    assert field(tmp_path / "b.gguf", "llama.rope.scaling.type") == "linear"
    assert field(tmp_path / "b.gguf", "llama.rope.scaling.factor") == 4.0
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    with pytest.raises(ArtifactError, match="yarn.*supported: default, linear, llama3"):
        gguf_export.export(directory(tmp_path / "c", rope_parameters=yarn), tmp_path / "c.gguf", "f16")


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("qwen3", {"head_dim": 32}),
        ("mistral", {"head_dim": 64}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    ],
)
def test_a_file_is_measured_as_what_it_was_made_from(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    """transformers reads neither a head's width nor biases nor stretched positions out of a file, as llama.cpp does:
    one could not be loaded, the others seemed to have lost most of their bits."""
    place = directory(tmp_path / "m", kind, **{"num_key_value_heads": 2, **more})
    gguf_export.export(place, tmp_path / "made" / "model.gguf", "f16")
    ids = torch.randint(0, 300, (4, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made = variants.load(tmp_path / "made", "gguf-f16", original=place)  # in bf16
        same, divergence = compare(logs(place, ids), made(ids).logits.float().log_softmax(-1))
    assert same > 0.9 and divergence < 0.01


def test_refused_and_nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    place, file = directory(tmp_path / "m"), tmp_path / "out" / "m.gguf"

    def refused(message: str, kind: Any = "f16", error: type[Exception] = ArtifactError) -> None:
        with pytest.raises(error, match=message):
            gguf_export.export(place, file, kind)
        assert not file.parent.exists() or [*file.parent.iterdir()] == []

    refused("unknown type 'q4'; known: f16, q8_0, q4_0", "q4", ParamsError)
    weights = load_file(place / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for value in (float("nan"), float("inf"), 1e6):
        spoiled = weights[name].clone()
        spoiled[3, 5] = value
        save_file(weights | {name: spoiled}, place / "model.safetensors", {"format": "pt"})
        refused(f"{name}: largest absolute value")
    save_file({key: value for key, value in weights.items() if key != name}, place / "model.safetensors")
    refused(f"missing weights: {name}")
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    with monkeypatch.context() as patch:  # a disk that fills up halfway
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", _full_disk)
        refused("No space left", error=OSError)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    refused("hidden_act is 'gelu'")
    (place / "config.json").write_text(json.dumps(config | {"model_type": "qwen3", "attention_bias": True}))
    refused("attention_bias is true; llama.cpp's qwen3 has none")
    (place / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    refused("'gpt2' cannot be exported; supported: llama, mistral, qwen2, qwen3")
    (place / "config.json").unlink()
    refused("no config.json")


def _full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.slow
def test_the_packaged_model(tmp_path: Path) -> None:
    """SmolLM2: f16 agrees on 99 % of positions, q8_0 diverges by hundredths of a nat, the tokenizer is the same."""
    place = tmp_path / "m"
    ours = language_models.load_tokenizer("smollm2-135m")
    language_models.load("smollm2-135m", torch.float32, "sdpa").save_pretrained(place)
    ours.save_pretrained(place)
    text = Path(gguf_export.__file__).read_text() + Path(gguf_vocabulary.__file__).read_text()
    ids = torch.tensor(ours(text)["input_ids"][:1024]).reshape(2, 512)
    before = logs(place, ids)
    for kind, agreement, bound in (("f16", 0.99, 1e-4), ("q8_0", 0.95, 0.02)):
        report = gguf_export.export(place, tmp_path / f"{kind}.gguf", kind)  # type: ignore[arg-type]
        same, divergence = compare(before, logs(tmp_path / f"{kind}.gguf", ids))
        assert same >= agreement and divergence < bound
    assert report.pre == "smollm"
    assert report.bytes < 0.30 * (place / "model.safetensors").stat().st_size
    same_tokenizer(ours, language_models.load_tokenizer(str(tmp_path / "f16.gguf")), tmp_path / "f16.gguf")


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.cli import app

    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    directory(tmp_path / "sub/model")
    monkeypatch.chdir(tmp_path / "sub")  # paths are as seen from here
    done = CliRunner().invoke(app, ["export", "model", "out.gguf", "--type", "f16"])
    assert done.exit_code == 0 and re.search(r"out\.gguf: [\d.]+ million parameters in [\d.]+ MB, f16", done.output)
    assert (tmp_path / "sub/out.gguf").stat().st_size > 1e5
    monkeypatch.chdir(tmp_path / "sub")
    refused = CliRunner().invoke(app, ["export", "model", "out.gguf", "--type", "q2"])
    assert refused.exit_code == 2 and "known: f16, q8_0, q4_0" in refused.output
    (tmp_path / "sub/folder.gguf").mkdir()
    for name, told in (("folder.gguf", "is a directory"), ("out.gguf/a/m.gguf", "out.gguf is no directory")):
        monkeypatch.chdir(tmp_path / "sub")
        refused = CliRunner().invoke(app, ["export", "model", name])
        assert refused.exit_code == 2 and told in " ".join(refused.output.split()), refused.output
