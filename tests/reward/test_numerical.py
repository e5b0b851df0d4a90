import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reward.extract import extract_number
from reward.numerical import numerical_score, numerical_video_reward

ROOT = str(Path(__file__).parents[2])


def reward_of(truth, text, **kwargs):
    completions = [[{"role": "assistant", "content": text}]]
    return numerical_video_reward(completions, [{"role": "assistant", "content": truth}], **kwargs)[0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The EF is 65.4%", 65.4),
        ("The EF is 65.4 %", 65.4),
        ("65 percent", 65),
        ("65 Per Cent", 65),
        ("a 65-percent fraction", 65),
        ("65％", 65),
        ("６５％", 65),
        (r"\boxed{55\%}", 55),
        ("**55%**", 55),
        ("EF=55%", 55),
        ("射血分数为55%。", 55),
    ],
)
def test_percentages_are_read_in_every_spelling(text, number):
    assert extract_number("Of 2000 and " + text) == number  # only as a percentage does it come before 2000


def test_a_percentage_comes_before_an_earlier_bare_number():
    assert extract_number("With a volume of 120 mL the EF is 55%, not 60%.") == 55


def test_the_first_bare_number_is_taken_without_a_percentage():
    assert extract_number("It is 55, or maybe 60.") == 55


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("45.2", 45.2),
        ("EF is 45.", 45),
        ("EF is 45.\nclips are good", 45),
        ("EF is 45, image quality is good", 45),
        (".5", 0.5),
        ("approx.55", 55),
        ("wait...55", 55),
        ("0", 0),
        ("45,2", 45.2),
        ("0,055", 0.055),
        ("10,20,30", 10),
        ("10,20,30%", 30),
        ("1,234.5", 1234.5),
        ("1,234,567", 1234567),
        ("40...45", 40),
        ("40..45", 40),
        ("1.2.3", None),
        ("", None),
        ("No number", None),
        ("nan inf Infinity", None),
    ],
)
def test_decimals_thousands_and_lists_are_told_apart(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-18.5%", -18.5),
        ("strain is -18.5", -18.5),
        ("\u221218.5", -18.5),
        ("(-18)", -18),
        ("=-18", -18),
        ("+18", 18),
        ("- 18", 18),
        ("55-60%", 60),
        ("55 -60%", 60),
        ("(55)-60%", 60),
        ("55% -60", 55),
        ("EF-55%", 55),
        ("55\u201360%", 60),
        ("--5", 5),
        ("between 55% and -60%", 55),
        ("55 ± 5%", 55),
        ("55 +/- 5%", 55),
    ],
)
def test_a_hyphen_is_a_minus_sign_only_where_it_can_be_one(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "3 videos",
        "the 2 clips",
        "3 different echo videos",
        "view 2",
        "View #2 is good",
        "a good view 2.",
        "video 3:",
        "video no. 3",
        "view number 2",
        "frame #12",
        "#12",
        "frame-12",
        "views 2, 3 and 4",
        "views 2,3",
        "view 2 and 3",
        "videos 1-3",
        "2-3 videos",
        "2 or 3 videos",
        "in 5 of the 7 views",
        "in 5 out of 7 views",
        "in 5/7 views",
        "4-chamber",
        "the 4 chamber view",
        "2D",
        "A4C",
        "1st",
        "mp4",
        "view_2",
        "5e400",
        "55é",
        "1. The heart is normal\n2) The view is good",
        "In 100% of the clips the wall moves",
        "50% of 4 views",
    ],
)
def test_a_number_that_counts_or_labels_is_no_answer(text):
    assert extract_number(text) is None
    assert extract_number(f"{text}\nand so 61") == 61


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("video 3: 55", 55),
        ("For view 2, 55", 55),
        ("EF 55% image quality good", 55),
        ("55% of the blood", 55),
        ("In views 1-3, 55.5", 55.5),
        ("overview 55", 55),
        ("the clip shows 55", 55),
        ("55 (4-chamber view)", 55),
        ("72 beats per minute", 72),
        ("72 beats/min", 72),
        ("55 mm", 55),
        ("55. The heart is normal", 55),
        ("EF is 5. That is low", 5),
        ("Based on 3 videos and view 2 in 2D A4C, EF is 48", 48),
    ],
)
def test_a_number_near_a_counting_word_may_be_the_answer(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("<answer>55</answer>", 55),
        ("I see 40%. <Answer> 55\n</ANSWER> 60%", 55),
        ("40% <answer>none</answer> 60%", None),
        ("40% <answer>3 videos</answer>", None),
        ("40 <answer>55", 40),
        ("</answer>40<answer>55</answer>60", 55),
    ],
)
def test_only_the_answer_block_is_read_if_there_is_one(text, number):
    assert extract_number(text) == number


def test_a_number_too_large_for_a_float_is_none():
    assert extract_number("9" * 400) is None
    assert extract_number("9" * 400 + "%") is None
    assert extract_number("9" * 400 + " or 55") == 55
    assert extract_number("1" + "0" * 101) is None


@pytest.mark.parametrize(
    "piece",
    ["1 ", " ", ",", ".", "1,", "1.", ",111", "-", "1-", "%", "#", "1%%", "<answer>", "view ", "views 1, ", "1 of "]
    + ["1 of the ", "1 different ", "55 ± ", "A1", "\n", "1\n", " 1 -", "9", "1 clip ", "clips1 "],
)
def test_hostile_text_is_read_in_linear_time(piece):
    text = piece * (100_000 // len(piece))
    started = time.perf_counter()
    extract_number(text)
    extract_number("1" + text + "x")
    extract_number("view 1" + text + " 55%")
    assert time.perf_counter() - started < 1.0  # quadratic time takes minutes


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
