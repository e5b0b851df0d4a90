"""Call the reward functions on completions; a function that fails or takes too long ends the run with one line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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


@dataclass
class Scorer:
    """The reward functions of a run, and what they are called with."""

    functions: list[RewardFunction]
    keys: list[str]  # of the samples' own data
    timeout: float  # seconds, for the completions of a step


def load_scorer(config, keys: list[str]) -> Scorer:
    """Load the reward functions that the flags name, for samples with these keys of their own; raise InputError."""
    flags = config.reward_funcs, config.reward_weights, config.reward_kwargs, config.valid_range
    with input_errors(is_shown=dist.get_rank() == 0):
        functions = load_reward_functions(*flags)
        check_keys(functions, keys)
    return Scorer(functions, keys, config.reward_timeout)


@contextmanager
def input_errors(is_shown: bool = True) -> Iterator[None]:
    """Raise RewardError as InputError, and show the traceback of the user's own function."""
    try:
        yield
    except RewardError as error:
        if worker_failure(error.__cause__):  # PyTorch raises it wherever the main thread is
            raise error.__cause__ from None
        for line in error.details.splitlines() if is_shown else []:
            print(printable(line), file=sys.stderr)  # it may quote foreign text
        raise InputError(str(error)) from error


@dataclass
class Scores:
    """What the reward functions say of the completions of this rank."""

    rewards: Tensor  # (B, G), the weighted sum; nan where a completion is not scored
    by_function: dict[str, Tensor]  # (B, G) each, nan where a function has no say


def score(scorer: Scorer, rollouts: list[Rollout], texts: list[list[str]], step: int) -> Scores:
    """Apply every reward function to the completions of a step; texts: G per rollout. Collective.

    Raises InputError, on all ranks, that names the function and its samples.
    """
    B, G = len(rollouts), len(texts[0])
    columns = columns_of(
        [rollout.prompt.sample for rollout in rollouts for _ in range(G)],
        [text for group in texts for text in group],
        scorer.keys,
        **sampled_columns(rollouts),
        prompt_index=[rollout.prompt.position for rollout in rollouts for _ in range(G)],
    )
    is_padding = [rollout.prompt.is_padding for rollout in rollouts for _ in range(G)]
    own = [function for function in scorer.functions if not function.is_whole_step]
    together = [function for function in scorer.functions if function.is_whole_step]
    rewards = raise_together(call_all, own, columns, step, scorer.timeout)
    if together:
        rewards |= score_whole_step(together, columns, is_padding, step, scorer.timeout)
    by_function = np.array([rewards[function.name] for function in scorer.functions])  # (F, B * G)
    total = weighted_sum(by_function, [function.weight for function in scorer.functions])
    total, *each = torch.tensor(np.vstack([total, by_function]), dtype=torch.float32).view(-1, B, G)
    return Scores(total, {function.name: values for function, values in zip(scorer.functions, each, strict=True)})


def score_whole_step(
    functions: list[RewardFunction], columns: dict[str, list], is_padding: list[bool], step: int, timeout: float
) -> dict[str, np.ndarray]:
    """Apply functions to the completions of all ranks at once, by position; padding gets nan. Collective.

    Rank 0 calls them, so that all ranks have the same rewards, also of a function that draws or asks elsewhere.
    """
    rank, parts = dist.get_rank(), all_gather_object((columns, is_padding))
    places = [(r, i) for r, (_, padding) in enumerate(parts) for i, is_pad in enumerate(padding) if not is_pad]
    places.sort(key=lambda place: parts[place[0]][0]["prompt_index"][place[1]])
    everyone = {name: [parts[r][0][name][i] for r, i in places] for name in columns}
    found = raise_together(call_all, functions if rank == 0 and places else [], everyone, step, timeout)
    rewards = {function.name: np.full(len(is_padding), np.nan) for function in functions}
    for name, values in broadcast_object(found).items():
        for (r, i), value in zip(places, values, strict=True):
            if r == rank:
                rewards[name][i] = value
    return rewards


def sampled_columns(rollouts: list[Rollout]) -> dict[str, list]:
    """Return the sampled tokens of each completion, and whether it ended by itself."""
    rows = [row for r in rollouts for row in zip(r.completion_ids, r.completion_mask, strict=True)]
    is_stopped = [is_stopped for r in rollouts for is_stopped in r.is_stopped.tolist()]
    return {"completion_ids": [ids[mask].tolist() for ids, mask in rows], "is_stopped": is_stopped}


def score_texts(scorer: Scorer, samples: list[Sample], texts: list[str], sampled: dict | None = None) -> np.ndarray:
    """Return the reward of a text per sample outside of training, nan where it is not scored; raise InputError.

    sampled: their `sampled_columns`, if they were sampled.
    """
    with input_errors():
        return score_answers(scorer.functions, samples, texts, scorer.keys, sampled, scorer.timeout)


def call_all(
    functions: list[RewardFunction], columns: dict[str, list], step: int, timeout: float
) -> dict[str, np.ndarray]:
    """Return the rewards of each function; raise InputError."""
    with input_errors():
        return {function.name: call_reward_function(function, columns, step, timeout) for function in functions}
