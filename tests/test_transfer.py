"""Stage `transfer` on a two-layer model: what it writes, what it learns, what it refuses, and where it goes on."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import toy_tasks
from models import tokenizer, windowed
from pydantic import ValidationError
from safetensors.torch import load_file

from pipelines import transfer
from pipelines.core import artifacts, task_card, task_evaluation, task_inputs
from pipelines.core.context import StageContext, Stopped
from pipelines.core.errors import ArtifactError, DataError, ParamsError
from pipelines.core.task_runs import Run

FAST: dict[str, Any] = {"epochs": 1, "max_length": 24, "samples": 2, "warmup_share": 0.1}


def rows(task: str, split: str, count: int) -> list[dict[str, Any]]:
    """Whoever sees `area` or `shape` knows the answer; a group is two neighbours."""
    draw, found = random.Random(f"{task}{split}"), []
    for number in range(count):
        label = number % 2
        good, bad = (f"return {name} of w {draw.randint(0, 9)}" for name in ("area", "shape"))
        every: dict[str, dict[str, Any]] = {
            "kind": {"text": bad if label else good},
            "fits": {"premise": good, "hypothesis": bad if label else good},
            "close": {"first": good, "second": bad if label else good},
            "pick": {"context": "w * h", "choices": [bad, good] if label else [good, bad]},
        }
        name = {"label_text": ["yes", "no"][label] if task != "pick" else good}
        common = {"id": f"{split}{number}", "group": f"{split}{number // 2}", "source": "toy", "row": number}
        found.append(common | every[task] | {"label": label} | name)
    return found


def write(data: Path, task: str, **counts: int) -> None:
    for split, count in counts.items():
        place = data / "tasks" / task / f"{split}.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows(task, split, count)), place)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    made = toy_tasks.base(root / "pretrain/model", depth=2)
    tokenizer().save_pretrained(root / "pretrain/model")
    (root / "pretrain/history.csv").write_text("step,loss\n1,3.0\n5,2.0\n")
    assert made.special.start == len(tokenizer())
    for task in ("kind", "fits", "close", "pick"):
        write(root / "data", task, train=24, validation=8, test=12)
    return {"data": root / "data", "pretrain": root / "pretrain"}


def run(inputs: dict[str, Path], place: Path, context: StageContext, **changed: Any) -> dict[str, float]:
    place.mkdir(parents=True, exist_ok=True)
    return transfer.run(toy_tasks.params(**FAST | changed), inputs, place, context)


def test_files_metrics_and_rows(inputs: dict[str, Path], tmp_path: Path, context: StageContext) -> None:
    from fnmatch import fnmatchcase

    asked: dict[str, Any] = {"auxiliary": 0.5, "seeds": 3}
    asked["ablations"] = ("auxiliary", "random", "layers", "zero_shot")
    metrics = run(inputs, tmp_path / "out", context, **asked)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "models", "history.csv", "evaluation.parquet", "confusion", "layers.csv", "samples.md", "zero_shot.csv"
    }  # fmt: skip
    known = transfer.METRICS | transfer.OPTIONAL
    assert set(metrics) >= transfer.METRICS
    assert not [key for key in metrics if not any(fnmatchcase(key, one) for one in known)]
    for task in ("kind", "fits", "close", "pick"):
        keys = {
            "score",
            "score_low",
            "score_high",
            "majority",
            "tfidf",
            "tfidf_all",
            "random",
            "no_auxiliary",
            "layers_1",
            "zero_shot",
        }
        assert {f"{task}/{key}" for key in keys} <= set(metrics)
        assert metrics[f"{task}/score_low"] <= metrics[f"{task}/score_of_model"] <= metrics[f"{task}/score_high"]
        assert json.loads((tmp_path / "out/models" / task / "task.json").read_text())["task"] == task
        assert (tmp_path / "out/models" / task / "README.md").read_text().startswith("---")
    assert metrics["score"] == pytest.approx(sum(metrics[f"{t}/score"] for t in ("kind", "fits", "close", "pick")) / 4)
    table = pq.read_table(tmp_path / "out/evaluation.parquet").to_pandas()
    assert len(table) == 48 and table["id"].is_unique and table.filter(like="examples_").sum(axis=1).eq(1).all()
    mine = table[table.examples_kind == 1]
    assert mine.score.mean() == pytest.approx(metrics["kind/score_of_model"])
    assert mine.score_majority.mean() == pytest.approx(metrics["kind/majority"])
    assert pd.read_csv(tmp_path / "out/confusion/fits.csv").iloc[:, 1:].to_numpy().sum() == 12
    assert not (tmp_path / "out/confusion/pick.csv").exists()
    history = pd.read_csv(tmp_path / "out/history.csv")
    assert {"kind_loss", "kind_language_loss", "kind.random_loss", "pick.layers_1.2_loss"} <= set(history)
    assert "<|start|>" in context.samples[0] and "answer:" in context.samples[0]


def test_learns_what_words_tell_and_random_weights_learn_less_of_a_frozen_body(
    inputs: dict[str, Path], tmp_path: Path, context: StageContext
) -> None:
    metrics = run(inputs, tmp_path / "out", context, tasks=("kind",), epochs=12, lr=5e-3)
    assert metrics["kind/score"] == 1.0 > metrics["kind/majority"] and metrics["kind/gain_over_majority_low"] > 0
    assert metrics["trained_share"] == 1.0
    frozen = run(inputs, tmp_path / "head", context_at(tmp_path / "b"), tasks=("kind",), method="head")
    assert 0 < frozen["trained_share"] < 0.01


def test_a_champion_is_measured_as_the_stage_measured_it_and_by_the_names_of_its_classes(
    inputs: dict[str, Path], tmp_path: Path, context: StageContext
) -> None:
    asked: dict[str, Any] = {"tasks": ("kind",), "epochs": 12, "lr": 5e-3}
    run(inputs, tmp_path / "out", context, **asked)
    ours = pq.read_table(tmp_path / "out/evaluation.parquet").to_pandas()
    assert ours.score.mean() == 1.0

    def measured(data: Path) -> pd.DataFrame:
        model, place = tmp_path / "out/models/kind", tmp_path / "measured.parquet"
        transfer.measure(toy_tasks.params(**FAST | asked), inputs | {"data": data}, context, model, place)
        return pq.read_table(place).to_pandas()

    same = measured(inputs["data"])
    assert same.id.equals(ours.id) and same.score.equals(ours.score)

    for split, count in (("train", 24), ("validation", 8), ("test", 12)):
        table = [row | {"label": row["label"] + 1} for row in rows("kind", split, count)]
        table.append(table[0] | {"id": f"{split} new", "group": "new", "label": 0, "label_text": "maybe"})
        for task, made in (("kind", table), ("fits", rows("fits", split, count))):
            place = tmp_path / task / "tasks/kind" / f"{split}.parquet"
            place.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(made), place)
    more = measured(tmp_path / "kind").set_index("id").score
    assert more.pop("kind:test new") == 0.0, "it does not know the new class"
    assert len(more) == 12 and (more == 1.0).all(), "classes it knows have other numbers now"
    with pytest.raises(ArtifactError, match="when it was a classification; today's rows make it: entailment"):
        measured(tmp_path / "fits")


def context_at(root: Path) -> StageContext:
    root.mkdir(parents=True, exist_ok=True)
    return StageContext("transfer", root, "f" * 64)


def test_stopped_anywhere_it_ends_with_the_same_bytes(inputs: dict[str, Path], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"tasks": ("kind", "pick"), "ablations": ("random",), "checkpoint_steps": 1, "epochs": 2}
    run(inputs, tmp_path / "whole", context_at(tmp_path / "a"), **asked)
    stops = {"in the first run": 2, "in the second task": 15}
    for name, after in stops.items():
        context = context_at(tmp_path / name)
        heard = context.after_step

        def step(due: Any, left: Any, context: StageContext, heard: Any) -> Any:
            if next(left) == 0:
                context.signal_number = 15
            return heard(due)

        stepping = partial(step, left=iter(range(after - 1, -99, -1)), context=context, heard=heard)
        context.after_step = stepping  # type: ignore[method-assign]
        with pytest.raises(Stopped):
            run(inputs, tmp_path / f"{name} out", context, **asked)
        again = context_at(tmp_path / name)
        run(inputs, tmp_path / f"{name} out", again, **asked)
        assert any("resuming" in one for one in again.samples)
        assert artifacts.content_hash(tmp_path / f"{name} out") == artifacts.content_hash(tmp_path / "whole"), name


def test_the_saved_model_is_that_of_the_median_seed(inputs: dict[str, Path], tmp_path: Path) -> None:
    assert [task_evaluation.median_place(one) for one in ([3.0, 1.0, 2.0], [1.0, 2.0], [5.0])] == [2, 0, 0]
    one = toy_tasks.task("classification", task_inputs.Special(301, 302, 303))
    one = one._replace(test=one.train[:4], validation=one.train[:4])
    right, wrong = [[1.0, 0.0], [0.0, 1.0]] * 2, [[0.0, 1.0], [1.0, 0.0]] * 2
    half = [[1.0, 0.0]] * 4
    runs = [Run(said, said, [], 0.0, 1, 1.0, 1, None) for said in (right, wrong, half)]
    texts = [example._replace(parts=(str(example.label),)) for example in one.train]
    judged = task_evaluation.judge(one._replace(train=texts, train_all=texts, test=texts[:4]), {"": runs})
    assert judged.chosen == 2 and judged.metrics["score"] == judged.metrics["score_of_model"] == 0.5
    assert "merge_delta" not in judged.metrics

    told = {"score": 0.7, "score_low": 0.4, "score_high": 0.6, "score_of_model": 0.5}
    page = task_card.card(toy_tasks.params(seeds=3), one, told, 1)
    assert "| this model | 0.500 (0.400 to 0.600) |\n| median of 3 seeds | 0.700 |" in page

    lost = [run._replace(merged=wrong) for run in runs]  # the kept model was right in two of four
    judged = task_evaluation.judge(one._replace(train=texts, train_all=texts, test=texts[:4]), {"": lost})
    assert judged.metrics["merge_delta"] == -0.5


@pytest.mark.parametrize(("method", "least", "most"), [("lora", 0.0, 1e-5), ("qlora", 1e-5, 0.1)])
def test_adapters_are_merged_and_what_that_costs_is_told(
    method: str, least: float, most: float, inputs: dict[str, Path], tmp_path: Path, context: StageContext
) -> None:
    """In fp32 merging changes nothing but rounding; the base in 4 bits is another than the one merged into."""
    metrics = run(inputs, tmp_path / "out", context, tasks=("kind",), method=method, ablations=("random",))
    ended = json.loads((context.work / "runs/kind/run.json").read_text())["answers"]["kind"]
    rights = [sum((row[1] > row[0]) == n % 2 for n, row in enumerate(ended[key])) / 12 for key in ("merged", "test")]
    assert metrics["kind/merge_delta"] == pytest.approx(rights[0] - rights[1])
    pairs = zip(sum(ended["test"], []), sum(ended["merged"], []), strict=True)
    assert least <= max(abs(one - other) for one, other in pairs) < most
    plain = json.loads((context.work / "runs/kind.random/run.json").read_text())
    assert plain["answers"]["kind"]["merged"] == []
    assert metrics["trained_share"] < 0.2, "what is packed in 4 bits counts as what it stands for"


@pytest.mark.parametrize(
    ("changed", "kind", "told"),
    [
        ({"tasks": ("absent",)}, ArtifactError, "absent"),
        (
            {"tuning": {"layers": 3}, "method": "last_n"},
            ParamsError,
            r"tuning.layers \(task close\): 3; the base",
        ),
        ({"transferred_layers": 5}, ParamsError, r"transferred_layers \(task close\): 5; the base model has 2 blocks"),
        # of the last task alone
        (
            {"per_task": ({"task": "pick", "max_length": 65},)},
            ParamsError,
            r"max_length \(task pick\): 65 tokens; the base model's context is 64",
        ),
        (
            {"per_task": ({"task": "pick", "method": "lora", "tuning": {"lora_targets": ("c_attn",)}},)},
            ParamsError,
            r"tuning.lora_targets: c_attn: no linear layer .* accepted: all-linear, or some of q_proj",
        ),
    ],
)
def test_refused_before_any_training(
    inputs: dict[str, Path], tmp_path: Path, context: StageContext, changed: dict[str, Any], kind: Any, told: str
) -> None:
    with pytest.raises(kind, match=told):
        run(inputs, tmp_path / "out", context, **changed)
    assert not list((tmp_path / "out").iterdir()) and not context.history


def test_a_window_of_attention_bounds_the_length(
    inputs: dict[str, Path], tmp_path: Path, context: StageContext
) -> None:
    windowed(inputs["pretrain"] / "model", tmp_path / "pretrain/model", 20)
    with pytest.raises(ParamsError, match=r"max_length \(task close\): 24 tokens; the base model's context is 20"):
        run(inputs | {"pretrain": tmp_path / "pretrain"}, tmp_path / "out", context)


def test_the_last_task_is_checked_before_the_first_is_trained(
    inputs: dict[str, Path], tmp_path: Path, context: StageContext
) -> None:
    write(tmp_path / "data", "kind", train=24, validation=8, test=12)
    write(tmp_path / "data", "pick", train=24, validation=8, test=0)
    with pytest.raises((DataError, ArtifactError), match="pick"):
        run(inputs | {"data": tmp_path / "data"}, tmp_path / "out", context)
    assert not context.history


def test_data_without_tasks(inputs: dict[str, Path], tmp_path: Path, context: StageContext) -> None:
    (tmp_path / "data").mkdir()
    assert run(inputs | {"data": tmp_path / "data"}, tmp_path / "out", context) == {"tasks": 0.0}
    with pytest.raises(ArtifactError, match="kind"):
        run(inputs | {"data": tmp_path / "data"}, tmp_path / "out", context, tasks=("kind",))


def test_a_task_with_its_own_dials(inputs: dict[str, Path], tmp_path: Path, context: StageContext) -> None:
    said: list[str] = []
    context.say = said.append  # type: ignore[method-assign]
    own = ({"task": "fits", "examples": 12, "transferred_layers": 1}, {"task": "gone", "epochs": 3})
    metrics = run(inputs, tmp_path / "out", context, per_task=own)
    assert (metrics["fits/train"], metrics["kind/train"]) == (12, 24)
    for name, layers in (("fits", 1), ("kind", 2)):
        config = json.loads((tmp_path / f"out/models/{name}/config.json").read_text())
        assert config["num_hidden_layers"] == layers
    assert any("warning: transfer.per_task: the data have no task gone; there are: close, fits" in one for one in said)


def test_runs_of_tasks_with_names_like_those_of_runs_are_kept_apart(
    inputs: dict[str, Path], tmp_path: Path, context: StageContext
) -> None:
    for name in ("kind-1", "kind-random"):
        shutil.copytree(inputs["data"] / "tasks/fits", tmp_path / "data/tasks" / name)
    write(tmp_path / "data", "kind", train=24, validation=8, test=12)
    metrics = run(inputs | {"data": tmp_path / "data"}, tmp_path / "out", context, seeds=2, ablations=("random",))
    assert {"kind/random", "kind-1/random", "kind-random/random"} <= set(metrics)
    names = {path.name for path in (context.work / "runs").iterdir()}
    assert len(names) == 3 * 2 * 2, "tasks, variants, seeds"


def test_what_is_cut_is_counted_and_told(inputs: dict[str, Path], tmp_path: Path, context: StageContext) -> None:
    write(tmp_path / "data", "fits", train=24, validation=8, test=12)
    metrics = run(inputs | {"data": tmp_path / "data"}, tmp_path / "out", context, max_length=16)
    assert metrics["fits/truncated"] > 0
    assert any("were cut to max_length (16 tokens)" in one for one in context.samples)


def test_dials_of_one_task() -> None:
    dials = toy_tasks.params(method="lora", per_task=({"task": "rte", "epochs": 9, "method": "full"},))
    assert (dials.of("rte").epochs, dials.of("rte").method, dials.of("rte").per_task) == (9, "full", ())
    assert dials.of("sst").model_dump() == {**dials.model_dump(), "per_task": ()}
    for wrong, told in (
        ({"epochs": 2}, r"per_task\[0\]: expected task: NAME"),
        ({"task": "rte", "seed": 2}, r"per_task\[0\]: seed: accepted for one task: .*method"),
        ({"task": "rte", "epochs": 0}, r"per_task\[0\] \(rte\): epochs: .*greater than or equal to 1 \(found 0\)"),
        ({"task": "rte", "method": "head", "auxiliary": 1.0}, r"head trains no language model"),
    ):
        with pytest.raises(ValidationError, match=told):
            toy_tasks.params(per_task=(wrong,))
    with pytest.raises(ValidationError, match=r"task rte is none of transfer.tasks: sst"):
        toy_tasks.params(tasks=("sst",), per_task=({"task": "rte"},))


def test_one_model_for_all_tasks(inputs: dict[str, Path], tmp_path: Path, context: StageContext) -> None:
    metrics = run(inputs, tmp_path / "out", context, mixing=2.0, per_task=({"task": "fits", "examples": 12},))
    assert (metrics["fits/train"], metrics["kind/train"], metrics["tasks"]) == (12, 24, 4)
    bodies = [
        {key: value.clone() for key, value in load_file(place).items() if not key.startswith("score")}
        for place in sorted((tmp_path / "out/models").glob("*/model.safetensors"))
    ]
    assert len(bodies) == 4
    assert all(torch.equal(bodies[0][key], body[key]) for body in bodies for key in bodies[0])
    steps = {row["step"] for row in context.history}
    assert len(steps) == 2 + 3 * 3  # an epoch of each, in batches of 8
