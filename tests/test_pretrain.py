"""The stage on a two-layer model: what it writes, that it learns, that it is the same twice, and what it refuses."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from data_folder import write_corpus
from models import TEXTS, model, tokenizer, windowed

from pipelines import pretrain
from pipelines.core import artifacts, language_models, statistics, training
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError, ParamsError
from pipelines.core.held_out import HeldOut
from pipelines.core.params.pretrain import PretrainParams

TINY: dict[str, Any] = {
    "seed": 1, "base": None, "architecture": "llama", "depth": 1, "tokens_per_parameter": 1.0, "method": "full",
    "lora_rank": 4, "tokens": 4096, "sequence_length": 32, "batch_tokens": 256, "micro_batch": 4, "lr": 3e-3,
    "warmup_share": 0.1, "weight_decay": 0.01, "clip_norm": 1.0, "eval_bytes": 2048, "checkpoint_steps": 100,
    "checkpoint_seconds": 1e9, "snapshots": 2, "samples": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    known = tokenizer()
    known.save_pretrained(root / "tokenizer")
    model(known, depth=1).save_pretrained(root / "base")
    known.save_pretrained(root / "base")
    return {"data": write_corpus(root / "data", TEXTS), "tokenizer": root / "tokenizer", "base": root / "base"}


def run(inputs: dict[str, Path], root: Path, **changes: Any) -> tuple[dict[str, float], Path, StageContext]:
    out = root / "out"
    out.mkdir(parents=True)
    context = StageContext(stage="pretrain", root=root, fingerprint="f" * 64)
    params = PretrainParams(**TINY | changes)
    return pretrain.run(params, {key: inputs[key] for key in ("data", "tokenizer")}, out, context), out, context


def test_files_metrics_and_learning(inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics, out, context = run(inputs, tmp_path)
    assert set(metrics) == pretrain.METRICS | pretrain.OPTIONAL
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        "evaluation.parquet", "history.csv", "samples.md", "model/README.md",
        "model/config.json", "model/generation_config.json", "model/model.safetensors", "model/tokenizer.json",
        "model/tokenizer_config.json", *(f"snapshots/step-{step:06d}/model.safetensors" for step in (0, 5, 11)),
    }  # fmt: skip
    assert metrics["gain_bits_per_byte_low"] > 0, "training lowers the bits of text it has not seen"
    assert metrics["bits_per_byte_low"] < metrics["bits_per_byte"] < metrics["bits_per_byte_high"]
    rows = pd.read_parquet(out / "evaluation.parquet")
    assert set(rows.columns) == {"id", "group"} | pretrain.SCORES
    assert rows["bits"].sum() / rows["bytes"].sum() == pytest.approx(metrics["bits_per_byte"])
    history = pd.read_csv(out / "history.csv")
    assert list(history["step"]) == list(range(1, 17)) and history["loss"].iloc[-1] < history["loss"].iloc[0]
    assert {"tokens_per_second", "matmul_share"} <= set(context.measured)
    text = "".join(path.read_text() for path in out.rglob("*") if path.suffix in (".md", ".json", ".csv"))
    assert "tokens_per_second" not in text and str(tmp_path) not in text, "nothing that varies goes into the output"
    assert "first training row" in context.samples[0] and "all supervised" in context.samples[0]


def test_the_saved_model_is_what_was_measured(inputs: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, out, context = run(inputs, tmp_path)
    AutoModelForCausalLM.from_pretrained(out / "model")
    params = PretrainParams(**TINY)
    pretrain.measure(params, {"data": inputs["data"]}, context, out / "model", tmp_path / "again.parquet")
    first, again = pd.read_parquet(out / "evaluation.parquet"), pd.read_parquet(tmp_path / "again.parquet")
    assert first["bits"].tolist() == again["bits"].tolist() and first["id"].tolist() == again["id"].tolist()


def test_same_seed_same_bytes_other_seed_other_bytes(inputs: dict[str, Path], tmp_path: Path) -> None:
    hashes = [artifacts.content_hash(run(inputs, tmp_path / str(n), seed=seed)[1]) for n, seed in enumerate((1, 1, 2))]
    assert hashes[0] == hashes[1] != hashes[2]


def test_accumulation_changes_nothing_but_memory(inputs: dict[str, Path], tmp_path: Path) -> None:
    losses = [
        pd.read_csv(run(inputs, tmp_path / str(size), micro_batch=size)[1] / "history.csv")["loss"] for size in (2, 8)
    ]
    assert losses[0].tolist() == pytest.approx(losses[1].tolist(), rel=1e-4)


def test_lora_trains_the_adapters_alone(inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics, out, _ = run(inputs, tmp_path, base=str(inputs["base"]), method="lora", lr=1e-2)
    assert 0 < metrics["trained_parameters"] < metrics["parameters"] / 4
    assert metrics["gain_bits_per_byte_low"] > 0
    config = json.loads((out / "model/config.json").read_text())
    assert config["model_type"] == "llama" and not (out / "model/adapter_config.json").exists()


def test_a_base_in_4_bits(inputs: dict[str, Path], tmp_path: Path) -> None:
    """QLoRA: what is gained is gained over the base itself, and what is saved is a plain model."""
    given = {"base": str(inputs["base"]), "lr": 1e-2}
    lora, qlora = (run(inputs, tmp_path / method, **given, method=method) for method in ("lora", "qlora"))
    assert qlora[0]["bits_per_byte_before"] == lora[0]["bits_per_byte_before"]
    assert qlora[0]["gain_bits_per_byte_low"] > 0 and qlora[0]["trained_parameters"] == lora[0]["trained_parameters"]
    first, second = (pd.read_csv(out / "history.csv")["loss"] for _, out, _ in (lora, qlora))
    assert first[0] != second[0] and first[0] == pytest.approx(second[0], rel=0.05), "4 bits are nearly the base"
    assert "quantization_config" not in json.loads((qlora[1] / "model/config.json").read_text())


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3", "mistral", "gpt_neox"])
def test_other_architectures(inputs: dict[str, Path], tmp_path: Path, architecture: str) -> None:
    metrics, _, _ = run(inputs, tmp_path, architecture=architecture, depth=2, tokens=512)
    assert metrics["bits_per_byte"] < metrics["bits_per_byte_before"]


def test_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    for number, (changes, error, told) in enumerate(
        [
            ({"architecture": "resnet"}, ParamsError, "no causal language model"),
            (
                {"architecture": "gemma3"},
                ParamsError,
                "'gemma3' reads more than text; its part for text is gemma3_text",
            ),
            (
                {"architecture": "gpt_neo"},
                ParamsError,
                "architecture: 'gpt_neo' cannot be made of depth 1 .*choose another",
            ),
            ({"architecture": "gptj"}, ParamsError, "architecture: 'gptj' cannot be made of depth 1"),
            (
                {"architecture": "bloom"},
                ArtifactError,
                "bloom cannot be sampled from: its attention makes masks of its own",
            ),
            ({"architecture": "openai-gpt"}, ArtifactError, "openai-gpt cannot be sampled from"),
            ({"architecture": "gpt_oss"}, ArtifactError, "gpt_oss: it has attention sinks"),
            ({"base": str(tmp_path / "nowhere"), "method": "lora"}, ParamsError, "nor an existing directory"),
            ({"sequence_length": 8192, "batch_tokens": 8192, "micro_batch": 1}, Exception, "less than one row"),
        ]
    ):
        with pytest.raises(error, match=told):
            run(inputs, tmp_path / str(number), **changes)


def test_a_base_model_without_all_of_its_weights_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    """transformers would draw those that are missing at random, and say so in a table that nobody is shown."""
    base = Path(shutil.copytree(inputs["base"], tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    for changed, told in (({"num_hidden_layers": 2}, "layers.1."), ({"intermediate_size": 96}, "mlp.down_proj")):
        (base / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(ArtifactError, match=rf"no weights, or none of the right shape, for .*{told}"):
            language_models.load(str(base), torch.float32, "sdpa")
    (base / "config.json").write_text(json.dumps(config))
    language_models.load(str(base), torch.float32, "sdpa")
    for weights in (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", b""):
        (base / "model.safetensors").write_bytes(weights)
        with pytest.raises(ArtifactError, match="no causal language model in"):
            language_models.load(str(base), torch.float32, "sdpa")


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_quantized_base_is_refused(inputs: dict[str, Path], tmp_path: Path, method: str) -> None:
    """bitsandbytes would load it, train nothing of its layers, and merge adapters into 4 bits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    in_4_bits = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(inputs["base"], quantization_config=in_4_bits).save_pretrained(tmp_path / "b")
    with pytest.raises(ParamsError, match=r"base \S+/b: its weights are quantized \(bitsandbytes\), .* method: qlora"):
        run(inputs, tmp_path, base=str(tmp_path / "b"), method=method)


def test_a_base_that_sees_images_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    """transformers loads Gemma 3's larger ones as causal language models; their configuration has parts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**common, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer())}
    vision = {**common, "image_size": 14, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ArtifactError, match="gemma3 reads more than text; accepted: a model of text alone"):
        run(inputs, tmp_path, base=str(tmp_path / "base"), method="lora")


def test_a_base_model_below_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like the files of data.sources; read as a hub id, it would be asked for there."""
    (tmp_path / "home/mine").mkdir(parents=True)
    (tmp_path / "home/mine/config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert language_models.find("~/mine") == language_models.Source("directory", str(tmp_path / "home/mine"))
    assert language_models.local_paths({"pretrain.base": "~/mine"}, tmp_path) == [tmp_path / "home/mine"]
    assert language_models.fetched("~/mine", "distill.teacher") == tmp_path / "home/mine"
    with pytest.raises(ParamsError, match="'~/nowhere' is neither"):
        language_models.find("~/nowhere")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rows_longer_than_the_base_models_context_are_refused(
    inputs: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    """Learned positions would end in an IndexError at the first long document, others be of no use beyond it."""
    known = tokenizer()
    for part in (model(known, architecture, depth=1, length=64), known):
        part.save_pretrained(tmp_path / "base")
    asked = {"base": str(tmp_path / "base"), "method": "lora", "sequence_length": 128, "micro_batch": 1}
    with pytest.raises(ParamsError, match=r"pretrain\.sequence_length: 128; the base model's context is 64"):
        run(inputs, tmp_path, **asked)


def test_rows_longer_than_a_window_of_attention_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Of a base, and of an architecture: rows are trained with every token in sight, the saved model has the window."""
    known = tokenizer()
    for part in (model(known, "mistral", depth=1), known):
        part.save_pretrained(tmp_path / "whole")
    base = windowed(tmp_path / "whole", tmp_path / "base", 20)
    with pytest.raises(ParamsError, match=r"pretrain\.sequence_length: 32; the base model's context is 20"):
        run(inputs, tmp_path / "one", base=str(base))
    with pytest.raises(ParamsError, match=r"sequence_length: 8192; the window of attention of mistral is 4096"):
        run(inputs, tmp_path / "two", architecture="mistral", sequence_length=8192, micro_batch=1, batch_tokens=8192)


def test_a_foreign_tokenizer_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    other = tokenizer(340)
    other.add_tokens([f"word{n}" for n in range(900)])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, match="do not belong together"):
        run({**inputs, "tokenizer": tmp_path / "other"}, tmp_path, base=str(inputs["base"]), method="full")


def test_intervals_draw_groups_whole() -> None:
    """Five parts of one document are one thing that was measured, not five: as sure as their sums are."""
    texts, groups = [f"{n:02d}" for n in range(40)], tuple(f"g{n // 5}" for n in range(40))
    parts = HeldOut(tuple(texts), groups, tuple(texts))
    scores = {"bits": [8.0 + n // 5 for n in range(40)], "bits_before": [20.0] * 40, "bits_classical": [30.0] * 40}
    found = parts.metrics(scores)
    sums = np.array([5.0 * (8 + n) for n in range(8)])
    after = statistics.bootstrap(sums, np.full(8, 10.0))
    assert (found["bits_per_byte_low"], found["bits_per_byte_high"]) == pytest.approx((after.low, after.high))
    gain = statistics.paired_bootstrap(np.full(8, 100.0), sums, np.full(8, 10.0))
    assert (found["gain_bits_per_byte_low"], found["gain_bits_per_byte_high"]) == pytest.approx((gain.low, gain.high))


def test_divergence_is_told() -> None:
    with pytest.raises(ArtifactError, match=r"diverged in step 3.*loss"):
        training.refuse_nan(2, loss=float("nan"), grad_norm=1.0)


def test_schedule() -> None:
    rates = [training.cosine_with_warmup(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) == max(rates)
    assert rates[55] == pytest.approx(0.55, abs=0.01) and rates[-1] == pytest.approx(0.1, abs=0.01)
    assert training.cosine_with_warmup(0, 100, 0.0) == 1.0


def test_depth_is_the_one_dial() -> None:
    known = tokenizer()
    config = model(known, "gpt2", depth=3).config
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (192, 3, 3)
    assert language_models.learning_rate(768) == 2.5e-4 == language_models.learning_rate(384) / 2


def test_flops_against_a_counter() -> None:
    """The formula against what torch counts of a forward and a backward pass (attention over all keys there)."""
    from torch.utils.flop_counter import FlopCounterMode

    known = tokenizer()
    lm = model(known, attention="eager")
    ids = torch.randint(0, 300, (2, 64))
    with FlopCounterMode(display=False) as counter:
        lm(input_ids=ids, labels=ids).loss.backward()
    config = lm.config
    half = 3 * 2 * 2 * config.num_hidden_layers * config.hidden_size * 32
    assert training.flops_per_token(lm, 64).model + half == pytest.approx(counter.get_total_flops() / 128, rel=0.02)
    frozen = copy.deepcopy(lm).requires_grad_(False)
    flops = training.flops_per_token(frozen, 64)
    assert flops.executed < flops.model == training.flops_per_token(lm, 64).model
