"""What a student learns from inside its teacher: hidden states and attention.

Everything is computed in fp32 at least; the teacher gets no gradient. Shapes: N tokens, L positions of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def hidden_loss(student: torch.Tensor, teacher: torch.Tensor, projection: nn.Linear | None) -> torch.Tensor:
    """Mean squared error of hidden states (Jiao et al., "TinyBERT", 2020, equations 8 and 9).

    Args:
        student: (N, width of the student); gets a gradient.
        teacher: (N, width of the teacher).
        projection: learned, from the student's width to the teacher's; gets a gradient. None where they are equal.

    Raises:
        ValueError: the widths do not fit.
    """
    ours, theirs = _aligned(student, teacher, projection)
    return F.mse_loss(ours, theirs)


def cosine_loss(student: torch.Tensor, teacher: torch.Tensor, projection: nn.Linear | None) -> torch.Tensor:
    """Mean over tokens of 1 - cosine of the angle between hidden states (Sanh et al., "DistilBERT", 2019, section 3).

    Arguments and errors as `hidden_loss`.
    """
    ours, theirs = _aligned(student, teacher, projection)
    return (1 - F.cosine_similarity(ours, theirs, dim=1)).mean()


def _aligned(
    student: torch.Tensor, teacher: torch.Tensor, projection: nn.Linear | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the teacher's width."""
    through = "without a projection"
    if projection is not None:
        through = f"with a projection from {projection.in_features} to {projection.out_features}"
        if student.shape[-1] == projection.in_features:
            student = projection(student.to(projection.weight.dtype))
    if student.shape != teacher.shape:
        raise ValueError(f"hidden states {tuple(student.shape)} and {tuple(teacher.shape)} do not fit {through}")
    return _wide(student), _wide(teacher.detach())


def attention_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean squared error of attention, over what a token may look at (TinyBERT, equation 7).

    Heads are compared one by one where both have as many, else their means.

    Args:
        student: (rows, heads, L, L), scores before the softmax, as in the paper, or shares after it; gets a gradient.
        teacher: (rows, heads of the teacher, L, L), of the same sort.
        mask: bool (rows, L, L), True where a query (first L) sees a key. What stands elsewhere, infinite or not,
            does not matter.

    Raises:
        ValueError: rows or lengths differ, or nothing is seen.
    """
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(f"attention {tuple(student.shape)} and {tuple(teacher.shape)} are not of the same rows")
    if not mask.any():
        raise ValueError("a batch in which no token sees another or itself")
    ours, theirs = (
        _wide(scores).masked_fill(~mask[:, None], 0.0) for scores in (student, teacher.detach())
    )  # before anything else: what is infinite would become a gradient that is not a number
    if student.shape[1] != teacher.shape[1]:
        ours, theirs = ours.mean(dim=1, keepdim=True), theirs.mean(dim=1, keepdim=True)
    return (ours - theirs).square().sum() / (mask.sum() * ours.shape[1])


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
