"""What goes wrong on one rank ends or is survived on all, in one line; text from outside stays within its line."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import train
from data.epochs import Epochs
from grpo.ranks import printable
from grpo.run.checkpoint import checkpoints
from tests.conftest import children_of, make_tiny, run_ranks, start_torchrun
from tests.grpo.run.faulty_rewards import main
from tests.kill_and_resume import run_flags, start
from tests.test_train import curves

STEPS = ["--max_steps", "4", "--save_steps", "1"]


def end_with(fault: list[str], arguments: list[list[str]], log: str, code: int) -> None:
    rank = int(os.environ["RANK"])
    descriptor = os.open(f"{log}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    assert main([*fault, *arguments[rank % len(arguments)]]) == code


def run_with(fault: str, faulty_rank: int, ranks: int, arguments: list, tmp_path: Path, code: int = 0) -> str:
    """Run the program with a faulty reward function, each rank with the same flags or its own; return what it says."""
    arguments = arguments if isinstance(arguments[0], list) else [arguments]
    run_ranks(end_with, ranks, [fault, str(faulty_rank)], arguments, str(tmp_path / "log"), code)
    return "".join((tmp_path / f"log.{rank}").read_text() for rank in range(ranks))


def test_a_rank_that_dies_ends_the_others_within_a_minute(tiny, tmp_path, processes):
    """A bug on one rank. Of a rank that is killed the others learn without torchrun, too (test_stopping.py)."""
    arguments = ["raises", "1", *run_flags(tiny.folder, tmp_path / "out", *STEPS)]
    processes.append(start_torchrun(main, 2, (arguments,), tmp_path / "log"))
    processes[0].join(60)
    assert processes[0].exitcode not in (None, 0) and "Fault: a bug on one rank" in (tmp_path / "log").read_text()
    assert set(checkpoints(tmp_path / "out")) == {1}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_data_worker_that_dies_is_the_last_line_on_screen(tiny, tmp_path, number):
    more = ["--num_train_epochs", "100000", "--dataloader_num_workers", "2"]
    (run,) = start(1, run_flags(tiny.folder, tmp_path / "out", *more), tmp_path / "log")
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out").glob("tensorboard/*")) or len(children_of(run.pid)) < 2:
            assert time.monotonic() < deadline and run.is_alive()
            time.sleep(0.1)
        time.sleep(1)
        os.kill(children_of(run.pid)[-1], number)
        run.join(60)
    finally:
        run.kill()
    printed = (tmp_path / "log").read_text()
    assert run.exitcode == 2 and "Traceback" not in printed, printed
    last = printed.splitlines()[-1]
    # torch notices it by the signal or, if the main process waits for the worker just then, by its silence.
    assert last.startswith("train.py: error: rank 0: DataLoader worker (pid")
    assert "killed by signal" in last or "exited unexpectedly" in last
    assert "--dataloader_num_workers" in last and "python -m data.check" in last


def state(folder: Path) -> dict:
    """All tensors of a checkpoint."""
    stored = dcp.FileSystemReader(folder / "trainer_state").read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(entry.size) for name, entry in stored.items()}
    dcp.load(tensors, checkpoint_id=folder / "trainer_state", no_dist=True)
    return tensors


@pytest.fixture(scope="module")
def huge(tiny, tmp_path_factory):
    """A run whose second and third loss are not finite on the second of two ranks, and what it printed."""
    folder = tmp_path_factory.mktemp("huge")
    arguments = run_flags(tiny.folder, folder / "out", *STEPS, "--scale_rewards", "none")
    return folder / "out", run_with("huge", 1, 2, arguments, folder)


def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing_and_is_counted(huge):
    output, printed = huge
    assert printed.count("is not finite") == 2
    states = [state(output / f"checkpoint-{step}") for step in (1, 2, 3, 4)]
    assert any(name.endswith(".exp_avg") for name in states[0])
    for name, tensor in states[0].items():
        assert tensor.isfinite().all() and tensor.equal(states[1][name]) and tensor.equal(states[2][name]), name
    assert not all(tensor.equal(states[3][name]) for name, tensor in states[0].items())
    found = curves(output)
    assert found["run/bad_steps"] == [0, 1, 2, 2] and found["learning_rate"][3] < found["learning_rate"][1]


def test_too_many_bad_steps_in_a_row_stop_all_ranks_with_advice_also_over_a_resume(tiny, huge, tmp_path):
    """Resumed after the first of two."""
    output = shutil.copytree(huge[0], tmp_path / "out", ignore=shutil.ignore_patterns("*-1", "*-3", "*-4", "final"))
    more = [*STEPS, "--scale_rewards", "none", "--max_bad_steps", "2", "--resume_from_checkpoint", "auto"]
    printed = run_with("huge", 1, 2, run_flags(tiny.folder, output, *more), tmp_path, code=2)
    assert "checkpoint-2: 2 of 4 steps are done" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("train.py: error: ")]
    assert "step 3" in line and "--max_bad_steps 2" in line and "--learning_rate" in line
    assert set(checkpoints(output)) == {2}


@pytest.fixture(scope="module")
def two_steps(tiny, tmp_path_factory):
    """The folder of a run with a checkpoint after its second step, where it was killed."""
    folder = tmp_path_factory.mktemp("two")
    run_with("", 0, 1, run_flags(tiny.folder, folder / "out", "--max_steps", "2", "--save_steps", "2"), folder)
    shutil.rmtree(folder / "out" / "final")
    return folder / "out"


@pytest.mark.parametrize(
    ("limit", "ranks", "faulty", "code"),
    [(1_500_000, 1, 0, 0), (600_000, 2, 1, 0), (100_000, 2, 0, 2)],
    ids=["optimizer's state", "that of one of two ranks", "weights"],
)
def test_a_full_disk_costs_a_checkpoint_but_not_the_run(tiny, two_steps, tmp_path, limit, ranks, faulty, code):
    output = shutil.copytree(two_steps, tmp_path / "out")
    # Workers hand over tensors as files in memory, which the limit would not spare.
    more = [*STEPS, "--dataloader_num_workers", "0", "--resume_from_checkpoint", "auto"]
    printed = run_with(str(limit), faulty, ranks, run_flags(tiny.folder, output, *more), tmp_path, code)
    for step in (3, 4):
        (line,) = [line for line in printed.splitlines() if f"checkpoint-{step}' cannot be saved" in line]
        assert "training continues without it" in line
    assert set(checkpoints(output)) == {2} and not list(output.glob("*.unfinished"))
    errors = [line for line in printed.splitlines() if line.startswith("train.py: error: ")]
    assert len(errors) == (code == 2) and all("final' cannot be saved" in line for line in errors)
    assert (output / "final").exists() == (code == 0)
    assert len(curves(output)["loss"]) == 4


def test_a_reward_function_that_hangs_is_named_with_its_sample_on_all_ranks(tiny, tmp_path):
    more = ["--reward_timeout", "1", "--global_batch_size", "4"]
    arguments = run_flags(tiny.folder, tmp_path / "out", *STEPS, *more)
    began = time.monotonic()
    printed = run_with("hangs", -1, 2, arguments, tmp_path, code=2)
    assert time.monotonic() - began < 60
    (line,) = [line for line in printed.splitlines() if line.startswith("train.py: error: ")]
    assert "faulty_reward" in line and "--reward_timeout 1 seconds" in line and "'s1'" in line


def test_ranks_with_unequal_work_wait_for_each_other(tmp_path):
    """In each step the second rank has 12 videos in place of one, and completions 13 times as long."""
    folder = make_tiny(tmp_path / "tiny", num_videos=[1, 12, 1, 12]).folder
    orders = ([Epochs([4], seed).order(epoch)[0] % 2 for epoch in (0, 1)] for seed in range(999))
    seed = next(seed for seed, (first, second) in enumerate(orders) if [*first, *second] == [0, 1] * 4)
    more = ["--max_steps", "4", "--max_videos", "0", "--global_batch_size", "2", "--seed", str(seed)]
    flags = [run_flags(folder, tmp_path / "out", *more, "--max_completion_length", tokens) for tokens in ("3", "40")]
    run_with("", 0, 2, flags, tmp_path)
    found = curves(tmp_path / "out")
    assert max(found["completions/max_length"]) == 40 and min(found["completions/min_length"]) <= 3
    assert min(found["grad_norm"]) > 0


def test_foreign_text_never_breaks_a_log_line(tiny, tmp_path):
    printed = run_with("complains", 0, 1, run_flags(tiny.folder, tmp_path / "out", *STEPS), tmp_path, code=2)
    (line,) = [line for line in printed.split("\n") if line.startswith("train.py: error: ")]
    assert "faulty_reward raised ValueError: \\x1b[31mno" in line
    assert all(c.isprintable() for c in line)
    assert "\x1b[31m" not in printed and "\u202e" not in printed  # in the traceback neither


def test_what_is_left_out_is_said_in_one_line(tiny, tmp_path, capfd):
    folder = shutil.copytree(tiny.folder, tmp_path / "tiny")
    samples = json.loads((folder / "data.json").read_text())
    samples[0] |= {"id": "evil\n\x1b[2Jtrain.py: error: \udcff", "video": ["bad\n\x1b.mp4"]}
    samples[0]["conversations"][0]["value"] = "EF?"
    (folder / "data.json").write_text(json.dumps(samples))
    (folder / "videos" / "bad\n\x1b.mp4").write_bytes(b"no video")
    arguments = run_flags(folder, tmp_path / "out", "--on_bad_video", "skip")
    assert train.main(arguments) == 0
    out, err = capfd.readouterr()
    (line,) = [line for line in out.split("\n") if "left out: " in line]
    assert "bad\\n\\x1b.mp4" in line and "\x1b[2J" not in out + err


def test_printable_text_is_left_alone_and_all_else_becomes_visible():
    assert printable("Größe 45 % | 心臓 \\n") == "Größe 45 % | 心臓 \\n"
    assert printable("a\nb\r\x1b[0m\u2028\u202e\x00\x85\ud800") == "a\\nb\\r\\x1b[0m\\u2028\\u202e\\x00\\x85\\ud800"
