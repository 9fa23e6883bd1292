"""The loop that trains a student: its loss on a step's sequences, checkpoints, and the teacher's part in it.

The loss is a weighted sum of means over the tokens that are labels. What compares distributions is computed chunk by
chunk (`losses`), so logits of all tokens never exist at one time; where the data are fixed and `top_k` is set, the
teacher's answers come from a cache and it does not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.core import (
    block_fit,
    blockwise,
    demonstrations,
    distill_features,
    language_models,
    losses,
    sampling,
    segments,
    training,
)
from pipelines.core.checkpoint import Checkpoints
from pipelines.core.context import StageContext
from pipelines.core.distill_data import of_answer
from pipelines.core.params.distill import DistillParams, Terms
from pipelines.core.teacher_cache import Cache

FIT_TOKENS = 32_768  # at the most: all of them are in memory, as a block's states and the inputs of one layer


class Teacher(NamedTuple):
    """Where soft targets come from: the model itself, or what it said of fixed data."""

    model: Any
    cache: Cache | None
    matching: distill_features.Matching | None  # where inner states are matched
    prompts: list[list[int]]  # that the student answers, where it learns from its own answers


class Arm(NamedTuple):
    """One of the runs from the same blocks: with the teacher, or with people's labels alone."""

    name: str  # prefix of its columns in the history, and of its checkpoints
    weights: Terms
    sequences: list[segments.Sequence]
    teacher: Teacher | None
    fitted: Sequence[int] = ()  # the teacher's blocks that the student has, where it is fitted to its states first


class Learner(NamedTuple):
    """The student, and its output embedding: where that is not trained, once and for all in the type to compute in."""

    model: Any
    head: torch.Tensor


class Plan(NamedTuple):
    """Numbers that follow from the params and the data."""

    sequences: int  # that either arm learns from
    steps: int
    lr: float
    end: int  # token that ends an answer
    pad: int


def train(arm: Arm, params: DistillParams, plan: Plan, student: Any, context: StageContext) -> None:
    """Train a student in place, from where a killed run has left a checkpoint of the arm.

    Raises:
        ArtifactError: the loss or a gradient is not finite.
        Stopped: a signal came; the checkpoint is written.
    """
    trained = torch.nn.ModuleDict({"student": student})
    if arm.teacher is not None and arm.teacher.matching is not None:
        trained["matching"] = arm.teacher.matching
    parameters = [value for value in trained.parameters() if value.requires_grad]
    optimizer = training.adamw(parameters, plan.lr, params.weight_decay)
    place = context.work / f"{arm.name}checkpoints"
    checkpoints = Checkpoints(place, context.fingerprint, params.checkpoint_steps, params.checkpoint_seconds)
    state = checkpoints.newest() or {"step": 0}
    torch.manual_seed(params.seed)  # where the architecture drops something out, both arms drop alike
    if state["step"]:
        context.say(
            f"{arm.name.rstrip('_') or 'with the teacher'}: resuming after step {state['step']} of {plan.steps}"
        )
        training.load_trained_state(trained, state["trained"])
        if "optimizer" in state:
            training.load_optimizer_state(optimizer, state["optimizer"])
        training.set_random_state(state["random"])
        context.resume(state["history"])
    elif arm.fitted:
        _fit(arm, params, plan, student, context)
    order = _order(arm, params, plan)
    student.train()
    head = language_models.body_and_head(student)[1]
    learner = Learner(student, head if head.requires_grad else head.to(context.dtype))
    for step in range(state["step"], plan.steps):
        chosen = [int(one) for one in order[step * params.batch_size : (step + 1) * params.batch_size]]
        told = _backward(arm, params, plan, learner, chosen, step, context)
        lr = plan.lr * training.cosine_with_warmup(step, plan.steps, params.warmup_share)
        loss, norm = training.update(parameters, optimizer, lr, params.clip_norm, told["loss"], step, context.world)
        told |= {"loss": loss, "lr": lr, "grad_norm": norm}
        context.log(step + 1, **{arm.name + key: value for key, value in told.items()})
        context.progress(step + 1, plan.steps, loss=loss)
        due, stop = context.after_step(checkpoints.due(step + 1) or step + 1 == plan.steps)
        if due:
            state = {"step": step + 1, "trained": training.trained_state(trained), "history": context.history}
            if step + 1 < plan.steps:  # two thirds of its bytes
                state |= {"optimizer": training.optimizer_state(optimizer)}
            checkpoints.save(step + 1, state | {"random": training.random_state()})
        if stop:
            context.stop_if_asked()


def _fit(arm: Arm, params: DistillParams, plan: Plan, student: Any, context: StageContext) -> None:
    """Let the blocks make up for those left out, on the arm's texts and answers; if stopped, it starts over."""

    def tell(done: int, total: int) -> None:
        context.progress(done, total, fitting="the student's blocks")
        context.stop_if_asked()

    assert arm.teacher is not None and params.fit is not None
    read = [arm.sequences[int(number)].ids for number in _order(arm, params, plan)[: len(arm.sequences)]]
    ids = blockwise.equal_rows(read, params.max_length)[: max(1, FIT_TOKENS // params.max_length)].to(context.device)
    rows = max(1, params.micro_tokens // params.max_length)
    found = block_fit.fit(arm.teacher.model, arm.fitted, ids, params.fit, rows, tell)
    block_fit.put(student, found)
    left = ", ".join(f"{one.after / one.before:.2f}" if one.before else "0" for one in found)
    context.say(f"blocks fitted to the teacher's states on {ids.numel():,} tokens; left of each one's error: {left}")


def tokens(arm: Arm, params: DistillParams, plan: Plan) -> int:
    """How many tokens of texts and chats an arm learns from; the student's own answers are not among them."""
    if not arm.weights.of_data:
        return 0
    return sum(len(arm.sequences[int(number)].ids) for number in _order(arm, params, plan))


def _order(arm: Arm, params: DistillParams, plan: Plan) -> NDArray[np.int64]:
    """Which sequence comes when: as many in both arms, epoch after epoch, whichever of them has more to begin with."""
    count = len(arm.sequences)
    return demonstrations.order(count, -(-plan.sequences // count), params.seed)[: plan.sequences]


def _backward(
    arm: Arm, params: DistillParams, plan: Plan, learner: Learner, chosen: Sequence[int], step: int,
    context: StageContext,
) -> dict[str, float]:  # fmt: skip
    """Add a step's gradient; returns each term's mean over the step's labels, unweighted, and the loss."""
    sequences = [arm.sequences[number] for number in chosen]
    found: dict[str, float] = {"loss": 0.0}
    total = sum(label != segments.UNSUPERVISED for sequence in sequences for label in sequence.labels)
    for rows, texts in _rows(sequences, params.micro_tokens, plan.pad) if arm.weights.of_data else ():
        terms = _terms(arm, params, learner, rows, [[chosen[text] for text in texts]], context)
        share = int((rows.labels != losses.IGNORE).sum()) / total
        _add(found, terms, arm.weights, share)
    if arm.weights.on_policy and arm.teacher is not None:
        own = _own_answers(arm.teacher, params, plan, learner.model, step, context)
        counted = sum(label != segments.UNSUPERVISED for sequence in own for label in sequence.labels)
        for rows, _ in _rows(own, params.micro_tokens, plan.pad):
            share = int((rows.labels != losses.IGNORE).sum()) / counted
            value = _on_policy(arm.teacher, params, learner, rows, context)
            _add(found, {"on_policy": value}, arm.weights, share)
    return found


def _rows(sequences: Sequence[segments.Sequence], tokens: int, pad: int) -> list[tuple[segments.Rows, list[int]]]:
    """A row a forward pass, so that nothing is padded, and which sequences stand in it.

    A step has few sequences here: two of 140 tokens in rows of 256 were half padding.
    """
    packed = segments.bins([len(sequence.ids) for sequence in sequences], tokens)
    return [(segments.rows(sequences, [texts], pad), texts) for texts in packed]


def _add(found: dict[str, float], terms: Mapping[str, torch.Tensor], weights: Terms, share: float) -> None:
    """Gradients of a forward pass's terms, by weight and share of the step's labels; and what they came to."""
    loss = torch.stack([value * (getattr(weights, name) * share) for name, value in terms.items()]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    found["loss"] += float(loss.detach())
    for name, value in terms.items():
        found[name] = found.get(name, 0.0) + float(value.detach()) * share


def _terms(
    arm: Arm, params: DistillParams, learner: Learner, rows: segments.Rows, numbers: list[list[int]],
    context: StageContext,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The terms of a forward pass, each a mean over its labels."""
    labels = rows.labels.to(context.device)
    kept = labels != losses.IGNORE
    states = distill_features.states(learner.model, rows, arm.weights, context)
    hidden, head = states.last[kept], learner.head
    found: dict[str, torch.Tensor] = {}
    if arm.weights.labels:
        found["labels"] = losses.linear_cross_entropy(hidden, head, labels[kept])
    kinds, teacher = arm.weights.of_logits, arm.teacher
    if teacher is None or not (kinds or arm.weights.of_features):
        return found
    if teacher.cache is not None:
        cached = teacher.cache.rows(numbers, rows, context.device)
        for kind in kinds:
            found[kind] = losses.linear_divergence_to_top_k(hidden, head, cached, kind, params.beta)
        return found
    with torch.no_grad():
        asked = distill_features.states(teacher.model, rows, arm.weights, context)
    theirs = language_models.body_and_head(teacher.model)[1]
    for kind in kinds:
        soft = (asked.last[kept], theirs, kind, params.temperature, params.beta)
        found[kind] = losses.linear_divergence(hidden, head, *soft)
    if teacher.matching is not None:
        found |= teacher.matching(states, asked, rows.documents.to(context.device), arm.weights)
    return found


def _own_answers(
    teacher: Teacher, params: DistillParams, plan: Plan, student: Any, step: int, context: StageContext
) -> list[segments.Sequence]:
    """What the student answers to this step's prompts, at temperature 1: GKD and MiniLLM's on-policy data."""
    first = step * params.on_policy_prompts
    prompts = [teacher.prompts[(first + n) % len(teacher.prompts)] for n in range(params.on_policy_prompts)]
    found = sampling.sample(
        student, prompts, count=1, tokens=params.max_new_tokens, stops=[plan.end], pad=plan.pad, temperature=1.0,
        seed=params.seed + step, precision=context.precision, tell=lambda done, total: None,
    )  # fmt: skip
    return [of_answer(prompt, answer) for prompt, (answer,) in zip(prompts, found.ids, strict=True)]


def _on_policy(
    teacher: Teacher, params: DistillParams, learner: Learner, rows: segments.Rows, context: StageContext
) -> torch.Tensor:
    """The divergence at the tokens that the student wrote. What it wrote is data: no gradient passes the sampling."""
    kept = rows.labels.to(context.device) != losses.IGNORE
    hidden = segments.hidden_states(learner.model, rows, context)[kept]
    with torch.no_grad():
        asked = segments.hidden_states(teacher.model, rows, context)[kept]
    theirs = language_models.body_and_head(teacher.model)[1]
    soft = (asked, theirs, params.on_policy_divergence, params.temperature, params.beta)
    return losses.linear_divergence(hidden, learner.head, *soft)
