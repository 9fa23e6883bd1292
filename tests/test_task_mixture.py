"""Several tasks in one model: how often each is drawn, whose rows of the head a step moves, and what is saved."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_tasks
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification

from pipelines.core import task_mixture, task_saved, task_training, training
from pipelines.core.checkpoint import Checkpoints
from pipelines.core.context import StageContext, Stopped
from pipelines.core.task_inputs import Task
from pipelines.core.task_mixture import Turn
from pipelines.core.task_model import TaskModel


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> toy_tasks.Base:
    return toy_tasks.base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def tasks(base: toy_tasks.Base) -> list[Task]:
    kinds: Any = ("classification", "choice", "similarity")
    sizes = (32, 16, 8)
    return [toy_tasks.task(kind, base.special, n)._replace(name=kind) for kind, n in zip(kinds, sizes, strict=True)]


def trained(
    base: toy_tasks.Base, tasks: list[Task], context: StageContext, place: str, **changed: Any
) -> tuple[TaskModel, list[slice]]:
    dials = toy_tasks.params(**{"mixing": 1.0, "epochs": 3, **changed})
    model = toy_tasks.load(base, dials, context, sum(map(task_mixture.outputs_of, tasks)))
    kept = Checkpoints(context.work / place, "x", dials.checkpoint_steps, 1e9)
    task_training.train(tasks, model, dials, context, kept, "mixture")
    return model, task_mixture.rows(tasks)


def test_rates_by_hand() -> None:
    assert task_mixture.rates([60, 30, 10], 1.0) == [0.6, 0.3, 0.1]
    assert task_mixture.rates([81, 16, 9], 2.0) == pytest.approx([9 / 16, 4 / 16, 3 / 16])
    assert task_mixture.rates([1000, 1], 1e6) == pytest.approx([0.5, 0.5], abs=1e-5)


def test_turns(tasks: list[Task]) -> None:
    assert task_mixture.turns(tasks[:1], 8, 2, 1.0, 3) == [Turn(0, n) for n in range(8)]
    turns = task_mixture.turns(tasks, 8, 100, 1.0, 3)
    assert len(turns) == 100 * (4 + 2 + 1)
    for number, share in enumerate((4 / 7, 2 / 7, 1 / 7)):
        own = [turn.batch for turn in turns if turn.task == number]
        assert own == list(range(len(own))) and len(own) == pytest.approx(700 * share, rel=0.2)
    even = Counter(turn.task for turn in task_mixture.turns(tasks, 8, 100, 1e6, 3))
    assert all(count == pytest.approx(700 / 3, rel=0.2) for count in even.values())


def test_each_task_has_rows_of_its_own(tasks: list[Task]) -> None:
    assert task_mixture.rows(tasks) == [slice(0, 2), slice(2, 3), slice(3, 5)]


def test_a_step_moves_the_rows_of_its_task_alone(
    base: toy_tasks.Base, tasks: list[Task], context: StageContext
) -> None:
    dials = toy_tasks.params(mixing=1.0, epochs=1, batch_size=32, weight_decay=0.0)
    start = toy_tasks.load(base, dials, context, 5).score.weight.detach().clone()
    one = [tasks[0]._replace(train=tasks[0].train[:1]), tasks[1], tasks[2]._replace(train=tasks[2].train[:1])]
    model, rows = trained(base, one, context, "one", epochs=1, batch_size=32, weight_decay=0.0)
    drawn = {turn.task for turn in task_mixture.turns(one, 32, 1, 1.0, dials.seed)}
    assert 0 < len(drawn) < 3  # so the test can tell
    for number, own in enumerate(rows):
        assert torch.equal(model.score.weight[own], start[own]) == (number not in drawn)


def test_all_tasks_are_learned_by_one_model(base: toy_tasks.Base, tasks: list[Task], context: StageContext) -> None:
    model, rows = trained(base, tasks, context, "all", epochs=30)
    for task, own in zip(tasks, rows, strict=True):
        said = task_training.predict(model, task.kind, task.train, context, toy_tasks.quiet, own)
        right = [
            max(range(len(row)), key=row.__getitem__) == one.label for row, one in zip(said, task.train, strict=True)
        ]
        assert sum(right) / len(right) > 0.9, task.name


@pytest.mark.parametrize("method", ["full", "lora", "last_n"])
def test_saved_models_answer_as_the_mixture(
    method: str, base: toy_tasks.Base, tasks: list[Task], context: StageContext, tmp_path: Path
) -> None:
    model, rows = trained(base, tasks, context, method, method=method)
    before = [
        task_training.predict(model, task.kind, task.train, context, toy_tasks.quiet, own)
        for task, own in zip(tasks, rows, strict=True)
    ]
    model = task_saved.merged(model)
    bodies = []
    for task, own, said in zip(tasks, rows, before, strict=True):
        place = tmp_path / task.name
        task_saved.save(model, base.tokenizer, task, 32, place, context, own)
        assert json.loads((place / "task.json").read_text())["task"] == task.name
        saved = task_saved.load_saved(place, context)
        again = task_training.predict(saved.model, task.kind, task.train, context, toy_tasks.quiet)
        for found, expected in zip(again, said, strict=True):
            assert found == pytest.approx(expected, abs=2e-5, rel=1e-4)
        bodies.append(AutoModelForSequenceClassification.from_pretrained(place).base_model.state_dict())
    assert all(torch.equal(bodies[0][key], body[key]) for body in bodies for key in bodies[0])


def test_killed_and_resumed_mixture_ends_with_the_same_weights(
    base: toy_tasks.Base, tasks: list[Task], tmp_path: Path
) -> None:
    def learned(place: str, stop: int = 1000) -> dict[str, torch.Tensor]:
        context = StageContext(stage="test", root=tmp_path / place, fingerprint="0" * 64)
        context.curve = lambda step, metrics: setattr(context, "signal_number", 15 if step >= stop else 0)
        return training.trained_state(trained(base, tasks, context, "kept", checkpoint_steps=5, mixing=2.0)[0])

    expected = learned("whole")
    with pytest.raises(Stopped):
        learned("killed", 8)
    found = learned("killed")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"mixing": 0.5}, "greater than or equal to 1"),
        ({"mixing": 1.0, "method": "head"}, "mixing: method head trains nothing that tasks share"),
        (
            {"mixing": 1.0, "per_task": ({"task": "a", "lr": 0.1},)},
            "lr: accepted for one task: examples",
        ),
    ],
)
def test_mistakes_are_told(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        toy_tasks.params(**changed)
