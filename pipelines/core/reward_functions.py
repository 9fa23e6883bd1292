"""The reward as any callable: a function of a user's Python file, a reward model's directory, or an ensemble of them.

A function gets prompts as stage `data` stores them (plain text, or a transcript in hh-rlhf's form) and responses as
text, both of one length, and returns one number for each response:

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        return [-float(len(response)) for response in responses]

What it sets for all of torch (no gradients, a default type, threads) is set back. Four things are the user's duty.
The same prompts and responses must get the same numbers in every call, or a run that was killed does not resume to the
same bytes. The file must stand alone: DVC watches it, but not what it imports. Members of an ensemble must measure on
one scale, since their plain mean is what is trained on. And scores should have a standard deviation near 1 over
responses: `ppo.kl_coefficient`, `ppo.value_clip` and `ppo.missing_eos_penalty` are in the reward's units, and
`ppo.value_lr` must suit them.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple, cast

from pipelines.core import faults
from pipelines.core.context import StageContext, Stopped
from pipelines.core.errors import ArtifactError, DataError, ParamsError
from pipelines.core.params.ppo import reward_source

Score = Callable[[list[str], list[str]], Sequence[float]]
LARGEST = 1e15  # the squares of a million of them, which the value loss adds up, are what fp32 can hold
ACCEPTED = "accepted in ppo.rewards: a reward model's directory, or path/to/file.py:function"
MODULE = "sluice_reward_"  # and a number: what a file is called while it is used; no name of a file of the user's


class Reward(NamedTuple):
    """A member: its name in `params.yaml`, and what scores prompts and responses."""

    name: str
    score: Score


class Scores(NamedTuple):
    """What the members say of N responses."""

    values: list[float]  # (N,): the mean over the members
    spread: float | None  # standard deviation of a response's scores between members, mean over responses; None: of one


def local_paths(names: Sequence[str], root: Path) -> list[Path]:
    """The files and directories that entries of `ppo.rewards` name: what the stage depends on.

    Raises:
        ParamsError: one of them is not there, or is no file where a file is needed, or no directory.
    """
    found = []
    for name in names:
        path, function = reward_source(name)
        place = root / Path(path).expanduser()
        if not (place.is_dir() if function is None else place.is_file()):
            kind = "directory" if function is None else "file"
            raise ParamsError(f"ppo.rewards: {name}: no such {kind} ({place}); {ACCEPTED}")
        found.append(place)
    return found


def load(names: Sequence[str], root: Path, tokenizer: Any, context: StageContext) -> list[Reward]:
    """The members that entries of `ppo.rewards` name.

    Args:
        root: what relative paths start from.
        tokenizer: the policy's.

    Raises:
        ParamsError: a file or function is not there, is no function of prompts and responses, or fails on import.
        ArtifactError: a directory holds no reward model, or one that reads other tokens than the policy writes.
    """
    rewards = []
    for number, (name, place) in enumerate(zip(names, local_paths(names, root), strict=True)):
        source = reward_source(name)
        if source.function is None:
            rewards.append(Reward(name, _model(name, place, tokenizer, context)))
        else:
            rewards.append(Reward(name, _function(source.path, place, source.function, f"{MODULE}{number}")))
    return rewards


def score(rewards: Sequence[Reward], prompts: Sequence[str], responses: Sequence[str], call: int | None) -> Scores:
    """Scores of N responses, each to the prompt of the same place.

    Args:
        rewards: one or more members.
        call: which call of the training this is, from 1; None: it is over. For messages.

    Raises:
        DataError: a member raised, or answered with something else than N finite numbers.
    """
    columns = list(zip(*(_answer(reward, prompts, responses, call) for reward in rewards), strict=True))
    spread = fmean(pstdev(column) for column in columns) if len(rewards) > 1 else None
    return Scores([fmean(column) for column in columns], spread)


def refuse_constant(values: Sequence[float], name: str, group: int | None = None) -> None:
    """Refuse a reward under which no response of the first batch is better than another.

    Args:
        values: of the responses of the first batch, two or more, prompt by prompt.
        group: responses of each prompt, where only they are compared; None: all are.

    Raises:
        DataError: all that are compared are the same.
    """
    accepted = "Accepted: a reward that tells responses apart, and a policy whose samples differ"
    if len(values) > 1 and len(set(values)) == 1:
        raise DataError(
            f"{name} gives {values[0]:g} to each of the {len(values)} responses of the first batch: nothing can be "
            f"learned from it. {accepted}"
        )
    if group is not None and all(len(set(values[at : at + group])) == 1 for at in range(0, len(values), group)):
        raise DataError(
            f"{name} gives one number to all {group} responses of a prompt, for each of the {len(values) // group} "
            "prompts of the first batch: with ppo.group_baseline nothing can be learned from it. Does it read the "
            f"prompts, which come first, for the responses? {accepted}"
        )


def _answer(reward: Reward, prompts: Sequence[str], responses: Sequence[str], call: int | None) -> list[float]:
    """What one member says, checked."""
    where = f"reward `{reward.name}`, " + ("answers to held-out prompts" if call is None else f"call {call}")
    try:
        with _apart():
            answer = reward.score(list(prompts), list(responses))
    except Stopped:
        raise
    except (Exception, SystemExit) as error:
        told = f"{type(error).__name__}: {error}"
        raise DataError(f"{where}: it raised {told} ({_place(error, reward_source(reward.name).path)})") from error
    accepted = f"accepted: a list, tuple, array or tensor of {len(responses)} finite numbers, one for each response"
    values = _listed(answer)
    if values is None or len(values) != len(responses):
        raise DataError(f"{where}: found {_shape(answer)}; {accepted}")
    numbers = [_number(value) for value in values]
    for prompt, response, value, number in zip(prompts, responses, values, numbers, strict=True):
        if number is None:
            raise DataError(
                f"{where}: found {faults.shown(_plain(value))} for the response {faults.shown(response)} to the prompt "
                f"{faults.shown(prompt)}; {accepted}, none beyond {LARGEST:g} on either side of 0"
            )
    return [number for number in numbers if number is not None]


@contextmanager
def _apart() -> Iterator[None]:
    """Whether gradients are on, torch's default type and its threads are afterwards as before."""
    import torch

    kind, threads = torch.get_default_dtype(), torch.get_num_threads()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        torch.set_default_dtype(kind)
        torch.set_num_threads(threads)


def _listed(answer: Any) -> list[Any] | None:
    """The entries of a list, a tuple, or an array or tensor of one dimension; None of anything else."""
    if isinstance(answer, list | tuple):
        return list(answer)
    if hasattr(answer, "tolist") and len(getattr(answer, "shape", ())) == 1:
        return list(answer.tolist())
    return None


def _plain(value: Any) -> Any:
    """A scalar of numpy or torch as a plain number; anything else as it is."""
    return value.item() if hasattr(value, "item") and tuple(getattr(value, "shape", (0,))) == () else value


def _number(value: Any) -> float | None:
    """A number of at most `LARGEST` on either side of 0, or None."""
    plain = _plain(value)
    if not isinstance(plain, Real):
        return None
    try:
        number = float(plain)
    except OverflowError:
        return None
    return number if math.isfinite(number) and abs(number) <= LARGEST else None


def _shape(answer: Any) -> str:
    """What an answer of another form is."""
    if isinstance(answer, list | tuple):
        return f"a {type(answer).__name__} of {len(answer)}"
    if hasattr(answer, "shape"):
        return f"a {type(answer).__name__} of shape {tuple(answer.shape)}"
    return faults.shown(answer)


def _place(error: BaseException, path: str) -> str:
    """File and line where something was raised: the last one in the user's file, else the last one."""
    if isinstance(error, SyntaxError) and Path(error.filename or "").name == Path(path).name:
        return f"{path}, line {error.lineno}"
    frames = list(traceback.walk_tb(error.__traceback__))
    own = [one for one in frames if one[0].f_globals.get("__name__", "").startswith(MODULE)]  # not of a namesake
    frame, line = (own or frames)[-1]
    return f"{path if own else Path(frame.f_code.co_filename).name}, line {line}"


def _function(path: str, place: Path, name: str, module_name: str) -> Score:
    """A function of a Python file, which is run without becoming importable and without leaving bytecode beside it."""
    spec = importlib.util.spec_from_file_location(module_name, place)
    assert spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # where dataclasses and pickle look for the module of a class
    try:
        with _apart():
            exec(spec.loader.source_to_code(place.read_bytes(), str(place)), module.__dict__)
    except Stopped:
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        told = f"{type(error).__name__}: {getattr(error, 'msg', error)}"
        raise ParamsError(
            f"ppo.rewards: {_place(error, path)}: {told}. The file must load by itself: what it imports must be "
            "installed, and a file of yours beside it is not"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"]
        problem = f"{name} is {faults.shown(found)}" if hasattr(module, name) else f"has no function {name}"
        raise ParamsError(f"ppo.rewards: {path}: {problem}; its functions: {', '.join(own) or 'none'}")
    try:
        inspect.signature(found).bind([], [])
    except TypeError as error:
        raise ParamsError(f"ppo.rewards: {path}:{name} cannot be called with prompts and responses: {error}") from None
    except ValueError:
        pass  # a built-in without a signature: the first call tells
    return cast(Score, found)


def _model(name: str, place: Path, tokenizer: Any, context: StageContext) -> Score:
    """A reward model's directory."""
    from pipelines.core import attention, k_way, reward_model

    if not (place / "config.json").is_file():
        hint = f"; {name}/model is one" if (place / "model/config.json").is_file() else ""
        raise ArtifactError(f"ppo.rewards: {name} holds no model (no config.json){hint}")
    try:
        model, own = reward_model.load(place, context, attention.choose(context.device, k_way.ROW_TOKENS))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"ppo.rewards: {name}: {error}") from None
    if getattr(model.config, "reward_mean", None) is None:
        raise ArtifactError(
            f"ppo.rewards: {name}: its config.json has no reward_mean: stage reward has not made it. For a model of "
            'your own write `"reward_mean": 0.0` into it, or what good answers score on average'
        )
    if (difference := _difference(tokenizer, own)) is not None:
        raise ArtifactError(
            f"ppo.rewards: {name}: reward model and policy with different tokenizers: {difference}. Train the reward "
            "model from the same SFT model, or wrap it in a function of prompts and responses (file.py:function)"
        )

    def scored(prompts: list[str], responses: list[str]) -> list[float]:
        asked: dict[str, list[str]] = {}
        for prompt, response in zip(prompts, responses, strict=True):
            asked.setdefault(prompt, []).append(response)
        found = reward_model.score(model, own, list(asked.items()), context, k_way.teller(context, name))
        values = dict(zip(asked, map(iter, found), strict=True))
        return [next(values[prompt]) for prompt in prompts]

    return scored


def _difference(policy: Any, other: Any) -> str | None:
    """The first thing in which two tokenizers differ, or None."""
    ours, theirs = ({number: token for token, number in one.get_vocab().items()} for one in (policy, other))
    if differing := [number for number in ours.keys() | theirs.keys() if ours.get(number) != theirs.get(number)]:
        first = min(differing)
        return f"token {first} is {theirs.get(first)!r} in the reward model and {ours.get(first)!r} in the policy"
    for key in ("eos_token", "pad_token", "bos_token"):
        left, right = getattr(other, key), getattr(policy, key)
        if left != right:
            return f"{key} is {faults.shown(left)} in the reward model and {faults.shown(right)} in the policy"
    left, right = (one.chat_template or "" for one in (other, policy))
    if left != right:
        same = len(os.path.commonprefix([left, right]))
        found, wanted = faults.shown(left[same:]), faults.shown(right[same:])
        return f"from character {same}, chat_template is {found} in the reward model and {wanted} in the policy"
    return None
