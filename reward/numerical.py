"""Reward a completion for how close its number comes to the true one: the original's reward, and a smooth one.

    emphasis = 1 + 0.5 * min(|truth - 50| / 30, 1)                           values far from 50 are rare and matter most

    numerical_video_reward    min(1, 0.1 + 0.9 * max(0, 1 - (error / error_scale)^2) * emphasis)
    smooth_numerical_reward   0.1 + 0.9 * emphasis / 1.5 / (1 + (error / error_scale)^2)

The first is the original system's. Its bound at 1 makes it flat near the truth, the more so the greater the emphasis,
and beyond `error_scale` it is flat again: there it teaches nothing. The second has a slope at every error.

If the truth has no number, every completion gets 0.5; else a completion without a number gets 0, and one with a number
at least 0.1. A reward function takes `(completions, assistant, **kwargs)`, as functions written for TRL do, and returns
a list of floats.
"""

from collections.abc import Callable

from reward.debug_log import log_rewards
from reward.extract import extract_number, says_two_numbers


def range_emphasis(truth: float) -> float:
    """Return 1 for a truth of 50, rising to 1.5 for one of 20 or 80, or farther from 50."""
    return 1 + 0.5 * min(abs(truth - 50) / 30, 1)


def numerical_score(truth: float, prediction: float, error_scale: float = 12.0) -> float:
    """Score a prediction: 1 to 1.5 when exact (range emphasis), falling quadratically to 0 at `error_scale`."""
    relative = (prediction - truth) / error_scale
    return max(0.0, 1 - relative * relative) * range_emphasis(truth)  # `** 2` would raise where this gives inf


def smooth_score(truth: float, prediction: float, error_scale: float = 6.0) -> float:
    """Score a prediction: 2/3 to 1 when exact (range emphasis), half of that at `error_scale`, never 0.

    The slope is largest at an error of `error_scale` / sqrt(3), and falls off beyond as the error's inverse cube.
    """
    relative = (prediction - truth) / error_scale
    return range_emphasis(truth) / 1.5 / (1 + relative * relative)


def numerical_video_reward(completions, assistant, error_scale: float = 12.0, **kwargs) -> list[float]:
    """Reward each completion, from 0 to 1, against the true answer beside it, as the original system does.

    completions[i] is `[{"role": "assistant", "content": text}]`,
    assistant[i] is `{"role": "assistant", "content": answer}`; kwargs: for the debug log.
    error_scale: the error at which only the 0.1 for any number remains. With a large one every guess is rewarded, a
    constant answer too, and nothing can be learned.
    """

    def reward(truth: float, prediction: float, _: int) -> float:
        return min(1.0, 0.1 + 0.9 * numerical_score(truth, prediction, error_scale))

    return reward_numbers(reward, completions, assistant, kwargs)


def smooth_numerical_reward(
    completions, assistant, error_scale: float = 6.0, valid_range: tuple = (0.0, 100.0), is_stopped=None, **kwargs
) -> list[float]:
    """Reward each completion, from 0 to 1, against the true answer beside it, with a slope at every error.

    The arguments are those of `numerical_video_reward`, and: valid_range: numbers outside are no answer, and get 0;
    is_stopped: one per completion, False where it was cut. A completion that was cut, or that says two different
    answers outside its `<think>` parts (`says_two_numbers`), gets 0.1 at the most, so that answers end, and say one.
    """

    def reward(truth: float, prediction: float, i: int) -> float:
        if not valid_range[0] <= prediction <= valid_range[1]:
            return 0.0
        is_cut = is_stopped is not None and not is_stopped[i]
        if is_cut or says_two_numbers(completions[i][0]["content"]):
            return 0.1
        return 0.1 + 0.9 * smooth_score(truth, prediction, error_scale)

    return reward_numbers(reward, completions, assistant, kwargs)


def check_error_scale(error_scale: float = 1.0, **options) -> None:
    """Raise ValueError unless errors can be divided by it; the options are those of --reward_kwargs."""
    if not (isinstance(error_scale, int | float) and error_scale > 0):
        raise ValueError(f"error_scale {error_scale!r}: give a number of points above 0")


numerical_video_reward.check = smooth_numerical_reward.check = check_error_scale  # called before a run begins


def reward_numbers(reward_of: Callable[[float, float, int], float], completions, assistant, kwargs) -> list[float]:
    """Reward the completions by truth, predicted number and index; 0.5 without a true number, 0 without a predicted."""
    rewards = []
    for i, (completion, answer) in enumerate(zip(completions, assistant, strict=True)):
        truth, prediction = extract_number(answer["content"]), extract_number(completion[0]["content"])
        if truth is None:
            rewards.append(0.5)
        elif prediction is None:
            rewards.append(0.0)
        else:
            rewards.append(reward_of(truth, prediction, i))
    log_rewards(completions, assistant, rewards, **kwargs)
    return rewards
