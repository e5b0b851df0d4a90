"""Frames, sizes and patches against hand-computed tables, PIL and HF's image processor; real mp4 files."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.frames import VideoOptions, frame_indices, smart_resize, target_size
from data.patches import CLIP_MEAN, CLIP_STD, patchify, resize, unpatchify
from data.sample import BadMedia
from data.video import load_video, read_frames, video_grid
from grpo.demo.mp4 import encode_jpeg, write_mp4

TOKEN = 28 * 28  # pixels


def random_frames(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def gray_clip(num_frames: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Frame k is gray of level 10·k, so that a decoded frame tells which one it is."""
    levels = (10 * np.arange(num_frames)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3)).copy()


def gray_levels(pixel_values: torch.Tensor, grid_thw: tuple[int, int, int]) -> list[float]:
    """Undo the normalisation: the mean level (0 to 255) of every frame."""
    patches = pixel_values.view(grid_thw[0], -1, 3, 2, 14 * 14)  # (t, h·w, 3, 2, 196)
    colours = patches * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
    return (255 * colours.mean(dim=(1, 2, 4))).flatten().tolist()


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
def test_frame_indices_follow_the_rules_of_qwen_vl_utils(total_frames, video_fps, options, expected):
    assert frame_indices(total_frames, video_fps, VideoOptions(**options)) == expected


def test_a_long_video_gives_768_frames_from_first_to_last():
    indices = frame_indices(100_000, 25.0, VideoOptions())
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
    with pytest.raises(ValueError) as error:
        frame_indices(total_frames, 8.0, VideoOptions(**options))
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
        ({"min_pixels": 2 * TOKEN, "max_pixels": TOKEN}, "--video_min_pixels 1568 is more than --video_max_pixels 784"),
        ({"max_pixels": 768 * TOKEN + 1}, "--video_max_pixels 602113 is above the limit of qwen-vl-utils: give 602112"),
        ({"fps": 0.0}, "--fps must be positive"),
        ({"nframes": -4}, "--nframes must be positive"),
        ({"nframes": 1}, "--nframes must be at least 2"),
        ({"min_pixels": 0}, "--video_min_pixels must be positive"),
        ({"resized_width": 1, "resized_height": 1000}, "1000: the longer side must be at most 200"),
    ],
)
def test_contradicting_options_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        VideoOptions(**options)


def test_patches_equal_those_of_hf_frame_by_frame():
    frames = random_frames(4, 3, 56, 84)
    processor = Qwen2VLImageProcessorPil(do_resize=False)
    images = [frame.permute(1, 2, 0).numpy() for frame in frames]
    hf = processor(images, return_tensors="pt")["pixel_values"].view(4, 4 * 6, 3, 2, 14, 14)  # frame twice over time
    expected = torch.cat(
        [torch.stack([first[:, :, 0], second[:, :, 1]], dim=2) for first, second in [(hf[0], hf[1]), (hf[2], hf[3])]]
    )  # (2·4·6, 3, 2, 14, 14)

    pixel_values, grid_thw = patchify(frames)

    assert grid_thw == (2, 4, 6)
    assert pixel_values.dtype == torch.float32
    assert pixel_values.shape == (48, 1176)
    torch.testing.assert_close(pixel_values, expected.reshape(48, 1176), atol=1e-6, rtol=0)


def pil_resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    resized = [np.array(image.resize((width, height), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "size, tolerance",
    # enlarged noise is the worst case for the two roundings, in which PIL and torch differ by 2 at one pixel in 10,000
    [((56, 84), 1), ((84, 56), 1), ((28, 28), 1), ((112, 140), 2), ((168, 56), 2)],
)
def test_resize_is_bicubic_and_antialiased_as_in_pil(size, tolerance):
    frames = random_frames(9, 3, 100, 120)
    resized = resize(frames, *size)
    difference = (resized.int() - pil_resize(frames, *size).int()).float()
    assert resized.dtype == torch.uint8
    assert difference.abs().max() <= tolerance
    assert (difference.abs() > 1).float().mean() < 1e-3
    assert difference.mean().abs() < 0.01  # rounded, not truncated


def test_an_enlarged_picture_equals_that_of_pil_within_one_level():
    x, y = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    picture = (127 + 60 * torch.sin(x / 3) + 60 * torch.cos(y / 5)).byte().expand(2, 3, 60, 80)
    assert (resize(picture, 112, 140).int() - pil_resize(picture, 112, 140).int()).abs().max() <= 1


def test_a_video_of_the_right_size_keeps_its_pixels():
    frames = random_frames(2, 3, 56, 56)
    assert torch.equal(resize(frames, 56, 56), frames)


def test_an_mp4_file_round_trip_gives_the_frames_that_were_asked_for(tmp_path):
    write_mp4(tmp_path / "clip.mp4", gray_clip(16), fps=8)
    options = VideoOptions(nframes=4, resized_width=64, resized_height=64)
    pixel_values, grid_thw, second_per_grid_t = load_video(tmp_path / "clip.mp4", options)
    assert pixel_values.shape == (2 * 4 * 4, 1176)
    assert grid_thw == (2, 4, 4)
    assert gray_levels(pixel_values, grid_thw) == pytest.approx([0, 50, 100, 150], abs=1.5)  # frames 0, 5, 10, 15
    assert second_per_grid_t == 1.0  # 4 frames of 2 s


@pytest.mark.parametrize("name", ["open_gop.mp4", "b_frames.avi"])
@pytest.mark.parametrize("nframes", [4, 8, 12, 24])
def test_frames_are_the_right_ones_where_decord_seeks_wrongly(name, nframes):
    """H.264 with open groups of pictures, MPEG-4 without times; 24 frames of 3 s; frame k is gray of level 10·k."""
    options = VideoOptions(nframes=nframes, resized_width=56, resized_height=56)
    pixel_values, grid_thw, _ = load_video(Path(__file__).with_name(name), options)
    expected = [10 * index for index in frame_indices(24, 8.0, options)]
    assert gray_levels(pixel_values, grid_thw) == pytest.approx(expected, abs=1.5)


def test_frames_before_the_beginning_of_a_trimmed_video_do_not_count(tmp_path):
    """The edit list says that the video begins at its fourth frame; the three before it are there to decode from."""
    mp4 = bytearray(Path(__file__).with_name("open_gop.mp4").read_bytes())
    at = mp4.index(b"elst") + 12  # the duration in units of 1/1000 s, and the beginning in units of 1/16384 s
    duration, begin = struct.unpack_from(">II", mp4, at)
    struct.pack_into(">II", mp4, at, duration - 3 * 1000 // 8, begin + 3 * 16384 // 8)
    (tmp_path / "trimmed.mp4").write_bytes(mp4)
    options = VideoOptions(nframes=4, resized_width=56, resized_height=56)
    pixel_values, grid_thw, second_per_grid_t = load_video(tmp_path / "trimmed.mp4", options)
    expected = [30 + 10 * index for index in frame_indices(21, 8.0, options)]
    assert gray_levels(pixel_values, grid_thw) == pytest.approx(expected, abs=1.5)
    assert second_per_grid_t == pytest.approx(2 / (4 / 21 * 8))


def test_colours_stay_in_the_order_red_green_blue(tmp_path):
    write_mp4(tmp_path / "red.mp4", np.full((4, 56, 56, 3), (250, 100, 20), dtype=np.uint8), fps=8)
    pixel_values, _, _ = load_video(tmp_path / "red.mp4", VideoOptions(resized_width=56, resized_height=56))
    colour = 255 * (pixel_values.view(-1, 3, 392).mean(dim=(0, 2)) * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN))
    assert colour.tolist() == pytest.approx([250, 100, 20], abs=3)


NARROW = [1, 2, 3, 4, 6, 8, 12, 16, 24, 48, 72]  # decord counts the padding of these rows as further channels


def pillow_frames(frames: np.ndarray) -> torch.Tensor:
    """The frames as Pillow decodes the JPEGs that `write_mp4` makes of them: (T, 3, H, W)."""
    jpegs = [np.array(Image.open(io.BytesIO(encode_jpeg(frame)))) for frame in frames]
    return torch.from_numpy(np.stack(jpegs)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("width", [*NARROW, 5, 7, 10, 25, 32, 71, 73, 96, 129])
def test_frames_of_any_width_are_those_that_pillow_decodes(tmp_path, width):
    noise = np.random.default_rng(width).integers(0, 256, (4, 40, width, 1), dtype=np.uint8)
    frames = noise.repeat(3, axis=3)  # gray, since decoders interpolate JPEG's halved colours differently
    frames[3] = (200, 100, 50)  # but for the last frame, of one colour
    write_mp4(tmp_path / "clip.mp4", frames, fps=8)
    decoded, _ = read_frames(tmp_path / "clip.mp4", VideoOptions(nframes=4))
    assert decoded.shape == (4, 3, 40, width)
    assert (decoded.int() - pillow_frames(frames).int()).abs().max() <= 3


@pytest.mark.parametrize("width", NARROW)
def test_a_narrow_video_becomes_the_patches_of_its_frames(tmp_path, width):
    path, options = tmp_path / "clip.mp4", VideoOptions(nframes=4, resized_width=56, resized_height=84)
    write_mp4(path, gray_clip(16, height=40, width=width), fps=8)
    pixel_values, grid_thw, _ = load_video(path, options)
    assert pixel_values.shape == (2 * 6 * 4, 1176)
    assert gray_levels(pixel_values, grid_thw) == pytest.approx([0, 50, 100, 150], abs=1.5)
    assert grid_thw == video_grid(path, options) == (2, 6, 4)
    assert video_grid(path, VideoOptions(nframes=4)) == load_video(path, VideoOptions(nframes=4))[1]


def test_a_video_too_narrow_for_its_height_is_named_in_one_line(tmp_path):
    path = tmp_path / "clip.mp4"
    write_mp4(path, gray_clip(4, height=402, width=2), fps=8)
    line = f"{str(path)!r} has frames of 2x402 pixels: the longer side is more than 200 times the shorter"
    for read in (load_video, video_grid):
        with pytest.raises(BadMedia) as error:
            read(path, VideoOptions(nframes=4))
        assert str(error.value) == line


def test_rows_and_columns_are_not_swapped(tmp_path):
    frames = np.zeros((2, 56, 112, 3), dtype=np.uint8)
    frames[:, :28] = 200  # the upper half
    write_mp4(tmp_path / "wide.mp4", frames, fps=8)
    options = VideoOptions(resized_width=112, resized_height=56)
    pixel_values, grid_thw, _ = load_video(tmp_path / "wide.mp4", options)
    assert grid_thw == (1, 4, 8)
    bright = pixel_values.mean(dim=1) > 0  # (32,): 4 tokens of 4 patches in the upper row, then 4 in the lower
    assert bright.tolist() == [True] * 16 + [False] * 16


@pytest.mark.parametrize(
    "num_frames, fps, options, expected",
    [
        (16, 8, {"nframes": 8}, 0.5),  # 8 frames of 2 s are 4 fps
        (20, 8, {}, 1.25),  # 5 -> 4 frames of 2.5 s are 1.6 fps, not the 2 that were asked for
        (16, 8, {"fps": 1.0}, 1.0),  # 2 -> 4 frames of 2 s are 2 fps
    ],
)
def test_second_per_grid_comes_from_the_frames_really_used(tmp_path, num_frames, fps, options, expected):
    write_mp4(tmp_path / "clip.mp4", gray_clip(num_frames), fps=fps)
    options = VideoOptions(resized_width=56, resized_height=56, **options)
    assert load_video(tmp_path / "clip.mp4", options)[2] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((16, 56, 84), {"nframes": 6}),
        ((9, 100, 60), {}),
        ((20, 100, 60), {"fps": 8.0, "max_pixels": 130 * TOKEN}),
        ((16, 64, 64), {"nframes": 4, "resized_width": 64, "resized_height": 90}),
    ],
)
def test_the_grid_is_that_of_the_loaded_video(tmp_path, shape, options):
    path, options = tmp_path / "clip.mp4", VideoOptions(**options)
    write_mp4(path, random_frames(*shape, 3).numpy(), fps=8)
    assert video_grid(path, options) == load_video(path, options)[1]


def test_the_grid_is_known_without_the_last_frame(tmp_path):
    path, options = tmp_path / "clip.mp4", VideoOptions(nframes=4, resized_width=56, resized_height=56)
    write_mp4(path, random_frames(300, 56, 56, 3).numpy(), fps=8)  # so many, because decord reads ahead
    last_frame = path.read_bytes().rindex(b"\xff\xd8\xff")
    with open(path, "r+b") as file:
        file.seek(last_frame)
        file.write(bytes(500))
    with pytest.raises(BadMedia):
        load_video(path, options)
    assert video_grid(path, options) == (2, 4, 4)


@pytest.mark.parametrize(("total", "count"), [(100, 8), (9, 8), (100, 2), (30, 30)])
def test_frames_are_moved_by_at_most_half_a_step(total, count):
    still = np.array(frame_indices(total, 8.0, VideoOptions(nframes=count)))
    half = 0.5 * (total - 1) / (count - 1)
    for jitter in (-0.5, -0.2, 0.3, 0.5):
        moved = np.array(frame_indices(total, 8.0, VideoOptions(nframes=count, jitter=jitter)))
        assert len(moved) == count and moved.min() >= 0 and moved.max() < total
        assert abs(moved - still).max() <= half + 1 and (np.diff(moved) >= 0).all()
        inner = (moved - still)[1:-1]  # the first and the last cannot leave the video
        if total == 100 and count == 8:
            assert abs(inner - jitter * 99 / 7).max() <= 1
    assert frame_indices(30, 8.0, VideoOptions(nframes=30, jitter=0.5)) == list(range(30))  # there are no others


def test_the_grid_of_a_bad_video_is_the_error_of_loading_it(tmp_path):
    long, short, text = tmp_path / "long.mp4", tmp_path / "short.mp4", tmp_path / "text.mp4"
    write_mp4(long, random_frames(4, 8, 2000, 3).numpy(), fps=8)
    write_mp4(short, gray_clip(1), fps=8)
    text.write_text("no video")
    for path in (long, short, text):
        with pytest.raises(BadMedia) as expected:
            load_video(path, VideoOptions())
        with pytest.raises(BadMedia) as error:
            video_grid(path, VideoOptions())
        assert str(error.value) == str(expected.value)
    with pytest.raises(FileNotFoundError):
        video_grid(tmp_path / "gone.mp4", VideoOptions())


def with_index_first(mp4: bytes) -> bytes:
    """Move the index (moov) before the frames, as files for streaming have it: such a file opens when cut off."""
    start, end = mp4.index(b"mdat") - 4, mp4.index(b"moov") - 4
    moov = bytearray(mp4[end:])
    offset_at = moov.index(b"stco") + 12
    (offset,) = struct.unpack_from(">I", moov, offset_at)
    struct.pack_into(">I", moov, offset_at, offset + len(moov))
    return mp4[:start] + bytes(moov) + mp4[start:end]


def damaged_files() -> dict[str, object]:
    """Ways to break a good mp4 file: name -> function of its bytes."""
    return {
        "empty": lambda mp4: b"",
        "junk": lambda mp4: np.random.default_rng(0).bytes(5000),
        "text": lambda mp4: b"this is not a video\n" * 50,
        "cut": lambda mp4: mp4[: len(mp4) // 2],
        "cut in the index": lambda mp4: mp4[:-20],
        "cut in the frames": lambda mp4: with_index_first(mp4)[: int(len(mp4) * 0.6)],
        "frames of zeros": lambda mp4: with_index_first(mp4)[: int(len(mp4) * 0.5)].ljust(len(mp4), b"\0"),
    }


@pytest.mark.parametrize("damage", damaged_files())
def test_a_broken_file_is_a_bad_video_whose_message_is_one_line_with_the_path(tmp_path, damage):
    path = tmp_path / "heart\nbeat.mp4"
    write_mp4(path, random_frames(16, 64, 64, 3).numpy(), fps=8)
    path.write_bytes(damaged_files()[damage](path.read_bytes()))
    with pytest.raises(BadMedia) as error:
        load_video(path, VideoOptions())
    assert repr(str(path)) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_file_with_its_index_first_is_good_until_it_is_cut(tmp_path):
    path = tmp_path / "clip.mp4"
    write_mp4(path, gray_clip(16), fps=8)
    path.write_bytes(with_index_first(path.read_bytes()))
    pixel_values, grid_thw, _ = load_video(path, VideoOptions(nframes=2))
    assert gray_levels(pixel_values, grid_thw) == pytest.approx([0, 150], abs=1.5)


def test_a_video_with_too_few_frames_is_a_bad_video(tmp_path):
    path = tmp_path / "short.mp4"
    write_mp4(path, gray_clip(10), fps=8)
    with pytest.raises(BadMedia) as error:
        load_video(path, VideoOptions(nframes=16))
    assert str(error.value) == f"{str(path)!r} has 10 frames, --nframes 16 asks for 16"


def test_a_missing_file_is_no_bad_video(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.mp4"):
        load_video(tmp_path / "missing.mp4", VideoOptions())


@pytest.mark.parametrize(
    "frames", [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8), np.uint8)]
)
def test_write_mp4_refuses_what_is_no_clip(tmp_path, frames):
    with pytest.raises(ValueError, match="uint8"):
        write_mp4(tmp_path / "clip.mp4", frames, fps=8)


def test_frames_come_back_from_their_patches():
    """What a contact sheet shows is what the model sees: to the level."""
    frames = torch.randint(0, 256, (6, 3, 56, 84), dtype=torch.uint8)
    assert torch.equal(unpatchify(*patchify(frames)), frames)
