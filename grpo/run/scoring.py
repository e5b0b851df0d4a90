"""Call reward functions the way TRL does; report which function failed or timed out, and on which sample."""

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from data.dataset import InputError, Sample
from data.loader import worker_failure
from grpo.ranks import printable
from grpo.rollout import Rollout


class OutOfTime(BaseException):
    """A reward function takes too long. Not an Exception, which the function might catch."""


def score(functions: list, rollouts: list[Rollout], step: int, timeout: float) -> dict[str, Tensor]:
    """Apply every reward function to all completions of this rank, each within `timeout` seconds.

    Returns {function name: (B, G)}, nan where a function gives None. Raises InputError that names function and sample.
    """
    B, G = len(rollouts), len(rollouts[0].texts)
    samples = [rollout.prompt.sample for rollout in rollouts for _ in range(G)]
    texts = [text for rollout in rollouts for text in rollout.texts]
    rewards = score_texts(functions, samples, texts, step, timeout)
    return {name: values.float().view(B, G) for name, values in rewards.items()}


def score_texts(
    functions: list, samples: list[Sample], texts: list[str], step: int | None, timeout: float
) -> dict[str, Tensor]:
    """Score one text per sample: {function name: (texts,) float64}; see `score`. step: None outside of training."""
    columns = {
        "prompts": [[{"role": role, "content": text} for role, text in sample.turns] for sample in samples],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "assistant": [{"role": "assistant", "content": sample.answer} for sample in samples],
        "sample_id": [sample.id for sample in samples],
    }
    rewards = {name_of(function): call_reward(function, columns, step, timeout) for function in functions}
    if len(rewards) < len(functions):
        raise InputError(f"the reward functions {', '.join(map(name_of, functions))} must have different names")
    return rewards


def name_of(function) -> str:
    """Return the name of a reward function in TensorBoard; that of the function inside a `functools.partial`."""
    return function.func.__name__ if isinstance(function, partial) else function.__name__


def call_reward(function, columns: dict[str, list], step: int | None, timeout: float) -> Tensor:
    """Return the rewards of one function, (completions,)."""
    name, fix = f"reward function {name_of(function)}", "fix the function or the sample"
    try:
        with time_limit(timeout):
            rewards = [float("nan") if reward is None else float(reward) for reward in apply(function, columns, step)]
    except OutOfTime as error:
        raise InputError(
            f"{name} took longer than --reward_timeout {timeout:g} seconds, and too long for sample "
            f"{failing_sample(function, columns, step, timeout)!r}: {fix}, or raise the limit"
        ) from error
    except Exception as error:
        if worker_failure(error):  # PyTorch raises it wherever the main thread is
            raise
        for line in traceback.format_exc().splitlines():  # it is the user's own function: show where it failed
            print(printable(line), file=sys.stderr)
        what = str(error).splitlines()[0] if str(error) else ""
        raise InputError(
            f"{name} raised {type(error).__name__} ({what}) for sample "
            f"{failing_sample(function, columns, step, timeout)!r}: {fix}"
        ) from error
    if len(rewards) != len(columns["completions"]):
        raise InputError(
            f"{name} gave {len(rewards)} rewards for {len(columns['completions'])} "
            f"completions, the first of sample {columns['sample_id'][0]!r}: it must give one each"
        )
    return torch.tensor(rewards, dtype=torch.float64)


def apply(function, columns: dict[str, list], step: int | None):
    """Call a reward function as TRL does; it also learns the step, and whether this is training."""
    return function(**columns, step=step, is_training=step is not None)


def failing_sample(function, columns: dict[str, list], step: int | None, timeout: float) -> str:
    """Name the sample that made a reward function fail or take too long, by giving it one completion at a time.

    Worth the second run: it happens once, at the end of a run, and without it the user would have to bisect the step.
    """
    share = timeout / len(columns["sample_id"])
    for i, sample_id in enumerate(columns["sample_id"]):
        try:
            with time_limit(share):
                list(apply(function, {name: [values[i]] for name, values in columns.items()}, step))
        except (Exception, OutOfTime):
            return sample_id
    return columns["sample_id"][0]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in code that runs too long, and again each second if it catches that; main thread only."""

    def interrupt(number, frame):
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
