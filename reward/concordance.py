"""Reward a completion for what it does to the agreement of a whole step (arXiv:2605.01402).

    prediction of a prompt   the mean of its group's numbers
    reward of completion i   (1 + CCC) / 2, with its own number in the place of its group's mean

Lin's concordance correlation coefficient (Biometrics 45, 1989, p. 255) is 1 only on the identity line, and 0 if all
predictions are the same: answering always with the mean, at which rewards of single answers let a model end where
truths are mostly alike, earns as little here as chance does: a half.

    CCC = 2 cov(x, y) / (var(x) + var(y) + (mean(x) - mean(y))^2)

| B | prompts of the step whose truth and group have a number |
"""

import numpy as np

from reward.extract import extract_number


def concordance(truths: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return Lin's coefficient of predictions with truths, (…, B) each -> (…); 0 where all are the same."""
    x, y = (values - values[..., :1] for values in (predictions, truths))  # so that what is constant is exactly 0
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in (x, y))
    bias = predictions.mean(axis=-1) - truths.mean(axis=-1)
    spread = (x * x).mean(axis=-1) + (y * y).mean(axis=-1) + bias * bias
    return 2 * (x * y).mean(axis=-1) / np.where(spread > 0, spread, 1)


def concordance_reward(
    completions, assistant, prompt_index, valid_range: tuple = (0.0, 100.0), **kwargs
) -> list[float | None]:
    """Reward each completion for the agreement of the step's predictions with the truths, from 0 to 1.

    The arguments are those of `reward.numerical.numerical_video_reward`, for the completions of all prompts of the
    step, and: prompt_index: the number of each completion's prompt; valid_range: numbers outside are no answer.
    A completion without an answer gets 0. None, no say, if its truth has no number, or no other prompt has an answer.
    """
    numbers = [extract_number(completion[0]["content"]) for completion in completions]
    numbers = [x if x is not None and valid_range[0] <= x <= valid_range[1] else None for x in numbers]
    truth_of = {g: extract_number(answer["content"]) for g, answer in zip(prompt_index, assistant, strict=True)}
    by_group = {g: [] for g, truth in truth_of.items() if truth is not None}
    for g, number in zip(prompt_index, numbers, strict=True):
        if g in by_group and number is not None:
            by_group[g].append(number)
    mean_of = {g: float(np.mean(answers)) for g, answers in by_group.items() if answers}
    rewards = []
    for g, number in zip(prompt_index, numbers, strict=True):
        others = [other for other in mean_of if other != g]
        if g not in by_group or not others:
            rewards.append(None)
        elif number is None:
            rewards.append(0.0)
        else:
            truths = np.array([truth_of[g], *(truth_of[other] for other in others)])
            predictions = np.array([number, *(mean_of[other] for other in others)])
            rewards.append(float(1 + concordance(truths, predictions)) / 2)
    return rewards


concordance_reward.whole_step = True  # it is given the completions of all prompts and ranks at once
