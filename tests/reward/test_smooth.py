import json

import pytest

from reward.numerical import range_emphasis, reward_numbers, smooth_numerical_reward, smooth_score

TRUTHS = [20, 35, 50, 65, 80]
ERRORS = range(101)


def rewards_of(truth, *texts, **kwargs):
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    return smooth_numerical_reward(completions, [{"role": "assistant", "content": truth}] * len(texts), **kwargs)


def reward_of(truth, text, **kwargs):
    return rewards_of(truth, text, **kwargs)[0]


def test_the_range_emphasis_rises_from_one_at_50_to_one_and_a_half_at_20_and_80():
    assert [range_emphasis(truth) for truth in (50, 35, 65, 56)] == pytest.approx([1, 1.25, 1.25, 1.1], abs=1e-12)
    assert [range_emphasis(truth) for truth in (20, 80, 0, 100, -1e6)] == [1.5] * 5


def test_scores_are_the_hand_computed_ones():
    assert smooth_score(50, 50, error_scale=6) == pytest.approx(2 / 3, abs=1e-12)
    assert smooth_score(65, 71, error_scale=6) == pytest.approx(5 / 12, abs=1e-12)
    assert smooth_score(35, 47, error_scale=6) == pytest.approx(1 / 6, abs=1e-12)
    assert smooth_score(50, 56, error_scale=3) == pytest.approx(2 / 15, abs=1e-12)


def test_rewards_are_the_hand_computed_ones():
    assert reward_of("20%", "20%", error_scale=6) == pytest.approx(1.0, abs=1e-12)
    assert reward_of("50%", "50%", error_scale=6) == pytest.approx(0.7, abs=1e-12)
    assert reward_of("65%", "71%", error_scale=6) == pytest.approx(0.475, abs=1e-12)
    assert reward_of("80%", "98%", error_scale=6) == pytest.approx(0.19, abs=1e-12)


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("truth", TRUTHS)
def test_the_score_falls_at_every_error_and_never_to_zero(truth, side):
    scores = [smooth_score(truth, truth + side * error) for error in ERRORS]
    assert all(before > after for before, after in zip(scores, scores[1:], strict=False))
    assert 0 < scores[-1] < scores[0] <= 1


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("truth", TRUTHS)
def test_the_reward_falls_at_every_error_and_stays_above_a_tenth(truth, side):
    texts = [f"{truth + side * error}%" for error in ERRORS]
    rewards = rewards_of(f"{truth}%", *texts, valid_range=(-1000, 1000))
    assert all(before > after for before, after in zip(rewards, rewards[1:], strict=False))
    assert 0.1 < rewards[-1] < rewards[0] <= 1


def test_truths_far_from_50_are_rewarded_more_at_every_error():
    at = {truth: [smooth_score(truth, truth + error) for error in ERRORS] for truth in TRUTHS}
    for error in ERRORS:
        assert at[20][error] > at[35][error] > at[50][error] < at[65][error] < at[80][error]
        assert at[20][error] == pytest.approx(at[80][error], abs=1e-12)


def test_a_larger_error_scale_forgives_more():
    rewards = [reward_of("50%", "56%", error_scale=scale) for scale in (3, 6, 12)]
    assert rewards == sorted(set(rewards))


def test_a_completion_that_was_cut_earns_a_tenth_at_the_most():
    ended, cut = rewards_of("50%", "50%", "50%", is_stopped=[True, False])
    assert ended == reward_of("50%", "50%") > 0.1
    assert 0 <= cut <= 0.1


def test_each_completion_says_two_numbers_or_not_by_itself():
    one, two = "50%", "50% or 60%"
    assert [reward > 0.1 for reward in rewards_of("50%", one, two, one)] == [True, False, True]
    assert [reward > 0.1 for reward in rewards_of("50%", two, one, two)] == [False, True, False]


def test_each_completion_is_cut_or_not_by_itself():
    rewards = rewards_of("50%", "none", "50%", "50%", "fine", "50%", is_stopped=[True, False, True, False, False])
    full = reward_of("50%", "50%")
    assert [reward == full for reward in rewards] == [False, False, True, False, False]
    assert rewards[0] == rewards[3] == 0


@pytest.mark.parametrize(
    "text", ["50% or 60%", "50%. In short: 51%", "<answer>50%</answer> or 60%", "50-60%", "120 ml, 50"]
)
def test_two_different_numbers_earn_a_tenth_at_the_most(text):
    assert 0 <= reward_of("50%", text) <= 0.1
    assert 0 <= reward_of("60%", text) <= 0.1


@pytest.mark.parametrize(
    "text",
    [
        "50%, so the answer is 50.0%",
        "In the apical 2- and 4-chamber views: 120 ml, 50%",
        "### 1. Left ventricle\nNormal.\n### 2. Ejection fraction\n50%",
        "EF = (EDV - ESV) / EDV × 100% = 50%",
        "<think>It is 40, or 60.</think>50%",
        "<think>First I see 40%, then 60%.</think>\n<answer>50%</answer>",
        "Based on 3 videos and view 2 in 2D A4C, the EF is 50%",
    ],
)
def test_a_number_repeated_thought_or_counted_is_not_said_twice(text):
    assert reward_of("50%", text) == reward_of("50%", "50%") > 0.1


@pytest.mark.parametrize(("text", "is_answer"), [("-1%", 0), ("0%", 1), ("100%", 1), ("100.1%", 0), ("1e3 or 500%", 0)])
def test_a_number_out_of_the_valid_range_is_no_answer(text, is_answer):
    assert (reward_of("50%", text) > 0.1) == bool(is_answer)
    assert is_answer or reward_of("50%", text) == reward_of("50%", text, is_stopped=[False]) == 0


def test_the_valid_range_can_be_given():
    assert [r > 0.1 for r in rewards_of("150", "99", "100", "200", "201", valid_range=[100, 200])] == [0, 1, 1, 0]
    assert rewards_of("150", "99", "201", valid_range=[100, 200]) == [0, 0]


@pytest.mark.parametrize("text", ["Excellent", "55%", "55% or 60%", "-5%", ""])
def test_without_a_true_number_everything_earns_a_half(text):
    assert reward_of("Good quality", text) == reward_of("Good quality", text, is_stopped=[False]) == 0.5


@pytest.mark.parametrize("text", ["Excellent", "3 videos", ""])
def test_without_a_predicted_number_nothing_is_earned(text):
    assert reward_of("50%", text) == reward_of("50%", text, is_stopped=[False]) == 0.0


def test_rewards_are_asked_for_by_truth_prediction_and_index():
    completions = [[{"role": "assistant", "content": text}] for text in ("40%", "none", "60%", "70%")]
    assistant = [{"role": "assistant", "content": answer} for answer in ("41%", "42%", "43%", "fine")]
    found = reward_numbers(lambda truth, x, i: truth * 1e4 + x * 1e2 + i, completions, assistant, {})
    assert found == [414000.0, 0.0, 436002.0, 0.5]
    with pytest.raises(ValueError):
        reward_numbers(lambda truth, x, i: 0.0, completions, assistant[:3], {})


def test_the_debug_log_holds_training_only(tmp_path, monkeypatch):
    path = tmp_path / "log"
    monkeypatch.setenv("DEBUG_MODE", "true")
    monkeypatch.setenv("LOG_PATH", str(path))
    reward_of("50%", "56%", step=None, sample_id=["s0"], is_training=False)
    assert not path.exists()
    with pytest.raises(ValueError):
        reward_of("50%", "56%", sample_id=["s0", "s1"])
    reward = reward_of("50%", "56%", step=7, sample_id=["s1"], is_training=True)
    assert json.loads(path.read_text()) == {
        "step": 7,
        "sample_id": "s1",
        "truth": "50%",
        "text": "56%",
        "truth_number": 50.0,
        "predicted_number": 56.0,
        "error": 6.0,
        "reward": reward,
    }
