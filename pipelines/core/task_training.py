"""Discriminative fine-tuning (GPT-1, section 3.2): the loop, of one task or several, and what the model answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pipelines.core import (
    distributed,
    hardware,
    k_way,
    language_models,
    reward_examples,
    segments,
    task_frozen,
    task_mixture,
    task_objective,
    training,
    tuning,
)
from pipelines.core.checkpoint import Checkpoints
from pipelines.core.context import StageContext
from pipelines.core.task_inputs import Example, Kind, Task
from pipelines.core.task_model import BETAS, TaskModel, at_extract, encode, head_logits, learning_rate, logits

if TYPE_CHECKING:
    from pipelines.core.params.transfer import TransferParams


class Learned(NamedTuple):
    """A task's training examples as the trained part of the model sees them."""

    sequences: list[segments.Sequence]
    frozen: task_frozen.Frozen | None  # the frozen part's answers, where one is kept


def linear_with_warmup(step: int, steps: int, warmup_share: float) -> float:
    """Factor on the peak rate in step 0..steps-1: linear warm-up, then linearly to zero (GPT-1, section 4.1).

    Zero is what a step after the last would get.
    """
    warmup = max(1, round(steps * warmup_share)) if warmup_share > 0 else 0
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(1, steps - warmup)


def train(
    tasks: Sequence[Task],
    model: TaskModel,
    params: TransferParams,
    context: StageContext,
    checkpoints: Checkpoints,
    name: str,
) -> None:
    """Fine-tune the model on the tasks' training examples, from the newest of the run's own `checkpoints` on.

    Args:
        tasks: one, or those of a mixture (`task_mixture`).
        name: of the run, before the names of its curves: `name_loss`, `name_lr`, `name_grad_norm`, `name_accuracy`,
            and `name_language_loss` where lambda is above 0.

    Raises:
        ArtifactError: training diverged.
        Stopped: a signal came; the checkpoint is written.
    """
    # 1. The optimizer, and where a killed run had got to.
    turns = task_mixture.turns(tasks, params.batch_size, params.epochs, params.mixing or 1.0, model.seed)
    steps, rows = len(turns), task_mixture.rows(tasks)
    peak = params.lr or learning_rate(model.config.hidden_size, model.method)
    optimizer = training.optimizer(model, params, peak, params.weight_decay, BETAS)
    state = distributed.from_leader(context.world, checkpoints.newest) or {"step": 0}

    # 2. What is learned from: examples, or the frozen part's answer to them.
    learned = [_learned(task, model, context, name, state["step"] < steps) for task in tasks]

    torch.manual_seed(model.seed)  # dropout's: what was drawn before, such as for another run, plays no part
    if state["step"]:
        _resume(model, optimizer, state, context, f"{name}: resuming after step {state['step']} of {steps}")
    model.train()
    for step in range(state["step"], steps):
        # 3. Gradients of L3, accumulated over forward passes; each example of the step weighs the same.
        task, examples = tasks[turns[step].task], learned[turns[step].task]
        an_epoch = task_mixture.an_epoch(task, params.batch_size)
        numbers = reward_examples.drawn(model.seed, turns[step].batch, an_epoch, len(task.train))
        with tuning.unfreezing(model, params, step, steps):
            told = _gradients(task, model, rows[turns[step].task], numbers, examples, params, context)

        # 4. Clip, update at the rate of this step.
        lr = peak * linear_with_warmup(step, steps, params.warmup_share)
        asked = (lr, params.clip_norm, told.pop("loss"), step, context.world)
        loss, norm = training.update(model.parameters(), optimizer, *asked)

        # 5. Tell, and keep what has been learned.
        curves = {"loss": loss, "lr": lr, "grad_norm": norm, **told}
        context.log(step + 1, **{f"{name}_{key}": value for key, value in curves.items()})
        context.progress(step + 1, steps, run=name, loss=loss)
        context.measure(peak_memory_mb=hardware.peak_memory_bytes() / 2**20)
        due, stop = context.after_step(checkpoints.due(step + 1) or step + 1 == steps)
        if due:
            _keep(model, optimizer, step + 1, checkpoints, context)
        if stop:
            context.stop_if_asked()


def _learned(task: Task, model: TaskModel, context: StageContext, name: str, wanted: bool) -> Learned:
    """What a task is learned from; the frozen part's answers only if they are `wanted`."""
    sequences = [encode(example) for example in task.train]
    if not (wanted and task_frozen.can(model)):
        return Learned(sequences, None)
    frozen = task_frozen.frozen_states(model, sequences, context, k_way.teller(context, name))
    context.say(f"{name}: states of {frozen.blocks} frozen blocks are kept: {frozen.bytes / 2**20:.1f} MiB")
    return Learned(frozen.sequences, frozen)


def _resume(
    model: TaskModel, optimizer: torch.optim.Optimizer, state: dict[str, Any], context: StageContext, told: str
) -> None:
    """Take over what a checkpoint holds."""
    context.say(told)
    training.load_trained_state(model, state["trained"])
    training.load_optimizer_state(optimizer, state["optimizer"])
    training.set_random_state(state["random"])
    context.resume(state["history"])


def _keep(
    model: TaskModel, optimizer: torch.optim.Optimizer, step: int, checkpoints: Checkpoints, context: StageContext
) -> None:
    """Write the checkpoint of a step. Every process must ask."""
    learned = {"trained": training.trained_state(model), "optimizer": training.optimizer_state(optimizer)}
    if context.world.leads:
        rest = {"step": step, "random": training.random_state(), "history": context.history}
        checkpoints.save(step, learned | rest)


def _gradients(
    task: Task,
    model: TaskModel,
    rows: slice,
    numbers: list[int],
    learned: Learned,
    params: TransferParams,
    context: StageContext,
) -> dict[str, float]:
    """Adds a step's gradients of L3 to what is trained. Returns the mean losses, and the share of right answers."""
    world, chosen, frozen = context.world, [learned.sequences[number] for number in numbers], learned.frozen
    here = frozen and frozen._replace(sequences=chosen, states=[frozen.states[number] for number in numbers])
    tokens = sum(label != segments.UNSUPERVISED for one in chosen for label in one.labels)
    head = language_models.body_and_head(tuning.inner(model.lm))[1] if params.auxiliary else None
    loss = language = right = 0.0
    for batch, weight in world.share(k_way.batches(chosen, params.micro_tokens, model.pad)):
        hidden = hidden_states(model, batch, here, context)
        said = head_logits(model, at_extract(hidden, batch))[:, rows]
        answers = task_objective.class_logits(task.kind, said, batch.sizes)
        labels = [task.train[numbers[place]].label for place in batch.numbers]
        classified = task_objective.example_loss(answers, labels, task.regression)
        spoken = None if head is None else task_objective.language_loss(hidden, head, batch.rows.labels)
        part = task_objective.combined(classified, len(numbers), spoken, tokens, params.auxiliary)
        part = part * (weight * world.size)
        part.backward()  # type: ignore[no-untyped-call]
        loss += float(part.detach())
        language += 0.0 if spoken is None else weight * float(spoken.detach()) / tokens
        if not task.regression:
            wanted = torch.tensor(labels, device=answers.device)
            right += weight * float((answers.argmax(dim=1) == wanted).sum()) / len(numbers)
    told = {"loss": loss}
    if head is not None:
        told["language_loss"] = distributed.mean_of(world, language * world.size)
    if not task.regression:
        told["accuracy"] = distributed.mean_of(world, right * world.size)
    return told


def hidden_states(
    model: TaskModel, batch: k_way.Responses, frozen: task_frozen.Frozen | None, context: StageContext
) -> torch.Tensor:
    """Last hidden states (rows, length, width) of a forward pass, from the frozen part's states where there are any."""
    if frozen is not None:
        return task_frozen.forward_from(model, batch, frozen, context)
    return segments.hidden_states(model.lm, batch.rows, context)


def predict(
    model: TaskModel,
    kind: Kind,
    examples: Sequence[Example],
    context: StageContext,
    tell: k_way.Tell,
    rows: slice = slice(None),
) -> list[list[float]]:
    """Class logits of each example: one a class, one a candidate, or the score of a regression; no softmax.

    `model`: trained, or what `task_saved.load_saved` gives. `tell(done, total)` is called after each forward pass.
    `rows` of W_y: the task's in a mixture (`task_mixture.rows`).
    """
    model.eval()
    sequences = [encode(example) for example in examples]
    found: dict[int, list[float]] = {}
    with torch.inference_mode():
        for batch in k_way.batches(sequences, k_way.SCORED_TOKENS, model.pad):
            answers = task_objective.class_logits(kind, logits(model, batch, context)[:, rows], batch.sizes).tolist()
            for place, row, size in zip(batch.numbers, answers, batch.sizes, strict=True):
                found[place] = row[:size] if kind == "choice" else row
            tell(len(found), len(examples))
    return [found[place] for place in range(len(examples))]
