"""Models on a processor that does not multiply bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_bnb_variants import saved
from test_int8 import IDS, logits
from transformers import AutoModelForCausalLM

from pipelines.core import bnb_variants, cpu, decoding, embedding, hardware, int4, int8, quantization, variants
from pipelines.core.context import StageContext


def write(kind: str, place: Path) -> Path:
    """A random model in one of the forms."""
    source = saved(place / "source")
    if kind in variants.BNB:
        {"nf4": bnb_variants.nf4, "llm-int8": bnb_variants.llm_int8}[kind](source, place / kind)
        return place / kind
    model = AutoModelForCausalLM.from_pretrained(source).bfloat16()
    made = {"int8": int8.quantize, "int4": lambda one: int4.quantize(one, 32)}.get(kind, lambda one: one)(model)
    made.save_pretrained(place / kind)
    return place / kind


@pytest.mark.parametrize("kind", [variants.PLAIN, "int8", "int4", "nf4", "llm-int8"])
def test_every_form_is_computed_in_fp32_where_bf16_is_slow(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write(kind, tmp_path)
    monkeypatch.setattr(cpu, "multiplies", lambda asked: True)
    usual = variants.load(place, kind)
    assert usual.dtype is torch.bfloat16
    slow(monkeypatch)
    asked: list[torch.dtype] = []
    product = torch.nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        asked.append(x.dtype)
        return product(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    for module in (int8, int4, decoding):
        monkeypatch.setattr(module, "linear", linear)
    wide = variants.load(place, kind)
    assert not any(part.dtype is torch.bfloat16 for part in wide.parameters())
    many = IDS.repeat(int8.FEW_ROWS, 1)  # more rows than the packed kernel is for
    found = logits(wide, many)
    assert set(asked) == {torch.float32}
    exact = logits(usual, many)
    assert (found - exact).norm() / exact.norm() < 0.03
    decoder, ids = decoding.Decoder(wide, 32), IDS[0].tolist()
    decoder.prefill(ids)
    said = decoder.step(5)
    whole = logits(usual, torch.tensor([[*ids, 5]]))[0, -1]
    assert (said - whole).norm() / whole.norm() < 0.03


def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without products of bf16."""
    monkeypatch.setattr(cpu, "multiplies", lambda kind: kind is not torch.bfloat16)


def test_values_are_the_same_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4).bfloat16(), torch.nn.Linear(4, 4).double())
    model.register_buffer("kept", torch.ones(2, dtype=torch.bfloat16))
    before = [part.clone() for part in model.parameters()]
    assert cpu.ready(model) is model
    assert [part.dtype for part in model.parameters()] == [torch.float32] * 2 + [torch.float64] * 2
    assert model.kept.dtype is torch.float32
    for part, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(part, was.to(part.dtype))


@pytest.mark.parametrize("kind", [variants.PLAIN, "int8", "int4", "nf4"])
def test_a_directory_is_loaded_by_what_its_config_says(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As registered models and assistants do."""
    place = write(kind, tmp_path)
    slow(monkeypatch)
    found = cpu.load(place, AutoModelForCausalLM)
    assert found.dtype is torch.float32
    assert torch.equal(logits(found), logits(variants.load(place, kind)))


def test_what_another_machine_or_a_gpu_computes_in_is_not_taken_over(
    context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index may come from a machine with bf16; on a GPU's host a stage's precision is the GPU's."""
    context.precision = "bf16"
    subject = quantization.Subject("", saved(tmp_path / "source"), ["int8"], classifier=False)
    slow(monkeypatch)
    assert quantization.load(subject, context).dtype is torch.float32
    assert embedding.dtype("bf16") is torch.float32 and cpu.precision("fp32") == "fp32"
    monkeypatch.setattr(cpu, "multiplies", lambda kind: True)
    assert quantization.load(subject, context).dtype is torch.bfloat16
    assert embedding.dtype("bf16") is torch.bfloat16


def test_nothing_is_timed_where_the_answer_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a machine that turns out to be another is asked anew: hosts of a cloud have one name for many processors."""
    slow(monkeypatch)
    monkeypatch.setattr(hardware, "matmul_rate", lambda *_, **__: pytest.fail("timed"))
    monkeypatch.setattr(hardware, "cpu_flags", lambda: {"avx2"})
    assert hardware._measured_precision(tmp_path, "cpu") == "fp32"
    monkeypatch.setattr(cpu, "multiplies", lambda kind: True)
    assert hardware._measured_precision(tmp_path, "cpu") == "fp32"  # kept
    rates = {"fp32": 1.0, "bf16": 3.0}
    monkeypatch.setattr(hardware, "matmul_rate", lambda device, kind, **_: rates[kind])
    monkeypatch.setattr(hardware, "cpu_flags", lambda: {"avx2", "avx512f", "avx512_bf16"})
    assert hardware._measured_precision(tmp_path, "cpu") == "bf16"
