"""Call the reward functions on completions; report which function failed or timed out, and on which sample."""

import math
import sys
import traceback
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.loader import worker_failure
from data.sample import InputError, Sample
from grpo.ranks import all_gather_object, broadcast_object, printable, raise_together
from grpo.rollout import Rollout
from reward.functions import (
    RewardError,
    RewardFunction,
    call_reward_function,
    check_keys,
    columns_of,
    load_reward_functions,
    score_answers,
    weighted_sum,
)
from reward.time_limit import OutOfTime, time_limit


@dataclass
class Scorer:
    """The reward functions of a run, and what they are called with."""

    functions: list[RewardFunction]
    keys: list[str]  # of the samples' own data
    timeout: float  # seconds, for the completions of a step

    @property
    def weights(self) -> list[float]:
        """The weight of each function."""
        return [function.weight for function in self.functions]


def load_scorer(config, keys: list[str]) -> Scorer:
    """Load the reward functions that the flags name, for samples with these keys of their own; raise InputError."""
    flags, keys = (config.reward_funcs, config.reward_weights, config.reward_kwargs), list(dict.fromkeys(keys))
    try:
        functions = load_reward_functions(*flags, config.valid_range)
        check_keys(functions, keys)
    except RewardError as error:
        if dist.get_rank() == 0:
            show(error.details)
        raise InputError(str(error)) from error
    return Scorer(functions, keys, config.reward_timeout)


@dataclass
class Scores:
    """What the reward functions say of the completions of this rank."""

    rewards: Tensor  # (B, G), the weighted sum; nan where a completion is not scored
    by_function: dict[str, Tensor]  # (B, G) each, nan where a function has no say


def score(scorer: Scorer, rollouts: list[Rollout], texts: list[list[str]], step: int) -> Scores:
    """Apply every reward function to the completions of a step; texts: G per rollout. Collective.

    Raises InputError, on all ranks, that names function and sample.
    """
    B, G = len(rollouts), len(texts[0])
    samples = [rollout.prompt.sample for rollout in rollouts for _ in range(G)]
    columns = columns_of(
        samples,
        [text for group in texts for text in group],
        scorer.keys,
        **sampled_columns(rollouts),
        prompt_index=[rollout.prompt.position for rollout in rollouts for _ in range(G)],
    )
    is_padding = [rollout.prompt.is_padding for rollout in rollouts for _ in range(G)]
    own = [function for function in scorer.functions if not function.is_whole_step]
    rewards = raise_together(call_all, own, columns, step, scorer.timeout)
    together = [function for function in scorer.functions if function.is_whole_step]
    if together:
        rewards |= score_whole_step(together, columns, is_padding, step, scorer.timeout)
    by_function = [rewards[function.name] for function in scorer.functions]
    total, *each = (with_nan(values).view(B, G) for values in [weighted_sum(by_function, scorer.weights), *by_function])
    return Scores(total, {function.name: values for function, values in zip(scorer.functions, each, strict=True)})


def with_nan(rewards: list[float | None]) -> Tensor:
    """Return rewards as a tensor, with nan in place of None."""
    return torch.tensor([math.nan if reward is None else reward for reward in rewards])


def score_whole_step(
    functions: list[RewardFunction], columns: dict[str, list], is_padding: list[bool], step: int, timeout: float
) -> dict[str, list[float | None]]:
    """Apply functions to the completions of all ranks at once, by position; padding gets None. Collective.

    Rank 0 calls them, so that all ranks have the same rewards, also of a function that draws or asks elsewhere.
    """
    rank, rows = dist.get_rank(), [i for i, is_pad in enumerate(is_padding) if not is_pad]
    parts = all_gather_object({name: [values[i] for i in rows] for name, values in columns.items()})
    everyone = {name: [value for part in parts for value in part[name]] for name in columns}
    order = sorted(range(len(everyone["prompt_index"])), key=everyone["prompt_index"].__getitem__)
    by_position = {name: [values[i] for i in order] for name, values in everyone.items()}
    found = raise_together(call_all, functions if rank == 0 and order else [], by_position, step, timeout)
    found = broadcast_object(found)
    start = sum(len(part["prompt_index"]) for part in parts[:rank])  # of this rank's completions among everyone's
    place = {i: n for n, i in enumerate(order)}
    own = {row: place[start + n] for n, row in enumerate(rows)}
    return {f.name: [found[f.name][own[i]] if i in own else None for i in range(len(is_padding))] for f in functions}


def sampled_columns(rollouts: list[Rollout]) -> dict[str, list]:
    """Return the sampled tokens of each completion, and whether it ended by itself."""
    rows = [zip(r.completion_ids, r.completion_mask, r.is_stopped.tolist(), strict=True) for r in rollouts]
    pairs = [(ids[mask].tolist(), is_stopped) for row in rows for ids, mask, is_stopped in row]
    return {"completion_ids": [ids for ids, _ in pairs], "is_stopped": [is_stopped for _, is_stopped in pairs]}


def score_texts(scorer: Scorer, samples: list[Sample], texts: list[str], sampled: dict | None = None) -> np.ndarray:
    """Return the reward of a text per sample outside of training, nan where it is not scored; raise InputError.

    sampled: their `sampled_columns`, if they were sampled.
    """
    call = partial(call_reward, timeout=scorer.timeout)
    return np.array(score_answers(scorer.functions, samples, texts, scorer.keys, sampled, call), dtype=float)


def call_all(
    functions: list[RewardFunction], columns: dict[str, list], step: int | None, timeout: float
) -> dict[str, list[float | None]]:
    """Return the rewards of each function; raise InputError."""
    return {function.name: call_reward(function, columns, step, timeout) for function in functions}


def call_reward(
    function: RewardFunction, columns: dict[str, list], step: int | None, timeout: float
) -> list[float | None]:
    """Return the rewards of one function; raise InputError."""
    name, fix = f"reward function {function.name}", "fix the function or the sample"
    try:
        with time_limit(timeout):
            return call_reward_function(function, columns, step)
    except RewardError as error:
        raise InputError(f"{error}: {fix}") from error
    except OutOfTime as error:
        raise InputError(
            f"{name} took longer than --reward_timeout {timeout:g} seconds, and too long for "
            f"{failing_sample(function, columns, step, timeout)}: {fix}, or raise the limit"
        ) from error
    except (Exception, SystemExit) as error:
        if worker_failure(error):  # PyTorch raises it wherever the main thread is
            raise
        show(traceback.format_exc())  # it is the user's own function
        what = str(error).splitlines()[0] if str(error) else ""
        raise InputError(
            f"{name} raised {type(error).__name__} ({what}) for {failing_sample(function, columns, step, timeout)}: "
            f"{fix}"
        ) from error


def show(details: str) -> None:
    """Print a traceback; its lines may quote foreign text."""
    for line in details.splitlines():
        print(printable(line), file=sys.stderr)


def failing_sample(function: RewardFunction, columns: dict[str, list], step: int | None, timeout: float) -> str:
    """Name the sample that made a reward function fail or take too long, by giving it one completion at a time.

    Worth the second run: it happens once, at the end of a run, and without it the user would have to bisect the step.
    """
    if function.is_whole_step:
        return f"the step that begins with sample {columns['sample_id'][0]!r}"
    share = timeout / len(columns["sample_id"])
    for i, sample_id in enumerate(columns["sample_id"]):
        try:
            with time_limit(share):
                call_reward_function(function, {name: [values[i]] for name, values in columns.items()}, step)
        except (Exception, SystemExit, OutOfTime):
            return f"sample {sample_id!r}"
    return f"sample {columns['sample_id'][0]!r}"
