"""Flags: what they default to, how batch sizes complete each other, and what --help shows."""

import dataclasses
import os
import re
import shutil
import sys
from typing import get_args

import pytest

from data.loader import prompt_options
from data.sample import InputError
from grpo.config import Config, parse_config
from grpo.run.batches import resolve_batch_sizes
from tests.conftest import ROOT, run_ranks

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
        *(f"--{field.name}" for section in Config.__bases__ for field in dataclasses.fields(section)),
    ]
    assert "--nframes frames read per video, rounded to even, instead of --fps (with --demo: 8)" in shown
    assert "(default: 1e-06; with --demo: 0.0002)" in shown and "(default: 5; with --demo: 0)" in shown
    headings = [section.heading for section in Config.__bases__]
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
    with pytest.raises(InputError, match="--on_long_prompt skip has no effect without --max_prompt_length"):
        parse_config([*GIVEN, "--on_long_prompt", "skip"])


def test_bad_media_has_two_names_and_a_cache_of_moved_frames_is_refused():
    assert parse_config([*GIVEN, "--on_bad_media", "skip"]).on_bad_video == "skip"
    with pytest.raises(InputError, match="--frame_cache is of no use: --frame_jitter reads other"):
        parse_config([*GIVEN, "--frame_jitter", "--frame_cache", "x"])


@pytest.mark.parametrize(
    ("ranks", "cores", "workers", "threads"), [(1, 2, 1, 2), (8, 192, 8, 3), (4, 2, 1, 1), (1, 1, 1, 1)]
)
def test_data_workers_follow_the_cores_of_a_rank(monkeypatch, ranks, cores, workers, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    config = parse_config(GIVEN)
    assert (config.dataloader_num_workers, prompt_options(config).media.threads) == (workers, threads)
    assert parse_config([*GIVEN, "--dataloader_num_workers", "0"]).dataloader_num_workers == 0


NEW_FLAG = '    new_flag: int = flag(7, "what is new", POSITIVE, decides=True)\n'
ONE_LINE_MORE = """
import contextlib, dataclasses, io, json, pathlib, sys
from data.check.__main__ import parse as parse_check
from data.sample import InputError
from grpo.config import Config, parse_config
from grpo.evaluate.__main__ import decisive_flags, parse
from grpo.run.resume import read_progress

given = ["--model_id", "m", "--data_path", "d", "--output_dir", "o"]
for read in (parse_config, parse, parse_check):
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        read(["--help"])
    assert "--new_flag" in shown.getvalue() and "what is new (default: 7)" in shown.getvalue()
    try:
        read(["--data_path", "d", "--new_flag", "0"])
        assert False
    except InputError as error:
        assert str(error) == "--new_flag 0: must be above 0, and at most 1e9"
assert decisive_flags(parse([*given, "--new_flag", "8"]))["new_flag"] == 8

old = {"flags": dataclasses.asdict(parse_config(given))}
old |= dict(step=1, total_steps=1, ranks=1, counts={}, evaluations=[], best_step=None)
old |= dict(num_samples=1, data=[""], rewards={}, eval_data=None)
pathlib.Path("progress.json").write_text(json.dumps(old))
for more in ([], ["--save_steps", "3"], ["--new_flag", "8"]):
    config = parse_config([*given, *more])
    try:
        read_progress(pathlib.Path("."), old | {"flags": dataclasses.asdict(config)})
        assert "--new_flag" not in more
    except InputError as error:
        assert "--new_flag" in more and str(error).startswith("--new_flag 8 was 7")
pathlib.Path("found").touch()
"""


def import_anew(folder: str) -> None:
    """Run the lines with the project in `folder`, in a process that has imported it from elsewhere."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("train", "data", "grpo", "reward")]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    os.chdir(folder)
    exec(ONE_LINE_MORE, {})


def test_a_flag_is_declared_in_one_line(tmp_path):
    """The line brings it into --help, its bounds, the check of a resumed run and the settings of an evaluation."""
    for name in ("data", "grpo", "reward"):
        shutil.copytree(ROOT / name, tmp_path / name)
    path = tmp_path / "data" / "flags.py"
    lines = path.read_text().splitlines(keepends=True)
    place = next(number for number, line in enumerate(lines) if line.startswith("    max_videos: int"))
    path.write_text("".join([*lines[:place], NEW_FLAG, *lines[place:]]))
    run_ranks(import_anew, 1, str(tmp_path))
    assert (tmp_path / "found").exists()


def test_every_flag_about_a_number_has_bounds():
    """Sizes in pixels and frames are checked together, where they are used."""
    numbers = [f for f in dataclasses.fields(Config) if {int, float} & {f.type, *get_args(f.type)}]
    without = {f.name for f in numbers if not f.metadata["bounds"] and "pixels" not in f.name}
    assert without == {"reward_weights", "fps", "nframes", "video_resized_width", "video_resized_height"}
