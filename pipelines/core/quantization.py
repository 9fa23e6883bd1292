"""One model in, a directory a variant out: what each is made by, checked before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipelines.core import artifacts, bnb_variants, gguf_export, gptq, int4, int8, language_models, variants
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
    subject: Subject, variant: str, model: Any, rows: Sequence[list[int]], params: QuantizeParams, context: StageContext
) -> Path:
    """The directory of a variant in the stage's scratch; taken from there where a killed run has finished it.

    Args:
        model: the original in bf16, to be copied; not changed.
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
