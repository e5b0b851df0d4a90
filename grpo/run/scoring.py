"""Call the reward functions on completions; one that fails or takes too long ends the run with one line."""

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


def score(
    scorer: Scorer, rollouts: list[Rollout], texts: list[list[str]], step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the rewards of this rank's completions, (B, G), and what each function says of them, (B, G) each.

    The reward is the weighted sum, nan where a completion is not scored; a function gives nan where it has no say.
    texts: G per rollout. Collective; raises InputError, on all ranks, that names the function and its samples.
    """
    B, G = len(rollouts), len(texts[0])
    prompts = [rollout.prompt for rollout in rollouts for _ in range(G)]
    columns = columns_of(
        [prompt.sample for prompt in prompts],
        [text for group in texts for text in group],
        scorer.keys,
        **sampled_columns(rollouts),
        prompt_index=[prompt.position for prompt in prompts],
    )
    is_padding, by_function = [prompt.is_padding for prompt in prompts], []  # (F, B * G)
    for function in scorer.functions:
        if function.is_whole_step:
            by_function.append(call_on_whole_step(function, columns, is_padding, step, scorer.timeout))
        else:
            by_function.append(raise_together(call, function, columns, step, scorer.timeout))
    total = weighted_sum(np.array(by_function), [function.weight for function in scorer.functions])
    total, *each = torch.tensor(np.vstack([total, *by_function]), dtype=torch.float32).view(-1, B, G)
    return total, dict(zip((function.name for function in scorer.functions), each, strict=True))


call = input_errors()(call_reward_function)


def call_on_whole_step(
    function: RewardFunction, columns: dict[str, list], is_padding: list[bool], step: int, timeout: float
) -> np.ndarray:
    """Apply a function to the completions of all ranks at once, by position; padding gets nan. Collective.

    Rank 0 calls it, so that all ranks have the same rewards, also of a function that draws or asks elsewhere.
    """
    places = [(position, i) for i, position in enumerate(columns["prompt_index"])]  # no other rank has the same
    rows = zip(*columns.values(), strict=True)
    own = {place: row for place, row, is_pad in zip(places, rows, is_padding, strict=True) if not is_pad}
    everyone = {place: row for part in all_gather_object(own) for place, row in part.items()}
    order = sorted(everyone)
    together = {name: [everyone[place][n] for place in order] for n, name in enumerate(columns)}
    is_called = dist.get_rank() == 0 and order
    found = raise_together(lambda: call(function, together, step, timeout) if is_called else [])
    reward_of = dict(zip(order, broadcast_object(found), strict=True))
    return np.array([reward_of.get(place, np.nan) for place in places])


def sampled_columns(rollouts: list[Rollout]) -> dict[str, list]:
    """Return the sampled tokens of each completion, and whether it ended by itself."""
    # Copied as a whole, since every copy makes a GPU wait.
    rows = [row for r in rollouts for row in zip(r.completion_ids.cpu(), r.completion_mask.cpu(), strict=True)]
    is_stopped = [is_stopped for r in rollouts for is_stopped in r.is_stopped.tolist()]
    return {"completion_ids": [ids[mask].tolist() for ids, mask in rows], "is_stopped": is_stopped}


@input_errors()
def score_texts(scorer: Scorer, samples: list[Sample], texts: list[str], sampled: dict | None = None) -> np.ndarray:
    """Return the reward of a text per sample outside of training, nan where it is not scored; raise InputError.

    sampled: their `sampled_columns`, if they were sampled.
    """
    return score_answers(scorer.functions, samples, texts, scorer.keys, sampled, scorer.timeout)
