"""The zero-skill line: what answering always the same, without looking, achieves on some samples.

A reward curve says little without it: where most truths are alike, the best constant answer has a high reward already.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from reward.extract import extract_number

MOST_SAMPLES = 1000  # that constant answers are scored on; each is scored 51 times, in two forms


@dataclass
class ZeroSkill:
    """The best that a constant answer achieves."""

    answer: float  # of least mean error: the median of the truths
    mae: float  # its mean error
    rewarded_answer: float | None  # of the highest mean reward; None if none is scored
    reward: float  # its mean reward; nan if none is scored

    def __str__(self) -> str:
        line = f"zero skill: answering always {self.answer:g} has a mean error of {self.mae:.2f}"
        if self.rewarded_answer is not None:
            line += f"; the best mean reward of a constant is {self.reward:.3f}, for {self.rewarded_answer:g}"
        return line


def constants(truths: np.ndarray) -> list[float]:
    """Return at most 51 constant answers among which a good one is: quantiles of the truths, (n,)."""
    return np.unique(np.quantile(truths, np.linspace(0, 1, 51), method="nearest")).tolist()


def constant_texts(truths: np.ndarray) -> list[str]:
    """Return the constant answers as texts, (2 K,): each as it is, and in the form that `format_reward` wants."""
    numbers = [np.format_float_positional(number, trim="-") for number in constants(truths)]
    return [f"{n}%" for n in numbers] + [f"<think></think><answer>{n}%</answer>" for n in numbers]


def constant_rewards(samples: list, truths: np.ndarray, score: Callable[[list, list[str]], list]) -> np.ndarray:
    """Return the rewards of the constant answers at each of n samples, (2 K, n), nan where they are not scored.

    truths: (n,); score: takes samples and a text for each, gives the rewards.
    """
    # A text at a time, so that the time limit is that of a step's completions.
    return np.array([score(samples, [text] * len(samples)) for text in constant_texts(truths)], dtype=float)


def zero_skill(samples: list, score: Callable[[list, list[str]], list]) -> ZeroSkill | None:
    """Find the best constant answer to samples (`data.dataset.Sample`); None if no truth has a number.

    score: see `constant_rewards`. Of many samples, an even choice of a thousand is scored.
    """
    numbers = [(sample, number) for sample in samples if (number := extract_number(sample.answer)) is not None]
    if not numbers:
        return None
    truths = np.array([number for _, number in numbers])
    median = float(np.median(truths))
    chosen = np.linspace(0, len(numbers) - 1, min(len(numbers), MOST_SAMPLES)).round().astype(int)
    rewards = constant_rewards([numbers[i][0] for i in chosen], truths[chosen], score)  # (2 K, n)
    scored = (~np.isnan(rewards)).sum(axis=1)
    means = np.where(scored > 0, np.nansum(rewards, axis=1) / np.maximum(scored, 1), -np.inf)
    best = int(means.argmax())
    found = constants(truths[chosen])[best % (len(means) // 2)] if scored[best] else None
    mae = float(np.abs(truths - median).mean())
    return ZeroSkill(median, mae, found, float(means[best]) if scored[best] else float("nan"))
