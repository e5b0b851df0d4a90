import json
import math
import os
import signal
import sys
import time
from hashlib import sha256

import numpy as np
import pytest

from data.sample import Sample
from reward.functions import (
    ARGUMENTS,
    BUILT_IN,
    LARGEST,
    RewardError,
    RewardFunction,
    call_reward_function,
    check_keys,
    columns_of,
    keys_of,
    load_reward_function,
    load_reward_functions,
    own_parameters,
    score_answers,
    weighted_sum,
)

ONES = "def ones(completions, assistant, **kwargs):\n    return [1.0] * len(completions)\n"


@pytest.fixture
def mine(tmp_path):
    """Write a file of the user's, and return its path."""

    def write(text: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def load(*names, weights=(), kwargs="", valid_range=(0.0, 100.0)):
    return load_reward_functions(list(names), list(weights), kwargs, list(valid_range))


def error_of(*names, **flags) -> RewardError:
    with pytest.raises(RewardError) as caught:
        load(*names, **flags)
    assert "\n" not in str(caught.value)
    return caught.value


def says(error: RewardError, *parts: str) -> bool:
    return all(part in str(error) for part in parts)


def samples_of(*extras):
    turns = (("system", "Be brief."), ("user", "What is the EF?"))
    return [Sample(f"s{i}", (), turns, f"{40 + i}%", extra) for i, extra in enumerate(extras)]


def rewards_of(call, texts=("a", "b"), step=3, **options):
    columns = columns_of(samples_of(*[{}] * len(texts)), list(texts), [])
    return call_reward_function(RewardFunction("mine", call, options=options), columns, step)


# Finding functions


def test_built_in_functions_are_found_by_name():
    functions = load(*BUILT_IN)
    assert {"numerical_video_reward", "smooth_numerical_reward", "concordance_reward", "format_reward"} <= set(BUILT_IN)
    assert {function.name: function.call for function in functions} == BUILT_IN
    assert [function.digest for function in functions] == [None] * len(functions)


def test_a_function_of_a_file_is_found_by_path_and_name(mine, tmp_path, monkeypatch):
    path = mine(ONES)
    (function,) = load(f"{path}:ones")
    assert (function.name, function.call([1, 2], None)) == ("ones", [1.0, 1.0])
    assert function.digest == sha256(ONES.encode()).hexdigest()
    monkeypatch.chdir(tmp_path)
    assert load("mine.py:ones")[0].call([1], None) == [1.0]


def test_a_path_may_have_a_colon(mine, tmp_path):
    (tmp_path / "run:2").mkdir()
    assert load(f"{mine(ONES, 'run:2/mine.py')}:ones")[0].name == "ones"


@pytest.mark.parametrize("name", ["numerical_reward", "extract", "", "mine.py"])
def test_a_name_that_is_no_built_in_function_is_refused_with_those_there_are(name):
    assert says(error_of(name), f"--reward_funcs {name!r}", "no such function or file", *BUILT_IN, "file.py:function")


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    for name in (f"{tmp_path / 'none.py'}:ones", f"{tmp_path}:ones"):
        assert says(error_of(name), f"--reward_funcs {name!r}: no such function or file")


def test_an_import_that_raises_is_shown_with_the_users_own_traceback(mine):
    path = mine("def inner():\n    raise ValueError('first\\nsecond')\n\ninner()\n")
    error = error_of(f"{path}:ones")
    assert says(error, f"importing {path!r} failed (ValueError: first)")
    assert f'File "{path}", line 2, in inner' in error.details
    assert "ValueError: first\nsecond" in error.details


def test_a_file_with_a_wrong_line_is_shown_with_it(mine):
    path = mine(ONES + "this is not a program\n")
    error = error_of(f"{path}:ones")
    assert says(error, f"importing {path!r} failed (SyntaxError: ")
    assert f'File "{path}", line 3' in error.details
    assert "this is not a program" in error.details


def test_a_file_that_exits_when_imported_does_not_end_the_program(mine):
    path = mine("import sys\nsys.exit(3)\n")
    error = error_of(f"{path}:ones")
    assert says(error, f"importing {path!r} failed (SystemExit: 3)")
    assert f'File "{path}", line 2' in error.details


@pytest.mark.parametrize("name", ["twos", "number", ""])
def test_a_name_that_is_no_function_of_the_file_is_refused(mine, name):
    path = mine(ONES + "number = 3\n")
    error = error_of(f"{path}:{name}")
    assert says(error, f"--reward_funcs '{path}:{name}': it cannot be called", "correct the name")
    assert error.details == ""


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        ("def f(completions, assistant): pass", "got an unexpected keyword argument 'prompts'"),
        ("def f(completions, assistant, *kwargs): pass", "got an unexpected keyword argument 'prompts'"),
        (
            f"def f({', '.join(ARGUMENTS)}): pass",
            "got an unexpected keyword argument 'any key of the samples'",
        ),
        ("f = max", "no signature found"),
    ],
)
def test_a_function_that_cannot_be_called_like_the_others_is_refused(mine, definition, reason):
    path = mine(definition + "\n")
    assert says(
        error_of(f"{path}:f"), f"'{path}:f': it cannot be called", reason, "f(completions, assistant, **kwargs)"
    )


def test_whatever_can_be_called_like_a_function_is_one(mine):
    path = mine(
        "from functools import partial\n"
        "def scaled(completions, assistant, scale, **kwargs): return [scale for _ in completions]\n"
        "class Judge:\n"
        "    whole_step = True\n"
        "    def __call__(self, completions, assistant, **kwargs): return [5.0 for _ in completions]\n"
        "double, judge, triple = partial(scaled, scale=2.0), Judge(), lambda completions, **kwargs: [3.0]\n"
    )
    functions = load(f"{path}:double", f"{path}:judge", f"{path}:triple")
    assert [function.call(completions=[1], assistant=None) for function in functions] == [[2.0], [5.0], [3.0]]
    assert [function.is_whole_step for function in functions] == [False, True, False]


def test_functions_of_one_file_share_its_module(mine):
    path = mine(
        "seen = []\n"
        "def put(completions, assistant, **kwargs): seen.extend(completions); return [0.0]\n"
        "def get(completions, assistant, **kwargs): return seen\n"
    )
    put, get = load(f"{path}:put", f"{path}:get")
    put.call([1.0, 2.0], None)
    assert get.call(None, None) == [1.0, 2.0]


def test_a_changed_file_has_another_digest_and_is_imported_anew(mine):
    path = mine(ONES)
    before = load_reward_function(f"{path}:ones")
    mine(ONES.replace("1.0", "22.5"))
    after = load_reward_function(f"{path}:ones")
    assert before.digest != after.digest
    assert (before.call([1], None), after.call([1], None)) == ([1.0], [22.5])
    mine(ONES)
    again = load_reward_function(f"{path}:ones")
    assert (again.digest, again.call([1], None)) == (before.digest, [1.0])


def test_a_change_within_a_second_to_a_file_as_long_is_not_missed(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # as it is where users run: Python keeps a cache
    path = mine(ONES)
    os.utime(path, (1e9, 1e9))
    before = load_reward_function(f"{path}:ones")
    mine(ONES.replace("1.0", "2.5"))
    os.utime(path, (1e9, 1e9))  # Python tells versions apart by second and size
    after = load_reward_function(f"{path}:ones")
    assert before.digest != after.digest
    assert (before.call([1], None), after.call([1], None)) == ([1.0], [2.5])
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.py"]  # nothing for a later run to mistake


def test_a_dataclass_in_the_users_file_works(mine):
    path = mine(
        "from __future__ import annotations\n"  # the types are strings, which dataclasses look up in the module
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Judgement:\n"
        "    reward: float\n"
        "def judge(completions, assistant, **kwargs): return [Judgement(0.25).reward for _ in completions]\n"
    )
    assert load(f"{path}:judge")[0].call([1, 2], None) == [0.25, 0.25]


def test_the_same_name_twice_is_refused(mine):
    path = mine(ONES + ONES.replace("def ones", "def format_reward"))
    for names in (
        ["format_reward", "concordance_reward", "format_reward"],
        ["format_reward", f"{path}:ones", f"{path}:format_reward"],
    ):
        assert says(error_of(*names), "--reward_funcs: 'format_reward' occurs twice")


def test_only_a_function_that_asks_for_the_whole_step_gets_it(mine):
    path = mine(ONES + "ones.whole_step = True\n" + ONES.replace("def ones", "def twos"))
    functions = load("concordance_reward", "format_reward", f"{path}:ones", f"{path}:twos")
    assert [function.is_whole_step for function in functions] == [True, False, True, False]


def test_every_built_in_function_takes_all_that_it_is_given_and_keys_of_samples():
    sampled = {"completion_ids": [[5, 6], [7]], "is_stopped": [True, False], "prompt_index": [0, 1]}
    columns = columns_of(samples_of({"age": 60}, {}), ["40%", "none"], ["age"], **sampled)
    for function in load(*BUILT_IN):
        assert call_reward_function(function, columns, 3).shape == (2,), function.name


# Weights


def test_weights_belong_to_functions_in_order_and_are_one_by_default():
    names = "format_reward", "numerical_video_reward", "concordance_reward"
    assert [function.weight for function in load(*names)] == [1.0, 1.0, 1.0]
    assert [function.weight for function in load(*names, weights=[0.5, 0.0, -2.0])] == [0.5, 0.0, -2.0]


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 2.0, 3.0], [0.0], [0.0, -0.0], *([0.5, x] for x in (math.nan, math.inf, -math.inf, 2e6))]
)
def test_weights_that_are_no_finite_number_for_each_function_are_refused(weights):
    error = error_of("format_reward", "concordance_reward", weights=weights)
    given = " ".join(f"{weight:g}" for weight in weights)
    assert says(error, f"--reward_weights {given}: give each of 2 reward functions one from -1e+06 to 1e+06, not all")


# Arguments


@pytest.mark.parametrize("text", ["{", "error_scale=8", "{'error_scale': 8}", '{"error_scale": }', "[" * 100_000])
def test_arguments_that_are_no_json_are_refused(text):
    assert says(error_of("numerical_video_reward", kwargs=text), f"--reward_kwargs {text!r} is no JSON object")


@pytest.mark.parametrize("text", ["[]", "8", "null", '"error_scale"', '[["error_scale", 8]]'])
def test_arguments_that_are_no_object_are_refused(text):
    assert says(error_of("numerical_video_reward", kwargs=text), f"--reward_kwargs {text!r} is no JSON object")


@pytest.mark.parametrize("name", ARGUMENTS[::4])
def test_arguments_that_the_trainer_gives_are_refused(name):
    error = error_of("concordance_reward", "smooth_numerical_reward", kwargs=json.dumps({name: 1}))
    assert says(error, f"--reward_kwargs: no reward function has a parameter {name!r}, beside --valid_range")


def test_an_argument_that_no_function_takes_is_refused():
    error = error_of("format_reward", "numerical_video_reward", kwargs='{"error_scale": 8, "eror_scale": 8}')
    assert says(error, "--reward_kwargs: no reward function has a parameter 'eror_scale'")


@pytest.mark.parametrize("name", ["kwargs", "args", "others"])
def test_the_name_under_which_a_function_collects_arguments_is_no_parameter(mine, name):
    path = mine("def f(completions, *args, words=1, **others): return [0.0]\n")
    error = error_of("format_reward", f"{path}:f", kwargs=json.dumps({name: 1}))
    assert says(error, f"--reward_kwargs: no reward function has a parameter {name!r}")
    assert list(own_parameters(load(f"{path}:f")[0].call)) == ["words"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "[1, [NaN]]"])
def test_arguments_that_are_no_finite_number_are_refused(number):
    error = error_of("numerical_video_reward", kwargs=f'{{"words": "NaN", "error_scale": {number}}}')
    assert says(error, "--reward_kwargs", "is no JSON object (Out of range float")


def test_no_arguments_are_an_empty_object():
    assert load("format_reward")[0].options == load("format_reward", kwargs="{}")[0].options == {}


def test_each_function_is_given_the_arguments_that_it_takes(mine):
    path = mine("def f(completions, assistant, words, *, error_scale=1, **kwargs): return [float(len(words))]\n")
    functions = load(
        "numerical_video_reward",
        "format_reward",
        f"{path}:f",
        kwargs='{"error_scale": 8, "words": ["a"]}',
        valid_range=[0.0, 50.0],
    )
    assert [function.options for function in functions] == [
        {"error_scale": 8},
        {},
        {"error_scale": 8, "words": ["a"]},
    ]


def test_the_valid_range_is_given_to_functions_that_take_it():
    names = "smooth_numerical_reward", "concordance_reward", "numerical_video_reward", "format_reward"
    ranges = [function.options.get("valid_range") for function in load(*names, valid_range=[0.0, 50.0])]
    assert ranges == [[0.0, 50.0], [0.0, 50.0], None, None]
    error = error_of("smooth_numerical_reward", kwargs='{"valid_range": [100, 0]}')
    assert says(error, "--reward_kwargs: no reward function has a parameter 'valid_range', beside")


@pytest.mark.parametrize("scale", ["0", "-6", '"8"', "null", "[6]"])
def test_an_error_scale_that_no_error_can_be_divided_by_is_refused(mine, scale):
    kwargs = f'{{"error_scale": {scale}}}'
    for name in ("numerical_video_reward", "smooth_numerical_reward"):
        assert says(error_of(name, kwargs=kwargs), "--reward_kwargs: error_scale", "above 0")
    path = mine("def f(completions, error_scale=1, **kwargs): return [0.0]\n")
    assert load(f"{path}:f", kwargs=kwargs)[0].options == json.loads(kwargs)  # what it means is the user's own


def test_a_function_checks_its_own_arguments_before_a_run(mine):
    path = mine(
        "def check(words=1, **options):\n"
        "    if words > 3: raise ValueError(f'words {words}: give at most 3')\n"
        "def f(completions, words=1, valid_range=None, **kwargs): return [0.0]\n"
        "f.check = check\n"
    )
    assert str(error_of(f"{path}:f", kwargs='{"words": 4}')) == "--reward_kwargs: words 4: give at most 3"
    assert load(f"{path}:f", kwargs='{"words": 3}')[0].options == {"words": 3, "valid_range": [0.0, 100.0]}
    load(f"{path}:f")


def test_arguments_reach_the_function():
    (function,) = load("numerical_video_reward", kwargs='{"error_scale": 8}')
    columns = columns_of(samples_of({}), ["46%"], [])
    emphasis = 1 + 0.5 * 10 / 30  # of the truth, 40
    expected = 0.1 + 0.9 * (1 - 36 / 64) * emphasis
    assert call_reward_function(function, columns, None) == pytest.approx([expected], abs=1e-12)


# Keys of the samples


def keys_error_of(keys, *calls, **options) -> RewardError:
    functions = [RewardFunction(f"mine{i}", call, options=options) for i, call in enumerate(calls)]
    with pytest.raises(RewardError) as caught:
        check_keys(functions, keys)
    assert "\n" not in str(caught.value)
    return caught.value


def test_the_keys_of_samples_are_listed_once_in_order():
    assert keys_of(samples_of({"site": "A", "age": 60}, {}, {"sex": "f", "age": 70, "site": None})) == [
        "site",
        "age",
        "sex",
    ]
    assert keys_of([]) == keys_of(samples_of({})) == []


def test_keys_that_functions_take_or_that_nobody_asks_for_are_fine():
    def asks(completions, assistant, age, prompt_index, *args, site=None, scale, **kwargs):
        raise AssertionError("not called")

    check_keys([RewardFunction("asks", asks, options={"scale": 2})], ["age", "sex"])
    check_keys([RewardFunction("asks", asks, options={"scale": 2})], ["site", "age"])
    check_keys(load(*BUILT_IN), [])
    check_keys(load(*BUILT_IN), ["age", "group"])


@pytest.mark.parametrize("name", ARGUMENTS[::4])
def test_a_key_named_like_what_functions_are_given_is_refused(name):
    error = keys_error_of(["age", name], lambda **kwargs: [])
    assert says(error, f"the samples have a key {name!r}", "something else", "rename it")


def test_the_number_of_the_prompt_has_a_name_that_leaves_group_to_the_samples(mine):
    assert "prompt_index" in ARGUMENTS and "group" not in ARGUMENTS
    path = mine(
        "def f(completions, assistant, group, prompt_index, **kwargs):\n"
        "    return [10 * g + index for g, index in zip(group, prompt_index)]\n"
    )
    functions = load(f"{path}:f", "format_reward", weights=[1.0, 0.0])
    check_keys(functions, ["group"])
    assert score_answers(functions, samples_of({"group": 5}, {"group": 7}), ["a", "b"], ["group"]).tolist() == [
        50.0,
        71.0,
    ]


def test_a_key_named_like_an_argument_that_is_set_by_flags_is_refused_with_the_function():
    error = keys_error_of(["age", "scale"], lambda scale, **kwargs: [], lambda **kwargs: [], scale=2)
    assert says(error, "the samples have a key 'scale'", "reward function mine0 is given something else")
    functions = load("format_reward", "smooth_numerical_reward", valid_range=[0.0, 50.0])
    with pytest.raises(RewardError, match="a key 'valid_range', under which reward function smooth_numerical_reward"):
        check_keys(functions, ["valid_range"])
    check_keys(functions[:1], ["valid_range"])  # which does not take it
    with pytest.raises(RewardError, match="a key 'error_scale', under which reward function smooth_numerical_reward"):
        check_keys(functions, ["error_scale"])


def test_a_parameter_that_no_key_and_no_flag_gives_is_refused_with_the_function():
    error = keys_error_of(["site"], lambda site, **kwargs: [], lambda *, site, sex, age, **kwargs: [])
    assert says(error, "reward function mine1 needs 'age', a key that no sample has", "--reward_kwargs", "a default")
    error = keys_error_of(["age", "site"], lambda *, site, sex, age, **kwargs: [])
    assert says(error, "reward function mine0 needs 'sex'")


def test_a_function_of_weight_zero_is_checked_too():
    needs_age = RewardFunction("needs_age", lambda age, **kwargs: [], weight=0.0)
    with pytest.raises(RewardError, match="needs_age needs 'age'"):
        check_keys([needs_age], [])


# Calling


def test_columns_have_an_entry_for_each_text():
    samples = samples_of({"site": "A"}, {"age": 60})
    twice = [samples[0], samples[0], samples[1]]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the EF?"}]
    assert columns_of(twice, ["a", "b", "c"], ["site", "age"], prompt_index=[4, 4, 7]) == {
        "site": ["A", "A", None],
        "age": [None, None, 60],
        "prompts": [turns] * 3,
        "completions": [[{"role": "assistant", "content": text}] for text in "abc"],
        "assistant": [{"role": "assistant", "content": truth} for truth in ("40%", "40%", "41%")],
        "sample_id": ["s0", "s0", "s1"],
        "prompt_index": [4, 4, 7],
    }


def test_a_function_is_given_every_argument_by_name():
    def f(completions, assistant, scale=1, **kwargs):
        given.update(kwargs, completions=completions, assistant=assistant, scale=scale)
        return [0.0] * len(completions)

    given = {}
    sampled = {"completion_ids": [[5, 6], [7]], "is_stopped": [True, False], "prompt_index": [0, 1]}
    columns = columns_of(samples_of({"age": 60}, {}), ["a", "b"], ["age"], **sampled)
    call_reward_function(RewardFunction("f", f, options={"scale": 2}), columns, 3)
    assert given == {**columns, "scale": 2, "step": 3, "is_training": True}
    assert given.keys() == {*ARGUMENTS, "age", "scale"}


@pytest.mark.parametrize(("step", "is_training"), [(0, True), (7, True), (None, False)])
def test_a_step_means_training(step, is_training):
    def f(completions, step, is_training, **kwargs):
        seen.append((step, is_training))
        return [0.0] * len(completions)

    seen = []
    rewards_of(f, step=step)
    assert seen == [(step, is_training)]


def test_rewards_may_be_any_kind_of_number_or_none():
    found = rewards_of(lambda **kwargs: [1, None, np.float32(0.5), True], texts="abcd")
    np.testing.assert_array_equal(found, [1.0, math.nan, 0.5, 1.0])
    assert rewards_of(lambda **kwargs: np.array([0.25, 2.0])).tolist() == [0.25, 2.0]
    assert rewards_of(lambda **kwargs: (x for x in (1, 2))).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("given", [[], [1.0], [1.0, 2.0, 3.0], [None]])
def test_a_wrong_number_of_rewards_is_refused(given):
    with pytest.raises(RewardError) as caught:
        rewards_of(lambda **kwargs: given)
    assert says(caught.value, f"reward function mine gave {len(given)} rewards for 2 completions")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), 1.01 * LARGEST, -1.01 * LARGEST])
def test_a_reward_that_is_not_finite_or_too_large_is_refused_with_its_sample(value):
    with pytest.raises(RewardError) as caught:
        rewards_of(lambda **kwargs: [None, value, 1.0], texts="abc")
    assert says(caught.value, f"reward function mine gave {float(value)} for sample 's1'")


def test_the_largest_rewards_are_accepted():
    assert rewards_of(lambda **kwargs: [LARGEST, -LARGEST]).tolist() == [LARGEST, -LARGEST]


def test_what_a_function_raises_is_one_line_with_its_samples_below_the_users_own_traceback():
    def f(**kwargs):
        raise KeyError("age\nand more")

    with pytest.raises(RewardError) as caught:
        rewards_of(f, texts="abcdef")
    assert str(caught.value) == (
        r"reward function mine raised KeyError: 'age\nand more', for samples 's0', 's1', 's2', 's3', 's4', …: fix the "
        "function or the samples"
    )
    assert "in f\n" in caught.value.details and isinstance(caught.value.__cause__, KeyError)


def test_a_function_that_takes_too_long_is_broken_off_with_its_samples():
    columns = columns_of(samples_of({}, {}), ["a", "b"], [])
    with pytest.raises(RewardError) as caught:
        call_reward_function(RewardFunction("slow", lambda **kwargs: time.sleep(60)), columns, 3, timeout=0.05)
    assert says(
        caught.value, "function slow", "longer than --reward_timeout 0.05 seconds", "for samples 's0', 's1': fix"
    )
    assert "time.sleep(60)" in caught.value.details  # where it waited
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ([[0.5], [1.0]], "TypeError: float() argument must be"),
        (None, "TypeError: 'NoneType' object is not iterable"),
        (0.5, "TypeError: 'float' object is not iterable"),
    ],
)
def test_what_is_given_in_the_place_of_a_list_of_numbers_is_refused(given, what):
    with pytest.raises(RewardError) as caught:
        rewards_of(lambda **kwargs: given)
    assert says(caught.value, f"reward function mine raised {what}", "for samples 's0', 's1': fix the function")


@pytest.mark.parametrize(("given", "first"), [(["good", 1.0], "good"), (["0.5", 1.0], "0.5"), ("ab", "a")])
def test_a_text_is_no_reward(given, first):
    with pytest.raises(RewardError) as caught:
        rewards_of(lambda **kwargs: given)
    assert says(caught.value, f"reward function mine gave '{first}' for sample 's0'")


# Sums and scores


NAN = math.nan


def test_rewards_are_summed_by_weight_without_those_that_have_no_say():
    rewards = np.array([[1.0, NAN, 3.0, NAN], [2.0, 4.0, NAN, NAN]])
    np.testing.assert_array_equal(weighted_sum(rewards, [0.5, 2.0]), [4.5, 8.0, 1.5, NAN])
    assert weighted_sum(np.array([[1.0], [2.0]]), [1.0, -3.0]) == [-5.0]
    assert weighted_sum(np.array([[0.0, -0.0]]), [2.0]).tolist() == [0.0, 0.0]  # 0 is a say


def test_a_function_of_weight_zero_is_only_a_curve():
    rewards = np.array([[NAN, 1.0, NAN], [5.0, 5.0, NAN]])
    np.testing.assert_array_equal(weighted_sum(rewards, [1.0, 0.0]), [NAN, 1.0, NAN])


def test_answers_are_scored_by_the_weighted_sum(mine):
    path = mine(
        "def length(completions, assistant, **kwargs): return [len(c[0]['content']) for c in completions]\n"
        "def picky(completions, assistant, **kwargs):\n"
        "    return [None if a['content'] == '41%' else 10 for a in assistant]\n"
    )
    functions = load(f"{path}:length", f"{path}:picky", weights=[2.0, 0.5])
    assert score_answers(functions, samples_of({}, {}), ["abc", "ab"], []).tolist() == [11.0, 4.0]


def test_keys_of_the_samples_arrive_as_lists_with_none_where_they_are_missing(mine):
    path = mine(
        "def age(completions, assistant, age, site, **kwargs):\n"
        "    return [a if s == 'A' else None for a, s in zip(age, site)]\n"
    )
    samples = samples_of({"age": 60, "site": "A"}, {"age": 70}, {"site": "A"})
    found = score_answers(load(f"{path}:age"), samples, ["a", "b", "c"], ["age", "site"])
    np.testing.assert_array_equal(found, [60.0, NAN, NAN])


def test_functions_of_the_whole_step_have_no_say_outside_of_training():
    samples, texts = samples_of({}, {}), ["40%", "41%"]
    alone = score_answers(load("numerical_video_reward"), samples, texts, [])
    both = score_answers(load("concordance_reward", "numerical_video_reward"), samples, texts, [])
    assert both.tolist() == alone.tolist()
    assert np.isnan(score_answers(load("concordance_reward"), samples, texts, [])).tolist() == [True, True]


def test_answers_count_as_ended_unless_it_is_known_how_they_were_sampled():
    def f(completions, **kwargs):
        seen.update(kwargs)
        return [0.0] * len(completions)

    seen, samples, texts = {}, samples_of({}, {}), ["a", "40%", "é"]
    several = [samples[0], samples[1], samples[0]]
    score_answers([RewardFunction("f", f)], several, texts, [])
    # Their bytes stand in the place of tokens: é has two.
    assert (seen["completion_ids"], seen["is_stopped"]) == ([[97], [52, 48, 37], [195, 169]], [True, True, True])
    assert (seen["step"], seen["is_training"]) == (None, False)
    first, second, third = seen["prompt_index"]
    assert first == third != second  # those of one sample have one prompt
    sampled = {"completion_ids": [[1], [2, 3], []], "is_stopped": [True, False, True]}
    score_answers([RewardFunction("f", f)], several, texts, [], sampled)
    assert {name: seen[name] for name in sampled} == sampled
