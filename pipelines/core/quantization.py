"""One model in, a directory a variant out: what each is made by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipelines.core import (
    artifacts,
    attention,
    blockwise,
    bnb_variants,
    cpu,
    demonstrations,
    gguf_export,
    gptq,
    int4,
    int8,
    language_models,
    packing,
    quantization_aware,
    reading,
    reward_model,
    scoring,
    variants,
)
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError
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


def is_tuned(subject: Subject, variant: str, params: QuantizeParams) -> bool:
    """Whether a variant's weights are fine-tuned while they are rounded, before it is made."""
    return variant in params.aware.variants and not subject.name


def by_gptq(subject: Subject, variant: str, params: QuantizeParams) -> bool:
    """Whether GPTQ chooses a variant's codes. Not those of fine-tuned weights, which are what rounding to the nearest
    gives: it would keep the outputs of the weights before it.
    """
    fitted = variant in CALIBRATED and params.calibrate and not subject.classifier
    return fitted and not is_tuned(subject, variant, params)


def whole_name(subject: Subject) -> str:
    """What the model itself is called among its variants."""
    return subject.name or "original"


def load(subject: Subject, context: StageContext) -> Any:
    """The model that is made smaller, on the CPU, where its variants are made and measured, and in the context's type
    where that is quick there.

    Raises:
        ArtifactError: no model can be loaded from its directory.
    """
    if subject.classifier:
        return cpu.ready(reward_model.load(subject.place, context)[0].cpu())
    kind = attention.choose("cpu", scoring.WINDOW)
    return cpu.ready(language_models.load(str(subject.place), context.dtype, kind).eval())


def calibration_rows(params: QuantizeParams, data: Path, tokenizer: Any) -> list[list[int]]:
    """Token ids of chats and of pieces of the corpus in turns, of the training side, each as a model meets it: a text
    after the separator. What stands first draws attention of a size that nothing else has, and must be seen.

    Raises:
        ArtifactError: the data have no demonstrations or no corpus.
        DataError: they have none that is short enough.
    """
    count = -(-params.calibration_rows // 2)
    chosen = demonstrations.choose(
        data, "train", tokenizer, (), count, params.calibration_length, "drop", "quantize", "calibration_length"
    ).kept
    share = count * params.calibration_length * packing.LONGEST_TOKEN * 4 / max(1, reading.corpus_bytes(data, "train"))
    texts = list(itertools.islice(reading.sample(data, "train", share, params.seed), count))
    while len(texts) < count and share < 1:  # long documents are few for their bytes
        share *= 4
        texts = list(itertools.islice(reading.sample(data, "train", share, params.seed), count))
    separator = packing.separator_id(tokenizer)
    pieces = [[separator, *ids][: params.calibration_length] for ids in packing.encode(tokenizer, texts) if ids]
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


def make(
    subject: Subject, variant: str, rows: Sequence[list[int]], params: QuantizeParams, context: StageContext
) -> Path:
    """The directory of a variant in the stage's scratch; taken from there where a killed run has finished it.

    Args:
        rows: token ids of the calibration rows.

    Raises:
        ArtifactError: the variant cannot hold this model; the layer is named.
    """
    if variant == variants.DYNAMIC:
        return subject.place
    name = full_name(subject, variant)
    place = context.work / "variants" / name
    if place.exists():
        context.say(f"resuming after variant {name}, which is made")
        return place
    with artifacts.published(place) as draft:
        try:
            if variant in variants.GGUF:
                gguf_export.export(subject.place, draft / "model.gguf", variants.GGUF[variant])
            else:
                _write(subject, variant, rows, params, draft, context)
        except ValueError as error:
            raise ArtifactError(f"{subject.place}: {variant}: {error}") from None
    return place


def _write(
    subject: Subject,
    variant: str,
    rows: Sequence[list[int]],
    params: QuantizeParams,
    draft: Path,
    context: StageContext,
) -> None:
    """Make a Hugging Face directory of a variant."""
    keep = params.keep_in_high_precision
    chooses = by_gptq(subject, variant, params)
    if is_tuned(subject, variant, params):
        subject = subject._replace(place=quantization_aware.fine_tuned(subject.place, variant, rows, params, context))
    if variant == "llm-int8":
        bnb_variants.llm_int8(subject.place, draft, keep)
        return
    if variant == "nf4":
        chosen = _nf4_codes(load(subject, context), rows, params, context) if chooses else None
        bnb_variants.nf4(subject.place, draft, keep, chosen)
        return
    model = load(subject, context)
    if variant == "int8":
        int8.quantize(model, keep)
    else:
        found = _int4_codes(model, rows, params, context) if chooses else None
        int4.quantize(model, params.group_size, keep, found)
    model.save_pretrained(draft)
    language_models.load_tokenizer(str(subject.place)).save_pretrained(draft)


def _int4_codes(
    model: Any, rows: Sequence[list[int]], params: QuantizeParams, context: StageContext
) -> dict[str, tuple[torch.Tensor, int4.Grid]]:
    """Codes that GPTQ has chosen, and their grid, by layer. Changes the model's weights."""
    grids: dict[str, int4.Grid] = {}

    def rounding(weights: Mapping[str, torch.Tensor]) -> gptq.Round:
        for name, weight in weights.items():
            try:
                grids[name] = int4.grid(weight, params.group_size)
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from None
        parts = zip(*(grids[name] for name in weights), strict=True)
        return gptq.of_grid(int4.Grid(*(torch.cat(part) for part in parts)), params.group_size)

    ids = blockwise.equal_rows(rows, params.calibration_length)
    codes = gptq.calibrate(model, ids, _fitted(params), rounding, _teller("int4", context))
    return {name: (of_layer, grids[name]) for name, of_layer in codes.items()}


def _nf4_codes(
    model: Any, rows: Sequence[list[int]], params: QuantizeParams, context: StageContext
) -> dict[str, tuple[torch.Tensor, bnb_variants.Grid]]:
    """The same for NF4."""
    bnb_variants.check(model, params.keep_in_high_precision)
    grids: dict[str, bnb_variants.Grid] = {}

    def rounding(weights: Mapping[str, torch.Tensor]) -> gptq.Round:
        here = [bnb_variants.grid(weight) for weight in weights.values()]
        grids.update(zip(weights, here, strict=True))
        return gptq.of_code_book(here[0].book, torch.cat([grid.scales for grid in here]), bnb_variants.BLOCK)

    ids = blockwise.equal_rows(rows, params.calibration_length)
    codes = gptq.calibrate(model, ids, _fitted(params), rounding, _teller("nf4", context))
    return {name: (of_layer, grids[name]) for name, of_layer in codes.items()}


def _fitted(params: QuantizeParams) -> Callable[[str], bool]:
    """Whether a layer's codes are chosen, by its name."""
    return lambda name: not int8.kept(name, params.keep_in_high_precision)


def _teller(what: str, context: StageContext) -> Callable[[int, int], None]:
    def tell(done: int, total: int) -> None:
        context.progress(done, total, calibrating=what)
        context.stop_if_asked()

    return tell
