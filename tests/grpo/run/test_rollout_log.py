"""rollouts.jsonl: rotated by size, and after a resume what it would be without one."""

import json
import resource
import signal

import pytest

from grpo.run.rollout_log import append, files, truncate
from tests.conftest import run_ranks


def lines_of(step: int) -> list[dict]:
    return [{"step": step, "text": "x" * 50}] * 3


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in files(folder)}


def steps_in(folder) -> list[list[int]]:
    return [sorted({json.loads(line)["step"] for line in path.read_text().splitlines()}) for path in files(folder)]


def write(folder, steps) -> None:
    for step in steps:
        append(folder, lines_of(step), limit=500)  # a step has 216 bytes


def test_a_new_file_begins_after_one_that_reached_the_limit(tmp_path):
    write(tmp_path, range(1, 9))
    assert steps_in(tmp_path) == [[1, 2, 3], [4, 5, 6], [7, 8]]
    assert list(contents(tmp_path)) == ["rollouts.jsonl", "rollouts-2.jsonl", "rollouts-3.jsonl"]


@pytest.mark.parametrize("step", range(9))
def test_after_a_resume_the_files_are_those_of_an_uninterrupted_run(tmp_path, step):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
        write(folder, range(1, 9))
    with open(files(resumed)[-1], "a") as file:
        file.write('{"step": 9, "te')  # killed while writing
    truncate(resumed, step)
    assert sum(steps_in(resumed), []) == list(range(1, step + 1))
    write(resumed, range(step + 1, 9))
    assert contents(resumed) == contents(whole)


def test_nothing_is_left_of_a_run_that_begins_anew(tmp_path):
    truncate(tmp_path, 0)
    write(tmp_path, range(1, 9))
    truncate(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def write_to_a_full_disk(folder) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    append(folder, lines_of(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, -1))  # in the middle of the second step
    with pytest.raises(OSError):
        append(folder, lines_of(2))
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    append(folder, lines_of(3))


def test_a_step_for_which_the_disk_has_no_room_leaves_no_torn_line(tmp_path):
    run_ranks(write_to_a_full_disk, 1, tmp_path)
    assert steps_in(tmp_path) == [[1, 3]]
