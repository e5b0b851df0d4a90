"""GRPO's objective and its variants, as pure functions on tensors.

For one prompt with completions o_1 … o_G and rewards r_1 … r_G (GRPO: DeepSeekMath, arXiv:2402.03300, section 4.1):

    A_i     = (r_i - mean(r)) / (std(r) + 1e-4)                                              group_advantages
    ratio   = pi(o_it | prompt, o_i<t) / pi_old(o_it | prompt, o_i<t)                        importance_ratios
    loss_it = -min(ratio A_i, clip(ratio, 1 - epsilon, 1 + epsilon_high) A_i)                clipped_loss
              + beta (pi_ref / pi - log(pi_ref / pi) - 1)                                    kl_estimate
    loss    = sum_i weight_i sum_t loss_it                                                   completion_weights

The loss types differ only in `weight_i`. Denominators are counted over all ranks, before the first backward pass, so
that splitting a batch differently changes nothing; N is the number of trained completions:

    dapo     1 / (all trained tokens): every token counts alike               (DAPO, arXiv:2503.14476, equation 8)
    grpo     1 / (N · tokens of o_i): every completion counts alike           (DeepSeekMath, equation 3)
    dr_grpo  1 / (N · max_completion_length): no bias by length               (Dr. GRPO, arXiv:2503.20783, section 3.2)

Clipping is asymmetric as in DAPO; `importance_sampling_level="sequence"` takes one ratio per completion (GSPO,
arXiv:2507.18071, equation 7). Deviations from the papers: the standard deviation is the unbiased one, as in TRL; GSPO's
ratio is weighted per token under `dapo` and `dr_grpo`; a completion that is not trained (`loss_mask`) does not count.

| B | prompts | G | completions per prompt | C | completion tokens, padded |
"""

from typing import Literal

import torch
from torch import Tensor

LossType = Literal["dapo", "grpo", "dr_grpo"]
ScaleRewards = Literal["group", "batch", "none"]
ImportanceSamplingLevel = Literal["token", "sequence"]


def group_advantages(rewards: Tensor, scale_rewards: ScaleRewards, batch_std: Tensor | float = 1.0) -> Tensor:
    """Return each completion's reward relative to its group.

    rewards: (B, G), nan where a completion was not scored. scale_rewards: divide by the group's standard deviation, by
    that of the step (`batch_std`), or by nothing. Returns (B, G); 0 where not scored, and in a group of equal rewards.
    """
    is_scored = ~rewards.isnan()
    centered = rewards - rewards.nanmean(dim=1, keepdim=True)
    # The mean of equal rewards can differ from them by rounding, which the division would magnify.
    centered = torch.where(is_scored & ~has_zero_std(rewards)[:, None], centered, 0.0)
    if scale_rewards == "none":
        return centered
    if scale_rewards == "group":
        squares = centered.square().sum(dim=1, keepdim=True)
        std = (squares / (is_scored.sum(dim=1, keepdim=True) - 1).clamp(min=1)).sqrt()
    elif scale_rewards == "batch":
        std = batch_std
    else:
        raise ValueError(f"scale_rewards {scale_rewards!r} has no formula")
    return centered / (std + 1e-4)


def has_zero_std(rewards: Tensor) -> Tensor:
    """Tell which groups have equal rewards, and so no signal: rewards (B, G), nan where not scored -> (B,)."""
    lowest, highest = rewards.nan_to_num(torch.inf).amin(dim=1), rewards.nan_to_num(-torch.inf).amax(dim=1)
    return lowest >= highest  # also where nothing was scored


def loss_mask(
    completion_mask: Tensor, rewards: Tensor, is_stopped: Tensor, mask_truncated_completions: bool, beta: float
) -> Tensor:
    """Return which tokens of a group are trained: (G, C).

    completion_mask: (G, C); rewards, is_stopped: (G,). Excluded are completions that were not scored (nan); with
    mask_truncated_completions those that were cut (overlong filtering, DAPO, section 3.4); and groups of equal rewards,
    whose gradient is 0 unless they have a KL divergence to lower (beta above 0).
    """
    is_trained = ~rewards.isnan()
    if mask_truncated_completions:
        is_trained &= is_stopped
    if beta == 0:
        is_trained &= ~has_zero_std(rewards[None])
    return completion_mask & is_trained[:, None]


def importance_ratios(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: ImportanceSamplingLevel) -> Tensor:
    """Return the policy's probability over the old policy's, per token or completion; all (G, C), mask: trained."""
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    if level == "sequence":
        log_ratio = (log_ratio.sum(dim=1) / mask.sum(dim=1).clamp(min=1))[:, None].expand_as(log_ratio)
    elif level != "token":
        raise ValueError(f"importance_sampling_level {level!r} has no formula")
    return log_ratio.exp()


def clipped_loss(ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float) -> Tensor:
    """Return the loss of each token, (G, C); ratio: (G, C), advantages: (G,)."""
    advantages = advantages[:, None]
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages)


def clipped_tokens(ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float) -> tuple[Tensor, Tensor]:
    """Tell which tokens `clipped_loss` clips below and above, and so gives no gradient: two (G, C)."""
    advantages = advantages[:, None]
    return (ratio < 1 - epsilon) & (advantages < 0), (ratio > 1 + epsilon_high) & (advantages > 0)


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate KL(policy || reference) at each token: (G, C), never negative (k3 of joschu.net/blog/kl-approx.html)."""
    difference = reference_logprobs - logprobs
    return difference.exp() - difference - 1


def completion_weights(
    loss_type: LossType, lengths: Tensor, num_tokens: int, num_completions: int, max_completion_length: int
) -> Tensor:
    """Return the weight of each completion's tokens in the loss of the step: (G,).

    lengths: (G,) trained tokens of each completion. num_tokens, num_completions: those trained on all ranks.
    """
    if loss_type == "dapo":
        denominators = torch.full_like(lengths, num_tokens)
    elif loss_type == "grpo":
        denominators = num_completions * lengths.clamp(min=1)
    elif loss_type == "dr_grpo":
        denominators = torch.full_like(lengths, num_completions * max_completion_length)
    else:
        raise ValueError(f"loss_type {loss_type!r} has no formula")
    return 1 / denominators.float()


def weighted_sum(loss: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Sum the loss of the trained tokens, each with its completion's weight: (G, C), (G, C), (G,) -> scalar."""
    return (torch.where(mask, loss, 0.0) * weights[:, None]).sum()
