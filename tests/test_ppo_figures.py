"""What an iteration of PPO tells, on two episodes worked by hand; and where its time goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import tokenizer
from rollouts import PARAMS, case, roles
from test_reward_adapter import ARCHITECTURES, store

from pipelines.core import hardware, phases, ppo_figures
from pipelines.core.completions import Prompt
from pipelines.core.context import StageContext
from pipelines.core.episodes import Episodes, Rollout
from pipelines.core.phases import Phases

TWO, THREE = [True, True, False], [True, True, True]


def example(prompts: list[Prompt], responses: list[list[str]]) -> Episodes:
    """Two episodes, of two and of three tokens, the first of which came to its end."""
    mask = torch.tensor([TWO, THREE])
    old = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]])
    reference = torch.tensor([[-1.5, -2.5, 0.0], [-1.0, -1.0, -0.7]])
    sampled = torch.tensor([[-1.0, -2.1, 9.0], [-1.0, -0.6, -1.0]])
    entropies = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]])
    values = torch.tensor([[0.5, 1.0, 0.0], [1.5, 2.0, 2.5]])
    ended = [[True, False]] if len(prompts) == 1 else [[True], [False]]
    rollout = Rollout(prompts, [], responses, ended, sampled, mask)
    scores, proxy = torch.tensor([0.25, -1.0]), torch.tensor([0.25, 0.75])
    return Episodes(rollout, [], old, reference, entropies, values, scores, proxy, external=True, ahead=[])


def prompt(text: str = "say", reference: str | None = None) -> Prompt:
    return Prompt("p", "g", "train", text, reference, [1])


def test_figures_by_hand() -> None:
    found = example([prompt(reference="a wide river")], [["a wide river", ""]])
    told = ppo_figures.figures(found, 0.5, 2 * found.values, "overlap")
    assert found.kl.tolist() == pytest.approx([1.0, -0.3])
    assert told == pytest.approx(
        {
            "score": 0.5,  # the proxy's, whatever the rule for responses without an end
            "reward": (0.25 - 0.5 * 1.0 + -1.0 + 0.5 * 0.3) / 2,
            "gold": (1.0 + 0.0) / 2,
            "kl": (1.0 - 0.3) / 2,
            "kl_k3": (2 * (math.exp(-0.5) + 0.5 - 1) + math.exp(0.3) - 0.3 - 1) / 2,
            "entropy": 3.0,
            "response_tokens": 2.5,
            "capped_share": 0.5,
            "explained_variance": 0.75,  # what is left is half as large
            "sampler_gap": (0.1 + 0.4) / 5,
        },
        rel=1e-5,
    )


def test_how_far_an_ensembles_members_are_apart() -> None:
    found = example([prompt()], [["", ""]])
    apart = ppo_figures.figures(found._replace(spread=0.75), 0.5, found.values, "overlap")
    assert apart["reward_spread"] == 0.75
    assert "reward_spread" not in ppo_figures.figures(found, 0.5, found.values, "overlap")


def test_gold_is_of_prompts_that_can_be_judged() -> None:
    asks = [prompt(), prompt("name[Aromi], food[Chinese]")]
    found = example(asks, [["Aromi"], ["Aromi is nice"]])
    assert ppo_figures.golds(found, "slots") == [[0.5]], "the other asks for nothing"
    assert ppo_figures.golds(found, "overlap") == [], "nobody has answered"
    returns = found.values
    assert "gold" not in ppo_figures.figures(found, 0.0, returns, "overlap")
    answered = example([prompt(), prompt(reference="yes")], [["no"], ["yes"]])
    assert ppo_figures.golds(answered, "overlap") == [[1.0]]


def test_a_page_of_rollouts() -> None:
    """Score, KL and total of each response, under its prompt."""
    found = example([prompt("say\nit"), prompt("again")], [["one"], ["t`wo"]])
    one = "\n**Prompt:** `say⏎it`\n\n- score +0.250, KL 1.000, total -0.250: `one`"
    two = "\n**Prompt:** `again`\n\n- score -1.000, KL -0.300, total -0.850: `t'wo`"
    assert ppo_figures.page(found, 0.5, 8, "Rollouts") == f"# Rollouts\n{one}\n{two}"
    assert ppo_figures.page(found, 0.5, 1, "Rollouts") == f"# Rollouts\n{one}"
    assert ppo_figures.page(found, 0.5, 0, "Rollouts") == "# Rollouts"


def test_a_page_of_two_prompts_with_two_responses_each() -> None:
    both = example([prompt("say")] * 2, [["one", "two"], ["three", "four"]])
    twice = both._replace(
        scores=torch.tensor([0.0, 1.0, 2.0, 3.0]), old=both.old.repeat(2, 1), reference=both.reference.repeat(2, 1)
    )
    lines = [line for line in ppo_figures.page(twice, 10.0, 2, "").splitlines() if line.startswith("-")]
    assert lines == [
        "- score +0.000, KL 1.000, total -10.000: `one`",
        "- score +1.000, KL -0.300, total +4.000: `two`",
        "- score +2.000, KL 1.000, total -8.000: `three`",
        "- score +3.000, KL -0.300, total +6.000: `four`",
    ]


# --- where the time goes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {one: store(tokenizer(), tmp_path_factory.mktemp(one), one) for one in ARCHITECTURES}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that runs only when it is told to, on a machine of 1000 operations a second."""
    now = [100.0]
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(hardware, "matmul_rate", lambda device, precision, repeats: 1000.0)

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


WAITS = {"generate": 2.0, "score": 0.5, "update": 4.0}


def silent(external: bool) -> Episodes:
    """Episodes of which only the length counts."""
    rollout = case().rollout
    nothing = torch.zeros(rollout.mask.shape)
    none = nothing[:, 0]
    return Episodes(rollout, [], nothing, nothing, nothing, nothing, none, none, external, [])


def iterate(one: Phases, found: Episodes, first: int, last: int, wait: Callable[[float], None]) -> None:
    for iteration in range(first, last):
        for name, seconds in WAITS.items():
            with one.of(name):
                wait(seconds * (iteration + 1))
            wait(9.0)  # belongs to none
        one.end(iteration, found, pretraining=True, ahead=0)


@pytest.mark.parametrize("method", ["shared", "separate"])
@pytest.mark.parametrize(("architecture", "block"), [("llama", 4 + 3 * 4), ("gpt2", 4 + 2 * 4)])
def test_matrices_are_counted(
    places: dict[str, Path], context: StageContext, method: str, architecture: str, block: int
) -> None:
    """Two blocks, 128 wide: four of attention, and the feed-forward ones; neither look-ups nor adapters."""
    one = Phases(roles(places[architecture], method, context), PARAMS, {}, context)
    assert one.body == 2 * block * 128**2 and one.head == len(tokenizer()) * 128


@pytest.mark.parametrize("external", [True, False])
def test_seconds_and_shares_add_up(
    places: dict[str, Path], context: StageContext, clock: Callable[[float], None], external: bool
) -> None:
    params = PARAMS.model_copy(update={"iterations": 3, "epochs": 2, "minibatches": 2})
    found = silent(external)
    rollout = found.rollout
    curves: list[tuple[int, dict[str, float]]] = []
    context.curve = lambda step, values: curves.append((step, values))
    one = Phases(made := roles(places["llama"], "shared", context), params, {}, context)
    iterate(one, found, 0, 3, clock)
    one.report()
    told = dict(context.measured)
    assert [step for step, _ in curves] == [1, 2, 3]
    assert [values["update_seconds"] for _, values in curves] == [4.0, 8.0, 12.0]
    assert {name: told[f"{name}_seconds"] for name in WAITS} == {"generate": 12.0, "score": 3.0, "update": 24.0}
    assert told["episodes_per_second"] == 3 * 18 / 39.0 and told["matmul_gflops"] == 1e-6

    # What each phase computes: 2 operations a matrix parameter and token forward, 4 backward.
    body, head, new = 2 * 16 * 128**2, len(tokenizer()) * 128, int(rollout.mask.sum())
    asked, rows = sum(len(one.ids) for one in rollout.prompts), sum(len(one.ids) for one in rollout.sequences)
    text = 2 * params.ptx_rows * params.ptx_length
    work = {
        "generate": 2 * (body * (asked + new) + head * new),
        "score": 2 * (body * rows * (3 if external else 4) + 2 * head * new),
        "update": 2 * 6 * (body * (rows + rows + text) + head * (new + text)),
    }
    shares = {name: told[f"{name}_matmul_share"] for name in WAITS}
    assert shares == pytest.approx({name: 3 * work[name] / told[f"{name}_seconds"] / 1000.0 for name in WAITS})

    # The same in two parts, as a run that was killed after its second iteration.
    half = Phases(made, params, {}, context)
    iterate(half, found, 0, 2, clock)
    kept = {name: list(values) for name, values in half.spent.items()}
    rest = Phases(made, params, kept, context)
    assert rest.spent == half.spent == kept
    iterate(rest, found, 2, 3, clock)
    assert kept == half.spent, "the checkpoint's own numbers stay"
    context.measured.clear()
    rest.report()
    again = context.measured | {"peak_memory_mb": told["peak_memory_mb"]}  # of the process, not of the run
    assert again == pytest.approx(told)


def test_resumed_after_the_last_iteration(
    places: dict[str, Path], context: StageContext, clock: Callable[[float], None]
) -> None:
    """Nothing is left to measure the machine by: seconds are told, shares are not."""
    spent = {name: [seconds, 1e9] for name, seconds in WAITS.items()}
    Phases(roles(places["llama"], "shared", context), PARAMS, spent, context).report()
    assert context.measured["episodes_per_second"] == PARAMS.iterations * 18 / 6.5
    assert not any("matmul" in name for name in context.measured)


def test_the_machine_is_measured_now_and_then(
    places: dict[str, Path], context: StageContext, clock: Callable[[float], None]
) -> None:
    one = Phases(roles(places["llama"], "shared", context), PARAMS.model_copy(update={"iterations": 80}), {}, context)
    iterate(one, silent(external=True), 0, 80, clock)
    assert len(one.rates.found) == 8
