"""A tiny base model and toy tasks for the tests of stage `transfer`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from models import model, tokenizer

from pipelines.core import attention, k_way, task_model
from pipelines.core.context import StageContext
from pipelines.core.params.transfer import TransferParams
from pipelines.core.task_inputs import Example, Kind, Special, Task

DEFAULT: dict[str, Any] = {
    "seed": 1, "tasks": (), "method": "full", "lora_rank": 4, "transferred_layers": None,
    "auxiliary": 0.0, "special_tokens": "drawn", "dropout": 0.1, "examples": None, "eval_examples": None,
    "epochs": 2, "batch_size": 8, "micro_tokens": 128, "max_length": 32, "lr": 2e-3, "warmup_share": 0.002,
    "weight_decay": 0.01, "clip_norm": 1.0, "seeds": 1, "mixing": None, "per_task": (), "ablations": (),
    "heuristics": (), "checkpoint_steps": 1000, "checkpoint_seconds": 1e9, "samples": 0,
}  # fmt: skip


class Base(NamedTuple):
    """What `task_model.load` starts from."""

    place: Path
    tokenizer: Any
    special: Special


def params(**changed: Any) -> TransferParams:
    return TransferParams(**{**DEFAULT, **changed})


def base(place: Path, depth: int = 3, architecture: str = "llama", tied: bool = True) -> Base:
    """A random model with `depth` blocks in a Hugging Face directory, and its tokenizer with the three tokens."""
    known = tokenizer()
    attention.choose("cpu", 1)
    made = model(known, architecture, depth, 64)
    if not tied:
        made.config.tie_word_embeddings = False
        made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach() + 0.01)
    made.save_pretrained(place)
    known.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|delimiter|>", "<|extract|>"]})
    ids = known.convert_tokens_to_ids(["<|start|>", "<|delimiter|>", "<|extract|>"])
    return Base(place, known, Special(*ids))


def load(
    made: Base, dials: TransferParams, context: StageContext, outputs: int = 2, **more: Any
) -> task_model.TaskModel:
    return task_model.load(made.place, made.tokenizer, made.special, dials, outputs, dials.seed, context, **more)


def task(kind: Kind, special: Special, count: int = 32, regression: bool = False) -> Task:
    """Separable: the class is whether token 40 (or 41) occurs; two texts are similar if they hold the same one."""
    draw = random.Random(3)

    def text(mark: int) -> tuple[int, ...]:
        words = [draw.randrange(50, 200) for _ in range(draw.randint(2, 6))]
        words[draw.randrange(len(words))] = mark
        return tuple(words)

    def made(number: int) -> Example:
        start, delimiter, extract = ((one,) for one in special)
        label = number % 2
        if kind == "choice":
            context, sides = text(60), [text(40), text(41), text(41)][: 2 + number % 3 // 2]
            label = number % len(sides)
            sides = sides[1 : label + 1] + sides[:1] + sides[label + 1 :]
            sequences = tuple(start + context + delimiter + side + extract for side in sides)
        elif kind == "classification":
            sequences = (start + text(40 + label) + extract,)
        else:
            first, second = text(40), text(41 - label)
            orders = [(first, second), (second, first)] if kind == "similarity" else [(first, second)]
            sequences = tuple(start + one + delimiter + other + extract for one, other in orders)
        return Example(str(number), str(number), sequences, label * 2.5 if regression else label, (), ())

    rows = [made(number) for number in range(count)]
    names = () if kind == "choice" or regression else ("no", "yes")
    return Task("toy", kind, names, regression, rows, rows[:4], rows[4:12], rows, 0, ("text",))


def batch_of(one: Task, model: task_model.TaskModel, tokens: int = 4096) -> k_way.Responses:
    """All of the training examples in one forward pass."""
    (batch,) = k_way.batches([task_model.encode(example) for example in one.train], tokens, model.pad)
    return batch


def quiet(done: int, total: int) -> None:
    """Tells nobody."""
