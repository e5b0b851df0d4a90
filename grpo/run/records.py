"""What a step's completions were: the records of all ranks, and the numbers and lines made of them.

Every rank contributes the records of its groups; metrics are computed from all of them together, so that they are exact
for any number of ranks and prompts, never averages of averages.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.sample import TAG_PATTERN
from grpo.loss import group_advantages, has_zero_std
from grpo.ranks import all_gather_object
from grpo.rollout import Rollout
from reward.extract import extract_number


@dataclass
class GroupRecord:
    """What the metrics and the logs need to know of one group, on the CPU."""

    position: int  # in the step's global batch
    sample_id: str
    question: str  # the last turn of the prompt, without its tags
    truth: str
    media: list[str]  # names of the videos and images that the prompt has
    texts: list[str]  # G completions
    numbers: list[float | None]  # that the completions answer with
    rewards: Tensor  # (G,), nan where a completion was not scored
    rewards_by_function: dict[str, Tensor]  # (G,) each
    num_trained: Tensor  # (G,) trained tokens
    lengths: Tensor  # (G,) sampled tokens
    is_stopped: Tensor  # (G,)
    advantages: Tensor | None = None  # (G,), filled in by `set_advantages`


@dataclass
class StepRecords:
    """The groups of all ranks in a step, by position and without padding, and why samples were left out."""

    groups: list[GroupRecord]
    bad_media: list[str]
    shortened: list[str]  # of which samples videos were left out, and how many

    def set_advantages(self, scale_rewards: str, reward_std: float) -> None:
        """Compute the advantages of all groups, as the training loop does those of its own."""
        for group in self.groups:
            group.advantages = group_advantages(group.rewards[None], scale_rewards, reward_std)[0]


def gather_records(rollouts: list[Rollout], by_function: dict[str, Tensor]) -> StepRecords:
    """Collect the records of all ranks; by_function: (B, G) each. Collective."""
    groups = [
        GroupRecord(
            position=rollout.prompt.position,
            sample_id=rollout.prompt.sample.id,
            question=TAG_PATTERN.sub("", rollout.prompt.sample.turns[-1][1]).strip(),
            truth=rollout.prompt.sample.answer,
            media=[media.name for media in rollout.prompt.sample.media],
            texts=rollout.texts,
            numbers=[extract_number(text) for text in rollout.texts],
            rewards=rollout.rewards.cpu(),
            rewards_by_function={name: values[b] for name, values in by_function.items()},
            num_trained=rollout.loss_mask.sum(dim=1).cpu(),
            lengths=rollout.completion_mask.sum(dim=1).cpu(),
            is_stopped=rollout.is_stopped.cpu(),
        )
        for b, rollout in enumerate(rollouts)
        if not rollout.prompt.is_padding
    ]
    bad_media = [rollout.prompt.bad_media for rollout in rollouts if rollout.prompt.bad_media]
    shortened = [rollout.prompt.shortened for rollout in rollouts if rollout.prompt.shortened]
    of_ranks = zip(*all_gather_object((groups, bad_media, shortened)), strict=True)
    groups, bad_media, shortened = ([one for own in ranks for one in own] for ranks in of_ranks)
    return StepRecords(sorted(groups, key=lambda group: group.position), bad_media, shortened)


@dataclass
class GlobalCounts:
    """Counts over all ranks: the denominators of a step."""

    num_tokens: int  # trained tokens, the denominator of `dapo`
    num_completions: int  # trained completions, the denominator of the other loss types
    reward_std: float  # of all rewards, for `--scale_rewards batch`

    @classmethod
    def of(cls, records: StepRecords) -> "GlobalCounts":
        """Count over the groups of all ranks; denominators are at least 1."""
        groups = records.groups
        return cls(
            num_tokens=max(1, sum(int(group.num_trained.sum()) for group in groups)),
            num_completions=max(1, sum(int((group.num_trained > 0).sum()) for group in groups)),
            reward_std=nanstd(torch.cat([group.rewards for group in groups])).item() if groups else 0.0,
        )


def nanstd(rewards: Tensor) -> Tensor:
    """Return the standard deviation of the rewards that are not nan; 0 for fewer than two."""
    rewards = rewards[~rewards.isnan()]
    return rewards.std() if len(rewards) > 1 else torch.zeros(())


def rollout_metrics(groups: list[GroupRecord]) -> dict[str, float]:
    """Summarise the groups of a step; empty without groups, and without what no completion was scored for."""
    if not groups:
        return {}
    rewards = torch.stack([group.rewards for group in groups])  # (groups, G)
    lengths = torch.cat([group.lengths for group in groups]).float()
    metrics = {
        "reward": rewards.nanmean(),
        "reward_std": torch.stack([nanstd(row) for row in rewards]).mean(),
        "frac_reward_zero_std": has_zero_std(rewards).float().mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - torch.cat([group.is_stopped for group in groups]).float().mean(),
        "completions/unscored": rewards.isnan().sum(),
    }
    for name in groups[0].rewards_by_function:
        values = torch.cat([group.rewards_by_function[name] for group in groups])
        metrics |= {f"rewards/{name}/mean": values.nanmean(), f"rewards/{name}/std": nanstd(values)}
    return {name: float(value) for name, value in metrics.items() if not torch.isnan(value)}


def completion_lines(step: int, groups: list[GroupRecord]) -> list[dict]:
    """Describe every completion of a step, for rollouts.jsonl."""
    lines = []
    for group in groups:
        by_function = {name: values.tolist() for name, values in group.rewards_by_function.items()}
        for i, (text, number) in enumerate(zip(group.texts, group.numbers, strict=True)):
            lines.append(
                {
                    "step": step,
                    "sample_id": group.sample_id,
                    "truth": group.truth,
                    "media": group.media,
                    "text": text,
                    "number": number,
                    "reward": finite_or_none(group.rewards[i].item()),
                    "rewards": {name: finite_or_none(values[i]) for name, values in by_function.items()},
                    "advantage": finite_or_none(group.advantages[i].item()),
                    "length": int(group.lengths[i]),
                    "is_stopped": bool(group.is_stopped[i]),
                }
            )
    return lines


def finite_or_none(value: float) -> float | None:
    """Return None in place of nan and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def distributions(groups: list[GroupRecord]) -> dict[str, np.ndarray]:
    """Collect what is shown as histograms; errors are those of the completions with a number, in its unit."""
    if not groups:
        return {}
    truths = [extract_number(group.truth) for group in groups]
    pairs = [(truth, number) for group, truth in zip(groups, truths, strict=True) for number in group.numbers]
    values = {
        "histograms/reward": torch.cat([group.rewards for group in groups]).numpy(),
        "histograms/advantage": torch.cat([group.advantages for group in groups]).numpy(),
        "histograms/completion_length": torch.cat([group.lengths for group in groups]).numpy(),
        "histograms/error": np.array([n - truth for truth, n in pairs if truth is not None and n is not None]),
    }
    # TensorBoard's bins end at 1e20, and it fails where no value is within.
    finite = {name: np.clip(found[np.isfinite(found)], -1e6, 1e6) for name, found in values.items()}
    return {name: found for name, found in finite.items() if len(found)}


class TokenSums:
    """The loss of this rank, and per-token metrics summed over its trained tokens, during the updates of a step."""

    def __init__(self, device: torch.device):
        self.loss, self.sums = torch.zeros((), device=device), {}

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add the values of the trained tokens to a sum; values, mask: (G, C)."""
        self.sums[name] = self.sums.get(name, 0.0) + (values.detach() * mask).sum()

    def means(self, num_tokens: int, num_iterations: int) -> dict[str, float]:
        """Return the loss per update, and the means over the trained tokens of all ranks; collective."""
        totals = torch.stack([self.loss, *self.sums.values()])
        dist.all_reduce(totals)
        loss, *sums = (totals / num_iterations).tolist()
        metrics = {"loss": loss} | {name: value / num_tokens for name, value in zip(self.sums, sums, strict=True)}
        if "clip_ratio/low_mean" in metrics:
            metrics["clip_ratio/region_mean"] = metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"]
        return metrics


def sampling_difference(rollouts: list[Rollout], num_tokens: int) -> dict[str, float]:
    """Compare the log-probabilities recorded while sampling with the trainer's, for the same weights; collective.

    Returns mean and maximum of the absolute difference over the trained tokens of all ranks; nothing if there are none.
    """
    if not rollouts:
        return {}
    differences = [(r.logprobs - r.old_logprobs).abs() * r.loss_mask for r in rollouts]  # (G, C) each
    total = torch.stack([difference.sum() for difference in differences]).sum()
    largest = torch.stack([difference.max() for difference in differences]).max()
    dist.all_reduce(total)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    name = "sampling/sampling_logp_difference"
    return {f"{name}/mean": total.item() / num_tokens, f"{name}/max": largest.item()}
