"""Prompt ids against hand-assembled text, mRoPE positions against the papers' rule, by hand and token by token."""

import random

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from data.prompt import encode_prompt, load_tokenizer, mrope_positions
from data.sample import InputError
from grpo.demo.tiny_tokenizer import SPECIAL_TOKENS, build_tokenizer

TEXTS = ["What is the ejection fraction of this heart?", "You are a cardiologist. <answer>55.5%</answer>", "2024 2024"]
DEFAULT_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
ANSWER_STARTS = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXTS)


def encode(tokenizer, turns, grids=(), seconds=None):
    grids = torch.tensor(grids, dtype=torch.long).view(-1, 3)
    seconds = torch.ones(len(grids)) if seconds is None else torch.tensor(seconds)
    return encode_prompt(tuple(turns), tokenizer, grids, seconds, 2)


def video(num_tokens: int) -> str:
    return "<|vision_start|>" + "<|video_pad|>" * num_tokens + "<|vision_end|>"


def test_the_tokenizer_has_single_digits_nfc_and_one_token_per_special_token(tokenizer):
    assert len(tokenizer("2024").input_ids) == 4
    assert tokenizer("e\u0301").input_ids == tokenizer("\u00e9").input_ids
    assert [len(tokenizer(token).input_ids) for token in SPECIAL_TOKENS] == [1] * 8
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer("").input_ids == []  # nothing is added


def test_the_tokenizer_survives_any_text(tokenizer):
    text = "  <answer>55.5%</answer>\n\n\té 心臓 🫀 I'll\r\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_vocabulary_size_is_an_upper_bound(tokenizer):
    assert 256 + 8 < len(tokenizer) <= 512


def test_a_saved_tokenizer_loads_with_auto_tokenizer_and_encodes_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    turns = (("user", "<video>\nIs 60% normal?"),)
    assert encode(loaded, turns, [(2, 4, 4)])[0].tolist() == encode(tokenizer, turns, [(2, 4, 4)])[0].tolist()
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert set(loaded.all_special_tokens) == set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert loaded.decode(loaded(video(1)).input_ids, skip_special_tokens=True) == ""


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    assert load_tokenizer(str(tmp_path)).chat_template
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="chat template cannot be used: Cannot use chat template"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "turns, grids, expected",
    [
        pytest.param(
            [("user", "<video>\n<video>\nWhat?")],
            [(2, 4, 4), (1, 2, 6)],
            f"{DEFAULT_SYSTEM}<|im_start|>user\n{video(8)}{video(3)}What?<|im_end|>\n{ANSWER_STARTS}",
            id="newlines after tags belong to the tags",
        ),
        pytest.param(
            [("user", "Look:\n\n<video>\n\n at <video> this\n<video>")],
            [(1, 2, 2), (1, 2, 4), (2, 2, 2)],
            f"{DEFAULT_SYSTEM}<|im_start|>user\nLook:\n{video(1)}\n at {video(2)} this{video(2)}<|im_end|>\n"
            f"{ANSWER_STARTS}",
            id="tags in the middle of text take one newline on each side",
        ),
        pytest.param(
            [("system", "You are\na cardiologist."), ("user", "<video>EF?\n")],
            [(1, 2, 2)],
            f"<|im_start|>system\nYou are\na cardiologist.<|im_end|>\n<|im_start|>user\n{video(1)}EF?\n<|im_end|>\n"
            f"{ANSWER_STARTS}",
            id="a system turn replaces the default one",
        ),
        pytest.param(
            [("user", "<video>\nEF?"), ("assistant", "The <video> shows 55%."), ("user", "And here?\n<video>")],
            [(1, 2, 2), (3, 2, 2)],
            f"{DEFAULT_SYSTEM}<|im_start|>user\n{video(1)}EF?<|im_end|>\n<|im_start|>assistant\nThe <video> shows 55%."
            f"<|im_end|>\n<|im_start|>user\nAnd here?{video(3)}<|im_end|>\n{ANSWER_STARTS}",
            id="several turns; only user texts have tags",
        ),
        pytest.param(
            [("user", "No video.")],
            [],
            f"{DEFAULT_SYSTEM}<|im_start|>user\nNo video.<|im_end|>\n{ANSWER_STARTS}",
            id="text only",
        ),
        pytest.param(
            [("user", "<video>")],
            [(1, 2, 2)],
            f"{DEFAULT_SYSTEM}<|im_start|>user\n{video(1)}<|im_end|>\n{ANSWER_STARTS}",
            id="a tag only",
        ),
    ],
)
def test_prompt_ids_are_those_of_the_text_written_by_hand(tokenizer, turns, grids, expected):
    prompt_ids, position_ids = encode(tokenizer, turns, grids)
    assert tokenizer.decode(prompt_ids) == expected
    assert prompt_ids.tolist() == tokenizer(expected, add_special_tokens=False).input_ids
    assert prompt_ids.dtype == position_ids.dtype == torch.long
    assert position_ids.shape == (3, len(prompt_ids))


@pytest.mark.parametrize("text, num_grids", [("<video> EF?", 2), ("<video><video> EF?", 1), ("EF?", 1), ("<video>", 0)])
def test_tags_and_videos_that_differ_in_number_are_an_error(tokenizer, text, num_grids):
    with pytest.raises(ValueError, match=f"the text has {text.count('<video>')} tags for {num_grids} videos and"):
        encode(tokenizer, [("user", text)], [(1, 2, 2)] * num_grids)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_tokens_in_a_text_are_an_error(tokenizer, role, token):
    turns = [(role, f"before {token} after"), ("user", "<video>")]
    with pytest.raises(ValueError) as error:
        encode(tokenizer, turns, [(1, 2, 2)])
    assert str(error.value) == f"the {role} text contains the special token {token}: remove it"


def test_positions_of_the_papers_example():
    """Three steps of 2 x 2 tokens, 50 units of time apart: times 0, 50 and 100, and text from 101 on."""
    positions = mrope_positions(torch.arange(17) < 12, torch.tensor([[3, 4, 4]]), torch.tensor([2.0]), 25)
    assert positions.tolist() == [
        [0] * 4 + [50] * 4 + [100] * 4 + [101, 102, 103, 104, 105],
        [0, 0, 1, 1] * 3 + [101, 102, 103, 104, 105],
        [0, 1, 0, 1] * 3 + [101, 102, 103, 104, 105],
    ]


def test_positions_computed_by_hand():
    is_video = torch.tensor([False] * 3 + [True] * 12 + [False] * 2)
    positions = mrope_positions(is_video, torch.tensor([[2, 4, 6]]), torch.tensor([1.5]), 2)
    # 2 x 2 x 3 tokens from 3 on; a step of the grid lasts 1.5 s, 3 units of time, so that the largest position is 6
    assert positions.tolist() == [
        [0, 1, 2] + [3] * 6 + [6] * 6 + [7, 8],
        [0, 1, 2] + [3, 3, 3, 4, 4, 4] * 2 + [7, 8],
        [0, 1, 2] + [3, 4, 5] * 4 + [7, 8],
    ]


def test_text_goes_on_behind_the_longer_side_where_that_exceeds_the_time():
    positions = mrope_positions(torch.arange(5) < 4, torch.tensor([[1, 2, 8]]), torch.tensor([1.0]), 2)
    assert positions.tolist() == [[0, 0, 0, 0, 4], [0, 0, 0, 0, 4], [0, 1, 2, 3, 4]]


def test_thirty_clips_do_not_overlap_in_time(tokenizer):
    """16 frames at 84 x 84 in 3 seconds each: 8 steps of 0.375 s, times 0 to 5, so 6 positions a clip."""
    _, positions = encode(tokenizer, [("user", "<video>" * 30)], [(8, 6, 6)] * 30, [0.375] * 30)
    num_text = positions.shape[1] - 30 * 72
    assert positions.max() == num_text + 30 * 6 - 1


def test_positions_of_text_alone_count_up_on_all_axes(tokenizer):
    prompt_ids, position_ids = encode(tokenizer, [("user", "Hello")])
    assert torch.equal(position_ids, torch.arange(len(prompt_ids)).expand(3, -1))


def test_positions_refuse_placeholders_that_the_grids_do_not_explain():
    with pytest.raises(ValueError, match="the prompt has 3 placeholders for 4 tokens"):
        mrope_positions(torch.arange(4) > 0, torch.tensor([[1, 4, 4]]), torch.ones(1), 2)


def positions_token_by_token(prompt_ids, video_id, grids, seconds, tokens_per_second=2):
    """The papers' rule for one token after the other: nothing is shared with `mrope_positions`, nor with a library."""
    grids, seconds, positions = list(grids), list(seconds), []
    inside = 0  # tokens of the present video that are done
    for token in prompt_ids:
        first = 1 + max((max(position) for position in positions[: len(positions) - inside]), default=-1)
        if token != video_id:
            positions.append((first, first, first))
            continue
        t, h, w = grids[0][0], grids[0][1] // 2, grids[0][2] // 2
        step, y, x = inside // (h * w), inside // w % h, inside % w
        time = int(np.float32(step) * (np.float32(seconds[0]) * np.float32(tokens_per_second)))
        positions.append((first + time, first + y, first + x))
        inside += 1
        if inside == t * h * w:
            grids.pop(0), seconds.pop(0)
            inside = 0
    return [list(axis) for axis in zip(*positions, strict=True)]


@pytest.mark.parametrize("seed", range(40))
def test_positions_equal_the_rule_token_by_token(tokenizer, seed):
    rng = random.Random(seed)
    num_videos = rng.randint(1, 4)
    grids = [(rng.randint(1, 8), 2 * rng.randint(1, 4), 2 * rng.randint(1, 4)) for _ in range(num_videos)]
    seconds = [rng.choice([0.05, 0.35, 2 / 3, 1.0, 1.25, rng.uniform(0.05, 3)]) for _ in range(num_videos)]
    text = "".join("<video>" + rng.choice(["", "\n", " and then\n", " x"]) for _ in range(num_videos))
    turns = (("user", rng.choice(["", "See "]) + text), ("assistant", "Yes."), ("user", "EF?"))

    prompt_ids, position_ids = encode_prompt(turns, tokenizer, torch.tensor(grids), torch.tensor(seconds), 2)

    video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert position_ids.tolist() == positions_token_by_token(prompt_ids.tolist(), video_token_id, grids, seconds)


def test_time_is_computed_in_float32_as_in_qwens_code():
    prompt_ids = torch.full((60,), 9)
    positions = mrope_positions(
        prompt_ids == 9, torch.tensor([[60, 2, 2]]), torch.tensor([0.7], dtype=torch.float64), 2
    )
    assert positions[0, 45] == 63  # 45 steps of 1.4; in float64 they are 62.99…, which would be 62
