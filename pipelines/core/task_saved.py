"""A fine-tuned task model as a plain Hugging Face classifier that reads the last token that is no padding: `extract`.

Beside it `task.json` says how text becomes its input: {"task", "kind", "labels", "regression", "columns",
"max_length"}. For similarity the logits of both orders are added, for choice one logit a candidate is compared.
"""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipelines.core import artifacts, attention, fine_tuning, k_way
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError
from pipelines.core.params.tuning import ADAPTERS
from pipelines.core.task_inputs import Task
from pipelines.core.task_model import TaskModel, classifier, pad_id

FILE = "task.json"


class Saved(NamedTuple):
    """What `save` wrote, loaded."""

    model: TaskModel  # its `lm` is the classifier
    tokenizer: Any
    task: dict[str, Any]  # of task.json


def save(
    model: TaskModel,
    tokenizer: Any,
    task: Task,
    max_length: int,
    place: Path,
    context: StageContext,
    rows: slice = slice(None),
) -> None:
    """Write the classifier in the compute type, without dropped blocks, with its tokenizer.

    Args:
        model: without adapters (`merged`).
        rows: of W_y, the task's in a mixture (`task_mixture.rows`).
    """
    weight = model.score.weight[rows].detach()
    whole = classifier(model.config, len(weight), context.dtype, "meta")  # random weights would only take time
    setattr(whole, whole.base_model_prefix, copy.deepcopy(model.lm.base_model).to("cpu", context.dtype))
    whole.score = torch.nn.Linear(weight.shape[1], len(weight), bias=False, dtype=context.dtype)
    with torch.no_grad():
        whole.score.weight.copy_(weight)
    whole.config.pad_token_id = model.pad
    if task.regression:
        whole.config.problem_type = "regression"
    elif task.kind != "choice":
        whole.config.id2label = dict(enumerate(task.labels))
        whole.config.label2id = {label: number for number, label in enumerate(task.labels)}
    whole.save_pretrained(place)
    tokenizer.save_pretrained(place)
    told = {
        "task": task.name,
        "kind": task.kind,
        "labels": list(task.labels),
        "regression": task.regression,
        "columns": list(task.columns),
        "max_length": max_length,
    }
    artifacts.write_json(place / FILE, told)


def load_saved(place: Path, context: StageContext) -> Saved:
    """What `save` wrote, ready to classify.

    Raises:
        ArtifactError: the directory holds no such model.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not (place / FILE).is_file():
        raise ArtifactError(f"{place}: no {FILE}: stage transfer makes such a directory for each task")
    task: dict[str, Any] = json.loads((place / FILE).read_text(encoding="utf-8"))
    kind = attention.choose(context.device, max(k_way.ROW_TOKENS, task["max_length"]))
    try:
        whole = AutoModelForSequenceClassification.from_pretrained(place, dtype=context.dtype, attn_implementation=kind)
    except (OSError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{place}: no classifier could be loaded: {error}") from None
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = TaskModel(whole, whole.score, "full", 0.0, 0, pad_id(tokenizer))
    return Saved(model.to(context.device).eval(), tokenizer, task)


def merged(model: TaskModel) -> TaskModel:
    """The model without adapters, its special tokens' embeddings in their place; one that has none as it is.

    A model with adapters is used up: they are merged in place. Adapters over a 4-bit base are merged into the base as
    it was before it was quantised (see `fine_tuning.unpacked`).
    """
    if model.method not in ADAPTERS:
        return model
    assert model.again is not None
    model = fine_tuning.unpacked(model, model.method, partial(model.again, "lora"))
    assert model.special is not None
    plain = model.lm.merge_and_unload()
    with torch.no_grad():
        weight = plain.get_input_embeddings().weight
        weight[list(model.special_ids)] = model.special.to(weight)
    model.lm = plain
    return model
