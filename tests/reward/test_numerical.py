import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reward.numerical import numerical_score, numerical_video_reward

ROOT = str(Path(__file__).parents[2])


def reward_of(truth, text, **kwargs):
    completions = [[{"role": "assistant", "content": text}]]
    return numerical_video_reward(completions, [{"role": "assistant", "content": truth}], **kwargs)[0]


def test_scores_are_the_hand_computed_ones():
    assert numerical_score(50, 50) == 1.0
    assert numerical_score(60, 60) == pytest.approx(7 / 6, abs=1e-12)
    assert numerical_score(60, 55) == pytest.approx(119 / 144 * 7 / 6, abs=1e-12)
    assert numerical_score(60, 65) == numerical_score(60, 55)
    assert numerical_score(50, 56) == pytest.approx(0.75, abs=1e-12)
    assert numerical_score(50, 56, error_scale=60) == pytest.approx(0.99, abs=1e-12)


def test_the_range_emphasis_ends_at_one_and_a_half():
    assert [numerical_score(truth, truth) for truth in (20, 80, 0, 100)] == [1.5] * 4


def test_the_score_is_zero_from_the_error_scale_on():
    assert numerical_score(50, 62) == 0
    assert numerical_score(50, -1e9) == 0
    assert numerical_score(50, 1e300) == 0


@pytest.mark.parametrize(
    ("truth", "text", "reward"),
    [
        ("EF is 60%", "EF is 60%", 1.0),
        ("EF is 60%", "EF is 55%", 0.97),
        ("EF is 30%", "EF is 30%", 1.0),
        ("EF is 60%", "No number", 0.0),
        ("Good quality", "Excellent", 0.5),
        ("Good quality", "55%", 0.5),
    ],
)
def test_the_rewards_of_the_original_table_come_out(truth, text, reward):
    assert round(reward_of(truth, text), 2) == reward


def test_a_far_off_number_earns_only_the_base_reward():
    assert reward_of("60%", "10%") == pytest.approx(0.1, abs=1e-12)


def test_the_error_scale_can_be_given():
    assert reward_of("50%", "56%", error_scale=8) == pytest.approx(0.1 + 0.9 * (1 - 9 / 16), abs=1e-12)


def test_each_completion_is_scored_against_its_own_truth():
    completions = [[{"role": "assistant", "content": text}] for text in ("60%", "60%", "none")]
    assistant = [{"role": "assistant", "content": answer} for answer in ("60%", "10%", "fine")]
    assert numerical_video_reward(completions, assistant, prompts=["a", "b", "c"]) == pytest.approx([1.0, 0.1, 0.5])
    with pytest.raises(ValueError):
        numerical_video_reward(completions, assistant[:2])


def test_the_debug_log_holds_one_object_per_completion(tmp_path, monkeypatch):
    path = tmp_path / "log"
    monkeypatch.setenv("DEBUG_MODE", "True")
    monkeypatch.setenv("LOG_PATH", str(path))
    reward_of("50%", "line\n56%", step=7, sample_id=["s1"])
    reward_of("fine", "none")
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert first.pop("reward") == pytest.approx(0.775, abs=1e-12)
    assert first == {
        "step": 7,
        "sample_id": "s1",
        "truth": "50%",
        "text": "line\n56%",
        "truth_number": 50.0,
        "predicted_number": 56.0,
        "error": 6.0,
    }
    assert second == {
        "step": None,
        "sample_id": None,
        "truth": "fine",
        "text": "none",
        "truth_number": None,
        "predicted_number": None,
        "error": None,
        "reward": 0.5,
    }


def test_the_debug_log_is_off_by_default_and_lands_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOG_PATH", raising=False)
    monkeypatch.delenv("DEBUG_MODE", raising=False)
    reward_of("50%", "56%")
    monkeypatch.setenv("DEBUG_MODE", "false")
    reward_of("50%", "56%")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("DEBUG_MODE", "true")
    reward_of("50%", "56%")
    assert [path.name for path in tmp_path.iterdir()] == ["grpo_rewards.log"]


def test_the_debug_log_waits_for_the_lock_of_another_process(tmp_path):
    script = """
from reward.numerical import numerical_video_reward
numerical_video_reward([[{"role": "assistant", "content": "5%"}]], [{"role": "assistant", "content": "5%"}])
"""
    path = tmp_path / "log"
    environment = os.environ | {"DEBUG_MODE": "true", "LOG_PATH": str(path), "PYTHONPATH": ROOT}
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        worker = subprocess.Popen([sys.executable, "-c", script], env=environment)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(timeout=1)
        assert path.read_text() == ""
    assert worker.wait(timeout=60) == 0
    assert json.loads(path.read_text())["reward"] == 1.0


def test_processes_that_log_at_once_never_tear_a_line(tmp_path):
    script = """
import sys
from reward.numerical import numerical_video_reward
for step in range(50):
    completions = [[{"role": "assistant", "content": sys.argv[1] * 5000}]] * 4
    numerical_video_reward(completions, [{"role": "assistant", "content": "5%"}] * 4, step=step)
"""
    path = tmp_path / "log"
    environment = os.environ | {"DEBUG_MODE": "true", "LOG_PATH": str(path), "PYTHONPATH": ROOT}
    workers = [subprocess.Popen([sys.executable, "-c", script, letter], env=environment) for letter in "abcd"]
    assert [worker.wait() for worker in workers] == [0] * 4
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((record["text"][0], record["step"]) for record in records) == sorted(
        (letter, step) for letter in "abcd" for step in range(50) for _ in range(4)
    )
    assert all(record["text"] == record["text"][0] * 5000 for record in records)
