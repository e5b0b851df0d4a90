"""The objective, computed by hand."""

import math

import pytest
import torch

from grpo.loss import clipped_policy_loss, group_advantages


def test_advantages_by_hand():
    rewards = torch.tensor([[0.0, 1.0], [1.0, 4.0]])  # unbiased standard deviations: sqrt(1/2), sqrt(9/2)
    half, three_halves = 0.5 / (math.sqrt(0.5) + 1e-4), 1.5 / (math.sqrt(4.5) + 1e-4)
    expected = torch.tensor([[-half, half], [-three_halves, three_halves]])
    assert torch.allclose(group_advantages(rewards), expected, atol=1e-6)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.97])
def test_advantages_of_equal_rewards_are_exactly_zero(reward):
    rewards = torch.full((2, 7), reward)
    rewards[1, 0] = 0.5
    advantages = group_advantages(rewards)
    assert (advantages[0] == 0).all()
    assert (advantages[1] != 0).all()


def clip(ratio, advantage, mask=True):
    """Loss, its gradient with respect to the log-probability, and what was counted, for a single token."""
    logprob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, clipped = clipped_policy_loss(
        logprob, torch.zeros(1, 1), torch.tensor([advantage]), torch.tensor([[mask]]), epsilon=0.05, epsilon_high=0.1
    )
    loss.backward()
    return loss.item(), logprob.grad.item(), int(clipped["low"]), int(clipped["high"])


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
    ],
)
def test_each_side_of_the_clipping_by_hand(ratio, advantage, expected):
    assert clip(ratio, advantage) == pytest.approx(expected, abs=1e-7)


def test_a_token_outside_the_mask_adds_nothing():
    assert clip(1.5, 2.0, mask=False) == (0.0, 0.0, 0, 0)


def test_the_loss_is_a_sum_over_tokens():
    logprobs = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss, _ = clipped_policy_loss(logprobs, torch.zeros(2, 3), torch.tensor([1.0, -4.0]), mask, 0.05, 0.1)
    assert loss.item() == -3 * 1.0 + 4.0
