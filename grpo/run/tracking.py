"""What a run shows: TensorBoard curves and completions, the progress bar, and the numbers behind them.

Every rank hands in its own records; the metrics are computed from all of them together, so that they are exact whatever
the ranks and prompts are, never averages of averages.
"""

import dataclasses
import html
import json
import os
import resource
import time
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
from grpo.loss import is_uniform
from grpo.ranks import of_all_ranks, raise_together, say
from grpo.rollout import Rollout

LOGP_DIFFERENCE = "sampling/sampling_logp_difference/mean"
MONOTONOUS_STEPS = 20  # so many steps in a row with hardly anything to compare call for a word


def gather_groups(rollouts: list[Rollout], by_function: dict[str, Tensor], rewards: Tensor) -> list[dict]:
    """Collect one record per group from all ranks; rewards, also by function: (B, G), nan where not scored."""
    own = [
        {
            "counts": rollout.prompt.counts,
            "bad_video": rollout.prompt.bad_video,
            "rewards": rewards[b],  # (G,)
            "by_function": {name: values[b] for name, values in by_function.items()},
            "num_trained": rollout.train_mask.sum(dim=1).cpu(),  # (G,) tokens
            "lengths": rollout.completion_mask.sum(dim=1).cpu(),  # (G,)
            "is_stopped": rollout.is_stopped.cpu(),  # (G,)
        }
        for b, rollout in enumerate(rollouts)
    ]
    return [group for groups in of_all_ranks(own) for group in groups]


@dataclass
class Totals:
    """What all ranks have in common in a step; every number is over the groups that count."""

    num_tokens: int  # trained tokens, the denominator of `dapo`
    num_completions: int  # trained completions, that of the other loss types
    reward_std: float  # of all rewards, for `--scale_rewards batch`


def add_up(groups: list[dict]) -> Totals:
    """Count over the records of all ranks; never 0, so that nothing is divided by it."""
    groups = [group for group in groups if group["counts"]]
    return Totals(
        num_tokens=max(1, sum(int(group["num_trained"].sum()) for group in groups)),
        num_completions=max(1, sum(int((group["num_trained"] > 0).sum()) for group in groups)),
        reward_std=deviation(torch.cat([group["rewards"] for group in groups])).item() if groups else 0.0,
    )


def deviation(rewards: Tensor) -> Tensor:
    """Return the standard deviation of the rewards that there are (not nan); 0 for fewer than two."""
    rewards = rewards[~rewards.isnan()]
    return rewards.std() if len(rewards) > 1 else torch.zeros(())


def rollout_metrics(groups: list[dict]) -> dict[str, float]:
    """Summarise the groups that count; empty if none does."""
    groups = [group for group in groups if group["counts"]]
    if not groups:
        return {}
    rewards = torch.stack([group["rewards"] for group in groups])  # (groups, G)
    lengths = torch.cat([group["lengths"] for group in groups]).float()
    metrics = {
        "reward": rewards.nanmean(),
        "reward_std": torch.stack([deviation(row) for row in rewards]).mean(),
        "frac_reward_zero_std": is_uniform(rewards).float().mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - torch.cat([group["is_stopped"] for group in groups]).float().mean(),
        "completions/unscored": rewards.isnan().sum(),
    }
    for name in groups[0]["by_function"]:
        values = torch.cat([group["by_function"][name] for group in groups])
        metrics |= {f"rewards/{name}/mean": values.nanmean(), f"rewards/{name}/std": deviation(values)}
    return {name: float(value) for name, value in metrics.items()}


# What the passes sum up, in this order; the curves are called so.
SUMS = ("loss", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "kl", LOGP_DIFFERENCE)


def update_metrics(sums: Tensor, difference_max: Tensor, num_tokens: int, num_iterations: int) -> dict[str, float]:
    """Turn what the passes of every rank summed up into means over all trained tokens of all ranks.

    sums: (6,), by the names in SUMS. The loss is weighed already; |sampled - trained log-probability| comes from the
    first of the `num_iterations` updates alone, in which both are of the same weights.
    """
    dist.all_reduce(sums)
    dist.all_reduce(difference_max, op=dist.ReduceOp.MAX)
    metrics = dict(zip(SUMS, sums.tolist(), strict=True))
    for name in metrics:
        metrics[name] /= (1 if name == "loss" else num_tokens) * (1 if name == LOGP_DIFFERENCE else num_iterations)
    metrics["clip_ratio/region_mean"] = metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"]
    return metrics | {"sampling/sampling_logp_difference/max": difference_max.item()}


class Clock:
    """Seconds since the last lap, by name; a step is the sum of its laps."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now


class Tracker:
    """The records of a run in `output_dir`, written by rank 0: `config.json`, TensorBoard's files, the progress bar."""

    def __init__(self, config: Config, total_steps: int, first_step: int = 0, counts: dict[str, int] | None = None):
        """Go on after `first_step` steps with what was counted in them; of a run that is resumed, forget the rest."""
        self.config, self.is_main, self.writer = config, dist.get_rank() == 0, None
        self.is_full = False
        self.counts = {"skipped_samples": 0, "monotonous_in_a_row": 0, "warnings": 0, "bad_steps": 0, "bad_in_a_row": 0}
        self.counts |= counts or {}
        raise_together(self.begin, first_step)
        self.write(lambda writer: None, first_step + 1)
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=not self.is_main)

    def begin(self, first_step: int) -> None:
        """Let rank 0 write the flags and forget what comes after `first_step`; raise InputError if the disk is full."""
        if not self.is_main:
            return
        path = Path(self.config.output_dir, "config.json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name("config.json.unfinished")
            unfinished.write_text(json.dumps(dataclasses.asdict(self.config), indent=2))
            os.replace(unfinished, path)
            forget(path.with_name("tensorboard"), first_step)
        except OSError as error:
            raise InputError(
                f"--output_dir {self.config.output_dir!r} cannot be written ({error.strerror}): make room, or name "
                "another folder"
            ) from error

    def log(self, step: int, groups: list[dict], metrics: dict[str, float], clock: Clock) -> bool:
        """Count the finished step; at a logging step add a point to every curve and return True.

        groups: the records of all ranks. Raises InputError, on all ranks, after too many bad steps in a row.
        """
        seconds = sum(clock.seconds.values())
        metrics = rollout_metrics(groups) | metrics
        self.count(step, groups, metrics)
        metrics |= {f"time/{name}": value for name, value in clock.seconds.items()} | {"time/step": seconds}
        metrics["tokens_per_second"] = sum(int(g["lengths"].sum()) for g in groups if g["counts"]) / seconds
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

    def count(self, step: int, groups: list[dict], metrics: dict[str, float]) -> None:
        """Count what went wrong in a step, and say what calls for a word."""
        counts = self.counts
        for group in groups:
            if group["bad_video"]:
                counts["skipped_samples"] += 1
                say(f"left out: {group['bad_video']}")
        is_monotonous = metrics.get("frac_reward_zero_std", 0) >= 0.9
        counts["monotonous_in_a_row"] = counts["monotonous_in_a_row"] + 1 if is_monotonous else 0
        if counts["monotonous_in_a_row"] == MONOTONOUS_STEPS and not counts["warnings"]:
            counts["warnings"] = 1
            say(
                f"step {step}: for {MONOTONOUS_STEPS} steps nearly all groups have had equal rewards, from which "
                "nothing is learned: look at the completions, and raise --temperature or mend the reward"
            )
        is_bad = metrics["bad_steps"] > 0
        counts["bad_in_a_row"] = counts["bad_in_a_row"] + 1 if is_bad else 0
        counts["bad_steps"] += is_bad
        if is_bad:
            say(f"step {step}: the loss or its gradient is not finite: the weights stay as they are")

    def write(self, add, step: int) -> None:
        """Let rank 0 add to TensorBoard's files; a full disk costs what was to be added, not the run."""
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
            self.writer = None  # what has failed once fails for good: another file, once there is space
            if not self.is_full:
                say(f"step {step}: the curves cannot be written ({error}): they have a gap from here")
            self.is_full = True

    def show_completions(self, step: int, rollouts: list[Rollout], texts: list[str], rewards, advantages) -> None:
        """Show the first completions of rank 0 as a table; texts: B·G, rewards and advantages: (B, G)."""
        if not self.is_main or not self.config.log_completions:
            return
        lines = ["| prompt | truth | completion | reward | advantage |", "|---|---|---|---|---|"]
        values = zip(texts, rewards.flatten().tolist(), advantages.flatten().tolist(), strict=True)
        for i, (text, reward, advantage) in zip(range(self.config.log_completions), values, strict=False):
            sample = rollouts[i // rewards.shape[1]].prompt.sample
            cells = " | ".join(table_cell(cell) for cell in (sample.turns[-1][1], sample.answer, text))
            lines.append(f"| {cells} | {reward:.3f} | {advantage:+.3f} |")
        self.write(lambda writer: writer.add_text("completions", "\n".join(lines), step), step)

    def close(self) -> None:
        """End the bar and the files."""
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


def try_to_write(folder: Path) -> None:
    """Raise OSError if the disk is full; TensorBoard would find out in a thread of its own, which prints a page."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / "probe").write_bytes(bytes(2**16))
    finally:
        (folder / "probe").unlink(missing_ok=True)


def forget(folder: Path, step: int) -> None:
    """Drop from TensorBoard's files what a run that was killed has written after `step`: it is done again."""
    for path in folder.glob("events.out.tfevents.*"):
        with open(folder / "kept", "wb") as file:
            writer = RecordWriter(file)
            for record in RawEventFileLoader(str(path)).Load():
                if Event.FromString(record).step <= step:
                    writer.write(record)
        os.replace(folder / "kept", path)


def table_cell(text: str) -> str:
    """Keep sampled text within its table cell: no markup, no line breaks, no control characters."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return html.escape(text).replace("|", "&#124;").replace("`", "&#96;")


def peak_memory_gb() -> float:
    """Most memory this process has held: of its GPU, or of the host where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
