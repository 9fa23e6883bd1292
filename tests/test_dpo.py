"""Direct preference optimization: the paper's loss by hand, the step-0 laws, and the stage on a two-layer model."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from models import TEXTS, model, tokenizer

from pipelines import dpo
from pipelines.core import artifacts, chats, direct_preference, k_way, reward_model
from pipelines.core.context import StageContext, Stopped
from pipelines.core.errors import DataError, ParamsError
from pipelines.core.params.dpo import DpoParams
from pipelines.core.preference_data import Ranking
from pipelines.core.reward_examples import Elements
from pipelines.core.segments import Sequence
from pipelines.tokenizer import CHAT_TEMPLATE

TINY: dict[str, Any] = {
    "seed": 1, "method": "full", "lora_rank": 4, "rankings": None, "epochs": 2, "batch_prompts": 4, "micro_tokens": 512,
    "max_length": 128, "too_long": "refuse", "beta": 0.1, "lr": 1e-3, "warmup_share": 0.1, "weight_decay": 0.0,
    "clip_norm": 1.0, "judge": "overlap", "eval_rankings": None, "eval_prompts": 4, "eval_samples": 3,
    "eval_bytes": 1024, "max_new_tokens": 6, "max_prompt_tokens": 64, "checkpoint_steps": 100,
    "checkpoint_seconds": 1e9, "samples": 2,
}  # fmt: skip

PAIRS: list[dict[str, Any]] = [
    {"id": "a", "group": "a", "prompt": "area of w", "labeler": "x",
     "responses": ["w * h", "def area"], "ranks": [1, 2]},
    {"id": "b", "group": "b", "prompt": "w?", "labeler": None,
     "responses": ["return", "x y z w h"], "ranks": [2, 1]},
]  # fmt: skip


def write(place: Path, rows: list[dict[str, Any]]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), place)


def comparisons(split: str, count: int, draw: random.Random) -> list[dict[str, Any]]:
    """Rankings of two or three that prefer `area` to `shape`, whatever the length."""
    rows = []
    for number in range(count):
        good = [True, False] + [False] * draw.randint(0, 1)
        draw.shuffle(good)
        texts = [("area " if one else "shape ") + "w " * draw.randint(0, 6) for one in good]
        rows.append(
            {"id": f"{split}-{number}", "group": f"{split}{number}", "prompt": f"{split} {number}", "labeler": "ada",
             "responses": texts, "ranks": [1 if one else 2 for one in good]}
        )  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def known() -> Any:
    made = tokenizer()
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture(scope="module")
def inputs(known: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, draw = tmp_path_factory.mktemp("inputs"), random.Random(0)
    model(known, depth=1, length=256).save_pretrained(root / "sft/model")
    known.save_pretrained(root / "sft/model")
    judge = reward_model.initial(root / "sft/model", known, 3, torch.float32, "sdpa")
    reward_model.save(judge, known, root / "reward/model", torch.float32)
    reward_model.save_constants(root / "reward/model", judge, reward_model.Level(0.1, 1.0))
    for split, count in (("train", 40), ("test", 16)):
        write(root / f"feedback/comparisons/{split}.parquet", comparisons(split, count, draw))
    asked = [
        {"id": f"p{n}", "group": f"g{n // 2}", "prompt": f"area of shape {n}?", "reference": f"w * h * {n}"}
        for n in range(6)
    ]
    write(root / "data/prompts/test.parquet", asked)
    write(root / "data/corpus/test.parquet", [{"id": f"c{n}", "group": "c", "text": t} for n, t in enumerate(TEXTS)])
    return {name: root / name for name in ("data", "sft", "feedback", "reward")}


def run(inputs: dict[str, Path], root: Path, **changes: Any) -> tuple[dict[str, float], Path, StageContext]:
    out = root / "out"
    out.mkdir(parents=True)
    context = StageContext(stage="dpo", root=root, fingerprint="f" * 64)
    return dpo.run(DpoParams(**TINY | changes), inputs, out, context), out, context


def encoded(known: Any, rankings: list[dict[str, Any]]) -> tuple[list[Ranking], list[Sequence]]:
    found = [Ranking(**row | {"responses": tuple(row["responses"]), "ranks": tuple(row["ranks"])}) for row in rankings]
    return found, [k_way.encode(known, chats.messages_of(one.prompt), one.responses) for one in found]


def separately(causal: Any, known: Any, prompt: str, response: str) -> torch.Tensor:
    """log pi(response | prompt), the plain way: one text, all logits."""
    opening = chats.encode_prompt(known, chats.messages_of(prompt))
    answer = chats.encode_response(known, response)
    logits = causal(input_ids=torch.tensor([opening + answer])).logits[0, len(opening) - 1 : -1]
    return torch.log_softmax(logits, dim=1)[range(len(answer)), answer].sum()


# --- the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_two_responses_are_the_papers_loss_and_gradient(known: Any, context: StageContext, architecture: str) -> None:
    """Rafailov et al., equation 7, with each of the four log-probabilities from a forward pass of its own."""
    policy, reference = (model(known, architecture, length=256) for _ in range(2))
    with torch.no_grad():
        for value in policy.parameters():
            value += 0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel()))
    rankings, sequences = encoded(known, PAIRS)
    before = k_way.log_probabilities(reference, sequences, known.pad_token_id, context, lambda done, total: None)
    batches = k_way.batches(sequences, 128, known.pad_token_id)
    step = direct_preference.accumulate(policy, batches, [one.pairs for one in rankings], before, 0.3, context)
    ours = {name: value.grad.clone() for name, value in policy.named_parameters()}
    policy.zero_grad()
    gaps = []
    for one in rankings:
        better, worse = (one.responses[one.ranks.index(rank)] for rank in (1, 2))
        with torch.no_grad():
            start = separately(reference, known, one.prompt, better) - separately(reference, known, one.prompt, worse)
        gaps.append(
            separately(policy, known, one.prompt, better) - separately(policy, known, one.prompt, worse) - start
        )
    loss = -torch.nn.functional.logsigmoid(0.3 * torch.stack(gaps)).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    found = torch.stack(gaps).detach()
    assert step.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    assert step.margin == pytest.approx(0.3 * float(found.mean()), abs=1e-4)
    assert step.accuracy == pytest.approx(float((found > 0).float().mean()))
    for name, value in policy.named_parameters():
        torch.testing.assert_close(ours[name], value.grad, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_loss_begins_at_log_2(known: Any, tmp_path: Path, context: StageContext, method: Any) -> None:
    """Of a model with dropout too. Then, from references moved by hand, gaps of 1 (two responses) and of 2 and -1
    (three, two of them tied): log(1 + e^-1) = 0.31326, log(1 + e^-2) = 0.12693, log(1 + e^1) = 1.31326, so that the
    loss is (0.31326 + (0.12693 + 1.31326) / 2) / 2 = 0.51668, the margin (1 + (2 - 1) / 2) / 2 = 0.75."""
    start = model(known, "gpt2", length=512)
    start.config.update({"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5})
    start.save_pretrained(tmp_path / "sft")
    third = {"id": "c", "group": "c", "prompt": "w", "responses": ["x", "y", "h w"], "ranks": [1, 2, 2], "labeler": "x"}
    rankings, sequences = encoded(known, [PAIRS[0], third])
    pairs, pad = [one.pairs for one in rankings], known.pad_token_id
    policy = dpo._model(DpoParams(**TINY | {"method": method}), tmp_path / "sft", Elements(sequences, pairs), context)
    before = k_way.log_probabilities(policy, sequences, pad, context, lambda done, total: None)
    for moves, loss, margin, accuracy in (
        ([[0.0] * 2, [0.0] * 3], math.log(2), 0.0, None),
        ([[10.0, 0.0], [0.0, -20.0, 10.0]], 0.51668, 0.75, 2 / 3),
    ):
        moved = [[one - by for one, by in zip(*both, strict=True)] for both in zip(before, moves, strict=True)]
        for tokens in (16, 512):  # a forward pass each, and one for both
            step = direct_preference.accumulate(
                policy, k_way.batches(sequences, tokens, pad), pairs, moved, 0.1, context
            )
            assert (step.loss, step.margin) == pytest.approx((loss, margin), abs=1e-5)
            assert accuracy is None or step.accuracy == pytest.approx(accuracy)  # of equal rewards it is noise
    assert any(value.grad is not None and value.grad.abs().sum() > 0 for value in policy.parameters())


def test_implicit_reward_by_hand() -> None:
    rewards = direct_preference.implicit_rewards(torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -4.5]), 0.1)
    assert rewards.tolist() == pytest.approx([0.1, -0.05])
    ranking = Ranking("a", "g", "p", ("long one", "short", "mid"), (1, 2, 2), None)
    rows = direct_preference.table([ranking], [[0.1, -0.05, 0.3]], longer=True)
    assert (rows["pairs"], rows["right"], rows["right_length_only"]) == ([2.0], [1.0], [2.0])
    assert rows["gap"] == pytest.approx([0.15 - 0.2])
    told = direct_preference.metrics(rows)
    assert told["accuracy"] == 0.5 and told["margin"] == pytest.approx(-0.025) and told["accuracy_length_only"] == 1.0


# --- the stage -----------------------------------------------------------------------------------------------


def test_files_metrics_and_learning(inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics, out, context = run(inputs, tmp_path)
    assert set(metrics) == dpo.METRICS | dpo.OPTIONAL
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        "evaluation.parquet", "rankings.parquet", "tax.parquet", "history.csv", "samples.md", "best_of_n.csv",
        "model/README.md", "model/config.json", "model/generation_config.json", "model/model.safetensors",
        "model/tokenizer.json", "model/tokenizer_config.json", "model/chat_template.jinja",
    }  # fmt: skip
    history = pd.read_csv(out / "history.csv")
    assert list(history.columns) == ["step", "loss", "lr", "grad_norm", "accuracy", "margin"]
    assert history["loss"].iloc[0] == pytest.approx(math.log(2), abs=1e-4) and len(history) == metrics["steps"] == 20
    assert history["accuracy"].iloc[-5:].mean() > 0.9 and history["margin"].iloc[-1] > 0.1, "it has learned"
    assert metrics["accuracy_low"] > 0.8 > metrics["accuracy_length_only"] and metrics["kl"] > 0.0
    rows = pd.read_parquet(out / "rankings.parquet")
    assert rows["right"].sum() / rows["pairs"].sum() == metrics["accuracy"] and len(rows) == 16
    rows = pd.read_parquet(out / "evaluation.parquet")
    assert set(rows.columns) == {"id", "group"} | dpo.SCORES and len(rows) == 4
    text = "".join(path.read_text() for path in out.rglob("*") if path.suffix in (".md", ".json", ".csv"))
    assert str(tmp_path) not in text, "nothing that varies goes into the output"
    assert "first ranking" in context.samples[0] and "<|im_end|>" in context.samples[0]
    assert "**Prompt:**" in (out / "samples.md").read_text()


def test_the_saved_model_is_what_was_measured(inputs: dict[str, Path], tmp_path: Path) -> None:
    _, out, context = run(inputs, tmp_path)
    dpo.measure(DpoParams(**TINY), inputs, context, out / "model", tmp_path / "again.parquet")
    first, again = pd.read_parquet(out / "evaluation.parquet"), pd.read_parquet(tmp_path / "again.parquet")
    assert first[list(again.columns)].equals(again) and {"id", "group", "gold", "wins"} < set(again.columns)


def test_lora_trains_adapters_alone(inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics, out, _ = run(inputs, tmp_path, method="lora", lr=1e-2)
    assert 0 < metrics["trained_parameters"] < metrics["parameters"] / 4
    assert metrics["accuracy_low"] > 0.8 and not (out / "model/adapter_config.json").exists()
    assert json.loads((out / "model/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_same_seed_same_bytes_other_seed_other_bytes(inputs: dict[str, Path], tmp_path: Path) -> None:
    hashes = [artifacts.content_hash(run(inputs, tmp_path / str(n), seed=seed)[1]) for n, seed in enumerate((1, 1, 2))]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("at", ["step 11", "the SFT model's answers"])
def test_stopped_and_resumed_ends_the_same(inputs: dict[str, Path], tmp_path: Path, at: str) -> None:
    _, whole, _ = run(inputs, tmp_path / "whole")
    context = StageContext(stage="dpo", root=tmp_path / "cut", fingerprint="f" * 64)
    if at == "step 11":
        context.curve = lambda step, metrics: setattr(context, "signal_number", 15 if step == 11 else 0)
    else:
        last = "answers of the SFT model"
        watch(context, lambda shown: setattr(context, "signal_number", 15 if shown.get("sampling") == last else 0))
    first, second = (tmp_path / "cut" / name for name in ("first", "second"))
    first.mkdir(parents=True)
    with pytest.raises(Stopped):
        dpo.run(DpoParams(**TINY), inputs, first, context)
    second.mkdir()
    resumed = StageContext(stage="dpo", root=tmp_path / "cut", fingerprint="f" * 64)
    told: list[dict[str, Any]] = []
    watch(resumed, told.append)
    dpo.run(DpoParams(**TINY), inputs, second, resumed)
    assert f"resuming after step {11 if at == 'step 11' else 20} of 20" in resumed.samples
    steps, asked = sum("loss" in one for one in told), {one["sampling"] for one in told if "sampling" in one}
    assert (steps, len(asked)) == ((9, 2) if at == "step 11" else (0, 0)), "what was finished is not done again"
    assert artifacts.content_hash(second) == artifacts.content_hash(whole)


def watch(context: StageContext, hear: Callable[[dict[str, Any]], None]) -> None:
    """Tell `hear` what the stage shows of its progress."""
    show = context.progress

    def progress(step: int, total: int | None = None, **shown: Any) -> None:
        show(step, total, **shown)
        hear(shown)

    context.progress = progress  # type: ignore[method-assign]


def test_refused_before_training(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"dpo.max_length is 512, .* 70 tokens; the SFT model's context is 256"):
        run(inputs, tmp_path / "context", max_length=512)
    with pytest.raises(DataError, match=r"dpo.max_length accepts 16 .* Raise dpo.max_length, or shorten them\.$"):
        run(inputs, tmp_path / "long", max_length=16)
    with pytest.raises(DataError, match=r"dpo.max_prompt_tokens accepts 8"):
        run(inputs, tmp_path / "prompts", max_prompt_tokens=8)
    with pytest.raises(DataError, match="judge: slots needs prompts that list attributes"):
        run(inputs, tmp_path / "slots", judge="slots")
