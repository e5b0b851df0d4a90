"""How good the answers are: the figures that clinical papers report, each with a bootstrap interval.

Statistics come from scikit-learn and SciPy. Neither has Lin's concordance (`reward/concordance.py`) nor Bland and
Altman's limits of agreement (Lancet 327, 1986, p. 307).

An answer without a number, or with one outside the valid range, counts as the best constant answer (the median of the
truths) in all figures of error: leaving it out would reward a model for not answering where it is unsure.

| n | samples whose truth has a number | N | answers per sample | R | resamples of the samples |
"""

import math
import warnings
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import pearsonr, rankdata
from sklearn.metrics import mean_absolute_error, median_absolute_error, r2_score, root_mean_squared_error

from reward.concordance import concordance

NUM_RESAMPLES = 1000
COUNTS = ("n", "distinct_answers")  # have no interval: a resample repeats samples, and so always has fewer
BLOCK = 2_000_000  # values in an array of resamples, for memory


@dataclass
class Answers:
    """What was answered, and what it is compared with."""

    truths: np.ndarray  # (n,)
    # (K, n): of each of K constant answers (`reward.zero_skill`) at each sample, nan where it is not scored
    constant_rewards: np.ndarray
    numbers: np.ndarray  # (n, N), nan where an answer has no number
    rewards: np.ndarray  # (n, N), nan where an answer was not scored
    is_stopped: np.ndarray  # (n, N), False where an answer was cut at the length limit
    valid_range: list[float]

    @property
    def valid_numbers(self) -> np.ndarray:
        """The numbers, (n, N), with nan in place of those outside the range."""
        lowest, highest = self.valid_range
        is_valid = (self.numbers >= lowest) & (self.numbers <= highest)  # False for nan
        return np.where(is_valid, self.numbers, np.nan)


def median_answers(answers: Answers) -> np.ndarray:
    """Return the median of each sample's valid numbers, (n, 1); nan where it has none."""
    numbers = np.ma.masked_invalid(answers.valid_numbers)
    return np.ma.median(numbers, axis=1, keepdims=True).filled(np.nan)


def best_answers(answers: Answers) -> Answers:
    """Keep the answer with the least error of each sample: N = 1. A bound, since choosing it takes the truth."""
    errors = np.abs(answers.valid_numbers - answers.truths[:, None])  # (n, N)
    best = np.where(np.isnan(errors), np.inf, errors).argmin(axis=1)[:, None]
    of_each = ("numbers", "rewards", "is_stopped")
    return replace(answers, **{name: np.take_along_axis(getattr(answers, name), best, axis=1) for name in of_each})


def figures(answers: Answers, cuts: list[float], num_resamples: int = 0) -> dict[str, dict[str, float | None]]:
    """Return every figure as {"value", "low", "high"}: the bounds hold 95 % of the figure's values over resamples.

    Resampled are samples, with all their answers. None stands for what is undefined, such as the correlation with a
    constant, and for the bounds of mere counts; without resamples there are no bounds. A cut with no truth on one side
    has no figures.
    """
    cuts = [cut for cut in cuts if 0 < (answers.truths < cut).sum() < len(answers.truths)]
    n, N = answers.numbers.shape
    resamples = np.random.default_rng(0).integers(n, size=(n, num_resamples))
    size = max(1, BLOCK // (n * N))
    indices = [np.arange(n)[:, None], *(resamples[:, i : i + size] for i in range(0, num_resamples, size))]
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # about what is undefined
        values, *blocks = [_figures_of(index, answers, cuts) for index in indices]
    result = {name: {"value": float(value[0]) if math.isfinite(value[0]) else None} for name, value in values.items()}
    for name in result if num_resamples else ():
        spread = np.concatenate([block[name] for block in blocks])
        spread = spread[np.isfinite(spread)] if name not in COUNTS else spread[:0]
        low, high = np.quantile(spread, [0.025, 0.975]).tolist() if len(spread) else (None, None)
        result[name] |= {"low": low, "high": high}
    return result


def _figures_of(index: np.ndarray, answers: Answers, cuts: list[float]) -> dict[str, np.ndarray]:
    """Compute all figures of R resamples; index: (n, R) samples. Returns (R,) each, not finite where undefined."""
    (n, R), N = index.shape, answers.numbers.shape[1]

    def pick(values: np.ndarray) -> np.ndarray:  # (n, N) -> (n·N, R)
        return values[index].transpose(0, 2, 1).reshape(n * N, R)

    valid, is_parsed = answers.valid_numbers, ~np.isnan(answers.numbers)
    chosen = answers.truths[index]  # (n, R)
    predicted = pick(np.where(np.isnan(valid), np.median(answers.truths), valid))
    result = {
        "n": np.full(R, n),
        "parse_rate": pick(is_parsed).mean(axis=0),
        "reward": np.nanmean(pick(answers.rewards), axis=0),
        **errors(np.repeat(chosen, N, axis=0), predicted, cuts),
        "distinct_answers": np.array([len(np.unique(column[~np.isnan(column)])) for column in pick(answers.numbers).T]),
        "out_of_range": pick(is_parsed & np.isnan(valid)).sum(axis=0),
        "clipped_ratio": 1 - pick(answers.is_stopped).mean(axis=0),
        "zero_skill_answer": np.median(chosen, axis=0),
        "zero_skill_mae": np.abs(chosen - np.median(chosen, axis=0)).mean(axis=0),
    }
    counts = np.stack([np.bincount(column, minlength=n) for column in index.T])  # (R, n), how often each was drawn
    is_scored = ~np.isnan(answers.constant_rewards)
    means = (counts @ np.nan_to_num(answers.constant_rewards).T) / (counts @ is_scored.T)  # (R, K)
    result["zero_skill_reward"] = np.where(np.isnan(means), -np.inf, means).max(axis=1)  # not finite: undefined
    return result


def errors(truths: np.ndarray, predicted: np.ndarray, cuts: list[float]) -> dict[str, np.ndarray]:
    """Compare predictions with truths, (n, R) each, column by column. Returns (R,) each, nan where undefined."""
    difference = predicted - truths
    bias, spread = difference.mean(axis=0), difference.std(axis=0, ddof=1)  # of the population, estimated
    by_column, undefined = {"multioutput": "raw_values"}, np.full(len(bias), np.nan)
    has_several = len(truths) > 1
    result = {
        "mae": mean_absolute_error(truths, predicted, **by_column),
        "median_error": median_absolute_error(truths, predicted, **by_column),
        "rmse": root_mean_squared_error(truths, predicted, **by_column),
        "r2": r2_score(truths, predicted, **by_column, force_finite=False) if has_several else undefined,
        "pearson": pearsonr(truths, predicted, axis=0).statistic if has_several else undefined,
        "ccc": concordance(truths.T, predicted.T),
        "bias": bias,
        "limit_low": bias - 1.96 * spread,
        "limit_high": bias + 1.96 * spread,
        "within_5": (np.abs(difference) <= 5).mean(axis=0),
        "sd_ratio": (predicted - predicted[0]).std(axis=0) / truths.std(axis=0),  # a constant has exactly 0
    }
    for cut in cuts:
        is_below = truths < cut
        result[f"auc_{cut:g}"] = area_under_curve(is_below, -predicted)
        result[f"accuracy_{cut:g}"] = (is_below == (predicted < cut)).mean(axis=0)
        result[f"mae_{cut:g}"] = (np.abs(difference) * is_below).sum(axis=0) / is_below.sum(axis=0)
    return result


def area_under_curve(is_positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the area under each column's ROC curve, (n, R) -> (R,); nan if a class is empty.

    From the positives' ranks (Mann and Whitney): scikit-learn's roc_auc_score, which gives the same, takes a second
    for a thousand columns.
    """
    positives = is_positive.sum(axis=0)
    ranks = np.where(is_positive, rankdata(scores, axis=0), 0).sum(axis=0)
    return (ranks - positives * (positives + 1) / 2) / (positives * (len(scores) - positives))
