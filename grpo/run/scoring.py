"""Call reward functions the way TRL does, and name whoever fails or does not come back."""

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from data.dataset import InputError
from grpo.ranks import printable
from grpo.rollout import Rollout


class OutOfTime(BaseException):
    """A reward function takes too long. Not an Exception, which the function might catch."""


def score(functions: list, rollouts: list[Rollout], texts: list[str], step: int, timeout: float) -> dict[str, Tensor]:
    """Apply every reward function to all completions of this rank, each within `timeout` seconds; texts: B·G.

    Returns {function name: (B, G)}, nan where a function gives None. Raises InputError that names function and sample.
    """
    B, G = len(rollouts), len(texts) // len(rollouts)
    samples = [rollout.prompt.sample for rollout in rollouts for _ in range(G)]
    columns = {
        "prompts": [[{"role": role, "content": text} for role, text in sample.turns] for sample in samples],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "assistant": [{"role": "assistant", "content": sample.answer} for sample in samples],
        "sample_id": [sample.id for sample in samples],
    }
    rewards = {name_of(function): call_reward(function, columns, step, timeout).view(B, G) for function in functions}
    if len(rewards) < len(functions):
        raise InputError(f"the reward functions {', '.join(map(name_of, functions))} need names of their own")
    return rewards


def name_of(function) -> str:
    """Name a reward function as TensorBoard does; a `functools.partial` is named after what it calls."""
    return function.func.__name__ if isinstance(function, partial) else function.__name__


def call_reward(function, columns: dict[str, list], step: int, timeout: float) -> Tensor:
    """Return the rewards of one function, (completions,)."""
    name, mend = f"reward function {name_of(function)}", "mend the function or the sample"
    try:
        with time_limit(timeout):
            rewards = [float("nan") if reward is None else float(reward) for reward in function(**columns, step=step)]
    except OutOfTime as error:
        raise InputError(
            f"{name} took longer than --reward_timeout {timeout:g} seconds, and too long for sample "
            f"{culprit(function, columns, step, timeout)!r}: {mend}, or raise the limit"
        ) from error
    except Exception as error:
        for line in traceback.format_exc().splitlines():  # the function is the user's own: they will want to see where
            print(printable(line), file=sys.stderr)
        what = str(error).splitlines()[0] if str(error) else ""
        raise InputError(
            f"{name} raised {type(error).__name__} ({what}) for sample "
            f"{culprit(function, columns, step, timeout)!r}: {mend}"
        ) from error
    if len(rewards) != len(columns["completions"]):
        raise InputError(
            f"{name} gave {len(rewards)} rewards for {len(columns['completions'])} "
            f"completions, the first of sample {columns['sample_id'][0]!r}: it must give one each"
        )
    return torch.tensor(rewards)


def culprit(function, columns: dict[str, list], step: int, timeout: float) -> str:
    """Find the first sample at which a reward function fails, or takes more than its share of the time, when it gets
    one completion at a time."""
    share = timeout / len(columns["sample_id"])
    for i, sample_id in enumerate(columns["sample_id"]):
        try:
            with time_limit(share):
                list(function(**{name: [values[i]] for name, values in columns.items()}, step=step))
        except (Exception, OutOfTime):
            return sample_id
    return columns["sample_id"][0]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in what runs too long, and each second again should it catch that; in the main thread alone."""

    def interrupt(number, frame):
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
