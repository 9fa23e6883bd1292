"""One model in, a directory a variant out: what each is made by, checked before anything is written."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipelines.core import (
    artifacts,
    attention,
    bnb_variants,
    demonstrations,
    gguf_export,
    int8,
    language_models,
    packing,
    reading,
    reward_model,
    scoring,
    variants,
)
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError, ParamsError
from pipelines.core.params.quantize import CALIBRATED, QuantizeParams


class Subject(NamedTuple):
    """A model that is made smaller."""

    name: str  # before its variants' names, with a dash; empty for the model itself
    place: Path
    variants: Sequence[str]
    classifier: bool


def full_name(subject: Subject, variant: str) -> str:
    """Name of a variant's directory, and of its metrics."""
    return f"{subject.name}-{variant}" if subject.name else variant


def whole_name(subject: Subject) -> str:
    """What the model itself is called among its variants."""
    return subject.name or "original"


def load(subject: Subject, context: StageContext) -> Any:
    """The model that is made smaller, in the context's type.

    Raises:
        ArtifactError: no model can be loaded from its directory.
    """
    if subject.classifier:
        return reward_model.load(subject.place, context)[0]
    kind = attention.choose(context.device, scoring.WINDOW)
    return language_models.load(str(subject.place), context.dtype, kind).to(context.device).eval()


def calibration_rows(params: QuantizeParams, data: Path, tokenizer: Any) -> list[list[int]]:
    """Token ids of chats and of pieces of the corpus in turns, of the training side.

    Raises:
        ArtifactError: the data have no demonstrations or no corpus.
        DataError: they have none that is short enough.
    """
    count = -(-params.calibration_rows // 2)
    limits = (count, params.calibration_length, "drop", "quantize")
    chosen = demonstrations.choose(data, "train", tokenizer, (), *limits).kept
    share = count * params.calibration_length * packing.LONGEST_TOKEN * 4 / max(1, reading.corpus_bytes(data, "train"))
    texts = itertools.islice(reading.sample(data, "train", share, params.seed), count)
    pieces = [ids[: params.calibration_length] for ids in packing.encode(tokenizer, list(texts)) if ids]
    turns = itertools.zip_longest((one.chat.ids for one in chosen), pieces)
    return [row for both in turns for row in both if row is not None][: params.calibration_rows]


def timed(subjects: Sequence[Subject], made: Mapping[str, tuple[Subject, str, Path]]) -> dict[str, tuple[Path, str]]:
    """Directory and kind of what answers prompts here: the models themselves, and what needs no other program."""
    found = {whole_name(one): (one.place, variants.PLAIN) for one in subjects if not one.classifier}
    return found | {
        name: (place, variant)
        for name, (subject, variant, place) in made.items()
        if not subject.classifier and variant not in variants.GGUF
    }


def check(subject: Subject, model: Any, params: QuantizeParams) -> None:
    """Refuse what cannot be made smaller: weights that are not finite, and patterns that name no layer.

    Raises:
        ArtifactError: NaN or infinity in a weight, or shapes that a variant cannot hold; the tensor is named.
        ParamsError: an entry of `keep_in_high_precision` names no layer.
    """
    for name, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            count = int((~torch.isfinite(value)).sum())
            raise ArtifactError(f"{subject.place}: {name}: {count} of {value.numel()} weights are NaN or infinite")
    names = [name for name, _ in int8.convertible(model)]
    for pattern in params.keep_in_high_precision:
        if not any(int8.kept(name, [pattern]) for name in names):
            raise ParamsError(
                f"quantize.keep_in_high_precision: {pattern!r} is none of the {len(names)} layers of {subject.place}, "
                f"for example {names[0]}, {names[-1]}; patterns such as *.down_proj are accepted"
            )


def check_memory(subjects: Sequence[Subject], available: int) -> None:
    """Refuse a model that does not fit: the original in fp32 and in bf16, and one variant in bf16, are held at a time.

    Args:
        available: bytes.

    Raises:
        ArtifactError: the estimate is more than there is; both numbers are told.
    """
    for subject in subjects:
        bytes_on_disk = variants.size(subject.place)
        need = 5 * bytes_on_disk  # saved in bf16: fp32 is twice that
        if need > available:
            raise ArtifactError(
                f"{subject.place}: making it smaller takes about {need / 2**30:.1f} GiB of memory, {available / 2**30:.1f} "
                "GiB are available; free some, or take a smaller model"
            )


def make(
    subject: Subject, variant: str, rows: Sequence[list[int]], params: QuantizeParams, context: StageContext
) -> Path:
    """The directory of a variant in the stage's scratch; taken from there where a killed run has finished it.

    Args:
        rows: token ids of the calibration rows.

    Raises:
        ArtifactError: the variant cannot hold this model; the layer is named.
    """
    place = context.work / "variants" / full_name(subject, variant)
    if place.exists():
        return place
    keep = params.keep_in_high_precision
    with artifacts.published(place) as draft:
        try:
            if variant in variants.GGUF:
                gguf_export.export(subject.place, draft / "model.gguf", variants.GGUF[variant])
            elif variant == "int8":
                _save(int8.quantize(_again(subject), keep), subject.place, draft)
            elif variant == "int4":
                _save(_int4(subject, rows, params, context), subject.place, draft)
            elif variant == "nf4":
                bnb_variants.nf4(subject.place, draft, keep)
            elif variant == "llm-int8":
                bnb_variants.llm_int8(subject.place, draft, keep)
        except ValueError as error:
            raise ArtifactError(f"{subject.place}: {variant}: {error}") from None
    return place
