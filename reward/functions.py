"""Find the reward functions that `--reward_funcs` names, and call them as TRL does."""

import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import reward

# What every reward function is called with, beside the samples' own keys and `--reward_kwargs`.
ARGUMENTS = """
    completions assistant prompts sample_id completion_ids is_stopped prompt_index step is_training
""".split()


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
    def is_built_in(self) -> bool:
        """True if it is one of `reward/`."""
        return getattr(reward, self.name, None) is self.call

    @property
    def is_whole_step(self) -> bool:
        """True if it is given the completions of all prompts and ranks at once: its attribute `whole_step`."""
        return getattr(self.call, "whole_step", False)


def load_reward_functions(
    names: list[str], weights: list[float], kwargs: str, valid_range: list[float]
) -> list[RewardFunction]:
    """Return the functions that the flags name; raise RewardError.

    names: of functions in `reward/`, or file.py:function; weights: one each, or none (1 each); kwargs: a JSON object of
    arguments, each given to the functions that have a parameter of this name; so is valid_range.
    """
    if not names:
        raise RewardError("--reward_funcs: name at least one reward function")
    if weights and len(weights) != len(names):
        raise RewardError(
            f"--reward_weights: {len(weights)} weights for {len(names)} reward functions: give one for each, or none"
        )
    if not all(abs(weight) <= LARGEST_WEIGHT for weight in weights):  # nan, too
        given = " ".join(f"{weight:g}" for weight in weights)
        raise RewardError(f"--reward_weights {given}: give numbers from {-LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}")
    if weights and not any(weights):
        raise RewardError(
            "--reward_weights: all are 0, so that there is nothing to learn from: give one another weight"
        )
    options = read_kwargs(kwargs)
    functions = [load_reward_function(name) for name in names]
    called = [function.name for function in functions]
    if twice := [name for name in called if called.count(name) > 1]:
        raise RewardError(f"--reward_funcs: {twice[0]!r} occurs twice: give functions different names")
    for function, weight in zip(functions, weights or [1.0] * len(functions), strict=True):
        taken = own_parameters(function.call)
        given = {"valid_range": valid_range} | options
        function.weight = weight
        function.options = {name: value for name, value in given.items() if name in taken}
        scale = function.options.get("error_scale", 1)
        if function.is_built_in and not (isinstance(scale, int | float) and scale > 0):
            raise RewardError(f"--reward_kwargs: error_scale {scale!r}: give a number of points above 0")
    if unknown := [name for name in options if not any(name in function.options for function in functions)]:
        raise RewardError(
            f"--reward_kwargs: no reward function has a parameter {unknown[0]!r}: correct the name, or leave it out"
        )
    return functions


def read_kwargs(text: str) -> dict:
    """Parse --reward_kwargs; raise RewardError."""
    try:
        options = json.loads(text or "{}")
        json.dumps(options, allow_nan=False)  # raises ValueError for NaN and infinity, which JSON does not have
    except (ValueError, RecursionError) as error:
        raise RewardError(
            f"--reward_kwargs {text!r} is not JSON ({error}): write it as '{{\"error_scale\": 8}}'"
        ) from error
    if not isinstance(options, dict):
        raise RewardError(f"--reward_kwargs {text!r} is no JSON object: write it as '{{\"error_scale\": 8}}'")
    if "valid_range" in options:
        raise RewardError("--reward_kwargs: valid_range is a flag of its own: give it as --valid_range")
    if own := [name for name in options if name in ARGUMENTS]:
        raise RewardError(f"--reward_kwargs: {own[0]!r} is given to reward functions by the trainer: leave it out")
    return options


def load_reward_function(name: str) -> RewardFunction:
    """Find one function, and check that it can be called as reward functions are; raise RewardError."""
    path, colon, function_name = name.rpartition(":")
    if not colon:
        if name not in reward.__all__:
            raise RewardError(
                f"--reward_funcs {name!r}: there is no such function: take {', '.join(reward.__all__)}, or "
                "file.py:function"
            )
        return RewardFunction(name, getattr(reward, name))
    where = f"--reward_funcs {name!r}"
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        raise RewardError(f"{where}: {path!r} cannot be read ({error.strerror}): correct the path") from error
    if not path.endswith(".py"):
        raise RewardError(f"{where}: {path!r} is no Python file: name one that ends in .py")
    try:
        module = import_source(path, source)
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RewardError(f"{where}: importing {path!r} failed ({what}): correct it", traceback.format_exc()) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RewardError(f"{where}: {path!r} has no function {function_name!r}: correct the name")
    check_signature(function, where)
    return RewardFunction(function_name, function, digest=sha256(source).hexdigest())


@cache
def import_source(path: str, source: bytes) -> ModuleType:
    """Import what a file holds, once for all functions that are taken from it.

    Not by Python's loader, which may take an older version from its cache.
    """
    module = ModuleType(f"reward_file_{sha256(source).hexdigest()[:16]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # some of Python's tools, such as dataclasses, look for it there
    exec(compile(source, path, "exec"), vars(module))
    return module


def own_parameters(function: Callable) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function that have a name of their own."""
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def check_keys(functions: list[RewardFunction], keys: list[str]) -> None:
    """Raise RewardError if the samples' own keys clash with what functions are given, or one that is needed lacks."""
    if taken := [key for key in keys if key in ARGUMENTS]:
        raise RewardError(
            f"the samples have a key {taken[0]!r}: reward functions are given something else under this name, rename it"
        )
    for function in functions:
        parameters = own_parameters(function.call)
        if taken := [key for key in keys if key in (parameters if function.is_built_in else function.options)]:
            raise RewardError(
                f"the samples have a key {taken[0]!r}, and reward function {function.name} a parameter of this name "
                "that is set by flags: rename one"
            )
        needed = {name for name, p in parameters.items() if p.default is p.empty}
        if missing := sorted(needed - {*ARGUMENTS, *keys, *function.options}):
            raise RewardError(
                f"reward function {function.name} needs {missing[0]!r}, a key that no sample has: add it to the "
                "samples, give it with --reward_kwargs, or give the parameter a default"
            )


def check_signature(function: Callable, where: str) -> None:
    """Raise RewardError unless a function takes what it will be given, whatever keys the samples have."""
    fix = "define it as f(completions, assistant, **kwargs), with defaults for parameters of its own"
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise RewardError(f"{where}: its parameters cannot be found ({error}): {fix}") from error
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise RewardError(f"{where}: it has no **kwargs, in which it is given what else is known: {fix}")
    if positional := [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]:
        raise RewardError(f"{where}: {positional[0]!r} cannot be given by name: {fix}")


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


def weighted_sum(rewards: list[list[float | None]], weights: list[float]) -> list[float | None]:
    """Return each completion's reward: the weighted sum of what the functions say of it, as in TRL.

    rewards: a list per function, with None where it has no say; the others count. None where no function with a weight
    has a say: a function of weight 0 is only a curve.
    """
    totals = []
    for values in zip(*rewards, strict=True):
        said = [w * value for w, value in zip(weights, values, strict=True) if w and value is not None]
        totals.append(sum(said) if said else None)
    return totals


def score_answers(
    functions: list[RewardFunction],
    samples: list,
    texts: list[str],
    keys: list[str],
    sampled: dict[str, list] | None = None,
    call: Callable | None = None,
) -> list[float | None]:
    """Return the reward of a text per sample outside of training, None where it is not scored.

    sampled: their completion_ids and is_stopped; without, they count as ended, and their bytes stand in the place of
    tokens. call: in the place of `call_reward_function`. Functions of the whole step have no say: there is no step.
    """
    functions = [function for function in functions if not function.is_whole_step]
    sampled = sampled or {"completion_ids": [list(text.encode()) for text in texts], "is_stopped": [True] * len(texts)}
    numbers = {sample.id: number for number, sample in enumerate(samples)}
    columns = columns_of(samples, texts, keys, **sampled, prompt_index=[numbers[sample.id] for sample in samples])
    rewards = [(call or call_reward_function)(function, columns, None) for function in functions]
    return weighted_sum(rewards, [f.weight for f in functions]) if functions else [None] * len(texts)


def call_reward_function(function: RewardFunction, columns: dict[str, list], step: int | None) -> list[float | None]:
    """Return the rewards of one function; step: None outside of training.

    Raises RewardError if it does not give one finite number or None per completion, and whatever the function raises.
    """
    rewards = function.call(**columns, **function.options, step=step, is_training=step is not None)
    ids, name = columns["sample_id"], f"reward function {function.name}"
    if not isinstance(rewards, Iterable) or isinstance(rewards, str | bytes):
        raise RewardError(f"{name} returned {rewards!r}: it must give a list, one number or None per completion")
    rewards = [value if value is None or isinstance(value, str) else float(value) for value in rewards]
    if len(rewards) != len(ids):
        raise RewardError(
            f"{name} gave {len(rewards)} rewards for {len(ids)} completions, the first of sample {ids[0]!r}: "
            "it must give one each"
        )
    for value, sample_id in zip(rewards, ids, strict=True):
        if isinstance(value, str) or (value is not None and not abs(value) <= LARGEST):  # nan, too
            raise RewardError(
                f"{name} gave {value!r} for sample {sample_id!r}: give a number up to {LARGEST:g}, or None for no say"
            )
    return rewards
