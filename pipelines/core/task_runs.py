"""The runs of stage `transfer`: each task with each seed, and the same run with one thing different (ablations).

A run that has ended is kept in the stage's scratch: what it said of the examples, its curves, and the model where it
is wanted. A stage that is killed starts no ended run again, and goes on in the one that was under way.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.core import artifacts, distributed, k_way, task_mixture, task_model, task_saved, task_training, tuning
from pipelines.core.checkpoint import Checkpoints
from pipelines.core.context import StageContext
from pipelines.core.task_inputs import Special, Task

if TYPE_CHECKING:
    from pipelines.core.params.transfer import TransferParams

MAIN = ""
MIXTURE = "mixture"


class Variant(NamedTuple):
    """What is different from the run whose model is kept."""

    name: str  # MAIN, random, no_auxiliary, layers_N
    changes: dict[str, Any]  # of the params
    random: bool = False  # random weights in place of the pre-trained ones


class Base(NamedTuple):
    """What all runs start from."""

    place: Path  # the pre-trained model
    tokenizer: Any  # with the special tokens
    special: Special


class Run(NamedTuple):
    """What an ended run has left."""

    test: list[list[float]]  # logits of each test example
    validation: list[list[float]]  # the same of the validation side; empty where there is one seed
    merged: list[list[float]]  # what the saved model says of the test side, adapters merged; empty without adapters
    seconds: float  # of training
    trained: int  # parameters that were trained
    share: float  # of all parameters
    parameters: int
    model: Path | None  # where it lies, if it was saved


def variants(params: TransferParams, layers: int) -> Iterator[Variant]:
    """The run to keep, then the ablations asked for. `layers`: blocks of the pre-trained model.

    * `auxiliary`: without the auxiliary loss (GPT-1, table 5).
    * `random`: without pre-training: the same from random weights (table 5; there, and with `method: full`, all of them
      are trained).
    * `layers`: the first quarter, half and three quarters of the blocks (figure 2, left).
    """
    yield Variant(MAIN, {})
    if "auxiliary" in params.ablations:
        yield Variant("no_auxiliary", {"auxiliary": 0.0})
    if "random" in params.ablations:
        yield Variant("random", {}, random=True)
    if "layers" in params.ablations:
        whole = params.transferred_layers or layers
        for kept in sorted({max(1, whole * part // 4) for part in (1, 2, 3)} - {whole}):
            changes: dict[str, Any] = {"transferred_layers": kept}
            if trained := params.tuning.layers:
                changes["tuning"] = params.tuning.model_copy(update={"layers": min(trained, kept)})
            yield Variant(f"layers_{kept}", changes)


def run(
    tasks: Sequence[Task], variant: Variant, number: int, params: TransferParams, base: Base, context: StageContext
) -> list[Run]:
    """Fine-tune, answer, and keep; or what was kept: for each task.

    Args:
        tasks: one, or those of a mixture, which share the model.
        number: of the seed, from 0.

    Raises:
        ArtifactError, ParamsError: a model that cannot be trained, a run that diverged.
        Stopped: a signal came; the checkpoint is written.
    """
    whose = tasks[0].name if len(tasks) == 1 else MIXTURE
    # By dots, which no task's name has: `sst-2` may be a task's own name
    name = ".".join(part for part in (whose, variant.name, str(number) if number else "") if part)
    place = context.work / "runs" / name
    ended = distributed.from_leader(context.world, lambda: (place / "run.json").exists())
    if not ended:
        made = _train(tasks, variant, number, params, base, name, context)
        if context.world.leads:
            with artifacts.published(place) as draft:
                _keep(made, tasks, params, base, variant.name == MAIN, draft, context)
            shutil.rmtree(_checkpoints(context, name), ignore_errors=True)
    found = json.loads(distributed.from_leader(context.world, (place / "run.json").read_text))
    if ended:
        context.resume(context.history + found["history"])
    common = {field: found[field] for field in ("seconds", "trained", "share", "parameters")}
    kept = {task.name: place / "models" / task.name if variant.name == MAIN else None for task in tasks}
    return [Run(**found["answers"][task.name], **common, model=kept[task.name]) for task in tasks]


def _train(
    tasks: Sequence[Task],
    variant: Variant,
    number: int,
    params: TransferParams,
    base: Base,
    name: str,
    context: StageContext,
) -> dict[str, Any]:
    """The trained model and what is known of its training."""
    changed = params.model_copy(update=variant.changes)
    outputs = sum(map(task_mixture.outputs_of, tasks))
    asked = (changed, outputs, params.seed + number, context, variant.random)
    model = task_model.load(base.place, base.tokenizer, base.special, *asked)
    trained = tuning.report(model)
    known, began = len(context.history), time.perf_counter()
    checkpoints = Checkpoints(
        _checkpoints(context, name), context.fingerprint, params.checkpoint_steps, params.checkpoint_seconds
    )
    task_training.train(tasks, model, changed, context, checkpoints, name)
    rows = [row for row in context.history[known:] if any(key.startswith(f"{name}_") for key in row)]
    return {
        "model": model,
        "trained": trained.parameters,
        "share": trained.share,
        "parameters": sum(value.numel() for value in model.parameters()),
        "seconds": time.perf_counter() - began,
        "history": rows,
        "name": name,
    }


def _keep(
    made: dict[str, Any],
    tasks: Sequence[Task],
    params: TransferParams,
    base: Base,
    wanted: bool,
    draft: Path,
    context: StageContext,
) -> None:
    """Write what the run is asked for later: its answers, and then its models, whose adapters are merged in place."""
    model, name = made.pop("model"), made.pop("name")
    rows = dict(zip((task.name for task in tasks), task_mixture.rows(tasks), strict=True))
    answers: dict[str, dict[str, Any]] = {task.name: {"merged": []} for task in tasks}
    tell = k_way.teller(context, f"{name} after training")
    for task in tasks:
        for split in ("validation", "test"):
            asked = getattr(task, split) if split == "test" or params.seeds > 1 else []
            answers[task.name][split] = task_training.predict(model, task.kind, asked, context, tell, rows[task.name])
    if wanted:
        model = task_saved.merged(model)
        for task in tasks:
            place = draft / "models" / task.name
            task_saved.save(model, base.tokenizer, task, params.max_length, place, context, rows[task.name])
            if params.adapted:  # the sum is rounded to the compute type; over 4 bits, the base becomes another one too
                saved = task_saved.load_saved(place, context).model
                tell = k_way.teller(context, f"{task.name} merged")
                answers[task.name]["merged"] = task_training.predict(saved, task.kind, task.test, context, tell)
    artifacts.write_json(draft / "run.json", made | {"answers": answers})


def _checkpoints(context: StageContext, name: str) -> Path:
    return context.work / "checkpoints" / name
