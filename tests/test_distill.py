"""Stage `distill` on models of three blocks: what it writes, what it learns, what it refuses, and where it goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from models import model, tokenizer
from pydantic import ValidationError
from test_int8 import tiny
from test_reward import write
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines import distill
from pipelines.core import (
    artifacts,
    distill_data,
    distilling,
    hardware,
    int8,
    language_models,
    segments,
    speed,
    speed_server,
)
from pipelines.core.context import StageContext, Stopped
from pipelines.core.errors import ArtifactError, DataError, ParamsError
from pipelines.core.params.distill import DistillParams, Terms
from pipelines.tokenizer import CHAT_TEMPLATE

TINY: dict[str, Any] = {
    "seed": 1, "teacher": None, "student": "layers", "keep_layers": 2, "depth": None, "fit": None,
    "weights": {"forward": 1.0}, "temperature": 1.0, "beta": 0.5, "top_k": 16, "answers": "people", "examples": None,
    "texts": 12, "max_length": 48, "too_long": "refuse", "epochs": 1, "batch_size": 4, "micro_tokens": 64,
    "on_policy_divergence": "reverse", "on_policy_prompts": 2, "train_embedding": False, "lr": 3e-3,
    "lr_no_teacher": None, "warmup_share": 0.1, "weight_decay": 0.0, "clip_norm": 1.0,
    "judge": "overlap", "eval_prompts": 4, "eval_samples": 1, "eval_bytes": 1024, "max_new_tokens": 6,
    "max_prompt_tokens": 64, "checkpoint_steps": 2, "checkpoint_seconds": 1e9, "samples": 1,
}  # fmt: skip
WHOLE = {"top_k": None}
RANDOM = {"student": "random", "keep_layers": None, "depth": 1, "train_embedding": True}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    known = tokenizer()
    known.chat_template = CHAT_TEMPLATE
    torch.manual_seed(5)
    teacher = model(known, depth=3, length=256)
    teacher.save_pretrained(root / "ppo/model")
    known.save_pretrained(root / "ppo/model")
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
    return {"data": root / "data", "ppo": root / "ppo"}


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds are measured in processes of their own; here only what they are asked of."""

    def measure(models: dict[str, tuple[Path, str]], *_: Any) -> dict[str, speed.Speed]:
        return {name: speed.Speed((2.0,) if name == "" else (1.0,), 4.0, 0.1, 1.0, True) for name in models}

    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed_server, "start", lambda models: None)


def run(
    inputs: dict[str, Path], root: Path, context: StageContext | None = None, **changes: Any
) -> tuple[dict[str, float], Path, StageContext]:
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    context = context or StageContext(stage="distill", root=root, fingerprint="f" * 64)
    return distill.run(DistillParams(**TINY | changes), inputs, out, context), out, context


def test_it_learns_and_writes_what_it_promises(inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics, out, context = run(inputs, tmp_path, epochs=6)
    assert metrics.keys() >= distill.METRICS and metrics.keys() <= distill.METRICS | distill.OPTIONAL
    assert metrics["bits_per_byte"] < metrics["bits_per_byte_before"]
    assert context.measured["decode_speedup"] == 2.0
    rows = pd.read_parquet(out / "evaluation.parquet")
    assert set(rows.columns) == {"id", "group"} | distill.SCORES
    assert metrics["bits_per_byte"] == pytest.approx(rows["bits"].sum() / rows["bytes"].sum())
    assert metrics["retention"] == pytest.approx(rows["bits_teacher"].sum() / rows["bits"].sum())
    golds = pd.read_parquet(out / "answers.parquet")
    assert metrics["gold_teacher"] == pytest.approx(golds["gold_teacher"].mean())
    student = AutoModelForCausalLM.from_pretrained(out / "model")
    assert student.config.num_hidden_layers == 2
    history = pd.read_csv(out / "history.csv")
    arm = history["forward"].dropna()
    assert arm.iloc[-1] < arm.iloc[0]
    assert len(arm) == len(history["no_teacher_labels"].dropna()) == metrics["steps"]
    for page in ("samples.md", "model/README.md"):
        assert (out / page).read_text().strip()


def test_both_arms_begin_alike_and_see_the_same_tokens(inputs: dict[str, Path], tmp_path: Path) -> None:
    """With the labels' weight alone the two arms are one and the same run."""
    metrics, out, _ = run(inputs, tmp_path, weights={"labels": 1.0}, answers="both", top_k=None)
    assert metrics["bits_per_byte"] != metrics["bits_per_byte_no_teacher"]  # the teacher's answers are in one of them
    shared = {"weights": {"labels": 1.0, "forward": 1e-12}, **WHOLE}
    metrics, out, _ = run(inputs, tmp_path / "same", **shared)
    assert metrics["bits_per_byte"] == pytest.approx(metrics["bits_per_byte_no_teacher"], rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        WHOLE | {"weights": {"reverse": 1.0}, "temperature": 2.0},
        WHOLE | {"weights": {"jsd": 1.0, "labels": 0.5}, "beta": 0.3},
        WHOLE | {"weights": {"hidden": 1.0, "cosine": 1.0, "attention": 1.0}},
        WHOLE | {"weights": {"forward": 1.0, "on_policy": 0.5}},
        {"weights": {"on_policy": 1.0}},
        {"answers": "teacher", "weights": {"labels": 1.0}, **WHOLE},
        RANDOM,
        WHOLE | RANDOM | {"weights": {"hidden": 1.0}},
        {"train_embedding": True},
    ],
)
def test_every_term_and_student_is_trained(changes: dict[str, Any], inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics, out, context = run(inputs, tmp_path, **changes)
    first = next(row for row in context.history if "loss" in row)
    assert first["grad_norm"] > 0
    for name in changes.get("weights", {"forward": 1.0}):
        assert any(name in row for row in context.history), name
    assert AutoModelForCausalLM.from_pretrained(out / "model").config.vocab_size


@pytest.mark.parametrize("tied", [True, False])
def test_what_stays_is_the_embedding_and_a_head_tied_to_it(
    tied: bool, inputs: dict[str, Path], context: StageContext
) -> None:
    params, place = DistillParams(**TINY), inputs["ppo"] / "model"
    teacher = tiny("llama", tied, vocab_size=len(tokenizer()))
    student, _ = distill._student(params, teacher, place, tokenizer(), context)
    assert not student.get_input_embeddings().weight.requires_grad
    assert student.get_output_embeddings().weight.requires_grad is not tied


def test_the_kept_answers_and_the_running_teacher_teach_the_same(inputs: dict[str, Path], tmp_path: Path) -> None:
    """With as many tokens kept as there are, the cache is the teacher."""
    size = len(tokenizer())
    cached, *_ = run(inputs, tmp_path / "cached", top_k=size)
    asked, *_ = run(inputs, tmp_path / "asked", top_k=None)
    assert cached["bits_per_byte"] == pytest.approx(asked["bits_per_byte"], rel=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics, _, context = run(inputs, tmp_path, keep_layers=3, top_k=None, lr=1e-9)
    assert context.history[0]["forward"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["retention"] == pytest.approx(1.0, abs=1e-3)


def test_only_the_student_with_the_teacher_is_fitted(inputs: dict[str, Path], tmp_path: Path) -> None:
    lines = {}
    for fit in (None, 0.1):
        rates = {"lr": 3e-3 if fit is None else 1e-3, "lr_no_teacher": 3e-3}
        metrics, out, context = run(inputs, tmp_path / f"{fit}", fit=fit, **rates)
        lines[fit] = metrics, pd.read_csv(out / "history.csv")
        assert any(line.startswith("blocks fitted") for line in context.samples) is (fit is not None)
        assert ("fitted to the teacher's states" in (out / "model/README.md").read_text()) is (fit is not None)
    assert lines[0.1][1]["forward"].iloc[0] < 0.7 * lines[None][1]["forward"].iloc[0]
    for end in ("_before", "_no_teacher", "_teacher"):
        assert lines[0.1][0][f"bits_per_byte{end}"] == lines[None][0][f"bits_per_byte{end}"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # the second drops out a tenth
def test_stopped_and_gone_on_it_ends_with_the_same_bytes(
    architecture: str, inputs: dict[str, Path], tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    known = tokenizer()
    known.chat_template = CHAT_TEMPLATE
    known.save_pretrained(teacher)
    model(known, architecture, depth=3, length=256).save_pretrained(teacher)
    changes = {"epochs": 2, "teacher": str(teacher), "fit": 0.1}
    _, whole, _ = run(inputs, tmp_path / "whole", **changes)
    context = StageContext(stage="distill", root=tmp_path / "cut", fingerprint="f" * 64)
    steps, fitting = iter(range(1000)), iter([15])
    later, tell = context.after_step, context.progress

    def progress(step: int, total: int | None = None, **shown: float | str) -> None:
        if "fitting" in shown:
            context.signal_number = next(fitting, 0)
        tell(step, total, **shown)

    def after_step(due: bool) -> tuple[bool, bool]:
        if next(steps) in (3, 9, 12):  # in the first arm twice, and in the second
            context.signal_number = 15
        return later(due)

    context.after_step, context.progress = after_step, progress  # type: ignore[method-assign]
    for _ in range(4):
        with pytest.raises(Stopped):
            run(inputs, tmp_path / "cut", context, **changes)
        context.signal_number = 0
        context.history.clear()
    torch.manual_seed(1)  # another process has another state
    _, out, _ = run(inputs, tmp_path / "cut", context, **changes)
    assert artifacts.content_hash(out) == artifacts.content_hash(whole)


@pytest.mark.parametrize("count", [2, 6, 9])
def test_an_arm_with_fewer_or_more_sequences_learns_from_as_many(count: int) -> None:
    params, plan = DistillParams(**TINY | {"epochs": 2}), distilling.Plan(12, 3, 1e-3, 0, 0)
    sequences = [segments.Sequence([1] * (n + 1), [1] * (n + 1), [0] * (n + 1)) for n in range(count)]
    arm = distilling.Arm("", Terms(forward=1.0), sequences, None)
    order = distilling._order(arm, params, plan)
    assert len(order) == 12 and sorted(order[:count]) == list(range(count))
    assert distilling.tokens(arm, params, plan) == sum(int(number) + 1 for number in order)
    assert distilling.tokens(arm._replace(weights=Terms(on_policy=1.0)), params, plan) == 0


def test_sequences_of_answers_supervise_the_answer_alone() -> None:
    made = distill_data.of_answer([1, 2, 3], [7, 8])
    none = segments.UNSUPERVISED
    assert made == segments.Sequence([1, 2, 3, 7], [none, none, 7, 8], [0, 0, 0, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {}}, "nothing of the teacher weighs more than 0"),
        ({"weights": {}, "answers": "teacher"}, "nothing of the teacher weighs more than 0"),
        ({"weights": {"labels": 1.0}}, "nothing of the teacher weighs more than 0"),
        ({"weights": {"forwards": 1.0}}, "forwards"),
        ({"temperature": 2.0}, "top_k: kept tokens are those of temperature 1"),
        ({"weights": {"hidden": 1.0}}, "top_k: hidden, cosine and attention need the teacher in every step"),
        ({"answers": "both", "max_new_tokens": 48}, r"max_new_tokens \(48\) must be less than max_length \(48\)"),
        ({"keep_layers": None}, "keep_layers: student: layers needs it"),
        ({"depth": 2}, "depth: used by student: random"),
        (RANDOM | {"train_embedding": False}, "train_embedding: .* begins with a random embedding"),
        (RANDOM | {"fit": 0.1}, "fit: used by student: layers"),
        ({"fit": 0.0}, "fit"),
    ],
)
def test_params_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DistillParams(**TINY | changes)


def test_no_prompt_loses_its_beginning(inputs: dict[str, Path], context: StageContext) -> None:
    params, known = DistillParams(**TINY | WHOLE | {"answers": "teacher", "max_new_tokens": 28}), tokenizer()
    known.chat_template = CHAT_TEMPLATE
    whole = distill_data.prompts(params, inputs["data"], known, 48, "", context)
    length = len(whole[0])
    assert len(whole) == 8 and length > 20
    told = rf"row d\d: its prompt has {length} tokens; distill\."
    with pytest.raises(DataError, match=told + r"max_length less distill\.max_new_tokens accept 20 \(8 of 8"):
        distill_data.of_teacher(params, inputs["data"], known, None, context)
    with pytest.raises(DataError, match=told + rf"max_prompt_tokens accept {length - 1} \(8 of 8"):
        distill_data.prompts(params, inputs["data"], known, length - 1, "distill.max_prompt_tokens", context)


def test_what_does_not_fit_into_memory_is_told_before_anything_is_loaded(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 2**20)
    monkeypatch.setattr(language_models, "load", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(ArtifactError, match=r"take about 0\.0 GiB of memory, 0\.0 GiB are available; free some, lower"):
        run(inputs, tmp_path)


def test_bad_input_is_told_before_training(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"distill\.keep_layers: 4; the teacher has 3 blocks"):
        run(inputs, tmp_path, keep_layers=4)
    with pytest.raises(ParamsError, match="more than|at most as many"):
        run(inputs, tmp_path, **RANDOM | {"depth": 5})
    with pytest.raises(ParamsError, match=r"distill\.top_k: 9999; the teacher has \d+ tokens; accepted: 1 to "):
        run(inputs, tmp_path, top_k=9999)
    with pytest.raises(ParamsError, match=r"distill\.max_length is 300, .* 70 tokens; the context .* is 256: lower"):
        run(inputs, tmp_path, max_length=300)
    with pytest.raises(
        DataError, match=r"the training corpus has .* pieces of 48 tokens .*distill.texts asks for 99999"
    ):
        run(inputs, tmp_path, texts=99999)
    bad = AutoModelForCausalLM.from_pretrained(inputs["ppo"] / "model")
    bad.get_output_embeddings().weight.data[3, 3] = float("nan")
    bad.save_pretrained(tmp_path / "bad")
    tokenizer_of = tokenizer()
    tokenizer_of.chat_template = CHAT_TEMPLATE
    tokenizer_of.save_pretrained(tmp_path / "bad")
    with pytest.raises(ArtifactError, match="NaN"):
        run(inputs, tmp_path, teacher=str(tmp_path / "bad"))
    int8.quantize(AutoModelForCausalLM.from_pretrained(inputs["ppo"] / "model")).save_pretrained(tmp_path / "int8")
    padded = AutoTokenizer.from_pretrained(inputs["ppo"] / "model")
    padded.save_pretrained(tmp_path / "int8")  # in a process that knew no such format codes were taken for weights
    with pytest.raises(ArtifactError, match="int8: the model is quantized; name the one it was made from"):
        run(inputs, tmp_path, teacher=str(tmp_path / "int8"), **RANDOM)
    tiny("stablelm").save_pretrained(tmp_path / "stablelm")
    tokenizer_of.save_pretrained(tmp_path / "stablelm")
    with pytest.raises(ArtifactError, match="architecture stablelm cannot be sampled from"):
        run(inputs, tmp_path, teacher=str(tmp_path / "stablelm"))
    padded.add_special_tokens({"pad_token": "[PAD]"})  # to the tokenizer alone: padding ended in an IndexError
    padded.save_pretrained(shutil.copytree(inputs["ppo"] / "model", tmp_path / "padded"))
    with pytest.raises(ArtifactError, match=r"padded: 1 tokens of the tokenizer have no row .* 300 rows, .*'\[PAD\]'"):
        run(inputs, tmp_path, teacher=str(tmp_path / "padded"))
    wider = AutoModelForCausalLM.from_pretrained(inputs["ppo"] / "model")
    wider.resize_token_embeddings(320)
    wider.save_pretrained(tmp_path / "wider")
    AutoTokenizer.from_pretrained(inputs["ppo"] / "model").save_pretrained(tmp_path / "wider")
    with pytest.raises(ArtifactError, match="the student's head has 320 rows, the teacher's 300"):
        run(inputs, tmp_path, student=str(tmp_path / "wider"), keep_layers=None)
    tokenizer_of.chat_template = tokenizer_of.pad_token = None
    tokenizer_of.save_pretrained(tmp_path / "bare")
    bad.save_pretrained(tmp_path / "bare")
    with pytest.raises(ArtifactError, match=r"bare: its tokenizer has no chat_template, no pad_token, so"):
        run(inputs, tmp_path, teacher=str(tmp_path / "bare"))
