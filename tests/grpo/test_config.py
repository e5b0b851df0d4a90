"""Flags: what they default to, how batch sizes complete each other, and what --help shows."""

import dataclasses
import os
import re

import pytest

from data.sample import InputError
from grpo.check_flags import parse_config
from grpo.config import Config
from grpo.settings import media_options, resolve_batch_sizes

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
    ("given", "words"),
    [
        ({"global_batch_size": 4}, "4 is not a multiple of 8 ranks:"),
        ({"global_batch_size": 12}, "12 is not a multiple of 8 ranks:"),
        (
            {"global_batch_size": 64, "per_device_train_batch_size": 3},
            "64 is not a multiple of 24 = 8 ranks x --per_device_train_batch_size 3:",
        ),
        (
            {"global_batch_size": 64, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
            "64 is not equal to 128 = 8 ranks x --per_device_train_batch_size 4 x --gradient_accumulation_steps 4:",
        ),
    ],
    ids=str,
)
def test_contradictory_batch_sizes_say_the_arithmetic_of_what_was_given(given, words):
    with pytest.raises(InputError) as error:
        sizes(8, **given)
    assert str(error.value) == f"--global_batch_size {words} change it, or leave it out"


def test_flags_beside_demo_override_its_defaults():
    assert parse_config(["--demo"]).max_steps != Config().max_steps
    assert parse_config(["--demo", "--max_steps", "7", "--epsilon", "0.2"]).max_steps == 7


def test_help_shows_every_flag_once_in_its_section_with_its_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    printed = capsys.readouterr().out
    shown = " ".join(printed.split())
    assert re.findall(r"^  (--\w+)", printed, flags=re.MULTILINE) == [
        "--help",
        *(f"--{field.name}" for field in dataclasses.fields(Config)),
    ]
    assert "--nframes frames read from every video (rounded to even), instead of --fps (with --demo: 8)" in shown
    assert "(default: 1e-06; with --demo: 0.0002)" in shown and "(default: 5; with --demo: 0)" in shown
    headings = [field.metadata["heading"] for field in dataclasses.fields(Config) if field.metadata["heading"]]
    assert len(headings) == 10 and all(f" {heading}: --" in shown for heading in headings)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("--num_generation", "--num_generations"),
        ("--learning_rat=1", "--learning_rate"),
        ("--epsilon_hi", "--epsilon_high"),
    ],
)
def test_a_misspelt_flag_is_answered_with_the_nearest_one(wrong, nearest):
    with pytest.raises(InputError) as error:
        parse_config([*GIVEN, wrong])
    expected = f"unknown flag {wrong!r} (did you mean {nearest}?): python train.py --help explains the flags"
    assert str(error.value) == expected


def test_a_flag_like_no_other_gets_no_guess():
    with pytest.raises(InputError, match="unknown flag '--zzz': python train.py --help"):
        parse_config([*GIVEN, "--zzz", "3"])


@pytest.mark.parametrize("spelt", ["--max_videos", "--max-videos"])
def test_hyphens_are_taken_for_underscores(spelt):
    assert parse_config([*GIVEN, spelt, "7"]).max_videos == 7


@pytest.mark.parametrize("size", ["inf", "nan", "0", "-1"])
def test_the_size_of_the_frame_cache_is_a_number_of_gigabytes(size):
    with pytest.raises(InputError, match=f"--frame_cache_gb .*{size}.*: must be above 0"):
        parse_config([*GIVEN, "--frame_cache", "x", "--frame_cache_gb", size])


def test_what_is_a_long_prompt_must_be_said():
    with pytest.raises(InputError, match="--on_long_prompt skip has no effect: say with --max_prompt_length"):
        parse_config([*GIVEN, "--on_long_prompt", "skip"])


def test_bad_media_has_two_names_and_a_cache_of_moved_frames_is_refused():
    assert parse_config([*GIVEN, "--on_bad_media", "skip"]).on_bad_video == "skip"
    with pytest.raises(InputError, match="--frame_jitter reads other frames in each epoch"):
        parse_config([*GIVEN, "--frame_jitter", "--frame_cache", "x"])


@pytest.mark.parametrize(
    ("ranks", "cores", "workers", "threads"), [(1, 2, 1, 2), (8, 192, 8, 3), (4, 2, 1, 1), (1, 1, 1, 1)]
)
def test_data_workers_follow_the_cores_of_a_rank(monkeypatch, ranks, cores, workers, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    config = parse_config(GIVEN)
    assert (config.dataloader_num_workers, media_options(config).threads) == (workers, threads)
    assert parse_config([*GIVEN, "--dataloader_num_workers", "0"]).dataloader_num_workers == 0
