"""Find the reward functions that `--reward_funcs` names, and call them as TRL does."""

import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import numpy as np

import reward
from reward.time_limit import OutOfTime, time_limit

# What every reward function is called with, beside the samples' own keys and `--reward_kwargs`.
ARGUMENTS = """
    completions assistant prompts sample_id completion_ids is_stopped prompt_index step is_training
""".split()
BUILT_IN = {name: value for name, value in vars(reward).items() if callable(value)}
LARGEST = 1e18  # reward: what is larger is a mistake, and float32 ends at 3e38
LARGEST_WEIGHT = 1e6


class RewardError(Exception):
    """A mistake in a reward function or its flags; str() is one line, `details` the user's own traceback if any."""

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details


@dataclass
class RewardFunction:
    """A reward function, ready to be called."""

    name: str  # in TensorBoard
    call: Callable
    weight: float = 1.0  # 0: only a curve
    options: dict = field(default_factory=dict)  # the arguments of `--reward_kwargs` that it takes
    digest: str | None = None  # of the user's file

    @property
    def is_whole_step(self) -> bool:
        """True if it is given the completions of all prompts and ranks at once: its attribute `whole_step`."""
        return getattr(self.call, "whole_step", False)


def load_reward_functions(
    names: list[str], weights: list[float], kwargs: str, valid_range: list[float]
) -> list[RewardFunction]:
    """Return the functions that the flags name; raise RewardError.

    names: of functions in `reward/`, or file.py:function; weights: one each, or none (1 each); kwargs: a JSON object of
    arguments, each given to the functions that have a parameter of this name; so is valid_range. A function may have an
    attribute `check`, which is called with its arguments, and raises ValueError where one is wrong.
    """
    weights = weights or [1.0] * len(names)
    is_each = len(weights) == len(names) and all(abs(weight) <= LARGEST_WEIGHT for weight in weights)  # nan is not
    if not (is_each and any(weights)):
        given = " ".join(f"{weight:g}" for weight in weights)
        raise RewardError(
            f"--reward_weights {given}: give each of {len(names)} reward functions one from {-LARGEST_WEIGHT:g} to "
            f"{LARGEST_WEIGHT:g}, not all of them 0, or leave the flag out"
        )
    try:
        options = {**json.loads(kwargs or "{}")}  # raises TypeError if it is something else than an object
        json.dumps(options, allow_nan=False)  # raises ValueError for NaN and infinity, which JSON does not have
    except (ValueError, TypeError, RecursionError) as error:
        raise RewardError(
            f"--reward_kwargs {kwargs!r} is no JSON object ({error}): write it as '{{\"error_scale\": 8}}'"
        ) from error
    given, functions = options | {"valid_range": valid_range}, {}
    for name, weight in zip(names, weights, strict=True):
        function = load_reward_function(name)
        if functions.setdefault(function.name, function) is not function:
            raise RewardError(f"--reward_funcs: {function.name!r} occurs twice: give functions different names")
        function.weight = weight
        function.options = {name: given[name] for name in own_parameters(function.call) if name in given}
        try:
            if check := getattr(function.call, "check", None):
                check(**function.options)
        except ValueError as error:
            raise RewardError(f"--reward_kwargs: {error}") from error
    taken = {name for function in functions.values() for name in function.options if name != "valid_range"}
    if unknown := options.keys() - taken:
        raise RewardError(
            f"--reward_kwargs: no reward function has a parameter {min(unknown)!r}, beside --valid_range and those "
            "that the trainer gives: correct the name, or leave it out"
        )
    return list(functions.values())


def load_reward_function(name: str) -> RewardFunction:
    """Find one function, and check that it can be called as reward functions are; raise RewardError."""
    if name in BUILT_IN:
        return RewardFunction(name, BUILT_IN[name])
    path, _, function_name = name.rpartition(":")
    where = f"--reward_funcs {name!r}:"
    if not os.path.isfile(path):
        raise RewardError(f"{where} no such function or file: take {', '.join(BUILT_IN)}, or file.py:function")
    try:
        source = Path(path).read_bytes()
        module = import_source(path, source)
    except (Exception, SystemExit) as error:
        message = f"{where} importing {path!r} failed ({one_line(error)}): correct it"
        raise RewardError(message, traceback.format_exc()) from error
    try:
        function = getattr(module, function_name)
        inspect.signature(function).bind_partial(**dict.fromkeys([*ARGUMENTS, "any key of the samples"]))
    except (AttributeError, TypeError, ValueError) as error:
        raise RewardError(
            f"{where} it cannot be called as reward functions are ({error}): correct the name, or define it as "
            "f(completions, assistant, **kwargs), with defaults for parameters of its own"
        ) from error
    return RewardFunction(function_name, function, digest=sha256(source).hexdigest())


@cache
def import_source(path: str, source: bytes) -> ModuleType:
    """Import a file, once for all its functions; not by Python's loader, which may take an older version of it."""
    module = ModuleType(f"reward_file_{sha256(source).hexdigest()[:16]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # some of Python's tools, such as dataclasses, look for it there
    exec(compile(source, path, "exec"), vars(module))
    return module


def own_parameters(function: Callable) -> dict[str, inspect.Parameter]:
    """Return the named parameters of a function that the trainer does not give."""
    parameters = inspect.signature(function).parameters
    collecting = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
    return {name: p for name, p in parameters.items() if p.kind not in collecting and name not in ARGUMENTS}


def check_keys(functions: list[RewardFunction], keys: list[str]) -> None:
    """Raise RewardError if the samples' own keys clash with what functions are given, or one that is needed lacks."""
    for function in functions:
        parameters, is_built_in = own_parameters(function.call), function.call in BUILT_IN.values()
        set_by_flags = parameters if is_built_in else function.options
        if taken := {*ARGUMENTS, *set_by_flags}.intersection(keys):
            raise RewardError(
                f"the samples have a key {min(taken)!r}, under which reward function {function.name} is given "
                "something else, by the trainer or by flags: rename it"
            )
        needed = {name for name, p in parameters.items() if p.default is p.empty}
        if missing := needed - {*keys, *function.options}:
            raise RewardError(
                f"reward function {function.name} needs {min(missing)!r}, a key that no sample has: add it to the "
                "samples, give it with --reward_kwargs, or give the parameter a default"
            )


def keys_of(samples: list) -> list[str]:
    """Return the samples' own keys, each once."""
    return list(dict.fromkeys(key for sample in samples for key in sample.extra))


def columns_of(samples: list, texts: list[str], keys: list[str], **columns) -> dict[str, list]:
    """Return the arguments of reward functions, a list with one entry per text each.

    samples: of `data.sample.Sample`, one per text; keys: the samples' own keys, None where a sample has not got one;
    columns: completion_ids, is_stopped and prompt_index, where they are known.
    """
    return {key: [sample.extra.get(key) for sample in samples] for key in keys} | {
        "prompts": [[{"role": role, "content": text} for role, text in sample.turns] for sample in samples],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "assistant": [{"role": "assistant", "content": sample.answer} for sample in samples],
        "sample_id": [sample.id for sample in samples],
        **columns,
    }


def weighted_sum(rewards: np.ndarray, weights: list[float]) -> np.ndarray:
    """Return the reward of each completion, (F, n) -> (n,): the weighted sum of what F functions say of it, as in TRL.

    nan stands where a function has no say; the others count. A function of weight 0 is only a curve.
    """
    weights = np.array(weights).reshape(-1, 1)
    has_say = ~np.isnan(rewards) & (weights != 0)
    return np.where(has_say.any(axis=0), np.where(has_say, weights * rewards, 0).sum(axis=0), np.nan)


def score_answers(
    functions: list[RewardFunction],
    samples: list,
    texts: list[str],
    keys: list[str],
    sampled: dict[str, list] | None = None,
    timeout: float | None = None,
) -> np.ndarray:
    """Return the reward of a text per sample outside of training, (n,); nan where it is not scored.

    sampled: their completion_ids and is_stopped; without, they count as ended, and their bytes stand in the place of
    tokens. Functions of the whole step have no say: there is no step. The rest is that of `call_reward_function`.
    """
    sampled = sampled or {"completion_ids": [list(text.encode()) for text in texts], "is_stopped": [True] * len(texts)}
    numbers = {sample.id: number for number, sample in enumerate(samples)}
    columns = columns_of(samples, texts, keys, **sampled, prompt_index=[numbers[sample.id] for sample in samples])
    called = [function for function in functions if not function.is_whole_step]
    rewards = [call_reward_function(function, columns, None, timeout) for function in called]
    return weighted_sum(np.reshape(rewards, (len(called), len(texts))), [function.weight for function in called])


def call_reward_function(
    function: RewardFunction, columns: dict[str, list], step: int | None, timeout: float | None = None
) -> np.ndarray:
    """Return the rewards of one function, (n,), nan where it has no say.

    step: None outside of training; timeout: seconds, None for no limit. Raises RewardError if the function fails, takes
    longer, or does not give one finite number or None per completion.
    """
    ids, name = columns["sample_id"], f"reward function {function.name}"
    try:
        with time_limit(timeout):
            found = function.call(**columns, **function.options, step=step, is_training=step is not None)
            rewards = [value if value is None or isinstance(value, str) else float(value) for value in found]
    except (Exception, SystemExit, OutOfTime) as error:
        names = list(dict.fromkeys(ids))  # which of them it was, the function alone knows
        some = ", ".join(map(repr, names[:5])) + ", …" * (len(names) > 5)
        message = f"{name} raised {one_line(error)}, for samples {some}: fix the function or the samples"
        raise RewardError(message, traceback.format_exc()) from error
    if len(rewards) != len(ids):
        raise RewardError(f"{name} gave {len(rewards)} rewards for {len(ids)} completions: it must give one each")
    for value, sample_id in zip(rewards, ids, strict=True):
        if isinstance(value, str) or (value is not None and not abs(value) <= LARGEST):  # nan, too
            raise RewardError(
                f"{name} gave {value!r} for sample {sample_id!r}: give a number up to {LARGEST:g}, or None for no say"
            )
    return np.array(rewards, dtype=float)


def one_line(error: BaseException) -> str:
    """Say what was raised; its message may have several lines."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
