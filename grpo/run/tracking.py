"""What a run shows: TensorBoard curves and completions, the progress bar, and the numbers behind them.

Every rank contributes the records of its groups; metrics are computed from all of them together, so that they are exact
for any number of ranks and prompts, never averages of averages.
"""

import dataclasses
import html
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data.dataset import InputError
from grpo.config import Config
from grpo.loss import has_zero_std
from grpo.ranks import all_gather_object, print_rank0, raise_together
from grpo.rollout import Rollout

ZERO_STD_STEPS = 20  # warn after this many steps in a row in which nearly all groups have equal rewards


@dataclass
class GroupRecord:
    """What the metrics need to know of one group, on the CPU."""

    rewards: Tensor  # (G,), nan where a completion was not scored
    rewards_by_function: dict[str, Tensor]  # (G,) each
    num_trained: Tensor  # (G,) trained tokens
    lengths: Tensor  # (G,) sampled tokens
    is_stopped: Tensor  # (G,)


@dataclass
class StepRecords:
    """The groups of all ranks in a step, without padding, and the reasons why samples were left out."""

    groups: list[GroupRecord]
    bad_videos: list[str]


def gather_records(rollouts: list[Rollout], by_function: dict[str, Tensor]) -> StepRecords:
    """Collect the records of all ranks; by_function: (B, G) each. Collective."""
    groups = [
        GroupRecord(
            rewards=rollout.rewards.cpu(),
            rewards_by_function={name: values[b] for name, values in by_function.items()},
            num_trained=rollout.loss_mask.sum(dim=1).cpu(),
            lengths=rollout.completion_mask.sum(dim=1).cpu(),
            is_stopped=rollout.is_stopped.cpu(),
        )
        for b, rollout in enumerate(rollouts)
        if not rollout.prompt.is_padding
    ]
    bad_videos = [rollout.prompt.bad_video for rollout in rollouts if rollout.prompt.bad_video]
    all_ranks = all_gather_object((groups, bad_videos))
    return StepRecords(
        [group for groups, _ in all_ranks for group in groups], [line for _, lines in all_ranks for line in lines]
    )


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
    """Summarise the groups of a step; empty without groups."""
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
    return {name: float(value) for name, value in metrics.items()}


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
        metrics["clip_ratio/region_mean"] = metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"]
        return metrics


def sampling_difference(rollouts: list[Rollout], num_tokens: int) -> dict[str, float]:
    """Compare the log-probabilities recorded while sampling with the trainer's, for the same weights; collective.

    Returns mean and maximum of the absolute difference over the trained tokens of all ranks.
    """
    differences = [(r.logprobs - r.old_logprobs).abs() * r.loss_mask for r in rollouts]  # (G, C) each
    total = torch.stack([difference.sum() for difference in differences]).sum()
    largest = torch.stack([difference.max() for difference in differences]).max()
    dist.all_reduce(total)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    name = "sampling/sampling_logp_difference"
    return {f"{name}/mean": total.item() / num_tokens, f"{name}/max": largest.item()}


class Clock:
    """Seconds by phase of a step; the step is their sum."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def lap(self, name: str) -> None:
        """Record the time since the last lap under `name`."""
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now


class Tracker:
    """The records of a run in `output_dir`, written by rank 0: `config.json`, TensorBoard's files, the progress bar."""

    def __init__(self, config: Config, total_steps: int, start_step: int = 0, counts: dict[str, int] | None = None):
        """Continue after `start_step` steps, with their counts; what a resumed run wrote later is removed."""
        self.config, self.is_main, self.writer = config, dist.get_rank() == 0, None
        self.is_full = False
        self.counts = {"skipped_samples": 0, "monotonous_in_a_row": 0, "warnings": 0, "bad_steps": 0, "bad_in_a_row": 0}
        self.counts |= counts or {}
        raise_together(self.begin, start_step)
        self.write(lambda writer: None, start_step + 1)
        bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        seconds = 0.1 if sys.stderr.isatty() else 10  # between drawings: a log file keeps each of them
        self.bar = tqdm(
            total=total_steps,
            initial=start_step,
            bar_format=bar_format,
            mininterval=seconds,
            disable=not self.is_main,
        )

    def begin(self, start_step: int) -> None:
        """On rank 0, write the flags and remove events after `start_step`; raise InputError if the disk is full."""
        if not self.is_main:
            return
        path = Path(self.config.output_dir, "config.json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name("config.json.unfinished")
            unfinished.write_text(json.dumps(dataclasses.asdict(self.config), indent=2))
            os.replace(unfinished, path)
            truncate_events(path.with_name("tensorboard"), start_step)
        except OSError as error:
            raise InputError(
                f"--output_dir {self.config.output_dir!r} cannot be written ({error.strerror}): make room, or name "
                "another folder"
            ) from error

    def log(self, step: int, records: StepRecords, metrics: dict[str, float], clock: Clock) -> bool:
        """Count the finished step; at a logging step add a point to every curve and return True.

        records: of all ranks. Raises InputError, on all ranks, after too many bad steps in a row.
        """
        seconds = sum(clock.seconds.values())
        metrics = rollout_metrics(records.groups) | metrics
        self.count(step, records, metrics)
        metrics |= {f"time/{name}": value for name, value in clock.seconds.items()} | {"time/step": seconds}
        metrics["tokens_per_second"] = sum(int(group.lengths.sum()) for group in records.groups) / seconds
        metrics["memory/peak_gb"] = peak_memory_gb()
        metrics["data/skipped_samples"] = self.counts["skipped_samples"]
        metrics["bad_steps"] = self.counts["bad_steps"]
        reward = metrics.get("reward", float("nan"))
        self.bar.set_postfix_str(f"reward {reward:.3f}, {seconds:.2f} s/step", refresh=False)
        self.bar.update()
        is_logged = step % self.config.logging_steps == 0
        if is_logged:
            self.write(lambda writer: [writer.add_scalar(name, value, step) for name, value in metrics.items()], step)
        if self.counts["bad_in_a_row"] >= self.config.max_bad_steps:
            raise InputError(
                f"step {step}: no finite loss and gradient for --max_bad_steps {self.config.max_bad_steps} steps in a "
                "row, so that nothing was learned: lower --learning_rate or --max_grad_norm, and go on from an earlier "
                "checkpoint with a new --output_dir"
            )
        return is_logged

    def count(self, step: int, records: StepRecords, metrics: dict[str, float]) -> None:
        """Count what went wrong in a step, and print warnings."""
        counts = self.counts
        counts["skipped_samples"] += len(records.bad_videos)
        print_rank0(*(f"left out: {line}" for line in records.bad_videos))
        is_zero_std = metrics.get("frac_reward_zero_std", 0) >= 0.9
        counts["monotonous_in_a_row"] = counts["monotonous_in_a_row"] + 1 if is_zero_std else 0
        if counts["monotonous_in_a_row"] == ZERO_STD_STEPS and not counts["warnings"]:
            counts["warnings"] = 1
            print_rank0(
                f"step {step}: for {ZERO_STD_STEPS} steps nearly all groups have had equal rewards, from which "
                "nothing is learned: look at the completions, and raise --temperature or change the reward"
            )
        is_bad = metrics["bad_steps"] > 0
        counts["bad_in_a_row"] = counts["bad_in_a_row"] + 1 if is_bad else 0
        counts["bad_steps"] += is_bad
        if is_bad:
            print_rank0(f"step {step}: the loss or its gradient is not finite: the weights stay as they are")

    def write(self, add: Callable[[SummaryWriter], object], step: int) -> None:
        """Let `add` write to TensorBoard's files, on rank 0; a full disk costs those points, not the run."""
        if not self.is_main:
            return
        folder = Path(self.config.output_dir, "tensorboard")
        try:
            try_to_write(folder)
            if self.writer is None:
                self.writer = SummaryWriter(str(folder), purge_step=step)
            add(self.writer)
            self.writer.flush()
            self.is_full = False
        except OSError as error:
            self.writer = None  # a writer that failed once stays broken; the next one gets a new file
            if not self.is_full:
                print_rank0(f"step {step}: the curves cannot be written ({error}): they have a gap from here")
            self.is_full = True

    def show_completions(self, step: int, rollouts: list[Rollout]) -> None:
        """Show the first completions of rank 0 as a table in TensorBoard."""
        if not self.is_main or not self.config.log_completions:
            return
        rows = [
            (rollout.prompt.sample, text, reward, advantage)
            for rollout in rollouts
            for text, reward, advantage in zip(
                rollout.texts, rollout.rewards.tolist(), rollout.advantages.tolist(), strict=True
            )
        ]
        lines = ["| prompt | truth | completion | reward | advantage |", "|---|---|---|---|---|"]
        for sample, text, reward, advantage in rows[: self.config.log_completions]:
            cells = " | ".join(table_cell(cell) for cell in (sample.turns[-1][1], sample.answer, text))
            lines.append(f"| {cells} | {reward:.3f} | {advantage:+.3f} |")
        self.write(lambda writer: writer.add_text("completions", "\n".join(lines), step), step)

    def close(self) -> None:
        """Close the bar and the files."""
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


def try_to_write(folder: Path) -> None:
    """Raise OSError if the disk is full; TensorBoard would notice in a thread of its own, and print a page."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / "probe").write_bytes(bytes(2**16))
    finally:
        (folder / "probe").unlink(missing_ok=True)


def truncate_events(folder: Path, step: int) -> None:
    """Remove events after `step` from TensorBoard's files."""
    for path in folder.glob("events.out.tfevents.*"):
        with open(folder / "truncated", "wb") as file:
            writer = RecordWriter(file)
            for record in RawEventFileLoader(str(path)).Load():
                if Event.FromString(record).step <= step:
                    writer.write(record)
        os.replace(folder / "truncated", path)


def table_cell(text: str) -> str:
    """Keep sampled text within its table cell: no markup, no line breaks, no control characters."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return html.escape(text).replace("|", "&#124;").replace("`", "&#96;")


def peak_memory_gb() -> float:
    """Return the peak memory of this process: of its GPU, or of the host where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
