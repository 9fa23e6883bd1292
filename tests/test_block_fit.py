"""Blocks fitted to a teacher's states: against least squares by another way, and what a student gains by it."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tokenizer
from test_int8 import tiny
from test_students import teacher_of

from pipelines.core import block_fit, blockwise, int8, students, tuning
from pipelines.core.errors import ArtifactError

TRAIN, TEST = torch.randint(5, 250, (2, 24, 20), generator=torch.Generator().manual_seed(4))


def nothing(done: int, total: int) -> None:
    pass


@torch.no_grad()
def states(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each block reads, and what the last one gives."""
    found: list[torch.Tensor] = []
    blocks = tuning.blocks(model)
    hooks = [
        block.register_forward_pre_hook(
            lambda _, given, named: found.append((given or tuple(named.values()))[0]), with_kwargs=True
        )
        for block in blocks
    ]
    hooks.append(blocks[-1].register_forward_hook(lambda _, given, told: found.append(blockwise.output(told))))
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt", "qwen3"])
def test_a_student_comes_nearer_to_its_teacher_also_on_other_rows(architecture: str) -> None:
    teacher = teacher_of(tokenizer(), architecture)
    before, kept = students.from_layers(teacher, 3)
    after, untouched = copy.deepcopy(before), copy.deepcopy(teacher.state_dict())
    found = block_fit.fit(teacher, kept, TRAIN, 0.1, 8, nothing)
    block_fit.put(after, found)
    assert all(torch.equal(value, untouched[name]) for name, value in teacher.state_dict().items())
    assert len(found) == 3 and all(one.after < one.before for one in found)
    for ids in (TRAIN, TEST):
        wanted = states(teacher, ids)
        gaps = [
            sum(float((states(one, ids)[place + 1] - wanted[until]).square().mean() / wanted[until].square().mean())
                for place, until in enumerate([*kept[1:], 5]))
            for one in (before, after)
        ]  # fmt: skip
        assert gaps[1] < 0.9 * gaps[0]
    changed = {name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])}
    last = {"gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h", "opt": ".fc2"}.get(architecture, "mlp.down_proj")
    assert len(changed) == 3 and all(name.endswith(f"{last}.weight") for name in changed)


def test_the_first_weight_is_that_of_weighted_ridge_regression() -> None:
    """As one long least squares with the ridge's rows below, in double precision, for which states are read anew."""
    teacher = teacher_of(tokenizer(), "llama")
    _, kept = students.from_layers(teacher, 3)
    found = block_fit.fit(teacher, kept, TRAIN, 0.2, 8, nothing)[0]
    wanted = states(teacher, TRAIN)[kept[1]].flatten(0, 1).double()
    shorter, _ = students.from_layers(teacher, 1)
    block = shorter.model.layers[0]
    block.load_state_dict(teacher.model.layers[0].state_dict())
    read: list[torch.Tensor] = []
    block.mlp.down_proj.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    missing = wanted - states(shorter, TRAIN)[1].flatten(0, 1).double()
    size = wanted.square().mean(1, keepdim=True).sqrt()
    entries = read[0].detach().flatten(0, 1).double() / size
    ridge = 0.2 * entries.square().sum(0).mean()
    rows = torch.cat([entries, ridge.sqrt() * torch.eye(entries.shape[1])])
    change = torch.linalg.lstsq(rows, torch.cat([missing / size, torch.zeros(entries.shape[1], 32)])).solution.t()
    assert torch.allclose(found.weight, (block.mlp.down_proj.weight + change).float(), atol=2e-4)
    assert found.before == pytest.approx(float((missing / size).square().mean()), rel=1e-4)
    assert found.after == pytest.approx(float((missing / size - entries @ change.t()).square().mean()), rel=1e-3)


def test_with_all_blocks_or_an_endless_ridge_nothing_changes() -> None:
    teacher = teacher_of(tokenizer(), "llama")
    for kept, ridge in ((list(range(5)), 1e-3), ([0, 2, 4], 1e9)):
        for origin, one in zip(kept, block_fit.fit(teacher, kept, TRAIN, ridge, 8, nothing), strict=True):
            copied = int8.rows_of(teacher.model.layers[origin].get_submodule(one.layer))
            assert torch.allclose(one.weight, copied, atol=1e-5)


def test_a_token_with_huge_states_counts_as_much_as_any_other() -> None:
    """One whose states are a thousand times the others' size would be all that is fitted."""
    teacher = teacher_of(tokenizer(), "llama")
    with torch.no_grad():
        teacher.model.embed_tokens.weight[7] *= 1000
    ids = TRAIN.clone()
    ids[:, 0] = 7
    _, kept = students.from_layers(teacher, 3)
    found = block_fit.fit(teacher, kept, ids, 0.1, 8, nothing)
    assert all(one.after < 0.9 * one.before for one in found)


def test_a_single_block_is_the_last() -> None:
    teacher = teacher_of(tokenizer(), "llama")
    student, kept = students.from_layers(teacher, 1)
    (one,) = block_fit.fit(teacher, kept, TRAIN, 0.1, 8, nothing)
    block_fit.put(student, [one])
    gap = (states(student, TRAIN)[1] - states(teacher, TRAIN)[5]).flatten(0, 1)
    size = states(teacher, TRAIN)[5].flatten(0, 1).square().mean(1, keepdim=True)
    assert float((gap.square() / size).mean()) == pytest.approx(one.after, rel=1e-3)


def test_in_bf16_the_fit_is_that_of_fp32_but_for_rounding() -> None:
    teacher = teacher_of(tokenizer(), "llama")
    exact = block_fit.fit(teacher, [0, 2, 4], TRAIN, 0.1, 8, nothing)
    rounded = block_fit.fit(copy.deepcopy(teacher).bfloat16(), [0, 2, 4], TRAIN, 0.1, 8, nothing)
    for one, other in zip(exact, rounded, strict=True):
        assert other.weight.dtype is torch.float32
        assert other.after == pytest.approx(one.after, rel=0.05)


@pytest.mark.parametrize(
    ("architecture", "last"), [("gemma3_text", r"mlp\.down_proj"), ("mixtral", r"self_attn\.o_proj")]
)
def test_blocks_that_do_more_with_what_their_last_layer_gives_are_refused(architecture: str, last: str) -> None:
    """A norm, or experts whose weights are no linear layers: they read what is called the last layer here."""
    teacher = tiny(architecture, initializer_range=0.3)
    for trained in (teacher, copy.deepcopy(teacher).bfloat16()):
        with pytest.raises(ArtifactError, match=rf"{architecture}: .*\({last}\) .* accepted: distill\.fit: null"):
            block_fit.fit(trained, [0, 1], TRAIN % 96, 0.1, 8, nothing)


def test_a_ridge_too_small_for_so_few_tokens_is_told() -> None:
    teacher = teacher_of(tokenizer(), "llama")
    with pytest.raises(ArtifactError, match=r"block 0 .* so few tokens have no solution .* raise distill\.fit"):
        block_fit.fit(teacher, [0, 2, 4], TRAIN[:1, :8], 1e-12, 8, nothing)


def test_states_that_are_no_numbers_are_told() -> None:
    teacher = teacher_of(tokenizer(), "llama")
    with torch.no_grad():
        teacher.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(ArtifactError, match="its states on the training rows are not finite"):
        block_fit.fit(teacher, [0, 2, 4], TRAIN, 0.1, 8, nothing)
