"""A reward is any callable, a model's directory or several of them; what is wrong with one is told by name and call."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import model, tokenizer

from pipelines.core import reward_functions, reward_model
from pipelines.core.context import StageContext, Stopped
from pipelines.core.errors import ArtifactError, DataError, ParamsError
from pipelines.core.reward_functions import Reward
from pipelines.tokenizer import CHAT_TEMPLATE

PROMPTS = ["area of w", "\n\nHuman: w?\n\nAssistant:", "area of w"]
RESPONSES = ["def area", "x", "return w * h"]
LENGTHS = [8.0, 1.0, 12.0]
FUNCTIONS = '''
from __future__ import annotations
import dataclasses, math
import numpy as np
import torch

@dataclasses.dataclass
class Count:
    """Dataclasses look their module up; the calls are counted."""
    calls: int = 0

COUNT = Count()
CONSTANT = 3

def long(prompts, responses):
    return [len(response) for response in responses]

def short(prompts, responses):
    return np.asarray([-len(response) for response in responses], dtype=np.float32)

def tensor(prompts, responses):
    return torch.tensor([float(len(response)) for response in responses], requires_grad=True)

def scalars(prompts, responses):
    return tuple(np.float64(len(response)) for response in responses)

def raises_at_call_7(prompts, responses):
    COUNT.calls += 1
    if COUNT.calls == 7:
        return math.sqrt(-1.0)
    return long(prompts, responses)

def meddles(prompts, responses):
    given = long(prompts, responses)
    responses.clear()
    return given

def sets_torch(prompts, responses):
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(torch.get_num_threads() + 1)
    return long(prompts, responses)

def fitted(prompts, responses):
    scale = torch.nn.Parameter(torch.ones(()))
    (3 * scale).backward()
    return [len(response) * scale.grad.item() / 3 for response in responses]

def one_argument(prompts):
    return []
'''


@pytest.fixture(scope="module")
def known() -> Any:
    made = tokenizer()
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/rewards.py").write_text(FUNCTIONS)
    return tmp_path / "mine/rewards.py"


@pytest.fixture
def load(tmp_path: Path, known: Any, context: StageContext, file: Path) -> Callable[..., list[Reward]]:
    """Loads entries of `ppo.rewards`; a bare name is a function of the file above."""

    def load(*names: str) -> list[Reward]:
        full = [name if "/" in name or "." in name else f"mine/rewards.py:{name}" for name in names]
        return reward_functions.load(full, tmp_path, known, context)

    return load


def answering(answer: Any) -> list[Reward]:
    """A reward that always says the same."""
    return [Reward("f.py:g", lambda prompts, responses: answer)]


# --- functions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["long", "tensor", "scalars", "meddles"])
def test_a_function_may_answer_in_any_array(name: str, load: Callable[..., list[Reward]]) -> None:
    found = reward_functions.score(load(name), PROMPTS, RESPONSES, 1)
    assert found == (LENGTHS, None) and all(type(value) is float for value in found.values)


def test_what_it_sets_for_all_of_torch_is_set_back(file: Path, load: Callable[..., list[Reward]]) -> None:
    """As code for inference does: the policy's update, which comes after it, could not learn."""
    threads = torch.get_num_threads()
    file.write_text(FUNCTIONS + f"torch.set_grad_enabled(False)\ntorch.set_num_threads({threads + 2})\n")
    rewards = load("sets_torch")
    assert torch.is_grad_enabled()
    assert reward_functions.score(rewards, PROMPTS, RESPONSES, call=1).values == LENGTHS
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == threads


def test_a_file_may_fit_what_it_scores_by(file: Path, load: Callable[..., list[Reward]]) -> None:
    file.write_text(FUNCTIONS + "fitted([], [])\n")
    assert reward_functions.score(load("fitted"), PROMPTS, RESPONSES, call=1).values == LENGTHS


def test_the_file_is_read_anew_and_leaves_nothing_behind(file: Path, load: Callable[..., list[Reward]]) -> None:
    before = list(sys.path)
    assert reward_functions.score(load("long"), PROMPTS, RESPONSES, 1).values == LENGTHS
    file.write_text(FUNCTIONS.replace("[len(response)", "[2 * len(response)"))
    assert reward_functions.score(load("long"), PROMPTS, RESPONSES, 1).values == [16.0, 2.0, 24.0]
    assert sys.path == before and "rewards" not in sys.modules
    assert [path.name for path in file.parent.iterdir()] == ["rewards.py"], "no bytecode that could go stale"


def test_an_ensemble_is_the_mean_and_knows_its_spread(load: Callable[..., list[Reward]]) -> None:
    """Of (n, -n, n): mean n / 3; deviations 2n/3, -4n/3, 2n/3, so the standard deviation is n * sqrt(24/9 / 3)."""
    found = reward_functions.score(load("long", "short", "scalars"), PROMPTS, RESPONSES, 1)
    assert found.values == pytest.approx([n / 3 for n in LENGTHS])
    assert found.spread == pytest.approx((8 / 9) ** 0.5 * sum(LENGTHS) / 3)


def test_one_that_raises_is_told_with_file_and_line(load: Callable[..., list[Reward]]) -> None:
    rewards = load("short", "raises_at_call_7")
    for call in range(1, 7):
        reward_functions.score(rewards, PROMPTS, RESPONSES, call)
    line = FUNCTIONS.splitlines().index("        return math.sqrt(-1.0)") + 1
    with pytest.raises(DataError) as error:
        reward_functions.score(rewards, PROMPTS, RESPONSES, 7)
    assert str(error.value) == (
        "reward `mine/rewards.py:raises_at_call_7`, call 7: it raised ValueError: math domain error "
        f"(mine/rewards.py, line {line})"
    )


def test_the_line_is_the_files_own_not_of_a_namesake(tmp_path: Path, known: Any, context: StageContext) -> None:
    """json has a decoder.py, too."""
    (tmp_path / "decoder.py").write_text("import json\n\ndef read(prompts, responses):\n    return json.loads('{')\n")
    rewards = reward_functions.load(["decoder.py:read"], tmp_path, known, context)
    with pytest.raises(DataError, match=r"JSONDecodeError: .* \(decoder\.py, line 4\)"):
        reward_functions.score(rewards, PROMPTS, RESPONSES, 1)


@pytest.mark.parametrize("passing", [KeyboardInterrupt(), Stopped(15)])
def test_a_signal_passes(passing: BaseException) -> None:
    def interrupted(prompts: list[str], responses: list[str]) -> list[float]:
        raise passing

    with pytest.raises(type(passing)):
        reward_functions.score([Reward("f.py:g", interrupted)], PROMPTS, RESPONSES, 1)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ([1.0, float("nan"), 2.0], 'found a number NaN for the response text "x" to the prompt text "\\n\\nHuman: w?'),
        ([1.0, 2.0, float("-inf")], 'found a number -Infinity for the response text "return w * h" to the prompt'),
        ([1.0, 1e39, 2.0], "found a number 1e+39 for the response"),
        ([1.0, -1e20, 2.0], "found a number -1e+20 for the response"),  # whose square is beyond fp32
        ([1.0, 10**400, 2.0], "for the response"),
        ([1.0, "2.0", 2.0], 'found text "2.0" for the response'),
        ([1.0, None, 2.0], "found null for the response"),
        ([[1.0], [2.0], [3.0]], "found a list [1.0] for the response"),
        ([1.0, 2.0], "found a list of 2"),
        ((), "found a tuple of 0"),
        (0.5, "found a number 0.5"),
        (None, "found null"),
        ("abc", 'found text "abc"'),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "found an object"),
        ((value for value in (1.0, 2.0, 3.0)), "found generator"),
    ],
)
def test_another_answer_is_refused(answer: Any, found: str) -> None:
    with pytest.raises(DataError) as error:
        reward_functions.score(answering(answer), PROMPTS, RESPONSES, 7)
    told = str(error.value)
    assert told.startswith("reward `f.py:g`, call 7: ") and found in told, told
    assert "; accepted: a list, tuple, array or tensor of 3 finite numbers, one for each response" in told


def test_an_array_of_another_shape_is_refused() -> None:
    import numpy as np
    import torch

    for answer, shape in ((np.zeros((3, 1)), "(3, 1)"), (torch.tensor(1.0), "()"), (torch.zeros(4), "(4,)")):
        with pytest.raises(DataError, match="call 2: found a .* of shape") as error:
            reward_functions.score(answering(answer), PROMPTS, RESPONSES, 2)
        assert shape in str(error.value)
    with pytest.raises(DataError, match="found a number NaN for the response"):
        reward_functions.score(answering(torch.tensor([0.0, float("nan"), 1.0])), PROMPTS, RESPONSES, 1)


def test_a_constant_reward_teaches_nothing() -> None:
    with pytest.raises(DataError, match="the reward gives 0.5 to each of the 3 responses of the first batch"):
        reward_functions.refuse_constant([0.5, 0.5, 0.5], "the reward")
    reward_functions.refuse_constant([0.5, 0.5, 0.25], "the reward")
    with pytest.raises(DataError, match=r"one number to all 2 responses .* the 3 prompts .* which come first"):
        reward_functions.refuse_constant([0.5, 0.5, 2.0, 2.0, 1.0, 1.0], "the reward", 2)
    reward_functions.refuse_constant([0.5, 0.5, 2.0, 2.0, 1.0, 1.1], "the reward", 2)
    reward_functions.refuse_constant([0.5, 0.5, 2.0, 2.0], "the reward")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nosuch.py:long", r"ppo\.rewards: nosuch\.py:long: no such file .*accepted in ppo\.rewards"),
        ("mine/nosuch", r"ppo\.rewards: mine/nosuch: no such directory"),
        ("mine/rewards.py:lnog", r"mine/rewards\.py: has no function lnog; its functions: long, short, tensor"),
        ("CONSTANT", r"mine/rewards\.py: CONSTANT is a number 3; its functions: long"),
        ("one_argument", r"one_argument cannot be called with prompts and responses: too many positional"),
    ],
)
def test_one_that_is_not_there(name: str, told: str, load: Callable[..., list[Reward]]) -> None:
    with pytest.raises(ParamsError, match=told):
        load(name)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\ny = x / 0\n", "mine/rewards.py, line 2: ZeroDivisionError: division by zero"),
        ("\n\ndef long(:\n", "mine/rewards.py, line 3: SyntaxError: "),
        ("import nosuchmodule\n", "mine/rewards.py, line 1: ModuleNotFoundError: No module named 'nosuchmodule'"),
        ("import sys\nsys.exit('no')\n", "mine/rewards.py, line 2: SystemExit: no"),
        ("import json\njson.loads('{')\n", "mine/rewards.py, line 2: JSONDecodeError: "),
    ],
)
def test_one_that_fails_on_import(text: str, told: str, file: Path, load: Callable[..., list[Reward]]) -> None:
    file.write_text(text)
    with pytest.raises(ParamsError) as error:
        load("long")
    assert f"ppo.rewards: {told}" in str(error.value) and "must load by itself" in str(error.value)


# --- models --------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(known: Any, tmp_path: Path, context: StageContext) -> Path:
    """A reward model as the stage saves it."""
    model(known, length=256).save_pretrained(tmp_path / "sft")
    judge = reward_model.initial(tmp_path / "sft", known, 3, context.dtype, "sdpa").eval()
    reward_model.save(judge, known, tmp_path / "saved/model", context.dtype)
    reward_model.save_constants(tmp_path / "saved/model", judge, reward_model.Level(0.25, 2.0))
    return tmp_path / "saved/model"


def test_a_models_directory_scores_as_the_model(
    directory: Path, load: Callable[..., list[Reward]], context: StageContext
) -> None:
    """Whatever the order of prompts, of which equal ones are encoded once; and in an ensemble."""
    judge, own = reward_model.load(directory, context)
    apart = [
        reward_model.score(judge, own, [(prompt, [response])], context, lambda done, total: None)[0][0]
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    found = reward_functions.score(load("saved/model"), PROMPTS, RESPONSES, 1)
    assert found.values == pytest.approx(apart, abs=1e-5) and max(apart) - min(apart) > 0.01
    both = reward_functions.score(load("saved/model", "long"), PROMPTS, RESPONSES, 1)
    assert both.values == pytest.approx([(one + n) / 2 for one, n in zip(apart, LENGTHS, strict=True)], abs=1e-5)


def test_a_model_that_names_no_padding_token_pads_with_its_tokenizers(
    directory: Path, load: Callable[..., list[Reward]]
) -> None:
    """As classifiers of others are: rows of different length are needed to see it."""
    asked, said = ["area of w " * 30, "area of w " * 4, "w?" * 50], RESPONSES
    wanted = reward_functions.score(load("saved/model"), asked, said, 1).values
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    assert reward_functions.score(load("saved/model"), asked, said, 1).values == wanted


def test_a_directory_that_is_no_reward_model(directory: Path, load: Callable[..., list[Reward]]) -> None:
    with pytest.raises(ArtifactError, match="saved holds no model .*saved/model is one"):
        load("./saved")
    with pytest.raises(ArtifactError, match="mine/empty holds no model"):
        (directory.parents[1] / "mine/empty").mkdir()
        load("mine/empty")
    (directory / "config.json").write_text((directory / "config.json").read_text().replace("reward_mean", "mean"))
    with pytest.raises(ArtifactError, match="saved/model: its config.json has no reward_mean.* of your own write"):
        load("saved/model")


def test_a_model_that_reads_other_tokens_is_refused(
    directory: Path, known: Any, load: Callable[..., list[Reward]]
) -> None:
    def refused(told: str) -> None:
        with pytest.raises(ArtifactError, match=f"saved/model: reward model and policy with different token.*: {told}"):
            load("saved/model")

    other = tokenizer(310)
    other.chat_template = CHAT_TEMPLATE
    other.save_pretrained(directory)
    refused(r"token \d+ is '.*' in the reward model and (None|'.*') in the policy")
    other = tokenizer()
    other.chat_template = CHAT_TEMPLATE.replace("assistant", "helper")
    other.save_pretrained(directory)
    refused(r'from character \d+, chat_template is text "helper')
    other.chat_template, other.eos_token = CHAT_TEMPLATE, known.pad_token
    other.save_pretrained(directory)
    refused("eos_token is text .* in the reward model and text")
