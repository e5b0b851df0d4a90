"""One run per folder, and no rank that outlives its launcher."""

import ctypes
import os
import signal
import time
from pathlib import Path

import pytest

import train
from data.sample import InputError
from grpo import ranks
from grpo.run.lock import lock_folder
from tests.conftest import children_of, hold, start_torchrun
from tests.kill_and_resume import run_flags


def test_a_second_run_in_a_folder_names_the_first_one_and_ends(tiny, tmp_path, processes, capsys):
    first = hold(tmp_path / "out", processes)
    assert train.main(run_flags(tiny.folder, tmp_path / "out", "--max_steps", "1")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: error")]
    assert f"is in use by process {first.pid} on {os.uname().nodename}" in line
    assert os.listdir(tmp_path / "out") == [".lock"]
    first.kill()  # the lock goes with the process, however it ends
    first.join()
    assert train.main(run_flags(tiny.folder, tmp_path / "out", "--max_steps", "1")) == 0


def test_a_lock_survives_being_asked_for_again(tmp_path, processes):
    holder = hold(tmp_path / "out", processes, times=2)
    with pytest.raises(InputError, match=f"in use by process {holder.pid}"):
        lock_folder(str(tmp_path / "out"))


def leave_a_child(seconds: float) -> None:
    if os.fork() == 0:
        time.sleep(3)
    os._exit(0)


def test_children_that_outlive_a_run_do_not_hold_its_folder(tmp_path, processes):
    hold(tmp_path / "out", processes, then=leave_a_child).join()
    lock_folder(str(tmp_path / "out"))
    assert (tmp_path / "out" / ".lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}"


def test_where_locks_are_not_to_be_had_a_line_says_so(tmp_path, monkeypatch, capsys):
    def lockf(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    lock_folder(str(tmp_path))
    assert "cannot be locked (No locks available): make sure that no other run writes there" in capsys.readouterr().out


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def train_on_a_rank(arguments: list[str]) -> None:
    ctypes.CDLL(None).prctl(1, 0)  # no signal when the launcher dies: scripts get none from torchrun, functions do
    ranks.LAUNCHER_POLL_SECONDS = 0.2
    train.main(arguments)


def test_ranks_whose_launcher_was_killed_end_within_a_minute(tiny, tmp_path, processes):
    log, output = tmp_path / "log", tmp_path / "out"
    arguments = run_flags(tiny.folder, output, "--num_train_epochs", "100000")
    launcher = start_torchrun(train_on_a_rank, 2, (arguments,), log)
    processes.append(launcher)
    deadline = time.monotonic() + 120
    # Ranks meet through the launcher; after a step they have met.
    while not (output / "rollouts.jsonl").exists() or '"step": 2' not in (output / "rollouts.jsonl").read_text():
        assert time.monotonic() < deadline and launcher.is_alive(), log.read_text()
        time.sleep(0.2)
    started = children_of(launcher.pid)
    assert len(started) == 2 and all(map(is_running, started))
    launcher.kill()
    deadline = time.monotonic() + 60
    while any(map(is_running, started)) and time.monotonic() < deadline:
        time.sleep(0.2)
    late = [pid for pid in started if is_running(pid)]
    for pid in late:
        os.kill(pid, signal.SIGKILL)
    assert not late
    assert f"torchrun (process {launcher.pid}) is gone: this rank ends" in log.read_text()
