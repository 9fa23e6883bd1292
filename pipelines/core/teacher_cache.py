"""What a teacher says of fixed data, asked once and kept: the likeliest tokens of each place, and the mass of the rest.

A file a batch of sequences in the stage's scratch, written whole, so a killed run asks only for what is missing and an
epoch after the first does not run the teacher. 6 bytes a kept token and place: 0.4 KB for k = 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.core import artifacts, language_models, losses, segments
from pipelines.core.context import StageContext

SEQUENCES = 32  # of a file


class Cache:
    """Answers by sequence, read from the scratch."""

    def __init__(self, answers: list[losses.TopK]) -> None:
        self.answers = answers

    def rows(self, numbers: Sequence[Sequence[int]], rows: segments.Rows, device: str) -> losses.TopK:
        """Answers at the labels of packed rows, in the order of `labels[labels != IGNORE]`.

        Args:
            numbers: of the sequences in each row, in the order in which they stand.
        """
        wanted = [self.answers[number] for row in numbers for number in row]
        found = losses.TopK(*(torch.cat(parts).to(device) for parts in zip(*wanted, strict=True)))
        assert len(found.ids) == int((rows.labels != losses.IGNORE).sum()), "a label without an answer"
        return found


def of(
    teacher: Any, sequences: Sequence[segments.Sequence], k: int, tokens: int, pad: int, context: StageContext
) -> Cache:
    """Ask the teacher for its k likeliest tokens at every label, or take what an earlier run has asked.

    Args:
        tokens: of a forward pass.
        pad: any token; what fills rows is never seen.

    Raises:
        Stopped: a signal came; what was asked is kept.
    """
    answers: list[losses.TopK] = []
    for first in range(0, len(sequences), SEQUENCES):
        place = context.work / "teacher" / f"{first:07d}"
        if not place.exists():
            found = _ask(teacher, sequences[first : first + SEQUENCES], k, tokens, pad, context)
            with artifacts.published(place) as draft:
                _write(found, draft / "answers.safetensors")
        answers += _read(place / "answers.safetensors")
        context.progress(min(first + SEQUENCES, len(sequences)), len(sequences), asking="the teacher")
        context.stop_if_asked()
    return Cache(answers)


@torch.no_grad()
def _ask(
    teacher: Any, sequences: Sequence[segments.Sequence], k: int, tokens: int, pad: int, context: StageContext
) -> list[losses.TopK]:
    """One answer a sequence, over its labels."""
    _, head = language_models.body_and_head(teacher)
    found: dict[int, losses.TopK] = {}
    for rows, texts in segments.micro_batches(sequences, tokens, pad):
        kept = rows.labels.to(context.device) != losses.IGNORE
        said = losses.linear_top_k(segments.hidden_states(teacher, rows, context)[kept], head, k)
        order = [number for row in texts for number in row]
        counts = [_labels(sequences[number]) for number in order]
        parts = zip(*(torch.split(part, counts) for part in said), strict=True)
        found |= {number: losses.TopK(*part) for number, part in zip(order, parts, strict=True)}
    return [found[number] for number in range(len(sequences))]


def _labels(sequence: segments.Sequence) -> int:
    return sum(label != segments.UNSUPERVISED for label in sequence.labels)


def _write(answers: list[losses.TopK], file: Path) -> None:
    from safetensors.torch import save_file

    whole = losses.TopK(*(torch.cat(parts).cpu() for parts in zip(*answers, strict=True)))
    counts = torch.tensor([len(answer.ids) for answer in answers])
    save_file({**whole._asdict(), "counts": counts}, file)


def _read(file: Path) -> list[losses.TopK]:
    from safetensors.torch import load_file

    stored = load_file(file)
    counts = stored["counts"].tolist()
    parts = (torch.split(stored[name], counts) for name in losses.TopK._fields)
    return [losses.TopK(*part) for part in zip(*parts, strict=True)]
