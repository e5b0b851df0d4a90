"""Images, frames in files and parts of videos: their pixels, sizes and times, and what is refused."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.media.frames import VideoOptions, frame_span
from data.media.images import ImageOptions, read_image
from data.media.load import MediaOptions, load_media, media_grid
from data.media.patches import normalise
from data.media.video import open_video
from data.sample import BadMedia, Media, TooFewFrames
from grpo.demo.mp4 import write_mp4
from tests.data.media.test_video import load_video, read_frames

SMALL = VideoOptions(nframes=4, resized_width=56, resized_height=56)
ALL = MediaOptions(VideoOptions(resized_width=56, resized_height=56))


def noise(height, width, channels=3, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()


def smooth(height, width) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([128 + 100 * np.sin(x / 9 + c) * np.cos(y / 13) for c in range(3)], axis=-1).astype(np.uint8)


def save(path, pixels, mode=None, **options) -> Media:
    Image.fromarray(pixels, mode).save(path, **options)
    return Media("image", str(path))


@pytest.mark.parametrize(
    ("height", "width"), [(56, 84), (100, 150), (30, 30), (20, 500), (280, 28), (333, 77), (29, 2000)]
)
@pytest.mark.parametrize("bounds", [{}, {"min_pixels": 100 * 784, "max_pixels": 200 * 784}, {"max_pixels": 4 * 784}])
def test_an_image_is_what_qwens_own_processor_makes_of_it(tmp_path, height, width, bounds):
    options = ImageOptions(**bounds)
    media = save(tmp_path / "a.png", smooth(height, width))
    patches, grid, seconds = load_media(media, MediaOptions(VideoOptions(), options))
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": options.min_pixels, "longest_edge": options.max_pixels})
    theirs = processor(Image.open(tmp_path / "a.png"), return_tensors="pt")
    assert [list(grid)] == theirs["image_grid_thw"].tolist() and seconds == 0
    assert media_grid(media, MediaOptions(VideoOptions(), options)) == grid
    # In levels of 256; the order of the two passes of a resize may differ.
    levels = (normalise(patches) - theirs["pixel_values"]).abs() * 0.27 * 255
    resized = (height, width) != (14 * grid.h, 14 * grid.w)
    assert levels.mean() < (0.6 if resized else 1e-4)


def test_an_image_of_its_own_size(tmp_path):
    media = save(tmp_path / "a.png", smooth(300, 400))
    own = Media("image", media.path, (("resized_height", 60), ("resized_width", 100)))
    assert media_grid(own, ALL) == load_media(own, ALL).grid_thw == (1, 4, 8)  # 56 x 112
    most = Media("image", media.path, (("max_pixels", 16 * 784),))
    assert media_grid(most, ALL) == (1, 6, 8)


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    pixels = smooth(56, 84)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    save(tmp_path / "a.png", pixels, exif=exif)
    assert np.array_equal(read_image(str(tmp_path / "a.png")).permute(1, 2, 0).numpy(), np.rot90(pixels, -1))


def test_every_kind_of_pixel_becomes_rgb(tmp_path):
    grey = noise(56, 56, 1)
    save(tmp_path / "grey.png", grey)
    assert np.array_equal(read_image(str(tmp_path / "grey.png")).numpy(), np.stack([grey] * 3))
    rgba = noise(56, 56, 4)
    rgba[..., 3] = 0  # nothing to be seen: the paper is white
    save(tmp_path / "clear.png", rgba)
    assert (read_image(str(tmp_path / "clear.png")) == 255).all()
    rgba[..., 3] = 255
    save(tmp_path / "solid.png", rgba)
    assert np.array_equal(read_image(str(tmp_path / "solid.png")).permute(1, 2, 0).numpy(), rgba[..., :3])
    for mode in ("1", "L", "LA", "P", "CMYK"):
        suffix = "tif" if mode == "CMYK" else "png"
        Image.fromarray(smooth(56, 56)).convert(mode).save(tmp_path / f"a.{suffix}")
        assert read_image(str(tmp_path / f"a.{suffix}")).shape == (3, 56, 56)


def png(width, height, body=b"") -> bytes:
    """A PNG that claims a size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def broken_images(tmp_path) -> dict[str, str]:
    save(tmp_path / "whole.jpg", noise(200, 200))
    save(tmp_path / "deep.png", noise(56, 56, 1).astype(np.uint16))
    files = {
        "empty.png": b"",
        "text.png": b"no image",
        "cut.jpg": (tmp_path / "whole.jpg").read_bytes()[:5000],
        "cut.png": png(200, 200, b"\0" * 2000),
        "one.png": png(1, 1, b"\0\0"),
        "thread.png": png(100_000, 2, b"\0" * 200_002),
        "bomb.png": png(20_000, 20_000),
        "small_bomb.png": png(10_000, 10_000),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return {
        "deep.png": "more than 8 bits per pixel",
        "empty.png": "cannot identify image file",
        "text.png": "cannot identify image file",
        "cut.jpg": "is no image that Pillow can read (image file is truncated",
        "cut.png": "is no image that Pillow can read (",
        "one.png": "has 1x1 pixels",
        "thread.png": "over 200 times the other",
        "bomb.png": "exceeds limit of",
        "small_bomb.png": "exceeds limit of",
    }


def test_a_broken_image_is_one_line_with_its_name(tmp_path, recwarn):
    for name, words in broken_images(tmp_path).items():
        for read in (load_media, media_grid):
            with pytest.raises(BadMedia) as caught:
                read(Media("image", str(tmp_path / name)), ALL)
            line = str(caught.value)
            assert words in line and repr(str(tmp_path / name)) in line and line.isprintable(), line
    assert not recwarn.list
    with pytest.raises(FileNotFoundError, match="no image at"):
        load_media(Media("image", str(tmp_path / "gone.png")), ALL)


@pytest.fixture
def clip(tmp_path):
    """A video of 10 frames, 8 a second, and a folder with its decoded frames."""
    write_mp4(tmp_path / "clip.mp4", noise(56 * 10, 56).reshape(10, 56, 56, 3), fps=8)
    frames, _ = read_frames(tmp_path / "clip.mp4", VideoOptions(nframes=10))
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):  # frame_10 would come before frame_2 by its letters
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / "frames" / f"frame_{number + 1}.png")
    (tmp_path / "frames" / "notes.txt").write_text("not a frame")
    return tmp_path


def assert_equal(ours, theirs):
    assert torch.equal(ours.patches, theirs.patches) and ours.grid_thw == theirs.grid_thw
    assert ours.second_per_grid_t == pytest.approx(theirs.second_per_grid_t)


def test_the_hidden_files_of_macos_and_windows_are_no_frames(clip):
    media = Media("video", str(clip / "frames"))
    before = load_media(media, ALL)
    for number in range(1, 11):
        (clip / "frames" / f"._frame_{number}.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X".ljust(4096, b"\0"))
    (clip / "frames" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (clip / "frames" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    assert_equal(load_media(media, ALL), before)
    assert media_grid(media, ALL) == before.grid_thw


@pytest.mark.parametrize("options", [{"nframes": 4}, {"nframes": 10}, {"fps": 4.0}, {"fps": 2.0}, {"fps": 8.0}])
def test_frames_in_a_folder_are_the_video_that_they_were_taken_from(clip, options):
    options = VideoOptions(resized_width=56, resized_height=56, **options)
    video = load_video(clip / "clip.mp4", options)
    folder = Media("video", str(clip / "frames"), (("fps", 8),))
    assert_equal(load_media(folder, MediaOptions(options)), video)
    assert media_grid(folder, MediaOptions(options)) == video.grid_thw
    listed = Media("video", tuple(str(clip / "frames" / f"frame_{n + 1}.png") for n in range(10)), (("fps", 8),))
    assert_equal(load_media(listed, MediaOptions(options)), video)


def test_without_flags_all_frames_are_read_and_the_last_one_again_where_they_are_odd(clip):
    paths = [str(clip / "frames" / f"frame_{n + 1}.png") for n in range(10)]
    for num_frames, fps in ((10, 8), (9, 4), (3, 0.5)):
        read = load_media(Media("video", tuple(paths[:num_frames]), (("fps", fps),)), ALL)
        expected = [*paths[:num_frames], *([paths[num_frames - 1]] if num_frames % 2 else [])]
        whole = MediaOptions(VideoOptions(nframes=len(expected), resized_width=56, resized_height=56))
        assert torch.equal(read.patches, load_media(Media("video", tuple(expected)), whole).patches)
        assert read.second_per_grid_t == 2 / fps  # two frames a step
    assert (
        load_media(Media("video", tuple(paths)), ALL).second_per_grid_t == 1
    )  # 2 frames a second, as in qwen-vl-utils
    few = Media("video", tuple(paths), (("max_frames", 5), ("fps", 8)))
    assert load_media(few, ALL).grid_thw.t == 2


def test_frames_that_are_no_video_are_refused(clip):
    (clip / "empty").mkdir()
    (clip / "one").mkdir()
    save(clip / "one" / "a.png", noise(56, 56))
    save(clip / "frames" / "frame_11.png", noise(28, 56))
    for path, error, words in [
        (str(clip / "empty"), TooFewFrames, "has 0 frames"),
        (str(clip / "one"), TooFewFrames, "has 1 frame "),
        (
            str(clip / "frames"),
            BadMedia,
            "frame_11.png' is a frame of 56x28 pixels, the first one of its video has 56x56",
        ),
        ((str(clip / "one" / "a.png"),), TooFewFrames, "the list of 1 frames from"),
        ((str(clip / "one" / "a.png"), str(clip / "notes.txt")), BadMedia, "is no image"),
    ]:
        (clip / "notes.txt").write_text("x")
        with pytest.raises(error, match=words.replace("(", r"\(")):
            load_media(Media("video", path), ALL)


@pytest.mark.parametrize(
    ("total", "fps", "start", "end", "expected"),
    [
        (80, 8.0, 0.0, None, range(80)),
        (80, 8.0, 1.0, 4.0, range(8, 33)),  # both ends included, as in qwen-vl-utils
        (80, 8.0, 1.05, 3.95, range(9, 32)),  # rounded inwards
        (80, 8.0, 9.0, None, range(72, 80)),
        (80, 8.0, 0.0, 10.0, range(80)),
    ],
)
def test_a_part_of_a_video(total, fps, start, end, expected):
    assert frame_span(total, fps, VideoOptions(video_start=start, video_end=end)) == expected


def test_a_part_of_a_video_is_read_with_its_own_time(clip):
    own = Media("video", str(clip / "clip.mp4"), (("nframes", 2), ("video_end", 0.75), ("video_start", 0.25)))
    video, frames = load_media(own, MediaOptions(SMALL)), read_frames(clip / "clip.mp4", VideoOptions(nframes=10))[0]
    chosen = frames[[2, 6]]  # of frames 2 to 6
    for number, frame in enumerate(chosen):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(clip / f"{number}.png")
    files = Media("video", (str(clip / "0.png"), str(clip / "1.png")))
    assert torch.equal(video.patches, load_media(files, ALL).patches)
    assert video.second_per_grid_t == pytest.approx(5 / 8)  # two frames stand for five
    _, indices, _ = open_video(clip / "clip.mp4", VideoOptions(fps=8, video_start=0.25, video_end=0.75))
    assert indices == [2, 3, 5, 6]


def test_options_of_its_own_stand_in_place_of_the_flags(clip):
    path = str(clip / "clip.mp4")
    for own, options in [
        ((("nframes", 6),), {"nframes": 6}),
        ((("fps", 8), ("max_frames", 6)), {"fps": 8, "max_frames": 6}),
        ((("fps", 0.1), ("min_frames", 8)), {"fps": 0.1, "min_frames": 8}),
    ]:
        expected = load_video(path, VideoOptions(resized_width=56, resized_height=56, **options))
        assert_equal(load_media(Media("video", path, own), MediaOptions(SMALL)), expected)
    wide = Media("video", path, (("resized_height", 28), ("resized_width", 112)))
    assert media_grid(wide, MediaOptions(SMALL)) == (2, 2, 8)
    for own, words in [
        ((("fps", 2), ("nframes", 4)), "give fps or nframes, not both"),
        ((("resized_width", 56),), "give resized_width and resized_height together"),
        ((("video_end", 0.5), ("video_start", 0.75)), "video_end 0.5 must be after video_start 0.75"),
        ((("video_end", 9),), "lasts 1.25 seconds, and so has no part from video_start 0 to video_end 9"),
        ((("video_start", 2),), "lasts 1.25 seconds, and so has no part from video_start 2 to"),
        ((("max_frames", 1),), "max_frames 1 must be at least 2"),
        ((("nframes", 8), ("video_end", 0.25)), "has 3 frames, --nframes 8 asks for 8"),
    ]:
        with pytest.raises(BadMedia) as caught:
            load_media(Media("video", path, own), MediaOptions(SMALL))
        assert words in str(caught.value) and repr(path) in str(caught.value)


def test_a_folder_that_may_not_be_read_is_named(clip):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (clip / "frames").chmod(0)
    with pytest.raises(BadMedia, match="cannot be read"):
        load_media(Media("video", str(clip / "frames")), ALL)
