"""What a run shows: TensorBoard's files, completions, the progress bar, and which evaluation was the best."""

import dataclasses
import json
import math
import operator
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data.loader import Prompt
from data.sample import InputError
from grpo.config import BestModelMetric, Config
from grpo.ranks import print_rank0, raise_together
from grpo.run import rollout_log
from grpo.run.checkpoint import explained
from grpo.run.records import GroupRecord, StepRecords, completion_lines, distributions, rollout_metrics
from grpo.run.resume import ResumeState
from grpo.run.show import add_jpeg, completions_table, contact_sheet

ZERO_STD_STEPS = 20  # warn after this many steps in a row in which nearly all groups have equal rewards

# Figures of an evaluation that are no curves: constants, and what its pictures show.
NOT_DRAWN = ("eval/n", "eval/limit_", "eval/accuracy_", "eval/zero_skill_answer")
MAIN_FIGURES = ("reward", "mae", "r2", "ccc", "bias", "parse_rate")  # those of an evaluation that are printed

# Of TensorBoard's tab "Custom Scalars": what to look at first, several curves in a chart.
LAYOUT = {
    "overview": {
        "loss": ["loss"],
        "token accuracy": ["token_accuracy"],
        "reward": ["reward", "zero_skill_reward", "eval/reward", "eval/zero_skill_reward"],
        "error on held-out samples": ["eval/mae", "eval/zero_skill_mae"],
        "completion length": ["completions/mean_length", "completions/max_length"],
        "entropy": ["entropy"],
    },
    "is it collapsing?": {
        "spread of answers / spread of truths": ["eval/sd_ratio"],
        "agreement on held-out samples": ["eval/ccc", "eval/r2"],
        "groups with equal rewards": ["frac_reward_zero_std"],
        "cut at the length limit": ["completions/clipped_ratio", "eval/clipped_ratio"],
    },
}

# Charts of the layout that only sampling has, and only supervised training.
OF_SAMPLING = ("completion length", "groups with equal rewards")
OF_SUPERVISED = ("loss", "token accuracy")

# By which the best model is chosen: how good a figure is, the higher the better.
GOODNESS: dict[BestModelMetric, Callable[[float], float]] = {
    "eval/mae": operator.neg,
    "eval/median_error": operator.neg,
    "eval/rmse": operator.neg,
    "eval/bias": lambda bias: -abs(bias),
    "eval/r2": operator.pos,
    "eval/pearson": operator.pos,
    "eval/ccc": operator.pos,
    "eval/within_5": operator.pos,
    "eval/reward": operator.pos,
    "eval/parse_rate": operator.pos,
}


class Clock:
    """Seconds by phase of a step; the step is their sum."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def lap(self, name: str) -> None:
        """Record the time since the last lap under `name`."""
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now


def charts(is_supervised: bool) -> dict:
    """Return the charts of a run as TensorBoard wants them; it takes tags for regular expressions."""
    left_out, shown = OF_SAMPLING if is_supervised else OF_SUPERVISED, {}
    for group, titles in LAYOUT.items():
        kept = {title: [f"^{tag}$" for tag in tags] for title, tags in titles.items() if title not in left_out}
        shown[group] = {title: ["Multiline", patterns] for title, patterns in kept.items()}
    return shown


class Tracker:
    """The records of a run in `output_dir`, written by rank 0: flags, TensorBoard's files, completions, the bar."""

    def __init__(self, config: Config, total_steps: int, resume: ResumeState, zero_skill_reward: float | None):
        """Continue where `resume` says; what a resumed run wrote later is removed. Raises InputError.

        zero_skill_reward: the best mean reward of a constant answer to the training samples, drawn beside the reward.
        """
        self.config, self.output, self.is_main = config, Path(config.output_dir), dist.get_rank() == 0
        self.constants = {} if zero_skill_reward is None else {"zero_skill_reward": zero_skill_reward}
        self.start_step, self.counts = resume.step, Counter(resume.counts)
        self.evaluations, self.best_step = list(resume.evaluations), resume.best_step
        self.writer, self.is_full = None, False
        # A contact sheet takes some hundredths of a second and some 200 KB: about 25 per run.
        self.sheet_steps = config.logging_steps * math.ceil(total_steps / (25 * config.logging_steps))
        raise_together(self.begin if self.is_main else lambda: None)
        # TensorBoard hides what earlier files hold from this step on; at step 0 also what was evaluated there.
        first = resume.step + 1 if resume.step else 0
        self.write(lambda writer: writer.add_custom_scalars(charts(config.supervised)), first)
        self.bar = tqdm(
            total=total_steps,
            initial=resume.step,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds: a log file keeps each drawing
            disable=not self.is_main,
        )

    def begin(self) -> None:
        """On rank 0, write the flags and remove later completions; raise InputError if that fails."""
        mend = ": make room, move a damaged rollouts.jsonl away, or name another --output_dir"
        with explained(self.output, "continued", mend):
            unfinished = self.output / "config.json.unfinished"
            unfinished.write_text(json.dumps(dataclasses.asdict(self.config), indent=2))
            os.replace(unfinished, self.output / "config.json")
            rollout_log.truncate(self.output, self.start_step)

    def log(self, step: int, records: StepRecords, metrics: dict[str, float], clock: Clock, prompt: Prompt) -> None:
        """Count the finished step and keep its completions; at a logging step add to everything in TensorBoard.

        records: of all ranks; prompt: this rank's first. Raises InputError after too many bad steps, on all ranks.
        """
        seconds = sum(clock.seconds.values())
        metrics = rollout_metrics(records.groups) | metrics | self.constants
        self.count(step, records, metrics)
        metrics |= {f"time/{name}": value for name, value in clock.seconds.items()} | {"time/step": seconds}
        metrics["run/tokens_per_second"] = records.num_tokens / seconds
        metrics["run/peak_memory_gb"] = peak_memory_gb()
        metrics |= {f"run/{name}": self.counts[name] for name in ("skipped_samples", "shortened_prompts", "bad_steps")}
        main = "loss" if self.config.supervised else "reward"
        self.bar.set_postfix_str(f"{main} {metrics.get(main, math.nan):.3f}, {seconds:.2f} s/step", refresh=False)
        self.bar.update()
        self.write(lambda writer: self.add(writer, step, records.groups, metrics, prompt), step)
        if self.counts["bad_in_a_row"] >= self.config.max_bad_steps:
            raise InputError(
                f"step {step}: no finite loss and gradient for --max_bad_steps {self.config.max_bad_steps} steps in a "
                "row, so that nothing was learned: lower --learning_rate or --max_grad_norm, and go on from an earlier "
                "checkpoint with a new --output_dir"
            )

    def count(self, step: int, records: StepRecords, metrics: dict[str, float]) -> None:
        """Count what went wrong in a step, and print warnings."""
        counts = self.counts
        counts["skipped_samples"] += len(records.bad_media)
        counts["shortened_prompts"] += len(records.shortened)
        print_rank0(*(f"left out: {line}" for line in records.bad_media), *records.shortened)
        is_bad, is_zero_std = metrics["run/bad_steps"] > 0, metrics.get("frac_reward_zero_std", 0) >= 0.9
        counts["bad_steps"] += is_bad
        counts["bad_in_a_row"] = counts["bad_in_a_row"] + 1 if is_bad else 0
        counts["monotonous_in_a_row"] = counts["monotonous_in_a_row"] + 1 if is_zero_std else 0
        if is_bad:
            print_rank0(f"step {step}: the loss or its gradient is not finite: the weights stay as they are")
        if counts["monotonous_in_a_row"] == ZERO_STD_STEPS:
            print_rank0(
                f"step {step}: for {ZERO_STD_STEPS} steps nearly all groups have had equal rewards, from which "
                "nothing is learned: look at the completions, and raise --temperature or change the reward"
            )

    def add(self, writer: SummaryWriter, step: int, groups: list[GroupRecord], metrics: dict, prompt: Prompt) -> None:
        """Write a step's completions; at a logging step curves, distributions, some completions and frames, too."""
        if groups:
            rollout_log.append(self.output, completion_lines(step, groups))
        if step % self.config.logging_steps:
            return
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        for name, values in distributions(groups).items():
            writer.add_histogram(name, values, step)
        if not self.config.log_completions:
            return
        if groups:
            writer.add_text("completions", completions_table(groups, self.config.log_completions), step)
        own = next((group for group in groups if group.position == prompt.position), None)
        if not prompt.is_padding and (step % self.sheet_steps == 0 or step == self.config.logging_steps):
            add_jpeg(writer, "contact_sheet", contact_sheet(prompt, own, step), step)

    def is_evaluation_due(self, step: int) -> bool:
        """Say whether the policy is to be evaluated after this step and has not been yet."""
        every, is_last = self.config.eval_steps, step == self.bar.total
        is_due = self.config.eval_on_start if step == 0 else is_last or (every > 0 and step % every == 0)
        return is_due and step not in [evaluation["step"] for evaluation in self.evaluations]

    def show_evaluation(self, step: int, found: dict, draw: Callable[[], dict[str, Figure]], seconds: float) -> bool:
        """Record an evaluation; return True if its model is the best so far.

        found: of `grpo.evaluate.metrics.figures`; draw: makes its pictures, on rank 0.
        """
        figures = {f"eval/{name}": one["value"] for name, one in found.items() if one["value"] is not None}
        metric = self.config.metric_for_best_model
        goodness = GOODNESS[metric]
        best = [one[metric] for one in self.evaluations if one["step"] == self.best_step]
        self.evaluations.append({"step": step} | figures)

        def add(writer: SummaryWriter) -> None:
            for name, value in (figures | {"time/eval": seconds}).items():
                if not name.startswith(NOT_DRAWN):
                    writer.add_scalar(name, value, step)
            for name, figure in draw().items():
                writer.add_figure(f"eval/{name}", figure, step)

        self.write(add, step)
        main = [(name, figures[f"eval/{name}"]) for name in MAIN_FIGURES if f"eval/{name}" in figures]
        print_rank0(f"step {step}: held-out " + ", ".join(f"{name} {value:.3f}" for name, value in main))
        if metric not in figures:
            why = f"{metric} is undefined, as where truths or answers are all equal, so this model is not kept in best/"
            print_rank0(f"step {step}: {why}: add held-out samples, or take another --metric_for_best_model")
            return False
        return step > 0 and all(goodness(figures[metric]) > goodness(value) for value in best)

    def state(self) -> dict:
        """Return what a checkpoint keeps of the records."""
        return {"counts": self.counts, "evaluations": self.evaluations, "best_step": self.best_step}

    def write(self, add: Callable[[SummaryWriter], object], step: int) -> None:
        """Let `add` write curves and completions, on rank 0; a full disk costs those of a step, not the run."""
        if not self.is_main:
            return
        folder = self.output / "tensorboard"
        try:
            folder.mkdir(exist_ok=True)
            with TemporaryFile(dir=folder) as probe:  # a thread of TensorBoard's would meet the full disk, and end
                probe.write(bytes(2**16))
            if self.writer is None:
                self.writer = SummaryWriter(str(folder), purge_step=step)
            add(self.writer)
            self.writer.flush()
            self.is_full = False
        except OSError as error:
            self.writer = None  # a writer that failed once stays broken; the next one gets a new file
            if not self.is_full:
                print_rank0(f"step {step}: curves and completions cannot be written ({error}), from here on")
            self.is_full = True

    def stopped(self, step: int) -> bool:
        """Close everything, say that a signal stopped the run, and return False: it is not complete."""
        self.close()
        print_rank0(f"stopped after step {step}: the same command with --resume_from_checkpoint auto continues")
        return False

    def close(self) -> None:
        """Close the bar and the files."""
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


def peak_memory_gb() -> float:
    """Return the peak memory of this process: of its GPU, or of the host where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
