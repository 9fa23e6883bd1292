"""The self-test passes honest models and names the law that a deliberate fault breaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from models import LORA, tokenizer
from test_ppo_params import PLAIN
from test_reward_adapter import ARCHITECTURES, disturb, store

from pipelines.core import actors, episodes, sampling, segments, self_test
from pipelines.core.actors import Actors
from pipelines.core.completions import Prompt
from pipelines.core.context import StageContext
from pipelines.core.episodes import Episodes
from pipelines.core.errors import ArtifactError
from pipelines.core.params.ppo import PpoParams
from pipelines.core.reward_functions import Scores

PARAMS = PpoParams.model_validate(PLAIN | {"batch_prompts": 6, "samples_per_prompt": 3, "max_new_tokens": 12})
COOL = PARAMS.model_copy(update={"temperature": 0.7})


class Case(NamedTuple):
    """Actors and the means to let them act."""

    actors: Actors
    context: StageContext
    known: Any

    def generate(self, params: PpoParams = PARAMS) -> episodes.Rollout:
        prompts = [
            Prompt(str(n), str(n), "train", "", None, list(range(20 + 9 * n, 24 + 10 * n)))
            for n in range(params.batch_prompts)
        ]
        return episodes.generate(self.actors, self.known, prompts, params, 0, self.context, lambda done, total: None)

    def score(self, rollout: episodes.Rollout, params: PpoParams = PARAMS) -> Episodes:
        return episodes.score(self.actors, rollout, None, params, 0, self.context)

    def check(self, found: Episodes, params: PpoParams = PARAMS) -> dict[str, float]:
        return self_test.check(self.actors, found, params, self.known.eos_token_id, self.context)

    def all(self, params: PpoParams = PARAMS) -> dict[str, float]:
        return self.check(self.score(self.generate(params), params), params)


@pytest.fixture(scope="module")
def known() -> Any:
    return tokenizer()


@pytest.fixture(scope="module")
def places(known: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {one: store(known, tmp_path_factory.mktemp(one), one) for one in ARCHITECTURES}


@pytest.fixture
def make(places: dict[str, Path], known: Any, context: StageContext) -> Callable[..., Case]:
    def made(method: str = "shared", architecture: str = "llama", precision: str = "fp32", reward: bool = True) -> Case:
        root = places[architecture]
        context.precision = precision
        if method == "shared":
            roles = actors.shared(root / "sft", root / "reward" if reward else None, LORA, 64, 7, context)
        else:
            roles = actors.separate(root / "sft", root / "reward/model" if reward else None, 64, 7, context)
        case = Case(roles, context, known)
        # What this model says most often ends a response from now on, so that some end and some do not.
        said = Counter(token for one in case.generate(COOL).sequences for token in one.labels)
        known.eos_token = known.convert_ids_to_tokens(said.most_common(2)[1][0])  # but for what is no label
        return case

    return made


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["shared", "separate"])
def test_honest_models_pass(make: Callable[..., Case], method: str, architecture: str, precision: str) -> None:
    case = make(method, architecture, precision)
    found = case.score(case.generate(COOL), COOL)
    ended = [end for of_prompt in found.rollout.ended for end in of_prompt]
    assert True in ended and False in ended and len({len(one.ids) for one in found.rollout.sequences}) > 1
    before = case.actors.trained_state()
    told = case.check(found, COOL)
    assert told["KL to the SFT model"] == told["ratio"] == 0.0
    assert set(told) >= {"sampled and computed log-probabilities", "log-probabilities", "values", "rewards"}
    limit = self_test.ROUNDING[precision] / 30
    assert max(told.values()) < limit, "far from the limits"
    after = case.actors.trained_state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(value.grad is None for role in ("policy", "value") for value in case.actors.trained(role))


def test_a_reward_from_elsewhere_is_not_held_against_a_role(make: Callable[..., Case]) -> None:
    case = make(reward=False)
    rollout = case.generate()
    given = Scores([0.5] * len(rollout.mask), None)
    found = episodes.score(case.actors, rollout, lambda said: given, PARAMS, 0, case.context)
    assert "rewards" not in case.check(found)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_another_temperature(make: Callable[..., Case], precision: str) -> None:
    case = make(precision=precision)
    with pytest.raises(ArtifactError, match=r"the sampler's log-probabilities are the trainer's, but .* another temp"):
        case.check(case.score(case.generate(), COOL), COOL)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tokens_left_out_when_sampling(
    make: Callable[..., Case], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Top-p: each token that is drawn is told to be likelier by the share that was left out, here 4 percent."""
    honest = sampling.sample

    def top_p(*args: Any, **kwargs: Any) -> sampling.Samples:
        found = honest(*args, **kwargs)
        likelier = [[[value + 0.04 for value in row] for row in rows] for rows in found.log_probabilities]
        return found._replace(log_probabilities=likelier)

    monkeypatch.setattr(sampling, "sample", top_p)
    with pytest.raises(ArtifactError, match=r"the sampler's log-probabilities are the trainer's, but .* left out when"):
        make(precision=precision).all()


def test_the_mean_of_few_tokens_errs_to_one_side_by_chance(make: Callable[..., Case]) -> None:
    """Rounding of .06 nats a token, as of real models in bf16: of 18 tokens its mean can be beyond .02."""
    params = PARAMS.model_copy(update={"max_new_tokens": 1})
    case = make(precision="bf16")
    found = case.score(case.generate(params), params)
    for rounded, passes in (([0.09, -0.03] * 9, True), ([0.03] * 18, False)):
        sampled = torch.where(found.rollout.mask, found.old + torch.tensor(rounded)[:, None], 0.0)
        rolled = found._replace(rollout=found.rollout._replace(sampled=sampled))
        if passes:
            assert case.check(rolled, params)["the same with its sign"] == pytest.approx(0.03, abs=1e-4)
        else:
            with pytest.raises(ArtifactError, match=r"a difference of 0\.03 .*: tokens left out when sampling \(top-p"):
                case.check(rolled, params)


@pytest.mark.parametrize("method", ["shared", "separate"])
@pytest.mark.parametrize("when", ["scored", "updated"])
def test_dropout(make: Callable[..., Case], method: str, when: str) -> None:
    """GPT-2 with the dropout of its configuration, in training mode when scored, or only from the update on."""
    case = make(method, "gpt2")
    rollout = case.generate()
    found = case.score(rollout)
    for model in {id(one): one for one in case.actors.models.values()}.values():
        assert any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in model.modules())
        model.train()
    law = {"scored": r"KL is 0, but .* or dropout", "updated": r"the ratio is 1, but .*: dropout"}[when]
    with pytest.raises(ArtifactError, match=law):
        case.check(case.score(rollout) if when == "scored" else found)


@pytest.mark.parametrize("fault", ["everything is seen", "texts of a row see one another", "the prompt is not seen"])
def test_a_broken_mask(make: Callable[..., Case], fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = segments.attention_mask

    def broken(documents: torch.Tensor, branches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if fault == "texts of a row see one another":
            return honest(torch.zeros_like(documents), torch.zeros_like(branches), dtype)
        if fault == "the prompt is not seen":
            return honest(documents * 99 + branches, branches, dtype)
        return torch.zeros_like(honest(documents, branches, dtype))

    monkeypatch.setattr(segments, "attention_mask", broken)
    with pytest.raises(
        ArtifactError, match=r"the sampler's log-probabilities are the trainer's, but .* padding that is"
    ):
        make().all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_broken_positions(make: Callable[..., Case], architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on through all branches of a row, as if they stood one after the other."""
    monkeypatch.setattr(segments, "positions", lambda sequence: list(range(len(sequence.ids))))
    with pytest.raises(ArtifactError, match=r"the sampler's log-probabilities are the trainer's, but .* positions"):
        make(architecture=architecture).all()


@pytest.mark.parametrize("method", ["shared", "separate"])
def test_another_reference(make: Callable[..., Case], method: str) -> None:
    case = make(method)
    changed = case.actors.models["reference"].named_parameters() if method == "separate" else (
        case.actors.models["policy"].named_parameters()
    )  # fmt: skip
    disturb(changed, "lora_B.policy" if method == "shared" else "", 1e-3)
    with pytest.raises(ArtifactError, match=r"their KL is 0, but found a difference of .* the reference is another"):
        case.all()


@pytest.mark.parametrize("prompts", [6, 1])
@pytest.mark.parametrize("role", ["values", "rewards"])
def test_what_depends_on_padding(
    make: Callable[..., Case], role: str, prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score that moves with the length of the row, by as little as a thousandth a column, even of a single row."""
    case = make()
    honest = getattr(case.actors, role)
    monkeypatch.setattr(
        case.actors, role, lambda batch, context: honest(batch, context) + 1e-3 * batch.rows.ids.shape[1]
    )
    with pytest.raises(ArtifactError, match=f": {role} do not depend on padding"):
        case.all(PARAMS.model_copy(update={"batch_prompts": prompts, "minibatches": 1}))


def test_a_reward_beside_the_end(make: Callable[..., Case]) -> None:
    case = make()
    found = case.score(case.generate())
    early = [[batch._replace(column=batch.column - 1) for batch in one] for one in found.minibatches]
    with pytest.raises(ArtifactError, match=r"read where the response ends, but .*: 18 of 18 responses"):
        case.check(found._replace(minibatches=early))
    ended = [[not end for end in of_prompt] for of_prompt in found.rollout.ended]
    with pytest.raises(ArtifactError, match=r"read where the response ends, but .*: 18 of 18 responses"):
        case.check(found._replace(rollout=found.rollout._replace(ended=ended)))


def test_numbers_that_are_none_do_not_pass(make: Callable[..., Case]) -> None:
    case = make()
    found = case.score(case.generate())
    with pytest.raises(ArtifactError, match="found a difference of nan"):
        case.check(found._replace(reference=torch.full_like(found.reference, torch.nan)))
