"""PPO's mathematics: numbers worked by hand, laws, a plain loop, and a bandit whose optimum is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from pipelines.core import policy_gradient
from pipelines.core.policy_gradient import gae, leave_one_out, policy_loss, token_rewards, value_loss, whiten

MASK = tensor([[True, True, True], [True, True, False]])


def random_table(seed: int, episodes: int = 7, tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two tables and a mask of episodes of different length, the shortest of one token."""
    dice = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (episodes,), generator=dice)
    lengths[0], lengths[-1] = 1, tokens
    mask = torch.arange(tokens)[None, :] < lengths[:, None]
    first, second = (torch.randn(episodes, tokens, generator=dice) for _ in range(2))
    return first, second, mask


def test_token_rewards_by_hand() -> None:
    log_ratios = tensor([[0.5, -1.0, 2.0], [1.0, 0.25, 99.0]])
    found = token_rewards(log_ratios, tensor([3.0, -1.0]), MASK, 0.1)
    # -0.1 * log_ratio everywhere; the scores 3 and -1 at the third and the second token
    torch.testing.assert_close(found, tensor([[-0.05, 0.1, 2.8], [-0.1, -1.025, 0.0]]))


def test_an_episode_is_worth_its_score_less_its_kl() -> None:
    log_ratios, other, mask = random_table(0)
    found = token_rewards(log_ratios, other[:, 0], mask, 0.3).sum(dim=1)
    torch.testing.assert_close(found, other[:, 0] - 0.3 * (log_ratios * mask).sum(dim=1))


def test_gae_by_hand() -> None:
    # discount 0.5, trace 0.25, so an advantage counts 0.125 one step earlier.
    # Three tokens: deltas 3 - 4 = -1;  2 + 0.5 * 4 - 2 = 2;  1 + 0.5 * 2 - 1 = 1
    #   advantages -1;  2 - 0.125 * 1 = 1.875;  1 + 0.125 * 1.875 = 1.234375
    # Two tokens: deltas 2 - 1 = 1;  0 + 0.5 * 1 - 2 = -1.5;  advantages 1;  -1.5 + 0.125 * 1 = -1.375
    rewards = tensor([[1.0, 2.0, 3.0], [0.0, 2.0, 50.0]])
    values = tensor([[1.0, 2.0, 4.0], [2.0, 1.0, -70.0]])
    found = gae(rewards, values, MASK, 0.5, 0.25)
    assert torch.equal(found.advantages, tensor([[1.234375, 1.875, -1.0], [-1.375, 1.0, 0.0]]))
    assert torch.equal(found.returns, tensor([[2.234375, 3.875, 3.0], [0.625, 2.0, 0.0]]))  # advantages + values


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 0.95), (0.9, 0.5), (0.9, 0.0)])
def test_gae_equals_a_plain_sum_over_one_step_errors(discount: float, trace: float) -> None:
    rewards, values, mask = random_table(1)
    found = gae(rewards, values, mask, discount, trace)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        reward, value = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        errors = [reward[t] + discount * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            expected = sum((discount * trace) ** (later - t) * errors[later] for later in range(t, length))
            assert float(found.advantages[row, t]) == pytest.approx(expected, abs=1e-5)
            assert float(found.returns[row, t]) == pytest.approx(expected + value[t], abs=1e-5)


def test_gae_without_discount_or_trace_is_what_is_still_to_come_less_the_value() -> None:
    rewards, values, mask = random_table(2)
    found = gae(rewards, values, mask, 1.0, 1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(found.returns, to_go)
    torch.testing.assert_close(found.advantages, (to_go - values) * mask)


@pytest.mark.parametrize("filling", [0.0, 1e9, math.nan, math.inf])
def test_nothing_depends_on_the_padding(filling: float) -> None:
    first, second, mask = random_table(3)
    dirty, other = (torch.where(mask, table, filling) for table in (first, second))
    for ours, clean in (
        (gae(dirty, other, mask, 0.9, 0.8), gae(first, second, mask, 0.9, 0.8)),
        ((whiten(dirty, mask),), (whiten(first, mask),)),
        ((token_rewards(dirty, second[:, 0], mask, 0.2),), (token_rewards(first, second[:, 0], mask, 0.2),)),
    ):
        for found, expected in zip(ours, clean, strict=True):
            assert torch.equal(found, expected)
            assert torch.equal(found[~mask], torch.zeros_like(found[~mask]))
    assert policy_gradient.explained_variance(dirty, other, mask) == policy_gradient.explained_variance(
        first, second, mask
    )


def test_whitening() -> None:
    values, _, mask = random_table(4)
    found = whiten(values, mask)
    assert float(found[mask].mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(found[mask].square().mean()) == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(whiten(3 * values - 5, mask), found, atol=1e-5, rtol=1e-5)
    # the whole batch, not each episode: 1, 1, 1, 3, 3 have mean 1.8 and variance (3 * 0.64 + 2 * 1.44) / 5 = 0.96
    by_hand = whiten(tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 0.0]]), MASK)
    low, high = -0.8 / math.sqrt(0.96), 1.2 / math.sqrt(0.96)
    torch.testing.assert_close(by_hand, tensor([[low, low, low], [high, high, 0.0]]))
    assert torch.equal(whiten(torch.ones(2, 3), MASK), torch.zeros(2, 3))


def test_both_estimators_have_the_kl_as_their_mean() -> None:
    policy, reference = tensor([0.5, 0.3, 0.15, 0.05]).double(), tensor([0.1, 0.2, 0.3, 0.4]).double()
    log_ratios = (policy / reference).log()
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(probs=policy), torch.distributions.Categorical(probs=reference)
    )
    for estimator in (policy_gradient.k1, policy_gradient.k3):
        torch.testing.assert_close((policy * estimator(log_ratios)).sum(), exact)
    assert float(policy_gradient.k1(log_ratios).min()) < 0


def test_k3_is_never_negative() -> None:
    size = torch.logspace(-8, 1, 1000)
    for log_ratios in (size, -size):
        assert bool((policy_gradient.k3(log_ratios) >= 0).all())
    assert float(policy_gradient.k3(torch.zeros(()))) == 0.0


def test_at_ratio_one_the_gradient_is_that_of_plain_policy_gradient() -> None:
    old, advantages, _ = random_table(5, 1, 12)
    new = old[0].clone().requires_grad_()
    found = policy_loss(new, old[0], advantages[0], 0.2, 12)
    found.loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found.loss.detach(), -advantages.mean())
    torch.testing.assert_close(new.grad, -advantages[0] / 12)
    assert float(found.clip_fraction) == float(found.approx_kl) == 0.0


def test_clipping_stops_the_gradient_on_the_right_side_only() -> None:
    # ratio, advantage: objective min(ratio A, clipped A), clip 0.2
    #   1.5,  2: min( 3.0,  2.4) =  2.4 clipped        1.5, -2: min(-3.0, -2.4) = -3.0 not
    #   0.5,  2: min( 1.0,  1.6) =  1.0 not            0.5, -2: min(-1.0, -1.6) = -1.6 clipped
    new = tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    found = policy_loss(new, torch.zeros(4), tensor([2.0, -2.0, 2.0, -2.0]), 0.2, 4)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert float(found.loss.detach()) == pytest.approx(-(2.4 - 3.0 + 1.0 - 1.6) / 4)
    # where it is not clipped, d (-ratio A / 4) / d log-probability = -ratio A / 4
    torch.testing.assert_close(new.grad, tensor([0.0, 0.75, -0.25, 0.0]))
    assert float(found.clip_fraction) == 1.0
    # ratio - 1 - log ratio: 0.5 - 0.405465 = 0.094535 and -0.5 + 0.693147 = 0.193147
    assert float(found.approx_kl) == pytest.approx((0.094535 + 0.193147) / 2, abs=1e-5)


def test_within_the_clip_nothing_is_clipped() -> None:
    new = tensor([1.19, 0.81, 1.19, 0.81]).log().requires_grad_()
    found = policy_loss(new, torch.zeros(4), tensor([2.0, 2.0, -2.0, -2.0]), 0.2, 4)
    found.loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(new.grad, tensor([-0.595, -0.405, 0.595, 0.405]))
    assert float(found.clip_fraction) == 0.0


def test_approx_kl_is_that_of_the_old_policy_from_the_new() -> None:
    old, new = tensor([0.5, 0.3, 0.2]), tensor([0.2, 0.5, 0.3])
    exact = float((old * (old / new).log()).sum())
    drawn = tensor([0] * 5 + [1] * 3 + [2] * 2)  # ten draws that happen to be as frequent as they are probable
    found = policy_loss(new.log()[drawn], old.log()[drawn], torch.ones(10), 0.2, 10)
    assert float(found.approx_kl) == pytest.approx(exact, abs=1e-6)


def test_parts_of_a_step_add_up() -> None:
    new, old, _ = random_table(6, 1, 20)
    new, old, target = new[0].requires_grad_(), old[0], torch.linspace(-2, 2, 20)
    for loss in (policy_loss, value_loss):
        whole = loss(new, old, target, 0.2, 20)
        gradient = torch.autograd.grad(whole[0], new)[0]
        parts = [loss(new[part], old[part], target[part], 0.2, 20) for part in (slice(3), slice(3, 11), slice(11, 20))]
        torch.testing.assert_close(
            torch.autograd.grad(torch.stack([part[0] for part in parts]).sum(), new)[0], gradient
        )
        for number, together in enumerate(whole):
            torch.testing.assert_close(torch.stack([part[number] for part in parts]).sum(), together)


def test_value_clipping_by_hand() -> None:
    # old 1, clip 0.2. new, return: plain error squared, clipped error squared
    #   1.5, 2: 0.25, (1.2 - 2)^2 = 0.64 clipped       1.5, 0: 2.25, 1.2^2 = 1.44 not
    #   0.5, 0: 0.25, 0.8^2 = 0.64 clipped             1.1, 2: 0.81, 0.81 not
    new = tensor([1.5, 1.5, 0.5, 1.1], requires_grad=True)
    found = value_loss(new, torch.ones(4), tensor([2.0, 0.0, 0.0, 2.0]), 0.2, 4)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert float(found.loss.detach()) == pytest.approx(0.5 * (0.64 + 2.25 + 0.64 + 0.81) / 4)
    assert float(found.clip_fraction) == 0.5
    torch.testing.assert_close(new.grad, tensor([0.0, 1.5, 0.0, -0.9]) / 4)  # (new - return) / 4 or nothing


def test_explained_variance() -> None:
    returns, _, mask = random_table(7)
    explained = policy_gradient.explained_variance
    assert explained(returns, returns, mask) == 1.0
    assert explained(returns + 5.0, returns, mask) == pytest.approx(1.0, abs=1e-5)  # a shift leaves no variance
    assert explained(torch.full_like(returns, 3.0), returns, mask) == pytest.approx(0.0, abs=1e-5)
    assert explained(-returns, returns, mask) == pytest.approx(-3.0, abs=1e-5)  # 1 - Var(2 r) / Var(r)
    assert explained(returns, torch.ones_like(returns), mask) == 0.0  # nothing to explain


@pytest.mark.parametrize(
    ("kl", "factor"),
    [  # 512 of 10000 episodes are 0.0512 of the horizon
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 0.0512),
        (5.4, 1 - 0.1 * 0.0512),
        (60.0, 1.01024),  # the error is kept to 0.2
        (0.0, 0.98976),
        (-3.0, 0.98976),
    ],
)
def test_adaptive_coefficient_by_hand(kl: float, factor: float) -> None:
    assert policy_gradient.next_coefficient(0.15, kl, 6.0, 10000, 512) == pytest.approx(0.15 * factor)


def test_a_bandit_reaches_its_known_optimum() -> None:
    """Reward less beta times KL is largest at pi* proportional to reference * exp(reward / beta)."""
    rewards, beta, pulls, steps = tensor([0.0, 0.2, 0.5, 0.8, 1.0]), 0.4, 512, 300
    dice = torch.Generator().manual_seed(0)
    mask = torch.ones(pulls, 1, dtype=torch.bool)
    logits, reference = torch.zeros(5, requires_grad=True), math.log(1 / 5)
    best = torch.softmax(rewards / beta, dim=0)
    for step in range(steps):
        policy = torch.log_softmax(logits.detach(), dim=0)
        arms = torch.multinomial(policy.exp(), pulls, replacement=True, generator=dice)
        old = policy[arms]
        earned = token_rewards((old - reference)[:, None], rewards[arms], mask, beta)
        advantages = whiten(earned, mask)[:, 0]
        for _ in range(2):  # epochs: in the second the ratio is no longer 1
            loss = policy_loss(torch.log_softmax(logits, dim=0)[arms], old, advantages, 0.2, pulls).loss
            gradient = torch.autograd.grad(loss, logits)[0]
            with torch.no_grad():
                # Whitened advantages do not shrink as the optimum comes near, so the steps have to.
                logits -= 0.5 * (1 - step / steps) * gradient

    def distance(other: torch.Tensor) -> float:
        return float((best * (best / other).log()).sum())

    assert distance(torch.full((5,), 0.2)) > 0.2
    assert distance(torch.softmax(logits.detach(), dim=0)) < 1e-3


def test_a_score_over_those_of_the_others_by_hand() -> None:
    found = leave_one_out(tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3)
    assert found.tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0]


def test_the_baseline_of_a_group_leaves_the_gradient_as_it_is_and_most_of_its_noise_out() -> None:
    """REINFORCE on a bandit: the mean over many draws is the exact gradient, with and without."""
    torch.manual_seed(0)
    logits, worth, draws = torch.zeros(3), torch.tensor([0.0, 1.0, 2.0]), 4
    chances = logits.softmax(0)
    exact = chances * (worth - (chances * worth).sum())
    gradients = {}
    for name in ("plain", "group"):
        arms = torch.multinomial(chances.expand(20_000, 3), draws, replacement=True)
        scores = (worth[arms] + 30.0).flatten()
        weight = leave_one_out(scores, draws) if name == "group" else scores
        score_function = torch.nn.functional.one_hot(arms.flatten(), 3) - chances
        gradients[name] = weight[:, None] * score_function
    for found in gradients.values():
        mean, error = found.mean(dim=0), found.std(dim=0) / len(found) ** 0.5
        assert ((mean - exact).abs() < 5 * error).all()
    assert gradients["group"].var(dim=0).sum() < gradients["plain"].var(dim=0).sum() / 100
