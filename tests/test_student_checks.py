"""Teacher and student that do not fit together are refused before training, with what was found and where."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import model, tokenizer
from test_distill import TINY

from pipelines.core import student_checks, students
from pipelines.core.errors import ArtifactError, ParamsError
from pipelines.core.params.distill import DistillParams


@pytest.fixture(scope="module")
def known() -> Any:
    return tokenizer()


def test_size_by_hand(known: Any) -> None:
    """Llama, one block 64 wide: four square matrices, three 64 x 256, three gains, an embedding that is the head."""
    lm = model(known, depth=1)
    count = 4 * 64 * 64 + 3 * 64 * 256 + 3 * 64 + len(known) * 64
    assert student_checks.size(lm) == {"parameters": count, "bytes": 4 * count}
    assert student_checks.size(lm.to(torch.bfloat16)) == {"parameters": count, "bytes": 2 * count}
    config = copy.deepcopy(lm.config)
    config.tie_word_embeddings = False
    assert student_checks.size(type(lm)(config))["parameters"] == count + len(known) * 64


def test_larger_student_is_refused_an_equal_one_is_not(known: Any) -> None:
    small, large = model(known, depth=1), model(known, depth=2)
    student_checks.check_smaller(large, large)
    with pytest.raises(ParamsError, match="the student has .* parameters, its teacher .*; accepted: at most as many"):
        student_checks.check_smaller(small, large)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_no_number_is_named(known: Any, value: float) -> None:
    lm = model(known)
    student_checks.check_finite(lm, "teacher")
    with torch.no_grad():
        lm.model.layers[1].mlp.up_proj.weight[3, 5] = value
    expected = r"teacher: weight model.layers.1.mlp.up_proj.weight has 1 values.*first at \(3, 5\)"
    with pytest.raises(ArtifactError, match=expected):
        student_checks.check_finite(lm, "teacher")


@pytest.mark.parametrize("kind", ["layers", "random", "directory"])
@pytest.mark.parametrize("whole", [True, False])
def test_too_little_memory_is_told_with_the_numbers(kind: str, whole: bool, known: Any, tmp_path: Path) -> None:
    """The teacher in its type; the student in fp32, as it began, and its gradients, moments and checkpoint."""
    teacher, student = model(known, depth=3), model(known, depth=1)
    teacher.save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student")
    chosen = {"layers": {"keep_layers": 2}, "random": {"depth": 2}, "directory": {"student": str(tmp_path / "student")}}
    if kind == "layers":
        student, _ = students.from_layers(teacher, 2)
    elif kind == "random":
        student = model(known, depth=2)
    params = TINY | {"student": kind, "keep_layers": None, "depth": None, "train_embedding": whole} | chosen[kind]
    if kind == "random" and not whole:
        params["train_embedding"] = whole = True  # a random embedding is never kept
    theirs, ours = (student_checks.size(one)["parameters"] for one in (teacher, student))
    trained = ours - (0 if whole else student.get_input_embeddings().weight.numel())
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        need = size * theirs + 8 * ours + max(16 * trained, 4 * ours)
        student_checks.check_memory(DistillParams(**params), tmp_path / "teacher", dtype, need)
        with pytest.raises(
            ArtifactError, match=r"teacher: a teacher of .*, take about 0\.0 GiB of memory, 0\.0 GiB are"
        ):
            student_checks.check_memory(DistillParams(**params), tmp_path / "teacher", dtype, need - 1)
    advice = {"layers": "lower distill.keep_layers", "random": "lower distill.depth"}
    with pytest.raises(ArtifactError, match=advice.get(kind, "name a smaller distill.student")):
        student_checks.check_memory(DistillParams(**params), tmp_path / "teacher", torch.float32, 0)


def test_heads_of_other_widths_are_refused(known: Any) -> None:
    wide = model(known)
    wide.resize_token_embeddings(320, mean_resizing=False)
    with pytest.raises(ArtifactError, match=f"head has {len(known)} rows, the teacher's 320"):
        student_checks.check_same_rows(wide, model(known))


def directory(place: Path, known: Any) -> Path:
    """As a model directory holds a tokenizer; its configuration is all that is looked at besides."""
    known.save_pretrained(place)
    (place / "config.json").write_text('{"model_type": "llama"}')
    return place


def changed(place: Path, known: Any, change: Any) -> Path:
    """A directory whose tokenizer.json was edited."""
    directory(place, known)
    file = place / "tokenizer.json"
    whole = json.loads(file.read_text())
    change(whole)
    file.write_text(json.dumps(whole))
    return place


def test_tokenizers_that_differ(known: Any, tmp_path: Path) -> None:
    teacher = directory(tmp_path / "teacher", known)
    student_checks.check_same_tokenizer(teacher, directory(tmp_path / "same", known))
    ids = known.get_vocab()
    first, second = sorted(ids, key=lambda token: ids[token])[280:282]

    def exchange(whole: Any) -> None:
        vocabulary = whole["model"]["vocab"]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    def reorder(whole: Any) -> None:
        merges = whole["model"]["merges"]
        merges[-1], merges[-2] = merges[-2], merges[-1]

    def lower(whole: Any) -> None:
        whole["normalizer"] = {"type": "Lowercase"}

    for name, change, expected in (
        ("exchange", exchange, "has id 280 in the teacher's and 281 in the student's; 2 tokens differ"),
        ("reorder", reorder, f"merge {len(json.loads(known.backend_tokenizer.to_str())['model']['merges']) - 2} is"),
        ("lower", lower, "their normalizer differ"),
    ):
        with pytest.raises(ArtifactError, match=expected) as told:
            student_checks.check_same_tokenizer(teacher, changed(tmp_path / name, known, change))
        assert str(tmp_path / name) in str(told.value)
        assert name != "exchange" or repr(first) in str(told.value)


def test_vocabularies_of_other_sizes_and_special_tokens(known: Any, tmp_path: Path) -> None:
    teacher = directory(tmp_path / "teacher", known)
    other = directory(tmp_path / "longer", tokenizer(320))
    with pytest.raises(ArtifactError, match="has id none in the teacher's and 300 in the student's"):
        student_checks.check_same_tokenizer(teacher, other)
    swapped = copy.deepcopy(known)
    swapped.pad_token = known.eos_token
    with pytest.raises(ArtifactError, match=rf"pad_token is .* \(id {known.pad_token_id}\) and .* \(id "):
        student_checks.check_same_tokenizer(teacher, directory(tmp_path / "pad", swapped))
    with pytest.raises(ArtifactError, match="no such directory"):
        student_checks.check_same_tokenizer(teacher, tmp_path / "nowhere")


def test_tokens_that_one_of_two_tokenizers_finds_whole_in_a_text(known: Any, tmp_path: Path) -> None:
    """The vocabulary is the same, what a text is split into is not."""
    teacher = directory(tmp_path / "teacher", known)
    ids = known.get_vocab()
    word = next(token for token in ids if token.isascii() and token.isalpha() and f"Ġ{token}" in ids)
    other = copy.deepcopy(known)
    other.add_tokens([word])
    assert other.get_vocab() == ids and other(f" {word}")["input_ids"] != known(f" {word}")["input_ids"]
    with pytest.raises(ArtifactError, match=rf"{word}' \(id {ids[word]}\) is an added token of the student's alone"):
        student_checks.check_same_tokenizer(teacher, directory(tmp_path / "whole", other))

    def swallow(whole: Any) -> None:
        whole["added_tokens"][-1]["lstrip"] = True

    with pytest.raises(ArtifactError, match=r"of the added token .* lstrip is False and True"):
        student_checks.check_same_tokenizer(teacher, changed(tmp_path / "swallows", known, swallow))
