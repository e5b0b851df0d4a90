"""The objective: by hand, and against the papers' equations written out in float64."""

import itertools
import math
from typing import get_args

import pytest
import torch

from grpo.loss import (
    ImportanceSamplingLevel,
    LossType,
    ScaleRewards,
    clipped_loss,
    clipped_tokens,
    completion_weights,
    group_advantages,
    importance_ratios,
    kl_estimate,
    loss_mask,
    weighted_sum,
)

NAN = float("nan")


# Of the last of the rewards (0, 1, 2) and of (1, 4, 7), whose unbiased standard deviations are 1 and 3; that of the
# batch is given as 2.
ADVANTAGES = {
    "group": [1 / 1.0001, 3 / 3.0001],
    "batch": [1 / 2.0001, 3 / 2.0001],
    "none": [1.0, 3.0],
}


@pytest.mark.parametrize("scale_rewards", get_args(ScaleRewards))
def test_advantages_by_hand(scale_rewards):
    first, second = ADVANTAGES[scale_rewards]
    found = group_advantages(torch.tensor([[0.0, 1.0, 2.0], [1.0, 4.0, 7.0]]), scale_rewards, batch_std=2.0)
    assert torch.allclose(found, torch.tensor([[-first, 0.0, first], [-second, 0.0, second]]), atol=1e-6)


def test_a_choice_without_a_formula_is_an_error():
    """Such as one that is declared, and spelled otherwise where it is computed."""
    rewards, mask = torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="scale_rewards 'groups'"):
        group_advantages(rewards, "groups")
    with pytest.raises(ValueError, match="importance_sampling_level 'tokens'"):
        importance_ratios(rewards, rewards, mask, "tokens")
    with pytest.raises(ValueError, match="loss_type 'cispo'"):
        completion_weights("cispo", mask.sum(dim=1), 2, 1, 4)


@pytest.mark.parametrize("scale_rewards", get_args(ScaleRewards))
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.97])
def test_advantages_of_equal_rewards_are_exactly_zero(reward, scale_rewards):
    rewards = torch.full((2, 7), reward)
    rewards[1, 0] = 0.5
    advantages = group_advantages(rewards, scale_rewards, batch_std=0.0)
    assert (advantages[0] == 0).all()
    assert (advantages[1] != 0).all()


def test_a_completion_without_a_reward_has_no_advantage_and_no_part_in_its_group():
    with_gap = group_advantages(torch.tensor([[1.0, NAN, 4.0, 2.0], [NAN, NAN, 5.0, NAN], [NAN] * 4]), "group")
    without = group_advantages(torch.tensor([[1.0, 4.0, 2.0]]), "group")
    assert torch.equal(with_gap[0, [0, 2, 3]], without[0])
    assert with_gap[0, 1] == 0
    assert (with_gap[1:] == 0).all()  # one reward alone, or none, compares to nothing
    of_two = group_advantages(torch.tensor([[1.0, NAN, 4.0, NAN]]), "group")
    half = 1.5 / (math.sqrt(4.5) + 1e-4)
    assert torch.allclose(of_two, torch.tensor([[-half, 0.0, half, 0.0]]), atol=1e-6)


def test_a_constant_factor_on_the_rewards_of_a_group_cancels_unless_they_are_not_scaled():
    rewards = torch.tensor([[0.1, 0.5, 0.9]])
    assert torch.allclose(group_advantages(rewards, "group"), group_advantages(1.5 * rewards, "group"), atol=1e-3)
    assert torch.allclose(1.5 * group_advantages(rewards, "none"), group_advantages(1.5 * rewards, "none"))


def test_trained_tokens_are_those_of_scored_completions_and_on_demand_of_uncut_ones():
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    rewards, is_stopped = torch.tensor([0.5, NAN, 0.0]), torch.tensor([True, True, False])
    expected = torch.tensor([[True, True], [False, False], [True, True]])
    assert torch.equal(loss_mask(mask, rewards, is_stopped, False, beta=0.0), expected)
    expected[2] = False
    assert torch.equal(loss_mask(mask, rewards, is_stopped, True, beta=0.0), expected)


@pytest.mark.parametrize("rewards", [[0.5, 0.5, 0.5], [0.5, NAN, 0.5], [NAN, NAN, 0.5]], ids=str)
def test_a_group_of_equal_rewards_is_trained_only_for_its_kl(rewards):
    mask, is_stopped = torch.ones(3, 2, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    rewards = torch.tensor(rewards)
    assert not loss_mask(mask, rewards, is_stopped, False, beta=0.0).any()
    assert torch.equal(loss_mask(mask, rewards, is_stopped, False, beta=0.1), mask & ~rewards.isnan()[:, None])


def clip(ratio, advantage):
    """Loss, its gradient with respect to the log-probability, and what was counted, for a single token."""
    logprob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    ratios = importance_ratios(logprob, torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), "token")
    arguments = ratios, torch.tensor([advantage]), 0.05, 0.1
    loss, (low, high) = clipped_loss(*arguments), clipped_tokens(*arguments)
    loss.sum().backward()
    return loss.item(), logprob.grad.item(), int(low), int(high)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [  # loss, d loss / d logprob = -advantage · ratio where not clipped, counted low, counted high
        (1.0, 2.0, (-2.0, -2.0, 0, 0)),
        (1.08, 2.0, (-2.16, -2.16, 0, 0)),  # within 1.1, beyond 1.05: the bounds are asymmetric
        (1.5, 2.0, (-2.2, 0.0, 0, 1)),
        (0.5, 2.0, (-1.0, -1.0, 0, 0)),  # too improbable but good: pulled back up, not clipped
        (0.96, -2.0, (1.92, 1.92, 0, 0)),
        (0.5, -2.0, (1.9, 0.0, 1, 0)),
        (1.5, -2.0, (3.0, 3.0, 0, 0)),
        (1.5, 0.0, (0.0, 0.0, 0, 0)),
        (0.5, 0.0, (0.0, 0.0, 0, 0)),
        (0.5, 0.5, (-0.25, -0.25, 0, 0)),  # small advantages have a sign, too
        (1.5, 0.5, (-0.55, 0.0, 0, 1)),
    ],
)
def test_each_side_of_the_clipping_by_hand(ratio, advantage, expected):
    assert clip(ratio, advantage) == pytest.approx(expected, abs=1e-7)


def test_a_ratio_exactly_at_a_bound_is_not_counted_as_clipped():
    low, high = clipped_tokens(torch.tensor([[0.5], [1.5]]), torch.tensor([-1.0, 1.0]), 0.5, 0.5)
    assert not low.any() and not high.any()


# Two completions of three tokens, the last token of the second not trained. Ratios by token, advantages 1 and -1,
# epsilon 0.05 and 0.1: the first completion is clipped above in its second token (1.5 -> 1.1), the second below in its
# first (0.5 -> 0.95).
RATIOS = torch.tensor([[1.0, 1.5, 0.5], [0.5, 1.5, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])
# One ratio per completion: (1 · 1.5 · 0.5)^(1/3) = 0.9086, not clipped for being good; (0.5 · 1.5)^(1/2) = 0.8660,
# clipped to 0.95 for being bad.
S = 0.75 ** (1 / 3)
# By level: the loss of each token, and the gradient of their weighted sum with respect to each log-probability, which
# weights by completion multiply. Of a ratio per completion, three tokens of loss -S have d S / d logprob = S / 3 each.
BY_LEVEL = {
    "token": ([[-1.0, -1.1, -0.5], [0.95, 1.5, 0.0]], [[-1.0, 0.0, -0.5], [0.0, 1.5, 0.0]]),
    "sequence": ([[-S, -S, -S], [0.95, 0.95, 0.0]], [[-S, -S, -S], [0.0, 0.0, 0.0]]),
}
WEIGHTS = {"dapo": (1 / 5, 1 / 5), "grpo": (1 / 2 / 3, 1 / 2 / 2), "dr_grpo": (1 / 2 / 4, 1 / 2 / 4)}


@pytest.mark.parametrize("loss_type", get_args(LossType))
@pytest.mark.parametrize("level", get_args(ImportanceSamplingLevel))
def test_loss_and_gradient_of_two_completions_by_hand(loss_type, level):
    logprobs = RATIOS.log().requires_grad_()
    ratio = importance_ratios(logprobs, torch.zeros(2, 3), MASK, level)
    loss = clipped_loss(ratio, torch.tensor([1.0, -1.0]), 0.05, 0.1)
    weights = completion_weights(
        loss_type, MASK.sum(dim=1), num_tokens=5, num_completions=2, max_completion_length=4
    ).double()
    assert weights.tolist() == pytest.approx(WEIGHTS[loss_type])
    total = weighted_sum(loss, MASK, weights)
    total.backward()
    by_completion = torch.tensor(WEIGHTS[loss_type], dtype=torch.float64)[:, None]
    token_loss, gradient = (torch.tensor(values, dtype=torch.float64) for values in BY_LEVEL[level])
    assert total.item() == pytest.approx((by_completion * token_loss).sum().item())
    assert torch.allclose(logprobs.grad, by_completion * gradient, atol=1e-9)


def test_the_kl_estimate_by_hand():
    policy, reference = torch.tensor([[math.log(0.5), math.log(0.2)]]), torch.tensor([[math.log(0.25), math.log(0.2)]])
    expected = [0.5 - math.log(0.5) - 1, 0.0]  # pi_ref / pi = 1/2, 1
    assert kl_estimate(policy, reference)[0].tolist() == pytest.approx(expected, abs=1e-7)


def papers_loss(logprobs, old, reference, advantages, lengths, loss_type, level, beta, max_length):
    """The equations, token by token in float64, for completions of several groups in one list.

    GRPO: DeepSeekMath (arXiv:2402.03300) equations 3 and 4. DAPO (arXiv:2503.14476): equation 8. Dr. GRPO
    (arXiv:2503.20783): section 3.2, the sum over a constant. GSPO (arXiv:2507.18071): equations 5 and 7.
    """
    total, denominator = 0.0, {"dapo": sum(lengths), "dr_grpo": len(lengths) * max_length}
    for i, n in enumerate(lengths):
        sequence_ratio = torch.exp(sum(logprobs[i, t] - old[i, t] for t in range(n)) / n)
        terms = []
        for t in range(n):
            ratio = {"token": torch.exp(logprobs[i, t] - old[i, t]), "sequence": sequence_ratio}[level]
            bounded = min(max(ratio, torch.tensor(0.8).double()), torch.tensor(1.28).double())
            surrogate = min(ratio * advantages[i], bounded * advantages[i])
            inverse = torch.exp(reference[i, t] - logprobs[i, t])
            divergence = inverse - torch.log(inverse) - 1
            terms.append(surrogate - beta * divergence)
        total = total + sum(terms) / (denominator | {"grpo": n * len(lengths)})[loss_type]
    return -total  # the papers maximise


@pytest.mark.parametrize(
    ("loss_type", "level", "beta"),
    list(itertools.product(get_args(LossType), get_args(ImportanceSamplingLevel), [0.0, 0.04])),
)
def test_loss_and_gradient_equal_the_papers_equations(loss_type, level, beta):
    torch.manual_seed(len(loss_type) + len(level))
    G, C, max_length = 6, 9, 12
    old, reference = -torch.rand(2, G, C).double().unbind(0)[0], -torch.rand(G, C).double()
    logprobs = (old + 0.4 * torch.randn(G, C)).requires_grad_()
    advantages, lengths = torch.randn(G).double(), [9, 1, 4, 7, 2, 5]
    expected = papers_loss(logprobs, old, reference, advantages, lengths, loss_type, level, beta, max_length)
    (gradient,) = torch.autograd.grad(expected, logprobs)

    mask = torch.arange(C) < torch.tensor(lengths)[:, None]
    total = 0.0
    for half in (slice(0, 2), slice(2, 6)):  # two groups, as passes or ranks would hold them
        ratio = importance_ratios(logprobs[half], old[half], mask[half], level)
        loss = clipped_loss(ratio, advantages[half], epsilon=0.2, epsilon_high=0.28)
        loss = loss + beta * kl_estimate(logprobs[half], reference[half])
        weights = completion_weights(loss_type, mask[half].sum(dim=1), sum(lengths), G, max_length)
        total = total + weighted_sum(loss, mask[half], weights)
    total.backward()
    assert total.item() == pytest.approx(expected.item(), abs=1e-6)
    assert (logprobs.grad - gradient).abs().max() < 1e-6
    assert gradient.abs().max() > 1e-3
