"""The numbers behind the curves, and the lines and distributions made of a step's completions."""

import json

import pytest
import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from data.sample import Media, Sample
from grpo.ranks import start_processes
from grpo.rollout import ScoredRollout
from grpo.run.records import GroupRecord, completion_lines, distributions, global_counts, rollout_metrics, std_of_step
from tests.conftest import run_ranks

NAN = float("nan")


def group(rewards, lengths, is_stopped, texts=("1%", "none", "4%"), position=0) -> GroupRecord:
    rewards = torch.tensor(rewards)
    return GroupRecord(
        position=position,
        sample=Sample(f"s{position}", (Media("video", "/videos/a.mp4"),), (("user", "<video>EF?"),), "It is 3%."),
        texts=list(texts),
        numbers=[1.0, None, 4.0],
        rewards=rewards,
        rewards_by_function={"f": rewards},
        lengths=torch.tensor(lengths),
        is_stopped=torch.tensor(is_stopped),
        advantages=torch.tensor([0.5, -0.5, 0.0]),
    )


GROUPS = [
    group([0.0, 1.0, NAN], [2, 3, 4], [True, True, False]),
    group([0.5, 0.5, 0.5], [1, 1, 7], [True, True, True], position=1),
]


def masked(*lengths: int) -> ScoredRollout:
    """A group whose completions have so many trained tokens."""
    return ScoredRollout(None, torch.zeros(3), torch.arange(7) < torch.tensor(lengths)[:, None])


def count_on_two_ranks() -> None:
    start_processes()
    rank = dist.get_rank()
    groups = [[masked(2, 3, 0)], [masked(1, 1, 7)]]
    assert global_counts(groups[rank]) == (14, 5)
    assert global_counts([masked(0, 0, 0)]) == (1, 1)
    rewards = torch.tensor([[[0.0, 1.0, NAN]], [[0.5, 0.5, 0.5]]])[rank]  # squares of 0.25 + 0.25, over 4
    assert std_of_step(rewards) == pytest.approx(0.125**0.5) and std_of_step(rewards * NAN) == 0.0
    dist.destroy_process_group()


def test_denominators_are_those_of_all_ranks():
    run_ranks(count_on_two_ranks, 2)


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


def test_every_completion_of_a_step_has_a_line():
    lines = completion_lines(7, GROUPS)
    assert len(lines) == 6 and [line["sample_id"] for line in lines] == ["s0"] * 3 + ["s1"] * 3
    assert lines[1] == {
        "step": 7,
        "sample_id": "s0",
        "truth": "It is 3%.",
        "media": ["a.mp4"],
        "text": "none",
        "number": None,
        "reward": 1.0,
        "rewards": {"f": 1.0},
        "advantage": -0.5,
        "length": 3,
        "is_stopped": True,
    }
    assert lines[2]["reward"] is None and lines[2]["rewards"] == {"f": None}  # JSON has no nan


def test_distributions_are_over_what_there_is():
    found = {name: values.tolist() for name, values in distributions(GROUPS).items()}
    assert found == {
        "histograms/reward": [0.0, 1.0, 0.5, 0.5, 0.5],
        "histograms/advantage": [0.5, -0.5, 0.0] * 2,
        "histograms/completion_length": [2, 3, 4, 1, 1, 7],
        "histograms/error": [-2.0, 1.0] * 2,
    }
    assert distributions([]) == {}


def test_values_without_bounds_break_neither_histograms_nor_lines(tmp_path):
    odd = group([float("inf"), -float("inf"), NAN], [2, 3, 4], [True, True, False])
    odd.numbers, odd.advantages = [1e100, None, 1e100], torch.tensor([NAN, float("inf"), 0.0])
    found = distributions([odd])
    assert found["histograms/error"].tolist() == [1e6, 1e6] and "histograms/reward" not in found
    with SummaryWriter(str(tmp_path)) as writer:
        for name, values in found.items():
            writer.add_histogram(name, values, 1)
    json.dumps(completion_lines(1, [odd]), allow_nan=False)
