from functools import partial

import numpy as np
import pytest

from data.dataset import Sample
from reward.extract import extract_number
from reward.functions import load_reward_functions, score_answers
from reward.zero_skill import ZeroSkill, constant_rewards, constant_texts, constants, zero_skill


def samples_of(*answers):
    return [Sample(f"s{i}", (), (("user", "What is the EF?"),), answer) for i, answer in enumerate(answers)]


def minus_squares(samples, texts):
    pairs = zip(samples, texts, strict=True)
    return [-((extract_number(text) - extract_number(sample.answer)) ** 2) for sample, text in pairs]


def test_the_best_constants_are_the_hand_computed_ones():
    # Squares of 60: 400 + 100 + 0 + 900; the runner-up, 50, has 100 + 0 + 100 + 1600.
    found = zero_skill(samples_of("40%", "60%", "EF is 50", "90%"), minus_squares)
    assert found == ZeroSkill(answer=55.0, mae=15.0, rewarded_answer=60.0, reward=-350.0)
    assert str(found) == (
        "zero skill: answering always 55 has a mean error of 15.00; "
        "the best mean reward of a constant is -350.000, for 60"
    )


def test_the_rewards_of_the_flags_are_those_of_the_best_constant():
    functions = load_reward_functions(["numerical_video_reward"], [], "", [0.0, 100.0])
    found = zero_skill(samples_of("50%", "50%", "56%"), partial(score_answers, functions, keys=[]))
    assert (found.answer, found.mae, found.rewarded_answer) == (50.0, pytest.approx(2, abs=1e-12), 50.0)
    at_56 = 0.1 + 0.9 * 0.75 * 1.1  # 6 points off; the range emphasis of 56 is 1.1
    assert found.reward == pytest.approx((1 + 1 + at_56) / 3, abs=1e-12)


def test_a_constant_answers_in_the_form_that_is_rewarded():
    functions = load_reward_functions(["numerical_video_reward", "format_reward"], [1.0, 0.5], "", [0.0, 100.0])
    found = zero_skill(samples_of("20%", "50%", "50%"), partial(score_answers, functions, keys=[]))
    assert found.rewarded_answer == 50.0
    assert found.reward == pytest.approx((0.1 + 1 + 1) / 3 + 0.5, abs=1e-12)


def test_truths_without_a_number_are_left_out():
    def score(samples, texts):
        assert [sample.id for sample in samples] == ["s1", "s3"]
        return minus_squares(samples, texts)

    found = zero_skill(samples_of("fine", "40%", "good", "50%"), score)
    assert (found.answer, found.mae, found.reward) == (45.0, 5.0, -50.0)
    assert zero_skill(samples_of("fine", "good"), minus_squares) is None
    assert zero_skill([], minus_squares) is None


def test_the_mean_reward_is_over_what_is_scored():
    def score(samples, texts):
        return [
            None if sample.id == "s3" else r for sample, r in zip(samples, minus_squares(samples, texts), strict=True)
        ]

    found = zero_skill(samples_of("40%", "60%", "50%", "90%"), score)  # 50: (100 + 100 + 0) / 3
    assert (found.answer, found.mae, found.rewarded_answer) == (55.0, 15.0, 50.0)
    assert found.reward == pytest.approx(-200 / 3, abs=1e-12)


def test_a_constant_that_is_never_scored_is_not_the_best():
    def score(samples, texts):
        return [-5.0 if extract_number(text) == 60 else None for text in texts]

    found = zero_skill(samples_of("40%", "60%"), score)
    assert (found.rewarded_answer, found.reward) == (60.0, -5.0)


def test_without_any_score_there_is_a_median_only():
    found = zero_skill(samples_of("40%", "60%"), lambda samples, texts: [None] * len(texts))
    assert (found.answer, found.mae, found.rewarded_answer) == (50.0, 10.0, None)
    assert np.isnan(found.reward)
    assert str(found) == "zero skill: answering always 50 has a mean error of 10.00"


def test_of_many_samples_an_even_choice_of_a_thousand_is_scored():
    calls = []

    def score(samples, texts):
        calls.append(([int(sample.id[1:]) for sample in samples], set(texts)))
        return minus_squares(samples, texts)

    found = zero_skill(samples_of(*(f"{i}%" for i in range(2001))), score)
    assert len(calls) == 2 * 51
    assert all(chosen == calls[0][0] and len(texts) == 1 for chosen, texts in calls)
    chosen = np.array(calls[0][0])
    assert (len(chosen), chosen[0], chosen[-1]) == (1000, 0, 2000)
    assert set(np.diff(chosen)) == {2, 3}
    assert (found.answer, found.mae) == (1000.0, pytest.approx(1000 * 1001 / 2001, abs=1e-9))  # of all samples
    assert found.rewarded_answer == pytest.approx(1000, abs=2)


def test_constants_are_all_of_a_few_truths_and_quantiles_of_many():
    assert constants(np.array([50.0, 90.0, 40.0, 50.0])) == [40.0, 50.0, 90.0]
    assert constants(np.array([7.5])) == [7.5]
    assert constants(np.arange(51.0)) == list(range(51))
    assert constants(np.arange(1001.0)) == list(range(0, 1001, 20))


def test_constants_are_said_plainly_and_in_the_form_of_thinking():
    assert constant_texts(np.array([40.5, 60.0])) == [
        "40.5%",
        "60%",
        "<think></think><answer>40.5%</answer>",
        "<think></think><answer>60%</answer>",
    ]


def test_rewards_of_constants_stand_by_text_and_sample():
    def score(samples, texts):
        return [None if "think" in text else 100 * i + extract_number(text) for i, text in enumerate(texts)]

    found = constant_rewards(samples_of("1%", "1%", "1%"), np.array([4.0, 6.0]), score)
    np.testing.assert_array_equal(found, [[4, 104, 204], [6, 106, 206], [np.nan] * 3, [np.nan] * 3])
