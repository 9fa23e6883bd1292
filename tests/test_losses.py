"""The fused loss against torch's, in value and gradient; chunks, ignored labels, refusal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipelines.core import losses


def tensors(count: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(count, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(31, 12, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 31, (count,))
    labels[::5] = losses.IGNORE
    return hidden, weight, labels


@pytest.mark.parametrize("count", [3, losses.CHUNK, 2 * losses.CHUNK + 7])
def test_equals_torch(count: int) -> None:
    hidden, weight, labels = tensors(count, torch.float32)
    ours = losses.linear_cross_entropy(hidden, weight, labels)
    (3.0 * ours).backward()
    reference_hidden, reference_weight = (
        hidden.detach().clone().requires_grad_(),
        weight.detach().clone().requires_grad_(),
    )
    theirs = F.cross_entropy(reference_hidden @ reference_weight.t(), labels, ignore_index=losses.IGNORE)
    (3.0 * theirs).backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(hidden.grad, reference_hidden.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weight.grad, reference_weight.grad, atol=1e-6, rtol=1e-5)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, labels = tensors(9, torch.float32)
    losses.linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None and weight.grad is None


def test_bf16_is_close() -> None:
    hidden, weight, labels = tensors(300, torch.float32)
    exact = losses.linear_cross_entropy(hidden, weight, labels)
    rounded = losses.linear_cross_entropy(hidden.bfloat16(), weight, labels)
    assert abs(float(exact) - float(rounded)) < 0.02


def test_label_log_probabilities() -> None:
    hidden, weight, labels = tensors(losses.CHUNK + 5, torch.float32)
    ours = losses.label_log_probabilities(hidden, weight, labels)
    every = F.log_softmax(hidden @ weight.t(), dim=1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(ours, every * (labels != losses.IGNORE), atol=1e-5, rtol=1e-5)


def test_nothing_supervised_is_refused() -> None:
    hidden, weight, labels = tensors(4, torch.float32)
    with pytest.raises(ValueError, match="supervised"):
        losses.linear_cross_entropy(hidden, weight, torch.full_like(labels, losses.IGNORE))
