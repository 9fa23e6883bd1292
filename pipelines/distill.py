"""Stage `distill`: a smaller student that learns from a teacher, the policy of stage `ppo` or any model directory.

In: `data` (corpus, demonstrations, prompts), `ppo` (the teacher). Out: `model/` (the student: a Hugging Face model, its
tokenizer, a card), `history.csv` (one row an optimizer step, of both arms), `evaluation.parquet` (one row a held-out
text: bits of student, teacher, the student before, and the student without the teacher), `answers.parquet` (one row a
held-out prompt: gold of all four), `samples.md`.

Papers: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), soft targets; Sanh et al., "DistilBERT"
(2019), a student made of every other block of the teacher; Jiao et al., "TinyBERT" (2020), hidden states and attention;
Kim and Rush, "Sequence-Level Knowledge Distillation" (2016); Agarwal et al., "On-Policy Distillation of Language
Models" (GKD, 2024), and Gu et al., "MiniLLM" (2024), the student's own answers. As there: each is a term of one loss
(`weights`), off at 0. Departures:

1. The sum is normalised by no temperature but the divergences' own factor T^2 (Hinton, section 2).
2. `top_k`: of each of the teacher's answers the likeliest tokens are kept, the rest as one mass, so the divergence is
   that between distributions over k tokens and "any other": never more than the whole one.
3. Every token of texts and chats is learned from, the prompts' too; of the student's own answers, what it wrote.
4. The embedding, and a head tied to it, stay as they are by default: a student made of the teacher's blocks has the
   teacher's, and they are half of its weights.
5. A second student, from the same blocks on the same tokens in the same order, learns from the labels alone: what it
   reaches is not the teacher's merit.
6. `fit`: before the first step the student's blocks are fitted to the teacher's states in closed form (`block_fit`).
   That needs the teacher, so the second student does without, at a learning rate of its own (`lr_no_teacher`).
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core import artifacts, language_models, speed_server, variants
from pipelines.core.context import StageContext
from pipelines.core.params.distill import DistillParams, Terms

if TYPE_CHECKING:
    from pipelines.core.distilling import Arm, Plan
    from pipelines.core.segments import Sequence

METRICS = frozenset(
    {
        "bits_per_byte", "bits_per_byte_before", "bits_per_byte_no_teacher", "bits_per_byte_teacher", "retention",
        "gain_over_no_teacher", "gain_over_no_teacher_low", "gain_over_no_teacher_high", "parameters",
        "parameters_teacher", "size_ratio", "trained_parameters", "steps", "training_tokens", "prompts_test",
    }
)  # fmt: skip
OPTIONAL = frozenset({"gold", "gold_before", "gold_no_teacher", "gold_teacher", "retention_gold"})
MEASURED = frozenset({"decode_speedup"})
SCORES = frozenset({"bytes", "bits", "bits_before", "bits_no_teacher", "bits_teacher"})


def run(params: DistillParams, inputs: dict[str, Path], outputs: Path, context: StageContext) -> dict[str, float]:
    """Make the student, train it with the teacher and without, and measure both beside the teacher.

    Raises:
        ParamsError: a dial that does not fit the teacher.
        ArtifactError: tokenizers that differ, a student larger than the teacher, weights that are not finite, an
            architecture that cannot be asked, more than fits into memory.
        DataError: data that cannot be learned from or measured on.
        Stopped: a signal came; the checkpoint is written.
    """
    own = params.teacher
    place = inputs["ppo"] / "model" if own is None else language_models.fetched(own, "distill.teacher")
    speed_server.start([(place, variants.PLAIN)])  # beside these imports
    import torch

    from pipelines.core import (
        distill_card,
        distill_data,
        distill_evaluation,
        distilling,
        policy_answers,
        student_checks,
    )

    # 1. Teacher, data and student, all checked before anything is trained.
    tokenizer = language_models.load_tokenizer(str(place))
    prompts = policy_answers.held_out(params, inputs["data"], tokenizer, context)
    people = distill_data.of_people(params, inputs["data"], tokenizer)
    teacher = _teacher(params, place, context)
    before, kept = _student(params, teacher, place, tokenizer, context)
    start = context.work / "before"
    shutil.rmtree(start, ignore_errors=True)
    _save(before, tokenizer, start, context)
    sizes = {end: student_checks.size(model)["parameters"] for end, model in (("", before), ("_teacher", teacher))}
    blocks = f", of its blocks {', '.join(map(str, kept))}" if kept else ""
    context.say(f"student: {sizes[''] / 1e6:.1f} million parameters, teacher: {sizes['_teacher'] / 1e6:.1f}{blocks}")

    # 2. Train it twice from the same blocks, with the teacher and without.
    arms = _arms(params, people, teacher, before, kept, inputs["data"], tokenizer, context)
    plan = _plan(params, len(people), before, tokenizer)
    models = {distill_evaluation.STUDENT: outputs / "model", distill_evaluation.NO_TEACHER: context.work / "no_teacher"}
    first = {name: value.detach().clone() for name, value in before.named_parameters()}
    trained = sum(value.numel() for value in before.parameters() if value.requires_grad)
    plans = plan, plan._replace(lr=params.lr_no_teacher or plan.lr)
    for arm, of_arm, saved in zip(arms, plans, models.values(), strict=True):
        with torch.no_grad():
            for name, value in before.named_parameters():
                value.copy_(first[name])
        distilling.train(arm, params, of_arm, before, context)
        shutil.rmtree(saved, ignore_errors=True)
        _save(before, tokenizer, saved, context)
    context.write_history(outputs / "history.csv")
    tokens = distilling.tokens(arms[0], params, plan)
    del teacher, before, arms, first

    # 3. Measure what was saved.
    models |= {distill_evaluation.BEFORE: start, distill_evaluation.TEACHER: place}
    found = distill_evaluation.evaluate(params, inputs["data"], prompts, models, outputs, context)
    distill_evaluation.speeds(models, context)
    metrics = found.metrics | {
        "parameters": float(sizes[""]),
        "parameters_teacher": float(sizes["_teacher"]),
        "size_ratio": sizes[""] / sizes["_teacher"],
        "trained_parameters": float(trained),
        "steps": float(plan.steps),
        "training_tokens": float(tokens),
        "prompts_test": float(len(prompts)),
    }
    samples = distill_card.samples(found, params.samples)
    context.say(samples)
    artifacts.write_text(outputs / "samples.md", samples)
    artifacts.write_text(outputs / "model" / "README.md", distill_card.card(params, outputs / "model", metrics))
    return metrics


def measure(
    params: DistillParams, inputs: dict[str, Path], context: StageContext, model: Path, evaluation: Path
) -> None:
    """Score another student, such as today's champion, on the held-out text that `run` scores."""
    from pipelines.core.held_out import HeldOut

    held_out = HeldOut.of(inputs["data"], params.eval_bytes)
    held_out.write(evaluation, {"bits": held_out.bits_of_directory(model, context, "champion")})


def _teacher(params: DistillParams, place: Path, context: StageContext) -> Any:
    """The teacher, in the context's type.

    Raises:
        ParamsError: more of its tokens are to be kept than it has, or of its blocks.
        ArtifactError: it and its student do not fit into memory; as `_load`; weights that are not finite; an
            architecture that cannot be asked.
    """
    from pipelines.core import hardware, sampling, student_checks

    if context.device == "cpu":  # where Linux kills what needs too much; other devices say so
        student_checks.check_memory(params, place, context.dtype, hardware.available_memory_bytes())
    teacher = _load(params, str(place), context.dtype, context).eval()
    sampling.check(teacher)
    student_checks.check_finite(teacher, place)
    student_checks.check_top_k(params.top_k, teacher)
    return teacher


def _load(params: DistillParams, place: Path | str, dtype: Any, context: StageContext) -> Any:
    """A model of a directory; its attention can be looked at where that is matched.

    Raises:
        ArtifactError: no model, or a quantized one.
    """
    from pipelines.core import attention, scoring, student_checks

    longest = max(params.max_length, params.max_prompt_tokens + params.max_new_tokens, scoring.WINDOW)
    kind = "eager" if params.weights.attention else attention.choose(context.device, longest)
    model = language_models.load(str(place), dtype, kind)
    student_checks.check_whole(model, place)
    return model.to(context.device)


def _student(
    params: DistillParams, teacher: Any, place: Path, tokenizer: Any, context: StageContext
) -> tuple[Any, list[int]]:
    """The student before training, in fp32, and which of the teacher's blocks it is made of, if it is.

    Raises:
        ParamsError: `keep_layers` is more than the teacher has; more parameters than it has; what is to be read does
            not fit the context.
        ArtifactError: another tokenizer, or one with tokens that the teacher has no row for.
    """
    import torch

    from pipelines.core import packing, sampling, student_checks, students

    packing.check_rows(tokenizer, teacher.get_input_embeddings().weight.shape[0])
    kept: list[int] = []
    if params.student == "layers":
        assert params.keep_layers is not None
        model, kept = students.from_layers(teacher, params.keep_layers)
    elif params.student == "random":
        assert params.depth is not None
        torch.manual_seed(params.seed)
        model = students.random(teacher.config, params.depth, attention=teacher.config._attn_implementation)
    else:
        own = language_models.fetched(params.student, "distill.student")
        student_checks.check_same_tokenizer(place, own)
        model = students.from_directory(own, attention=teacher.config._attn_implementation)
        student_checks.check_finite(model, params.student)
    model = model.float().to(context.device)
    student_checks.check_same_rows(teacher, model)  # first: rows that are too many are parameters that are, too
    student_checks.check_smaller(teacher, model)
    student_checks.check_context(params, teacher, model)
    language_models.body_and_head(model)
    sampling.check(model)
    model.get_input_embeddings().weight.requires_grad_(params.train_embedding)
    return model, kept


def _arms(
    params: DistillParams,
    people: list[Sequence],
    teacher: Any,
    student: Any,
    kept: list[int],
    data: Path,
    tokenizer: Any,
    context: StageContext,
) -> list[Arm]:
    """With the teacher, and with the labels alone."""
    from pipelines.core import distill_data, distill_features, students, teacher_cache
    from pipelines.core.distilling import Arm, Teacher

    sequences = people
    if params.answers != "people":
        own = distill_data.of_teacher(params, data, tokenizer, teacher, context)
        texts = people[: params.texts]
        sequences = texts + own + (people[params.texts :] if params.answers == "both" else [])
    weights, matching, cache, asked = params.weights, None, None, []
    if weights.of_features:
        widths = student.config.hidden_size, teacher.config.hidden_size
        depths = teacher.config.num_hidden_layers, student.config.num_hidden_layers
        pairs = students.pairs(*depths, kept or None)
        matching = distill_features.Matching(widths, pairs, params.seed).to(context.device)
    if params.top_k is not None and weights.of_logits:
        cache = teacher_cache.of(teacher, sequences, params.top_k, params.micro_tokens, tokenizer.pad_token_id, context)
    if weights.on_policy:
        limit = params.max_prompt_tokens, "distill.max_prompt_tokens"
        asked = distill_data.prompts(params, data, tokenizer, *limit, context)
    fitted = kept if params.fit is not None else ()
    with_teacher = Arm("", weights, sequences, Teacher(teacher, cache, matching, asked), fitted)
    return [with_teacher, Arm("no_teacher_", Terms(labels=1.0), people, None)]


def _plan(params: DistillParams, sequences: int, student: Any, tokenizer: Any) -> Plan:
    """How long and how fast."""
    from pipelines.core.distilling import Plan

    seen = sequences * params.epochs
    lr = params.lr or language_models.learning_rate(student.config.hidden_size)
    return Plan(seen, math.ceil(seen / params.batch_size), lr, tokenizer.eos_token_id, tokenizer.pad_token_id)


def _save(model: Any, tokenizer: Any, place: Path, context: StageContext) -> None:
    """Write a student in the context's type, with its tokenizer: what others load."""
    import copy

    from pipelines.core import fine_tuning

    saved = copy.deepcopy(model).to(context.dtype)
    fine_tuning.end_with_eos(saved, tokenizer)
    saved.save_pretrained(place)
    tokenizer.save_pretrained(place)
