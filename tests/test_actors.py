"""The four roles against transformers' own forward passes, on one backbone and apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LORA, model, tokenizer
from rollouts import states
from test_reward_adapter import ARCHITECTURES, MEAN, disturb, store

from pipelines.core import actors, k_way, low_rank, sampling, segments, training
from pipelines.core.actors import Actors
from pipelines.core.context import StageContext

Make = Callable[..., Actors]
METHODS, TEMPERATURE = ("shared", "separate"), 0.7
PROMPTS = [[11, 12, 13, 14, 15, 16], [21, 22, 23], [31, 32, 33, 34]]
RESPONSES = [[[40, 41, 42], [43, 1]], [[50, 51, 52, 53, 54], [55]], [[60, 61], [62, 63, 64, 1]]]
SEQUENCES = [segments.of_completions(one, said) for one, said in zip(PROMPTS, RESPONSES, strict=True)]
TEXTS = [(prompt, said) for prompt, of_prompt in zip(PROMPTS, RESPONSES, strict=True) for said in of_prompt]
BATCH = k_way.of_bins(SEQUENCES, [[0, 2], [1]], pad=0)  # two prompts in a row, one beside padding


@pytest.fixture(scope="module")
def known() -> Any:
    return tokenizer()


@pytest.fixture(scope="module")
def places(known: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each architecture, an SFT model in `sft` and what stage `reward` would make of it in `reward`."""
    return {one: store(known, tmp_path_factory.mktemp(one), one) for one in ARCHITECTURES}


@pytest.fixture
def make(places: dict[str, Path], context: StageContext) -> Make:
    def made(method: str = "shared", architecture: str = "llama", reward: bool = True, seed: int = 7) -> Actors:
        root = places[architecture]
        if method == "shared":
            return actors.shared(root / "sft", root / "reward" if reward else None, LORA, 64, seed, context)
        return actors.separate(root / "sft", root / "reward/model" if reward else None, 64, seed, context)

    return made


def scores(
    made: Actors, role: Any, context: StageContext, temperature: float = 1.0, batch: k_way.Responses = BATCH
) -> torch.Tensor:
    return made.log_probabilities(role, batch, states(made, role, batch, context), temperature).log_probabilities


def values(made: Actors, context: StageContext) -> torch.Tensor:
    return made.values(BATCH, states(made, "value", BATCH, context))


def rewards(made: Actors, context: StageContext) -> torch.Tensor:
    return made.rewards(BATCH, states(made, "reward", BATCH, context))


def in_order(values: torch.Tensor) -> torch.Tensor:
    """A vector over the response tokens of BATCH, in the order of TEXTS."""
    lengths = [len(said) for number in BATCH.numbers for said in RESPONSES[number]]
    keys = [(number, sample) for number in BATCH.numbers for sample in range(len(RESPONSES[number]))]
    parts = dict(zip(keys, values.split(lengths), strict=True))
    return torch.cat([parts[key] for key in sorted(parts)])


def plain_scores(lm: Any, temperature: float) -> torch.Tensor:
    """Log-probabilities of all response tokens by transformers' forward pass, each text alone."""
    parts = []
    for prompt, said in TEXTS:
        logits = lm(input_ids=torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1].float()
        parts.append(torch.log_softmax(logits / temperature, dim=1)[range(len(said)), said])
    return torch.cat(parts)


# --- each role against transformers --------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_policy_and_reference_are_the_sft_model(
    make: Make, places: dict[str, Path], context: StageContext, method: str, architecture: str
) -> None:
    from transformers import AutoModelForCausalLM

    made = make(method, architecture)
    sft = AutoModelForCausalLM.from_pretrained(places[architecture] / "sft").eval()
    with torch.no_grad():
        expected = plain_scores(sft, TEMPERATURE)
        policy, reference = (scores(made, role, context, TEMPERATURE) for role in ("policy", "reference"))
        torch.testing.assert_close(in_order(policy), expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(policy, reference), "KL is 0, exactly"
        disturb(made._named["policy"].items())
        moved = scores(made, "policy", context, TEMPERATURE)
        assert (moved - policy).abs().mean() > 1e-2
        assert torch.equal(scores(made, "reference", context, TEMPERATURE), reference), "it stays"


@pytest.mark.parametrize("method", METHODS)
def test_kl_is_exactly_zero_in_bf16_too(make: Make, context: StageContext, method: str) -> None:
    context.precision = "bf16"
    made = make(method)
    with torch.no_grad():
        policy, reference = (scores(made, role, context) for role in ("policy", "reference"))
    assert torch.equal(policy, reference)
    trained = [*made.trained("policy"), *made.trained("value")]
    assert {value.dtype for value in trained} == {torch.float32}, "bf16 would swallow small updates"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_rewards_and_values_are_the_reward_models(
    make: Make, places: dict[str, Path], context: StageContext, method: str, architecture: str
) -> None:
    """The value before a token is at the start what the reward model says of the text so far, on the same scale."""
    from transformers import AutoModelForSequenceClassification

    made = make(method, architecture)
    judge = AutoModelForSequenceClassification.from_pretrained(places[architecture] / "reward/model").eval()

    def told(ids: list[int]) -> float:
        judge.config.pad_token_id = None  # one text at a time; it must not look for padding
        return float(judge(input_ids=torch.tensor([ids])).logits) - MEAN

    with torch.no_grad():
        found = in_order(values(made, context))
        expected = [told(prompt + said[:place]) for prompt, said in TEXTS for place in range(len(said))]
        assert found.tolist() == pytest.approx(expected, abs=1e-5)
        expected = [told(PROMPTS[number] + said) for number in BATCH.numbers for said in RESPONSES[number]]
        assert rewards(made, context).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_reward_model_values_start_at_zero(make: Make, context: StageContext, method: str) -> None:
    made = make(method, reward=False)
    assert made.reward_head is None and "reward" not in made.models
    assert not values(made, context).any()


@pytest.mark.parametrize("method", METHODS)
def test_values_on_another_scale(make: Make, context: StageContext, method: str) -> None:
    made = make(method)
    with torch.no_grad():
        before, said = values(made, context), rewards(made, context)
        made.rescale_values(0.5, 3.0)
        torch.testing.assert_close(values(made, context), 0.5 * before + 3.0)
        assert torch.equal(rewards(made, context), said), "the reward keeps its own"


# --- who learns ----------------------------------------------------------------------------------------------


def everything(made: Actors, context: StageContext) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {
            **{role: scores(made, role, context) for role in ("policy", "reference")},
            "value": values(made, context),
            "reward": rewards(made, context),
        }


def learn(made: Actors, role: str, optimizer: torch.optim.Optimizer, context: StageContext) -> None:
    """One step of one role; both roles' gradients are computed after another role has been used."""
    found, expected = scores(made, "policy", context), values(made, context)
    rewards(made, context)
    scores(made, "reference", context)
    (found if role == "policy" else (expected - 3.0).square()).mean().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("role", ["policy", "value"])
@pytest.mark.parametrize("method", METHODS)
def test_a_role_learns_alone(make: Make, context: StageContext, method: str, role: Any) -> None:
    made = make(method)
    before, start = everything(made, context), made.trained_state()
    held = {id(value) for value in made.trained(role)}
    optimizer = training.adamw(made.trained(role), 1e-2, 0.1)
    assert {id(value) for group in optimizer.param_groups for value in group["params"]} == held, "all of them"
    for _ in range(2):
        learn(made, role, optimizer, context)
    after = everything(made, context)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [role]
    made.load_trained_state(start)
    again = everything(made, context)
    assert all(torch.equal(before[name], again[name]) for name in before), "as at the start: so begins a second arm"


def test_every_adapter_weight_of_a_role_gets_a_gradient(make: Make, context: StageContext) -> None:
    made = make()
    disturb(made._named["policy"].items())
    scores(made, "policy", context).mean().backward()  # type: ignore[no-untyped-call]
    values(made, context).square().mean().backward()  # type: ignore[no-untyped-call]
    for role in ("policy", "value"):
        named = made._named[role]
        assert len(named) == 2 * 7 * 2 + 2 * (role == "value"), "A and B of 7 linear layers in 2 blocks; the head"
        assert [name for name, value in named.items() if value.grad is None or not value.grad.any()] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_roles_side_by_side_say_and_learn_what_each_does_alone(
    make: Make, context: StageContext, architecture: str
) -> None:
    made = make("shared", architecture)
    disturb(made._named["policy"].items())
    assert made.side_by_side and made.groups(actors.JUDGES) == [("reference", "reward")]
    for group in (actors.LEARNERS, actors.JUDGES):
        alone = [made.hidden((role,), BATCH.rows, context)[0] for role in group]
        beside = made.hidden(group, BATCH.rows, context)
        assert not torch.allclose(*beside, atol=1e-2)
        for one, two in zip(alone, beside, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)

    trained = [*made.trained("policy"), *made.trained("value")[:-2]]  # without the value head, which only reads
    weights = torch.linspace(-1, 1, alone[0].shape[-1])

    def gradients(states: list[torch.Tensor]) -> list[torch.Tensor]:
        loss = torch.stack([(one @ weights).square().sum() * place for place, one in enumerate(states, 1)]).sum()
        found = torch.autograd.grad(loss, trained)
        assert all(one.any() for one in found)
        return list(found)

    expected = gradients([made.hidden((role,), BATCH.rows, context)[0] for role in actors.LEARNERS])
    for one, two in zip(gradients(made.hidden(actors.LEARNERS, BATCH.rows, context)), expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


def test_adapters_on_other_layers_pass_one_by_one(make: Make, context: StageContext) -> None:
    made = make()
    layer = next(part for part in made.models["policy"].modules() if hasattr(part, "lora_A"))
    del layer.lora_A["value"], layer.lora_variant["value"]
    assert not low_rank.fits_side_by_side(made.models["policy"])


def test_one_backbone(make: Make, places: dict[str, Path], known: Any) -> None:
    """The four roles together hold one copy of the SFT model's weights, and nothing else of its size."""
    made = make()
    kept = {
        value.data_ptr(): (name, value.numel())
        for one in made.models.values()
        for name, value in [*one.named_parameters(), *one.named_buffers()]
        if value.numel()
    }
    base = sum(size for name, size in kept.values() if "lora_" not in name and "inv_freq" not in name)
    assert base == sum(value.numel() for value in model(known, length=128).parameters())
    adapters = {role: sum(size for name, size in kept.values() if f".{role}." in name) for role in made.models}
    assert adapters["reference"] == 0 < adapters["policy"] == adapters["value"] == adapters["reward"]


@pytest.mark.parametrize("method", METHODS)
def test_going_on_from_a_checkpoint_is_the_same_to_the_last_bit(
    make: Make, context: StageContext, tmp_path: Path, method: str
) -> None:
    def optimizers(made: Actors) -> dict[str, torch.optim.Optimizer]:
        return {role: training.adamw(made.trained(role), 1e-2, 0.1) for role in ("policy", "value")}

    whole = make(method)
    ours = optimizers(whole)
    for step in range(3):
        if step == 2:
            kept = {"trained": whole.trained_state()} | {r: training.optimizer_state(o) for r, o in ours.items()}
            torch.save(kept, tmp_path / "state")
        for role, optimizer in ours.items():
            learn(whole, role, optimizer, context)
    state = torch.load(tmp_path / "state")
    cut = make(method, seed=8)  # a fresh adapter of another seed: all that counts is in the state
    cut.load_trained_state(state["trained"])
    for role, optimizer in optimizers(cut).items():
        training.load_optimizer_state(optimizer, state[role])
        learn(cut, role, optimizer, context)
    expected, found = whole.trained_state(), cut.trained_state()
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert [name for name in expected if torch.equal(expected[name], state["trained"][name])] == [], "all have moved"


# --- sampling and saving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["policy", "reference"])
def test_samples_of_a_role_have_its_probabilities(make: Make, context: StageContext, role: Any) -> None:
    """Whichever role was used last, the sampler and `log_probabilities` see the same adapter."""
    made = make()
    disturb(made._named["policy"].items())
    rewards(made, context)
    with made.using(role) as lm:
        found = sampling.sample(
            lm, PROMPTS, count=2, tokens=8, stops=[1], pad=0, temperature=TEMPERATURE, seed=3, precision="fp32",
            tell=lambda done, total: None,
        )  # fmt: skip
    said = [segments.of_completions(prompt, ids) for prompt, ids in zip(PROMPTS, found.ids, strict=True)]
    (batch,) = k_way.batches(said, 512, pad=0)
    with torch.no_grad():
        ours, theirs = (
            scores(made, one, context, TEMPERATURE, batch).tolist()
            for one in (role, "reference" if role == "policy" else "policy")
        )
    drawn = [value for number in batch.numbers for one in found.log_probabilities[number] for value in one]
    assert drawn == pytest.approx(ours, abs=1e-4) and drawn != pytest.approx(theirs, abs=1e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_sampling_is_from_the_merged_policy_and_leaves_no_trace(
    make: Make, context: StageContext, method: str, architecture: str
) -> None:
    """The merged weights say what backbone and adapter say; afterwards each role says the same to the last bit."""
    made = make(method, architecture)
    disturb(made._named["policy"].items())
    before = everything(made, context)
    with torch.no_grad(), made.sampling() as lm:
        merged = plain_scores(lm, TEMPERATURE)
        if made.shared:
            assert all(part.merged for part in lm.modules() if hasattr(part, "merged_adapters"))
    after = everything(made, context)
    torch.testing.assert_close(merged, in_order(scores(made, "policy", context, TEMPERATURE)), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(getattr(part, "merged", False) for part in made.models["policy"].modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_the_saved_policy_is_a_plain_model_and_the_actors_go_on(
    make: Make, known: Any, context: StageContext, tmp_path: Path, method: str, architecture: str
) -> None:
    from transformers import AutoModelForCausalLM

    made = make(method, architecture)
    disturb(made._named["policy"].items())
    before, state = everything(made, context), made.trained_state()
    size = made.save(tmp_path / "model", known, context)
    after = everything(made, context)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(value, state[name]) for name, value in made.trained_state().items())
    saved, told = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert size == sum(value.numel() for value in saved.parameters())
    with torch.no_grad():
        ours = in_order(scores(made, "policy", context, TEMPERATURE))
        torch.testing.assert_close(plain_scores(saved.eval(), TEMPERATURE), ours, atol=1e-4, rtol=1e-4)
    assert str(tmp_path.parent) not in (tmp_path / "model/config.json").read_text()
    assert (tmp_path / "model/tokenizer.json").exists() and not list(tmp_path.rglob("*adapter*"))
