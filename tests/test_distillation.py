"""Divergences: by hand, their limits, closed gradients; chunked equals whole; the k likeliest tokens and the rest."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.core import losses
from pipelines.core.losses import Kind
from pipelines.core.output_layer import CHUNK, ROWS

KINDS: tuple[Kind, ...] = ("forward", "reverse", "jsd")
VOCABULARY = 31


class Pair(NamedTuple):
    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor

    @property
    def logits(self) -> tuple[Tensor, Tensor]:
        return self.hidden @ self.head.t(), self.teacher_hidden @ self.teacher_head.t()


def pair(count: int, dtype: torch.dtype = torch.float64) -> Pair:
    torch.manual_seed(0)
    labels = torch.randint(0, VOCABULARY, (count,))
    labels[::5] = losses.IGNORE
    return Pair(
        torch.randn(count, 6, dtype=dtype, requires_grad=True),
        torch.randn(VOCABULARY, 6, dtype=dtype, requires_grad=True),
        torch.randn(count, 9, dtype=dtype),
        torch.randn(VOCABULARY, 9, dtype=dtype),
        labels,
    )


def test_by_hand() -> None:
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    middle = 0.5 * 0.75 + 0.5 * 0.5  # 0.625, 0.375
    of_teacher = 0.75 * math.log(0.75 / middle) + 0.25 * math.log(0.25 / (1 - middle))
    of_student = 0.5 * math.log(0.5 / middle) + 0.5 * math.log(0.5 / (1 - middle))
    for kind, expected in zip(KINDS, (forward, reverse, 0.5 * of_teacher + 0.5 * of_student), strict=True):
        assert float(losses.divergence(student, teacher, kind, 1.0)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_torch_distributions(temperature: float) -> None:
    logits = pair(7).logits
    ours, theirs = (torch.distributions.Categorical(logits=one / temperature) for one in logits)
    for kind, expected in (
        ("forward", torch.distributions.kl_divergence(theirs, ours)),
        ("reverse", torch.distributions.kl_divergence(ours, theirs)),
    ):
        found = losses.divergence(*logits, kind, temperature)  # type: ignore[arg-type]
        torch.testing.assert_close(found, temperature**2 * expected)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_forward_gradient_is_temperature_times_the_gap(temperature: float) -> None:
    student, teacher = (logits.detach() for logits in pair(5).logits)
    student.requires_grad_()
    losses.divergence(student, teacher, "forward", temperature).sum().backward()  # type: ignore[no-untyped-call]
    gap = torch.softmax(student / temperature, 1) - torch.softmax(teacher / temperature, 1)
    torch.testing.assert_close(student.grad, temperature * gap)


@pytest.mark.parametrize("kind", KINDS)
def test_a_high_temperature_matches_logits(kind: Kind) -> None:
    """Hinton et al. 2015, section 2.1: half the mean square of the centred gap; beta (1 - beta) of it for the JSD."""
    student, teacher = (logits - logits.mean(dim=1, keepdim=True) for logits in pair(5).logits)
    beta = 0.3
    expected = (student - teacher).square().mean(dim=1) / 2 * (beta * (1 - beta) if kind == "jsd" else 1.0)
    torch.testing.assert_close(losses.divergence(student, teacher, kind, 1e5, beta), expected, rtol=1e-3, atol=0.0)


def test_limits_of_beta() -> None:
    near, logits = 1e-7, pair(5).logits
    for beta, scale, kind in ((near, near, "forward"), (1 - near, near, "reverse")):
        limit = losses.divergence(*logits, kind, 1.0)  # type: ignore[arg-type]
        torch.testing.assert_close(losses.divergence(*logits, "jsd", 1.0, beta) / scale, limit, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_distribution_is_no_divergence_away(kind: Kind) -> None:
    logits = pair(5).logits[0]
    torch.testing.assert_close(losses.divergence(logits, logits, kind, 2.0), torch.zeros_like(logits[:, 0]))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_logits_are_compared_in_fp32(kind: Kind) -> None:
    student, teacher = (logits.bfloat16() for logits in pair(40).logits)
    found = losses.divergence(student, teacher, kind, 2.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, losses.divergence(student.float(), teacher.float(), kind, 2.0))


@pytest.mark.parametrize("count", [3, CHUNK, 2 * CHUNK + ROWS + 7])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_equals_whole(kind: Kind, temperature: float, count: int) -> None:
    part = pair(count)
    found = losses.linear_divergence(*part[:4], kind, temperature, 0.3, part.labels, 0.7)
    labels = F.cross_entropy(part.logits[0], part.labels, ignore_index=losses.IGNORE)
    whole = losses.divergence(*part.logits, kind, temperature, 0.3).mean() + 0.7 * labels
    torch.testing.assert_close(found, whole)
    gradients = torch.autograd.grad(3 * found, (part.hidden, part.head))
    torch.testing.assert_close(gradients, torch.autograd.grad(3 * whole, (part.hidden, part.head)))


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_weight_0_change_nothing(kind: Kind) -> None:
    part = pair(9)
    without = losses.linear_divergence(*part[:4], kind)
    assert torch.equal(without, losses.linear_divergence(*part[:4], kind, labels=part.labels))
    torch.testing.assert_close(without, losses.divergence(*part.logits, kind).mean())


def test_only_what_is_trained_gets_a_gradient_and_no_logits_are_kept() -> None:
    part = pair(CHUNK + 9, torch.float32)
    teacher = part.teacher_hidden.requires_grad_(), part.teacher_head.requires_grad_()
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        loss = losses.linear_divergence(part.hidden, part.head.detach(), *teacher, "reverse")
    loss.backward()  # type: ignore[no-untyped-call]
    assert part.hidden.grad is not None
    assert part.head.grad is teacher[0].grad is teacher[1].grad is None
    assert kept and all(VOCABULARY not in shape for shape in kept)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_hidden_states_are_close(kind: Kind) -> None:
    part = pair(300, torch.float32)
    exact = losses.linear_divergence(*part[:4], kind)
    rounded = losses.linear_divergence(
        part.hidden.bfloat16(), part.head, part.teacher_hidden.bfloat16(), part.teacher_head, kind
    )
    assert rounded.dtype == torch.float32
    assert float((rounded - exact).detach().abs()) < 0.01 * float(exact.detach())
    for ours, theirs in zip(
        torch.autograd.grad(rounded, (part.hidden, part.head)),
        torch.autograd.grad(exact, (part.hidden, part.head)),
        strict=True,
    ):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_certain_models_that_disagree_stay_finite(kind: Kind) -> None:
    hidden = torch.eye(3, requires_grad=True)
    teacher_head = 300 * torch.eye(3)
    head = 300 * torch.eye(3).roll(1, 0)
    cached = losses.linear_top_k(torch.eye(3), teacher_head, 1)
    for loss in (
        losses.linear_divergence(hidden, head, torch.eye(3), teacher_head, kind),
        losses.linear_divergence_to_top_k(hidden, head, cached, kind),
        losses.divergence(hidden @ head.t(), teacher_head, kind).mean(),
        losses.divergence_to_top_k(hidden @ head.t(), cached, kind).mean(),
    ):
        gradient = torch.autograd.grad(loss, hidden)[0]
        assert math.isfinite(float(loss.detach())) and bool(gradient.isfinite().all())


def test_top_k_by_hand() -> None:
    teacher, student = torch.tensor([[0.1, 0.5, 0.3, 0.1]]), torch.tensor([[0.3, 0.4, 0.1, 0.2]])
    cached = losses.top_k(teacher.log(), 2)
    assert cached.ids.tolist() == [[1, 2]]
    assert [part.dtype for part in cached] == [torch.int32, torch.float16, torch.float32]
    assert float(cached.rest) == pytest.approx(math.log(0.2), rel=1e-5)
    found = losses.divergence_to_top_k(student.log(), cached, "forward")
    expected = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.1) + 0.2 * math.log(0.2 / 0.5)
    assert float(found) == pytest.approx(expected, abs=2e-3)  # log_p is fp16


@pytest.mark.parametrize("kind", KINDS)
def test_more_tokens_come_nearer_from_below(kind: Kind) -> None:
    """Data processing: merging tokens into one bucket can only hide a difference; with all tokens none is hidden."""
    student, teacher = (logits.detach().float() for logits in pair(50).logits)
    found = [losses.divergence_to_top_k(student, losses.top_k(teacher, k), kind) for k in (1, 4, 16, VOCABULARY)]
    whole = losses.divergence(student, teacher, kind)
    slack = 0.005 * whole  # log_p is fp16
    for fewer, more in zip(found, [*found[1:], whole], strict=True):
        assert bool((fewer <= more + slack).all())
    assert float(found[0].mean()) < 0.9 * float(whole.mean())
    torch.testing.assert_close(found[-1], whole, rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("k", [1, 5, VOCABULARY])
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_top_k_equals_whole(kind: Kind, k: int) -> None:
    part = pair(CHUNK + ROWS + 7, torch.float32)
    cached = losses.linear_top_k(part.teacher_hidden, part.teacher_head, k)
    for ours, theirs in zip(cached, losses.top_k(part.logits[1], k), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    found = losses.linear_divergence_to_top_k(part.hidden, part.head, cached, kind, 0.3, part.labels, 0.7)
    labels = F.cross_entropy(part.logits[0], part.labels, ignore_index=losses.IGNORE)
    whole = losses.divergence_to_top_k(part.logits[0], cached, kind, 1.0, 0.3).mean() + 0.7 * labels
    torch.testing.assert_close(found, whole)
    gradients = torch.autograd.grad(found, (part.hidden, part.head))
    expected = torch.autograd.grad(whole, (part.hidden, part.head))
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-4)


def test_refusals() -> None:
    part = pair(4)
    student, teacher = part.logits
    with pytest.raises(ValueError, match="not 'backward'"):
        losses.divergence(student, teacher, "backward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature 0"):
        losses.linear_divergence(*part[:4], "forward", 0.0)
    with pytest.raises(ValueError, match="beta 1"):
        losses.divergence(student, teacher, "jsd", 1.0, 1.0)
    with pytest.raises(ValueError, match="no labels"):
        losses.linear_divergence(*part[:4], "forward", labels_weight=0.5)
    with pytest.raises(ValueError, match="tokens or vocabulary"):
        losses.linear_divergence(part.hidden, part.head, part.teacher_hidden[1:], part.teacher_head, "forward")
    with pytest.raises(ValueError, match=f"top {VOCABULARY + 1}"):
        losses.top_k(teacher, VOCABULARY + 1)
    with pytest.raises(ValueError, match="temperature 1 alone"):
        losses.divergence_to_top_k(student, losses.top_k(teacher, 3), "forward", 2.0)
