"""Which frames of a video and which size, against hand-computed tables."""

import numpy as np
import pytest

from data.media.frames import VideoOptions, choose_frames, frame_span, smart_resize, target_size
from data.sample import TooFewFrames

TOKEN = 28 * 28  # pixels


@pytest.mark.parametrize(
    "total_frames, video_fps, options, expected",
    [
        (32, 8.0, {}, [0, 4, 9, 13, 18, 22, 27, 31]),  # 4 s at 2 fps = 8; steps of 31/7
        (60, 29.97, {}, [0, 20, 39, 59]),  # 4.004 -> 4; steps of 59/3
        (30, 29.97, {"fps": 1.0}, [0, 10, 19, 29]),  # 1.001 -> at least 4; steps of 29/3
        (21, 6.25, {"fps": 2.5}, [0, 3, 6, 9, 11, 14, 17, 20]),  # 8.4 -> 8; steps of 20/7
        (20, 8.0, {"fps": 3.0}, [0, 4, 8, 11, 15, 19]),  # 7.5 -> 6; steps of 19/5
        (5, 30.0, {}, [0, 1, 3, 4]),  # at least 4, although 1/3 frame is asked for; steps of 4/3
        (3, 30.0, {}, [0, 2]),  # at least 4, but at most floor_even(3)
        (2, 30.0, {}, [0, 1]),
        (7, 8.0, {"fps": 30.0}, [0, 1, 2, 4, 5, 6]),  # 26 -> floor_even(7); steps of 6/5
        (16, 8.0, {"nframes": 16}, list(range(16))),
        (16, 8.0, {"nframes": 4}, [0, 5, 10, 15]),
        (16, 8.0, {"nframes": 5}, [0, 5, 10, 15]),  # 2.5 rounds to 2 pairs
        (16, 8.0, {"nframes": 3}, [0, 5, 10, 15]),  # 1.5 rounds to 2 pairs
        (16, 8.0, {"nframes": 2}, [0, 15]),
    ],
)
def test_frames_are_chosen_by_the_rules_of_qwen_vl_utils(total_frames, video_fps, options, expected):
    assert choose_frames(total_frames, video_fps, VideoOptions(**options))[0] == expected


def test_a_part_of_a_video_is_from_its_first_to_its_last_frame_both_inclusive():
    """16 frames of 2 seconds; frame k is shown at k / 8 seconds."""
    for part, frames in (
        ({}, range(16)),
        ({"video_start": 0.5}, range(4, 16)),
        ({"video_start": 0.55, "video_end": 1.05}, range(5, 9)),  # 4.4 and 8.4 frames
        ({"video_end": 2.0}, range(16)),
    ):
        assert frame_span(16, 8.0, VideoOptions(**part)) == frames
    assert frame_span(4, 8.0, VideoOptions()) == range(4)  # of half a second
    for options, part in (
        ({"video_start": 2.5}, "video_start 2.5 to video_end 2"),
        ({"video_end": 2.5}, "video_start 0 to video_end 2.5"),
    ):
        with pytest.raises(ValueError, match=f"lasts 2 seconds, and so has no part from {part}$"):
            frame_span(16, 8.0, VideoOptions(**options))
    # Of frames 4 to 8, five in 5/8 seconds, four are read: 6.4 per second.
    some = VideoOptions(nframes=4, video_start=0.5, video_end=1.0)
    assert choose_frames(16, 8.0, some) == ([4, 5, 7, 8], 6.4)


def test_a_size_of_a_side_200_times_the_other_is_the_longest_there_is():
    assert VideoOptions(resized_width=10, resized_height=2000)
    with pytest.raises(ValueError, match="at most 200 times"):
        VideoOptions(resized_width=2001, resized_height=10)


def test_bounds_may_be_equal_and_the_most_pixels_are_1_05_times_the_least_if_those_are_many():
    assert choose_frames(100, 8.0, VideoOptions(min_frames=6, max_frames=6))[0] == [0, 20, 40, 59, 79, 99]
    assert VideoOptions(min_pixels=800 * TOKEN, max_pixels=840 * TOKEN)
    with pytest.raises(ValueError, match=f"give {840 * TOKEN}$"):
        VideoOptions(min_pixels=800 * TOKEN, max_pixels=840 * TOKEN + 1)


def test_a_long_video_gives_768_frames_from_first_to_last():
    indices = choose_frames(100_000, 25.0, VideoOptions())[0]
    assert (len(indices), indices[0], indices[-1]) == (768, 0, 99_999)


@pytest.mark.parametrize(
    "total_frames, options, message",
    [
        (10, {"nframes": 16}, "has 10 frames, --nframes 16 asks for 16"),
        (3, {"nframes": 3}, "has 3 frames, --nframes 3 asks for 4"),
        (1, {}, "has 1 frame, at least 2 are needed"),
    ],
)
def test_too_few_frames_are_an_error_with_both_numbers(total_frames, options, message):
    with pytest.raises(TooFewFrames) as error:
        choose_frames(total_frames, 8.0, VideoOptions(**options))
    assert str(error.value) == message


@pytest.mark.parametrize(
    "height, width, min_pixels, max_pixels, expected",
    [
        (480, 640, 128 * TOKEN, 768 * TOKEN, (476, 644)),  # 17.1 and 22.9 units of 28
        (64, 64, 128 * TOKEN, 768 * TOKEN, (336, 336)),  # grows by 4.95 to 316.8, up to 12 units
        (1080, 1920, 128 * TOKEN, 768 * TOKEN, (560, 1008)),  # shrinks by 1.856 to 582 x 1034.6, down
        (42, 70, 4 * TOKEN, 768 * TOKEN, (56, 56)),  # 1.5 and 2.5 units both round to 2
        (10, 1000, 4 * TOKEN, 10 * TOKEN, (28, 868)),  # shrinks by 1.129; no side below 28
    ],
)
def test_smart_resize_table(height, width, min_pixels, max_pixels, expected):
    assert smart_resize(height, width, min_pixels, max_pixels) == expected
    assert smart_resize(width, height, min_pixels, max_pixels) == expected[::-1]


def test_smart_resize_refuses_frames_200_times_as_long_as_wide():
    assert smart_resize(10, 2000, 4 * TOKEN, 768 * TOKEN)
    with pytest.raises(ValueError, match="200 times"):
        smart_resize(10, 2001, 4 * TOKEN, 768 * TOKEN)


@pytest.mark.parametrize(
    "num_frames, options, expected",
    [
        (300, {}, (560, 1008)),  # 128000 · 0.9 / 300 · 2 = 768 tokens per frame: no tighter than the default
        (768, {}, (336, 644)),  # 300 tokens: shrinks by 2.969 to 363.7 x 646.6
        (768, {"min_pixels": 400 * TOKEN}, (420, 756)),  # 1.05 · 400 tokens: shrinks by 2.509 to 430.4 x 765.1
        (16, {"max_pixels": 200 * TOKEN}, (280, 504)),  # shrinks by 3.637 to 297.0 x 528.0
        (16, {"resized_width": 64, "resized_height": 64}, (56, 56)),
        (16, {"resized_width": 100, "resized_height": 60}, (56, 112)),
        (16, {"resized_width": 28, "resized_height": 28}, (56, 56)),  # at least 4 tokens
    ],
)
def test_the_size_of_a_1080p_video(num_frames, options, expected):
    assert target_size(1080, 1920, num_frames, VideoOptions(**options)) == expected


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fps": 2.0, "nframes": 8}, "not both"),
        ({"resized_width": 56}, "together"),
        ({"resized_height": 56}, "together"),
        ({"min_pixels": 2 * TOKEN, "max_pixels": TOKEN}, "min_pixels 1568 is more than max_pixels 784"),
        ({"max_pixels": 768 * TOKEN + 1}, "max_pixels 602113 is above the limit of qwen-vl-utils: give 602112"),
        ({"fps": 0.0}, "fps must be positive"),
        ({"nframes": -4}, "nframes must be positive"),
        ({"nframes": 1}, "nframes must be at least 2"),
        ({"min_pixels": 0}, "min_pixels must be positive"),
        ({"resized_width": 1, "resized_height": 1000}, "1000: the longer side must be at most 200"),
    ],
)
def test_contradicting_options_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        VideoOptions(**options)


@pytest.mark.parametrize(("total", "count"), [(100, 8), (9, 8), (100, 2), (30, 30)])
def test_frames_are_moved_by_at_most_half_a_step(total, count):
    still = np.array(choose_frames(total, 8.0, VideoOptions(nframes=count))[0])
    half = 0.5 * (total - 1) / (count - 1)
    for jitter in (-0.5, -0.2, 0.3, 0.5):
        moved = np.array(choose_frames(total, 8.0, VideoOptions(nframes=count, jitter=jitter))[0])
        assert len(moved) == count and moved.min() >= 0 and moved.max() < total
        assert abs(moved - still).max() <= half + 1 and (np.diff(moved) >= 0).all()
        inner = (moved - still)[1:-1]  # the first and the last cannot leave the video
        if total == 100 and count == 8:
            assert abs(inner - jitter * 99 / 7).max() <= 1
    assert choose_frames(30, 8.0, VideoOptions(nframes=30, jitter=0.5))[0] == list(range(30))  # there are no others
