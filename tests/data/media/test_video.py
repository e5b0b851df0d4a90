"""Videos are decoded to the right frames, and broken ones are named; real mp4 and AVI files."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.media.frames import VideoOptions, choose_frames
from data.media.load import MediaOptions, load_media, media_grid
from data.media.video import decode, open_video
from data.sample import BadMedia, Media
from grpo.demo.mp4 import encode_jpeg, write_mp4
from tests.data.media.test_frames import TOKEN
from tests.data.media.test_patches import random_frames


def read_frames(path: Path, options: VideoOptions) -> tuple[torch.Tensor, float]:
    reader, indices, sampled_fps = open_video(path, options)
    return decode(path, reader, indices), sampled_fps


def load_video(path: Path, options: VideoOptions):
    return load_media(Media("video", str(path)), MediaOptions(options))


def video_grid(path: Path, options: VideoOptions):
    return media_grid(Media("video", str(path)), MediaOptions(options))


def gray_clip(num_frames: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Frame k is gray of level 10·k, so that a decoded frame tells which one it is."""
    levels = (10 * np.arange(num_frames)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3)).copy()


def gray_levels(patches: torch.Tensor, grid_thw: tuple[int, int, int]) -> list[float]:
    """The mean level (0 to 255) of every frame."""
    patches = patches.view(grid_thw[0], -1, 3, 2, 14 * 14)  # (t, h·w, 3, 2, 196)
    return patches.float().mean(dim=(1, 2, 4)).flatten().tolist()


def test_an_mp4_file_round_trip_gives_the_frames_that_were_asked_for(tmp_path):
    write_mp4(tmp_path / "clip.mp4", gray_clip(16), fps=8)
    options = VideoOptions(nframes=4, resized_width=64, resized_height=64)
    patches, grid_thw, second_per_grid_t = load_video(tmp_path / "clip.mp4", options)
    assert patches.shape == (2 * 4 * 4, 1176)
    assert grid_thw == (2, 4, 4)
    assert gray_levels(patches, grid_thw) == pytest.approx([0, 50, 100, 150], abs=1.5)  # frames 0, 5, 10, 15
    assert second_per_grid_t == 1.0  # 4 frames of 2 s


@pytest.mark.parametrize("name", ["open_gop.mp4", "b_frames.avi"])
@pytest.mark.parametrize("nframes", [4, 8, 12, 24])
def test_frames_are_the_right_ones_where_decord_seeks_wrongly(name, nframes):
    """H.264 with open groups of pictures, MPEG-4 without times; 24 frames of 3 s; frame k is gray of level 10·k."""
    options = VideoOptions(nframes=nframes, resized_width=56, resized_height=56)
    patches, grid_thw, _ = load_video(Path(__file__).with_name(name), options)
    expected = [10 * index for index in choose_frames(24, 8.0, options)[0]]
    assert gray_levels(patches, grid_thw) == pytest.approx(expected, abs=1.5)


def test_frames_before_the_beginning_of_a_trimmed_video_do_not_count(tmp_path):
    """The edit list says that the video begins at its fourth frame; the three before it are there to decode from."""
    mp4 = bytearray(Path(__file__).with_name("open_gop.mp4").read_bytes())
    at = mp4.index(b"elst") + 12  # the duration in units of 1/1000 s, and the beginning in units of 1/16384 s
    duration, begin = struct.unpack_from(">II", mp4, at)
    struct.pack_into(">II", mp4, at, duration - 3 * 1000 // 8, begin + 3 * 16384 // 8)
    (tmp_path / "trimmed.mp4").write_bytes(mp4)
    options = VideoOptions(nframes=4, resized_width=56, resized_height=56)
    patches, grid_thw, second_per_grid_t = load_video(tmp_path / "trimmed.mp4", options)
    expected = [30 + 10 * index for index in choose_frames(21, 8.0, options)[0]]
    assert gray_levels(patches, grid_thw) == pytest.approx(expected, abs=1.5)
    assert second_per_grid_t == pytest.approx(2 / (4 / 21 * 8))


def test_colours_stay_in_the_order_red_green_blue(tmp_path):
    frames = np.full((4, 56, 56, 3), (250, 100, 20), dtype=np.uint8)
    frames[2:] = 0  # since a video of one colour only is refused
    write_mp4(tmp_path / "red.mp4", frames, fps=8)
    patches, _, _ = load_video(tmp_path / "red.mp4", VideoOptions(resized_width=56, resized_height=56))
    colour = patches[:16].view(-1, 3, 392).float().mean(dim=(0, 2))
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
    patches, grid_thw, _ = load_video(path, options)
    assert patches.shape == (2 * 6 * 4, 1176)
    assert gray_levels(patches, grid_thw) == pytest.approx([0, 50, 100, 150], abs=1.5)
    assert grid_thw == video_grid(path, options) == (2, 6, 4)
    assert video_grid(path, VideoOptions(nframes=4)) == load_video(path, VideoOptions(nframes=4))[1]


def test_a_video_too_narrow_for_its_height_is_named_in_one_line(tmp_path):
    path = tmp_path / "clip.mp4"
    write_mp4(path, gray_clip(4, height=402, width=2), fps=8)
    line = f"{str(path)!r} has frames of 2x402 pixels: one side is over 200 times the other"
    for read in (load_video, video_grid):
        with pytest.raises(BadMedia) as error:
            read(path, VideoOptions(nframes=4))
        assert str(error.value) == line


def test_rows_and_columns_are_not_swapped(tmp_path):
    frames = np.zeros((2, 56, 112, 3), dtype=np.uint8)
    frames[:, :28] = 200  # the upper half
    write_mp4(tmp_path / "wide.mp4", frames, fps=8)
    options = VideoOptions(resized_width=112, resized_height=56)
    patches, grid_thw, _ = load_video(tmp_path / "wide.mp4", options)
    assert grid_thw == (1, 4, 8)
    bright = patches.float().mean(dim=1) > 100  # (32,): 4 tokens of 4 patches in the upper row, then 4 in the lower
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
    patches, grid_thw, _ = load_video(path, VideoOptions(nframes=2))
    assert gray_levels(patches, grid_thw) == pytest.approx([0, 150], abs=1.5)


def test_a_video_with_too_few_frames_is_a_bad_video(tmp_path):
    path = tmp_path / "short.mp4"
    write_mp4(path, gray_clip(10), fps=8)
    with pytest.raises(BadMedia) as error:
        load_video(path, VideoOptions(nframes=16))
    assert str(error.value) == f"{str(path)!r} has 10 frames, --nframes 16 asks for 16"


def test_a_missing_file_is_no_bad_video(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.mp4"):
        load_video(tmp_path / "missing.mp4", VideoOptions())
