"""The whole of `params.yaml`, and its only reader.

Every value is checked here, before any compute, and a mistake is reported as one line per key: where, what was
found, what is accepted. Nothing is written back at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from pipelines.core import strict_yaml
from pipelines.core.errors import ParamsError
from pipelines.core.params.answers import AnswersParams
from pipelines.core.params.compute import ComputeParams
from pipelines.core.params.data import DataParams, FileSource, HubSource, PydocsSource
from pipelines.core.params.distill import DistillParams
from pipelines.core.params.dpo import DpoParams
from pipelines.core.params.feedback import FeedbackParams
from pipelines.core.params.flow import FlowParams
from pipelines.core.params.ppo import PpoParams
from pipelines.core.params.pretrain import PretrainParams
from pipelines.core.params.prompts import PromptsParams
from pipelines.core.params.quantize import QuantizeParams
from pipelines.core.params.rag import EMBEDDERS, RagParams
from pipelines.core.params.report import ReportParams
from pipelines.core.params.reward import RewardParams
from pipelines.core.params.section import Location, Section, explain
from pipelines.core.params.sft import SftParams
from pipelines.core.params.tokenizer import TokenizerParams
from pipelines.core.params.transfer import TransferParams


class Params(Section):
    """The whole file."""

    compute: ComputeParams
    flow: FlowParams
    data: DataParams
    tokenizer: TokenizerParams
    pretrain: PretrainParams
    sft: SftParams
    feedback: FeedbackParams
    reward: RewardParams
    ppo: PpoParams
    dpo: DpoParams
    distill: DistillParams
    quantize: QuantizeParams
    transfer: TransferParams
    rag: RagParams
    answers: AnswersParams
    prompts: PromptsParams
    report: ReportParams

    @model_validator(mode="after")
    def _one_vocabulary(self) -> Params:
        if self.pretrain.base is not None and self.pretrain.base != self.tokenizer.base:
            raise ValueError(
                f"pretrain.base ({self.pretrain.base}) and tokenizer.base ({self.tokenizer.base}) differ: "
                "a model keeps the vocabulary it was trained with"
            )
        return self


def load(path: Path) -> Params:
    """Read and check `params.yaml`.

    Raises:
        ParamsError: the file is missing, is not YAML, or holds a key or value that is not accepted; one line
            for each mistake.
    """
    try:
        raw = strict_yaml.read(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path.name}: no such file in {path.parent}. Run from the repository's root.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path.name} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ParamsError(
            f"{path.name}: expected sections {', '.join(Params.model_fields)}, found {type(raw).__name__}"
        )
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise ParamsError(explain(path.name, error, _SOURCES, _known_keys)) from None


NAME_MODELS = ("tokenizer", "pretrain", "distill", "quantize", "rag")  # stages with dials that name models


def models(params: Params, stage: str) -> dict[str, str | None]:
    """Models that a stage's dials name, by dial."""
    if stage in ("tokenizer", "pretrain"):
        return {f"{stage}.base": getattr(params, stage).base}
    if stage == "quantize":
        return {"quantize.model": params.quantize.model}
    if stage == "rag":
        own = None if params.rag.embedder in EMBEDDERS else params.rag.embedder
        return {"rag.embedder": own, "rag.reranker": params.rag.reranker}
    student = params.distill.student
    own = None if student in ("layers", "random") else student
    return {"distill.teacher": params.distill.teacher, "distill.student": own}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as `section.key` -> value; a list is one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


_SOURCES: dict[str | int, type[Section]] = {"pydocs": PydocsSource, "file": FileSource, "hub": HubSource}


def _known_keys(location: Location) -> list[str]:
    """Keys that are accepted at a location of the file."""
    model: Any = Params
    for part in location:
        if part in _SOURCES:
            model = _SOURCES[part]
        elif isinstance(part, str) and part in getattr(model, "model_fields", {}):
            model = model.model_fields[part].annotation
    return sorted(getattr(model, "model_fields", {}))
