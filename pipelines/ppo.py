"""Stage `ppo`: the SFT model trained by proximal policy optimization against the reward model, with PPO-ptx.

In: `data` (prompts, the corpus), `sft` (where the policy starts, and what it must not leave), `reward` (the reward
model; the value model starts from it). Out: `model/` (a Hugging Face model, its tokenizer, a card), `history.csv`
(one row an iteration), `evaluation.parquet` (one row a held-out prompt: gold scores of this policy and of SFT),
`tax.parquet` (one row a held-out text of the corpus: bits), `best_of_n.csv`, `samples.md`.

Paper: Ouyang et al., "Training language models to follow instructions with human feedback" (2022), section 3.5 and
appendix C.4. As there: a KL penalty on every token against the SFT model, no discount, a value model from the
reward model, clipping at 0.2, one inner epoch, Adam with betas (0.9, 0.95), a constant rate after a warm-up from a
tenth, and the pre-training gradient accumulated to the policy's before each step. What the paper does not say is
from its predecessors (Ziegler et al., 2019; Stiennon et al., 2020): GAE with lambda 0.95, advantages whitened over the
whole batch, the value loss clipped, a fixed score for a response that does not end, Adam's epsilon 1e-5. Departures:

1. `method: lora`: one backbone carries policy, reference (no adapter), value and reward (`core/actors.py`); rates are
   ten times those of all weights, and follow the width.
2. Several episodes a prompt, which is then encoded once for all of them; the paper draws one.
3. Both losses are means over tokens, so `ptx_coefficient` is not the paper's 27.8: the ratio of the norms of the two
   gradients is logged.
4. No moving average of the weights: it pays over thousands of steps, not over tens.
5. A second run without the pre-training gradient, from the same start (`without_ptx`), tells what it is good for.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.core import (
    artifacts,
    completions,
    distributed,
    fine_tuning,
    guards,
    language_models,
)
from pipelines.core.checkpoint import Checkpoints
from pipelines.core.completions import Prompt
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError, DataError, ParamsError
from pipelines.core.params.ppo import PpoParams

if TYPE_CHECKING:
    from pipelines.core.actors import Actors
    from pipelines.core.episodes import Episodes, Rollout
    from pipelines.core.phases import Phases
    from pipelines.core.ppo_step import Learner
    from pipelines.core.reward_functions import Reward

PAPER_VALUE_LR, PAPER_VALUE_WIDTH = 9e-6, 4096  # appendix C.4: the 6B value model
PAPER_LR, PAPER_WIDTH = 8.05e-6, 2048  # appendix C.4: the largest rate that did not diverge without ptx, 1.3B
ADAM_EPS = 1e-5
START = 0.1  # of the peak rate, where the warm-up begins


METRICS = frozenset(
    {
        "kl", "proxy", "proxy_sft", "response_tokens", "response_tokens_sft", "eos_share", "alignment_tax_bits",
        "alignment_tax_bits_low", "alignment_tax_bits_high", "prompts_test", "episodes", "steps", "trained_parameters",
        "parameters",
    }
)  # fmt: skip
OPTIONAL = frozenset(
    {
        # where prompts can be judged
        "gold_win_rate", "gold_win_rate_low", "gold_win_rate_high", "gold", "gold_sft", "gold_gain", "gold_gain_low",
        "gold_gain_high", "gold_greedy", "gold_greedy_sft", "best_of_n_gold_at_equal_kl", "best_of_n_at_equal_kl",
        "best_of_n_reached",
        # with a second arm
        "alignment_tax_bits_without_ptx", "alignment_tax_bits_without_ptx_low", "alignment_tax_bits_without_ptx_high",
        "ptx_repairs", "ptx_repairs_low", "ptx_repairs_high",
    }
)  # fmt: skip
SCORES = frozenset({"gold", "gold_sft", "wins", "chance", "proxy", "proxy_sft", "kl", "gold_greedy", "gold_greedy_sft"})


class Plan(NamedTuple):
    """Numbers that follow from the params and the model."""

    steps: int  # of either optimizer, in a run
    lr: float
    value_lr: float


class Task(NamedTuple):
    """What is to be learned: prompts, and what scores the responses where the reward is none of the actors' roles."""

    tokenizer: Any
    prompts: list[Prompt]
    score: Callable[[Rollout, int], list[float]] | None  # of a rollout and the number of the call, from 1
    data: Path


class Arm(NamedTuple):
    """One of the runs from the same start: with the pre-training gradient, or without."""

    name: str  # prefix of its columns in the history, and of its checkpoints
    ptx: float  # coefficient


def run(params: PpoParams, inputs: dict[str, Path], outputs: Path, context: StageContext) -> dict[str, float]:
    """Train the arms, save the policy, and measure what was saved on prompts and text it has not seen.

    Raises:
        ParamsError, DataError, ArtifactError: prompts, models or rewards that do not fit, a reward that cannot be
            used, a guard that has fired; the last good checkpoint is kept.
        Stopped: a signal came; the checkpoint is written.
    """
    from pipelines.core import reward_functions

    # 1. Prompts, reward, the four roles, and how long and how fast.
    sft = inputs["sft"] / "model"
    tokenizer = language_models.load_tokenizer(str(sft))
    train, held_out = _prompts(params, inputs, tokenizer)
    own = (str(inputs["reward"] / "model"),)
    load_rewards = partial(reward_functions.load, params.rewards or own, context.root, tokenizer, context)
    actors = _actors(params, inputs, context)
    score = None if actors.reward_head is not None else partial(_score, load_rewards())
    task = Task(tokenizer, train, score, inputs["data"])
    plan = _plan(params, actors)

    # 2. Train: with the pre-training gradient, and for comparison without it; each from the same start.
    arms = {Arm("", params.ptx_coefficient): outputs / "model"}
    if params.without_ptx:
        arms[Arm("plain_", 0.0)] = context.work / "plain"
    start, parameters = actors.trained_state(), 0
    for arm, place in arms.items():
        actors.load_trained_state(start)
        _train(arm, params, plan, actors, task, context)
        if context.world.leads:
            shutil.rmtree(place, ignore_errors=True)
            parameters = actors.save(place, tokenizer, context)
    if not context.world.leads:
        return {}
    trained = sum(value.numel() for role in ("policy", "value") for value in actors.trained(role))
    del actors, task
    context.write_history(outputs / "history.csv")

    # 3. Measure what was saved: answers to held-out prompts beside those of the SFT model, and the alignment tax.
    return {}


def _train(arm: Arm, params: PpoParams, plan: Plan, actors: Actors, task: Task, context: StageContext) -> None:
    """The loop of one arm, from where a killed run has left a checkpoint of it.

    Raises:
        UserError: the reward cannot be used, or a guard has stopped the run; the last good checkpoint is kept.
    """
    from pipelines.core import policy_gradient, ppo_figures, ppo_step, ptx, training
    from pipelines.core.phases import Phases

    place = context.work / f"{arm.name}checkpoints"
    checkpoints = Checkpoints(place, context.fingerprint, params.checkpoint_steps, params.checkpoint_seconds)
    state = distributed.from_leader(context.world, lambda: checkpoints.newest() or {"iteration": 0})
    learner = _learner(params, plan, actors, state)
    if state["iteration"]:
        context.say(f"resuming after iteration {state['iteration']} of {params.iterations}")
        context.resume(state["history"])
    coefficient = state.get("coefficient", params.kl_coefficient)
    pretraining = None
    if arm.ptx:
        rows = ptx.rows(params, plan.steps, task.data, task.tokenizer, context)
        pretraining = ppo_step.Pretraining(rows, arm.ptx)
    phases = Phases(actors, params, state.get("spent", {}), context)
    for iteration in range(state["iteration"], params.iterations):
        # 1. Generate and score: responses of the policy, and what the four roles say of every token.
        found = _experience(arm, params, actors, task, iteration, phases, context)

        # 2. Advantages: the reward where a response ends, less each token's KL penalty, credited by GAE.
        mask = found.rollout.mask
        rewards = policy_gradient.token_rewards(found.log_ratios, found.scores, mask, coefficient)
        estimates = policy_gradient.gae(rewards, found.values, mask, params.discount, params.trace)
        whitened = policy_gradient.whiten(estimates.advantages, mask)
        targets = ppo_step.Targets(found, whitened, estimates.returns)

        # 3. Update: `epochs` times over the minibatches, one step of either optimizer on each.
        warm = min(1.0, START + (1 - START) * iteration / max(1, params.warmup_iterations))
        learner = learner._replace(lr=warm * plan.lr, value_lr=warm * plan.value_lr)
        seen, step = [], iteration * params.epochs * params.minibatches
        with phases.of("update"):
            for minibatch in found.minibatches * params.epochs:
                seen.append(ppo_step.take(learner, targets, minibatch, pretraining, step + len(seen), params, context))
        phases.end(iteration, found, pretraining is not None)

        # 4. Tell, and stop before the policy is spoiled.
        told = {
            **ppo_figures.figures(found, rewards, estimates.returns, params.judge),
            **{name: sum(one[name] for one in seen) / len(seen) for name in seen[0]},
            "kl_coefficient": coefficient,
            "lr": learner.lr,
        }
        context.log(iteration + 1, **{arm.name + key: value for key, value in told.items()})
        context.progress(iteration + 1, params.iterations, score=told["score"], kl=told["kl"])
        _guard(arm, params, context)
        if params.kl_target is not None:
            measured = (told["kl"], params.kl_target, params.kl_horizon, len(mask))
            coefficient = policy_gradient.next_coefficient(coefficient, *measured)

        # 5. Keep what has been learned.
        due, stop = context.after_step(checkpoints.due(iteration + 1) or iteration + 1 == params.iterations)
        if due and context.world.leads:
            kept = {role: training.optimizer_state(getattr(learner, role)) for role in ("policy", "value")}
            kept |= {"trained": actors.trained_state(), "iteration": iteration + 1, "coefficient": coefficient}
            checkpoints.save(iteration + 1, kept | {"history": context.history, "spent": phases.spent})
        if stop:
            context.stop_if_asked()
    _check_steps(learner, plan)
    if not arm.name:
        phases.report()


def _experience(
    arm: Arm, params: PpoParams, actors: Actors, task: Task, iteration: int, phases: Phases, context: StageContext
) -> Episodes:
    """One iteration's episodes, scored; before the first update they are held against the self-test."""
    from pipelines.core import episodes, reward_functions, self_test

    chosen = episodes.prompts_of(params.seed, iteration, params.batch_prompts, len(task.prompts))
    prompts = [task.prompts[number] for number in chosen]
    with phases.of("generate"):
        tell = partial(_tell, context, f"{arm.name}{iteration + 1} of {params.iterations}")
        rollout = episodes.generate(actors, task.tokenizer, prompts, params, iteration, context, tell)
    with phases.of("score"):
        proxy = None if task.score is None else partial(task.score, call=iteration + 1)
        found = episodes.score(actors, rollout, proxy, params, task.tokenizer.pad_token_id, context)
    if iteration == 0:
        reward_functions.refuse_constant(found.proxy.tolist(), ", ".join(params.rewards) or "the reward model")
        self_test.check(actors, found, params, task.tokenizer.eos_token_id, context)
    return found


def _learner(params: PpoParams, plan: Plan, actors: Actors, state: dict[str, Any]) -> Learner:
    """Both optimizers over what the actors train, as they are at the start or in a checkpoint."""
    from pipelines.core import training
    from pipelines.core.ppo_step import Learner

    if state["iteration"]:
        actors.load_trained_state(state["trained"])
    policy = training.adamw(actors.trained("policy"), plan.lr, params.weight_decay, ADAM_EPS)
    value = training.adamw(actors.trained("value"), plan.value_lr, params.weight_decay, ADAM_EPS)
    if state["iteration"]:
        training.load_optimizer_state(policy, state["policy"])
        training.load_optimizer_state(value, state["value"])
    return Learner(actors, policy, value, plan.lr, plan.value_lr)


def _guard(arm: Arm, params: PpoParams, context: StageContext) -> None:
    """Stop a run that is being spoiled; its last good checkpoint stays where it is.

    Raises:
        ArtifactError: a guard has fired.
    """
    limits = guards.Guards(params.kl_ceiling, params.entropy_floor, params.cap_share)
    rows = [
        {key.removeprefix(arm.name): value for key, value in row.items()}
        for row in context.history
        if f"{arm.name}kl" in row
    ]
    if (problem := guards.check(limits, rows)) is not None:
        raise ArtifactError(f"ppo stopped after iteration {len(rows)}: {problem}")


def _check_steps(learner: Learner, plan: Plan) -> None:
    """Both optimizers have made as many steps as were planned: each counts its own.

    Raises:
        AssertionError: they have not.
    """
    for name, optimizer in (("policy", learner.policy), ("value", learner.value)):
        made = {int(state["step"]) for state in optimizer.state.values()}
        assert made == {plan.steps}, f"{name}: {made} optimizer steps were made, {plan.steps} were planned"


def _prompts(params: PpoParams, inputs: dict[str, Path], tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, as many as the run can use, and held-out ones.

    Raises:
        ArtifactError: the data have no prompts.
        DataError: there is none, or one is too long.
    """
    found = []
    for split, count in (("train", params.iterations * params.batch_prompts), ("test", params.eval_prompts)):
        judged = params.judge == "overlap" and split == "test"
        chosen, _ = completions.choose(params, inputs["data"], split, count, tokenizer, judged)
        if not chosen:
            raise DataError(
                f"prompts/{split} has no prompt{' with a reference' if judged else ''} that ppo could use; accepted: at "
                "least one. Give data.sources a file with table: prompts."
            )
        found.append(chosen)
    return found[0], found[1]


def _actors(params: PpoParams, inputs: dict[str, Path], context: StageContext) -> Actors:
    """The roles, on one backbone where adapters are trained.

    Raises:
        ParamsError: prompt and response do not fit the model's context; the model is to be split.
    """
    from transformers import AutoConfig

    from pipelines.core import actors, k_way, sampling, scoring

    if context.world.size > 1 and context.world.sharding == "full":
        raise ParamsError("compute.sharding: ppo cannot split its model, which samples while it learns; set none")
    sft, reward = inputs["sft"] / "model", inputs["reward"]
    room = sampling.context_length(AutoConfig.from_pretrained(sft))
    need = params.max_prompt_tokens + params.max_new_tokens
    if room is not None and max(need, params.ptx_length) > room:
        raise ParamsError(
            f"ppo.max_prompt_tokens + ppo.max_new_tokens is {need} and ppo.ptx_length {params.ptx_length} tokens; the SFT "
            f"model's context is {room}: lower them"
        )
    longest = max(k_way.ROW_TOKENS, need * params.samples_per_prompt, params.ptx_length, scoring.WINDOW)
    own = not params.rewards
    if params.method == "full":
        return actors.separate(sft, reward / "model" if own else None, longest, params.seed, context)
    adapted = own and (reward / "adapter").is_dir()  # one that was trained whole is a model of its own
    return actors.shared(sft, reward if adapted else None, params.lora_rank, longest, params.seed, context)


def _plan(params: PpoParams, actors: Actors) -> Plan:
    """How long, how fast: from the params where they say so, else from the model's width."""
    width = actors.value_head.weight.shape[1]
    factor = fine_tuning.LORA_FACTOR if params.method == "lora" else 1.0
    return Plan(
        steps=params.iterations * params.epochs * params.minibatches,
        lr=params.lr or PAPER_LR * PAPER_WIDTH / width * factor,
        value_lr=params.value_lr or PAPER_VALUE_LR * PAPER_VALUE_WIDTH / width * factor,
    )


def _score(rewards: list[Reward], rollout: Rollout, call: int) -> list[float]:
    """Scores of a rollout's responses by what is none of the actors' roles."""
    from pipelines.core import reward_functions

    prompts = [one.text for one, said in zip(rollout.prompts, rollout.responses, strict=True) for _ in said]
    responses = [text for said in rollout.responses for text in said]
    return reward_functions.score(rewards, prompts, responses, call).values


def _tell(context: StageContext, where: str, done: int, total: int) -> None:
    """Progress within an iteration; the last moment at which nothing of it would be lost."""
    context.progress(done, total, sampling=where)
    context.stop_if_asked()
