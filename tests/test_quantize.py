"""Stage `quantize` on models of two blocks: variants, what is measured of them, what is refused, where it goes on."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from models import model, tokenizer
from pydantic import ValidationError
from test_int8 import IDS, logits, tiny
from test_reward import write
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines import quantize
from pipelines.core import (
    artifacts,
    completions,
    compression,
    cpu,
    gguf_export,
    gptq,
    int4,
    int8,
    policy,
    policy_answers,
    quantization,
    quantization_aware,
    quantize_card,
    quantize_evaluation,
    report_compression,
    reward_model,
    speed,
    speed_server,
    variants,
)
from pipelines.core import quantization_checks as checks
from pipelines.core.context import StageContext, Stopped
from pipelines.core.errors import ArtifactError, DataError, ParamsError
from pipelines.core.params.quantize import QuantizeParams
from pipelines.core.report_inputs import Stage
from pipelines.tokenizer import CHAT_TEMPLATE

TINY: dict[str, Any] = {
    "seed": 1, "model": None, "variants": ["int8", "int4", "nf4"], "student_variants": ["int8"],
    "reward_variants": ["int8"], "keep_in_high_precision": [], "group_size": 32, "calibration_rows": 6,
    "calibration_length": 48, "calibrate": True, "aware": {}, "eval_bytes": 1024, "judge": "overlap", "eval_prompts": 4,
    "eval_samples": 1, "max_new_tokens": 6, "max_prompt_tokens": 64, "too_long": "refuse", "samples": 1,
}  # fmt: skip
ONE = {"variants": ["int8"], "student_variants": [], "reward_variants": []}
EVERY = ["int8", "llm-int8", "dynamic-int8", "int4", "nf4", "gguf-f16", "gguf-q8_0", "gguf-q4_0"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    known = tokenizer()
    known.chat_template = CHAT_TEMPLATE
    for name, depth in (("ppo", 2), ("distill", 1)):
        model(known, depth=depth, length=256).save_pretrained(root / name / "model")
        known.save_pretrained(root / name / "model")
    judge = reward_model.initial(root / "ppo/model", known, 3, torch.float32, "sdpa")
    judge.config.reward_mean = 0.0
    judge.save_pretrained(root / "reward/model")
    known.save_pretrained(root / "reward/model")
    told = [{"role": "user", "content": "what is w?"}, {"role": "assistant", "content": "the width of the area"}]
    rows = [{"id": f"d{n}", "group": f"d{n}", "kind": "k", "messages": told} for n in range(8)]
    write(root / "data/demonstrations/train.parquet", rows)
    for split, count in (("train", 20), ("test", 12)):
        prompts = [
            {"id": f"{split}{n}", "group": f"{split}{n}", "prompt": f"shape {n} {split}", "reference": "area of w"}
            for n in range(count)
        ]
        write(root / f"data/prompts/{split}.parquet", prompts)
        texts = [
            {"id": f"{split}{n}", "group": f"{split}{n}", "text": f"Return the area of shape {n}.\n" * 20}
            for n in range(40)
        ]
        write(root / f"data/corpus/{split}.parquet", texts)
    return {name: root / name for name in ("data", "ppo", "distill", "reward")}


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds are measured in processes of their own (`test_speed`)."""

    def measure(models: dict[str, tuple[Path, str]], *_: Any) -> dict[str, speed.Speed]:
        return {name: speed.Speed((1.0, 2.0, 3.0), 4.0, 0.1, 1.0, True) for name in models}

    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed_server, "start", lambda models: None)
    monkeypatch.setattr(speed, "bandwidth", lambda threads: 1e9)


def run(
    inputs: dict[str, Path], root: Path, context: StageContext | None = None, **changes: Any
) -> tuple[dict[str, float], Path, StageContext]:
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    context = context or StageContext(stage="quantize", root=root, fingerprint="f" * 64)
    return quantize.run(QuantizeParams(**TINY | changes), inputs, out, context), out, context


def test_every_variant_is_a_loadable_model_with_its_card(inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics, out, context = run(inputs, tmp_path, variants=EVERY)
    assert {place.name for place in (out / "models").iterdir()} == {
        "int8", "int4", "nf4", "llm-int8", "student-int8", "reward-int8",
    }  # fmt: skip
    assert {place.name for place in (out / "gguf").iterdir()} == {"gguf-f16", "gguf-q8_0", "gguf-q4_0"}
    exact = AutoModelForCausalLM.from_pretrained(inputs["ppo"] / "model").eval()
    for name in ("int8", "int4", "nf4", "llm-int8"):
        place = out / "models" / name
        made = variants.load(place, name)
        ids = torch.tensor([[1, 2, 3]])
        assert made.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape[1] == 6
        assert (logits(made, ids) - logits(exact, ids)).norm() / logits(exact, ids).norm() < 0.5
        assert "keeps" in (place / "README.md").read_text() or "Layers" in (place / "README.md").read_text()
    # f16 holds what bf16 holds, but for the smallest weights; eight bits are near, four are further off
    assert metrics["gguf-f16/agreement"] == 1.0
    assert metrics["gguf-f16/kl"] < metrics["int8/kl"] < metrics["int4/kl"]
    assert metrics["int8/size_ratio"] < 0.31 and metrics["nf4/linear_ratio"] < 0.2
    assert metrics["reward-int8/rank_agreement"] > 0.5
    assert not any(key.startswith("dynamic-int8/bytes") for key in metrics)
    rows = pd.read_parquet(out / "evaluation.parquet")
    assert metrics["int4/bits_per_byte"] == pytest.approx(rows["int4"].sum() / rows["bytes"].sum())
    delta = (rows["int4"].sum() - rows["original"].sum()) / rows["bytes"].sum()
    assert metrics["int4/bits_per_byte_delta"] == pytest.approx(delta)
    assert metrics["int4/loss"] == pytest.approx(delta / metrics["original/bits_per_byte"])
    layers = pd.read_csv(out / "layers.csv")
    assert len(layers[layers["variant"] == "int8"]) == 2 * 7 + 1  # and the head
    assert layers[layers["variant"] == "int4"]["error"].mean() > 3 * layers[layers["variant"] == "int8"]["error"].mean()
    assert context.measured["int4/decode_tokens_per_second"] == 2.0


def test_the_report_draws_size_against_quality_and_speed(inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics, out, context = run(inputs, tmp_path)
    names = [plot.name for plot in report_compression.of_stage(Stage("quantize", out, metrics | context.measured))]
    assert names == ["quantize-pareto", "quantize-speed"]
    assert report_compression.of_stage(Stage("quantize", out, metrics))[0].svg.count("<text") > 4
    table = pd.read_csv(out / "pareto.csv")
    assert set(table["name"]) == {"original", "int8", "int4", "nf4", "student", "student-int8"}
    assert set(table[table["of"] == "student"]["name"]) == {"student", "student-int8"}


def test_a_gguf_file_that_is_too_far_from_its_original_is_not_published(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = AutoModelForCausalLM.from_pretrained(inputs["ppo"] / "model")
    for value in other.parameters():
        value.data += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(7))
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(inputs["ppo"] / "model").save_pretrained(tmp_path / "other")
    export = gguf_export.export
    monkeypatch.setattr(gguf_export, "export", lambda place, *asked: export(tmp_path / "other", *asked))
    metrics, out, _ = run(inputs, tmp_path, variants=["int8", "gguf-f16", "gguf-q8_0"], student_variants=[])
    assert {place.name for place in (out / "models").iterdir()} == {"int8", "reward-int8"}
    assert not (out / "gguf").exists()
    told = (
        r"`gguf-f16` was withheld: it loses .* \(accepted: 1%\); it finds .* token at \d+\.\d\d% \(accepted: 99%\)\.\n"
        r"(.*\n)*`gguf-q8_0` was withheld: it loses .* \(accepted: 1%\)\.\n"
    )
    for page in ("samples.md", "models/int8/README.md"):
        assert re.search(told, (out / page).read_text())
    assert metrics["gguf-f16/loss"] > 0.01  # what was measured stays
    assert set(pd.read_csv(out / "pareto.csv")["name"]) == {"original", "int8"}


def test_a_gguf_file_is_compared_in_the_type_of_its_original(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read in fp32: products in bf16 would be taken for what the file loses."""
    types = []

    def noting(asked: Any, place: int) -> Any:
        def noted(*given: Any) -> Any:
            types.append(
                [{part.dtype for part in parts} for parts in (given[place].parameters(), given[place].buffers())]
            )
            return asked(*given)

        return noted

    monkeypatch.setattr(cpu, "ready", cpu.guarded)  # whatever the processor of the test multiplies
    monkeypatch.setattr(compression, "reference", noting(compression.reference, 0))
    monkeypatch.setattr(compression, "compare", noting(compression.compare, 1))
    context = StageContext(stage="quantize", root=tmp_path, fingerprint="f" * 64, precision="bf16")
    run(inputs, tmp_path, context, **ONE | {"variants": ["gguf-f16"]})
    assert types == 2 * [[{torch.bfloat16}, {torch.float32}]]  # the original, and the file; angles stay as they are


def test_the_budgets_of_gguf_files() -> None:
    for variant, most in (("gguf-f16", 0.01), ("gguf-q8_0", 0.01), ("gguf-q4_0", 0.04)):
        assert checks.missed(variant, most, 0.99) == []
        (told,) = checks.missed(variant, most + 0.001, 0.99)
        assert told.startswith(f"it loses {most + 0.001:.2%} of the original's bits per byte (accepted: ")
        assert len(checks.missed(variant, math.nan, 1.0)) == 1
    assert checks.missed("gguf-f16", 0.0, 0.98) != []
    assert checks.missed("gguf-f16", 0.0, None) == []  # an original in fp32 that is computed in bf16
    assert checks.missed("gguf-q8_0", 0.0, 0.9) == []
    assert checks.missed("int8", 0.5, 0.5) == []  # the gate's


def test_the_student_has_every_variant_too(inputs: dict[str, Path], tmp_path: Path) -> None:
    chosen = ["int8", "nf4", "gguf-q8_0", "dynamic-int8"]
    changes = {"variants": ["int8"], "student_variants": chosen, "reward_variants": []}
    metrics, out, context = run(inputs, tmp_path, **changes)
    assert {place.name for place in (out / "models").iterdir()} == {"int8", "student-int8", "student-nf4"}
    assert {place.name for place in (out / "gguf").iterdir()} == {"student-gguf-q8_0"}
    exact = AutoModelForCausalLM.from_pretrained(inputs["distill"] / "model").eval()
    for name, kind in (("models/student-nf4", "nf4"), ("gguf/student-gguf-q8_0", "gguf-q8_0")):
        made = variants.load(out / name, kind, original=inputs["distill"] / "model")
        assert made.config.num_hidden_layers == 1
        assert (logits(made, IDS) - logits(exact, IDS)).norm() / logits(exact, IDS).norm() < 0.5
    assert "GPTQ on" in (out / "models/student-nf4/README.md").read_text()
    assert "llama.cpp" in (out / "gguf/student-gguf-q8_0/README.md").read_text()
    rows = pd.read_parquet(out / "evaluation.parquet")
    names = {f"student-{kind}" for kind in chosen}
    assert names <= set(rows.columns) and all(metrics[f"{name}/bits_per_byte"] > 0 for name in names)
    assert metrics["student-nf4/linear_ratio"] < 0.2
    table = pd.read_csv(out / "pareto.csv")
    assert set(table[table["of"] == "student"]["name"]) == {"student", *names} - {"student-dynamic-int8"}
    assert "student-nf4/decode_tokens_per_second" in context.measured
    assert "student-gguf-q8_0/decode_tokens_per_second" not in context.measured


def test_each_variant_of_the_student_has_budgets_of_size_and_loss() -> None:
    declared = policy.load(Path(__file__).parents[1]).models["sluice-quantized-*"]
    for kind in (*variants.PACKED, *variants.BNB):
        asked = [(rule.metric, rule.at_most) for rule in declared.of(f"student-{kind}").gate if hasattr(rule, "metric")]
        assert sorted(metric.partition("/")[2] for metric, _ in asked if "linear" not in metric) == [
            "loss",
            "size_ratio",
        ]
        assert all(metric.startswith(f"student-{kind}/") for metric, _ in asked)


def test_the_front_of_points_that_nothing_beats() -> None:
    points = [report_compression.Point(name, "", size, bits, None, (0, 0))
              for name, size, bits in (("a", 1.0, 3.0), ("b", 2.0, 2.0), ("c", 3.0, 2.5), ("d", 4.0, 1.0))]  # fmt: skip
    assert [point.name for point in report_compression.front(points)] == ["a", "b", "d"]


def test_what_is_kept_in_high_precision_is_in_no_variant(inputs: dict[str, Path], tmp_path: Path) -> None:
    keep = ["down_proj", "model.layers.0.self_attn.*"]
    _, out, _ = run(inputs, tmp_path, keep_in_high_precision=keep)
    for name in ("int8", "int4", "nf4"):
        made = variants.load(out / "models" / name, name)
        for layer in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"):
            assert type(made.get_submodule(layer)) is torch.nn.Linear
        assert type(made.get_submodule("model.layers.1.self_attn.q_proj")) is not torch.nn.Linear
        assert "down_proj" in (out / "models" / name / "README.md").read_text()


def test_a_layer_to_keep_need_not_be_in_the_student_or_the_reward_model(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    keep = ["model.layers.1.mlp.down_proj", "lm_head"]  # the student has one block, the reward model no such head
    _, out, _ = run(inputs, tmp_path, variants=["int8"], keep_in_high_precision=keep)
    kept = variants.load(out / "models/int8", "int8").get_submodule(keep[0])
    assert type(kept) is torch.nn.Linear
    assert variants.load(out / "models/student-int8", "int8").config.num_hidden_layers == 1


def test_each_model_is_read_with_its_own_tokenizer(inputs: dict[str, Path], tmp_path: Path) -> None:
    known = tokenizer(340)
    known.chat_template = CHAT_TEMPLATE
    model(known, depth=2, length=256).save_pretrained(tmp_path / "other")
    known.save_pretrained(tmp_path / "other")
    changes = {"variants": ["int8"], "student_variants": ["int4"], "reward_variants": []}
    plain, *_ = run(inputs, tmp_path / "plain", **changes)
    other, *_ = run(inputs, tmp_path / "own", **changes, model=str(tmp_path / "other"))
    assert plain["original/bits_per_byte"] != other["original/bits_per_byte"]
    for key in ("student/bits_per_byte", "student-int4/bits_per_byte", "student-int4/kl"):
        assert plain[key] == other[key]


def test_few_long_documents_give_rows_too(inputs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(inputs["data"] / "demonstrations", tmp_path / "demonstrations")
    texts = [{"id": f"t{n}", "group": f"t{n}", "text": "Return the area of a shape.\n" * 9000} for n in range(3)]
    write(tmp_path / "corpus/train.parquet", texts)
    known = tokenizer()
    known.chat_template = CHAT_TEMPLATE
    rows = quantization.calibration_rows(QuantizeParams(**TINY), tmp_path, known)
    assert len(rows) == 6 and sum(len(row) == 48 and row == rows[1] for row in rows) == 3


def test_calibration_lowers_what_four_bits_cost(inputs: dict[str, Path], tmp_path: Path) -> None:
    chosen, *_ = run(inputs, tmp_path / "chosen", variants=["int4"], student_variants=[], reward_variants=[])
    plain, *_ = run(
        inputs, tmp_path / "plain", variants=["int4"], student_variants=[], reward_variants=[], calibrate=False
    )
    assert chosen["int4/kl"] < plain["int4/kl"]


def test_fine_tuning_with_rounded_weights_brings_the_rounded_model_nearer(
    inputs: dict[str, Path], context: StageContext
) -> None:
    aware = {"variants": ["int4"], "steps": 60, "lr": 3e-4, "batch_size": 2}
    params, place = QuantizeParams(**TINY | {"aware": aware}), inputs["ppo"] / "model"
    rows = [[1, 5, 9, 2, 7, 3, 8, 4], [4, 4, 6, 20, 31, 7, 9, 11]]
    tuned = quantization_aware.fine_tuned(place, "int4", rows, params, context)
    exact = torch.log_softmax(logits(AutoModelForCausalLM.from_pretrained(place).eval(), torch.tensor(rows)), 2)
    found = []
    for one in (tuned, place):
        rounded = int4.dense(int4.quantize(AutoModelForCausalLM.from_pretrained(one).eval(), 32))
        ours = torch.log_softmax(logits(rounded, torch.tensor(rows)), 2)
        found.append(float((exact.exp() * (exact - ours)).sum(2).mean()))
    assert found[0] < 0.7 * found[1]
    assert quantization_aware.fine_tuned(place, "int4", rows, params, context) == tuned  # kept, not made again


def test_what_was_fine_tuned_is_rounded_as_it_was_trained(
    inputs: dict[str, Path], context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPTQ chose codes for the outputs of the weights before rounding, which nothing was trained for."""
    monkeypatch.setattr(gptq, "calibrate", lambda *_: pytest.fail("calibrated"))
    params = QuantizeParams(**TINY | {"aware": {"variants": ["int4"], "steps": 2, "batch_size": 1, "lr": 1e-3}})
    subject = quantization.Subject("", inputs["ppo"] / "model", ["int4"], classifier=False)
    made = int4.load(quantization.make(subject, "int4", [[1, 5, 9, 2, 7, 3]], params, context))
    tuned = int4.quantize(AutoModelForCausalLM.from_pretrained(context.work / "aware/int4"), 32)
    for name, value in tuned.state_dict().items():
        assert torch.equal(made.state_dict()[name], value), name


@pytest.mark.parametrize("variant", ["int8", "int4", "nf4"])
def test_layers_that_lie_the_other_way_round_are_fine_tuned_but_for_those_kept(
    variant: str, context: StageContext, tmp_path: Path
) -> None:
    exact = model(tokenizer(), "gpt2")
    exact.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    aware = {"variants": [variant], "steps": 2, "lr": 1e-3, "batch_size": 1}
    keep = ["transformer.h.0.attn.c_attn", "mlp.c_proj"]
    params = QuantizeParams(**TINY | {"variants": [variant], "aware": aware, "keep_in_high_precision": keep})
    tuned = quantization_aware.fine_tuned(tmp_path / "model", variant, [[1, 5, 9, 2, 7, 3]], params, context)
    was, now = exact.state_dict(), AutoModelForCausalLM.from_pretrained(tuned).state_dict()
    moved = {name for name in was if not torch.equal(was[name], now[name])}
    assert moved == {
        *(f"transformer.h.{n}.attn.c_proj.weight" for n in (0, 1)), "transformer.h.1.attn.c_attn.weight",
        *(f"transformer.h.{n}.mlp.c_fc.weight" for n in (0, 1)),
    }  # fmt: skip
    with pytest.raises(ParamsError, match=r"aware: keep_in_high_precision \(h\.\*\) leaves no layer"):
        kept = QuantizeParams(**TINY | {"aware": aware, "variants": [variant], "keep_in_high_precision": ["h.*"]})
        shutil.rmtree(context.work / "aware")
        quantization_aware.fine_tuned(tmp_path / "model", variant, [[1, 5]], kept, context)


def test_stopped_and_gone_on_it_ends_with_the_same_bytes(inputs: dict[str, Path], tmp_path: Path) -> None:
    aware = {"aware": {"variants": ["int4"], "steps": 6, "batch_size": 2, "lr": 1e-4}}
    _, whole, _ = run(inputs, tmp_path / "whole", **aware)
    context = StageContext(stage="quantize", root=tmp_path / "cut", fingerprint="f" * 64)
    asked, stops = 0, 0

    def stop_if_asked() -> None:
        nonlocal asked, stops
        asked += 1
        if asked in (2, 7, 15, 30, 46):
            stops += 1
            raise Stopped(15)

    context.stop_if_asked = stop_if_asked  # type: ignore[method-assign]
    while True:
        try:
            _, out, _ = run(inputs, tmp_path / "cut", context, **aware)
            break
        except Stopped:
            context.history.clear()
    assert stops >= 3
    assert artifacts.content_hash(out) == artifacts.content_hash(whole)


def test_fine_tuning_that_was_stopped_goes_on_and_ends_with_the_same_bytes(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    aware = {"variants": ["int4"], "steps": 6, "batch_size": 2, "lr": 1e-3}
    params, place = QuantizeParams(**TINY | {"aware": aware}), inputs["ppo"] / "model"
    rows = [[1, 5, 9, 2, 7, 3, 8, 4], [4, 4, 6, 20, 31, 7, 9, 11], [2, 8, 40, 3, 3, 5]]
    whole = StageContext(stage="quantize", root=tmp_path / "whole", fingerprint="f" * 64)
    expected = quantization_aware.fine_tuned(place, "int4", rows, params, whole)
    context = StageContext(stage="quantize", root=tmp_path / "cut", fingerprint="f" * 64)
    steps, later = iter(range(1000)), context.after_step

    def after_step(due: bool) -> tuple[bool, bool]:
        if next(steps) in (1, 3):
            context.signal_number = 15
        return later(due)

    context.after_step = after_step  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(Stopped):
            quantization_aware.fine_tuned(place, "int4", rows, params, context)
        context.signal_number = 0
    found = quantization_aware.fine_tuned(place, "int4", rows, params, context)
    assert context.samples == ["resuming int4 after step 2 of 6", "resuming int4 after step 4 of 6"]
    assert artifacts.content_hash(found) == artifacts.content_hash(expected)


def test_divergence_and_agreement_are_those_of_the_logits() -> None:
    known = tokenizer()
    first, second = model(known, depth=1), model(known, depth=2)
    texts = ["def area_1(w, h):", "return w * h"]
    original = compression.reference(first, known, texts)
    found = compression.compare(original, second)
    assert compression.own_bits(original) == compression.compare(original, first).bits
    rounded = copy.deepcopy(first).bfloat16()
    in_bf16 = compression.reference(rounded, known, texts)
    assert compression.own_bits(in_bf16) == pytest.approx(compression.compare(in_bf16, rounded).bits, rel=1e-6)
    divergence, same, bits = [], [], []
    for text in texts:
        ids = [known.convert_tokens_to_ids("<|endoftext|>"), *known(text, add_special_tokens=False)["input_ids"]]
        ours, theirs = (torch.log_softmax(logits(one, torch.tensor([ids]))[0, :-1], 1) for one in (second, first))
        divergence += (theirs.exp() * (theirs - ours)).sum(1).tolist()
        same += (theirs.argmax(1) == ours.argmax(1)).tolist()
        bits.append(-float(ours.gather(1, torch.tensor(ids[1:])[:, None]).sum()) / math.log(2))
    assert found.kl == pytest.approx(sum(divergence) / len(divergence), rel=1e-4)
    assert found.agreement == pytest.approx(sum(same) / len(same))
    assert found.bits == pytest.approx(bits, rel=1e-4)


def test_layers_that_lie_the_other_way_round_have_their_errors_too() -> None:
    exact = tiny("gpt2")
    made = int8.quantize(copy.deepcopy(exact))
    errors = compression.layer_errors(exact, made, [IDS[0].tolist()], variants.weight_of)
    assert len(errors) == 2 * 4 + 1  # and the head
    assert all(0 < error < 0.02 for error in errors.values())


def test_pairs_ranked_alike() -> None:
    agreement = quantize_evaluation.rank_agreement
    assert agreement([[1, 2, 3], [1, 1]], [[1, 3, 2], [5, 6]]) == (1 + 1 + 0 + 0.5) / 4


def test_one_and_the_same_answer_is_no_order(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [completions.Prompt("p", "p", "test", "what?", None, [1])]
    same = policy_answers.Answers([["w", "w"]], [[[1], [1]]], [[0.0, 0.0]], [[True, True]])
    monkeypatch.setattr(quantize_evaluation, "ask", lambda *_, **__: policy_answers.Said(same, same))
    subject = quantization.Subject("reward", Path("m"), ["int8"], classifier=True)
    with pytest.raises(DataError, match=r"one and the same answer to each of the 1 held-out prompts"):
        quantize_evaluation.reward(subject, {}, prompts, Path("policy"), QuantizeParams(**TINY), context)


def test_bad_input_is_told_before_anything_is_made(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="variants"):
        QuantizeParams(**TINY | {"variants": ["int9"]})
    with pytest.raises(ValidationError, match="each variant once"):
        QuantizeParams(**TINY | {"variants": ["int8", "int8"]})
    with pytest.raises(ValidationError, match=r"aware\.variants: nf4 is none of variants \(int8\)"):
        QuantizeParams(**TINY | ONE | {"aware": {"variants": ["nf4"]}})
    with pytest.raises(ParamsError, match=r"keep_in_high_precision: 'down_porj' is none of the 16 layers"):
        run(inputs, tmp_path, keep_in_high_precision=["down_porj"])
    with pytest.raises(DataError, match=r"so none is left: raise quantize\.calibration_length"):
        run(inputs, tmp_path, calibration_length=16)
    with pytest.raises(ParamsError, match=r"calibration_length is 300, .* 70 tokens; the context of .* is 256: lower"):
        run(inputs, tmp_path, calibration_length=300)
    with pytest.raises(ArtifactError, match=r"model\.layers\.0\..*inputs are no multiple of group_size 64|no multiple"):
        run(inputs, tmp_path, variants=["int4"], group_size=128, student_variants=["int4"])
    broken = AutoModelForCausalLM.from_pretrained(inputs["ppo"] / "model")
    broken.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    tokenizer_of = tokenizer()
    tokenizer_of.chat_template = CHAT_TEMPLATE
    tokenizer_of.save_pretrained(tmp_path / "broken")
    with pytest.raises(ArtifactError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: 1 of .* weights are NaN"):
        run(inputs, tmp_path, model=str(tmp_path / "broken"))


def test_a_token_without_a_row_is_told(inputs: dict[str, Path], tmp_path: Path) -> None:
    """As where a pad token was added to the tokenizer alone: the first padded prompt ended in an IndexError."""
    place = shutil.copytree(inputs["ppo"] / "model", tmp_path / "padded")
    known = AutoTokenizer.from_pretrained(place)
    known.add_special_tokens({"pad_token": "[PAD]"})
    known.save_pretrained(place)
    message = r"padded: 1 tokens of the tokenizer have no row in the model's embedding of 300 rows, .*'\[PAD\]'"
    with pytest.raises(ArtifactError, match=message):
        run(inputs, tmp_path, model=str(place), **ONE)


def test_a_format_that_cannot_hold_the_model_is_told_before_any_is_made(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "make", lambda *_: pytest.fail("a variant is made"))
    known = tokenizer()
    known.chat_template = CHAT_TEMPLATE
    model(known, "gpt2", length=256).save_pretrained(tmp_path / "gpt2")
    known.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ArtifactError, match="architecture 'gpt2' cannot be exported"):
        run(inputs, tmp_path, variants=["int8", "gguf-q8_0"], model=str(tmp_path / "gpt2"))
    narrow = str(inputs["distill"] / "model")
    with pytest.raises(ArtifactError, match=r"int4: layer model\.layers\.0\..*: 64 inputs are no multiple"):
        run(inputs, tmp_path, variants=["int8", "int4"], model=narrow, group_size=128)
    capped = tiny("llama")
    capped.config.final_logit_softcapping = 30.0
    with pytest.raises(ArtifactError, match="its logits are not hidden states x output embedding"):
        checks.check(quantization.Subject("", tmp_path, ["int8"], False), capped, QuantizeParams(**TINY | ONE))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("stablelm", "architecture stablelm cannot be sampled from: its attention makes masks of its own"),
        ("mixtral", r"architecture mixtral: model\.layers\.0\.mlp\.experts\.\w+ holds 4 matrices in one \(a mixture"),
    ],
)
def test_an_architecture_of_another_kind_is_told_before_anything_is_made(kind: str, told: str) -> None:
    """What cannot be sampled from was told after minutes of calibration; experts stayed as they were, unsaid."""
    model = tiny(kind, **({"num_local_experts": 4} if kind == "mixtral" else {}))
    with pytest.raises(ArtifactError, match=told):
        checks.check(quantization.Subject("", Path("m"), ["int8"], False), model, QuantizeParams(**TINY | ONE))


@pytest.mark.parametrize("variant", ["int8", "int4", "nf4", "llm-int8"])
def test_keeping_every_layer_is_refused(variant: str) -> None:
    """NF4 failed after all variants were made, for want of a layer to count the bits of; the others changed nothing."""
    params = QuantizeParams(**TINY | {"variants": [variant], "keep_in_high_precision": ["layers.*"]})
    with pytest.raises(ParamsError, match=r"keep_in_high_precision: layers\.\* leaves none of the blocks' layers of m"):
        checks.check(quantization.Subject("", Path("m"), [variant], False), tiny(), params)


def test_a_card_says_what_was_done_to_its_own_variant_and_how_to_load_it() -> None:
    aware = {"variants": ["int8", "int4"], "steps": 7}
    params = QuantizeParams(**TINY | {"aware": aware, "keep_in_high_precision": ["down_proj"]})

    def card(subject: str, variant: str) -> str:
        one = quantization.Subject(subject, Path("m"), [variant], classifier=subject == "reward")
        return quantize_card.card(quantization.full_name(one, variant), one, variant, params, {}, [], {})

    for variant in ("int8", "int4"):
        assert "Fine-tuned for 7 steps" in card("", variant)
        assert "Fine-tuned" not in card("student", variant) + card("reward", variant)
        assert f"{variant}.load(path)" in card("student", variant)
        reward = card("reward", variant)
        assert f"{variant}.load(path, classifier=True)" in reward and "text-classification" in reward
    assert "GPTQ on" in card("student", "int4") and "Rounded to the nearest" in card("reward", "int4")
    assert "GPTQ on" not in card("", "int8") + card("", "int4") and "Rounded to the nearest" in card("", "int4")
    assert "down_proj" in card("", "int8") and "down_proj" not in card("", "gguf-q8_0")  # which keeps nothing


def test_what_this_machine_cannot_run_is_skipped_and_the_cards_say_why(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [kind for kind in EVERY if variants.cannot_run(kind) is not None] == []

    def no_kernel(self: Any) -> Any:
        raise NotImplementedError("no kernel for this CPU")

    monkeypatch.setattr(int4.Int4Linear, "product", no_kernel)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    chosen = {"variants": ["int8", "int4", "nf4"], "student_variants": ["int4"]}
    metrics, out, context = run(inputs, tmp_path, **chosen)
    assert {place.name for place in (out / "models").iterdir()} == {"int8", "reward-int8"}
    assert "int8/kl" in metrics and not any(key.startswith(("int4", "nf4", "student")) for key in metrics)
    card, page = (out / "models/int8/README.md").read_text(), (out / "samples.md").read_text()
    for told in (card, page):
        assert "(NotImplementedError)" in told and "(ModuleNotFoundError)" in told and "no kernel" not in told
    said = "".join(context.samples)
    assert "NotImplementedError: no kernel for this CPU" in said and "ModuleNotFoundError: import of bitsa" in said


def test_a_mistake_of_ours_is_no_machine_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any) -> Any:
        raise TypeError("ours")

    monkeypatch.setattr(int4.Int4Linear, "product", wrong)
    with pytest.raises(TypeError, match="ours"):
        variants.cannot_run("int4")


def test_a_variant_that_would_change_nothing_is_refused() -> None:
    params = QuantizeParams(**TINY | ONE)
    subject = quantization.Subject("", Path("m"), ["dynamic-int8"], classifier=False)
    checks.check(subject, tiny("llama"), params)
    for name, key in (("", "variants"), ("student", "student_variants")):
        told = rf"quantize\.{key}: dynamic-int8: torch's .* none of the layers of architecture gpt2"
        with pytest.raises(ParamsError, match=told):
            checks.check(subject._replace(name=name), tiny("gpt2"), params)


def test_a_quantized_model_is_not_made_smaller_again(inputs: dict[str, Path], tmp_path: Path) -> None:
    _, out, _ = run(inputs, tmp_path, **ONE | {"variants": ["nf4"], "calibrate": False})
    with pytest.raises(ArtifactError, match=r"models/nf4: the model is quantized; name the one it was made from"):
        run(inputs, tmp_path / "again", **ONE | {"model": str(out / "models/nf4")})


def test_a_model_with_adapters_beside_it_is_told(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Of what was made smaller with them the adapters alone were saved."""
    from peft import LoraConfig, get_peft_model

    place = shutil.copytree(inputs["ppo"] / "model", tmp_path / "both")
    lm = AutoModelForCausalLM.from_pretrained(place)
    get_peft_model(lm, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(place)
    with pytest.raises(ArtifactError, match="both: the model carries adapters; merge them into its weights and save"):
        run(inputs, tmp_path, model=str(place), **ONE)


def test_too_little_memory_is_told_with_the_numbers(inputs: dict[str, Path], tmp_path: Path) -> None:
    subject = quantization.Subject("", inputs["ppo"] / "model", ["int8"], False)
    count = sum(value.numel() for value in AutoModelForCausalLM.from_pretrained(subject.place).parameters())
    checks.check_memory([subject], 16 * count)
    with pytest.raises(ArtifactError, match=r"takes about 0\.0 GiB of memory, 0\.0 GiB are available"):
        checks.check_memory([subject], 16 * count - 1)
    checks.check_memory([subject], 20 * count, aware=True)
    with pytest.raises(ArtifactError, match=r"smaller with quantize\.aware takes about .* or set aware: \{\}"):
        checks.check_memory([subject], 20 * count - 1, aware=True)
    checks.check_memory([subject._replace(name="student")], 16 * count, aware=True)  # which is not fine-tuned
    half = AutoModelForCausalLM.from_pretrained(subject.place).bfloat16()
    half.save_pretrained(tmp_path)  # in half the bytes, and takes as much
    with pytest.raises(ArtifactError, match="takes about"):
        checks.check_memory([subject._replace(place=tmp_path)], 16 * count - 1)


def test_weights_that_are_no_safetensors_have_a_size_too(tmp_path: Path) -> None:
    """Or memory is never short, and the report divides by the size of the original."""
    saved = model(tokenizer())
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "training_args.bin").write_bytes(b"1" * 10**7)
    assert 0 < variants.size(tmp_path) < 10**7
    saved.save_pretrained(tmp_path)
    assert variants.size(tmp_path) == (tmp_path / "model.safetensors").stat().st_size


def test_only_what_is_loaded_has_a_size(tmp_path: Path) -> None:
    """Mistral's directories have their weights once more for another program: models seemed twice as large."""
    saved = model(tokenizer())
    count = sum(value.numel() for value in saved.parameters())
    saved.save_pretrained(tmp_path, max_shard_size="100KB")
    parts = [*tmp_path.glob("model-*.safetensors")]
    shutil.copy(parts[0], tmp_path / "consolidated.safetensors")
    assert len(parts) > 1 and variants.parameters(tmp_path) == count
    assert variants.size(tmp_path) == sum(part.stat().st_size for part in parts)
    parts[0].write_bytes(parts[0].read_bytes()[:100])
    with pytest.raises(ArtifactError, match=rf"{parts[0].name}: damaged \(.*\); copy or make it again"):
        variants.parameters(tmp_path)


def test_a_quantized_directory_says_what_it_is(inputs: dict[str, Path], tmp_path: Path) -> None:
    _, out, _ = run(inputs, tmp_path, **ONE)
    config = json.loads((out / "models/int8/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "sluice-int8"
