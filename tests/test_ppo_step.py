"""One step of PPO against ten lines of torch: no packing, no batches, every episode alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from models import TEXTS, tokenizer
from rollouts import METHODS, PARAMS, Case, case, plain_scores, plain_values, roles
from test_reward_adapter import ARCHITECTURES, store

from pipelines.core import distributed, episodes, k_way, packing, ppo_step
from pipelines.core.actors import Actors
from pipelines.core.context import StageContext
from pipelines.core.distributed import World
from pipelines.core.errors import ArtifactError
from pipelines.core.params.ppo import PpoParams

COEFFICIENT, STEP = 0.7, 3
UNCLIPPED = PARAMS.model_copy(update={"clip_norm": 1e9, "temperature": 0.7, "value_clip": 0.1})
Parts = dict[str, list[torch.Tensor]]


class Lesson(NamedTuple):
    """Actors, and what episodes teach that seem to be of an older policy and value model."""

    actors: Actors
    known: Case
    targets: ppo_step.Targets
    params: PpoParams
    context: StageContext

    def learner(self, kind: Any = torch.optim.SGD, lr: float = 1.0) -> ppo_step.Learner:
        """Plain gradient descent at rate 1: what a parameter loses is its gradient."""
        policy, value = kind(self.actors.trained("policy"), lr=lr), kind(self.actors.trained("value"), lr=lr)
        return ppo_step.Learner(self.actors, policy, value, lr, lr)

    def take(
        self, minibatch: list[k_way.Responses], text: packing.PackedRows | None = None, **changes: Any
    ) -> tuple[dict[str, float], Parts]:
        """What a step tells, and the gradients it went by."""
        before = weights(self.actors)
        params = self.params.model_copy(update=changes)
        added = None if text is None else ppo_step.Pretraining(text, COEFFICIENT)
        told = ppo_step.take(self.learner(), self.targets, minibatch, added, STEP, params, self.context)
        after = weights(self.actors)
        moved = {role: [one - two for one, two in zip(before[role], after[role], strict=True)] for role in before}
        return told, moved


def weights(made: Actors) -> Parts:
    return {role: [value.detach().clone() for value in made.trained(role)] for role in ("policy", "value")}


def lesson(root: Path, method: str, context: StageContext, params: PpoParams = UNCLIPPED) -> Lesson:
    made, known = roles(root, method, context), case()
    found = episodes.score(made, known.rollout, None, params, 0, context)
    torch.manual_seed(4)
    mask = known.rollout.mask
    advantages, returns, policy, value = (torch.where(mask, torch.randn(mask.shape), 0.0) for _ in range(4))
    # As if many steps had been made since, so that there is something to clip.
    found = found._replace(old=found.old + 0.3 * policy, values=found.values + 0.3 * value)
    return Lesson(made, known, ppo_step.Targets(found, advantages, returns), params, context)


def reference(one: Lesson, numbers: list[int], text: packing.PackedRows | None = None) -> dict[str, torch.Tensor]:
    """The losses of a step on these episodes."""
    made, params, found = one.actors, one.params, one.targets.episodes
    policy, value = [], []
    for number in numbers:
        prompt, ids = one.known.said[number]
        here = (number, slice(len(ids)))
        new, advantage = plain_scores(made, "policy", prompt, ids, params.temperature), one.targets.advantages[here]
        ratio = (new - found.old[here]).exp()
        policy.append(torch.minimum(ratio * advantage, ratio.clamp(1 - params.clip, 1 + params.clip) * advantage))
        said, old, wanted = plain_values(made, prompt, ids), found.values[here], one.targets.returns[here]
        near = torch.minimum(torch.maximum(said, old - params.value_clip), old + params.value_clip)
        value.append(torch.maximum((said - wanted).square(), (near - wanted).square()) / 2)
    losses = {"policy_loss": -torch.cat(policy).mean(), "value_loss": torch.cat(value).mean()}
    if text is not None:
        batch = text.batch(STEP * params.ptx_rows, params.ptx_rows)
        mask = packing.attention_mask(batch.documents, torch.float32)
        with made.using("policy") as lm:
            logits = lm(input_ids=batch.ids, attention_mask=mask, position_ids=batch.positions).logits
        losses["ptx_loss"] = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    return losses


def gradients(loss: torch.Tensor, trained: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, trained, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(value) if one is None else one for one, value in zip(found, trained, strict=True)]


def norm(parts: list[torch.Tensor]) -> float:
    return float(torch.stack([part.square().sum() for part in parts]).sum().sqrt())


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """As far as fp32 goes: differences of weights of size 1 are read."""
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-3)


@pytest.fixture(scope="module")
def known() -> Any:
    return tokenizer()


@pytest.fixture(scope="module")
def places(known: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {one: store(known, tmp_path_factory.mktemp(one), one) for one in ARCHITECTURES}


@pytest.fixture(scope="module")
def text(known: Any, tmp_path_factory: pytest.TempPathFactory) -> packing.PackedRows:
    place = tmp_path_factory.mktemp("text") / "t"
    packing.write_stream(known, TEXTS, place)
    return packing.PackedRows(place, PARAMS.ptx_length, packing.separator_id(known), PARAMS.seed)


@pytest.mark.parametrize("micro_tokens", [32, 512])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradients_are_those_of_the_episodes_one_by_one(
    places: dict[str, Path], context: StageContext, method: str, architecture: str, micro_tokens: int
) -> None:
    """Of both minibatches; in several forward passes or in one."""
    params = UNCLIPPED.model_copy(update={"micro_tokens": micro_tokens})
    one = lesson(places[architecture], method, context, params)
    start = one.actors.trained_state()
    for minibatch in one.targets.episodes.minibatches:
        assert len(minibatch) == (3 if micro_tokens == 32 else 1)
        numbers = sorted(number for batch in minibatch for number in episodes.episodes_of(batch))
        losses = reference(one, numbers)
        expected = {
            "policy": gradients(losses["policy_loss"], one.actors.trained("policy")),
            "value": gradients(losses["value_loss"], one.actors.trained("value")),
        }
        told, moved = one.take(minibatch)
        one.actors.load_trained_state(start)
        for role in ("policy", "value"):
            close(moved[role], expected[role])
        assert {name: told[name] for name in losses} == pytest.approx(
            {name: loss.item() for name, loss in losses.items()}, rel=1e-4
        )
        norms = [told["grad_norm"], told["value_grad_norm"]]
        assert norms == pytest.approx([norm(expected["policy"]), norm(expected["value"])], rel=1e-3)
        assert 0.3 < told["clip_fraction"] < 0.7 and 0.1 < told["value_clip_fraction"] < 0.7
        assert told["approx_kl"] > 0 and "ptx_loss" not in told


@pytest.mark.parametrize("method", METHODS)
def test_the_pre_training_gradient_is_added(
    places: dict[str, Path], text: packing.PackedRows, context: StageContext, method: str
) -> None:
    one = lesson(places["llama"], method, context)
    minibatch = one.targets.episodes.minibatches[1]
    losses = reference(one, list(range(9, 18)), text)
    policy, value = one.actors.trained("policy"), one.actors.trained("value")
    plain, added = gradients(losses["policy_loss"], policy), gradients(COEFFICIENT * losses["ptx_loss"], policy)
    whole = gradients(losses["policy_loss"] + COEFFICIENT * losses["ptx_loss"], policy)
    alone = gradients(losses["value_loss"], value)
    told, moved = one.take(minibatch, text)
    close(moved["policy"], whole)
    close(moved["value"], alone)
    assert told["ptx_loss"] == pytest.approx(losses["ptx_loss"].item(), rel=1e-4)
    assert told["ptx_ratio"] == pytest.approx(norm(added) / norm(plain), rel=1e-3)
    assert told["grad_norm"] == pytest.approx(norm(whole), rel=1e-3)


def test_long_gradients_are_shortened_each_on_its_own(places: dict[str, Path], context: StageContext) -> None:
    one = lesson(places["llama"], "shared", context)
    told, moved = one.take(one.targets.episodes.minibatches[0], clip_norm=0.01)
    assert [norm(moved["policy"]), norm(moved["value"])] == pytest.approx([0.01, 0.01], rel=1e-3)
    assert min(told["grad_norm"], told["value_grad_norm"]) > 0.02, "told as they were"


@pytest.mark.parametrize("method", METHODS)
def test_each_minibatch_is_one_step_of_both(places: dict[str, Path], context: StageContext, method: str) -> None:
    one = lesson(places["llama"], method, context)
    learner = one.learner(torch.optim.AdamW, lr=1e-3)
    with pytest.raises(AssertionError, match="policy: 0 optimizer steps were made, 1 were planned"):
        ppo_step.check_count(learner, 1)
    before = weights(one.actors)
    first, second = (
        ppo_step.take(learner, one.targets, minibatch, None, 0, one.params, context)
        for minibatch in one.targets.episodes.minibatches
    )
    assert first["policy_loss"] != second["policy_loss"]
    ppo_step.check_count(learner, 2)
    with pytest.raises(AssertionError, match="2.* optimizer steps were made, 3 were planned"):
        ppo_step.check_count(learner, 3)
    for name, optimizer in (("policy", learner.policy), ("value", learner.value)):
        state = next(iter(optimizer.state.values()))
        state["step"] += 1
        with pytest.raises(AssertionError, match=rf"{name}: \{{.*3.*\}} optimizer steps were made, 2 were planned"):
            ppo_step.check_count(learner, 2)
        state["step"] -= 1
    after = weights(one.actors)
    assert not any(
        torch.equal(two, three) for role in after for two, three in zip(before[role], after[role], strict=True)
    )


@pytest.mark.parametrize("which", ["advantages", "returns"])
def test_what_is_not_finite_is_not_learned(places: dict[str, Path], context: StageContext, which: str) -> None:
    one = lesson(places["llama"], "shared", context)
    wrong = torch.full_like(one.targets.returns, torch.nan)
    targets = one.targets
    one = one._replace(
        targets=targets._replace(advantages=wrong) if which == "advantages" else targets._replace(returns=wrong)
    )
    before = weights(one.actors)
    with pytest.raises(ArtifactError, match=f"diverged in step {STEP + 1}"):
        one.take(one.targets.episodes.minibatches[0])
    after = weights(one.actors)
    role = "policy" if which == "advantages" else "value"
    assert all(torch.equal(*both) for both in zip(before[role], after[role], strict=True))


def test_the_parts_of_two_processes_make_the_step_of_one(
    places: dict[str, Path], text: packing.PackedRows, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three forward passes of episodes and two of text: one process does its last once more, for nothing."""
    params = UNCLIPPED.model_copy(update={"micro_tokens": 32})
    monkeypatch.setattr(distributed, "average_gradients", lambda trained, world: None)
    monkeypatch.setattr(distributed, "mean_of", lambda world, value: value)
    found = []
    for world in (World(), World(0, 2), World(1, 2)):
        context.world = World()
        one = lesson(places["llama"], "shared", context, params)
        minibatch, context.world = one.targets.episodes.minibatches[0], world
        found.append(one.take(minibatch, text))
    (whole, moved), (first, here), (second, there) = found
    assert len(minibatch) == 3 and params.ptx_rows * params.ptx_length > params.micro_tokens
    for name in ("policy_loss", "value_loss", "ptx_loss", "clip_fraction", "approx_kl", "value_clip_fraction"):
        assert (first[name] + second[name]) / 2 == pytest.approx(whole[name], rel=1e-4)
    for role in moved:
        close([(one + two) / 2 for one, two in zip(here[role], there[role], strict=True)], moved[role])
