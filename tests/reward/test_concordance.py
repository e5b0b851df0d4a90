import numpy as np
import pytest

from reward.concordance import concordance, concordance_reward


def lin(truths, predictions):
    """Lin's coefficient by his other formula: the correlation times the bias correction factor."""
    rho = np.corrcoef(truths, predictions)[0, 1]
    scale = np.std(truths) / np.std(predictions)
    location = (np.mean(truths) - np.mean(predictions)) / np.sqrt(np.std(truths) * np.std(predictions))
    return rho * 2 / (scale + 1 / scale + location**2)


def rewards_of(truths, answers, **kwargs):
    """Rewards by prompt. answers: a list of texts per truth."""
    flat = [(g, truth, text) for g, truth in enumerate(truths) for text in answers[g]]
    rewards = iter(
        concordance_reward(
            [[{"role": "assistant", "content": text}] for _, _, text in flat],
            [{"role": "assistant", "content": truth} for _, truth, _ in flat],
            prompt_index=[g for g, _, _ in flat],
            **kwargs,
        )
    )
    return [[next(rewards) for _ in texts] for texts in answers]


def test_the_coefficient_is_the_hand_computed_one():
    truths = np.array([1.0, 2.0, 3.0])
    assert concordance(truths, np.array([1.0, 2.0, 3.0])) == pytest.approx(1, abs=1e-12)
    assert concordance(truths, np.array([3.0, 2.0, 1.0])) == pytest.approx(-1, abs=1e-12)
    assert concordance(truths / 10, truths / 10) == pytest.approx(1, abs=1e-12)  # of whatever unit
    assert concordance(truths, np.array([2.0, 3.0, 4.0])) == pytest.approx(4 / 7, abs=1e-12)  # beside the line
    assert concordance(truths, np.array([2.0, 4.0, 6.0])) == pytest.approx(4 / 11, abs=1e-12)  # not its slope


def test_the_coefficient_is_that_of_numpys_covariance_and_correlation():
    rng = np.random.default_rng(0)
    for size in (2, 3, 8, 100):
        truths, predictions = rng.normal(55, 12, size), rng.normal(50, 6, size)
        (var_x, cov), (_, var_y) = np.cov(predictions, truths, bias=True)
        expected = 2 * cov / (var_x + var_y + (predictions.mean() - truths.mean()) ** 2)
        assert concordance(truths, predictions) == pytest.approx(expected, abs=1e-12)
        assert concordance(truths, predictions) == pytest.approx(lin(truths, predictions), abs=1e-12)


def test_each_row_of_predictions_has_its_own_coefficient():
    rng = np.random.default_rng(1)
    truths, predictions = rng.normal(55, 12, 5), rng.normal(50, 6, (2, 3, 5))
    found = concordance(truths, predictions)
    assert found.shape == (2, 3)
    expected = [[lin(truths, row) for row in rows] for rows in predictions]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_each_row_of_truths_has_its_own_coefficient():
    truths = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    np.testing.assert_allclose(concordance(truths, np.array([2.0, 4.0, 6.0])), [4 / 11, -4 / 11], rtol=0, atol=1e-12)
    found = concordance(truths, np.array([[2.0, 3.0, 4.0], [3.0, 2.0, 1.0]]))  # row by row
    np.testing.assert_allclose(found, [4 / 7, 1], rtol=0, atol=1e-12)


def test_rows_of_truths_and_of_predictions_are_broadcast():
    rng = np.random.default_rng(3)
    truths, predictions = rng.normal(55, 12, (4, 1, 5)), rng.normal(50, 6, (3, 5))
    found = concordance(truths, predictions)
    assert found.shape == (4, 3)
    expected = [[lin(row[0], answers) for answers in predictions] for row in truths]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_rows_that_are_all_the_same_have_exactly_no_agreement():
    same, other = np.full(3, 48.3), np.array([41.7, 48.3, 60.1])  # the mean of 48.3 three times is not quite 48.3
    assert concordance(same, same) == 0
    assert concordance(same, other) == 0
    assert concordance(other, same) == 0
    found = concordance(np.array([same, other, other]), np.array([other, same, other]))
    assert found[:2].tolist() == [0, 0]
    assert found[2] == pytest.approx(1, abs=1e-12)


def test_the_same_answer_to_everything_does_not_agree():
    assert concordance(np.array([40.0, 50.0, 60.0]), np.array([50.0, 50.0, 50.0])) == 0
    assert concordance(np.array([50.0, 50.0]), np.array([40.0, 60.0])) == 0


def test_there_is_no_agreement_to_see_where_all_numbers_are_the_same():
    assert concordance(np.array([50.0, 50.0]), np.array([50.0, 50.0])) == 0
    assert rewards_of(["50%", "50%"], [["50%"], ["50%"]]) == [[0.5], [0.5]]


def test_rewards_are_the_hand_computed_ones():
    # Means 45 and 60. Of 50: 2 * 50 / (25 + 100 + 25); of each 60: 2 * 75 / (56.25 + 100 + 6.25).
    found = rewards_of(["40%", "60%"], [["40%", "50%"], ["60%", "60%"]])
    assert found[0] == pytest.approx([1, 5 / 6], abs=1e-12)
    assert found[1] == pytest.approx([25 / 26, 25 / 26], abs=1e-12)


def test_rewards_put_each_number_in_the_place_of_its_groups_mean():
    rng = np.random.default_rng(2)
    truths, answers = rng.uniform(10, 90, 6).round(2), rng.uniform(10, 90, (6, 4)).round(2)
    found = rewards_of([f"{truth}%" for truth in truths], [[f"{x}%" for x in row] for row in answers])
    for g in range(6):
        for i in range(4):
            predictions = answers.mean(axis=1)
            predictions[g] = answers[g, i]
            assert found[g][i] == pytest.approx((1 + lin(truths, predictions)) / 2, abs=1e-12)


def test_opposite_answers_earn_nothing():
    assert rewards_of(["40%", "60%"], [["60%"], ["40%"]]) == [[pytest.approx(0, abs=1e-12)]] * 2


def test_where_all_answer_with_the_mean_a_step_towards_the_truth_pays_and_one_away_costs():
    found = rewards_of(["30%", "60%", "60%"], [["45%", "50%", "55%"], ["50%"], ["50%"]])
    assert found[0][0] > found[0][1] > found[0][2]
    assert [found[0][1]] == found[1] == found[2] == [pytest.approx(0.5, abs=1e-12)]


def test_the_order_of_the_completions_changes_nothing():
    rows = [(7, "40%", "41%"), (3, "60%", "52%"), (7, "40%", "47%"), (5, "70%", "80%"), (3, "60%", "no")]

    def rewards(order):
        group, truths, texts = zip(*(rows[i] for i in order), strict=True)
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        return concordance_reward(completions, [{"role": "assistant", "content": truth} for truth in truths], group)

    order = [2, 4, 0, 3, 1]
    assert rewards(order) == pytest.approx([rewards(range(5))[i] for i in order], abs=1e-12)


def test_a_completion_without_an_answer_gets_nothing_and_is_not_in_its_groups_mean():
    with_it = rewards_of(["40%", "60%"], [["40%", "50%", "no"], ["60%", "60%"]])
    without = rewards_of(["40%", "60%"], [["40%", "50%"], ["60%", "60%"]])
    assert with_it == [[*without[0], 0.0], without[1]]


@pytest.mark.parametrize("text", ["-1%", "100.5%", "1000%"])
def test_a_number_out_of_range_is_no_answer(text):
    answers = [["40%", text], ["60%", "60%"]]
    assert rewards_of(["40%", "60%"], answers) == rewards_of(["40%", "60%"], [["40%", "no"], ["60%", "60%"]])
    assert rewards_of(["40%", "60%"], answers, valid_range=[-10, 2000])[0][1] > 0


def test_the_ends_of_the_range_are_answers():
    found = rewards_of(["10%", "90%"], [["0%"], ["100%"]])
    assert found == [[pytest.approx((1 + lin([10, 90], [0, 100])) / 2, abs=1e-12)]] * 2
    assert rewards_of(["10%", "90%"], [["0%"], ["100%"]], valid_range=(0.5, 100)) == [[0.0], [None]]


def test_a_prompt_whose_truth_has_no_number_has_no_say_and_changes_nothing():
    without = rewards_of(["40%", "60%"], [["40%", "50%"], ["60%", "60%"]])
    found = rewards_of(["40%", "60%", "fine"], [["40%", "50%"], ["60%", "60%"], ["70%", "none"]])
    assert found == [*without, [None, None]]


def test_without_another_prompt_that_has_an_answer_there_is_nothing_to_agree_with():
    assert rewards_of(["40%"], [["40%", "none"]]) == [[None, None]]
    assert rewards_of(["40%", "60%"], [["40%", "none"], ["none", "none"]]) == [[None, None], [0.0, 0.0]]
    assert rewards_of(["40%", "fine"], [["40%"], ["60%"]]) == [[None], [None]]
    assert rewards_of(["40%", "60%"], [["none"], ["none"]]) == [[None], [None]]


def test_columns_of_different_length_are_refused():
    completions, assistant = (
        [[{"role": "assistant", "content": "5%"}]] * 2,
        [{"role": "assistant", "content": "5%"}] * 2,
    )
    with pytest.raises(ValueError):
        concordance_reward(completions, assistant, [0])
    with pytest.raises(ValueError):
        concordance_reward(completions, assistant[:1], [0, 1])
    with pytest.raises(ValueError):
        concordance_reward(completions[:1], assistant, [0, 1])


def test_it_asks_for_the_whole_step():
    assert concordance_reward.whole_step is True
