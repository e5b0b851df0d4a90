"""Flags: what they default to, how batch sizes complete each other, and that the README knows them all."""

import dataclasses
import re

import pytest

from data.dataset import InputError
from grpo.config import Config, parse_config, resolve_batch_sizes
from tests.conftest import ROOT

GIVEN = ["--model_id", "m", "--data_path", "d", "--output_dir", "o"]


def sizes(world_size, **given):
    config = resolve_batch_sizes(Config(**given), world_size)
    return config.global_batch_size, config.per_device_train_batch_size, config.gradient_accumulation_steps


def test_defaults_are_those_of_the_original():
    config = parse_config(GIVEN)
    assert (config.epsilon, config.epsilon_high, config.temperature) == (0.05, 0.1, 0.7)
    assert (config.num_iterations, config.max_completion_length, config.num_generations) == (1, 512, 8)
    assert config.max_videos == 5


def test_any_batch_size_follows_from_the_others():
    assert sizes(8) == (8, 1, 1)
    assert sizes(8, global_batch_size=64) == (64, 8, 1)
    assert sizes(8, global_batch_size=64, gradient_accumulation_steps=4) == (64, 2, 4)
    assert sizes(8, global_batch_size=64, per_device_train_batch_size=1) == (64, 1, 8)
    assert sizes(2, per_device_train_batch_size=3, gradient_accumulation_steps=5) == (30, 3, 5)


@pytest.mark.parametrize(
    "given",
    [
        {"global_batch_size": 4},  # on 8 ranks
        {"global_batch_size": 12},
        {"global_batch_size": 64, "per_device_train_batch_size": 3},
        {"global_batch_size": 64, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    ],
    ids=str,
)
def test_contradictory_batch_sizes_say_the_arithmetic(given):
    with pytest.raises(InputError, match=rf"--global_batch_size {given['global_batch_size']} .* x 8 ranks x .* = \d+"):
        sizes(8, **given)


def test_flags_beside_demo_override_its_defaults():
    assert parse_config(["--demo"]).max_steps != Config().max_steps
    assert parse_config(["--demo", "--max_steps", "7", "--epsilon", "0.2"]).max_steps == 7


def test_the_readme_lists_every_flag_with_its_default():
    readme = (ROOT / "README.md").read_text()
    listed = dict(re.findall(r"^\| `--(\w+)` \| (?:`([^`]*)`)? *\|", readme, flags=re.MULTILINE))
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    assert listed == {name: "" if default in (None, "") else str(default) for name, default in defaults.items()}
