"""GRPO's objective as pure functions on tensors.

For one prompt with completions o_1 … o_G and rewards r_1 … r_G (DeepSeekMath, arXiv:2402.03300, equations 3 and 19-21):

    A_i     = (r_i - mean(r)) / (std(r) + 1e-4)                                                group_advantages
    ratio   = pi(o_it | prompt, o_i<t) / pi_old(o_it | prompt, o_i<t)
    loss_it = -min(ratio A_i, clip(ratio, 1 - epsilon, 1 + epsilon_high) A_i)                  clipped_policy_loss

with the asymmetric clipping and the token-level sum of DAPO (arXiv:2503.14476, equations 8 and 12): the loss of a step
is the sum over all tokens of all completions of all ranks, divided by their number. Functions return *sums*, and the
caller divides by the one global count, so that splitting a batch differently changes nothing.

Deviations from the paper: no KL term; the standard deviation is the unbiased one, as in TRL.

| B | prompts | G | completions per prompt | C | completion tokens, padded |
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor) -> Tensor:
    """Compare each completion with its group.

    rewards: (B, G). Returns (B, G); exactly 0 throughout a group whose rewards are all equal.
    """
    deviation = rewards - rewards.mean(dim=1, keepdim=True)
    # Rounding can leave the mean of equal rewards a little off them, which the division would blow up.
    deviation = torch.where((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0.0, deviation)
    return deviation / (rewards.std(dim=1, keepdim=True) + 1e-4)


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, epsilon: float, epsilon_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum the clipped loss over the tokens of one group.

    logprobs, old_logprobs: (G, C), of each completion's own tokens; advantages: (G,); mask: (G, C), True where a token
    is trained. Returns the sum (scalar) and how many tokens were clipped below (`low`) and above (`high`).
    """
    advantages = advantages[:, None]  # (G, 1)
    ratio = torch.exp(logprobs - old_logprobs)  # (G, C)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    with torch.no_grad():
        low = (ratio < 1 - epsilon) & (advantages < 0) & mask
        high = (ratio > 1 + epsilon_high) & (advantages > 0) & mask
    return torch.where(mask, loss, 0.0).sum(), {"low": low.sum(), "high": high.sum()}
