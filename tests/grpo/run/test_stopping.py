"""A signal stops all ranks after the step, and a rank that is killed costs nothing that is not done again."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from grpo.run.checkpoint import checkpoints
from tests.conftest import children_of, make_tiny
from tests.kill_and_resume import kill_and_resume, result, rewarded, run_flags, start, wait

AUTO = ["--resume_from_checkpoint", "auto"]
# Adapters with dropout and a KL: with all that makes resuming hard.
LORA = "--lora_enable --lora_rank 4 --lora_dropout 0.3 --beta 0.1 --vision_lr 1e-4".split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Three samples: in batches of two, checkpoints lie within an epoch and at its end."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "tiny", num_videos=(1, 2, 1))


def run(ranks: int, arguments: list[str], log: Path) -> str:
    """Run the program in new processes; return what it printed."""
    assert wait(start(ranks, arguments, log)) == [0] * ranks, log.read_text()
    return log.read_text()


def scored(log: Path) -> list[str]:
    """The completions with their rewards, as the reward function has logged them."""
    return sorted(Path(f"{log}.rewards").read_text().splitlines())


def steps_of(log: Path) -> list[int]:
    path = Path(f"{log}.rewards")
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(log: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while step not in steps_of(log):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_signals_stop_all_ranks_after_the_step_and_the_resumed_run_equals_the_uninterrupted_one(tiny, tmp_path):
    """Stopped twice, by a signal to all, their workers too, and by one to the second rank alone; equal to the bit."""
    whole, output, logs = tmp_path / "whole", tmp_path / "stopped", (tmp_path / "1", tmp_path / "2")
    flags = ["--max_steps", "6", *LORA]
    run(2, run_flags(tiny.folder, whole, *flags), logs[0])
    for number, step, is_to_all in ((signal.SIGINT, 1, True), (signal.SIGUSR1, 3, False)):
        processes = start(2, run_flags(tiny.folder, output, *flags, *AUTO), logs[1])
        wait_for_step(logs[1], step)
        for process in processes if is_to_all else processes[-1:]:
            for pid in [process.pid, *children_of(process.pid)] if is_to_all else [process.pid]:
                os.kill(pid, number)
        assert wait(processes) == [0] * 2
        done = max(checkpoints(output))
        assert step <= done < 6 and f"stopped after step {done}" in logs[1].read_text()
        assert max(steps_of(logs[1])) == done  # the last step that was begun
    run(2, run_flags(tiny.folder, output, *flags, *AUTO), logs[1])
    assert scored(logs[1]) == scored(logs[0]) != []  # each step once
    found, expected = result(output), result(whole)
    assert found == expected and found.rollouts != b""
    assert [step for step, _ in found.curves["loss"]] == [1, 2, 3, 4, 5, 6]
    assert max(value for _, value in found.curves["grad_norm"]) > 0


def test_a_second_signal_ends_the_program_at_once(tiny, tmp_path):
    more = "--max_steps 9 --save_steps 1 --num_generations 64 --max_completion_length 64".split()  # long steps
    (process,) = start(1, run_flags(tiny.folder, tmp_path / "out", *more), tmp_path / "log")
    wait_for_step(tmp_path / "log", 2)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert wait([process], 5) == [128 + signal.SIGINT]
    assert set(checkpoints(tmp_path / "out")) == {1}


def test_a_run_of_which_a_rank_is_killed_ends_as_one_of_which_none_was(tiny):
    """With this seed the second rank alone is killed; `python tests/kill_and_resume.py` kills as often as one likes."""
    more = ["--max_steps", "4", "--eval_data_path", str(tiny.folder / "data.json"), "--eval_steps", "2", *rewarded()]
    assert kill_and_resume(tiny.folder, 2, 1, signal.SIGKILL, 11, more)


def test_a_signal_breaks_an_evaluation_off_and_it_is_done_on_resume(tiny, tmp_path):
    """The signal comes while the step-0 evaluation of many samples runs."""
    samples = json.loads((tiny.folder / "data.json").read_text())
    many = [sample | {"id": f"{sample['id']}-{i}"} for i in range(200) for sample in samples]
    (tmp_path / "many.json").write_text(json.dumps(many))
    flags = ["--max_steps", "1", "--eval_data_path", str(tmp_path / "many.json"), "--eval_on_start", *AUTO]
    flags += ["--per_device_eval_batch_size", "2"]
    ranks = start(1, run_flags(tiny.folder, tmp_path / "out", *flags), tmp_path / "log")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("tensorboard/*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    os.kill(ranks[0].pid, signal.SIGTERM)
    began = time.monotonic()
    assert wait(ranks) == [0] and time.monotonic() - began < 15
    assert "stopped after step 0" in (tmp_path / "log").read_text()
    assert "step 0: held-out" not in (tmp_path / "log").read_text()
    assert not list((tmp_path / "out").glob("checkpoint-*"))
