"""A teacher's answers to fixed data, kept on disk: asked in the first epoch, read in those after.

One shard holds the answers to one batch: a directory `answers-N/` with `top_k.safetensors`, there whole or not at
all, so a killed stage goes on with the shards it has. 6 k + 4 bytes a token. A cache knows nothing of the model or
the data it was made from: its place must belong to both, as the scratch of a stage (`context.work`) does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipelines.core import artifacts, language_models, losses, segments
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError
from pipelines.core.losses import TopK

FILE = "top_k.safetensors"


@torch.no_grad()
def ask(model: Any, rows: segments.Rows, k: int, context: StageContext) -> TopK:
    """The model's answers to the supervised tokens of a batch, row by row: N tokens, on the context's device.

    Raises:
        ArtifactError: the model's logits are not hidden states x output embedding.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    _, head = language_models.body_and_head(inner)
    supervised = (rows.labels != losses.IGNORE).to(context.device)
    return losses.linear_top_k(segments.hidden_states(model, rows, context)[supervised], head, k)


def kept(place: Path, number: int, tokens: int, k: int, make: Callable[[], TopK], device: str = "cpu") -> TopK:
    """Answers to batch `number`: read if they are there, else made and written.

    Only one process may ask for a number at a time. What is made is what is read: equal to the last bit.

    Args:
        tokens: N, how many the batch has.
        k: how many answers are kept for each.
        make: gives them, for example by `ask`.

    Raises:
        ArtifactError: what is there is damaged, or belongs to another batch or k.
        ValueError: `make` gave something else than N x k answers.
    """
    if not shard(place, number).exists():
        made = make()
        if tuple(made.ids.shape) != (tokens, k):
            raise ValueError(f"answers of shape {tuple(made.ids.shape)}, expected {(tokens, k)}")
        write(place, number, made)
    found = read(place, number)
    if tuple(found.ids.shape) != (tokens, k):
        raise ArtifactError(
            f"{shard(place, number)} holds answers of shape {tuple(found.ids.shape)}, not {(tokens, k)} (tokens, k): "
            f"it belongs to other data or another k. Remove {place} and run the stage again."
        )
    return TopK(*(part.to(device) for part in found))


def write(place: Path, number: int, answers: TopK) -> None:
    """Keep the answers to batch `number`; those that are there are replaced.

    Raises:
        OSError: the disk is full or not writable; what was there is untouched.
    """
    from safetensors.torch import save_file

    tensors = {name: part.cpu().contiguous() for name, part in answers._asdict().items()}
    with artifacts.published(shard(place, number)) as draft:
        save_file(tensors, draft / FILE)


def read(place: Path, number: int) -> TopK:
    """The answers to batch `number`, on the CPU.

    Raises:
        ArtifactError: they are missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = shard(place, number) / FILE
    try:
        return TopK(**load_file(file))
    except (OSError, SafetensorError, TypeError) as error:
        raise ArtifactError(
            f"a teacher's answers {file} cannot be read ({error}). Remove {file.parent} and run the stage again."
        ) from error


def shard(place: Path, number: int) -> Path:
    """Where the answers to batch `number` lie."""
    return place / f"answers-{number}"
