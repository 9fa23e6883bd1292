"""Stage `dpo`: the SFT model trained on rankings directly, without a reward model and without sampling.

In: `data` (prompts and the corpus, to measure with), `sft` (where the policy starts, and what it must not leave),
`feedback` (rankings), `reward` (what best-of-n chooses by, and the proxy that is told beside gold; nothing is trained
on it). Out: `model/` (a Hugging Face model, its tokenizer, a card), `history.csv`, `evaluation.parquet` (one row a
held-out prompt: gold scores of this policy and of SFT), `rankings.parquet` (one row a held-out ranking: pairs that the
implicit reward puts in the right order), `tax.parquet` (one row a held-out text of the corpus: bits), `best_of_n.csv`,
`samples.md`.

Paper: Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" (2023), section
4 and appendix B. As there: a linear warm-up. Departures:

1. All pairs of K responses are one batch element, as in InstructGPT's reward model; K = 2 is the paper's loss.
2. AdamW and a cosine after the warm-up in place of RMSprop and a constant rate.
3. `method: lora`, at ten times the rate of all weights; rates follow the width from the paper's 1e-6 (2.8B).
4. Log-probabilities of the SFT model are computed once, before the first step; dropout is off throughout, so they are
   those of the policy itself, and the loss begins at log 2.
5. By default beta is 0.2 (paper: 0.1, and 0.5 to summarize) and a batch 6 prompts (paper: 64 pairs): a few hundred
   rankings are few steps, and at 0.1 answers forgot to end (docs/notes.md).
"""

from __future__ import annotations

import json
import time
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.core import artifacts, distributed, language_models, preference_data, reward_examples
from pipelines.core.checkpoint import Checkpoints
from pipelines.core.completions import Prompt
from pipelines.core.context import StageContext
from pipelines.core.params.dpo import DpoParams
from pipelines.core.reward_examples import Elements, Examples

PAPER_LR, PAPER_WIDTH = 1e-6, 2560  # appendix B; Pythia-2.8B

if TYPE_CHECKING:
    from pipelines.core import tuning

METRICS = frozenset(
    {
        "accuracy", "accuracy_low", "accuracy_high", "accuracy_length_only", "margin", "pairs_test", "prompts_test",
        "kl", "proxy", "proxy_sft", "response_tokens", "response_tokens_sft", "eos_share", "alignment_tax_bits",
        "alignment_tax_bits_low", "alignment_tax_bits_high", "comparisons_train", "pairs_train", "dropped_too_long",
        "steps", "epochs", "training_tokens", "trained_parameters", "parameters",
    }
)  # fmt: skip
OPTIONAL = frozenset(
    {
        "trained_share",
        # where prompts can be judged
        "gold_win_rate", "gold_win_rate_low", "gold_win_rate_high", "gold", "gold_sft", "gold_gain", "gold_gain_low",
        "gold_gain_high", "gold_greedy", "gold_greedy_sft", "best_of_n_gold_at_equal_kl", "best_of_n_at_equal_kl",
        "best_of_n_reached",
    }
)  # fmt: skip
SCORES = frozenset(
    {
        "judged", "gold", "gold_sft", "wins", "chance", "gold_greedy", "gold_greedy_sft", "gold_best_of_n", "proxy",
        "proxy_sft", "kl", "tokens", "tokens_sft", "ended", "ended_sft", "distinct", "distinct_sft",
    }
)  # fmt: skip


class Plan(NamedTuple):
    """Numbers that follow from the params, the rankings and the model."""

    steps: int
    lr: float
    tokens: int  # that pass through the model in training
    trained: tuning.Report


class Learned(NamedTuple):
    """What the process that leads knows after training."""

    plan: Plan
    parameters: int
    reference: list[list[float]]  # log-probabilities of the held-out responses under the SFT model


def run(params: DpoParams, inputs: dict[str, Path], outputs: Path, context: StageContext) -> dict[str, float]:
    """Train, save, and measure what was saved on rankings, prompts and text it has not seen.

    Raises:
        ArtifactError: there are no comparisons, or no prompts to measure with.
        DataError: rankings that cannot be learned from, or that would measure what was learned from.
        ParamsError: what is to be read does not fit the model's context.
        Stopped: a signal came; the checkpoint is written.
    """
    from pipelines.core import direct_preference, policy_answers

    # 1. What is learned from, and what is held out.
    tokenizer = language_models.load_tokenizer(str(inputs["sft"] / "model"))
    examples = reward_examples.gather(params, 0, inputs["feedback"], tokenizer, context)
    train, held_out = examples.train, examples.held_out
    prompts = policy_answers.held_out(params, inputs["data"], tokenizer, context)

    # 2. Train and save.
    plan, parameters, reference = _learn(params, inputs["sft"] / "model", examples, tokenizer, outputs, context)
    if not context.world.leads:
        return {}
    context.write_history(outputs / "history.csv")

    # 3. Measure what was saved.
    longer = preference_data.longer_wins(train.rankings)
    metrics = {
        **direct_preference.evaluate(held_out, reference, params.beta, longer, tokenizer, outputs, context),
        "comparisons_train": float(len(train.rankings)),
        "pairs_train": float(sum(len(one.pairs) for one in train.rankings)),
        "dropped_too_long": float(train.dropped + held_out.dropped),
        "prompts_test": float(len(prompts)),
        "steps": float(plan.steps),
        "epochs": float(params.epochs),
        "training_tokens": float(plan.tokens),
        **plan.trained.metrics(),
        "parameters": float(parameters),
    }
    return _evaluate(params, prompts, metrics, inputs, outputs, context)


def measure(params: DpoParams, inputs: dict[str, Path], context: StageContext, model: Path, evaluation: Path) -> None:
    """Ask another policy, such as today's champion, what `run` asks; write `evaluation` with its columns of gold."""
    from pipelines.core import policy_evaluation

    policy_evaluation.measure(params, inputs, context, model, evaluation)


def _learn(
    params: DpoParams, sft: Path, examples: Examples, tokenizer: Any, outputs: Path, context: StageContext
) -> Learned:
    """Train the policy, from where a killed run has left a checkpoint, and save it as `outputs / "model"`."""
    from pipelines.core import direct_preference, fine_tuning, k_way, training

    # 1. The model, and what it thinks of all responses before the first step.
    train, held_out = examples.train, examples.held_out
    elements, pad = reward_examples.by_prompt(train), tokenizer.pad_token_id
    model = _model(params, sft, elements, context)
    plan = _plan(params, model, elements)
    checkpoints = Checkpoints(
        context.work / "checkpoints", context.fingerprint, params.checkpoint_steps, params.checkpoint_seconds
    )

    def start() -> dict[str, Any]:
        if (state := checkpoints.newest()) is not None:
            context.say(f"resuming after step {state['step']} of {plan.steps}")
            return state
        context.say(direct_preference.example(train.rankings[0], train.sequences[0], tokenizer))
        both, tell = elements.sequences + held_out.sequences, k_way.teller(context, "before training")
        every = k_way.log_probabilities(model, both, pad, context, tell)
        return {"step": 0, "train": every[: len(elements.sequences)], "held_out": every[len(elements.sequences) :]}

    state = distributed.from_leader(context.world, start)

    # 2. The loop.
    distributed.shard(model, context.world)
    _train(params, plan, model, elements, pad, state, checkpoints, context)
    trained = training.trained_state(model)
    if not context.world.leads:
        return Learned(plan, 0, [])

    # 3. Save. A model that was split cannot be saved whole: another takes its weights.
    if context.world.sharding == "full":
        model = _model(params, sft, elements, context)
        training.load_trained_state(model, trained)
    plain = fine_tuning.save(model, sft, params, tokenizer, outputs / "model", context)
    return Learned(plan, sum(value.numel() for value in plain.parameters()), state["held_out"])


def _model(params: DpoParams, sft: Path, train: Elements, context: StageContext) -> Any:
    """The policy, on its device, without dropout: the SFT model, to the last bit where adapters begin at zero.

    Raises:
        ParamsError: what it is to read does not fit its context.
    """
    import torch

    from pipelines.core import context_window, fine_tuning, k_way

    torch.manual_seed(params.seed)
    longest = max(k_way.ROW_TOKENS, *(len(one.ids) for one in train.sequences))
    model = fine_tuning.load(sft, params, longest, context)
    answered = params.max_prompt_tokens + params.max_new_tokens
    asked = {"dpo.max_length": params.max_length, "dpo.max_prompt_tokens + dpo.max_new_tokens": answered}
    context_window.check(asked, "the SFT model's context", model.config)
    return model.eval()


def _plan(params: DpoParams, model: Any, train: Elements) -> Plan:
    """How long, how fast: from the params where they say so, else from the model's size."""
    from pipelines.core import fine_tuning, tuning

    return Plan(
        steps=params.epochs * -(-len(train.sequences) // params.batch_prompts),
        lr=params.lr or PAPER_LR * PAPER_WIDTH / model.config.hidden_size * fine_tuning.rate_factor(params.method),
        tokens=params.epochs * sum(len(one.ids) for one in train.sequences),
        trained=tuning.report(model),
    )


def _train(
    params: DpoParams,
    plan: Plan,
    model: Any,
    train: Elements,
    pad: int,
    state: dict[str, Any],
    checkpoints: Checkpoints,
    context: StageContext,
) -> None:
    """The loop. `state` is where to start: what a checkpoint holds, or step 0 and what was measured before it."""
    from pipelines.core import direct_preference, hardware, k_way, training, tuning

    optimizer = training.optimizer(model, params, plan.lr, params.weight_decay)
    if state["step"]:
        training.load_trained_state(model, state["trained"])
        training.load_optimizer_state(optimizer, state["optimizer"])
        context.resume(state["history"])
    began = time.perf_counter() - state.get("seconds", 0.0)
    for step in range(state["step"], plan.steps):
        # 1. The prompts of this step.
        numbers = reward_examples.drawn(params.seed, step, plan.steps // params.epochs, len(train.sequences))
        share = Elements([train.sequences[n] for n in numbers], [train.pairs[n] for n in numbers])
        known = [state["train"][number] for number in numbers]

        # 2. Gradients, accumulated over forward passes; each prompt of the step weighs the same.
        batches = k_way.batches(share.sequences, params.micro_tokens, pad)
        step_of = (model, batches, share.pairs, known, params.beta, context)
        with tuning.unfreezing(model, params, step, plan.steps):
            loss, accuracy, margin = direct_preference.accumulate(*step_of)

        # 3. Clip, update at the rate of this step.
        lr = plan.lr * training.cosine_with_warmup(step, plan.steps, params.warmup_share)
        loss, norm = training.update(model.parameters(), optimizer, lr, params.clip_norm, loss, step, context.world)

        # 4. Tell, and keep what has been learned. Accuracy and margin are of the step's pairs, before the update.
        seconds = time.perf_counter() - began
        context.log(step + 1, loss=loss, lr=lr, grad_norm=norm, accuracy=accuracy, margin=margin)
        context.progress(step + 1, plan.steps, loss=loss, accuracy=accuracy)
        context.measure(peak_memory_mb=hardware.peak_memory_bytes() / 2**20)
        context.measure(tokens_per_second=plan.tokens * (step + 1) / plan.steps / seconds)
        due, stop = context.after_step(checkpoints.due(step + 1) or step + 1 == plan.steps)
        if due:
            learned = {"trained": training.trained_state(model), "optimizer": training.optimizer_state(optimizer)}
            if context.world.leads:
                reached = {"step": step + 1, "history": context.history, "seconds": seconds}
                checkpoints.save(step + 1, {"train": state["train"], "held_out": state["held_out"]} | learned | reached)
        if stop:
            context.stop_if_asked()


def _proxy(place: Path, context: StageContext, prompts: list[str], responses: list[str]) -> list[float]:
    """What the reward model in a directory says of responses to prompts; equal prompts stand side by side."""
    from pipelines.core import k_way, reward_model

    groups = groupby(zip(prompts, responses, strict=True), key=itemgetter(0))
    items = [(prompt, [response for _, response in both]) for prompt, both in groups]
    model, tokenizer = reward_model.load(place, context)
    scores = reward_model.score(model, tokenizer, items, context, k_way.teller(context, "rewards of answers"))
    return [value for one in scores for value in one]


def _evaluate(
    params: DpoParams,
    prompts: list[Prompt],
    metrics: dict[str, float],
    inputs: dict[str, Path],
    outputs: Path,
    context: StageContext,
) -> dict[str, float]:
    """Answers to held-out prompts beside those of the SFT model, the alignment tax, and pages for people."""
    from pipelines.core import alignment_tax, policy_card, policy_evaluation

    model, sft = outputs / "model", inputs["sft"] / "model"
    proxy = partial(_proxy, inputs["reward"] / "model", context)
    compared, found = policy_evaluation.evaluate(params, prompts, model, sft, proxy, outputs, context)
    models = {alignment_tax.POLICY: model, alignment_tax.SFT: sft}
    metrics = metrics | found | alignment_tax.evaluate(inputs["data"], params.eval_bytes, models, outputs, context)
    page = policy_card.samples(compared, params.samples)
    context.say(page)
    artifacts.write_text(outputs / "samples.md", page)
    weights = params.words(where="")
    how = (
        f"Trained from the SFT model by direct preference optimization (beta {params.beta:g}): {weights}, on "
        f"{metrics['comparisons_train']:,.0f} rankings ({metrics['pairs_train']:,.0f} pairs, {metrics['steps']:.0f} "
        f"steps). As a reward model it puts {metrics['accuracy']:.1%} of held-out pairs in the right order (length "
        f"alone {metrics['accuracy_length_only']:.1%})."
    )
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    artifacts.write_text(model / "README.md", policy_card.card(config["model_type"], how, metrics))
    return metrics
