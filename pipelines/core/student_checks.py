"""Whether a teacher and a student fit together: settled before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipelines.core import context_window, language_models, students
from pipelines.core.errors import ArtifactError, ParamsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipelines.core.params.distill import DistillParams

# In fp32, for each number of the student: its weights and those that both runs begin with; a copy while it is saved.
# For each that is trained: its gradient and two moments, and what a checkpoint has of it where a stopped run goes on.
# 1,610 MiB were seen of a teacher of 113 million and a student of 57 where nothing was resumed; this says 1,730.
STUDENT_BYTES, SAVED_BYTES, TRAINED_BYTES = 8, 4, 16
PARTS = ("model", "normalizer", "pre_tokenizer")  # of tokenizer.json: what decides which ids a text gets


def size(model: PreTrainedModel) -> dict[str, int]:
    """`parameters` and their `bytes` in memory; an embedding that is also the head counts once.

    Numbers packed by 4-bit quantization count as what they stand for; their bytes are those of the packed ones.
    """
    parameters = stored = 0
    for value in model.parameters():  # each tied one once
        packed = getattr(value, "quant_state", None)
        parameters += value.numel() if packed is None else packed.shape.numel()
        stored += value.numel() * value.element_size()
    return {"parameters": parameters, "bytes": stored}


def check_smaller(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Raises ParamsError where the student has more parameters than the teacher. As many is self-distillation."""
    most, found = size(teacher)["parameters"], size(student)["parameters"]
    if found > most:
        raise ParamsError(
            f"distill: the student has {found:,} parameters, its teacher {most:,}; accepted: at most as many. Set a "
            "smaller distill.depth or another student, or let them change places"
        )


def check_memory(params: DistillParams, place: Path, dtype: torch.dtype, available: int) -> None:
    """Refuse a teacher and a student that do not fit into memory together, before either is loaded.

    Counted is what holds a number for each weight; activations, which `micro_tokens` bounds, are not.

    Args:
        place: the teacher's directory.
        dtype: that the teacher is held in.
        available: bytes.

    Raises:
        ParamsError: `keep_layers` is more than the teacher has.
        ArtifactError: a directory without a model; or the estimate is more than there is, and both numbers are told.
    """
    teacher = students.without_weights(place)
    with torch.device("meta"):
        if params.keep_layers is not None:
            student, _ = students.from_layers(teacher, params.keep_layers)
        elif params.depth is not None:
            student = students.random(teacher.config, params.depth)
        else:
            student = students.without_weights(language_models.fetched(params.student, "distill.student"))
    theirs, ours = (size(model)["parameters"] for model in (teacher, student))
    trained = ours if params.train_embedding else ours - student.get_input_embeddings().weight.numel()
    need = dtype.itemsize * theirs + STUDENT_BYTES * ours + max(TRAINED_BYTES * trained, SAVED_BYTES * ours)
    if need > available:
        smaller = {"layers": "lower distill.keep_layers", "random": "lower distill.depth"}
        raise ArtifactError(
            f"{place}: a teacher of {theirs / 1e6:,.1f} million parameters and a student of {ours / 1e6:,.1f}, "
            f"{trained / 1e6:,.1f} of them trained, take about {need / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are available; free some, "
            f"{smaller.get(params.student, 'name a smaller distill.student')}, or take a smaller teacher"
        )


def check_whole(model: PreTrainedModel, place: Path | str) -> None:
    """Raises ArtifactError where the model in `place` is quantized.

    transformers reads codes of a format that it does not know as weights, and drops their scales.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ArtifactError(f"{place}: the model is quantized; name the one it was made from")


def check_finite(model: PreTrainedModel, place: Path | str) -> None:
    """Raises ArtifactError where a weight of the model read from `place` is NaN or infinite; names the tensor."""
    for name, values in model.state_dict().items():
        if not values.is_floating_point() or bool(torch.isfinite(values).all()):
            continue
        bad = ~torch.isfinite(values)
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise ArtifactError(
            f"{place}: weight {name} has {int(bad.sum())} values of {values.numel()} that are NaN or infinite, the "
            f"first at {first}: {values[first].item()}; only finite weights are accepted: train or copy it again"
        )


def check_context(params: DistillParams, *models: PreTrainedModel) -> None:
    """Raises ParamsError where what is to be read does not fit the context of teacher and student."""
    answered = params.max_prompt_tokens + params.max_new_tokens
    asked = {"distill.max_length": params.max_length, "distill.max_prompt_tokens + distill.max_new_tokens": answered}
    context_window.check(asked, "the context of teacher and student", *(model.config for model in models))


def check_top_k(k: int | None, teacher: PreTrainedModel) -> None:
    """Raises ParamsError where more of the teacher's likeliest tokens are to be kept than there are."""
    rows = teacher.get_output_embeddings().weight.shape[0]
    if k is not None and k > rows:
        raise ParamsError(f"distill.top_k: {k}; the teacher has {rows} tokens; accepted: 1 to {rows}, or null")


def check_same_rows(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Raises ArtifactError where the logits differ in width, which padding beyond the tokenizer's tokens can do."""
    wanted, found = (model.get_output_embeddings().weight.shape[0] for model in (teacher, student))
    if wanted != found:
        raise ArtifactError(
            f"the student's head has {found} rows, the teacher's {wanted}, so their logits cannot be compared; "
            f"accepted: {wanted} (transformers: model.resize_token_embeddings({wanted}), then save it)"
        )


def check_same_tokenizer(teacher_dir: Path, student_dir: Path) -> None:
    """Whether two model directories split every text into the same ids.

    Compared are the vocabularies, the special tokens, those that are found in a text before it is cut, the merges, and
    how text is cleaned and cut.

    Raises:
        ArtifactError: a directory holds no fast tokenizer; or they differ: the message names the first token
            (the lowest id) that does, and its id in both.
    """
    teacher, student = _tokenizer(teacher_dir), _tokenizer(student_dir)
    different = (
        _different_token(teacher, student)
        or _different_special(teacher, student)
        or _different_added(_whole(teacher), _whole(student))
        or _different_part(_whole(teacher), _whole(student))
    )
    if different:
        raise ArtifactError(
            f"the student's tokenizer ({student_dir}) is not the teacher's ({teacher_dir}): {different}. The two must "
            "be equal: train the student with the teacher's tokenizer, or choose one that was"
        )


def _tokenizer(place: Path) -> Any:
    if not place.is_dir():
        raise ArtifactError(f"{place}: no such directory; a Hugging Face model directory is needed")
    tokenizer = language_models.load_tokenizer(str(place))
    if not tokenizer.is_fast:
        raise ArtifactError(f"{place}: its tokenizer has no tokenizer.json, so its merges cannot be compared")
    return tokenizer


def _different_token(teacher: Any, student: Any) -> str | None:
    """The first token with another id; before it those the teacher lacks only if all of its own agree."""
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    odd = [*(t for t in theirs if theirs[t] != ours.get(t)), *(t for t in ours if t not in theirs)]
    if not odd:
        return None
    first = min(odd, key=lambda token: (token not in theirs, theirs.get(token, ours.get(token))))
    return (
        f"token {first!r} has id {theirs.get(first, 'none')} in the teacher's and {ours.get(first, 'none')} in the "
        f"student's; {len(odd)} tokens differ ({len(theirs)} and {len(ours)} in all)"
    )


def _different_special(teacher: Any, student: Any) -> str | None:
    theirs, ours = teacher.special_tokens_map, student.special_tokens_map
    for name in sorted(theirs.keys() | ours.keys()):
        if str(theirs.get(name)) != str(ours.get(name)):
            ids = [getattr(one, f"{name}_id", None) for one in (teacher, student)]
            return f"{name} is {theirs.get(name)} (id {ids[0]}) and {ours.get(name)} (id {ids[1]})"
    return None


def _whole(tokenizer: Any) -> dict[str, Any]:
    """As tokenizer.json has it."""
    whole: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return whole


def _different_added(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The first token (the lowest id) that only one of the two finds whole in a text, or that they find otherwise."""
    added: list[dict[int, dict[str, Any]]] = [
        {one["id"]: one for one in whole["added_tokens"]} for whole in (theirs, ours)
    ]
    unused = () if theirs["normalizer"] or ours["normalizer"] else ("normalized",)
    for number in sorted(added[0].keys() | added[1].keys()):
        left, right = (one.get(number, {}) for one in added)
        token = f"{(left | right)['content']!r} (id {number})"
        if not left or not right:
            return f"{token} is an added token of the {'teacher' if left else 'student'}'s alone"
        if odd := [key for key in left if key not in unused and left[key] != right[key]]:
            return f"of the added token {token} {odd[0]} is {left[odd[0]]} and {right[odd[0]]}"
    return None


def _different_part(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The first merge that differs, or the part of the tokenizer."""
    merges = [part["model"].get("merges") or [] for part in (theirs, ours)]
    for rank, (left, right) in enumerate(zip(*merges, strict=False)):
        if left != right:
            return f"merge {rank} is {left} and {right}"
    if len(merges[0]) != len(merges[1]):
        return f"they have {len(merges[0])} and {len(merges[1])} merges"
    odd = [name for name in PARTS if theirs[name] != ours[name]]
    return f"their {odd[0]} differ (tokenizer.json)" if odd else None
