"""Stage `sft`: supervised fine-tuning on demonstrations, chats in which people wrote the answers.

In: `data` (demonstrations), `pretrain` (the model and its tokenizer). Out: `model/` (a Hugging Face directory
with tokenizer and card), `history.csv` (training and validation loss, learning rate), `evaluation.parquet` (one row
a held-out prompt: bits of the reference, ROUGE-L and chrF of greedy answers, of this model and of the one before),
`samples.md`.

Paper: Ouyang et al., "Training language models to follow instructions with human feedback" (InstructGPT, 2022),
section 3.5 and appendix C.1. The loss is on the assistant's tokens and EOS alone. Departures:

1. Few epochs with early stopping in place of 16: of the states that were validated, the one with the lowest
   validation loss is kept (the paper overfits that loss and chooses by reward, which exists only two stages later).
2. With a short warm-up, where the paper has none: adapters begin at zero and Adam's first steps are its roughest.
3. Residual dropout is 0 by default (paper: 0.2, against 16 epochs); `dropout: 0.2` is the paper's.
4. Learning rate from the width (paper: 9.65e-6 at width 2048), ten times as high for LoRA and QLoRA.
5. The loss is averaged over the supervised tokens of an optimizer step, however they fall into forward passes;
   examples share rows without seeing one another, and what they all begin with is computed once a row.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.core import artifacts, chats, demonstrations, distributed, language_models, scoring, segments
from pipelines.core.checkpoint import Checkpoints
from pipelines.core.context import StageContext
from pipelines.core.demonstrations import Demonstration
from pipelines.core.errors import ArtifactError
from pipelines.core.params.sft import SftParams

if TYPE_CHECKING:
    from pipelines.core import tuning

METRICS = frozenset(
    {
        "response_bits_per_byte", "response_bits_per_byte_low", "response_bits_per_byte_high",
        "response_bits_per_byte_before", "gain_response_bits_per_byte", "gain_response_bits_per_byte_low",
        "gain_response_bits_per_byte_high", "rouge_l", "rouge_l_low", "rouge_l_high", "rouge_l_zero_shot",
        "rouge_l_few_shot", "chrf", "chrf_zero_shot", "chrf_few_shot", "response_tokens", "response_tokens_reference",
        "eos_share", "eos_share_zero_shot", "best_step", "best_validation_loss", "training_examples",
        "training_tokens", "supervised_tokens", "epochs", "steps", "trained_parameters", "parameters",
        "dropped_too_long",
    }
)  # fmt: skip
OPTIONAL = frozenset({"trained_share", "merge_delta_bits"})
SCORES = frozenset(
    {
        "bytes", "bits", "bits_before", "rouge_l", "rouge_l_zero_shot", "rouge_l_few_shot", "chrf", "chrf_zero_shot",
        "chrf_few_shot",
    }
)  # fmt: skip


class Examples(NamedTuple):
    """The demonstrations of a run."""

    train: list[Demonstration]
    validation: list[Demonstration]
    held_out: list[Demonstration]
    shots: list[Demonstration]  # of train, for the few-shot baseline
    dropped: int


class Plan(NamedTuple):
    """Numbers that follow from the params, the data and the model."""

    steps: int
    lr: float
    trained: tuning.Report


def run(params: SftParams, inputs: dict[str, Path], outputs: Path, context: StageContext) -> dict[str, float]:
    """Train, save the best state, and measure it on held-out prompts against the model before.

    Raises:
        ArtifactError: a tokenizer that chats cannot be learned with; no demonstrations; the model diverged.
        DataError: a chat that cannot be learned from, or is too long.
        Stopped: a signal came; the checkpoint is written.
    """
    from pipelines.core import sft_evaluation

    base = inputs["pretrain"] / "model"
    tokenizer = language_models.load_tokenizer(str(base))
    chats.check_tokenizer(tokenizer)
    examples = _examples(params, inputs["data"], tokenizer, base)

    # 1. What the model knows and answers before training, or where a killed run had got to.
    checkpoints = Checkpoints(
        context.work / "checkpoints", context.fingerprint, params.checkpoint_steps, params.checkpoint_seconds
    )

    def start() -> dict[str, Any]:
        if (state := checkpoints.newest()) is not None:
            return state
        context.say(demonstrations.marked(examples.train[0], tokenizer))
        before = sft_evaluation.before_training(params, base, examples.held_out, examples.shots, context)
        return {"step": 0, "before": before, "best": None}

    state = distributed.from_leader(context.world, start)

    # 2. The model to train, for how long, how fast; the loop.
    model, plan = _model(params, base, examples, context)
    if state["step"]:
        context.say(f"resuming after step {state['step']} of {plan.steps}")
    distributed.shard(model, context.world)
    best = _train(params, plan, model, tokenizer, examples, state, checkpoints, context)
    if not context.world.leads:
        return {}
    if context.world.sharding == "full":  # a model that was split cannot be saved whole: another takes its weights
        model, _ = _model(params, base, examples, context)

    # 3. Save the best state; then measure what was saved.
    of_saved = _save(params, model, best, examples, base, tokenizer, outputs / "model", context)
    context.write_history(outputs / "history.csv")
    columns, given = sft_evaluation.of_model(params, outputs / "model", examples.held_out, context, "after training")
    columns |= state["before"]["columns"]
    metrics = sft_evaluation.write(params, outputs, examples.held_out, columns, given, state["before"], context)
    chosen = [example.chat for example in examples.train]
    figures = {
        "best_step": best["step"],
        "best_validation_loss": best["loss"],
        "training_examples": len(chosen),
        "training_tokens": params.epochs * sum(len(chat.ids) for chat in chosen),
        "supervised_tokens": params.epochs * sum(sum(chat.supervised) for chat in chosen),
        "epochs": params.epochs,
        "steps": plan.steps,
        "dropped_too_long": examples.dropped,
    }
    metrics |= plan.trained.metrics() | of_saved | {name: float(value) for name, value in figures.items()}
    artifacts.write_text(outputs / "model" / "README.md", sft_evaluation.card(params, outputs / "model", base, metrics))
    return metrics


def measure(params: SftParams, inputs: dict[str, Path], context: StageContext, model: Path, evaluation: Path) -> None:
    """Score another model, such as today's champion, on the held-out prompts that `run` scores.

    Writes `evaluation` with the columns `bytes`, `bits`, `rouge_l` and `chrf`.
    """
    from pipelines.core import answers, sft_evaluation

    base = inputs["pretrain"] / "model"
    examples = _examples(params, inputs["data"], language_models.load_tokenizer(str(base)), base)
    columns, _ = sft_evaluation.of_model(params, model, examples.held_out, context, "champion")
    answers.write(evaluation, examples.held_out, columns)


def _examples(params: SftParams, data: Path, tokenizer: Any, base: Path) -> Examples:
    """The demonstrations that are trained on, validated on and held out."""
    from transformers import AutoConfig

    from pipelines.core import context_window

    config = AutoConfig.from_pretrained(base)
    room = context_window.length(config) or math.inf
    if params.max_length > room:
        positions = getattr(config, "max_position_embeddings", None) == room  # else a window, which nothing widens
        other = ", or train the base model on longer rows (pretrain.sequence_length)" if positions else ""
        raise ArtifactError(
            f"sft.max_length is {params.max_length}, the model's context {room} tokens: lower the one{other}"
        )
    train, validation, held_out = (
        demonstrations.choose(data, split, tokenizer, params.kinds, count, params.max_length, params.too_long)
        for split, count in (
            ("train", params.examples), ("validation", params.eval_prompts), ("test", params.eval_prompts),
        )
    )  # fmt: skip
    # Short ones, so that the baseline's prompts stay bearable: the first by hash that are no longer than the median.
    middle = sorted(len(example.chat.ids) for example in train.kept)[len(train.kept) // 2]
    shots = [example for example in train.kept if len(example.chat.ids) <= middle][: params.few_shot]
    dropped = sum(part.dropped for part in (train, validation, held_out))
    return Examples(train.kept, validation.kept, held_out.kept, shots, dropped)


def _model(params: SftParams, base: Path, examples: Examples, context: StageContext) -> tuple[Any, Plan]:
    """The model on its device, and the plan that follows from it."""
    import torch

    from pipelines.core import fine_tuning, tuning

    torch.manual_seed(params.seed)
    longest = max(params.max_length, segments.ROW, scoring.WINDOW)
    model = fine_tuning.load(base, params, longest, context)
    fine_tuning.residual_dropout(model, params.dropout)
    steps = math.ceil(len(examples.train) * params.epochs / params.batch_size)
    lr = params.lr or fine_tuning.learning_rate(model.config.hidden_size, params.method)
    return model, Plan(steps, lr, tuning.report(model))


def _train(
    params: SftParams,
    plan: Plan,
    model: Any,
    tokenizer: Any,
    examples: Examples,
    state: dict[str, Any],
    checkpoints: Checkpoints,
    context: StageContext,
) -> dict[str, Any]:
    """The loop. `state` is where to start. Returns the best state: `step`, `loss` (validation) and `trained`."""
    from pipelines.core import answers, training, tuning

    optimizer = training.optimizer(model, params, plan.lr, params.weight_decay)
    best: dict[str, Any] | None = state["best"]
    if state["step"]:
        training.load_trained_state(model, state["trained"])
        training.load_optimizer_state(optimizer, state["optimizer"])
        training.set_random_state(state["random"])
        context.resume(state["history"])
    pace = training.Pace(context, plan.steps, state.get("seconds", 0.0))
    order = demonstrations.order(len(examples.train), params.epochs, params.seed)
    tokens = sum(len(examples.train[number].chat.ids) for number in order)
    model.train()
    for step in range(state["step"], plan.steps):
        pace.start(step)
        # 1. The examples of this step, packed.
        chosen = order[step * params.batch_size : (step + 1) * params.batch_size]
        sequences = [segments.of_chat(examples.train[number].chat) for number in chosen]

        # 2. Gradients, accumulated over forward passes.
        with tuning.unfreezing(model, params, step, plan.steps):
            loss = backward(model, sequences, params.micro_tokens, tokenizer.pad_token_id, context)

        # 3. Clip, update at the rate of this step.
        lr = plan.lr * training.cosine_with_warmup(step, plan.steps, params.warmup_share)
        loss, norm = training.update(model.parameters(), optimizer, lr, params.clip_norm, loss, step, context.world)
        pace.stop()

        # 4. Validate now and then; remember the best state.
        told = {"loss": loss, "lr": lr, "grad_norm": norm}
        if (step + 1) % params.validate_steps == 0 or step + 1 == plan.steps:
            judged = (examples.validation, params.micro_tokens, context)
            told["validation_loss"] = answers.mean_loss(model, tokenizer, *judged)
            if best is None or told["validation_loss"] < best["loss"]:
                trained = {name: value.clone() for name, value in training.trained_state(model).items()}
                best = {"step": step + 1, "loss": told["validation_loss"], "trained": trained}

        # 5. Tell, and keep what has been learned.
        context.log(step + 1, **told)
        context.progress(
            step + 1, plan.steps, loss=loss, tokens_per_second=tokens / plan.steps * (step + 1) / pace.seconds
        )
        due, stop = context.after_step(checkpoints.due(step + 1) or step + 1 == plan.steps)
        if due:
            learned = {"trained": training.trained_state(model), "optimizer": training.optimizer_state(optimizer)}
            if context.world.leads:
                checkpoints.save(
                    step + 1,
                    {
                        **learned,
                        "step": step + 1,
                        "before": state["before"],
                        "best": best,
                        "random": training.random_state(),
                        "history": context.history,
                        "seconds": pace.seconds,
                    },
                )
        if stop:
            context.stop_if_asked()
    pace.report(tokens, training.flops_per_token(model, segments.ROW))
    assert best is not None, "the last step is validated"
    return best


def backward(model: Any, sequences: list[segments.Sequence], tokens: int, pad_id: int, context: StageContext) -> float:
    """Add a step's gradient; returns its loss in nats a supervised token. Logits only where they are learned."""
    from pipelines.core import losses

    _, head = language_models.body_and_head(model.get_base_model() if hasattr(model, "get_base_model") else model)
    total = sum(label != segments.UNSUPERVISED for sequence in sequences for label in sequence.labels)
    loss = 0.0
    for (rows, _), weight in context.world.share(list(segments.micro_batches(sequences, tokens, pad_id))):
        labels = rows.labels.to(context.device)
        kept = labels != losses.IGNORE
        hidden = segments.hidden_states(model, rows, context)[kept]
        part = losses.linear_cross_entropy(hidden, head, labels[kept])
        part = part * (len(hidden) / total) * (weight * context.world.size)
        part.backward()  # type: ignore[no-untyped-call]
        loss += float(part.detach())
    return loss


def _save(
    params: SftParams, model: Any, best: dict[str, Any], examples: Examples, base: Path, tokenizer: Any, place: Path,
    context: StageContext,
) -> dict[str, float]:  # fmt: skip
    """The best state as a whole model in the compute type, with its tokenizer: what others load. Returns its size,
    and for adapters what merging cost: bits a token on the validation demonstrations, merged less as trained.
    """
    from pipelines.core import answers, fine_tuning, training

    training.load_trained_state(model, best["trained"])
    plain = fine_tuning.save(model, base, params, tokenizer, place, context)
    figures = {"parameters": float(sum(value.numel() for value in plain.parameters()))}
    if params.adapted:  # the sum is rounded to the compute type; over 4 bits, the base becomes another one as well
        loss = answers.mean_loss(plain, tokenizer, examples.validation, params.micro_tokens, context)
        figures["merge_delta_bits"] = (loss - best["loss"]) / math.log(2)
    return figures
