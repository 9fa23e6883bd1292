"""Divergences of two distributions over tokens, and their gradients in closed form. Shapes: N tokens, V vocabulary."""

from __future__ import annotations

import math
from typing import Literal

import torch

Kind = Literal["forward", "reverse", "jsd"]  # what they mean: `losses.divergence`


def check(kind: str, temperature: float, beta: float) -> None:
    """Refuse what no divergence is defined for.

    Raises:
        ValueError: an unknown kind, a temperature of 0 or less, a beta that is not between 0 and 1.
    """
    if kind not in ("forward", "reverse", "jsd"):
        raise ValueError(f"a divergence is forward, reverse or jsd, not {kind!r}")
    if not temperature > 0 or not 0 < beta < 1:
        raise ValueError(f"temperature {temperature} must be above 0, beta {beta} between 0 and 1")


def between(student: torch.Tensor, teacher: torch.Tensor, kind: Kind, beta: float) -> torch.Tensor:
    """Divergence (N,) of log-probabilities (N, V)."""
    if kind == "forward":
        return (teacher.exp() * (teacher - student)).sum(dim=1)
    if kind == "reverse":
        return (student.exp() * (student - teacher)).sum(dim=1)
    middle = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * between(middle, teacher, "forward", beta) + (1 - beta) * between(student, middle, "reverse", beta)


def with_gradient(
    student: torch.Tensor, chances: torch.Tensor, teacher: torch.Tensor, kind: Kind, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `between`, and its gradient (N, V) with respect to what `student` is the log-softmax of.

    `chances` is exp(student).
    """
    target = teacher.exp() if kind != "reverse" else chances
    if kind == "forward":
        return torch.linalg.vecdot(target, teacher - student), chances - target
    if kind == "reverse":
        gap = student - teacher
        value = torch.linalg.vecdot(chances, gap)
        return value, gap.sub_(value[:, None]).mul_(chances)
    # cheaper than logaddexp; where m underflows, both sides are 0
    middle = torch.lerp(chances, target, beta).clamp_min_(torch.finfo(chances.dtype).tiny).log_()
    of_teacher = torch.linalg.vecdot(target, teacher - middle)
    gap = torch.sub(student, middle, out=middle)
    of_student = torch.linalg.vecdot(chances, gap)
    value = beta * of_teacher + (1 - beta) * of_student
    return value, gap.sub_(of_student[:, None]).mul_(chances).mul_(1 - beta)  # what goes through m cancels
