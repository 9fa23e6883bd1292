"""Fine-tuning of one task: the objective, the loop, what stays as it was, and going on after a kill."""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toy_tasks

from pipelines.core import k_way, reward_examples, task_mixture, task_model, task_training, training
from pipelines.core.checkpoint import Checkpoints
from pipelines.core.context import StageContext, Stopped
from pipelines.core.params.transfer import TransferParams
from pipelines.core.task_inputs import Kind, Task

TOP: dict[str, Any] = {"layers": 2, "layer_decay": 0.8}  # of the top blocks the lower learns more slowly


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> toy_tasks.Base:
    return toy_tasks.base(tmp_path_factory.mktemp("base"))


def checkpoints(context: StageContext, dials: TransferParams) -> Checkpoints:
    return Checkpoints(context.work / "checkpoints", "f", dials.checkpoint_steps, dials.checkpoint_seconds)


def trained(
    base: toy_tasks.Base, one: Task, dials: TransferParams, context: StageContext, **more: Any
) -> task_model.TaskModel:
    model = toy_tasks.load(base, dials, context, task_mixture.outputs_of(one), **more)
    task_training.train([one], model, dials, context, checkpoints(context, dials), "toy")
    return model


def context_in(place: Path, stop_after: int = 0) -> StageContext:
    """One that is asked to stop after so many steps."""
    made = StageContext(stage="test", root=place, fingerprint="0" * 64)
    if stop_after:
        made.curve = lambda step, metrics: setattr(made, "signal_number", 15 if step >= stop_after else 0)
    return made


def test_the_objective_against_torch(
    base: toy_tasks.Base, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of a step in several forward passes are those of the sequences one by one."""
    one = toy_tasks.task("entailment", base.special, 8)
    dials = toy_tasks.params(auxiliary=0.5, dropout=0.0, epochs=1, micro_tokens=48)
    model = toy_tasks.load(base, dials, context)
    plain = toy_tasks.load(base, dials, context)
    classified, spoken = [], []
    for example in one.train:
        ids = torch.tensor([example.sequences[0]])
        hidden = plain.lm.model(input_ids=ids).last_hidden_state[0]
        classified.append(F.cross_entropy(hidden[-1] @ plain.score.weight.t(), torch.tensor(int(example.label))))
        spoken.append(F.cross_entropy(plain.lm.lm_head(hidden[:-1]), ids[0, 1:], reduction="none"))
    expected = torch.stack(classified).mean() + 0.5 * torch.cat(spoken).mean()
    expected.backward()  # type: ignore[no-untyped-call]

    monkeypatch.setattr(training, "update", lambda *asked: (asked[4], 0.0))
    task_training.train([one], model, dials, context, checkpoints(context, dials), "toy")
    assert context.history[0]["toy_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert context.history[0]["toy_language_loss"] == pytest.approx(float(torch.cat(spoken).detach().mean()), rel=1e-5)
    for found, value in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, value.grad, rtol=1e-3, atol=1e-6)


def test_without_the_auxiliary_loss_it_is_plain_classification(
    base: toy_tasks.Base, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: lambda = 0 does not compute L1, and gives what a loop with the cross-entropy alone gives."""
    one, dials = toy_tasks.task("classification", base.special, 16), toy_tasks.params(dropout=0.0)
    monkeypatch.setattr("pipelines.core.task_objective.language_loss", None)
    found = trained(base, one, dials, context)

    model = toy_tasks.load(base, dials, context)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if (p.dim() >= 2) == decays], "weight_decay": 0.01 * decays}
            for decays in (True, False)
        ],
        betas=(0.9, 0.999),
        fused=True,
    )
    for step in range(4):
        numbers = reward_examples.drawn(1, step, 2, 16)
        sequences = [task_model.encode(one.train[number]) for number in numbers]
        for batch in k_way.batches(sequences, dials.micro_tokens, model.pad):
            wanted = torch.tensor([int(one.train[numbers[place]].label) for place in batch.numbers])
            found_here = task_model.logits(model, batch, context)
            (F.cross_entropy(found_here, wanted, reduction="sum") / 8).backward()  # type: ignore[no-untyped-call]
        rate = 2e-3 * task_training.linear_with_warmup(step, 4, dials.warmup_share)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    for (name, value), other in zip(found.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize(
    ("method", "finer", "moves"),
    [
        ("full", {}, 1 + 3 * 9 + 1 + 1),
        ("head", {}, 1),
        ("last_n", {}, 9 + 1 + 1),
        ("last_n", {"layers": 2}, 2 * 9 + 1 + 1),
        ("lora", {}, 3 * 7 * 2 + 1 + 1),
        ("lora", {"lora_variant": "dora"}, 3 * 7 * 3 + 1 + 1),
        ("lora", {"lora_init": "pissa", "lora_targets": ("q_proj",)}, 3 * 2 + 1 + 1),
    ],
)
def test_what_is_frozen_does_not_move_by_a_bit(
    method: str, finer: dict[str, Any], moves: int, base: toy_tasks.Base, context: StageContext
) -> None:
    dials = toy_tasks.params(method=method, tuning=finer)
    before = {name: value.clone() for name, value in toy_tasks.load(base, dials, context).named_parameters()}
    model = trained(base, toy_tasks.task("similarity", base.special), dials, context)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name, value in model.named_parameters() if value.requires_grad}
    assert len(moved) == moves


@pytest.mark.parametrize(
    ("kind", "dials"),
    [
        ("classification", {"method": "full", "auxiliary": 0.5}),
        ("entailment", {"method": "last_n", "tuning": TOP, "auxiliary": 0.1, "epochs": 12}),
        ("similarity", {"method": "full", "epochs": 16}),
        ("choice", {"method": "lora", "lr": 1e-2, "auxiliary": 0.1, "epochs": 20}),
        ("classification", {"method": "head", "lr": 5e-2, "epochs": 40}),
    ],
)
def test_a_separable_task_is_learned(
    kind: Kind, dials: dict[str, Any], base: toy_tasks.Base, context: StageContext
) -> None:
    one = toy_tasks.task(kind, base.special, 48)
    model = trained(base, one, toy_tasks.params(**{"epochs": 8, **dials}), context)
    found = task_training.predict(model, kind, one.train, context, toy_tasks.quiet)
    right = [
        max(range(len(row)), key=row.__getitem__) == example.label
        for row, example in zip(found, one.train, strict=True)
    ]
    assert sum(right) >= 46, context.history[-1]


def test_a_regression_is_learned(base: toy_tasks.Base, context: StageContext) -> None:
    one = toy_tasks.task("similarity", base.special, 48, regression=True)
    model = trained(base, one, toy_tasks.params(epochs=24), context)
    found = task_training.predict(model, "similarity", one.train, context, toy_tasks.quiet)
    errors = [(row[0] - example.label) ** 2 for row, example in zip(found, one.train, strict=True)]
    assert sum(errors) / len(errors) < 0.25, "scores are 0 and 2.5: their mean alone is wrong by 1.56"


@pytest.mark.parametrize(
    "dials",
    [
        {"method": "full", "auxiliary": 0.5, "tuning": {"unfreeze": True, "layer_decay": 0.7}},
        {"method": "last_n", "tuning": {"layers": 2, "unfreeze": True}, "auxiliary": 0.5},
        {"method": "lora", "auxiliary": 0.5},
        {"method": "lora", "tuning": {"lora_variant": "dora", "lora_init": "pissa", "lora_dropout": 0.1}},
        {"method": "head"},
    ],
)
def test_a_killed_run_ends_with_the_same_bytes(dials: dict[str, Any], base: toy_tasks.Base, tmp_path: Path) -> None:
    one, chosen = toy_tasks.task("entailment", base.special, 24), toy_tasks.params(**dials)
    whole = context_in(tmp_path / "whole")
    expected = training.trained_state(trained(base, one, chosen, whole))
    for stop in (2, 3):  # the next step thaws the second of three blocks; of two, and a new epoch begins
        killed = context_in(tmp_path / f"killed-{stop}", stop)
        with pytest.raises(Stopped):
            trained(base, one, chosen, killed)
        again = context_in(tmp_path / f"killed-{stop}")
        torch.manual_seed(99)
        found = training.trained_state(trained(base, one, chosen, again))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert again.history == whole.history
    finished = context_in(tmp_path / "whole")
    done = training.trained_state(trained(base, one, chosen, finished))
    assert all(torch.equal(done[name], expected[name]) for name in expected), "a finished run is only loaded"


def test_unfreezing_reaches_a_block_when_its_share_of_the_run_begins(
    base: toy_tasks.Base, context: StageContext
) -> None:
    """Two steps of three blocks: the second lies in the second third, the last third begins after it."""
    dials = toy_tasks.params(tuning={"unfreeze": True}, epochs=2)
    before = {name: value.clone() for name, value in toy_tasks.load(base, dials, context).named_parameters()}
    model = trained(base, toy_tasks.task("classification", base.special, 8), dials, context)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert any("layers.2" in name for name in moved) and any("layers.1" in name for name in moved)
    assert not any("layers.0" in name or "embed" in name for name in moved)


def test_an_output_embedding_of_its_own_learns_with_the_auxiliary_loss_alone(
    tmp_path: Path, context: StageContext
) -> None:
    untied = toy_tasks.base(tmp_path / "base", tied=False)
    for weight, learns in ((0.0, False), (0.5, True)):
        model = toy_tasks.load(untied, toy_tasks.params(auxiliary=weight), context)
        assert model.lm.lm_head.weight.requires_grad is learns


def test_schedule_by_hand() -> None:
    assert [task_training.linear_with_warmup(step, 5, 0.4) for step in range(5)] == [0.5, 1.0, 1.0, 2 / 3, 1 / 3]
    assert [task_training.linear_with_warmup(step, 4, 0.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_rate_from_the_width() -> None:
    assert task_model.learning_rate(768, "full") == 6.25e-5
    assert task_model.learning_rate(384, "lora") == pytest.approx(1.25e-3)


def test_with_a_frozen_body_a_step_is_at_least_five_times_as_fast(tmp_path: Path, context: StageContext) -> None:
    """The frozen part is passed through before the first step, once."""
    deep = toy_tasks.base(tmp_path / "base", 4)
    one = toy_tasks.task("entailment", deep.special, 32)
    seconds = {}
    for method in ("full", "head"):
        dials = toy_tasks.params(method=method, epochs=4)
        times: list[float] = []
        made = context_in(tmp_path / method)
        made.curve = lambda step, metrics, times=times: times.append(time.perf_counter())  # type: ignore[misc]
        trained(deep, one, dials, made)
        seconds[method] = statistics.median(b - a for a, b in itertools.pairwise(times))
    assert seconds["full"] > 5 * seconds["head"], seconds


def test_a_lower_block_moves_by_less(base: toy_tasks.Base, context: StageContext) -> None:
    """Adam's first step is the rate itself, wherever there is a gradient."""
    dials = toy_tasks.params(tuning={"layer_decay": 0.5}, weight_decay=0.0, epochs=1)
    before = {name: value.clone() for name, value in toy_tasks.load(base, dials, context).named_parameters()}
    model = trained(base, toy_tasks.task("classification", base.special, 8), dials, context)
    for layer, rate in ((2, 2e-3), (1, 1e-3), (0, 5e-4)):
        name = f"lm.model.layers.{layer}.mlp.down_proj.weight"
        moved = (model.get_parameter(name) - before[name]).abs().max()
        assert float(moved) == pytest.approx(rate, rel=1e-2)
