"""The numbers behind the curves, text that cannot break its table, and a disk that is full for a while."""

import resource
import signal
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
import torch.distributed as dist

from grpo.config import Config
from grpo.ranks import start_processes
from grpo.run.tracking import GlobalCounts, GroupRecord, StepRecords, Tracker, rollout_metrics, table_cell
from tests.conftest import run_ranks
from tests.test_train import curves

NAN = float("nan")


def group(rewards, lengths, num_trained, is_stopped) -> GroupRecord:
    rewards = torch.tensor(rewards)
    return GroupRecord(
        rewards, {"f": rewards}, torch.tensor(num_trained), torch.tensor(lengths), torch.tensor(is_stopped)
    )


GROUPS = [
    group([0.0, 1.0, NAN], [2, 3, 4], [2, 3, 0], [True, True, False]),
    group([0.5, 0.5, 0.5], [1, 1, 7], [1, 1, 7], [True, True, True]),
]


def test_counts_are_over_what_is_trained():
    counts = GlobalCounts.of(StepRecords(GROUPS, []))
    assert (counts.num_tokens, counts.num_completions) == (14, 5)
    assert counts.reward_std == pytest.approx(0.125**0.5)  # of 0, 1, 0.5, 0.5, 0.5: squares of 0.25 + 0.25, over 4
    nothing = GlobalCounts.of(StepRecords([], []))
    assert (nothing.num_tokens, nothing.num_completions, nothing.reward_std) == (1, 1, 0.0)


def test_metrics_are_over_all_groups():
    metrics = rollout_metrics(GROUPS)
    assert metrics == pytest.approx(
        {
            "reward": 0.5,
            "reward_std": 0.5**0.5 / 2,
            "frac_reward_zero_std": 0.5,
            "completions/mean_length": 3.0,
            "completions/min_length": 1,
            "completions/max_length": 7,
            "completions/clipped_ratio": 1 / 6,
            "completions/unscored": 1,
            "rewards/f/mean": 0.5,
            "rewards/f/std": 0.125**0.5,
        }
    )
    assert rollout_metrics([]) == {}


def test_sampled_text_stays_in_its_table_cell():
    cell = table_cell("a|b\n| --- |`x`<b>\x1b[31m\u202e")
    assert not set(cell) & set("|`<>\n\x1b\u202e")


def write_curve(output: str, log: str) -> None:
    with open(log, "w") as file, redirect_stdout(file), redirect_stderr(file):
        write_nine_steps(output)


def write_nine_steps(output: str) -> None:
    start_processes()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    tracker = Tracker(Config(output_dir=output), 9, 0, {})
    for step in range(1, 10):
        limit = 1000 if 4 <= step <= 6 else -1  # no file may grow beyond so many bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        tracker.write(lambda writer, step=step: writer.add_scalar("loss", step, step), step)
    tracker.close()
    dist.destroy_process_group()


def test_a_full_disk_leaves_a_gap_in_the_curves_and_a_line(tmp_path):
    run_ranks(write_curve, 1, str(tmp_path), str(tmp_path / "log"))
    assert curves(tmp_path)["loss"] == [1, 2, 3, 7, 8, 9]
    printed = (tmp_path / "log").read_text()
    (line,) = [line for line in printed.splitlines() if "cannot be written" in line]
    assert line.startswith("step 4: the curves cannot be written") and "Traceback" not in printed
