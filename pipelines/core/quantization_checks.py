"""Whether a model can be made smaller as it is asked: settled before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipelines.core import bnb_variants, context_window, gguf_export, int4, int8, language_models, sampling, variants
from pipelines.core.errors import ArtifactError, ParamsError
from pipelines.core.params.quantize import QuantizeParams
from pipelines.core.quantization import Subject

# At the most, for each number of the original: 14.6 to 16.2 and 19.7 bytes were seen of 68 million.
MEASURED_BYTES, TUNED_BYTES = 16, 20
# What a GGUF file may lose of the original's bits, as a share: what the gate lets other formats of as many bits lose.
GGUF_LOSS = {"gguf-f16": 0.01, "gguf-q8_0": 0.01, "gguf-q4_0": 0.04}
F16_AGREEMENT = 0.99  # of the likeliest tokens, at the least


def check(subject: Subject, model: Any, params: QuantizeParams) -> None:
    """Refuse what cannot be made smaller, or read as it is asked: weights that are packed already or not finite,
    patterns that name no layer or every one, rows beyond the context.

    Patterns are held against the model itself: a student has fewer blocks, and a reward model another head.

    Raises:
        ArtifactError: a quantized model, or one with adapters; NaN or infinity in a weight, the tensor is named; a
            format that cannot hold the model; an architecture that cannot be made smaller, or cannot be asked.
        ParamsError: an entry of `keep_in_high_precision` names no layer, or all entries name every one; a variant that
            knows none of the layers; what is to be read does not fit the context.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ArtifactError(f"{subject.place}: the model is quantized; name the one it was made from")
    if getattr(model, "peft_config", None):  # which transformers puts on where adapter_config.json lies beside it
        raise ArtifactError(
            f"{subject.place}: the model carries adapters; merge them into its weights and save the result"
        )
    answered = params.max_prompt_tokens + params.max_new_tokens
    asked = {
        "quantize.calibration_length": params.calibration_length,
        "quantize.max_prompt_tokens + quantize.max_new_tokens": answered,
    }
    context_window.check(asked, f"the context of {subject.place}", model.config)
    for name, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            count = int((~torch.isfinite(value)).sum())
            raise ArtifactError(f"{subject.place}: {name}: {count} of {value.numel()} weights are NaN or infinite")
    names = [name for name, _ in int8.convertible(model)]
    for pattern in () if subject.name else params.keep_in_high_precision:
        if not any(int8.kept(name, [pattern]) for name in names):
            raise ParamsError(
                f"quantize.keep_in_high_precision: {pattern!r} is none of the {len(names)} layers of {subject.place}, "
                f"for example {names[0]}, {names[-1]}; patterns such as *.down_proj are accepted"
            )
    made = {*variants.PACKED, *variants.BNB} & set(subject.variants)
    if made and not int4.layers(model, params.keep_in_high_precision):
        raise ParamsError(
            f"quantize.keep_in_high_precision: {', '.join(params.keep_in_high_precision)} leaves none of the blocks' "
            f"layers of {subject.place} to make smaller; keep fewer"
        )
    if variants.DYNAMIC in subject.variants and not bnb_variants.dynamic_names(model):
        key = "student_variants" if subject.name else "variants"
        raise ParamsError(
            f"quantize.{key}: {variants.DYNAMIC}: torch's dynamic quantization knows none of the layers of "
            f"architecture {model.config.model_type}, so it would change nothing; leave it out"
        )
    _check_architecture(subject, model)
    _check_formats(subject, model, params)


def _check_architecture(subject: Subject, model: Any) -> None:
    """Raises ArtifactError where the model's answers cannot be had, or most of its weights are in no linear layer."""
    if not subject.classifier:
        language_models.body_and_head(model)
        sampling.check(model)
    for name, value in model.named_parameters():
        if value.dim() > 2:
            raise ArtifactError(
                f"{subject.place}: architecture {model.config.model_type}: {name} holds {value.shape[0]} matrices in "
                "one (a mixture of experts), which no variant makes smaller; choose another, for example llama, gpt2, "
                "qwen3, mistral"
            )


def _check_formats(subject: Subject, model: Any, params: QuantizeParams) -> None:
    """Refuse what a format cannot hold now, not after minutes of making and measuring others.

    Raises:
        ArtifactError: layers of a shape that a format does not accept; an architecture or a tokenizer that llama.cpp
            would compute otherwise.
    """
    keep = params.keep_in_high_precision
    if "int4" in subject.variants:
        try:
            int4.check(model, params.group_size, keep)
        except ValueError as error:
            raise ArtifactError(f"{subject.place}: int4: {error}") from None
    if "nf4" in subject.variants:
        bnb_variants.check(model, keep)
    if variants.GGUF.keys() & set(subject.variants):
        gguf_export.check(subject.place, model)


def check_memory(subjects: Sequence[Subject], available: int, aware: bool = False) -> None:
    """Refuse a model that does not fit. Held at a time are the original and a variant, and in fp32, for the errors of
    the layers, the original's weights and how far the variant's are off; where weights are fine-tuned, two copies in
    bf16, and in fp32 the weights, their gradients and their moments.

    Args:
        available: bytes.
        aware: whether a variant of the model itself is fine-tuned.

    Raises:
        ArtifactError: the estimate is more than there is; both numbers are told.
    """
    for subject in subjects:
        tuned = aware and not subject.name
        need = (TUNED_BYTES if tuned else MEASURED_BYTES) * variants.parameters(subject.place)
        if need > available:
            raise ArtifactError(
                f"{subject.place}: making it smaller{' with quantize.aware' * tuned} takes about "
                f"{need / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are available; free some, or take a "
                f"smaller model{', or set aware: {}' * tuned}"
            )


def missed(variant: str, loss: float, agreement: float | None) -> list[str]:
    """The budgets that a GGUF file does not keep, in words; none of another variant, which the registry's gate judges.

    Args:
        loss: share of the original's bits that it needs more.
        agreement: share of the tokens at which both find the same one likeliest; None where it tells of more than it.
    """
    if variant not in variants.GGUF:
        return []
    found = []
    if not loss <= GGUF_LOSS[variant]:
        found.append(f"it loses {loss:.2%} of the original's bits per byte (accepted: {GGUF_LOSS[variant]:.0%})")
    if variant == "gguf-f16" and agreement is not None and not agreement >= F16_AGREEMENT:
        found.append(f"it finds the original's likeliest token at {agreement:.2%} (accepted: {F16_AGREEMENT:.0%})")
    return found
