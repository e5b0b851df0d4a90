"""Reward functions for tests of whole runs, named as a user names them: `tests/grpo/rewards.py:by_length`."""

import os
import time
from contextlib import suppress

from reward.numerical import numerical_video_reward


def named(*functions: str) -> list[str]:
    """Return the flag that names functions of this file."""
    return ["--reward_funcs", *(f"{__file__}:{function}" for function in functions)]


def by_length(completions, **kwargs):
    return [len(completion[0]["content"]) / 10 for completion in completions]


def zero_or_one(completions, **kwargs):
    return [int(len(completion[0]["content"]) > 4) for completion in completions]


def constant(completions, **kwargs):
    return [0.3] * len(completions)


def constant_but_for_s2(completions, sample_id, **kwargs):
    lengths = by_length(completions)
    return [length if name == "s2" else 0.3 for name, length in zip(sample_id, lengths, strict=True)]


def half_missing(completions, **kwargs):
    return [None if i % 4 < 2 else reward for i, reward in enumerate(by_length(completions))]


def never(completions, **kwargs):
    return [None] * len(completions)


def too_few(completions, **kwargs):
    return [1.0]


def raising(completions, sample_id, **kwargs):
    if "s3" in sample_id:
        raise KeyError("no such hospital")
    return [0.0] * len(completions)


def infinite(completions, sample_id, **kwargs):
    return [float("inf") if name == "s3" else 0.0 for name in sample_id]


def by_rank_of_length(completions, prompt_index, **kwargs):
    """Of the whole step: the share of all completions that are shorter, less that of one's own group."""
    assert prompt_index == sorted(prompt_index)  # for any number of ranks
    lengths = [len(completion[0]["content"]) for completion in completions]
    pairs = list(zip(lengths, prompt_index, strict=True))
    return [
        sum(other < length for other in lengths) / len(lengths) - sum(x < length and h == g for x, h in pairs) / 8
        for length, g in pairs
    ]


by_rank_of_length.whole_step = True


def raising_on_the_whole_step(completions, **kwargs):
    raise ValueError("no such step")


raising_on_the_whole_step.whole_step = True


def watched(completions, sample_id, **columns):
    """Append the ids of each call to the file WATCHED; with INTERRUPT, press Ctrl-C in the third batch of two."""
    if sample_id == ["s4", "s5"] and "INTERRUPT" in os.environ:
        raise KeyboardInterrupt
    with open(os.environ["WATCHED"], "a") as file:
        file.write(" ".join(sample_id) + "\n")
    return numerical_video_reward(completions, **columns)


class Fault(BaseException):
    """No InputError: a bug, as far as the program knows."""


def faulty_reward(completions, sample_id, step, **columns):
    """Fail at step 2 on one rank (-1: on all), as the environment's FAULT and FAULTY_RANK say."""
    fault, rank = os.environ.get("FAULT", ""), int(os.environ.get("FAULTY_RANK", "0"))
    if step == 2 and rank in (-1, int(os.environ["RANK"])):
        if fault == "raises":
            raise Fault("a bug on one rank")
        if fault == "complains":
            raise ValueError("\x1b[31mno\rgood\u202e\nreward")
    if fault == "hangs" and step and "s1" in sample_id:
        with suppress(BaseException):  # it does not let go at once
            time.sleep(600)
        time.sleep(600)
    if fault == "huge" and step in (2, 3) and rank in (-1, int(os.environ["RANK"])):
        return [1e18] + [0.0] * (len(completions) - 1)  # with a weight of 1e6, the gradient's square is infinite
    return [float(len(completion[0]["content"])) for completion in completions]
