"""The reward model's forward pass against transformers' own, and the stage on a two-layer model."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from models import model, tokenizer, windowed
from safetensors.torch import load_file

from pipelines import reward
from pipelines.core import artifacts, chats, int8, k_way, reward_examples, reward_model
from pipelines.core.context import StageContext, Stopped
from pipelines.core.errors import ArtifactError, DataError, ParamsError
from pipelines.core.params.reward import RewardParams
from pipelines.tokenizer import CHAT_TEMPLATE

TINY: dict[str, Any] = {
    "seed": 1, "method": "full", "lora_rank": 4, "rankings": None, "epochs": 1, "batch_prompts": 4, "micro_tokens": 512,
    "max_length": 128, "too_long": "refuse", "lr": 2e-3, "warmup_share": 0.1, "weight_decay": 0.0, "clip_norm": 1.0,
    "held_out_labelers": 1, "eval_rankings": None, "calibration_demonstrations": 8, "checkpoint_steps": 100,
    "checkpoint_seconds": 1e9, "samples": 2,
}  # fmt: skip
ITEMS: list[reward_model.Item] = [
    ("area of w", ["def area", "return w * h", "x"]),
    ("", ["shape", "shape"]),
    (
        "\n\nHuman: w?\n\nAssistant: h.\n\nHuman: and h?\n\nAssistant:",
        ["Return the area of shape 7.", "", "<|im_end|>w"],
    ),
]


def write(place: Path, rows: list[dict[str, Any]]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), place)


def comparisons(split: str, count: int, draw: random.Random) -> list[dict[str, Any]]:
    """Rankings that prefer `area` to `shape`, whatever the length; K from 2 to 5, ties; four labelers."""
    rows = []
    for number in range(count):
        k = draw.randint(2, 5)
        good = [True, False, *(draw.random() < 0.5 for _ in range(k - 2))]
        draw.shuffle(good)
        texts = [("area " if is_good else "shape ") + "w " * draw.randint(0, 6) for is_good in good]
        prompt = f"{split} {number}: " + "h " * draw.randint(0, 9)
        rows.append(
            {"id": f"{split}-{number}", "group": f"{split}{number}", "prompt": prompt, "responses": texts,
             "ranks": [1 if is_good else 2 for is_good in good], "labeler": draw.choice("ABCD")}
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
    for split, count in (("train", 60), ("test", 24)):
        write(root / f"feedback/comparisons/{split}.parquet", comparisons(split, count, draw))
    samples = [
        {"id": f"s{n}", "group": f"s{n}", "prompt": f"sample {n}", "reference": "area", "gold": [1.0, 0.0, 0.0, 0.5],
         "responses": [f"area {n}", f"shape {n}", "shape", "w"]} for n in range(6)
    ]  # fmt: skip
    write(root / "feedback/samples/test.parquet", samples)
    told = [{"role": "user", "content": "what is w?"}, {"role": "assistant", "content": "the width of the area"}]
    write(root / "data/demonstrations/train.parquet", [{"id": f"d{n}", "messages": told} for n in range(12)])
    return {name: root / name for name in ("data", "sft", "feedback")}


def run(inputs: dict[str, Path], root: Path, **changes: Any) -> tuple[dict[str, float], Path, StageContext]:
    out = root / "out"
    out.mkdir(parents=True)
    context = StageContext(stage="reward", root=root, fingerprint="f" * 64)
    return reward.run(RewardParams(**TINY | changes), inputs, out, context), out, context


def changed(inputs: dict[str, Path], root: Path, name: str, rows: list[dict[str, Any]]) -> dict[str, Path]:
    """The inputs with one file of the feedback replaced."""
    shutil.copytree(inputs["feedback"], root / "feedback")
    write(root / "feedback" / name, rows)
    return {**inputs, "feedback": root / "feedback"}


def nothing(done: int, total: int) -> None:
    """Nobody watches."""


# --- the forward pass ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gpt_neox", "opt"])
def test_equals_transformers_on_separate_padded_texts(
    known: Any, tmp_path: Path, context: StageContext, architecture: str
) -> None:
    """Prefix sharing, rows of several prompts, padding: all without effect."""
    model(known, architecture, length=256).save_pretrained(tmp_path)
    judge = reward_model.initial(tmp_path, known, 3, torch.float32, "sdpa").eval()
    encoded = [k_way.encode(known, chats.messages_of(prompt), responses) for prompt, responses in ITEMS]
    ours = [score for one in reward_model.raw_scores(judge, encoded, context, nothing) for score in one]
    texts = [
        chats.encode_prompt(known, chats.messages_of(prompt)) + chats.encode_response(known, response)
        for prompt, responses in ITEMS
        for response in responses
    ]
    ids = torch.full((len(texts), max(map(len, texts)) + 5), known.pad_token_id)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    with torch.no_grad():
        theirs = judge(input_ids=ids, attention_mask=(ids != known.pad_token_id).long()).logits[:, 0]
    assert ours == pytest.approx(theirs.tolist(), abs=1e-5) and max(ours) - min(ours) > 0.1


def test_score_is_that_less_the_mean_whatever_else_is_scored(known: Any, tmp_path: Path, context: StageContext) -> None:
    model(known, length=256).save_pretrained(tmp_path)
    judge = reward_model.initial(tmp_path, known, 3, torch.float32, "sdpa").eval()
    with pytest.raises(ArtifactError, match="no reward_mean"):
        reward_model.score(judge, known, ITEMS, context, nothing)
    reward_model.save(judge, known, tmp_path / "saved", torch.float32)
    with pytest.raises(ArtifactError, match="weights of a LlamaForSequenceClassification are not in it"):
        reward_model.load(tmp_path, context)
    raw = reward_model.raw_scores(
        judge, [k_way.encode(known, chats.messages_of(prompt), texts) for prompt, texts in ITEMS], context, nothing
    )
    reward_model.save_constants(tmp_path / "saved", judge, reward_model.Level(0.25, 2.0))
    loaded, again = reward_model.load(tmp_path / "saved", context)
    together = reward_model.score(loaded, again, ITEMS, context, nothing)
    for item, scores, plain in zip(ITEMS, together, raw, strict=True):
        assert scores == pytest.approx([value - 0.25 for value in plain], abs=1e-5)
        assert scores == pytest.approx(reward_model.score(loaded, again, [item], context, nothing)[0], abs=1e-5)
        alone = [reward_model.score(loaded, again, [(item[0], [text])], context, nothing)[0][0] for text in item[1]]
        assert scores == pytest.approx(alone, abs=1e-5)


def test_gradients_are_those_of_separate_encoding(known: Any, tmp_path: Path, context: StageContext) -> None:
    model(known, length=256).save_pretrained(tmp_path)
    encoded = [k_way.encode(known, chats.messages_of(prompt), responses) for prompt, responses in ITEMS]
    apart = [
        k_way.encode(known, chats.messages_of(prompt), [response])
        for prompt, responses in ITEMS
        for response in responses
    ]
    gradients = []
    for sequences in (encoded, apart):
        judge = reward_model.initial(tmp_path, known, 3, torch.float32, "sdpa")
        for batch in k_way.batches(sequences, 64, known.pad_token_id):
            reward_model.rewards(judge, batch, context).square().sum().backward()  # type: ignore[no-untyped-call]
        gradients.append({name: value.grad for name, value in judge.named_parameters()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], atol=2e-4, rtol=1e-4, msg=name)


def test_mean_log_probabilities_are_the_plain_models(known: Any, tmp_path: Path, context: StageContext) -> None:
    causal = model(known, length=256)
    causal.save_pretrained(tmp_path)
    encoded = [k_way.encode(known, chats.messages_of(prompt), responses) for prompt, responses in ITEMS]
    found = k_way.mean_log_probabilities(tmp_path, encoded, known.pad_token_id, context, nothing)
    for (prompt, responses), ours in zip(ITEMS, found, strict=True):
        opening = chats.encode_prompt(known, chats.messages_of(prompt))
        for response, value in zip(responses, ours, strict=True):
            answer = chats.encode_response(known, response)
            with torch.no_grad():
                logits = causal(input_ids=torch.tensor([opening + answer])).logits[0]
            each = torch.log_softmax(logits[len(opening) - 1 : -1], dim=1)
            assert value == pytest.approx(float(each[range(len(answer)), answer].mean()), abs=1e-5)


def test_a_quantized_reward_model_is_refused(known: Any, tmp_path: Path, context: StageContext) -> None:
    """Named in ppo.rewards, its codes were read as weights, without their scales and without a word."""
    model(known).save_pretrained(tmp_path / "sft")
    judge = reward_model.initial(tmp_path / "sft", known, 3, torch.float32, "sdpa")
    judge.config.reward_mean = 0.0
    int8.quantize(judge).save_pretrained(tmp_path / "int8")
    known.save_pretrained(tmp_path / "int8")
    with pytest.raises(ArtifactError, match="int8: the reward model is quantized; name the one it was made from"):
        reward_model.load(tmp_path / "int8", context)


def test_no_classifier_of_this_architecture(known: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model("codegen").save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="no reward model can be made of it"):
        reward_model.initial(tmp_path, known, 1, torch.float32, "sdpa")


# --- the stage -----------------------------------------------------------------------------------------------


def test_files_metrics_and_learning(inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics, out, context = run(inputs, tmp_path)
    assert set(metrics) == reward.METRICS | reward.OPTIONAL
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
        "evaluation.parquet", "history.csv", "samples.md", "calibration.csv", "by_k.csv", "by_margin.csv",
        "best_of_n.csv", "model/README.md", "model/config.json", "model/model.safetensors", "model/tokenizer.json",
        "model/tokenizer_config.json", "model/chat_template.jinja",
    }  # fmt: skip
    assert metrics["accuracy_low"] > 0.9 > metrics["accuracy_length_only"], "it prefers the chosen"
    assert metrics["accuracy_held_out_labelers_low"] > 0.5 and metrics["accuracy_gold"] > 0.6
    assert metrics["best_of_n_oracle_gold"] == 1.0 >= metrics["best_of_n_gold"] > metrics["best_of_1_gold"] == 0.375
    rows = pd.read_parquet(out / "evaluation.parquet")
    assert set(rows.columns) == {"id", "group"} | reward.SCORES
    assert rows["right"].sum() / rows["pairs"].sum() == pytest.approx(metrics["accuracy"])
    assert (rows["pairs"] > 0).all() and (rows["pairs_unseen"] > 0).any() and (rows["pairs_unseen"] == 0).any()
    assert (rows["right_chance"] == rows["pairs"] / 2).all()
    unseen = rows["right_unseen"].sum() / rows["pairs_unseen"].sum()
    assert unseen == pytest.approx(metrics["accuracy_held_out_labelers"])
    k, margin = pd.read_csv(out / "by_k.csv"), pd.read_csv(out / "by_margin.csv")
    assert k["pairs"].sum() == margin["pairs"].sum() == metrics["pairs_test"] and set(k["k"]) == {2, 3, 4, 5}
    bins = pd.read_csv(out / "calibration.csv")
    assert (
        bins["pairs"].sum() == metrics["pairs_test"]
        and bins["observed"].iloc[0] < 0.2 < 0.8 < bins["observed"].iloc[-1]
    )
    history = pd.read_csv(out / "history.csv")
    assert list(history.columns) == ["step", "loss", "lr", "grad_norm", "accuracy"]
    assert list(history["step"]) == list(range(1, int(metrics["steps"]) + 1))
    assert history["loss"].iloc[-1] < 0.5 < history["loss"].iloc[0]
    text = "".join(path.read_text() for path in out.rglob("*") if path.suffix in (".md", ".json", ".csv"))
    assert str(tmp_path) not in text, "nothing that varies goes into the output"
    told = r"labelers kept out of training: [A-D]; held out are (\d+) rankings of theirs, of \1 groups of prompts"
    assert re.match(told, context.samples[0]) and "first ranking" in context.samples[1]


@pytest.mark.parametrize(
    ("count", "told"),
    [(3, r"of 3 chosen ones 0 have at most .*calibration_demonstrations"), (1, "more rows of table")],
)
def test_demonstrations_without_a_mean_are_told_before_the_training(
    inputs: dict[str, Path], tmp_path: Path, count: int, told: str
) -> None:
    answer = "the width of the area " * (60 if count > 1 else 1)
    said = [{"role": "user", "content": "what is w?"}, {"role": "assistant", "content": answer}]
    write(tmp_path / "data/demonstrations/train.parquet", [{"id": f"d{n}", "messages": said} for n in range(count)])
    with pytest.raises(DataError, match=told):
        run({**inputs, "data": tmp_path / "data"}, tmp_path)
    assert not list(tmp_path.rglob("step-*")), "a run of hours would have been made again with another max_length"


def test_demonstrations_score_zero_on_average(inputs: dict[str, Path], tmp_path: Path, known: Any) -> None:
    metrics, out, context = run(inputs, tmp_path)
    config = json.loads((out / "model/config.json").read_text())
    assert config["reward_mean"] == metrics["reward_mean"] and config["reward_std"] == metrics["reward_std"]
    judge, theirs = reward_model.load(out / "model", context)
    scores = reward_model.score(judge, theirs, [("what is w?", ["the width of the area"])], context, nothing)
    assert scores[0][0] == pytest.approx(0.0, abs=1e-5), "every demonstration is this one"


def test_a_demonstration_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    made = tokenizer()
    made.chat_template = "{{ raise_exception('no') }}"
    told = [{"role": "user", "content": "what is w?"}, {"role": "assistant", "content": "the width of the area"}]
    write(tmp_path / "demonstrations/train.parquet", [{"id": "d7", "messages": told}])
    with pytest.raises(DataError, match="demonstrations/train, id d7: the chat template refuses this chat: no"):
        reward_examples.demonstrations(RewardParams(**TINY), tmp_path, made)


def test_the_saved_model_is_what_was_measured(inputs: dict[str, Path], tmp_path: Path) -> None:
    _, out, context = run(inputs, tmp_path)
    reward.measure(RewardParams(**TINY), inputs, context, out / "model", tmp_path / "again.parquet")
    first, again = pd.read_parquet(out / "evaluation.parquet"), pd.read_parquet(tmp_path / "again.parquet")
    assert first[list(again.columns)].equals(again) and {"id", "group", "pairs", "right"} == set(again.columns)


def test_same_seed_same_bytes_other_seed_other_bytes(inputs: dict[str, Path], tmp_path: Path) -> None:
    hashes = [artifacts.content_hash(run(inputs, tmp_path / str(n), seed=seed)[1]) for n, seed in enumerate((1, 1, 2))]
    assert hashes[0] == hashes[1] != hashes[2]


def test_stopped_and_resumed_ends_the_same(inputs: dict[str, Path], tmp_path: Path) -> None:
    _, whole, _ = run(inputs, tmp_path / "whole", epochs=2)
    context = StageContext(stage="reward", root=tmp_path / "cut", fingerprint="f" * 64)

    def stop(step: int, metrics: dict[str, float]) -> None:
        context.signal_number = 15 if step == 17 else 0

    context.curve = stop
    out = tmp_path / "cut/out"
    out.mkdir(parents=True)
    with pytest.raises(Stopped):
        reward.run(RewardParams(**TINY | {"epochs": 2}), inputs, out, context)
    again = StageContext(stage="reward", root=tmp_path / "cut", fingerprint="f" * 64)
    reward.run(RewardParams(**TINY | {"epochs": 2}), inputs, out, again)
    assert any("resuming after step 17 of" in line for line in again.samples)
    assert artifacts.content_hash(out) == artifacts.content_hash(whole)


def test_an_epoch_is_every_ranking_once() -> None:
    first, second = ([reward_examples.drawn(7, step, 5, 23) for step in epoch] for epoch in (range(5), range(5, 10)))
    for epoch in (first, second):
        assert sorted(number for step in epoch for number in step) == list(range(23))
        assert {len(step) for step in epoch} == {4, 5}
    assert first != second


def test_accumulation_changes_nothing_but_memory(inputs: dict[str, Path], tmp_path: Path) -> None:
    losses = [
        pd.read_csv(run(inputs, tmp_path / str(size), micro_tokens=size)[1] / "history.csv")["loss"]
        for size in (32, 4096)
    ]
    assert losses[0].tolist() == pytest.approx(losses[1].tolist(), rel=1e-3)


def test_lora_trains_adapters_and_head_alone(inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics, out, _ = run(inputs, tmp_path, method="lora", lr=1e-2)
    assert 0 < metrics["trained_parameters"] < metrics["parameters"] / 4
    assert metrics["accuracy_low"] > 0.8 and not (out / "model/adapter_config.json").exists()
    text = (out / "adapter/adapter_config.json").read_text() + (out / "adapter/base.json").read_text()
    assert (
        artifacts.content_hash(inputs["sft"] / "model/model.safetensors") in text and str(tmp_path.parent) not in text
    )
    kept = load_file(out / "adapter/adapter_model.safetensors") | load_file(out / "adapter/head.safetensors")
    assert sum(value.numel() for value in kept.values()) == metrics["trained_parameters"], "all that was trained"
    again = run(inputs, tmp_path / "again", method="lora", lr=1e-2)[1]
    assert artifacts.content_hash(again) == artifacts.content_hash(out)
    assert json.loads((out / "model/config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize(
    ("method", "dials", "trained"),
    [
        ("head", {}, ("score",)),
        ("last_n", {"layers": 1, "layer_decay": 0.5}, ("score", "model.layers.0.", "model.norm.")),
    ],
)
def test_the_top_alone(
    inputs: dict[str, Path], tmp_path: Path, method: str, dials: dict[str, Any], trained: tuple[str, ...]
) -> None:
    metrics, out, _ = run(inputs, tmp_path, method=method, lr=1e-2, tuning=dials)
    before, after = load_file(inputs["sft"] / "model/model.safetensors"), load_file(out / "model/model.safetensors")
    moved = {name for name, value in after.items() if name not in before or not torch.equal(value, before[name])}
    assert moved == {name for name in after if name.startswith(trained)}
    assert metrics["trained_parameters"] == sum(after[name].numel() for name in moved)
    assert metrics["trained_share"] == metrics["trained_parameters"] / metrics["parameters"]
    assert not (out / "adapter").exists()


def test_without_names_and_samples_their_metrics_are_absent(inputs: dict[str, Path], tmp_path: Path) -> None:
    rows = [row | {"labeler": None} for row in comparisons("train", 12, random.Random(1))]
    ours = changed(inputs, tmp_path, "comparisons/train.parquet", rows)
    rows = [row | {"labeler": None} for row in comparisons("test", 9, random.Random(2))]
    write(ours["feedback"] / "comparisons/test.parquet", rows)
    shutil.rmtree(ours["feedback"] / "samples")
    metrics, out, context = run(ours, tmp_path / "run")
    assert set(metrics) == reward.METRICS | {"trained_share"} and not (out / "best_of_n.csv").exists()
    assert "none is kept out" in context.samples[0]


def test_too_long(inputs: dict[str, Path], tmp_path: Path) -> None:
    rows = comparisons("train", 12, random.Random(1))
    rows[3]["responses"][0] += "area " * 99
    ours = changed(inputs, tmp_path, "comparisons/train.parquet", rows)
    with pytest.raises(DataError, match=r"ranking 'train-3' has \d+ tokens .* accepts 128 \(1 of \d+ are too long\)"):
        run(ours, tmp_path / "refuse", held_out_labelers=0)
    metrics, _, context = run(ours, tmp_path / "drop", held_out_labelers=0, too_long="drop")
    assert metrics["dropped_too_long"] == 1 and metrics["comparisons_train"] == 11
    assert any("1 of 12 dropped" in line and "train-3" in line for line in context.samples)
    with pytest.raises(DataError, match=r"12 of 12 are too long\). Raise reward.max_length, or shorten them\.$"):
        run(ours, tmp_path / "all", held_out_labelers=0, too_long="drop", max_length=16)


def test_refused_before_training(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"reward.max_length: 512 tokens; the SFT model's context is 256"):
        run(inputs, tmp_path / "context", max_length=512)
    windowed(inputs["sft"] / "model", tmp_path / "base/model", 100)
    with pytest.raises(ParamsError, match=r"reward.max_length: 128 tokens; the SFT model's context is 100"):
        run(inputs | {"sft": tmp_path / "base"}, tmp_path / "window")
    ties = [row | {"ranks": [1] * len(row["ranks"])} for row in comparisons("train", 9, random.Random(0))]
    with pytest.raises(DataError, match="there is nothing to learn"):
        run(changed(inputs, tmp_path / "a", "comparisons/train.parquet", ties), tmp_path / "ties")
    leaked = comparisons("train", 9, random.Random(0))
    leaked[4]["prompt"] = pd.read_parquet(inputs["feedback"] / "comparisons/test.parquet")["prompt"][2]
    with pytest.raises(DataError, match="train-4 and test-2"):
        run(changed(inputs, tmp_path / "b", "comparisons/train.parquet", leaked), tmp_path / "leak")
    broken = comparisons("train", 9, random.Random(0))
    broken[5]["prompt"] = "\n\nHuman: w?\n\nAssistant:"
    template = "{% if messages[0]['content'] == 'w?' %}{{ raise_exception('no w') }}{% endif %}" + CHAT_TEMPLATE
    shutil.copytree(inputs["sft"], tmp_path / "sft")
    (tmp_path / "sft/model/chat_template.jinja").write_text(template)
    with pytest.raises(DataError, match=r"training ranking 'train-5': the chat template refuses this chat: no w"):
        ours = changed(inputs, tmp_path / "d", "comparisons/train.parquet", broken)
        run({**ours, "sft": tmp_path / "sft"}, tmp_path / "broken")
    with pytest.raises(DataError, match="'s0' has not one gold score"):
        rows = [{"id": "s0", "group": "s", "prompt": "p", "responses": ["a", "b"], "gold": [0.5]}]
        run(changed(inputs, tmp_path / "c", "samples/test.parquet", rows), tmp_path / "gold")
