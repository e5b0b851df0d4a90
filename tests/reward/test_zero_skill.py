import sys
import time

import numpy as np
import pytest

import reward.zero_skill
from data.sample import Sample
from reward.extract import extract_number
from reward.functions import RewardFunction, load_reward_functions
from reward.zero_skill import ZeroSkill, constant_rewards, constant_texts, constants, zero_skill


def samples_of(*answers, extra=None):
    return [
        Sample(f"s{i}", (), (("user", "What is the EF?"),), answer, extra or {}) for i, answer in enumerate(answers)
    ]


def zero_skill_of(functions, samples, keys):
    truths = np.array([extract_number(sample.answer) for sample in samples], dtype=float)
    return zero_skill(functions, samples, truths, keys)


def function_of(call, weight=1.0):
    return RewardFunction("mine", call, weight)


def texts_of(completions):
    return [completion[0]["content"] for completion in completions]


def minus_squares(completions, assistant, **kwargs):
    pairs = zip(texts_of(completions), assistant, strict=True)
    return [-((extract_number(text) - extract_number(truth["content"])) ** 2) for text, truth in pairs]


def whole_step(completions, **kwargs):
    raise AssertionError("there is no step")


whole_step.whole_step = True
SQUARES = [function_of(minus_squares)]
TWO = np.array([4.0, 6.0])  # truths: the constants are 4 and 6, each in two forms


def test_the_best_constants_are_the_hand_computed_ones():
    # Squares of 60: 400 + 100 + 0 + 900; the runner-up, 50, has 100 + 0 + 100 + 1600.
    found = zero_skill_of(SQUARES, samples_of("40%", "60%", "EF is 50", "90%"), [])
    assert found == ZeroSkill(answer=55.0, mae=15.0, rewarded_answer=60.0, reward=-350.0)
    assert str(found) == (
        "zero skill: answering always 55 has a mean error of 15.00; "
        "the best mean reward of a constant is -350.000, for 60"
    )


def test_the_rewards_of_the_flags_are_those_of_the_best_constant():
    functions = load_reward_functions(["numerical_video_reward"], [], "", [0.0, 100.0])
    found = zero_skill_of(functions, samples_of("50%", "50%", "56%"), [])
    assert (found.answer, found.mae, found.rewarded_answer) == (50.0, pytest.approx(2, abs=1e-12), 50.0)
    at_56 = 0.1 + 0.9 * 0.75 * 1.1  # 6 points off; the range emphasis of 56 is 1.1
    assert found.reward == pytest.approx((1 + 1 + at_56) / 3, abs=1e-12)


def test_a_constant_answers_in_the_form_that_is_rewarded():
    functions = load_reward_functions(["numerical_video_reward", "format_reward"], [1.0, 0.5], "", [0.0, 100.0])
    found = zero_skill_of(functions, samples_of("20%", "50%", "50%"), [])
    assert found.rewarded_answer == 50.0
    assert found.reward == pytest.approx((0.1 + 1 + 1) / 3 + 0.5, abs=1e-12)


def test_truths_without_a_number_are_left_out():
    def score(completions, assistant, sample_id, **kwargs):
        seen.append(sample_id)
        return minus_squares(completions, assistant)

    seen = []
    found = zero_skill_of([function_of(score)], samples_of("fine", "40%", "good", "50%"), [])
    assert (found.answer, found.mae, found.reward) == (45.0, 5.0, -50.0)
    assert seen == [["s1", "s3"]] * 4
    assert zero_skill_of(SQUARES, samples_of("fine", "good"), []) is None
    assert zero_skill_of(SQUARES, [], []) is None


def test_the_mean_reward_is_over_what_is_scored():
    def score(completions, assistant, sample_id, **kwargs):
        rewards = minus_squares(completions, assistant)
        return [None if id_ == "s3" else value for id_, value in zip(sample_id, rewards, strict=True)]

    # 50: (100 + 100 + 0) / 3
    found = zero_skill_of([function_of(score)], samples_of("40%", "60%", "50%", "90%"), [])
    assert (found.answer, found.mae, found.rewarded_answer) == (55.0, 15.0, 50.0)
    assert found.reward == pytest.approx(-200 / 3, abs=1e-12)


def test_a_constant_that_is_never_scored_is_not_the_best():
    def score(completions, **kwargs):
        return [-5.0 if extract_number(text) == 60 else None for text in texts_of(completions)]

    found = zero_skill_of([function_of(score)], samples_of("40%", "60%"), [])
    assert (found.rewarded_answer, found.reward) == (60.0, -5.0)


def no_say(completions, **kwargs):
    return [None] * len(completions)


def fails(completions, **kwargs):
    raise KeyError("age")


@pytest.mark.parametrize(
    "functions",
    [
        [function_of(no_say)],
        [function_of(fails)],
        [*SQUARES, function_of(fails)],
        [*SQUARES, function_of(whole_step)],
        load_reward_functions(["concordance_reward"], [], "", [0.0, 100.0]),
        [],
    ],
    ids=["no say", "fails", "fails beside another", "whole step", "built-in whole step", "none"],
)
def test_without_any_score_there_is_a_median_only(functions):
    found = zero_skill_of(functions, samples_of("40%", "60%"), [])
    assert found == ZeroSkill(answer=50.0, mae=10.0, rewarded_answer=None, reward=None)
    assert str(found) == "zero skill: answering always 50 has a mean error of 10.00"


def test_of_many_samples_an_even_choice_of_a_thousand_is_scored_64_at_a_time():
    calls = []

    def score(completions, assistant, sample_id, **kwargs):
        calls.append(([int(id_[1:]) for id_ in sample_id], set(texts_of(completions))))
        return minus_squares(completions, assistant)

    found = zero_skill_of([function_of(score)], samples_of(*(f"{i}%" for i in range(2001))), [])
    assert len(calls) == 2 * 51 * 16
    by_text = [calls[first : first + 16] for first in range(0, len(calls), 16)]
    for blocks in by_text:
        assert [len(chosen) for chosen, _ in blocks] == [64] * 15 + [40]
        assert [chosen for chosen, _ in blocks] == [chosen for chosen, _ in by_text[0]]
        assert len(set.union(*(texts for _, texts in blocks))) == 1
    chosen = np.concatenate([chosen for chosen, _ in by_text[0]])
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
    def score(completions, sample_id, **kwargs):
        pairs = zip(texts_of(completions), sample_id, strict=True)
        return [None if "think" in text else 100 * int(id_[1:]) + extract_number(text) for text, id_ in pairs]

    found = constant_rewards([function_of(score)], samples_of("1%", "1%", "1%"), TWO, [])
    np.testing.assert_array_equal(found, [[4, 104, 204], [6, 106, 206], [np.nan] * 3, [np.nan] * 3])


@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 130])
def test_blocks_are_put_together_in_order(size):
    def score(completions, sample_id, **kwargs):
        sizes.append(len(completions))
        return [int(id_[1:]) for id_ in sample_id]

    sizes = []
    found = constant_rewards([function_of(score)], samples_of(*["1%"] * size), TWO, [])
    np.testing.assert_array_equal(found, [list(range(size))] * 4)
    assert max(sizes) <= 64 and sum(sizes) == 4 * size and len(sizes) == 4 * -(-size // 64)


def test_rewards_of_constants_are_weighted_sums_of_the_functions_that_have_a_say():
    def number(completions, **kwargs):
        return [extract_number(text) for text in texts_of(completions)]

    def picky(completions, sample_id, **kwargs):
        return [None if id_ == "s0" else 10 for id_ in sample_id]

    functions = [function_of(number, 2.0), function_of(picky, 0.5)]
    found = constant_rewards(functions, samples_of("1%", "1%"), TWO, [])
    np.testing.assert_array_equal(found, [[8, 13], [12, 17]] * 2)


def test_constants_have_their_bytes_in_the_place_of_tokens_and_are_ended():
    def score(completions, completion_ids, **kwargs):
        seen.append((texts_of(completions)[0], completion_ids, kwargs))
        return [1 / len(ids) for ids in completion_ids]

    seen = []
    found = constant_rewards([function_of(score)], samples_of("4%", "6%"), TWO, [])
    assert seen[0][:2] == ("4%", [[52, 37], [52, 37]])
    assert [ids for _, ids, _ in seen] == [[list(text.encode())] * 2 for text, _, _ in seen]
    for _, _, kwargs in seen:
        assert (kwargs["is_stopped"], kwargs["prompt_index"]) == ([True, True], [0, 1])
        assert (kwargs["step"], kwargs["is_training"]) == (None, False)
    lengths = [[2], [2], [34], [34]]  # two of the number; the tags have 7 + 8 + 8 + 9
    np.testing.assert_allclose(found, 1 / np.array(lengths) * [1, 1], rtol=0, atol=1e-12)


def test_constants_are_scored_with_the_keys_of_the_samples():
    def older(completions, age, site, **kwargs):
        return [a if s is None else 0 for a, s in zip(age, site, strict=True)]

    samples = samples_of("4%", "6%", extra={"age": 60})
    found = zero_skill_of([function_of(older)], samples, ["age", "site"])
    assert (found.rewarded_answer, found.reward) == (4.0, 60.0)
    assert np.isnan(constant_rewards([function_of(older)], samples, TWO, [])).all()  # it needs them


def test_functions_of_weight_zero_are_not_called():
    functions = [function_of(fails, 0.0), *SQUARES, function_of(whole_step, 0.0), function_of(fails, -0.0)]
    found = constant_rewards(functions, samples_of("4%", "6%"), TWO, [])
    np.testing.assert_array_equal(found, [[0, -4], [-4, 0]] * 2)


@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_where_functions_of_the_whole_step_have_a_weight_nothing_is_scored(weight):
    def score(completions, **kwargs):
        calls.append(completions)
        return [1.0] * len(completions)

    calls = []
    functions = [function_of(score), function_of(whole_step, weight)]
    assert np.isnan(constant_rewards(functions, samples_of("4%", "6%"), TWO, [])).all()
    assert not calls


def exits(completions, **kwargs):
    sys.exit(3)


def interrupted(completions, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "call",
    [fails, exits, lambda **kwargs: ["high"] * 2, lambda **kwargs: [1.0], lambda **kwargs: None],
    ids=["raises", "exits", "texts", "too few", "no list"],
)
def test_where_a_function_fails_nothing_is_said_of_constants(call):
    assert np.isnan(constant_rewards([*SQUARES, function_of(call)], samples_of("4%", "6%"), TWO, [])).all()


def test_where_a_function_fails_on_one_text_nothing_is_said_of_any():
    def score(completions, **kwargs):
        return [{"4%": 1.0, "6%": 2.0}[text] for text in texts_of(completions)]  # not those with tags

    assert np.isnan(constant_rewards([function_of(score)], samples_of("4%", "6%"), TWO, [])).all()


def test_an_interrupt_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt):
        constant_rewards([function_of(interrupted)], samples_of("4%", "6%"), TWO, [])


def test_where_a_function_takes_too_long_nothing_is_said_of_constants(monkeypatch):
    def slow(completions, **kwargs):
        calls.append(len(completions))
        time.sleep(0.03)
        return [1.0] * len(completions)

    calls, functions, samples = [], [function_of(slow)], samples_of("4%", "6%")
    monkeypatch.setattr(reward.zero_skill, "MOST_SECONDS", 0.05)  # for all texts together
    assert np.isnan(constant_rewards(functions, samples, TWO, [])).all()
    assert 1 <= len(calls) <= 2
    calls.clear()
    assert zero_skill_of(functions, samples, []) == ZeroSkill(answer=5.0, mae=1.0)
    assert 1 <= len(calls) <= 2
    calls.clear()
    monkeypatch.setattr(reward.zero_skill, "MOST_SECONDS", 600.0)
    np.testing.assert_array_equal(constant_rewards(functions, samples, TWO, []), np.ones((4, 2)))
    assert calls == [2] * 4


def test_a_function_that_never_ends_is_broken_off(monkeypatch):
    def hangs(completions, **kwargs):
        time.sleep(600)

    monkeypatch.setattr(reward.zero_skill, "MOST_SECONDS", 0.1)
    began = time.monotonic()
    assert np.isnan(constant_rewards([function_of(hangs)], samples_of("4%"), TWO, [])).all()
    assert time.monotonic() - began < 10
