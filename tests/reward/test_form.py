import time

import pytest

from reward.form import format_reward


def rewards_of(*texts):
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    return format_reward(completions, [{"role": "assistant", "content": "55%"}] * len(texts), step=3)


@pytest.mark.parametrize(
    "text",
    [
        "<think>The wall moves.</think><answer>55%</answer>",
        "<think></think><answer>none</answer>",
        " \n<think>One line,\nanother.\n</think>\n\n<answer>\n55%\nor so\n</answer>\n ",
        "<think>2 < 3 > 1, </ think> and <b>bold</b></think><answer><55></answer>",
        "<think>射血分数</think><answer>55％</answer>",
    ],
)
def test_a_thought_and_an_answer_earn_one(text):
    assert rewards_of(text) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "55%",
        "<answer>55%</answer>",
        "<think>hm</think>",
        "<think>hm</think>55%",
        "hm<answer>55%</answer>",
        "<think>hm</think><answer></answer>",
        "<think>hm</think><answer> \n\t</answer>",
        "So: <think>hm</think><answer>55%</answer>",
        "<think>hm</think>so<answer>55%</answer>",
        "<think>hm</think><answer>55%</answer>.",
        "<answer>55%</answer><think>hm</think>",
        "<think>hm</think><answer>55%",
        "<think>hm<answer>55%</answer>",
        "<think>hm</think><answer>55%</answer><answer>55%</answer>",
        "<think>hm</think><think>hm</think><answer>55%</answer>",
        "<think>hm</think><answer>55%</answer></answer>",
        "<think>hm<think></think><answer>55%</answer>",
        "<think>hm</think></think><answer>55%</answer>",
        "<think><answer>60%</answer></think><answer>55%</answer>",
        "<think>hm</think><answer><think>55%</think></answer>",
        "<think>hm</think><answer>55%<answer></answer>",
        "<Think>hm</Think><Answer>55%</Answer>",
        "<thinks>hm</thinks><answer>55%</answer>",
    ],
)
def test_anything_missing_doubled_or_beside_earns_nothing(text):
    assert rewards_of(text) == [0.0]


def test_each_completion_is_judged_by_its_own_form():
    good = "<think>hm</think><answer>55%</answer>"
    assert rewards_of("55%", good, "", good) == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "piece", [" ", "\n", "<", "<think>", "</think>", "<answer>", "</answer>", "<think></think>", "a", "</think> "]
)
def test_hostile_text_is_judged_in_linear_time(piece):
    text = piece * (100_000 // len(piece))
    started = time.process_time()
    frames = "{}", "<think>{}", "<think>{}</think><answer>", "<think></think>{}", "<think></think><answer>a</answer>{}x"
    rewards_of(*(frame.format(text) for frame in frames))
    assert time.process_time() - started < 2.0  # quadratic time takes minutes
