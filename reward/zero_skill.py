"""The zero-skill line: what answering always the same, without looking, achieves on some samples.

A reward curve says little without it: where most truths are alike, the best constant answer has a high reward already.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from reward.functions import RewardError, RewardFunction, score_answers
from reward.time_limit import OutOfTime, time_limit

MOST_SAMPLES = 1000  # that constant answers are scored on at the start of a run
BLOCK = 64  # texts that a function is given at a time
MOST_SECONDS = 10.0  # for all of them


@dataclass
class ZeroSkill:
    """The best that a constant answer achieves."""

    answer: float  # of least mean error: the median of the truths
    mae: float  # its mean error
    rewarded_answer: float | None = None  # of the highest mean reward; None if there is none
    reward: float | None = None  # its mean reward

    def __str__(self) -> str:
        line = f"zero skill: answering always {self.answer:g} has a mean error of {self.mae:.2f}"
        if self.reward is None:
            return line
        return f"{line}; the best mean reward of a constant is {self.reward:.3f}, for {self.rewarded_answer:g}"


def constants(truths: np.ndarray) -> list[float]:
    """Return at most 51 constant answers among which a good one is: quantiles of the truths, (n,)."""
    return np.unique(np.quantile(truths, np.linspace(0, 1, 51), method="nearest")).tolist()


def constant_texts(truths: np.ndarray) -> list[str]:
    """Return the constant answers as texts, (2 K,): each as it is, and in the form that `format_reward` wants."""
    numbers = [np.format_float_positional(number, trim="-") for number in constants(truths)]
    return [f"{n}%" for n in numbers] + [f"<think></think><answer>{n}%</answer>" for n in numbers]


def constant_rewards(functions: list[RewardFunction], samples: list, truths: np.ndarray, keys: list[str]) -> np.ndarray:
    """Return the rewards of the constant answers at each of n samples, (2 K, n), nan where they are not scored.

    truths: (n,); keys: see `score_answers`. Nothing is scored where functions of the whole step have a weight, since
    there is no step, and where one is slow, or fails on a text that no model would write.
    """
    texts, weighted = constant_texts(truths), [function for function in functions if function.weight]
    blocks = [samples[first : first + BLOCK] for first in range(0, len(samples), BLOCK)]

    def rewards_of(text: str) -> np.ndarray:
        return np.concatenate([score_answers(weighted, block, [text] * len(block), keys) for block in blocks])

    if not any(function.is_whole_step for function in weighted):
        with suppress(RewardError, OutOfTime), time_limit(MOST_SECONDS):  # on sampled answers an error is reported
            return np.array([rewards_of(text) for text in texts])
    return np.full((len(texts), len(samples)), np.nan)


def zero_skill(
    functions: list[RewardFunction], samples: Sequence, truths: np.ndarray, keys: list[str]
) -> ZeroSkill | None:
    """Find the best constant answer to samples (`data.sample.Sample`); None if no truth has a number.

    truths: (n,), nan where there is none. Of many samples, an even choice of a thousand is scored.
    """
    places = np.flatnonzero(~np.isnan(truths))
    if not len(places):
        return None
    truths = truths[places]
    median = float(np.median(truths))
    found = ZeroSkill(median, float(np.abs(truths - median).mean()))
    chosen = np.linspace(0, len(truths) - 1, min(len(truths), MOST_SAMPLES)).round().astype(int)
    rewards = constant_rewards(functions, [samples[i] for i in places[chosen]], truths[chosen], keys)  # (2 K, n)
    means = np.ma.masked_invalid(rewards).mean(axis=1).filled(-np.inf)  # over what is scored
    if means.max() > -np.inf:
        found.reward = float(means.max())
        found.rewarded_answer = constants(truths[chosen])[int(means.argmax()) % (len(means) // 2)]
    return found
