"""What PPO starts from: prompts, the four roles, the reward, how long and how fast."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import pstdev
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.core import completions, guards
from pipelines.core.checkpoint import Checkpoints
from pipelines.core.completions import Prompt
from pipelines.core.context import StageContext
from pipelines.core.errors import DataError, ParamsError
from pipelines.core.params.ppo import PpoParams

if TYPE_CHECKING:
    from pipelines.core.actors import Actors
    from pipelines.core.episodes import Episodes, Rollout
    from pipelines.core.phases import Phases
    from pipelines.core.ppo_step import Learner
    from pipelines.core.reward_functions import Reward, Scores

PAPER_VALUE_LR, PAPER_VALUE_WIDTH = 9e-6, 4096  # appendix C.4: the 6B value model
PAPER_LR, PAPER_WIDTH = 8.05e-6, 2048  # appendix C.4: the largest rate that did not diverge without ptx, 1.3B
# Standard deviations of a first batch's scores for which dials that are meant for one near 1 are of the right order.
LEAST_SPREAD, MOST_SPREAD = 0.05, 20.0


class Plan(NamedTuple):
    """Numbers that follow from the params and the model."""

    steps: int  # of either optimizer, in a run
    lr: float
    value_lr: float


class Task(NamedTuple):
    """What is to be learned: prompts, and what scores the responses where the reward is none of the actors' roles."""

    tokenizer: Any
    prompts: list[Prompt]
    score: Callable[..., Scores] | None  # (rollout, call=number of the call from 1)
    data: Path
    begun: dict[int, Episodes]  # the first iteration's, which are the same in every arm, once one has made them


def prompts(params: PpoParams, data: Path, tokenizer: Any, context: StageContext) -> list[Prompt]:
    """Prompts to train on, as many as the run can use; how many were too long is said.

    Raises:
        ArtifactError: the data have no prompts.
        DataError: there is none, or one is too long.
    """
    limits = completions.Limits("ppo", params.seed, params.max_prompt_tokens, params.too_long)
    wanted = params.iterations * params.batch_prompts
    found, dropped = completions.choose(limits, data, "train", wanted, tokenizer, with_reference=False)
    completions.tell_dropped(dropped, len(found), limits, "train", context)
    if not found:
        raise DataError("prompts/train has no prompt; one at least is needed: give data.sources table: prompts")
    return found


def roles(params: PpoParams, inputs: dict[str, Path], context: StageContext) -> Actors:
    """The roles, on one backbone where adapters are trained.

    Raises:
        ParamsError: prompt and response do not fit the context of the policy or of a reward model; the model is to be
            split.
    """
    from transformers import AutoConfig

    from pipelines.core import actors, context_window, k_way, scoring

    if context.world.size > 1 and context.world.sharding == "full":
        raise ParamsError("compute.sharding: ppo cannot split its model, which samples while it learns; set none")
    sft, reward = inputs["sft"] / "model", inputs["reward"]
    need = params.max_prompt_tokens + params.max_new_tokens
    asked = {"ppo.max_prompt_tokens + ppo.max_new_tokens": need}
    if params.ptx_coefficient:
        asked["ppo.ptx_length"] = params.ptx_length
    context_window.check(asked, "the SFT model's context", AutoConfig.from_pretrained(sft))
    # A reward model reads a response as text, with EOS even where the policy has not come to it.
    read = {"ppo.max_prompt_tokens + ppo.max_new_tokens, with EOS,": need + 1}
    for name in params.rewards or (str(reward / "model"),):
        place = context.root / Path(name).expanduser()
        if (place / "config.json").is_file():  # of anything else the loading tells
            context_window.check(read, f"the context of the reward model {name}", AutoConfig.from_pretrained(place))
    longest = max(k_way.ROW_TOKENS, need * params.samples_per_prompt, params.ptx_length, scoring.WINDOW)
    own = not params.rewards
    if params.method == "full":
        return actors.separate(sft, reward / "model" if own else None, longest, params.seed, context)
    adapted = own and (reward / "adapter").is_dir()  # one that was trained whole is a model of its own
    made = actors.shared(sft, reward if adapted else None, params, longest, params.seed, context)
    made.side_by_side &= (
        2 * (need + (params.samples_per_prompt - 1) * (params.max_new_tokens + 1)) < params.micro_tokens
    )
    return made


def plan(params: PpoParams, actors: Actors) -> Plan:
    """How long, how fast: from the params where they say so, else from the model's width."""
    from pipelines.core import fine_tuning

    width = actors.value_head.weight.shape[1]
    factor = fine_tuning.rate_factor(params.method)
    return Plan(
        steps=params.iterations * params.epochs * params.minibatches,
        lr=params.lr or PAPER_LR * PAPER_WIDTH / width * factor,
        value_lr=params.value_lr or PAPER_VALUE_LR * PAPER_VALUE_WIDTH / width * factor,
    )


def rewards(names: Sequence[str], root: Path, tokenizer: Any, context: StageContext) -> list[Reward]:
    """What scores responses. Files of the user's that it imports are told: DVC watches those that are named alone."""
    from pipelines.core import reward_functions

    before = set(sys.modules)
    found = reward_functions.load(names, root, tokenizer, context)
    ours = ("pipelines.", reward_functions.MODULE)  # the second: the files that are named
    new = [module for name, module in list(sys.modules.items()) if name not in before and not name.startswith(ours)]
    files = {Path(file) for module in new if (file := getattr(module, "__file__", None))}
    installed = [Path(prefix) for prefix in (sys.prefix, sys.base_prefix) if Path(prefix).is_relative_to(root)]
    own = [file for file in files if file.is_relative_to(root) and not any(map(file.is_relative_to, installed))]
    if strange := sorted(file.relative_to(root).as_posix() for file in own):
        context.say(
            f"ppo.rewards: {', '.join(names)} imports {', '.join(strange)}: after a change of that DVC runs stage ppo "
            "again only if you have named it among the stage's deps in dvc.yaml"
        )
    return found


def score(rewards: list[Reward], rollout: Rollout, call: int) -> Scores:
    """Scores of a rollout's responses by what is none of the actors' roles; `call` counts from 1, over both runs."""
    from pipelines.core import reward_functions

    asked = [one.text for one, said in zip(rollout.prompts, rollout.responses, strict=True) for _ in said]
    responses = [text for said in rollout.responses for text in said]
    return reward_functions.score(rewards, asked, responses, call)


def tell_scale(scores: Sequence[float], name: str, context: StageContext) -> None:
    """Say it where the first batch's scores are on another scale than the dials that are in the reward's units."""
    if not LEAST_SPREAD <= (spread := pstdev(scores)) <= MOST_SPREAD:
        context.say(
            f"{name}: the scores of the first batch have a standard deviation of {spread:.2g}. ppo.kl_coefficient, "
            "ppo.value_clip and ppo.missing_eos_penalty are in the reward's units, ppo.value_lr must suit them, and "
            "their defaults are meant for a standard deviation near 1: scale what the reward gives to that, or set "
            "them to its scale."
        )


def text_scores(rewards: list[Reward], prompts: list[str], responses: list[str]) -> list[float]:
    """Scores of responses, each to the prompt of the same place, when training is over."""
    from pipelines.core import reward_functions

    return reward_functions.score(rewards, prompts, responses, call=None).values


def checkpoints(name: str, params: PpoParams, context: StageContext) -> Checkpoints:
    """Those of one run, in the directory `name` of the stage's scratch."""
    return Checkpoints(context.work / name, context.fingerprint, params.checkpoint_steps, params.checkpoint_seconds)


def keep(
    checkpoints: Checkpoints, done: int, learner: Learner, coefficient: float, phases: Phases, context: StageContext
) -> None:
    """Write the checkpoint after `done` iterations."""
    from pipelines.core import training

    state = {role: training.optimizer_state(getattr(learner, role)) for role in ("policy", "value")}
    learned = {"trained": learner.actors.trained_state(), "iteration": done, "coefficient": coefficient}
    checkpoints.save(done, {**state, **learned, "history": context.history, "spent": phases.spent})


def kept(checkpoints: Checkpoints, error: Exception, context: StageContext) -> str:
    """What a run that failed has left, for a message. Checkpoints of models that a guard has condemned do not stay."""
    newest, again = "", ""
    if isinstance(error, guards.Fired):
        if context.world.leads:
            checkpoints.drop_after(error.good)
        newest = ", the newest of models that no guard condemns,"
        again = " The same params would come to the same end."
    if not checkpoints.last:
        return f"Nothing was published{', and no checkpoint is left' if again else ''}.{again}"
    stays = f"the checkpoint after iteration {checkpoints.last}{newest} stays in"
    return f"Nothing was published; {stays} {checkpoints.place.relative_to(context.root)}.{again}"


def tell(context: StageContext, where: str, done: int, total: int) -> None:
    """Progress in a rollout, and the moment at which a signal is heard: only the iteration begun is lost."""
    context.progress(done, total, sampling=where)
    context.stop_if_asked()
