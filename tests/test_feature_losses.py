"""Losses on hidden states and attention by hand, masks, widths and heads that differ."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipelines.core import feature_losses

STUDENT = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
TEACHER = torch.tensor([[3.0, 0.0], [2.0, 0.0]])


def test_hidden_by_hand() -> None:
    assert float(feature_losses.hidden_loss(STUDENT, TEACHER, None)) == (4 + 0 + 4 + 4) / 4
    assert float(feature_losses.cosine_loss(STUDENT, TEACHER, None)) == (0 + 1) / 2


def test_a_projection_is_learned_and_the_teacher_is_not() -> None:
    torch.manual_seed(0)
    projection = nn.Linear(2, 3, bias=False)
    student, teacher = (
        torch.randn(5, 2, dtype=torch.bfloat16, requires_grad=True),
        torch.randn(5, 3, requires_grad=True),
    )
    loss = feature_losses.hidden_loss(student, teacher, projection)
    loss.backward()  # type: ignore[no-untyped-call]
    gap = student.detach().float() @ projection.weight.detach().t() - teacher.detach()
    assert float(loss.detach()) == pytest.approx(float(gap.square().mean()))
    torch.testing.assert_close(projection.weight.grad, 2 / gap.numel() * gap.t() @ student.detach().float())
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize("projection", [None, nn.Linear(2, 4), nn.Linear(5, 3)])
def test_widths_that_do_not_fit_are_refused(projection: nn.Linear | None) -> None:
    for loss in (feature_losses.hidden_loss, feature_losses.cosine_loss):
        with pytest.raises(ValueError, match=r"\(6, 2\) and \(6, 3\)|\(6, 4\) and \(6, 3\)"):
            loss(torch.ones(6, 2), torch.ones(6, 3), projection)


def test_attention_by_hand() -> None:
    """Two positions, causal: three pairs are seen; what stands at the fourth does not matter."""
    student = torch.tensor([[[[1.0, -math.inf], [2.0, 3.0]]]], requires_grad=True)
    teacher = torch.tensor([[[[0.0, -math.inf], [2.0, 1.0]]]])
    mask = torch.ones(1, 2, 2, dtype=torch.bool).tril()
    loss = feature_losses.attention_loss(student, teacher, mask)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx((1 + 0 + 4) / 3)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.tensor([[[[2 / 3, 0.0], [0.0, 4 / 3]]]]))


def test_attention_of_other_heads_is_compared_by_means() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 3), torch.randn(2, 6, 3, 3)
    mask = torch.ones(2, 3, 3, dtype=torch.bool)
    expected = (student.mean(1) - teacher.mean(1)).square().mean()
    torch.testing.assert_close(feature_losses.attention_loss(student, teacher, mask), expected)
    equal = feature_losses.attention_loss(student, teacher[:, :2], mask)
    torch.testing.assert_close(equal, (student - teacher[:, :2]).square().mean())


def test_attention_refuses() -> None:
    with pytest.raises(ValueError, match="rows"):
        feature_losses.attention_loss(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 4, 4), torch.ones(1, 3, 3).bool())
    with pytest.raises(ValueError, match="no token"):
        feature_losses.attention_loss(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3), torch.zeros(1, 3, 3).bool())
