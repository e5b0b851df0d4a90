"""Files that are cut off, damaged or misread by decord are refused, whatever their container; good ones are read."""

import struct
from pathlib import Path

import numpy as np
import pytest

from data.epochs import BatchItem
from data.loader import PromptDataset, PromptOptions
from data.media.container_check import check_container
from data.media.frames import VideoOptions
from data.media.video import resized_frames
from data.sample import BadMedia, Media, Sample
from grpo.demo.mp4 import write_mp4
from tests.conftest import OPTIONS
from tests.data.test_echonet import chunk, write_avi

HERE = Path(__file__).parent
# 24 frames of 64 x 64 pixels: frame k is gray of level 10·k; that of the AVI files with some noise, to be larger
NAMES = ["clip.flv", "clip.webm", "clip.mpg", "clip.wmv", "clip.avi", "long.avi"]


def noisy(num_frames: int, height: int = 64, width: int = 64) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 10, (num_frames, height, width), dtype=np.uint8)
    return (10 * (np.arange(num_frames) % 24)).astype(np.uint8)[:, None, None] + noise


def good(name: str, folder: Path) -> bytes:
    if not name.endswith(".avi"):
        return (HERE / name).read_bytes()
    write_avi(folder / "good.avi", noisy(24))
    avi = (folder / "good.avi").read_bytes()
    return avi if name == "clip.avi" else in_two_parts(avi)


def in_two_parts(avi: bytes) -> bytes:
    """Put the last ten frames into a second RIFF chunk, as OpenDML does with those beyond 1 GB."""
    movie, index = avi.index(b"movi") - 8, avi.rindex(b"idx1")
    at = movie + 8 + struct.unpack_from("<I", avi, index + 8 + 16 * 14 + 8)[0]
    end = movie + 8 + struct.unpack_from("<I", avi, movie + 4)[0]
    first = avi[12:movie] + chunk(b"LIST", avi[movie + 8 : at]) + chunk(b"idx1", avi[index + 8 : index + 8 + 16 * 14])
    return chunk(b"RIFF", b"AVI " + first) + chunk(b"RIFF", b"AVIX" + chunk(b"LIST", b"movi" + avi[at:end]))


def read(path: Path, data: bytes, **options):
    path.write_bytes(data)
    options = {"resized_width": 56, "resized_height": 56, **options}
    return resized_frames(str(path), VideoOptions(**options))[0].float().mean(dim=(1, 2, 3)).tolist()


def refused(path: Path, data: bytes) -> str:
    with pytest.raises(BadMedia) as error:
        read(path, data, nframes=2)
    assert str(error.value).startswith(f"{str(path)!r} ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_good_files_give_all_their_frames(name, tmp_path):
    data = good(name, tmp_path)
    levels = read(tmp_path / name, data, nframes=24)
    assert levels == pytest.approx([10 * k + 4.5 * name.endswith("avi") for k in range(24)], abs=4)
    assert check_container(str(tmp_path / name)) == {"clip.avi": 24, "long.avi": 14}.get(name, 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [0.3, 0.45, 0.6, 0.75, 0.9, 0.99])
def test_a_file_that_is_cut_off_is_refused(name, part, tmp_path):
    data = good(name, tmp_path)
    assert "is cut off: it has" in refused(tmp_path / name, data[: int(part * len(data))])


@pytest.mark.parametrize(("num_frames", "size"), [(60, 112), (7, 40), (200, 24)])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.8])
def test_half_of_an_avi_like_echonets_is_refused(num_frames, size, part, tmp_path):
    write_avi(tmp_path / "whole.avi", noisy(num_frames, size, size))
    avi = (tmp_path / "whole.avi").read_bytes()
    assert "is cut off: it has" in refused(tmp_path / "half.avi", avi[: int(len(avi) * part)])


def test_an_avi_whose_header_counts_its_own_8_bytes_is_whole(tmp_path):
    avi = bytearray(good("clip.avi", tmp_path))
    struct.pack_into("<I", avi, 4, len(avi))
    assert len(read(tmp_path / "clip.avi", avi, nframes=24)) == 24


def without(data: bytes, begin: int, length: int) -> bytes:
    return data[:begin] + bytes(length) + data[begin + length :]


@pytest.mark.parametrize("index", [1, 5, 12, 22])
def test_a_frame_that_is_lost_in_an_avi_does_not_shift_the_others(index, tmp_path):
    avi = good("clip.avi", tmp_path)
    place = avi.rindex(b"idx1") + 8 + 16 * index
    begin = avi.index(b"movi") + struct.unpack_from("<I", avi, place + 8)[0]
    lost = without(avi, begin, 8 + struct.unpack_from("<I", avi, place + 12)[0])
    assert "is damaged: of 24 frames in its index, 23 are found" in refused(tmp_path / "clip.avi", lost)


def test_repeated_frames_and_other_streams_of_an_avi_index_are_no_lost_frames(tmp_path):
    """An empty entry says that the frame before it is shown again; so does one more entry of the same place."""
    avi = good("clip.avi", tmp_path)
    index = avi.rindex(b"idx1")
    entries = avi[index + 8 :]
    more = entries + entries[-16:] + b"00dc" + struct.pack("<3I", 0, 99, 0) + b"01wb" + struct.pack("<3I", 0, 5, 9)
    odd = avi[:4] + struct.pack("<I", len(avi) + 40) + avi[8:index] + chunk(b"idx1", more)
    assert len(read(tmp_path / "clip.avi", odd, nframes=24)) == 24


@pytest.mark.parametrize("name", ["clip.webm", "clip.flv"])
@pytest.mark.parametrize("part", [0.6, 0.8])
def test_zeros_in_the_middle_are_refused(name, part, tmp_path):
    data = good(name, tmp_path)
    assert "is cut off or damaged: no part of it begins at byte " in refused(
        tmp_path / name, without(data, int(part * len(data)), 250)
    )


def changed(data: bytes, name: bytes, offset: int, form: str, value: float) -> bytes:
    """Overwrite a number `offset` bytes behind a name in a header."""
    new = bytearray(data)
    struct.pack_into(form, new, data.index(name) + len(name) + offset, value)
    return bytes(new)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("clip.avi", (b"strh", 36, "<I", 10**6), "cannot be the 1000000 frames it announces"),
        ("long.avi", (b"strh", 36, "<I", 2**32 - 1), "cannot be the 4294967295 frames it announces"),
        ("clip.webm", (b"\x44\x89\x88", 0, ">d", 1e15), "announces 1e+12 seconds"),
        ("clip.flv", (b"duration", 1, ">d", 1e9), "announces 1e+09 seconds"),
    ],
)
def test_more_frames_than_bytes_would_crash_decord_and_are_refused(name, change, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(changed(good(name, tmp_path), *change))
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        check_container(str(path))  # first, since decord ends the process
    sample = Sample("bad", (Media("video", str(path)),), (("user", "<video>"),), "1")
    item = PromptDataset([sample], None, 2, PromptOptions(OPTIONS, "skip"))[BatchItem(0, 0)]
    assert "no sample can be used" in str(item) and message in str(item)


def test_a_live_stream_may_leave_its_size_open_but_not_end_within_a_frame(tmp_path):
    webm = good("clip.webm", tmp_path)
    at = webm.index(b"\x18\x53\x80\x67") + 4
    live = webm[:at] + b"\x01" + b"\xff" * 7 + webm[at + 8 :]
    assert len(read(tmp_path / "clip.webm", live, nframes=24)) == 24
    assert "is cut off" in refused(tmp_path / "clip.webm", live[: webm.rindex(b"\xa3") + 9])


@pytest.mark.parametrize(("before", "packet"), [(0, 188), (4, 192)])
def test_a_transport_stream_is_no_format_that_can_be_read_exactly(before, packet, tmp_path):
    data = (bytes(before) + b"G".ljust(188, b"\xff")) * 40
    assert len(data) == 40 * packet
    message = "is an MPEG transport stream, not a format that can be read exactly: re-encode it as mp4"
    assert message in refused(tmp_path / "clip.mp4", data)


def palette_avi(num_frames: int, height: int, width: int) -> bytes:
    """An uncompressed AVI of 8 bits with a gray palette, as ImageJ and MATLAB write gray clips."""
    main = struct.pack("<14I", 40000, 0, 0, 0x10, num_frames, 0, 1, height * width, width, height, 0, 0, 0, 0)
    stream = b"vidsDIB " + struct.pack("<10I4H", 0, 0, 0, 1, 25, 0, num_frames, 0, 2**32 - 1, 0, 0, 0, width, height)
    palette = bytes(v for level in range(256) for v in (level, level, level, 0))
    bitmap = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 0, height * width, 0, 0, 256, 0) + palette
    header = chunk(b"avih", main) + chunk(b"LIST", b"strl" + chunk(b"strh", stream) + chunk(b"strf", bitmap))
    movie = b"movi" + b"".join(chunk(b"00db", frame.tobytes()) for frame in noisy(num_frames, height, width))
    return chunk(b"RIFF", b"AVI " + chunk(b"LIST", b"hdrl" + header) + chunk(b"LIST", movie))


@pytest.mark.parametrize("shape", [(60, 112, 112), (4, 24, 40), (30, 480, 640)])
def test_a_video_that_decord_reads_as_black_is_refused(shape, tmp_path):
    line = refused(tmp_path / "gray.avi", palette_avi(*shape))
    assert "has frames of one single colour, as decord reads pixels with a palette" in line and "re-encode it" in line


def test_quicktime_animation_of_8_bits_is_refused_too(tmp_path):
    assert "of one single colour" in refused(tmp_path / "gray.mov", (HERE / "gray.mov").read_bytes())


@pytest.mark.parametrize("where", [(0, 0, 0), (3, 63, 63), (2, 40, 8)])
def test_one_pixel_of_another_colour_is_a_picture(where, tmp_path):
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    frame, y, x = where
    frames[frame, y // 8 * 8 : y // 8 * 8 + 8, x // 8 * 8 : x // 8 * 8 + 8] = 255  # a block of JPEG's
    write_mp4(tmp_path / "dot.mp4", frames, fps=8)
    options = VideoOptions(nframes=4, resized_width=56, resized_height=56)
    assert resized_frames(str(tmp_path / "dot.mp4"), options)[0][frame].max() > 100
