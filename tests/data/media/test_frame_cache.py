"""Decoded frames on a disk are those of the video, and are decoded again where they are not."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from data.epochs import BatchItem
from data.loader import PromptDataset, PromptOptions
from data.media.frame_cache import FrameCache
from data.media.frames import VideoOptions
from data.media.load import load_media
from data.media.video import resized_frames
from data.sample import BadMedia, InputError, Media
from grpo.demo.mp4 import write_mp4
from tests.conftest import OPTIONS

OPTIONS_8 = VideoOptions(nframes=8, resized_width=56, resized_height=56)


@pytest.fixture
def clip(tmp_path):
    write_mp4(tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 256, (20, 80, 64, 3), dtype=np.uint8), fps=8)
    return str(tmp_path / "a.mp4")


def spoil(path):
    """Make a video unreadable in a way that only decoding tells: by its size and time stamp it is the same file."""
    status = os.stat(path)
    with open(path, "wb") as file:
        file.write(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def same(found, expected) -> bool:
    return torch.equal(found[0], expected[0]) and found[1] == expected[1]


def test_the_second_reading_decodes_nothing_and_is_equal_to_the_bit(clip, tmp_path):
    cache, expected = FrameCache(str(tmp_path / "cache"), 10**9), resized_frames(clip, OPTIONS_8)
    assert same(cache.frames(clip, OPTIONS_8), expected)
    media, options = Media("video", clip), OPTIONS._replace(frame_cache=cache)
    for _ in range(2):
        ours, plain = load_media(media, options), load_media(media, OPTIONS)
        assert torch.equal(ours.patches, plain.patches) and ours[1:] == plain[1:]
    spoil(clip)
    assert same(cache.frames(clip, OPTIONS_8), expected)
    with pytest.raises(BadMedia):
        resized_frames(clip, OPTIONS_8)


def test_other_options_and_another_file_of_that_name_are_other_entries(clip, tmp_path):
    cache = FrameCache(str(tmp_path / "cache"), 10**9)
    cache.frames(clip, OPTIONS_8)
    for options in (VideoOptions(nframes=8), VideoOptions(nframes=8, resized_width=56, resized_height=84)):
        assert same(cache.frames(clip, options), resized_frames(clip, options))
    part = VideoOptions(nframes=8, resized_width=56, resized_height=56, video_start=0.5)
    assert same(cache.frames(clip, part), resized_frames(clip, part))
    write_mp4(clip, np.random.default_rng(1).integers(0, 256, (20, 80, 64, 3), dtype=np.uint8), fps=8)
    os.utime(clip, ns=(1, 1))
    assert same(cache.frames(clip, OPTIONS_8), resized_frames(clip, OPTIONS_8))
    assert len(list((tmp_path / "cache").iterdir())) == 5


@pytest.mark.parametrize("how", ["cut", "a pixel", "empty", "junk"])
def test_a_damaged_entry_is_decoded_again(clip, tmp_path, how):
    cache = FrameCache(str(tmp_path / "cache"), 10**9)
    expected = cache.frames(clip, OPTIONS_8)
    (entry,) = (tmp_path / "cache").iterdir()
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes({"cut": data[:-50], "a pixel": data, "empty": b"", "junk": b"junk" * 100}[how])
    assert same(cache.frames(clip, OPTIONS_8), expected)
    spoil(clip)
    assert same(cache.frames(clip, OPTIONS_8), expected)


def test_a_video_that_cannot_be_read_is_the_same_error_and_no_entry(tmp_path):
    cache = FrameCache(str(tmp_path / "cache"), 10**9)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(BadMedia, match=r"bad\.mp4"):
        cache.frames(str(tmp_path / "bad.mp4"), OPTIONS_8)
    with pytest.raises(FileNotFoundError):
        cache.frames(str(tmp_path / "gone.mp4"), OPTIONS_8)
    assert not (tmp_path / "cache").exists()


def test_the_folder_stays_within_its_bound_and_keeps_what_was_used_last(clip, tmp_path):
    size = 8 * 3 * 56 * 56
    cache = FrameCache(str(tmp_path / "cache"), 10 * (size + 300))
    used, _ = OPTIONS_8, cache.frames(clip, OPTIONS_8)
    (first,) = (tmp_path / "cache").iterdir()
    for number in range(50):
        os.utime(first, ns=(10**18 + number, 10**18 + number))  # long ago, then used again
        cache.frames(clip, used)
        cache.frames(clip, VideoOptions(nframes=8, resized_width=56, resized_height=56, video_end=1.5 + number / 1000))
    cache.remove_oldest()
    entries = list((tmp_path / "cache").iterdir())
    assert 5 <= len(entries) <= 10 and first in entries
    assert sum(entry.stat().st_size for entry in entries) <= cache.max_bytes


def read_all(arguments) -> bool:
    clip, cache = arguments
    expected = resized_frames(clip, OPTIONS_8)
    return all(same(cache.frames(clip, OPTIONS_8), expected) for _ in range(50))


def test_processes_share_it(clip, tmp_path):
    cache = FrameCache(str(tmp_path / "cache"), 0)  # so small that each removes what others have written
    with ProcessPoolExecutor(3, mp_context=get_context("forkserver")) as pool:
        assert all(pool.map(read_all, [(clip, cache)] * 3))


def test_a_folder_that_cannot_be_written_is_one_line(clip, tmp_path, tiny):
    (tmp_path / "file").write_text("x")
    cache = FrameCache(str(tmp_path / "file"), 10**9)
    with pytest.raises(InputError, match="--frame_cache .* cannot be written"):
        cache.frames(clip, OPTIONS_8)
    options = PromptOptions(OPTIONS._replace(frame_cache=cache), "skip")
    item = PromptDataset([tiny.prompts[0].sample], tiny.tokenizer, 2, options)[BatchItem(0, 0)]
    assert isinstance(item, InputError) and "--frame_cache" in str(item)
    assert list(tmp_path.rglob("*.unfinished")) == []
