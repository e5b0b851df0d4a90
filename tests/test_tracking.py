"""The numbers behind the curves, and text that cannot break its table."""

import pytest
import torch

from grpo.tracking import add_up, rollout_metrics, table_cell

NAN = float("nan")


def group(rewards, lengths, num_trained, is_stopped, counts=True) -> dict:
    return {
        "counts": counts,
        "bad_video": "",
        "rewards": torch.tensor(rewards),
        "by_function": {"f": torch.tensor(rewards)},
        "num_trained": torch.tensor(num_trained),
        "lengths": torch.tensor(lengths),
        "is_stopped": torch.tensor(is_stopped),
    }


GROUPS = [
    group([0.0, 1.0, NAN], [2, 3, 4], [2, 3, 0], [True, True, False]),
    group([0.5, 0.5, 0.5], [1, 1, 7], [1, 1, 7], [True, True, True]),
    group([9.0, 9.0, 9.0], [9, 9, 9], [0, 0, 0], [False, False, False], counts=False),
]


def test_totals_are_over_what_is_trained_in_groups_that_count():
    totals = add_up(GROUPS)
    assert (totals.num_tokens, totals.num_completions) == (14, 5)
    assert totals.reward_std == pytest.approx(0.125**0.5)  # of 0, 1, 0.5, 0.5, 0.5: squares of 0.25 + 0.25, over 4


def test_metrics_are_over_the_groups_that_count():
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
    assert rollout_metrics(GROUPS[2:]) == {}


def test_sampled_text_stays_in_its_table_cell():
    cell = table_cell("a|b\n| --- |`x`<b>\x1b[31m\u202e")
    assert not set(cell) & set("|`<>\n\x1b\u202e")
