"""What is trained: what stays frozen to the last bit, at which rates, from when on, and what adapters come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import LORA, model, prepared, tokenizer

from pipelines.core import reward_model, training, tuning
from pipelines.core.context import StageContext
from pipelines.core.distributed import World
from pipelines.core.errors import ParamsError
from pipelines.core.params.tuning import Tuning

IDS = torch.randint(5, 250, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def known() -> Any:
    return tokenizer()


def weights(lm: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in lm.named_parameters()}


def loss_of(lm: Any) -> torch.Tensor:
    """A classifier's or a language model's."""
    if tuning.inner(lm).config.num_labels == 1:
        found: torch.Tensor = lm(input_ids=IDS).logits.square().mean()
        return found
    nats: torch.Tensor = lm(input_ids=IDS, labels=IDS).loss
    return nats


def train(lm: Any, params: Tuning, steps: int = 3, whole: int | None = None) -> Any:
    """Steps with weight decay, which would move whatever an optimizer holds; returns the optimizer."""
    optimizer = training.optimizer(lm, params, 1e-2, 0.5)
    for step in range(steps):
        with tuning.unfreezing(lm, params, step, whole or steps):
            loss = loss_of(lm)
            loss.backward()  # type: ignore[no-untyped-call]
        training.update(lm.parameters(), optimizer, 1e-2, 1.0, float(loss.detach()), step, World())
    return optimizer


def classifier(known: Any, root: Path, depth: int = 4) -> Any:
    model(known, depth=depth).save_pretrained(root)
    return reward_model.initial(root, known, 3, torch.float32, "sdpa")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_last_blocks_alone_move(known: Any, architecture: str) -> None:
    """The top two of four and the final norm; of the rest not a bit."""
    params = Tuning.model_validate({"method": "last_n", "lora_rank": 4, "tuning": {"layers": 2}})
    lm = prepared(model(known, architecture, depth=4), params)
    before = weights(lm)
    train(lm, params)
    moved = {name for name, value in weights(lm).items() if not torch.equal(value, before[name])}
    top = ("layers.2.", "layers.3.", "h.2.", "h.3.", "model.norm.", "ln_f.", "final_layer_norm.")
    assert moved == {name for name in before if any(part in name for part in top)}
    assert {part for part in top if any(part in name for name in moved)} >= {"layers.3."} or architecture == "gpt2"


def test_a_quarter_of_the_blocks_by_default_and_never_more_than_there_are(known: Any) -> None:
    params = Tuning(method="last_n", lora_rank=4)
    lm = prepared(model(known, depth=8), params)
    names = {name for name, value in lm.named_parameters() if value.requires_grad}
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"6", "7"}
    many = Tuning.model_validate({"method": "last_n", "lora_rank": 4, "tuning": {"layers": 3}})
    with pytest.raises(ParamsError, match=r"test\.tuning\.layers: 3; the model has 2 blocks; accepted: 1 to 2"):
        prepared(model(known, depth=2), many)


def test_head_alone_moves(known: Any, tmp_path: Path) -> None:
    params = Tuning(method="head", lora_rank=4)
    lm = prepared(classifier(known, tmp_path).to(torch.bfloat16), params, head=reward_model.HEAD)
    assert lm.score.weight.dtype == torch.float32, "trained weights are fp32"
    lm.float()
    before = weights(lm)
    train(lm, params)
    assert [name for name, value in weights(lm).items() if not torch.equal(value, before[name])] == ["score.weight"]
    assert tuning.report(lm) == (256, 256 / sum(value.numel() for value in lm.parameters()))


def test_adapters_and_head_alone_move(known: Any, tmp_path: Path) -> None:
    lm = prepared(classifier(known, tmp_path), head=reward_model.HEAD)
    before = weights(lm)
    train(lm, LORA)
    moved = {name for name, value in weights(lm).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name or "score" in name} and len(moved) > 20


def test_rates_by_layer(known: Any) -> None:
    """Decay 1/2 over three blocks, by hand; the output embedding is tied and counts as the input's."""
    params = Tuning.model_validate({"method": "full", "lora_rank": 4, "tuning": {"layer_decay": 0.5}})
    lm = prepared(model(known, depth=3), params)
    optimizer = train(lm, params, 1)
    rate = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    expected = {"layers.2": 1e-2, "layers.1": 5e-3, "layers.0": 2.5e-3, "embed_tokens": 1.25e-3, "model.norm": 1e-2}
    for name, value in lm.named_parameters():
        assert rate.pop(id(value)) == next(lr for part, lr in expected.items() if part in name), name
    assert not rate
    decay = {id(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]}
    assert all(decay[id(value)] == (0.5 if value.dim() >= 2 else 0.0) for value in lm.parameters())


def test_no_rates_by_layer_is_the_optimizer_of_before(known: Any) -> None:
    lm, other = model(known), model(known)
    train(lm, Tuning(method="full", lora_rank=4), 2)
    optimizer = training.adamw(other.parameters(), 1e-2, 0.5)
    for step in range(2):
        loss_of(other).backward()  # type: ignore[no-untyped-call]
        training.update(other.parameters(), optimizer, 1e-2, 1.0, 0.0, step, World())
    assert all(torch.equal(one, two) for one, two in zip(lm.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("dials", "expected"),
    [
        # four blocks over eight steps: one more every second step, the embeddings with the last of them
        ({}, ["3", "3", "23", "23", "123", "123", "e0123", "e0123"]),
        ({"layers": 2}, ["3", "3", "3", "3", "23", "23", "23", "23"]),
    ],
)
def test_gradual_unfreezing(known: Any, dials: dict[str, int], expected: list[str]) -> None:
    method = "last_n" if dials else "full"
    params = Tuning.model_validate({"method": method, "lora_rank": 4, "tuning": dials | {"unfreeze": True}})
    lm = prepared(model(known, depth=4), params)
    always = {name for name, value in lm.named_parameters() if value.requires_grad}
    places = {"e": "embed_tokens", **{str(number): f"layers.{number}." for number in range(4)}}
    for step, said in enumerate(expected):
        with tuning.unfreezing(lm, params, step, len(expected)):
            found = {name for name, value in lm.named_parameters() if value.requires_grad}
        assert {mark for mark, part in places.items() if any(part in name for name in found)} == set(said)
        assert "model.norm.weight" in found
        assert {name for name, value in lm.named_parameters() if value.requires_grad} == always
    before = weights(lm)
    train(lm, params, 2, whole=8)  # two steps, both in the first share of the run
    moved = {name for name, value in weights(lm).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "layers.3." in name or "model.norm" in name}


@pytest.mark.parametrize(
    ("architecture", "rank", "dials", "told"),
    [
        (
            "llama",
            4,
            {"lora_targets": ["q_proj", "qq"]},
            r"targets: qq: no linear .* all-linear, or some of q_proj, k_",
        ),
        ("gpt2", 4, {"lora_targets": ["q_proj"]}, r"targets: q_proj: .* some of c_attn, c_proj, c_fc$"),
        ("llama", 4, {"lora_targets": ["lm_head"]}, r"targets: lm_head: no linear layer of the model's blocks"),
        ("gpt2", 4, {"lora_init": "olora"}, r"lora_init: peft's olora .* of gpt2; accepted here: default, gaussian"),
        ("llama", 200, {"lora_init": "pissa"}, r"lora_rank: 200; .* narrowest of which has 128; accepted: 1 to 128"),
        ("llama", 4, {"optimizer": "adamw8bit"}, r"test\.tuning\.optimizer: adamw8bit needs a CUDA .* here: adamw$"),
    ],
)
def test_what_the_model_or_machine_cannot_follow(
    known: Any, architecture: str, rank: int, dials: dict[str, Any], told: str
) -> None:
    params = Tuning.model_validate({"method": "lora", "lora_rank": rank, "tuning": dials})
    with pytest.raises(ParamsError, match=told):
        prepared(model(known, architecture), params)


def test_operations_of_frozen_blocks(known: Any) -> None:
    """Below all that is trained a matrix costs 2 a token; a frozen one that a gradient passes through 4."""
    whole = model(known, depth=4)
    full = training.flops_per_token(whole, 32)
    assert full.model == full.executed
    block = sum(value.numel() for value in whole.model.layers[0].parameters() if value.dim() >= 2)
    last = prepared(model(known, depth=4), Tuning(method="last_n", lora_rank=4))
    found = training.flops_per_token(last, 32)
    head = last.get_output_embeddings().weight.numel()
    assert found.model == full.model and full.executed - found.executed == 3 * block * 4 + head * 2


def test_how_much_is_trained(known: Any) -> None:
    """Rank 4 on the seven linear layers (widths 128 and 512) of each of two blocks, by hand."""
    lm = prepared(model(known))
    base = sum(value.numel() for value in model(known).parameters())
    adapters = 2 * 4 * (4 * (128 + 128) + 3 * (128 + 512))
    assert tuning.report(lm) == (adapters, adapters / (base + adapters))
    assert tuning.report(lm).metrics() == {
        "trained_parameters": adapters, "trained_share": adapters / (base + adapters),
    }  # fmt: skip


def test_weights_in_4_bits_count_as_what_they_stand_for(context: StageContext, known: Any, tmp_path: Path) -> None:
    from pipelines.core import fine_tuning

    model(known).save_pretrained(tmp_path)
    lora, qlora = (
        fine_tuning.load(tmp_path, LORA.model_copy(update={"method": method}), 64, context)
        for method in ("lora", "qlora")
    )
    assert tuning.report(lora) == tuning.report(qlora)


def test_8_bit_moments(known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' paged optimizer gets the groups that torch's would."""
    made: list[Any] = []

    class Paged(torch.optim.AdamW):
        def __init__(self, groups: Any, lr: float, betas: tuple[float, float]) -> None:
            made.append((groups, lr, betas))
            super().__init__(groups, lr=lr, betas=betas)

    monkeypatch.setattr("bitsandbytes.optim.PagedAdamW8bit", Paged)
    dials = {"optimizer": "adamw8bit", "layer_decay": 0.5}
    optimizer = train(model(known), Tuning.model_validate({"method": "full", "lora_rank": 4, "tuning": dials}))
    ((groups, lr, betas),) = made
    assert isinstance(optimizer, Paged) and (lr, betas) == (1e-2, training.BETAS)
    assert [group["factor"] for group in groups if group["weight_decay"]] == [1.0, 0.5, 0.25]
