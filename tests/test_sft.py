"""The stage on a two-layer model: what it writes, that it learns, that it is the same twice, and what it refuses."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from models import model, tokenizer, windowed

from pipelines import sft
from pipelines.core import answers, artifacts, chats, demonstrations, hardware, segments
from pipelines.core.context import StageContext, Stopped
from pipelines.core.errors import ArtifactError, DataError, ParamsError
from pipelines.core.params.sft import SftParams
from pipelines.tokenizer import CHAT_TEMPLATE

TINY: dict[str, Any] = {
    "seed": 1, "method": "full", "lora_rank": 4, "kinds": (), "examples": 40, "epochs": 2, "batch_size": 8,
    "micro_tokens": 256, "max_length": 128, "too_long": "refuse", "lr": 5e-3, "warmup_share": 0.1, "weight_decay": 0.01,
    "clip_norm": 1.0, "dropout": 0.0, "validate_steps": 4, "eval_prompts": 8, "max_new_tokens": 24, "few_shot": 1,
    "checkpoint_steps": 100, "checkpoint_seconds": 1e9, "samples": 1,
}  # fmt: skip


def said(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"area_{number}?"},
        {"role": "assistant", "content": f"Return the area of shape {number}."},
    ]


def write_demonstrations(place: Path, sides: dict[str, list[list[dict[str, str]]]], kind: str = "what") -> Path:
    (place / "demonstrations").mkdir(parents=True)
    for side, messages in sides.items():
        rows = [
            {"id": f"{side}-{n}", "group": f"{side}-g{n // 2}", "kind": kind, "messages": one}
            for n, one in enumerate(messages)
        ]
        pq.write_table(pa.Table.from_pylist(rows), place / "demonstrations" / f"{side}.parquet")
    return place


SIDES = {
    "train": [said(n) for n in range(48)],
    "validation": [said(n) for n in range(50, 60)],
    "test": [said(n) for n in range(60, 72)],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    known = tokenizer()
    known.chat_template = CHAT_TEMPLATE
    model(known, length=256).save_pretrained(root / "pretrain/model")
    known.save_pretrained(root / "pretrain/model")
    return {"data": write_demonstrations(root / "data", SIDES), "pretrain": root / "pretrain"}


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast the machine multiplies takes longer to find out than all the rest."""
    monkeypatch.setattr(hardware, "matmul_rate", lambda *_, **__: 1e9)


def run(inputs: dict[str, Path], root: Path, **changes: Any) -> tuple[dict[str, float], Path, StageContext]:
    out = root / "out"
    out.mkdir(parents=True, exist_ok=True)
    context = StageContext(stage="sft", root=root, fingerprint="f" * 64)
    return sft.run(SftParams(**TINY | changes), inputs, out, context), out, context


def test_files_metrics_and_learning(inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics, out, context = run(inputs, tmp_path, epochs=8)
    assert set(metrics) == sft.METRICS | {"trained_share"}
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        "evaluation.parquet", "history.csv", "samples.md", "model/README.md", "model/chat_template.jinja",
        "model/config.json", "model/generation_config.json", "model/model.safetensors", "model/tokenizer.json",
        "model/tokenizer_config.json",
    }  # fmt: skip
    assert metrics["gain_response_bits_per_byte_low"] > 0
    assert metrics["rouge_l_low"] > max(metrics["rouge_l_zero_shot"], metrics["rouge_l_few_shot"])
    assert metrics["eos_share"] > 0.8 > metrics["eos_share_zero_shot"], "it learned to stop"
    assert (metrics["steps"], metrics["training_examples"], metrics["dropped_too_long"]) == (40, 40, 0)
    rows = pd.read_parquet(out / "evaluation.parquet")
    assert set(rows.columns) == {"id", "group"} | sft.SCORES and len(rows) == 8
    assert rows["bits"].sum() / rows["bytes"].sum() == pytest.approx(metrics["response_bits_per_byte"])
    assert rows["rouge_l"].mean() == pytest.approx(metrics["rouge_l"])
    history = pd.read_csv(out / "history.csv")
    assert list(history["step"]) == list(range(1, 41)) and history["validation_loss"].count() == 10
    assert history["validation_loss"].min() == metrics["best_validation_loss"]
    assert history["validation_loss"].idxmin() + 1 == metrics["best_step"]
    text = "".join(path.read_text() for path in out.rglob("*") if path.suffix in (".md", ".json", ".csv"))
    assert "tokens_per_second" not in text and str(tmp_path) not in text, "nothing that varies goes into the output"
    assert "⟦Return the area of shape" in context.samples[0] and ".<|im_end|>⟧" in context.samples[0]
    assert {"tokens_per_second", "matmul_share"} <= set(context.measured)


def test_the_best_state_is_saved_not_the_last(inputs: dict[str, Path], tmp_path: Path) -> None:
    """With a rate that makes a short run worse and worse, the first validated state is the best."""
    worse = {"lr": 0.3, "clip_norm": 100.0, "validate_steps": 1, "warmup_share": 0.0}
    metrics, out, _ = run(inputs, tmp_path / "long", **worse)
    losses = pd.read_csv(out / "history.csv")["validation_loss"]
    assert metrics["best_step"] < metrics["steps"] and losses.min() == metrics["best_validation_loss"] < losses.iloc[-1]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    params = SftParams(**TINY)
    saved, tokens = (kind.from_pretrained(out / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    examples = sft._examples(params, inputs["data"], tokens, inputs["pretrain"] / "model")
    context = StageContext(stage="sft", root=tmp_path, fingerprint="0" * 64)
    assert answers.mean_loss(saved, tokens, examples.validation, 256, context) == pytest.approx(losses.min(), rel=1e-4)


def test_the_saved_model_is_what_was_measured(inputs: dict[str, Path], tmp_path: Path) -> None:
    _, out, context = run(inputs, tmp_path)
    sft.measure(SftParams(**TINY), inputs, context, out / "model", tmp_path / "again.parquet")
    first, again = pd.read_parquet(out / "evaluation.parquet"), pd.read_parquet(tmp_path / "again.parquet")
    assert list(again.columns) == ["id", "group", "bytes", "bits", "rouge_l", "chrf"]
    for column in again.columns:
        assert first[column].tolist() == again[column].tolist()


def test_same_seed_same_bytes_other_seed_other_bytes(inputs: dict[str, Path], tmp_path: Path) -> None:
    hashes = [artifacts.content_hash(run(inputs, tmp_path / str(n), seed=seed)[1]) for n, seed in enumerate((1, 1, 2))]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("method", "dials"),
    [("full", {"unfreeze": True, "layer_decay": 0.5}), ("lora", {"lora_variant": "dora", "lora_dropout": 0.1})],
)
def test_stopped_and_resumed_gives_the_same_bytes(
    inputs: dict[str, Path], tmp_path: Path, method: str, dials: dict[str, Any]
) -> None:
    """Stopped in the middle of each part; with dropout, so that the random states matter, and with one block after
    the other, so that what is trained at a checkpoint is not what is trained at the end.
    """
    changes = {"method": method, "dropout": 0.2, "validate_steps": 3, "tuning": dials}
    undisturbed = artifacts.content_hash(run(inputs, tmp_path / "whole", **changes)[1])
    root = tmp_path / "stopped"
    (root / "out").mkdir(parents=True)
    for part, share in (("before training", 0.5), ("loss", 0.2), ("loss", 0.5), ("answers after", 0.5)):
        context = StageContext(stage="sft", root=root, fingerprint="f" * 64)
        tell = context.progress

        def stopping(step: int, total: int | None = None, **shown: Any) -> None:
            tell(step, total, **shown)  # noqa: B023
            if (part in shown or part in str(shown.get("scoring"))) and step / (total or 1) >= share:  # noqa: B023
                context.signal_number = signal.SIGTERM  # noqa: B023

        context.progress = stopping  # type: ignore[method-assign]
        with pytest.raises(Stopped):
            sft.run(SftParams(**TINY | changes), inputs, root / "out", context)
    _, out, context = run(inputs, root, **changes)
    assert "resuming after step 10 of 10" in context.samples[0]
    assert artifacts.content_hash(out) == undisturbed


def test_gradient_of_a_step_against_a_plain_loop(inputs: dict[str, Path], context: StageContext) -> None:
    """Each chat alone through transformers' own loss, summed over the tokens of the step."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = inputs["pretrain"] / "model"
    tokens = AutoTokenizer.from_pretrained(place)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(place) for _ in range(2))
    longer = [{"role": "system", "content": "S"}, *said(3), *said(14)]
    encoded = [chats.encode(tokens, chat) for chat in ([*said(1)], longer, [*said(222)])]
    loss = sft.backward(ours, [segments.of_chat(chat) for chat in encoded], 64, tokens.pad_token_id, context)

    total, expected = sum(sum(chat.supervised) for chat in encoded), 0.0
    for chat in encoded:
        labels = torch.tensor([[i if kept else -100 for i, kept in zip(*chat, strict=True)]])
        part = theirs(input_ids=torch.tensor([chat.ids]), labels=labels).loss * sum(chat.supervised) / total
        part.backward()
        expected += float(part.detach())
    assert loss == pytest.approx(expected, rel=1e-5)
    for (name, mine), (_, reference) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_bits_belong_to_their_example(inputs: dict[str, Path], context: StageContext) -> None:
    """Several rows and passes; each example's bits are those of transformers' own loss on it alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = inputs["pretrain"] / "model"
    tokens, lm = AutoTokenizer.from_pretrained(place), AutoModelForCausalLM.from_pretrained(place).eval()
    examples = demonstrations.choose(inputs["data"], "train", tokens, (), 20, 128, "refuse").kept
    ours = answers.reference_bits(lm, tokens, examples, 512, context, "test")
    for example, bits in zip(examples, ours, strict=True):
        prompt = chats.encode_prompt(tokens, example.prompt)
        response = chats.encode_response(tokens, example.reference)
        ids, labels = torch.tensor([prompt + response]), torch.tensor([[-100] * len(prompt) + response])
        with torch.inference_mode():
            expected = float(lm(input_ids=ids, labels=labels).loss) * len(response) / math.log(2)
        assert bits == pytest.approx(expected, rel=1e-4)
    assert len({round(bits, 3) for bits in ours}) > 10, "examples that differ"


def test_accumulation_changes_nothing_but_memory(inputs: dict[str, Path], tmp_path: Path) -> None:
    losses = [
        pd.read_csv(run(inputs, tmp_path / str(size), micro_tokens=size)[1] / "history.csv")["loss"]
        for size in (64, 4096)
    ]
    assert losses[0].tolist() == pytest.approx(losses[1].tolist(), rel=1e-3)


def delta(inputs: dict[str, Path], out: Path, metrics: dict[str, float], context: StageContext) -> float:
    """Bits a token by which the saved model is worse on what was validated than the model that was trained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(out / "model")
    examples = demonstrations.choose(inputs["data"], "validation", tokens, (), 8, 128, "refuse").kept
    saved = AutoModelForCausalLM.from_pretrained(out / "model")
    loss = answers.mean_loss(saved, tokens, examples, 128, context)
    return (loss - metrics["best_validation_loss"]) / math.log(2)


def test_a_target_that_is_nowhere_is_refused_before_training(inputs: dict[str, Path], tmp_path: Path) -> None:
    dials = {"lora_targets": ("q_proj", "query")}
    told = (
        r"^sft\.tuning\.lora_targets: query: no linear layer .* accepted: all-linear, or some of q_proj, k_proj, v_proj"
    )
    with pytest.raises(ParamsError, match=told):
        run(inputs, tmp_path, method="lora", tuning=dials)
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_alone_are_trained_and_merged(inputs: dict[str, Path], tmp_path: Path, method: str) -> None:
    metrics, out, context = run(inputs, tmp_path, method=method, lr=2e-2, epochs=6)
    assert set(metrics) == sft.METRICS | sft.OPTIONAL
    assert 0 < metrics["trained_parameters"] < metrics["parameters"] / 4
    assert metrics["gain_response_bits_per_byte_low"] > 0 and metrics["rouge_l"] > metrics["rouge_l_zero_shot"]
    history = pd.read_csv(out / "history.csv")["validation_loss"].dropna()
    assert history.iloc[-1] < history.iloc[0] / 1.2, "learning goes on after the first evaluation"
    assert metrics["merge_delta_bits"] == pytest.approx(delta(inputs, out, metrics, context), abs=1e-6)
    merging = abs(metrics["merge_delta_bits"])
    assert merging < 1e-5 if method == "lora" else merging > 1e-4, "the base was in 4 bits and now is not"
    config = json.loads((out / "model/config.json").read_text())
    assert "quantization_config" not in config and not (out / "model/adapter_config.json").exists()


def test_demonstrations_are_chosen_by_id_and_kind(inputs: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(inputs["pretrain"] / "model")
    rows = pq.read_table(inputs["data"] / "demonstrations/train.parquet").to_pylist()
    (tmp_path / "demonstrations").mkdir()
    reordered = [{**row, "kind": "other", "group": "g"} for row in reversed(rows)]
    pq.write_table(pa.Table.from_pylist(reordered), tmp_path / "demonstrations/train.parquet")

    def ids(place: Path, kinds: tuple[str, ...], count: int | None) -> list[str]:
        chosen = demonstrations.choose(place, "train", tokens, kinds, count, 128, "refuse")
        return [example.id for example in chosen.kept]

    few, more = ids(inputs["data"], ("what",), 5), ids(inputs["data"], (), 9)
    assert few == more[:5] and more == ids(tmp_path, ("other",), None)[:9], "neither order nor count decide which"
    known = [row["id"] for row in rows]
    assert more not in (known[:9], sorted(known)[:9])
    with pytest.raises(DataError, match="no kind which; there are: what"):
        ids(inputs["data"], ("which", "what"), 5)


@pytest.mark.parametrize(
    ("split", "remedy"),
    [("train", "lower data.validation_share and test_share"), ("validation", "raise data.validation_share")],
)
def test_an_empty_side_is_told(inputs: dict[str, Path], tmp_path: Path, split: str, remedy: str) -> None:
    schema = pq.read_schema(inputs["data"] / "demonstrations/test.parquet")
    (tmp_path / "demonstrations").mkdir()
    pq.write_table(schema.empty_table(), tmp_path / f"demonstrations/{split}.parquet")
    for kinds in ((), ("what",)):
        with pytest.raises(
            DataError, match=f"demonstrations/{split}.parquet has no row; .*{remedy}, .* split: {split}"
        ):
            demonstrations.choose(tmp_path, split, None, kinds, 5, 128, "refuse")


def test_too_long_is_dropped_and_counted_or_refused(inputs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    long = [{"role": "user", "content": "area " * 200}, said(0)[1]]
    sides = {**SIDES, "train": [*SIDES["train"][:9], long, *SIDES["train"][9:], long]}
    changed = {**inputs, "data": write_demonstrations(tmp_path / "data", sides)}
    with pytest.raises(
        DataError, match=r"demonstrations/train.parquet, row train-(9|49): \d+ tokens, accepted are 128"
    ):
        run(changed, tmp_path / "refused", examples=None)
    metrics, _, _ = run(changed, tmp_path / "dropped", examples=None, too_long="drop", epochs=1)
    assert (metrics["dropped_too_long"], metrics["training_examples"]) == (2, 48)
    assert "2 of 50 chats are longer than 128 tokens and dropped; the first is row train-" in capsys.readouterr().out
    with pytest.raises(DataError, match="none is left"):
        run(inputs, tmp_path / "all", max_length=16, too_long="drop")


def test_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    ends = {**SIDES, "validation": [*SIDES["validation"][:2], [*said(1), said(1)[0]]]}
    changed = {**inputs, "data": write_demonstrations(tmp_path / "data", ends)}
    with pytest.raises(DataError, match=r"demonstrations/validation.parquet, row validation-2: .*ends with the user"):
        run(changed, tmp_path / "ends")
    with pytest.raises(ArtifactError, match=r"sft.max_length is 300, the model's context 256"):
        run(inputs, tmp_path / "context", max_length=300)
    windowed(inputs["pretrain"] / "model", tmp_path / "base/model", 100)
    with pytest.raises(ArtifactError, match=r"sft.max_length is 128, the model's context 100"):
        run(inputs | {"pretrain": tmp_path / "base"}, tmp_path / "window")
    with pytest.raises(DataError, match=r"leaves no room for an answer: 6 fit"):
        run(inputs, tmp_path / "room", max_new_tokens=250)
    with pytest.raises(ArtifactError, match="have no table demonstrations"):
        run({**inputs, "data": tmp_path}, tmp_path / "table")
    assert not list(tmp_path.rglob("checkpoints")), "refused before training"


def test_shots_stand_after_the_leading_system_messages_alone(inputs: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(inputs["pretrain"] / "model")
    system = {"role": "system", "content": "area"}
    prompt = [system, said(1)[0], {**system, "content": "shape"}, said(2)[0]]
    example, shot = (
        demonstrations.Demonstration("d", "g", messages, chats.Chat([], []))
        for messages in ([*prompt, said(2)[1]], [{**system, "content": "left out"}, *said(3)])
    )
    assert answers._prompt(tokens, example, [], 1000) == chats.encode_prompt(tokens, prompt)
    with_shot = chats.encode_prompt(tokens, [system, *said(3), *prompt[1:]])
    assert answers._prompt(tokens, example, [shot], 1000) == with_shot


def test_as_many_shots_as_fit(inputs: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(inputs["pretrain"] / "model")
    shots = demonstrations.choose(inputs["data"], "train", tokens, (), 3, 128, "refuse").kept
    example = demonstrations.choose(inputs["data"], "test", tokens, (), 1, 128, "refuse").kept[0]

    def given(kept: list[demonstrations.Demonstration]) -> list[int]:
        turns = [message for shot in kept for message in shot.messages]
        return chats.encode_prompt(tokens, [*turns, *example.prompt])

    assert answers._prompt(tokens, example, shots, 1000) == given(shots)
    assert answers._prompt(tokens, example, shots, len(given(shots)) - 1) == given(shots[1:])
    assert answers._prompt(tokens, example, shots, len(given([]))) == given([])
