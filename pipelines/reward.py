"""Stage `reward`: a reward model from rankings of K responses to a prompt.

In: `data` (demonstrations, whose mean reward becomes 0), `sft` (where it starts, and whose log-probability it must
beat), `feedback` (rankings; samples with gold scores where there are any). Out: `model/` (a Hugging Face
classifier with one label, its tokenizer, its constants in config.json, a card), `adapter/` (`method: lora`: what was
trained, before it was merged: stage `ppo` puts it on the policy's own backbone), `history.csv`, `evaluation.parquet`
(one row a held-out ranking: its pairs, and how many of them the model and the baselines put in the right order),
`calibration.csv`, `by_k.csv`, `by_margin.csv` (distance of the ranks), `best_of_n.csv` (where samples have gold
scores), `samples.md`.

Paper: Ouyang et al., "Training language models to follow instructions with human feedback" (2022), section 3.5 and
appendix C.2. As there: all pairs of a ranking are one batch element, one forward pass a response, ties dropped,
one epoch, a cosine to a tenth of the peak, demonstrations score 0 on average. Departures:

1. A prompt is encoded once for its K responses (`core/segments.py`), with the same result.
2. `method: lora`, at ten times the rate of all weights; rates follow the width from the paper's 9e-6 (6B).
3. A batch is as many prompts as leave enough steps of a small set; the paper's is 64. Rankings of the same responses
   by several labelers are one element, with the pairs of all of them.
4. Pairs of identical texts are dropped like ties.
5. A linear warm-up, which the paper does not have: the head starts from random weights.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.core import (
    artifacts,
    distributed,
    language_models,
    preference_data,
    reading,
    reward_card,
    reward_examples,
)
from pipelines.core.checkpoint import Checkpoints
from pipelines.core.context import StageContext
from pipelines.core.errors import ParamsError
from pipelines.core.params.reward import RewardParams
from pipelines.core.params.tuning import WHOLE

if TYPE_CHECKING:
    from pipelines.core import tuning

METRICS = frozenset(
    {
        "accuracy", "accuracy_low", "accuracy_high", "accuracy_length_only", "accuracy_log_probability", "ece",
        "pairs_test", "prompts_test", "comparisons_train", "pairs_train", "ties_dropped", "comparisons_all_tied",
        "dropped_too_long", "reward_mean", "reward_std", "steps", "epochs", "training_tokens", "trained_parameters",
        "parameters",
    }
)  # fmt: skip
OPTIONAL = frozenset(
    {
        "trained_share",
        "accuracy_held_out_labelers", "accuracy_held_out_labelers_low", "accuracy_held_out_labelers_high",
        "best_of_n_gold", "best_of_1_gold", "best_of_n_oracle_gold", "accuracy_gold",
    }
)  # fmt: skip
SCORES = frozenset(
    {
        "pairs", "right", "right_length_only", "right_log_probability", "right_chance",
        "pairs_unseen", "right_unseen", "right_unseen_length_only", "right_unseen_chance",
    }
)  # fmt: skip


class Plan(NamedTuple):
    """Numbers that follow from the params, the rankings and the model."""

    steps: int
    lr: float
    tokens: int  # that pass through the model in training
    trained: tuning.Report


def run(params: RewardParams, inputs: dict[str, Path], outputs: Path, context: StageContext) -> dict[str, float]:
    """Train, save, shift, and measure what was saved on prompts and labelers it has not seen.

    Raises:
        ArtifactError: there are no comparisons; the SFT model cannot be made into a classifier.
        DataError: rankings that cannot be learned from, or that would measure what was learned from.
        Stopped: a signal came; the checkpoint is written.
    """
    from pipelines.core import k_way, reward_model, training

    # 1. What is learned from, what is held out, and the model.
    tokenizer = language_models.load_tokenizer(str(inputs["sft"] / "model"))
    asked = (params, params.held_out_labelers, inputs["feedback"], tokenizer, context)
    examples = reward_examples.gather(*asked)
    train, held_out = examples.train, examples.held_out
    elements = reward_examples.by_prompt(train)
    written = reward_examples.demonstrations(params, inputs["data"], tokenizer)  # before the training, not after it
    model = _model(params, inputs["sft"] / "model", tokenizer, elements, context)
    plan = _plan(params, model, elements)

    # 2. What the SFT model thinks of the held-out responses, or where a killed run had got to.
    checkpoints = Checkpoints(
        context.work / "checkpoints", context.fingerprint, params.checkpoint_steps, params.checkpoint_seconds
    )
    teller = partial(k_way.teller, context)

    def start() -> dict[str, Any]:
        if (state := checkpoints.newest()) is not None:
            context.say(f"resuming after step {state['step']} of {plan.steps}")
            return state
        context.say(reward_card.example(train.rankings[0], train.sequences[0], tokenizer))
        asked = (inputs["sft"] / "model", held_out.sequences, tokenizer.pad_token_id, context)
        return {"step": 0, "log_probabilities": k_way.mean_log_probabilities(*asked, teller("before training"))}

    state = distributed.from_leader(context.world, start)

    # 3. Train; then save, load what was saved, and shift it so that demonstrations score 0 on average.
    distributed.shard(model, context.world)
    _train(params, plan, model, elements, state, checkpoints, context)
    trained = training.trained_state(model)
    if not context.world.leads:
        return {}
    if context.world.sharding == "full":  # a model that was split cannot be saved whole: another takes its weights
        model = _model(params, inputs["sft"] / "model", tokenizer, elements, context)
        training.load_trained_state(model, trained)
    if params.method == "lora":
        reward_model.save_adapter(model, inputs["sft"] / "model", outputs / "adapter")
    reward_model.save(model, tokenizer, outputs / "model", context.dtype)
    context.write_history(outputs / "history.csv")
    model, _ = reward_model.load(outputs / "model", context, k_way.kind(context.device, held_out.sequences))
    level = reward_model.level(model, written, context, teller("demonstrations after training"))
    reward_model.save_constants(outputs / "model", model, level)

    # 4. Measure that on rankings it has not seen.
    metrics = {
        **_evaluate(params, examples, model, tokenizer, state["log_probabilities"], inputs, outputs, context),
        "reward_mean": level.mean,
        "reward_std": level.deviation,
        "steps": float(plan.steps),
        "epochs": float(params.epochs),
        "training_tokens": float(plan.tokens),
        **plan.trained.metrics(),
        "parameters": float(sum(value.numel() for value in model.parameters())),
    }
    artifacts.write_text(outputs / "model" / "README.md", reward_card.card(params, model, metrics))
    return metrics


def _evaluate(
    params: RewardParams,
    examples: reward_examples.Examples,
    model: Any,
    tokenizer: Any,
    log_probabilities: list[list[float]],
    inputs: dict[str, Path],
    outputs: Path,
    context: StageContext,
) -> dict[str, float]:
    """Score what is held out; write rows, curves and samples. `log_probabilities`: what the SFT model thinks of it."""
    from pipelines.core import k_way, reward_evaluation, reward_model

    train, held_out, unseen, left_out = examples
    answers = reward_evaluation.read_samples(inputs["feedback"], tokenizer)  # most of them are ranked too: scored once
    asked = held_out.sequences + (answers.sequences if answers else [])
    every = reward_model.score_sequences(model, asked, context, k_way.teller(context, "after training"))
    scores, of_answers = every[: len(held_out.sequences)], every[len(held_out.sequences) :]
    longer = preference_data.longer_wins(train.rankings)
    rows = reward_evaluation.table(held_out.rankings, scores, log_probabilities, longer, unseen)
    reading.write_evaluation(outputs / "evaluation.parquet", rows)
    samples = reward_card.samples(held_out.rankings[: params.samples], scores[: params.samples])
    context.say(samples)
    artifacts.write_text(outputs / "samples.md", samples)
    return {
        **reward_evaluation.accuracies(rows),
        **reward_evaluation.write_curves(outputs, held_out.rankings, scores, log_probabilities, longer),
        **(reward_evaluation.best_of_n(outputs, answers, of_answers) if answers else {}),
        "prompts_test": float(len({one.task for one in held_out.rankings})),
        "comparisons_train": float(len(train.rankings)),
        "pairs_train": float(sum(len(one.pairs) for one in train.rankings)),
        "ties_dropped": float(sum(one.undecided for one in train.rankings)),
        "comparisons_all_tied": float(left_out),
        "dropped_too_long": float(train.dropped + held_out.dropped),
    }


def measure(
    params: RewardParams, inputs: dict[str, Path], context: StageContext, model: Path, evaluation: Path
) -> None:
    """Score another reward model, such as today's champion, on the held-out rankings that `run` scores.

    Writes `evaluation` with the columns `pairs` and `right`.
    """
    from pipelines.core import k_way, reward_evaluation, reward_model

    tokenizer = language_models.load_tokenizer(str(inputs["sft"] / "model"))
    # With the tokenizer of `run`, so that the rankings that fit are the same.
    asked = (params, params.held_out_labelers, inputs["feedback"], tokenizer, context)
    held_out = reward_examples.gather(*asked).held_out
    judge, theirs = reward_model.load(model, context, k_way.kind(context.device, held_out.sequences))
    items = [(one.prompt, one.responses) for one in held_out.rankings]
    scores = reward_model.score(judge, theirs, items, context, k_way.teller(context, "champion"))
    reading.write_evaluation(evaluation, reward_evaluation.counts(held_out.rankings, scores))


def _model(
    params: RewardParams, place: Path, tokenizer: Any, train: reward_examples.Elements, context: StageContext
) -> Any:
    """The model to train, on its device. Weights that are trained are fp32; frozen ones are in the compute type."""
    import torch

    from pipelines.core import context_window, k_way, reward_model, tuning

    torch.manual_seed(params.seed)
    dtype = torch.float32 if params.method in WHOLE else context.dtype
    kind = k_way.kind(context.device, train.sequences)
    model = reward_model.initial(place, tokenizer, params.seed, dtype, kind)
    room = context_window.length(model.config) or params.max_length
    if params.max_length > room:
        raise ParamsError(f"reward.max_length: {params.max_length} tokens; the SFT model's context is {room}")
    return tuning.prepare(model, params, context, head=reward_model.HEAD).to(context.device)


def _plan(params: RewardParams, model: Any, train: reward_examples.Elements) -> Plan:
    """How long, how fast: from the params where they say so, else from the model's size."""
    from pipelines.core import reward_model, tuning

    return Plan(
        steps=params.epochs * -(-len(train.sequences) // params.batch_prompts),
        lr=params.lr or reward_model.learning_rate(model.config.hidden_size, params.method),
        tokens=params.epochs * sum(len(one.ids) for one in train.sequences),
        trained=tuning.report(model),
    )


def _train(
    params: RewardParams,
    plan: Plan,
    model: Any,
    train: reward_examples.Elements,
    state: dict[str, Any],
    checkpoints: Checkpoints,
    context: StageContext,
) -> None:
    """The loop. `state` is where to start: what a checkpoint holds, or step 0 and what was measured before it."""
    from pipelines.core import hardware, k_way, preferences, reward_model, training, tuning

    optimizer = training.optimizer(model, params, plan.lr, params.weight_decay)
    if state["step"]:
        training.load_trained_state(model, state["trained"])
        training.load_optimizer_state(optimizer, state["optimizer"])
        training.set_random_state(state["random"])
        context.resume(state["history"])
    began = time.perf_counter() - state.get("seconds", 0.0)
    model.train()
    for step in range(state["step"], plan.steps):
        # 1. The prompts of this step.
        numbers = reward_examples.drawn(params.seed, step, plan.steps // params.epochs, len(train.sequences))
        decided = [train.pairs[number] for number in numbers]
        sequences = [train.sequences[number] for number in numbers]

        # 2. Gradients, accumulated over forward passes; each prompt of the step weighs the same.
        loss = correct = 0.0
        batches = list(k_way.batches(sequences, params.micro_tokens, model.config.pad_token_id))
        with tuning.unfreezing(model, params, step, plan.steps):
            for batch, weight in context.world.share(batches):
                ours = [decided[number] for number in batch.numbers]
                chosen = preferences.flat(ours, batch.sizes, len(numbers)).to(context.device)
                rewards = reward_model.rewards(model, batch, context)
                part = preferences.k_way_loss(rewards, chosen) * (weight * context.world.size)
                part.backward()  # type: ignore[no-untyped-call]
                loss += float(part.detach())
                correct += weight * sum(map(preferences.right, k_way.by_sequence(rewards, batch), ours))

        # 3. Clip, update at the rate of this step.
        lr = plan.lr * training.cosine_with_warmup(step, plan.steps, params.warmup_share)
        loss, norm = training.update(model.parameters(), optimizer, lr, params.clip_norm, loss, step, context.world)

        # 4. Tell, and keep what has been learned. The accuracy is of the step's pairs, before the update.
        correct = distributed.mean_of(context.world, correct * context.world.size)
        accuracy, seconds = correct / sum(map(len, decided)), time.perf_counter() - began
        context.log(step + 1, loss=loss, lr=lr, grad_norm=norm, accuracy=accuracy)
        context.progress(step + 1, plan.steps, loss=loss, accuracy=accuracy)
        context.measure(peak_memory_mb=hardware.peak_memory_bytes() / 2**20)
        context.measure(tokens_per_second=plan.tokens * (step + 1) / plan.steps / seconds)
        due, stop = context.after_step(checkpoints.due(step + 1) or step + 1 == plan.steps)
        if due:
            learned = {"trained": training.trained_state(model), "optimizer": training.optimizer_state(optimizer)}
            if context.world.leads:
                checkpoints.save(
                    step + 1,
                    {
                        **learned,
                        "step": step + 1,
                        "log_probabilities": state["log_probabilities"],
                        "random": training.random_state(),
                        "history": context.history,
                        "seconds": seconds,
                    },
                )
        if stop:
            context.stop_if_asked()
