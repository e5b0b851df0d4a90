"""Figures by hand, by scikit-learn, by the statistics module; a constant has no skill; missing answers count."""

import json
import math
import statistics

import numpy as np
import pytest
from scipy.stats import linregress
from sklearn.metrics import accuracy_score, mean_squared_error, r2_score, roc_auc_score

from grpo.evaluate.metrics import Answers, best_answers, figures, median_answers
from reward.zero_skill import constants

CUTS = [35.0, 40.0, 50.0]
TRUTHS = [20.0, 33.5, 38.0, 41.0, 47.0, 52.0, 60.0, 71.0]
PREDICTED = [25.0, 30.0, 45.0, 39.0, 47.0, 60.0, 57.5, 64.0]
NAN = math.nan


def answers_of(truths, numbers, rewards=None, is_stopped=None, constant_rewards=None) -> Answers:
    numbers = np.array(numbers, dtype=float).reshape(len(truths), -1)
    return Answers(
        truths=np.array(truths),
        constant_rewards=np.zeros((1, len(truths))) if constant_rewards is None else np.array(constant_rewards),
        numbers=numbers,
        rewards=np.zeros(numbers.shape) if rewards is None else np.array(rewards, float).reshape(numbers.shape),
        is_stopped=np.ones(numbers.shape, bool) if is_stopped is None else np.array(is_stopped).reshape(numbers.shape),
        valid_range=[0.0, 100.0],
    )


def values(found: dict) -> dict:
    return {name: figure["value"] for name, figure in found.items()}


def test_every_figure_equals_one_computed_otherwise():
    """To 1e-9, from the definitions in the standard library, or scikit-learn's where it has the figure."""
    rewards, stopped = [0.1 * i for i in range(8)], [True] * 6 + [False] * 2
    constant_rewards = [[0.5] * 8, [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.8]]
    found = values(figures(answers_of(TRUTHS, PREDICTED, rewards, stopped, constant_rewards), CUTS))
    errors = [p - t for p, t in zip(PREDICTED, TRUTHS, strict=True)]
    sizes = [abs(error) for error in errors]
    bias, spread = statistics.mean(errors), statistics.stdev(errors)
    mean_t, mean_p = statistics.mean(TRUTHS), statistics.mean(PREDICTED)
    covariance = statistics.mean((t - mean_t) * (p - mean_p) for t, p in zip(TRUTHS, PREDICTED, strict=True))
    variances = statistics.pvariance(TRUTHS), statistics.pvariance(PREDICTED)
    expected = {
        "n": 8,
        "parse_rate": 1.0,
        "reward": statistics.mean(rewards),
        "mae": statistics.mean(sizes),
        "median_error": statistics.median(sizes),
        "rmse": math.sqrt(mean_squared_error(TRUTHS, PREDICTED)),
        "r2": r2_score(TRUTHS, PREDICTED),
        "pearson": statistics.correlation(TRUTHS, PREDICTED),
        "ccc": 2 * covariance / (sum(variances) + (mean_t - mean_p) ** 2),
        "bias": bias,
        "limit_low": bias - 1.96 * spread,
        "limit_high": bias + 1.96 * spread,
        "within_5": 5 / 8,  # 5, 3.5, 7, 2, 0, 8, 2.5, 7
        "sd_ratio": math.sqrt(variances[1] / variances[0]),
        "distinct_answers": 8,
        "out_of_range": 0,
        "clipped_ratio": 0.25,
        "zero_skill_answer": 44.0,
        "zero_skill_mae": statistics.mean(abs(t - 44.0) for t in TRUTHS),
        "zero_skill_reward": 4.8 / 8,
    }
    for cut in CUTS:
        is_below, called = [t < cut for t in TRUTHS], [p < cut for p in PREDICTED]
        expected[f"auc_{cut:g}"] = roc_auc_score(is_below, [-p for p in PREDICTED])
        expected[f"accuracy_{cut:g}"] = accuracy_score(is_below, called)
        expected[f"mae_{cut:g}"] = statistics.mean(
            abs(t - p) for t, p in zip(TRUTHS, PREDICTED, strict=True) if t < cut
        )
    assert found == pytest.approx(expected, abs=1e-9)


def test_figures_by_hand():
    """Three pairs: (10, 12), (20, 18), (30, 33); errors 2, -2, 3."""
    found = values(figures(answers_of([10.0, 20.0, 30.0], [12.0, 18.0, 33.0]), [15.0]))
    assert found["mae"] == pytest.approx(7 / 3, abs=1e-9) and found["median_error"] == 2
    assert found["rmse"] == pytest.approx(math.sqrt(17 / 3), abs=1e-9)
    assert found["r2"] == pytest.approx(1 - 17 / 200, abs=1e-9)
    assert found["bias"] == 1
    assert found["limit_high"] == pytest.approx(1 + 1.96 * math.sqrt(7), abs=1e-9)  # (1 + 9 + 4) / 2
    # The means are 20 and 21, the covariance (-10)(-9) + 0 + (10)(12) = 210, the squares 200 and 81 + 9 + 144 = 234.
    assert found["pearson"] == pytest.approx(210 / math.sqrt(200 * 234), abs=1e-9)
    assert found["ccc"] == pytest.approx(2 * 210 / (200 + 234 + 3 * 1), abs=1e-9)
    assert found["sd_ratio"] == pytest.approx(math.sqrt(234 / 200), abs=1e-9)
    assert found["auc_15"] == 1.0 and found["accuracy_15"] == 1.0


def test_a_correlation_is_that_of_a_regression():
    found = values(figures(answers_of(TRUTHS, PREDICTED), []))
    assert found["pearson"] == pytest.approx(linregress(TRUTHS, PREDICTED).rvalue, abs=1e-9)


@pytest.mark.parametrize("constant", [44.0, 55.3, 0.1])
def test_a_constant_answer_has_no_skill(constant):
    found = figures(answers_of(TRUTHS, [constant] * 8), CUTS, num_resamples=50)
    assert found["r2"]["value"] <= 0
    assert found["ccc"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["sd_ratio"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["pearson"] == {"value": None, "low": None, "high": None}
    assert found["distinct_answers"] == {"value": 1.0, "low": None, "high": None}
    assert found["auc_40"]["value"] == 0.5 and found["distinct_answers"]["value"] == 1
    json.dumps(found, allow_nan=False)
    if constant == 44.0:  # the median of the truths
        assert found["mae"]["value"] == found["zero_skill_mae"]["value"]


@pytest.mark.parametrize("odd", [NAN, 555.0, -3.0])
def test_an_answer_without_a_possible_number_counts_as_the_best_constant(odd):
    given = [odd, *PREDICTED[1:]]
    found = values(figures(answers_of(TRUTHS, given), CUTS))
    replaced = values(figures(answers_of(TRUTHS, [44.0, *PREDICTED[1:]]), CUTS))
    is_number = not math.isnan(odd)
    assert found["parse_rate"] == (1.0 if is_number else 7 / 8)
    assert found["out_of_range"] == (1 if is_number else 0)
    assert found["distinct_answers"] == (8 if is_number else 7)
    counts = ("parse_rate", "out_of_range", "distinct_answers")
    assert {k: v for k, v in found.items() if k not in counts} == {k: v for k, v in replaced.items() if k not in counts}
    assert found["mae"] > values(figures(answers_of(TRUTHS[1:], PREDICTED[1:]), CUTS))["mae"]


def test_a_cut_with_no_truth_on_one_side_is_left_out():
    found = figures(answers_of(TRUTHS, PREDICTED), [10.0, 20.0, 20.5, 71.0, 72.0])
    assert [name for name in found if name.startswith("auc_")] == ["auc_20.5", "auc_71"]


def test_a_truth_or_an_answer_at_a_cut_is_not_below_it():
    # Below 40 are the first truth and the third answer. Below 60 are all truths but the last.
    answers = answers_of([30.0, 40.0, 60.0], [40.0, 45.0, 30.0])
    found = values(figures(answers, [30.0, 40.0, 60.0]))
    assert found["accuracy_40"] == pytest.approx(1 / 3) and found["mae_40"] == 10.0
    assert found["mae_60"] == 7.5 and "mae_30" not in found


def test_the_ends_of_the_range_are_answers():
    found = values(figures(answers_of([10.0, 50.0, 90.0], [0.0, 100.1, 100.0]), []))
    assert found["out_of_range"] == 1 and found["mae"] == pytest.approx((10 + 0 + 10) / 3)


def test_two_samples_are_enough_for_every_figure():
    found = values(figures(answers_of([40.0, 60.0], [41.0, 63.0]), []))
    assert found["r2"] == pytest.approx(1 - 10 / 200) and found["pearson"] == pytest.approx(1.0)
    assert found["limit_high"] == pytest.approx(2 + 1.96 * math.sqrt(2))


def test_what_is_undefined_is_none_and_not_nan():
    one = figures(answers_of([50.0], [51.0]), CUTS, num_resamples=10)
    undefined = [name for name, figure in one.items() if figure["value"] is None]
    assert undefined == ["r2", "pearson", "limit_low", "limit_high", "sd_ratio"]
    same = figures(answers_of([50.0, 50.0], [51.0, 49.0], [[NAN], [NAN]]), CUTS, num_resamples=10)
    assert same["r2"]["value"] is None and same["sd_ratio"]["value"] is None and same["reward"]["value"] is None
    json.dumps([one, same], allow_nan=False)


def test_bounds_are_those_of_resampled_samples():
    """Each resample computed on its own; of samples with two answers, both go together."""
    numbers = np.stack([PREDICTED, np.array(PREDICTED)[::-1]], axis=1)
    found = figures(answers_of(TRUTHS, numbers), [40.0], num_resamples=200)
    picks = np.random.default_rng(0).integers(8, size=(8, 200)).T
    by_hand = {"mae": [], "r2": [], "auc_40": []}
    for pick in picks:
        t, p = np.repeat(np.array(TRUTHS)[pick], 2), numbers[pick].ravel()
        by_hand["mae"].append(abs(t - p).mean())
        by_hand["r2"].append(r2_score(t, p))
        if 0 < (t < 40).sum() < len(t):
            by_hand["auc_40"].append(roc_auc_score(t < 40, -p))
    for name, spread in by_hand.items():
        low, high = np.quantile(spread, [0.025, 0.975])
        assert found[name]["low"] == pytest.approx(low, abs=1e-9), name
        assert found[name]["high"] == pytest.approx(high, abs=1e-9), name
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    assert figures(answers_of(TRUTHS, numbers), [40.0], num_resamples=200) == found


def test_the_reward_of_a_constant_is_over_what_is_scored():
    """As the mean reward is: of the second constant only half is scored."""
    rewards = [[0.4] * 8, [1.0, NAN] * 4, [NAN] * 8]
    found = values(figures(answers_of(TRUTHS, PREDICTED, constant_rewards=rewards), CUTS))
    assert found["zero_skill_reward"] == 1.0
    answers = answers_of(TRUTHS, PREDICTED, constant_rewards=[[NAN] * 8])
    nothing = figures(answers, CUTS, num_resamples=5)
    assert nothing["zero_skill_reward"] == {"value": None, "low": None, "high": None}


def test_few_values_at_a_time_give_the_same_bounds(monkeypatch):
    expected = figures(answers_of(TRUTHS, PREDICTED), CUTS, num_resamples=100)
    monkeypatch.setattr("grpo.evaluate.metrics.BLOCK", 8 * 7)
    assert figures(answers_of(TRUTHS, PREDICTED), CUTS, num_resamples=100) == expected


def test_of_several_answers_the_median_and_the_best():
    numbers = [[10, 20, 60], [NAN, 555, 40], [NAN, NAN, 101], [30, 34, NAN]]
    answers = answers_of([18.0, 90.0, 50.0, 40.0], numbers, [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]])
    assert median_answers(answers).ravel().tolist() == pytest.approx([20, 40, NAN, 32], nan_ok=True)
    best = best_answers(answers)
    assert best.numbers.ravel().tolist() == pytest.approx([20, 40, NAN, 34], nan_ok=True)
    assert best.rewards.ravel().tolist() == [2, 6, 7, 11]


def test_constants_are_among_the_truths():
    assert constants(np.array([3.0, 1.0, 2.0, 2.0])) == [1.0, 2.0, 3.0]
    many = constants(np.arange(1000.0))
    assert len(many) == 51 and set(many) <= set(range(1000)) and (many[0], many[-1]) == (0, 999)
