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

from data.sample import Sample
from grpo.loss import has_zero_std
from grpo.ranks import all_gather_object
from grpo.rollout import Rollout, ScoredRollout
from reward.extract import extract_number


@dataclass
class GroupRecord:
    """What the metrics and the logs need to know of one group, on the CPU."""

    position: int  # in the step's global batch
    sample: Sample  # with the videos and images that the prompt has
    texts: list[str]  # G completions
    numbers: list[float | None]  # that the completions answer with
    rewards: Tensor  # (G,), nan where a completion was not scored
    rewards_by_function: dict[str, Tensor]  # (G,) each
    lengths: Tensor  # (G,) sampled tokens
    is_stopped: Tensor  # (G,)
    advantages: Tensor  # (G,)


@dataclass
class StepRecords:
    """What all ranks know of a step, padding left out."""

    groups: list[GroupRecord]  # by position; none in supervised training
    bad_media: list[str]  # why samples were left out
    shortened: list[str]  # of which samples videos were left out, and how many
    num_tokens: int  # of all completions


def group_records(
    scored: list[ScoredRollout], texts: list[list[str]], rewards: Tensor, by_function: dict[str, Tensor]
) -> list[GroupRecord]:
    """Describe the groups of this rank; texts: G completions per rollout; rewards, by_function: (B, G) each."""
    return [
        GroupRecord(
            position=prompt.position,
            sample=prompt.sample,
            texts=texts[b],
            numbers=[extract_number(text) for text in texts[b]],
            rewards=rewards[b],
            rewards_by_function={name: values[b] for name, values in by_function.items()},
            lengths=one.rollout.completion_mask.sum(dim=1).cpu(),
            is_stopped=one.rollout.is_stopped.cpu(),
            advantages=one.advantages.cpu(),
        )
        for b, one in enumerate(scored)
        if not (prompt := one.rollout.prompt).is_padding
    ]


def gather_records(rollouts: list[Rollout], groups: list[GroupRecord]) -> StepRecords:
    """Collect the records of all ranks, of which these are this rank's. Collective."""
    prompts = [rollout.prompt for rollout in rollouts]
    bad_media = [prompt.bad_media for prompt in prompts if prompt.bad_media]
    shortened = [prompt.shortened for prompt in prompts if prompt.shortened]
    lengths = [int(rollout.completion_mask.sum()) for rollout in rollouts if not rollout.prompt.is_padding]
    of_ranks = zip(*all_gather_object((groups, bad_media, shortened, lengths)), strict=True)
    groups, bad_media, shortened, lengths = (sum(lists, []) for lists in of_ranks)
    return StepRecords(sorted(groups, key=lambda group: group.position), bad_media, shortened, sum(lengths))


def global_counts(scored: list[ScoredRollout]) -> tuple[int, int]:
    """Count the trained tokens and completions of all ranks: the denominators of a step, at least 1. Collective.

    scored: this rank's. Tokens are the denominator of `dapo`, completions that of the other loss types.
    """
    own = torch.cat([one.loss_mask.sum(dim=1) for one in scored]).cpu()  # trained tokens of each completion
    lengths = torch.cat(all_gather_object(own))
    return max(1, int(lengths.sum())), max(1, int((lengths > 0).sum()))


def std_of_step(rewards: Tensor) -> float:
    """Return the standard deviation of the rewards of all ranks, of which these are this rank's (B, G); collective."""
    everyone = torch.cat([own.flatten() for own in all_gather_object(rewards)])
    return nanstd(everyone.double()).item()  # in float64, so that the order of the ranks does not matter


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
    return [
        {
            "step": step,
            "sample_id": group.sample.id,
            "truth": group.sample.answer,
            "media": [media.name for media in group.sample.media],
            "text": group.texts[i],
            "number": group.numbers[i],
            "reward": finite_or_none(group.rewards[i]),
            "rewards": {name: finite_or_none(values[i]) for name, values in group.rewards_by_function.items()},
            "advantage": finite_or_none(group.advantages[i]),
            "length": int(group.lengths[i]),
            "is_stopped": bool(group.is_stopped[i]),
        }
        for group in groups
        for i in range(len(group.texts))
    ]


def finite_or_none(value: float | Tensor) -> float | None:
    """Return a number, or None in place of nan and infinity, which JSON does not have."""
    return float(value) if math.isfinite(value) else None


def distributions(groups: list[GroupRecord]) -> dict[str, np.ndarray]:
    """Collect what is shown as histograms; errors are those of the completions with a number, in its unit."""
    if not groups:
        return {}
    pairs = [(extract_number(group.sample.answer), number) for group in groups for number in group.numbers]
    values = {
        "histograms/reward": torch.cat([group.rewards for group in groups]).numpy(),
        "histograms/advantage": torch.cat([group.advantages for group in groups]).numpy(),
        "histograms/completion_length": torch.cat([group.lengths for group in groups]).numpy(),
        "histograms/error": np.array([n - truth for truth, n in pairs if truth is not None and n is not None]),
    }
    # TensorBoard's bins end at 1e20, and it fails where no value is within.
    finite = {name: np.clip(found[np.isfinite(found)], -1e6, 1e6) for name, found in values.items()}
    return {name: found for name, found in finite.items() if len(found)}


DIFFERENCE = "sampling/sampling_logp_difference"


class TokenSums:
    """The loss of this rank, and per-token metrics summed over its trained tokens, during the updates of a step."""

    def __init__(self, device: torch.device):
        self.loss, self.largest, self.sums = torch.zeros((), device=device), torch.zeros((), device=device), {}

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add the values of the trained tokens to a sum; values, mask: (G, C)."""
        self.sums[name] = self.sums.get(name, 0.0) + (values.detach() * mask).sum()

    def add_difference(self, sampled: Tensor, trained: Tensor, mask: Tensor) -> None:
        """Compare log-probabilities recorded while sampling with the trainer's, for the same weights: (G, C) each."""
        difference = (sampled - trained.detach()).abs()
        self.add(f"{DIFFERENCE}/mean", difference, mask)
        self.largest = torch.maximum(self.largest, (difference * mask).max())

    def means(self, num_tokens: int, num_iterations: int) -> dict[str, float]:
        """Return the loss per update, and the means over the trained tokens of all ranks; collective."""
        totals = torch.stack([self.loss, *self.sums.values()])
        dist.all_reduce(totals)
        dist.all_reduce(self.largest, op=dist.ReduceOp.MAX)
        loss, *sums = (totals / num_iterations).tolist()
        metrics = {"loss": loss} | {name: value / num_tokens for name, value in zip(self.sums, sums, strict=True)}
        if f"{DIFFERENCE}/mean" in metrics:
            metrics[f"{DIFFERENCE}/max"] = self.largest.item()
        if "clip_ratio/low_mean" in metrics:
            metrics["clip_ratio/region_mean"] = metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"]
        return metrics
