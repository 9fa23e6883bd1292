"""The fused losses against torch's, in value and gradient; chunks, ignored labels, temperature, refusal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipelines.core import losses
from pipelines.core.output_layer import CHUNK


def tensors(count: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(count, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(31, 12, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 31, (count,))
    labels[::5] = losses.IGNORE
    return hidden, weight, labels


@pytest.mark.parametrize("count", [3, CHUNK, 2 * CHUNK + 7])
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
    hidden, weight, labels = tensors(CHUNK + 5, torch.float32)
    ours = losses.label_log_probabilities(hidden, weight, labels)
    every = F.log_softmax(hidden @ weight.t(), dim=1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(ours, every * (labels != losses.IGNORE), atol=1e-5, rtol=1e-5)


def test_nothing_supervised_is_refused() -> None:
    hidden, weight, labels = tensors(4, torch.float32)
    with pytest.raises(ValueError, match="supervised"):
        losses.linear_cross_entropy(hidden, weight, torch.full_like(labels, losses.IGNORE))


def token_tensors(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, output embedding, labels that are all tokens, and a gradient from above for each of them."""
    hidden, weight, labels = tensors(count, torch.float32)
    return hidden, weight, labels.clamp(min=0), torch.randn(count)


def plainly(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies with all logits at once."""
    drawn_from = torch.distributions.Categorical(logits=hidden @ weight.t() / temperature)
    return drawn_from.log_prob(labels), drawn_from.entropy()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("count", [3, CHUNK, 2 * CHUNK + 7])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_token_log_probabilities_equal_torch(count: int, temperature: float) -> None:
    hidden, weight, labels, above = token_tensors(count)
    ours = losses.token_log_probabilities(hidden, weight, labels, temperature, entropies=True)
    assert ours.entropies is not None
    ours_grad = torch.autograd.grad(ours.log_probabilities, (hidden, weight), above)
    theirs, entropies = plainly(hidden, weight, labels, temperature)
    theirs_grad = torch.autograd.grad(theirs, (hidden, weight), above)
    torch.testing.assert_close(ours.log_probabilities, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.entropies, entropies, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours_grad, theirs_grad, atol=1e-4, rtol=1e-5)
    assert ours.log_probabilities.dtype == ours.entropies.dtype == torch.float32
    assert not ours.entropies.requires_grad


def test_a_frozen_head_gives_a_gradient_to_hidden_alone() -> None:
    hidden, weight, labels, above = token_tensors(9)
    losses.token_log_probabilities(hidden, weight.detach(), labels, 0.7).log_probabilities.backward(above)  # type: ignore[no-untyped-call]
    expected = torch.autograd.grad(plainly(hidden, weight, labels, 0.7)[0], hidden, above)[0]
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, expected, atol=1e-5, rtol=1e-5)


def test_token_log_probabilities_without_a_gradient_are_those_of_labels() -> None:
    hidden, weight, labels, _ = token_tensors(CHUNK + 5)
    with torch.no_grad():
        found = losses.token_log_probabilities(hidden, weight, labels)
    assert not found.log_probabilities.requires_grad
    assert torch.equal(found.log_probabilities, losses.label_log_probabilities(hidden, weight, labels))


def test_token_log_probabilities_in_bf16_are_close() -> None:
    hidden, weight, labels, above = token_tensors(300)
    rounded = losses.token_log_probabilities(hidden.bfloat16(), weight, labels, 0.7, entropies=True)
    assert rounded.entropies is not None
    gradient = torch.autograd.grad(rounded.log_probabilities, (hidden, weight), above)
    exact, entropies = plainly(hidden, weight, labels, 0.7)
    assert rounded.log_probabilities.dtype == torch.float32
    assert float((rounded.log_probabilities - exact).abs().mean()) < 0.03
    assert float((rounded.entropies - entropies).abs().mean()) < 0.03
    for ours, theirs in zip(gradient, torch.autograd.grad(exact, (hidden, weight), above), strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02
