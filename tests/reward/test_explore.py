"""The look at a reward: its flat parts, the groups it cannot tell apart, and what is wrong with what it is given."""

import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread

from reward.explore import curve, draw, equal_share, explore, flat_parts, main, policies, read_truths, rewards_of
from reward.functions import load_reward_functions

TWO = ["numerical_video_reward", "smooth_numerical_reward"]
SMOOTH = load_reward_functions(TWO[1:], [], "", [0.0, 100.0])[0]


def run(folder, capsys, *flags):
    """Run the command: exit code, what is printed, and the errors."""
    code = main([*flags, "--output", f"{folder / 'reward.png'}"])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def parts_of(text, name):
    """The flat parts in the table: {truth: text}."""
    block = text[text.index(f"{name} does not change") :].split("groups of")[0]
    return {int(truth): parts for truth, parts in re.findall(r"^    truth (\d+) +(.*)$", block, re.MULTILINE)}


def shares_of(text, name):
    """The shares of equal groups in the table, percent: {bias: [of each spread]}."""
    block = text[text.index(f"{name} does not change") :].split("\n\n")[0]
    rows = re.findall(r"^    bias (\d+) +(.*)$", block, re.MULTILINE)
    return {int(bias): [int(share) for share in re.findall(r"(\d+)%", row)] for bias, row in rows}


def write_reward(folder, body):
    """Write a file with a reward function `mine`; return what --reward_funcs takes."""
    lines = ["from reward.extract import extract_number as number", "def mine(completions, assistant, **kwargs):"]
    lines += ["    pairs = [(number(a['content']), number(c[0]['content'])) for a, c in zip(assistant, completions)]"]
    (folder / "mine.py").write_text("\n".join([*lines, f"    {body}"]) + "\n")
    return f"{folder / 'mine.py'}:mine"


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """What the command leaves and prints without a flag."""
    folder, printed, errors = tmp_path_factory.mktemp("explore"), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(errors):
        patch.chdir(folder)
        patch.setenv("DEBUG_MODE", "true")
        assert main([]) == 0
    assert not errors.getvalue()
    return folder, printed.getvalue()


def test_the_table_names_the_flat_parts_of_both_rewards(default):
    _, text = default
    # The bound at 1 is reached where (1 - (e / 12)^2) * emphasis = 1, at e = 12 * sqrt(1 - 1 / emphasis): 6.93 with an
    # emphasis of 1.5, 5.37 with 1.25, of which steps of 0.1 reach 5.3; at a truth of 50 it is a point.
    assert parts_of(text, TWO[0]) == {
        20: "-20 to -12, -6.9 to 6.9, 12 to 80",
        35: "-35 to -12, -5.3 to 5.3, 12 to 65",
        50: "-50 to -12, 12 to 50",
        65: "-65 to -12, -5.3 to 5.3, 12 to 35",
        80: "-80 to -12, -6.9 to 6.9, 12 to 20",
    }
    assert parts_of(text, TWO[1]) == dict.fromkeys((20, 35, 50, 65, 80), "nowhere")


def test_the_flat_parts_follow_the_arguments_and_the_valid_range(tmp_path, capsys):
    flags = ["--reward_funcs", TWO[0], "--reward_kwargs", '{"error_scale": 18}', "--valid_range", "20", "80"]
    _, text, _ = run(tmp_path, capsys, *flags)
    # The first truth is 20 + 60 * 0.2 = 32: emphasis 1.3, flat to 18 * sqrt(1 - 1 / 1.3) = 8.647, where steps of 0.06
    # reach 8.64. Answers that are too low are at most 12 off.
    assert parts_of(text, TWO[0])[32] == "-8.64 to 8.64, 18 to 48"
    assert parts_of(text, TWO[0])[50] == "-30 to -18, 18 to 30"


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("return [1.0 if abs(x - y) <= 5 else 0.0 for y, x in pairs]", [[-50, -5.1], [-5, 5], [5.1, 50]]),
        ("return [min(x, y) for y, x in pairs]", [[0, 50]]),
        ("return [abs(x - y) if abs(x - y) < 10 else None for y, x in pairs]", [[-50, -10], [10, 50]]),
        ("return [float(y) for y, x in pairs]", [[-50, 50]]),
        ("return [float(x) for y, x in pairs]", []),
    ],
)
def test_flat_parts_of_steps_one_sided_rewards_and_no_say(tmp_path, body, parts):
    (mine,) = load_reward_functions([write_reward(tmp_path, body)], [], "", [0.0, 100.0])
    errors, rewards = curve(mine, 50.0, [0.0, 100.0])
    assert errors[flat_parts(rewards)].tolist() == parts


def test_a_curve_covers_the_valid_range_and_holds_the_rewards():
    errors, rewards = curve(SMOOTH, 20.0, [0.0, 100.0])
    assert (errors[0], errors[-1], len(errors)) == (-20, 80, 1001)
    expected = SMOOTH.call([[{"content": "22.5%"}]], [{"content": "20%"}], is_training=False)[0]
    assert rewards[errors == 2.5] == np.float32(expected)


def test_changes_are_found_at_both_ends_of_a_flat_part():
    assert flat_parts(np.array([2, 1, 1, 3, 1, 1, 2.0])).tolist() == [[1, 2], [4, 5]]
    assert flat_parts(np.array([0, 0, 0, 4, 4, 5.0])).tolist() == [[0, 2], [3, 4]]


def test_the_share_of_equal_groups_is_that_of_all_completions_in_one_reward():
    probabilities = np.array([[0.5, 1.0], [0.25, 0.0], [0.25, 0.0]])  # (answers, policies): the second never varies
    share = equal_share(np.array([1.0, 1.0, 0.5]), probabilities, 2)
    np.testing.assert_allclose(share, [0.75**2 + 0.25**2, 1.0])


def test_completions_without_a_say_do_not_count_in_their_group():
    # Of two completions: both scored and equal 0.25 + 0.0625, one not scored 2 * 0.25 * 0.75, none scored 0.0625.
    share = equal_share(np.array([1.0, 0.5, np.nan]), np.array([0.5, 0.25, 0.25]), 2)
    np.testing.assert_allclose(share, 0.25 + 0.0625 + 0.375 + 0.0625)


def test_policies_answer_whole_numbers_around_the_truth_within_the_range():
    answers, probabilities = policies(50.3, [0.0, 100.0])
    np.testing.assert_allclose(probabilities.sum(axis=0), 1.0, atol=1e-9)
    assert np.array_equal(np.unique(answers), np.arange(0, 101))
    # Bias 0, spread 1: 50 is answered from 49.5 to 50.5, -0.8 to 0.2 from the truth: 0.57926 - 0.21186.
    np.testing.assert_allclose(probabilities[answers == 50, 0, 0], 0.36740, atol=1e-5)
    answers, probabilities = policies(95.0, [0.0, 100.0])
    np.testing.assert_allclose(probabilities.sum(axis=0), 1.0, atol=1e-9)
    assert answers.max() == 100
    # Bias 5, spread 3: the middle is 100, which all from 99.5 on is clipped to: 1 - normal(-0.5 / 3 = -0.16667).
    np.testing.assert_allclose(probabilities[answers == 100, 1, 1].sum(), 0.56618, atol=1e-5)


def test_shares_in_the_table_by_hand(tmp_path, capsys):
    (tmp_path / "truths.txt").write_text("50\n20\n50\nnormal\n50\n")
    above = write_reward(tmp_path, "return [float(x >= y) for y, x in pairs]")
    flags = ["--truths", f"{tmp_path / 'truths.txt'}", "--reward_funcs", above, *TWO, "--num_generations", "2"]
    code, text, _ = run(tmp_path, capsys, *flags)
    assert code == 0 and text.startswith("4 truths, 20 to 50, median 50; 1 without a number left out\n")
    # At bias 0 and spread 1 an answer counts as above from -0.5 on, 0.69146: 0.69146^2 + 0.30854^2.
    assert shares_of(text, "mine")[0][0] == 57
    assert shares_of(text, "mine")[20][0] == 100
    # Bias 20, spread 1: all are farther off than 12. Bias 0, spread 1: at 20 all are within 6.9; at 50 rewards are
    # equal for equal absolute errors: 0.38292^2 + (2 * 0.24173)^2 + (2 * 0.06060)^2 + (2 * 0.00598)^2 = 0.3952.
    assert shares_of(text, TWO[0])[20][0] == 100
    assert shares_of(text, TWO[0])[0][0] == round(100 * (1 + 3 * 0.3952) / 4)
    # The smooth reward is equal for equal absolute errors at both truths.
    assert shares_of(text, TWO[1])[0][0] == round(100 * 0.3952)


def test_the_share_is_that_of_groups_that_are_drawn():
    rng, truth = np.random.default_rng(0), 62.4
    (reward,) = load_reward_functions(TWO[:1], [], "", [0.0, 100.0])
    answers, probabilities = policies(truth, [0.0, 100.0])
    share = equal_share(rewards_of(reward, truth, answers), probabilities, 8)
    for (i, bias), (j, spread) in (((0, 0), (1, 3)), ((3, 20), (2, 6)), ((0, 0), (0, 1))):
        drawn = (truth + bias + spread * rng.standard_normal((20000, 8))).round().clip(0, 100)
        rewards = rewards_of(reward, truth, drawn.ravel()).reshape(drawn.shape)
        assert abs((rewards.min(axis=1) == rewards.max(axis=1)).mean() - share[i, j]) < 0.01


def test_each_pair_of_truth_and_answer_is_scored_once(tmp_path):
    body = f"open({str(tmp_path / 'log')!r}, 'a').writelines(f'{{p}}\\n' for p in pairs); return [x for _, x in pairs]"
    (mine,) = load_reward_functions([write_reward(tmp_path, body)], [], "", [0.0, 100.0])
    args = SimpleNamespace(valid_range=[0.0, 100.0], num_generations=8)
    explore(mine, np.array([20.0, 50.0]), np.array([42.25, 61.5, 42.25]), args)
    pairs = (tmp_path / "log").read_text().splitlines()
    assert len(pairs) == len(set(pairs)) == 2 * 1001 + 2 * 101


def sample(answer, speaker="gpt"):
    turns = [{"from": "human", "value": "Of 3 videos, what is the EF?"}, {"from": speaker, "value": answer}]
    return {"id": "s", "video": "a.mp4", "conversations": turns}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([sample("The EF is 55%."), sample("40.5"), sample("normal")], indent=1),
        "\n".join(json.dumps(sample(answer)) for answer in ("The EF is 55%.", "40.5", "normal")) + "\n",
        "\ufeff[55, 40.5, null]",
        '["EF: 55%", "40.5%", "none of the 3 videos"]',
        "55\r\n\r\n40.5%\r\nnormal\r\n",
        "\n\nThe EF is 55%.\n  40.5\nnormal",
    ],
)
def test_truths_are_read_from_samples_numbers_and_answers(tmp_path, text):
    (tmp_path / "truths").write_text(text, encoding="utf-8", newline="")
    numbers, left_out = read_truths(str(tmp_path / "truths"))
    assert numbers.tolist() == [55, 40.5] and left_out == 1


def test_the_picture_has_a_row_per_reward_and_marks_flat_parts(default):
    folder, text = default
    pixels = imread(folder / "reward.png")
    assert "reward.png" in text and (folder / "reward.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in folder.iterdir()] == ["reward.png"]  # no grpo_rewards.log
    assert pixels.shape[:2] == (924, 1210) and 0.02 < (pixels[..., :3].mean(axis=2) < 0.9).mean() < 0.5
    errors = np.array([-2.0, -1, 0, 1, 2])
    curves = [(errors, np.array([0, 0, 1, 0.5, 0.2]))] * 5
    figure = draw({"one": (curves, np.zeros((4, 4)))}, np.arange(5), 8, "")
    left, right = figure.axes
    flat = [line.get_xdata().tolist() for line in left.lines if line.get_linewidth() == 9]
    assert flat == [[-2, -1]] * 5 + [[]]  # the last is that of the legend
    assert left.get_title() == "one" and len(right.texts) == 16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--truths", "{}/no.json"], r"--truths '.*no.json' cannot be read \(.*No such file"),
        (["--truths", "{}"], r"--truths '.*' cannot be read \(.*Is a directory"),
        (["--truths", "{}/bytes"], r"--truths '.*bytes' cannot be read \(.*utf-8.*: name a file of samples or numbers"),
        (["--truths", "{}/torn.json"], r"torn.json': malformed JSON at line 1, column 6 "),
        (["--truths", "{}/torn.jsonl"], r"torn.jsonl': malformed JSON at line 2, column 10 "),
        (["--truths", "{}/human.json"], r"human.json': sample 's': the last two turns must be "),
        (["--truths", "{}/words.txt"], r"no number in 2 entries: name a file of samples or numbers"),
        (["--truths", "{}/empty.txt"], r"no number in 0 entries"),
        (["--reward_funcs", "nonsense"], r"--reward_funcs 'nonsense': no such function or file: take "),
        (["--reward_funcs", TWO[0], TWO[0]], r"--reward_funcs: 'numerical_video_reward' occurs twice"),
        (["--reward_kwargs", "{{"], r"--reward_kwargs '{{' is no JSON object"),
        (["--reward_kwargs", '{"eror_scale": 3}'], r"no reward function has a parameter 'eror_scale'"),
        (
            ["--reward_funcs", "concordance_reward"],
            r"concordance_reward: all numbers have the same reward, so it judges .*, or a whole step",
        ),
        (["--reward_funcs", "format_reward"], r"format_reward: all numbers have the same reward, so it judges "),
        (["--valid_range", "9", "3"], r"--valid_range 9 3: give the lowest and the highest"),
        (["--valid_range", "0", "inf"], r"--valid_range 0 inf: give the lowest and the highest"),
        (["--valid_range", "0", "nan"], r"--valid_range 0 nan: give the lowest and the highest"),
        (["--num_generations", "1"], r"--num_generations 1: give at least 2"),
        (
            ["--num_generations", "many"],
            "invalid int value: 'many': python -m reward.explore --help explains",
        ),
        (["--truth", "a"], r"unknown flag '--truth' \(did you mean --truths\?\)"),
    ],
)
def test_bad_input_is_one_line_that_names_it(tmp_path, capsys, flags, message):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe5")
    (tmp_path / "torn.json").write_text("[55, ")
    (tmp_path / "torn.jsonl").write_text(json.dumps(sample("55%")) + "\n" + '{"id": 3, ')
    (tmp_path / "human.json").write_text(json.dumps([sample("55%", "human")]))
    (tmp_path / "words.txt").write_text("normal\nreduced\n")
    (tmp_path / "empty.txt").write_text("\n")
    code, text, errors = run(tmp_path, capsys, *(flag.replace("{}", str(tmp_path)) for flag in flags))
    assert code == 2 and not text and not (tmp_path / "reward.png").exists()
    assert re.fullmatch(rf"python -m reward.explore: error: .*{message}.*\n", errors), errors


@pytest.mark.parametrize("place", ["no/reward.png", "", "full"])
def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys, place):
    if place == "full":
        (tmp_path / "full").symlink_to("/dev/full")  # every write to it fails
    assert main(["--reward_funcs", TWO[1], "--output", f"{tmp_path}/{place}"]) == 2
    text, errors = capsys.readouterr()
    assert "does not change at errors" in text  # what was found is not lost
    assert re.fullmatch(r"python -m reward.explore: error: --output '.*' cannot be written.*: make room.*\n", errors)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return [1 / (y - 35) for y, x in pairs]",
            "ZeroDivisionError: .*, for samples 'answer 0%, truth 35%', .*: fix",
        ),
        ("return kwargs['severity']", "KeyError: 'severity', for samples 'answer 0%, truth 20%', "),
        ("return None", "TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_a_function_that_raises_is_shown_with_its_traceback(tmp_path, capsys, body, message):
    code, text, errors = run(tmp_path, capsys, "--reward_funcs", write_reward(tmp_path, body))
    *traceback, line = errors.splitlines()
    assert code == 2 and not text and traceback[0] == "Traceback (most recent call last):"
    assert re.match(f"python -m reward.explore: error: reward function mine raised {message}", line)


def test_a_file_that_cannot_be_imported_is_shown_with_its_traceback(tmp_path, capsys):
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    code, _, errors = run(tmp_path, capsys, "--reward_funcs", f"{tmp_path / 'broken.py'}:mine")
    *traceback, line = errors.splitlines()
    assert code == 2 and traceback[0] == "Traceback (most recent call last):" and "nothing_of_this_name" in line


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [None for pair in pairs]", "all numbers have the same reward"),
        ("return [1.0]", "gave 1 rewards for 1001 completions"),
        ("return [float('inf') if x > y else 0 for y, x in pairs]", "gave inf for sample 'answer 20.1%, truth 20%'"),
        ("return ['0.5' if x > y else 0 for y, x in pairs]", "gave '0.5' for sample 'answer 20.1%, truth 20%'"),
    ],
)
def test_a_function_that_cannot_be_drawn_is_one_line(tmp_path, capsys, body, message):
    code, text, errors = run(tmp_path, capsys, "--reward_funcs", write_reward(tmp_path, body))
    assert code == 2 and not text
    assert re.fullmatch(rf"python -m reward.explore: error: .*{message}.*\n", errors), errors
