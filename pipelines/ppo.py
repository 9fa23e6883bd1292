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
whole batch, the value loss clipped, a lower score for a response that does not end, Adam's epsilon 1e-5. Departures:

1. `method: lora`: one backbone carries policy, reference (no adapter), value and reward (`core/actors.py`); rates are
   ten times those of all weights, and follow the width.
2. Several episodes a prompt, which is then encoded once for all of them; the paper draws one.
3. Both losses are means over tokens, so `ptx_coefficient` is not the paper's 27.8: the ratio of the norms of the two
   gradients is logged.
4. No moving average of the weights: it pays over thousands of steps, not over tens.
5. The value model's scale and level are fitted to the first batch's returns, by least squares: the reward model is
   only trained to read whole responses.
6. A response's score counts as what it is above those of the others to its prompt (`group_baseline`): a value model of
   hundreds of episodes cannot tell easy prompts from hard ones, and that would be most of the gradient's noise.
7. A response without an end loses `missing_eos_penalty`. A fixed score, as in Stiennon et al., is a prize where the
   reward model likes no answer to a prompt.
8. A second run without the pre-training gradient, from the same start (`without_ptx`), tells what it is good for. It
   is there to be compared with: a guard that stops it, or a divergence, ends that run alone, and is told on the card.
9. By default the KL coefficient is 0.2 (paper: 0.02) and a batch 64 episodes (paper: 512): a reward model of a few
   hundred rankings is worth following for a nat or two only (docs/notes.md).
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.core import artifacts, distributed, guards, language_models, ppo_setup
from pipelines.core.context import StageContext, Stopped
from pipelines.core.errors import ArtifactError, DataError, UserError
from pipelines.core.params.ppo import PpoParams
from pipelines.core.ppo_setup import Plan, Task

if TYPE_CHECKING:
    from pipelines.core.actors import Actors
    from pipelines.core.episodes import Episodes
    from pipelines.core.phases import Phases
    from pipelines.core.ppo_step import Learner

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
        "trained_share",
        # where prompts can be judged
        "gold_win_rate", "gold_win_rate_low", "gold_win_rate_high", "gold", "gold_sft", "gold_gain", "gold_gain_low",
        "gold_gain_high", "gold_greedy", "gold_greedy_sft", "best_of_n_gold_at_equal_kl", "best_of_n_at_equal_kl",
        "best_of_n_reached",
        # with a second arm
        "alignment_tax_bits_without_ptx", "alignment_tax_bits_without_ptx_low", "alignment_tax_bits_without_ptx_high",
        "ptx_repairs", "ptx_repairs_low", "ptx_repairs_high",  # where it came to its end
        "without_ptx_stopped_after",  # iterations, where it did not
    }
)  # fmt: skip
SCORES = frozenset(
    {
        "judged", "gold", "gold_sft", "wins", "chance", "gold_greedy", "gold_greedy_sft", "gold_best_of_n", "proxy",
        "proxy_sft", "kl", "tokens", "tokens_sft", "ended", "ended_sft", "distinct", "distinct_sft",
    }
)  # fmt: skip


class Arm(NamedTuple):
    """One of the runs from the same start: with the pre-training gradient, or without."""

    name: str  # prefix of its columns in the history, and of its checkpoints
    ptx: float  # coefficient

    @property
    def checkpoints(self) -> str:
        """Name of their directory."""
        return f"{self.name}checkpoints"


def run(params: PpoParams, inputs: dict[str, Path], outputs: Path, context: StageContext) -> dict[str, float]:
    """Train the arms, save the policy, and measure what was saved on prompts and text it has not seen.

    Raises:
        ParamsError, DataError, ArtifactError: prompts, models or rewards that do not fit, a reward that cannot be
            used, a guard that has fired on the policy; the last good checkpoint is kept.
        Stopped: a signal came; the checkpoint is written.
    """
    from pipelines.core import alignment_tax, policy_answers, policy_card, policy_evaluation, training

    # 1. Prompts, reward, the four roles, and how long and how fast.
    sft = inputs["sft"] / "model"
    tokenizer = language_models.load_tokenizer(str(sft))
    prompts = ppo_setup.prompts(params, inputs["data"], tokenizer, context)
    held_out = policy_answers.held_out(params, inputs["data"], tokenizer, context)
    rewards = params.rewards or (str(inputs["reward"] / "model"),)
    load_rewards = partial(ppo_setup.rewards, rewards, context.root, tokenizer, context)
    actors = ppo_setup.roles(params, inputs, context)
    score = None if actors.reward_head is not None else partial(ppo_setup.score, load_rewards())
    task = Task(tokenizer, prompts, score, inputs["data"], {})
    plan = ppo_setup.plan(params, actors)

    # 2. Train: with the pre-training gradient, and for comparison without it; each from the same start.
    arms = {Arm("", params.ptx_coefficient): outputs / "model"}
    if params.without_ptx:
        arms[Arm("plain_", 0.0)] = context.work / "plain"
    start, parameters, ended = actors.trained_state(), 0, ""
    for arm, place in arms.items():
        actors.load_trained_state(start)
        try:
            _train(arm, params, plan, actors, task, context)
        except (ArtifactError, DataError) as error:
            if not (arm.name and isinstance(error, guards.Fired | training.Diverged)):
                left = ppo_setup.kept(ppo_setup.checkpoints(arm.checkpoints, params, context), error, context)
                error.args = (f"{error} {left}",)
                raise
            ended = f"The run to compare with came to no end: {error}"
            context.say(ended)
        if context.world.leads:
            shutil.rmtree(place, ignore_errors=True)
            parameters = actors.save(place, tokenizer, context)
    if not context.world.leads:
        return {}
    trained = actors.report()
    del actors, task, score
    context.write_history(outputs / "history.csv")

    # 3. Measure what was saved: answers to held-out prompts beside the SFT model's, and the alignment tax.
    proxy = partial(ppo_setup.text_scores, load_rewards())
    compared, found = policy_evaluation.evaluate(params, held_out, outputs / "model", sft, proxy, outputs, context)
    columns = (alignment_tax.POLICY, alignment_tax.PLAIN)
    models = {alignment_tax.SFT: sft} | dict(zip(columns, arms.values(), strict=False))
    metrics = {
        **found,
        **alignment_tax.evaluate(inputs["data"], params.eval_bytes, models, outputs, context),
        "prompts_test": float(len(held_out)),
        "episodes": float(params.iterations * params.episodes),
        "steps": float(plan.steps),
        **trained.metrics(),
        "parameters": float(parameters),
    }
    if ended:
        metrics = alignment_tax.of_stopped(metrics, sum("plain_kl" in row for row in context.history))
    samples = policy_card.samples(compared, params.samples)
    context.say(samples)
    artifacts.write_text(outputs / "samples.md", samples)
    how = (
        f"PPO on {metrics['episodes']:.0f} episodes ({plan.steps} optimizer steps, {params.method}), KL coefficient "
        f"{params.kl_coefficient:g}, coefficient of the pre-training gradient {params.ptx_coefficient:g}. {ended}"
    ).rstrip()
    card = policy_card.card(json.loads((outputs / "model/config.json").read_text())["model_type"], how, metrics)
    artifacts.write_text(outputs / "model" / "README.md", card)
    return metrics


def measure(params: PpoParams, inputs: dict[str, Path], context: StageContext, model: Path, evaluation: Path) -> None:
    """Ask another policy, such as today's champion, what `run` asks; writes its columns of gold."""
    from pipelines.core import policy_evaluation

    policy_evaluation.measure(params, inputs, context, model, evaluation)


def _train(arm: Arm, params: PpoParams, plan: Plan, actors: Actors, task: Task, context: StageContext) -> None:
    """The loop of one arm, from where a killed run has left a checkpoint of it.

    Raises:
        UserError: the reward cannot be used, or a guard has stopped the run; the last good checkpoint is kept.
    """
    from pipelines.core import episodes, policy_gradient, ppo_figures, ppo_step, ptx
    from pipelines.core.phases import Phases

    checkpoints = ppo_setup.checkpoints(arm.checkpoints, params, context)
    state = distributed.from_leader(context.world, lambda: checkpoints.newest() or {"iteration": 0})
    learner = _learner(params, plan, actors, state)
    if state["iteration"]:
        context.say(f"resuming after iteration {state['iteration']} of {params.iterations}")
        context.resume(state["history"])
    coefficient = state.get("coefficient", params.kl_coefficient)
    text = ptx.rows(params, plan.steps, task.data, task.tokenizer, context) if arm.ptx else None
    pretraining = ppo_step.Pretraining(text, arm.ptx) if text else None
    phases = Phases(actors, params, state.get("spent", {}), context, arm.name)
    for iteration in range(state["iteration"], params.iterations):
        # 1. Generate and score: responses of the policy, and what the four roles say of every token.
        try:
            found = _experience(arm, params, actors, task, iteration, phases, context)
        except (Stopped, UserError):  # a signal, or a reward that cannot be used
            if iteration > checkpoints.last and context.world.leads:  # the weights are still those after it
                ppo_setup.keep(checkpoints, iteration, learner, coefficient, phases, context)
            raise

        # 2. Advantages: the reward where a response ends, less each token's KL penalty, credited by GAE.
        mask, credited = found.rollout.mask, episodes.credited(found, params)
        rewards = policy_gradient.token_rewards(found.log_ratios, credited, mask, coefficient)
        if iteration == 0:
            found = episodes.fit_values(actors, found, rewards, params.discount)
        estimates = policy_gradient.gae(rewards, found.values, mask, params.discount, params.trace)
        whitened = policy_gradient.whiten(estimates.advantages, mask)
        targets = ppo_step.Targets(found, whitened, estimates.returns)

        # 3. Update, at the rate of this iteration.
        share = iteration / params.warmup_iterations if iteration < params.warmup_iterations else 1.0
        warm = START + (1 - START) * share
        learner = learner._replace(lr=warm * plan.lr, value_lr=warm * plan.value_lr)
        seen = ppo_step.take_all(learner, targets, pretraining, iteration, params, phases, context)

        # 4. Tell, and stop before the policy is spoiled.
        told = {
            **ppo_figures.figures(found, coefficient, estimates.returns, params.judge),
            **seen,
            "kl_coefficient": coefficient,
            "lr": learner.lr,
        }
        context.log(iteration + 1, **{arm.name + key: value for key, value in told.items()})
        context.progress(iteration + 1, params.iterations, score=told["score"], kl=told["kl"])
        if iteration in (0, params.iterations - 1):
            title = f"Rollouts of {arm.name}iteration {iteration + 1}"
            context.say(ppo_figures.page(found, coefficient, params.samples, title))
        guards.watch(params, context.history, arm.name)
        if params.kl_target is not None:
            measured = (told["kl"], params.kl_target, params.kl_horizon, len(mask))
            coefficient = policy_gradient.next_coefficient(coefficient, *measured)

        # 5. Keep what has been learned.
        due, stop = context.after_step(checkpoints.due(iteration + 1) or iteration + 1 == params.iterations)
        if due and context.world.leads:
            ppo_setup.keep(checkpoints, iteration + 1, learner, coefficient, phases, context)
        if stop:
            context.stop_if_asked()
    ppo_step.check_count(learner, plan.steps)
    if not arm.name:
        phases.report()


def _experience(
    arm: Arm, params: PpoParams, actors: Actors, task: Task, iteration: int, phases: Phases, context: StageContext
) -> Episodes:
    """One iteration's episodes, scored; before the first update they are held against the self-test."""
    from pipelines.core import episodes, reward_functions, self_test

    if iteration in task.begun:
        return task.begun[iteration]
    chosen = episodes.prompts_of(params.seed, iteration, params.batch_prompts, len(task.prompts))
    prompts = [task.prompts[number] for number in chosen]
    with phases.of("generate"):
        tell = partial(ppo_setup.tell, context, f"{arm.name}{iteration + 1} of {params.iterations}")
        rollout = episodes.generate(actors, task.tokenizer, prompts, params, iteration, context, tell)
    with phases.of("score"):
        before = params.iterations - (iteration > 0) if arm.name else 0  # whose first call the other arm has made
        proxy = None if task.score is None else partial(task.score, call=before + iteration + 1)
        found = episodes.score(actors, rollout, proxy, params, task.tokenizer.pad_token_id, context)
    if iteration == 0:
        group = params.samples_per_prompt if params.group_baseline else None
        name = ", ".join(params.rewards) or "the reward model"
        reward_functions.refuse_constant(found.proxy.tolist(), name, group)
        ppo_setup.tell_scale(found.proxy.tolist(), name, context)
        self_test.check(actors, found, params, task.tokenizer.eos_token_id, context)
        task.begun[iteration] = found._replace(ahead=[])
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
