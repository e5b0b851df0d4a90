"""Write small, real mp4 files.

The demo and the tests need videos that decord opens, without a video encoder among the dependencies. So Pillow encodes
every frame as a JPEG, and the container is written here: Motion-JPEG in MP4, with the boxes of ISO/IEC 14496-12 (ISO
base media file format). Every frame is a key frame.
"""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

UNITY_MATRIX = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)  # 16.16 and 2.30 fixed point
TICKS_PER_FRAME = 512
JPEG_QUALITY = 90


def u32(*numbers: int) -> bytes:
    """Return numbers as 32 bits each."""
    return struct.pack(f">{len(numbers)}I", *numbers)


def box(kind: bytes, *payload: bytes) -> bytes:
    """Return one box: its size, its four-letter kind, its payload."""
    body = b"".join(payload)
    return u32(8 + len(body)) + kind + body


def encode_jpeg(frame: np.ndarray) -> bytes:
    """Return a frame (H, W, 3) uint8 as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def write_mp4(path: str | Path, frames: np.ndarray, fps: int) -> None:
    """Write frames to an mp4 file.

    frames: (T, H, W, 3) uint8, RGB, T >= 1. fps: whole frames per second. Colours come back within JPEG's loss.
    """
    jpegs = [encode_jpeg(frame) for frame in frames]
    num_frames, height, width, _ = frames.shape
    ticks, milliseconds = num_frames * TICKS_PER_FRAME, num_frames * 1000 // fps

    ftyp = box(b"ftyp", b"isom", u32(512), b"isomiso2mp41")
    first_frame_offset = len(ftyp) + 8  # behind the header of mdat
    size = struct.pack(">HHIIIH", width, height, 0x480000, 0x480000, 0, 1)  # 72 dpi, one frame per sample
    no_name = b"\0" * 32 + struct.pack(">Hh", 24, -1)  # of the compressor; 24 bits, no colour table
    sample_entry = box(b"jpeg", b"\0" * 6 + struct.pack(">H", 1) + b"\0" * 16, size, no_name)
    # Where a payload begins with u32, its first number is the version, 0, and flags.
    stbl = box(
        b"stbl",
        box(b"stsd", u32(0, 1), sample_entry),
        box(b"stts", u32(0, 1, num_frames, TICKS_PER_FRAME)),
        box(b"stsc", u32(0, 1, 1, num_frames, 1)),  # all frames in one chunk
        box(b"stsz", u32(0, 0, num_frames, *map(len, jpegs))),
        box(b"stco", u32(0, 1, first_frame_offset)),
    )
    dinf = box(b"dinf", box(b"dref", u32(0, 1), box(b"url ", u32(1))))  # 1: data in this file
    minf = box(b"minf", box(b"vmhd", u32(1), b"\0" * 8), dinf, stbl)
    mdhd = box(b"mdhd", u32(0, 0, 0, fps * TICKS_PER_FRAME, ticks), struct.pack(">HH", 0x55C4, 0))  # language "und"
    mdia = box(b"mdia", mdhd, box(b"hdlr", u32(0, 0), b"vide", b"\0" * 12 + b"V\0"), minf)
    shown = u32(3, 0, 0, 1, 0, milliseconds)  # 3: enabled, in the movie
    tkhd = box(b"tkhd", shown, b"\0" * 16, UNITY_MATRIX, u32(width << 16, height << 16))
    rate, next_track = struct.pack(">IH", 0x10000, 0x100), u32(2)  # rate 1.0, volume 1.0
    times = u32(0, 0, 0, 1000, milliseconds)
    mvhd = box(b"mvhd", times, rate, b"\0" * 10, UNITY_MATRIX, b"\0" * 24, next_track)
    Path(path).write_bytes(ftyp + box(b"mdat", *jpegs) + box(b"moov", mvhd, box(b"trak", tkhd, mdia)))
