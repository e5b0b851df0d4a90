"""What TensorBoard shows of completions and frames: whole for 1 and for 30 videos, and unbroken by any text."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from data.loader import load_prompt
from data.media.patches import resize
from grpo.run.show import WIDTH, bands, completions_table, contact_sheet, table_cell, video_strips
from tests.conftest import OPTIONS
from tests.data.media.test_video import read_frames
from tests.grpo.run.test_records import GROUPS, group
from tests.test_train import flags

NAN = float("nan")
FOREIGN = "a|b\n| --- |`x`<b>\x1b[31m\u202e$x$ 55% \u5c04\u8840 " + "\U0001f600" * 40 + "w" * 3000


def test_sampled_text_stays_in_its_table_cell():
    cell = table_cell(FOREIGN)
    assert not set(cell) & set("|`<>\n\x1b\u202e")


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.2, 0.9, 0.1, 0.5], [1, 0, 2]),
        ([0.5, 0.5, 0.5], [0, 1, 2]),
        ([NAN, 0.0, 1.0], [2, 1, 0]),
        ([0.3, 0.7], [1, 0]),
    ],
)
def test_best_middle_and_worst_completion_of_a_group(rewards, expected):
    assert bands(torch.tensor(rewards)) == expected


def test_the_table_shows_several_prompts_with_the_numbers_that_were_read():
    head, line, *rows = completions_table(GROUPS, num_prompts=2).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[:3] == [
        ["EF?", "It is 3%.", "none", "none", "1.000", "-0.500"],
        ["EF?", "It is 3%.", "1%", "1", "0.000", "+0.500"],
        ["EF?", "It is 3%.", "4%", "4", "nan", "+0.000"],
    ]
    assert len(cells) == 6 and len(completions_table(GROUPS, num_prompts=1).splitlines()) == 5


def test_a_strip_shows_the_frames_that_the_model_saw(tiny):
    prompt = tiny.prompts[1]  # 3 videos
    strips = video_strips(prompt)
    assert [label for label, _ in strips] == [f"4 frames of 56x56: 1_{i}.mp4" for i in range(3)]
    for media, (_, strip) in zip(prompt.sample.media, strips, strict=True):
        frames = resize(read_frames(media.path, OPTIONS.video)[0], 56, 56).permute(0, 2, 3, 1).numpy()  # (T, H, W, 3)
        drawn = np.asarray(strip.resize((4 * 56, 56), Image.Resampling.BOX))  # twice as large on the sheet
        assert abs(drawn.astype(int) - np.concatenate(list(frames), axis=1)).mean() < 20  # noise, enlarged and reduced


@pytest.mark.parametrize(("num_videos", "columns"), [(1, 1), (8, 2), (30, 3), (65, 3)])
def test_a_contact_sheet_holds_all_videos_and_any_text(tiny, num_videos, columns):
    sample = dataclasses.replace(
        tiny.prompts[0].sample,
        media=tiny.prompts[0].sample.media * num_videos,
        turns=(("user", "<video>" * num_videos + FOREIGN),),
        id=FOREIGN,
        answer=FOREIGN,
    )
    prompt = load_prompt(sample, tiny.tokenizer, 2, OPTIONS)
    record = group([0.0, 1.0, NAN], [2, 3, 4], [True, True, False], texts=[FOREIGN, "", "4%"])
    sheet = contact_sheet(prompt, record, step=3)
    assert sheet.dtype == np.uint8 and sheet.shape[1:] == (WIDTH, 3)
    strips = video_strips(prompt)
    assert len(strips) == min(num_videos, 61)  # 60 videos, and a line about the others
    rows = -(-len(strips) // columns)
    assert rows * 50 < sheet.shape[0] < 2600
    is_noise = (sheet.max(axis=2) - sheet.min(axis=2)) > 30  # the clips are coloured, text and paper are not
    begins = [8 + i * (WIDTH - 8) // columns for i in range(columns)]
    assert all(is_noise[:, x : x + 100].any() and not is_noise[:, x - 8 : x].any() for x in begins)
    assert (sheet[-8:] == 255).all()  # the last line of text fits
    assert (sheet[-24:-8] < 128).any()


def test_a_run_shows_a_contact_sheet_and_histograms(tiny, tmp_path):
    assert (
        train.main(flags(tiny, tmp_path / "out", *"--max_steps 3 --logging_steps 2 --log_completions 1".split())) == 0
    )
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    (sheet,) = events.Images("contact_sheet")
    image = Image.open(io.BytesIO(sheet.encoded_image_string))
    assert sheet.step == 2 and image.size == (sheet.width, sheet.height) and sheet.width == WIDTH
    assert np.asarray(image)[-8:].min() > 250  # the margin: drawn the right way up
    tags = {f"histograms/{name}" for name in ("reward", "advantage", "completion_length")}
    assert tags <= set(events.Tags()["histograms"])
    assert len((tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()) == 3 * 8  # all steps, not only logged
