"""Stage `pretrain`: generative pre-training on the corpus, from random weights or from a base model.

In: `data` (corpus), `tokenizer`. Out: `model/` (a Hugging Face directory with tokenizer and card),
`history.csv` (training loss and learning rate), `evaluation.parquet` (one row a held-out example: bytes, bits
after and before training, bits of a classical compressor), `samples.md`, `snapshots/` (what was trained by
earlier steps: `core/snapshots.py`).

Papers: Radford et al., "Improving Language Understanding by Generative Pre-Training" (2018), sections 3.1 and
4.1; Hu et al., "LoRA" (2021), for `method: lora`. Departures from GPT-1:

1. Documents are packed with their boundaries respected: no token attends to another document.
2. Any decoder-only architecture of transformers; learned positions only where the architecture has them.
3. AdamW with beta2 = 0.95 and a cosine that ends at a tenth of the peak, as later models use.
4. No dropout beyond the architecture's own: a run sees its tokens about once.
5. With `base` set, that model's training is continued instead of starting anew.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.core import (
    artifacts,
    attention,
    cards,
    context_window,
    continuation,
    distributed,
    language_models,
    packing,
    scoring,
    snapshots,
)
from pipelines.core.checkpoint import Checkpoints
from pipelines.core.context import StageContext
from pipelines.core.errors import ParamsError
from pipelines.core.held_out import HeldOut
from pipelines.core.params.pretrain import PretrainParams

if TYPE_CHECKING:
    from pipelines.core import tuning

METRICS = frozenset(
    {
        "bits_per_byte", "bits_per_byte_low", "bits_per_byte_high", "bits_per_byte_before", "bits_per_byte_classical",
        "gain_bits_per_byte", "gain_bits_per_byte_low", "gain_bits_per_byte_high", "held_out_bytes",
        "parameters", "trained_parameters", "training_tokens", "steps",
    }
)  # fmt: skip
OPTIONAL = frozenset({"trained_share"})
SCORES = frozenset({"bytes", "bits", "bits_before", "bits_classical"})

SAMPLE_TOKENS = 48
BASE = "base"  # method qlora: the base in the stage's working folder, to be read in 4 bits


class Plan(NamedTuple):
    """Numbers that follow from the params and the model."""

    tokens: int
    steps: int
    lr: float
    micro_batches: int  # forward passes an optimizer step
    trained: tuning.Report


def run(params: PretrainParams, inputs: dict[str, Path], outputs: Path, context: StageContext) -> dict[str, float]:
    """Train, save, and measure what was saved against the model before and against a compressor.

    Raises:
        ArtifactError: the data have no corpus, or the base model does not fit the tokenizer, or is of an
            architecture that cannot be used.
        ParamsError: rows that are longer than the base model's context.
        Stopped: a signal came; the checkpoint is written.
    """
    from transformers import AutoTokenizer

    from pipelines.core import fine_tuning, training

    tokenizer = AutoTokenizer.from_pretrained(inputs["tokenizer"])
    held_out = HeldOut.of(inputs["data"], params.eval_bytes)

    # 1. The model, what of it is trained, for how long, and on which rows.
    model = _model(params, tokenizer, context)
    plan = _plan(params, model)
    context.world.check_split(plan.micro_batches, "pretrain.micro_batch")
    rows = _rows(params, plan, inputs["data"], tokenizer, context)

    # 2. What it knows before training, or where a killed run had got to.
    checkpoints = Checkpoints(
        context.work / "checkpoints", context.fingerprint, params.checkpoint_steps, params.checkpoint_seconds
    )

    def start() -> dict[str, Any]:
        if (state := checkpoints.newest()) is not None:
            context.say(f"resuming after step {state['step']} of {plan.steps}")
            return state
        _show_example(rows, tokenizer, context)
        start_model = _as_it_was(params, model, context)
        bits_before = held_out.bits(start_model, tokenizer, context, "before training")
        before = continuation.greedy(start_model, tokenizer, held_out.prompts(params.samples), SAMPLE_TOKENS)
        return {"step": 0, "bits_before": bits_before, "before": before}

    state = distributed.from_leader(context.world, start)

    # 3. Train; then save, load what was saved, and measure that.
    distributed.shard(model, context.world)
    _train(params, plan, model, rows, state, checkpoints, context)
    trained = training.trained_state(model)
    if not context.world.leads:
        return {}
    if context.world.sharding == "full":  # a model that was split cannot be saved whole: another takes its weights
        model = _model(params, tokenizer, context)
        training.load_trained_state(model, trained)
    snapshots.publish(model, params.base, outputs, context)
    fine_tuning.save(model, context.work / BASE, params, tokenizer, outputs / "model", context)
    kind = attention.choose(context.device, scoring.WINDOW)
    model = language_models.load(str(outputs / "model"), context.dtype, kind).to(context.device)
    scores = {
        "bits": held_out.bits(model, tokenizer, context, "after training"),
        "bits_before": state["bits_before"],
        "bits_classical": held_out.classical_bits(inputs["data"], params.seed),
    }
    held_out.write(outputs / "evaluation.parquet", scores)
    context.write_history(outputs / "history.csv")
    prompts = held_out.prompts(params.samples)
    after = continuation.greedy(model, tokenizer, prompts, SAMPLE_TOKENS)
    samples = cards.continuations(prompts, {"before": state["before"], "after": after})
    context.say(samples)
    artifacts.write_text(outputs / "samples.md", samples)

    metrics = held_out.metrics(scores) | {
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        **plan.trained.metrics(),
        "training_tokens": float(plan.steps * params.batch_tokens),
        "steps": float(plan.steps),
    }
    artifacts.write_text(outputs / "model" / "README.md", cards.base_model(params, model, metrics))
    return metrics


def measure(
    params: PretrainParams, inputs: dict[str, Path], context: StageContext, model: Path, evaluation: Path
) -> None:
    """Score another model, such as today's champion, on the held-out examples that `run` scores.

    Writes `evaluation` with the columns `bytes` and `bits`.
    """
    held_out = HeldOut.of(inputs["data"], params.eval_bytes)
    held_out.write(evaluation, {"bits": held_out.bits_of_directory(model, context, "champion")})


def _model(params: PretrainParams, tokenizer: Any, context: StageContext) -> Any:
    """The model to train, on its device. Weights that are trained are fp32; frozen ones are in the compute type."""
    import torch

    from pipelines.core import fine_tuning, sampling, tuning

    torch.manual_seed(params.seed)
    kind = attention.choose(context.device, max(params.sequence_length, scoring.WINDOW))
    if params.base is None:
        length = params.sequence_length
        model = language_models.random_weights(
            params.architecture, params.depth, tokenizer, length, torch.float32, kind
        )
    else:
        language_models.refuse_quantized(params.base)
        model = language_models.load(params.base, context.dtype if params.adapted else torch.float32, kind)
        language_models.fit_vocabulary(model, tokenizer)
    room = context_window.length(model.config)  # of random weights: what the architecture's window of attention leaves
    if room and params.sequence_length > room:
        whose = "the base model's context" if params.base else f"the window of attention of {params.architecture}"
        raise ParamsError(f"pretrain.sequence_length: {params.sequence_length}; {whose} is {room}")
    language_models.body_and_head(model)
    sampling.check(model)  # nor can many be trained that make masks of their own
    if params.method == "qlora":  # quantised as it is read, which a file of GGUF cannot be
        place = context.work / BASE
        if context.world.leads:
            model.save_pretrained(place)
        del model
        distributed.from_leader(context.world, lambda: None)  # none reads it before it is whole
        return fine_tuning.load(place, params, max(params.sequence_length, scoring.WINDOW), context)
    return tuning.prepare(model, params, context).to(context.device)


def _as_it_was(params: PretrainParams, model: Any, context: StageContext) -> Any:
    """The model before training; under `method: qlora` not in 4 bits, whose loss would count as a gain."""
    if params.method != "qlora":
        return model
    kind = attention.choose(context.device, scoring.WINDOW)
    return language_models.load(str(context.work / BASE), context.dtype, kind).to(context.device)


def _plan(params: PretrainParams, model: Any) -> Plan:
    """How long, how fast: from the params where they say so, else from the model's size."""
    from pipelines.core import tuning

    tokens = params.tokens or round(params.tokens_per_parameter * sum(value.numel() for value in model.parameters()))
    return Plan(
        tokens=tokens,
        steps=math.ceil(tokens / params.batch_tokens),
        lr=params.lr or language_models.learning_rate(model.config.hidden_size),
        micro_batches=params.batch_tokens // (params.sequence_length * params.micro_batch),
        trained=tuning.report(model),
    )


def _rows(params: PretrainParams, plan: Plan, data: Path, tokenizer: Any, context: StageContext) -> packing.PackedRows:
    """The packed training rows; no more text is tokenized than the run can use."""
    tokens, length = plan.steps * params.batch_tokens, params.sequence_length
    return packing.of_corpus(data, tokenizer, tokens, length, "pretrain.sequence_length", params.seed, context)


def _train(
    params: PretrainParams,
    plan: Plan,
    model: Any,
    rows: packing.PackedRows,
    state: dict[str, Any],
    checkpoints: Checkpoints,
    context: StageContext,
) -> None:
    """The loop. `state` is where to start: what a checkpoint holds, or step 0 and what was measured before it."""
    from pipelines.core import training, tuning

    optimizer = training.optimizer(model, params, plan.lr, params.weight_decay)
    if state["step"]:
        training.load_trained_state(model, state["trained"])
        training.load_optimizer_state(optimizer, state["optimizer"])
        training.set_random_state(state["random"])
        context.resume(state["history"])
    kept = snapshots.due(plan.steps, params.snapshots)
    if kept and not state["step"]:
        snapshots.save(model, params.base, 0, context)
    pace = training.Pace(context, plan.steps, state.get("seconds", 0.0))
    model.train()
    for step in range(state["step"], plan.steps):
        pace.start(step)
        # 1. Gradients, accumulated over this process's micro-batches; every token of a packed row is supervised.
        loss = 0.0
        with tuning.unfreezing(model, params, step, plan.steps):
            for number in range(context.world.rank, plan.micro_batches, context.world.size):
                batch = rows.batch((step * plan.micro_batches + number) * params.micro_batch, params.micro_batch)
                part = training.language_model_loss(model, batch, context) * context.world.size / plan.micro_batches
                part.backward()  # type: ignore[no-untyped-call]
                loss += float(part.detach())

        # 2. Average, clip, update at the rate of this step.
        lr = plan.lr * training.cosine_with_warmup(step, plan.steps, params.warmup_share)
        loss, norm = training.update(model.parameters(), optimizer, lr, params.clip_norm, loss, step, context.world)

        # 3. Tell, and keep what has been learned.
        pace.stop()
        speed = (step + 1) * params.batch_tokens / pace.seconds
        context.log(step + 1, loss=loss, lr=lr, grad_norm=norm)
        context.progress(step + 1, plan.steps, loss=loss, tokens_per_second=speed)
        if step + 1 in kept:
            snapshots.save(model, params.base, step + 1, context)
        due, stop = context.after_step(checkpoints.due(step + 1) or step + 1 == plan.steps)
        if due:
            learned = {"trained": training.trained_state(model), "optimizer": training.optimizer_state(optimizer)}
            if context.world.leads:
                checkpoints.save(
                    step + 1,
                    {
                        **learned,
                        "step": step + 1,
                        "bits_before": state["bits_before"],
                        "before": state["before"],
                        "random": training.random_state(),
                        "history": context.history,
                        "seconds": pace.seconds,
                    },
                )
        if stop:
            context.stop_if_asked()
    pace.report(plan.steps * params.batch_tokens, training.flops_per_token(model, params.sequence_length))


def _show_example(rows: packing.PackedRows, tokenizer: Any, context: StageContext) -> None:
    """One packed row as the loss sees it."""
    batch = rows.batch(0, 1)
    text = tokenizer.decode(batch.ids[0]).replace("\n", "\n  ")
    documents = int(batch.documents[0].max() - batch.documents[0].min()) + 1
    context.say(
        f"first training row: {batch.ids.shape[1]} tokens, all supervised, of {documents} document(s):\n  {text[:600]}"
    )
