"""A language model with a head for a task: its logits, what of it is trained, what is computed once, what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toy_tasks
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipelines.core import (
    k_way,
    packing,
    task_frozen,
    task_mixture,
    task_model,
    task_objective,
    task_saved,
    task_training,
    training,
    tuning,
)
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError, ParamsError
from pipelines.core.task_inputs import Example, Kind

KINDS: list[Kind] = ["classification", "entailment", "similarity", "choice"]
EXACT: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> toy_tasks.Base:
    return toy_tasks.base(tmp_path_factory.mktemp("base"))


def alone(model: Any, score: torch.Tensor, sequence: tuple[int, ...]) -> torch.Tensor:
    """Logits of one sequence, by transformers' own forward pass."""
    hidden = model.base_model(input_ids=torch.tensor([sequence])).last_hidden_state[0, -1]
    found: torch.Tensor = hidden @ score.t()
    return found


def moved(model: task_model.TaskModel) -> None:
    """As if it had been trained."""
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape), alpha=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_each_sequence_alone(kind: Kind, base: toy_tasks.Base, context: StageContext) -> None:
    one = toy_tasks.task(kind, base.special, 9)
    model = toy_tasks.load(base, toy_tasks.params(), context).eval()
    batch = toy_tasks.batch_of(one, model)
    found = task_model.logits(model, batch, context)
    sequences = [sequence for number in batch.numbers for sequence in one.train[number].sequences]
    assert batch.sizes == [len(one.train[number].sequences) for number in batch.numbers]
    torch.testing.assert_close(found, torch.stack([alone(model.lm, model.score.weight, s) for s in sequences]), **EXACT)


def test_what_sequences_share_is_encoded_once_and_every_token_predicts_the_next() -> None:
    one = Example("1", "1", ((7, 1, 2, 8, 3, 9), (7, 1, 2, 8, 4, 5, 9)), 0, (), ())
    found = task_model.encode(one)
    assert found.ids == [7, 1, 2, 8, 3, 9, 8, 4, 5, 9]
    assert found.labels == [1, 2, 8, 3, 9, -100, 4, 5, 9, -100]
    assert found.branches == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("method", ["full", "head", "lora"])
def test_special_tokens_begin_as_what_the_base_knows(method: str, base: toy_tasks.Base, context: StageContext) -> None:
    model = toy_tasks.load(base, toy_tasks.params(method=method, special_tokens="known"), context)
    read = tuning.inner(model.lm).get_input_embeddings()
    newline = base.tokenizer.encode("\n", add_special_tokens=False)[-1]
    known = torch.tensor([packing.separator_id(base.tokenizer), newline, newline])
    assert torch.equal(read(torch.tensor(list(base.special))), read(known).float())
    drawn = toy_tasks.load(base, toy_tasks.params(method=method, special_tokens="drawn"), context)
    fresh = tuning.inner(drawn.lm).get_input_embeddings()(torch.tensor(list(base.special)))
    assert len({tuple(row.tolist()) for row in fresh}) == 3  # delimiter and extract differ


def test_similarity_does_not_know_which_text_comes_first(base: toy_tasks.Base, context: StageContext) -> None:
    one = toy_tasks.task("similarity", base.special, 6)
    model = toy_tasks.load(base, toy_tasks.params(), context)
    swapped = [example._replace(sequences=example.sequences[::-1]) for example in one.train]
    found, other = (
        torch.tensor(task_training.predict(model, "similarity", examples, context, toy_tasks.quiet))
        for examples in (one.train, swapped)
    )
    torch.testing.assert_close(found, other, **EXACT)


def test_class_logits_by_hand() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 5.0], [7.0, 11.0], [13.0, 17.0]])
    assert torch.equal(task_objective.class_logits("classification", rows, [1, 1, 1, 1]), rows)
    added = task_objective.class_logits("similarity", rows, [2, 2])
    assert added.tolist() == [[4.0, 7.0], [20.0, 28.0]]
    chosen = task_objective.class_logits("choice", rows[:, :1], [3, 1])
    assert chosen.tolist() == [[1.0, 3.0, 7.0], [13.0, -torch.inf, -torch.inf]]


def test_example_loss_by_hand() -> None:
    # -ln(1 / (1 + e^-2)), and candidates 1 and 1 of which a third is absent: ln 2.
    found = torch.tensor([[1.0, 3.0], [1.0, 1.0]])
    assert float(task_objective.example_loss(found, [1.0, 0.0], False)) == pytest.approx(0.126928 + 0.693147, abs=1e-5)
    absent = torch.tensor([[1.0, 1.0, -torch.inf]], requires_grad=True)
    task_objective.example_loss(absent, [1.0], False).backward()  # type: ignore[no-untyped-call]
    assert absent.grad is not None and absent.grad.tolist() == [[0.5, -0.5, 0.0]]
    assert float(task_objective.example_loss(torch.tensor([[1.0], [4.0]]), [0.5, 2.0], True)) == 4.25


@pytest.mark.parametrize(("method", "layers"), [("head", 3), ("last_n", 2), ("last_n", 1), ("last_n", 3)])
@pytest.mark.parametrize("kind", ["classification", "choice"])
def test_from_the_frozen_part_on_it_is_the_whole_forward(
    method: str, layers: int, kind: Kind, base: toy_tasks.Base, context: StageContext
) -> None:
    one = toy_tasks.task(kind, base.special, 9)
    dials = {"layers": layers} if method == "last_n" else {}
    model = toy_tasks.load(base, toy_tasks.params(method=method, tuning=dials), context)
    sequences = [task_model.encode(example) for example in one.train]
    frozen = task_frozen.frozen_states(model, sequences, context, toy_tasks.quiet)
    assert frozen.blocks == (3 if method == "head" else 3 - layers)
    (batch,) = k_way.batches(frozen.sequences, 4096, model.pad)
    hidden = task_frozen.forward_from(model, batch, frozen, context)
    found = task_model.head_logits(model, task_model.at_extract(hidden, batch))
    whole = toy_tasks.batch_of(one, model)
    expected = task_model.logits(model, whole, context)
    order, other = (
        sorted(zip(part.numbers, torch.split(values, part.sizes), strict=True), key=lambda pair: pair[0])
        for part, values in ((batch, found), (whole, expected))
    )
    torch.testing.assert_close(torch.cat([v for _, v in order]), torch.cat([v for _, v in other]), **EXACT)
    assert all("forward" not in vars(block) for block in tuning.blocks(model.lm)), "nothing is left skipped"


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "qwen3", "opt"])
def test_frozen_blocks_of_other_architectures(architecture: str, tmp_path: Path, context: StageContext) -> None:
    made = toy_tasks.base(tmp_path, 2, architecture)
    one = toy_tasks.task("entailment", made.special, 5)
    model = toy_tasks.load(made, toy_tasks.params(method="last_n"), context)
    frozen = task_frozen.frozen_states(
        model, [task_model.encode(example) for example in one.train], context, toy_tasks.quiet
    )
    batch = toy_tasks.batch_of(one, model)
    hidden = task_frozen.forward_from(model, batch, frozen, context)
    whole = task_training.hidden_states(model, batch, None, context)
    filled = batch.rows.documents >= 0
    torch.testing.assert_close(hidden[filled], whole[filled], **EXACT)


@pytest.mark.parametrize("kind", ["classification", "choice", "similarity"])
@pytest.mark.parametrize(
    ("method", "finer"),
    [
        ("full", {}),
        ("last_n", {}),
        ("head", {}),
        ("lora", {}),
        ("lora", {"lora_variant": "dora"}),
        ("lora", {"lora_variant": "rslora", "lora_targets": ("q_proj", "up_proj")}),
        ("lora", {"lora_init": "pissa"}),
        ("lora", {"lora_init": "olora"}),
    ],
)
def test_what_is_saved_is_what_was_trained(
    method: str, finer: dict[str, Any], kind: Kind, base: toy_tasks.Base, context: StageContext, tmp_path: Path
) -> None:
    one = toy_tasks.task(kind, base.special, 6)
    dials = toy_tasks.params(method=method, tuning=finer, transferred_layers=2)
    model = toy_tasks.load(base, dials, context, task_mixture.outputs_of(one))
    moved(model)
    before = task_training.predict(model, kind, one.train, context, toy_tasks.quiet)
    task_saved.save(task_saved.merged(model), base.tokenizer, one, 32, tmp_path, context)

    plain: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert plain.config.num_hidden_layers == 2 and len(AutoTokenizer.from_pretrained(tmp_path)) == 303
    sequences = [sequence for example in one.train for sequence in example.sequences]
    width = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[model.pad] * (width - len(sequence))] for sequence in sequences])
    with torch.no_grad():
        found = plain(input_ids=ids, attention_mask=(ids != model.pad).long()).logits
    sizes = [len(example.sequences) for example in one.train]
    after = task_objective.class_logits(kind, found, sizes)
    for row, expected in zip(after.tolist(), before, strict=True):
        assert row[: len(expected)] == pytest.approx(expected, abs=2e-5)

    again = task_saved.load_saved(tmp_path, context)
    assert again.task["kind"] == kind and again.task["max_length"] == 32
    loaded = task_training.predict(again.model, kind, one.train, context, toy_tasks.quiet)
    for one_row, other in zip(loaded, before, strict=True):
        assert one_row == pytest.approx(other, abs=2e-5)


def test_layer_decay_and_unfreezing_by_hand(base: toy_tasks.Base, context: StageContext) -> None:
    model = toy_tasks.load(base, toy_tasks.params(), context)
    names = {id(value): name for name, value in model.named_parameters()}
    groups = tuning.groups(model, 0.01, 0.5)
    factor = {names[id(value)]: group["factor"] for group in groups for value in group["params"]}
    assert factor["score.weight"] == factor["lm.model.norm.weight"] == 1.0
    assert factor["lm.model.layers.2.mlp.up_proj.weight"] == 1.0
    assert factor["lm.model.layers.1.mlp.up_proj.weight"] == 0.5
    assert factor["lm.model.layers.0.input_layernorm.weight"] == 0.25
    assert factor["lm.model.embed_tokens.weight"] == 0.125
    assert set(factor) == set(dict(model.named_parameters())), "each once"

    dials = toy_tasks.params(tuning={"unfreeze": True})
    for step, lowest in ((0, 1.0), (1, 1.0), (2, 0.5), (3, 0.5), (4, 0.125), (5, 0.125)):  # three blocks, six steps
        with tuning.unfreezing(model, dials, step, 6):
            trained = {name for name, value in model.named_parameters() if value.requires_grad}
        assert {name for name in factor if factor[name] >= lowest} == trained


@pytest.mark.parametrize(("method", "becomes"), [("head", "head"), ("full", "full"), ("lora", "full")])
def test_random_weights_are_other_weights(
    base: toy_tasks.Base, context: StageContext, method: str, becomes: str
) -> None:
    """Trained as asked; where adapters were asked for, all of them: adapters on noise learn nothing."""
    found = toy_tasks.load(base, toy_tasks.params(method=method), context, random=True)
    given = toy_tasks.load(base, toy_tasks.params(method=becomes), context)
    assert found.method == becomes
    trained = [[value.requires_grad for value in model.parameters()] for model in (found, given)]
    assert trained[0] == trained[1] and any(trained[0])
    assert torch.equal(found.score.weight, given.score.weight), "the head is the same draw"
    pairs = zip(found.lm.parameters(), given.lm.parameters(), strict=True)
    assert not any(torch.equal(one, other) for one, other in pairs if one.dim() == 2)


def test_mistakes_are_told(base: toy_tasks.Base, context: StageContext, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"transferred_layers: 4; the base model has 3"):
        toy_tasks.load(base, toy_tasks.params(transferred_layers=4), context)
    with pytest.raises(ParamsError, match=r"tuning\.layers: 9; the model has 3 blocks; accepted: 1 to 3"):
        toy_tasks.load(base, toy_tasks.params(method="last_n", tuning={"layers": 9}), context)
    with pytest.raises(ValueError, match=r"tuning\.layers \(3\) must be at most transferred_layers \(2\)"):
        toy_tasks.params(method="last_n", tuning={"layers": 3}, transferred_layers=2)
    with pytest.raises(ArtifactError, match=r"no task\.json"):
        task_saved.load_saved(tmp_path, context)
    with pytest.raises(ValueError, match="set transfer.auxiliary: 0"):
        toy_tasks.params(method="head", auxiliary=0.5)
    with pytest.raises(ValueError, match="a weight of at least 0"):
        toy_tasks.params(auxiliary=-0.5)
    with pytest.raises(ValueError, match=r"tuning\.unfreeze: method lora does not use it, method full, last_n does"):
        toy_tasks.params(method="lora", tuning={"unfreeze": True})


def test_8_bit_moments_need_a_gpu(base: toy_tasks.Base, context: StageContext) -> None:
    with pytest.raises(ParamsError, match=r"tuning\.optimizer: adamw8bit needs a CUDA device"):
        toy_tasks.load(base, toy_tasks.params(method="head", tuning={"optimizer": "adamw8bit"}), context)


def test_adapters_over_4_bits_are_merged_into_the_base_as_it_was(
    base: toy_tasks.Base, context: StageContext, tmp_path: Path
) -> None:
    one = toy_tasks.task("similarity", base.special, 6)
    model, plain = (
        toy_tasks.load(base, toy_tasks.params(method=method, transferred_layers=2), context)
        for method in ("qlora", "lora")
    )
    moved(model)
    training.load_trained_state(plain, training.trained_state(model))
    found, expected = (
        torch.tensor(task_training.predict(which, "similarity", one.train, context, toy_tasks.quiet))
        for which in (model, plain)
    )
    task_saved.save(task_saved.merged(model), base.tokenizer, one, 32, tmp_path, context)
    saved = task_saved.load_saved(tmp_path, context).model
    after = torch.tensor(task_training.predict(saved, "similarity", one.train, context, toy_tasks.quiet))
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=2e-5)
    assert (found - expected).abs().max() > 1e-4, "4 bits are not the base as it was"


def test_in_bf16_what_is_frozen_is_bf16_and_what_is_trained_fp32(base: toy_tasks.Base, tmp_path: Path) -> None:
    context = StageContext(stage="test", root=tmp_path, fingerprint="0" * 64, precision="bf16")
    one = toy_tasks.task("choice", base.special, 9)
    exact = StageContext(stage="test", root=tmp_path, fingerprint="0" * 64)
    for method in ("full", "head", "last_n", "lora"):
        dials = toy_tasks.params(method=method, dropout=0.0)
        model = toy_tasks.load(base, dials, context, 1)
        for value in model.parameters():
            assert value.dtype == (torch.float32 if value.requires_grad else torch.bfloat16)
        found, expected = (
            torch.cat([torch.tensor(row) for row in task_training.predict(m, "choice", one.train, c, toy_tasks.quiet)])
            for m, c in ((model, context), (toy_tasks.load(base, dials, exact, 1), exact))
        )
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)
