"""Files that are no proper video: the loader names each in one line, or gives exactly its frames."""

import io
import os
import struct
import wave

import numpy as np
import pytest
from PIL import Image

from data.epochs import BatchItem
from data.loader import Prompt, PromptDataset, PromptOptions
from data.media.frames import VideoOptions
from data.media.load import MediaOptions
from data.sample import InputError, Media, Sample
from grpo.demo.mp4 import write_mp4
from grpo.demo.tiny_tokenizer import build_tokenizer
from tests.data.media.test_video import gray_clip, gray_levels, with_index_first

OPTIONS = MediaOptions(VideoOptions(nframes=4, resized_width=56, resized_height=56))
LEVELS = [0, 50, 100, 150]  # of frames 0, 5, 10, 15
START_OF_FRAME = b"\xff\xc0\x00\x11\x08"  # of a JPEG; height and width follow


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["What is the EF?"])


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> bytes:
    """A good file: 16 frames of 64 x 64 pixels, 8 a second."""
    path = tmp_path_factory.mktemp("good") / "clip.mp4"
    write_mp4(path, gray_clip(16), fps=8)
    return path.read_bytes()


def load(path, tokenizer, options=OPTIONS) -> Prompt | InputError:
    sample = Sample("s1", (Media("video", str(path)),), (("user", "<video>\nWhat is the EF?"),), "55%")
    return PromptDataset([sample], tokenizer, 2, PromptOptions(options))[BatchItem(0, 0)]


def error_of(path, tokenizer, options=OPTIONS) -> str:
    error = load(path, tokenizer, options)
    assert isinstance(error, InputError)
    line = str(error)
    assert line.isprintable() and line.startswith("sample 's1': ") and repr(str(path)) in line
    return line


def changed(mp4: bytes, box: bytes, offset: int, form: str, *values: int) -> bytes:
    """Overwrite numbers at `offset` in the body of a box of the index."""
    data = bytearray(mp4)
    struct.pack_into(form, data, data.rindex(box) + 4 + offset, *values)
    return bytes(data)


def sized(mp4: bytes, size: int, frames_too: bool) -> bytes:
    """Declare frames of another size: in the track's header and its sample entry, and in the JPEGs, too."""
    mp4 = changed(mp4, b"tkhd", 76, ">HxxHxx", size, size)
    mp4 = changed(mp4, b"jpeg", 24, ">HH", size, size)
    old = START_OF_FRAME + struct.pack(">HH", 64, 64)
    assert mp4.count(old) == 16
    return mp4.replace(old, START_OF_FRAME + struct.pack(">HH", size, size)) if frames_too else mp4


def long_box(mp4: bytes) -> bytes:
    """Write the length of the frames in 64 bits, as in files of more than 4 GB, behind the index."""
    mp4 = with_index_first(mp4)
    at = mp4.index(b"mdat") - 4
    long = mp4[:at] + struct.pack(">I4sQ", 1, b"mdat", len(mp4) - at + 8) + mp4[at + 8 :]
    return changed(long, b"stco", 8, ">I", at + 16)


def picture(form: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.fromarray(frame) for frame in gray_clip(4)]
    frames[0].save(file, form, **({"save_all": True, "append_images": frames[1:]} if form == "GIF" else {}))
    return file.getvalue()


def sound() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(8000)
        writer.writeframes(bytes(16000))
    return file.getvalue()


NO_VIDEO = "is not a video that decord can open"
BROKEN = {  # what -> (the bytes, of those of a good file; what the line says)
    "empty": (lambda mp4: b"", NO_VIDEO),
    "cut at a tenth": (lambda mp4: mp4[: len(mp4) // 10], "is cut off"),
    "cut at half": (lambda mp4: mp4[: len(mp4) // 2], "is cut off"),
    "cut at nine tenths": (lambda mp4: mp4[: len(mp4) * 9 // 10], "is cut off"),
    "without its last byte": (lambda mp4: mp4[:-1], "is cut off"),
    "without its index": (lambda mp4: mp4[: mp4.rindex(b"moov") - 4], NO_VIDEO),
    "index first, cut at a tenth": (lambda mp4: with_index_first(mp4)[: len(mp4) // 10], "bytes than the file has"),
    "index first, cut at nine tenths": (
        lambda mp4: with_index_first(mp4)[: len(mp4) * 9 // 10],
        "bytes than the file has",
    ),
    # decord alone would fill the rest of the last picture with what was in memory
    "index first, without its last bytes": (lambda mp4: with_index_first(mp4)[:-100], "is cut off"),
    "QuickTime, cut at its end": (lambda mp4: with_index_first(mp4).replace(b"ftyp", b"wide")[:-9], "is cut off"),
    "a long file, cut off": (lambda mp4: long_box(mp4)[:-9], "is cut off"),
    "zeros for frames": (lambda mp4: mp4[:100] + bytes(len(mp4) - 2000) + mp4[-1900:], "its frames cannot be decoded"),
    "junk": (lambda mp4: np.random.default_rng(0).bytes(5000), NO_VIDEO),
    "text": (lambda mp4: b"this is not a video\n" * 500, NO_VIDEO),
    "a playlist": (lambda mp4: b"#EXTM3U\n#EXTINF:10,\nclip.mp4\n#EXT-X-ENDLIST\n", NO_VIDEO),
    "PNG": (lambda mp4: picture("PNG"), NO_VIDEO),
    "JPEG": (lambda mp4: picture("JPEG"), NO_VIDEO),
    "GIF": (lambda mp4: picture("GIF"), NO_VIDEO),
    "a sound file": (lambda mp4: sound(), NO_VIDEO),
    "only a sound track": (lambda mp4: mp4.replace(b"vide", b"soun").replace(b"vmhd", b"smhd"), NO_VIDEO),
    "an unknown codec": (lambda mp4: changed(mp4, b"jpeg", -4, ">I", 0x7A7A7A7A), NO_VIDEO),
    "the wrong codec": (lambda mp4: changed(mp4, b"jpeg", -4, ">4s", b"avc1"), NO_VIDEO),
    "frames of 0 x 0": (lambda mp4: sized(mp4, 0, True), NO_VIDEO),
    "frames of 65535 x 65535": (lambda mp4: sized(mp4, 65535, True), NO_VIDEO),
    "frames of 4000 x 4000": (lambda mp4: sized(mp4, 4000, True), NO_VIDEO),
    "no frames": (lambda mp4: changed(changed(mp4, b"stts", 4, ">I", 0), b"stsz", 8, ">I", 0), NO_VIDEO),
    # decord alone would end the process, as would any frame count that memory does not hold
    "two thousand million frames": (lambda mp4: changed(mp4, b"stts", 8, ">I", 2**31 - 1), "more frames than it lists"),
    "two hundred lists of times": (lambda mp4: changed(mp4, b"stts", 4, ">I", 200), "table of frame times is cut off"),
    "a short list of frames": (lambda mp4: changed(mp4, b"stsz", 8, ">I", 10**6), "more frames than it lists"),
    # decord alone would give 6 frames; by seeking it would give other frames than those asked for, then some twice
    "a frame of 3 GB": (lambda mp4: changed(mp4, b"stsz", 12 + 4 * 6, ">I", 3 * 2**30), "bytes than the file has"),
    "an empty frame": (lambda mp4: changed(mp4, b"stsz", 12 + 4 * 14, ">I", 0), "its frames cannot be decoded"),
    "all frames at one time": (lambda mp4: changed(mp4, b"stts", 12, ">I", 0), "its frames cannot be decoded"),
}


def box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def with_another_track(mp4: bytes) -> bytes:
    """Add a track of one sample, whose sizes stand before its times; the index is at the end of the file."""
    sizes, times = box(b"stsz", struct.pack(">4xII", 4, 1)), box(b"stts", struct.pack(">4xIII", 1, 1, 1000))
    handler = box(b"hdlr", bytes(8), b"soun", bytes(12))
    track = box(b"trak", box(b"mdia", handler, box(b"minf", box(b"stbl", sizes, times))))
    begin = mp4.rindex(b"moov") - 4
    return mp4[:begin] + box(b"moov", mp4[begin + 8 :], track)


FINE = {
    "another track": with_another_track,
    "index first": with_index_first,
    "0 x 0 in the headers alone": lambda mp4: sized(mp4, 0, False),
    "65535 x 65535 in the headers alone": lambda mp4: sized(mp4, 65535, False),
    "QuickTime": lambda mp4: with_index_first(mp4).replace(b"ftyp", b"wide"),
    "a length of 64 bits": lambda mp4: long_box(mp4),
    "a box without end": lambda mp4: mp4 + struct.pack(">I4sQ", 1, b"free", 2**64 - 1),
    "something behind the end": lambda mp4: mp4 + b"more" * 1000,
    "frames up to the end of the file": lambda mp4: with_index_first(mp4).replace(
        struct.pack(">I", mp4.index(b"moov") - mp4.index(b"mdat")) + b"mdat", bytes(4) + b"mdat"
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_named_in_one_line(what, mp4, tmp_path, tokenizer):
    change, message = BROKEN[what]
    path = tmp_path / "heart\n\x1b[31m.mp4"
    path.write_bytes(change(mp4))
    assert path.read_bytes() != mp4
    assert message in error_of(path, tokenizer)


@pytest.mark.parametrize("what", FINE)
def test_a_file_that_only_looks_odd_gives_all_its_frames(what, mp4, tmp_path, tokenizer):
    (tmp_path / "clip.mp4").write_bytes(FINE[what](mp4))
    assert (tmp_path / "clip.mp4").read_bytes() != mp4
    prompt = load(tmp_path / "clip.mp4", tokenizer)
    assert gray_levels(prompt.patches, prompt.grid_thw[0].tolist()) == pytest.approx(LEVELS, abs=1.5)


@pytest.mark.parametrize("name", ["clip.txt", "clip.png", "clip", "view:2.mp4", "http:a.mp4", "ünï\n.mp4"])
def test_a_good_file_may_have_any_name(name, mp4, tmp_path, tokenizer, monkeypatch):
    (tmp_path / name).write_bytes(mp4)
    monkeypatch.chdir(tmp_path)  # FFmpeg takes a relative "view:2.mp4" for an address
    prompt = load(name, tokenizer)
    assert gray_levels(prompt.patches, prompt.grid_thw[0].tolist()) == pytest.approx(LEVELS, abs=1.5)


def test_a_name_that_is_not_utf_8_is_named(mp4, tmp_path, tokenizer):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\x80.mp4")
    with open(path, "wb") as file:
        file.write(mp4)
    assert "surrogates not allowed" in error_of(path, tokenizer)


def test_what_is_no_file_is_named(tmp_path, tokenizer):
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")  # to open it would wait without end
    assert "folder.mp4' has 0 frames" in error_of(f"{tmp_path}/folder.mp4", tokenizer)
    for name in ("pipe.mp4", "gone.mp4", "gone\0.mp4", "clip" * 1000):
        assert "no video at" in error_of(f"{tmp_path}/{name}", tokenizer)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(mp4, tmp_path, tokenizer):
    path = tmp_path / "clip.mp4"
    path.write_bytes(mp4)
    path.chmod(0)
    assert "cannot be read (Permission denied)" in error_of(path, tokenizer)


@pytest.mark.parametrize(
    ("num_frames", "options", "outcome"),
    [
        (1, {"fps": 2.0}, "has 1 frame, at least 2 are needed"),
        (1, {"nframes": 2}, "has 1 frame, --nframes 2 asks for 2"),
        (3, {"nframes": 4}, "has 3 frames, --nframes 4 asks for 4"),
        (2, {"fps": 2.0}, [0, 10]),
        (2, {"nframes": 2}, [0, 10]),
        (3, {"fps": 2.0}, [0, 20]),
    ],
)
def test_short_videos_give_what_they_have_or_say_what_is_missing(num_frames, options, outcome, tmp_path, tokenizer):
    path = tmp_path / "clip.mp4"
    write_mp4(path, gray_clip(num_frames), fps=8)
    options = MediaOptions(VideoOptions(resized_width=56, resized_height=56, **options))
    if isinstance(outcome, str):
        assert outcome in error_of(path, tokenizer, options)
    else:
        prompt = load(path, tokenizer, options)
        levels = gray_levels(prompt.patches, prompt.grid_thw[0].tolist())
        assert levels == pytest.approx(outcome, abs=1.5)
