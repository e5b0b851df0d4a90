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


def box(kind: bytes, *payload: bytes) -> bytes:
    """Return one box: its size, its four-letter kind, its payload."""
    body = b"".join(payload)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def full_box(kind: bytes, flags: int, *payload: bytes) -> bytes:
    """Return a box of version 0 with flags."""
    return box(kind, struct.pack(">I", flags), *payload)


def encode_jpeg(frame: np.ndarray) -> bytes:
    """Return a frame (H, W, 3) uint8 as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def write_mp4(path: str | Path, frames: np.ndarray, fps: int) -> None:
    """Write frames to an mp4 file.

    frames: (T, H, W, 3) uint8, RGB, T >= 1. fps: whole frames per second. Colours come back within JPEG's loss.
    Raises ValueError for frames of another shape or dtype.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames must be (T, H, W, 3) uint8 with T >= 1, got {frames.shape} {frames.dtype}")
    jpegs = [encode_jpeg(frame) for frame in frames]
    num_frames, height, width, _ = frames.shape
    timescale = fps * TICKS_PER_FRAME
    ticks, milliseconds = num_frames * TICKS_PER_FRAME, num_frames * 1000 // fps

    ftyp = box(b"ftyp", b"isom", struct.pack(">I", 512), b"isomiso2mp41")
    mdat = box(b"mdat", *jpegs)
    first_frame_offset = len(ftyp) + 8  # behind the header of mdat

    sample_entry = box(
        b"jpeg",
        b"\0" * 6 + struct.pack(">H", 1) + b"\0" * 16,
        struct.pack(">HHIIIH", width, height, 0x480000, 0x480000, 0, 1),  # 72 dpi, one frame per sample
        b"\0" * 32 + struct.pack(">Hh", 24, -1),  # no compressor name, 24 bits, no colour table
    )
    stbl = box(
        b"stbl",
        full_box(b"stsd", 0, struct.pack(">I", 1), sample_entry),
        full_box(b"stts", 0, struct.pack(">III", 1, num_frames, TICKS_PER_FRAME)),
        full_box(b"stsc", 0, struct.pack(">IIII", 1, 1, num_frames, 1)),  # all frames in one chunk
        full_box(b"stsz", 0, struct.pack(f">II{num_frames}I", 0, num_frames, *map(len, jpegs))),
        full_box(b"stco", 0, struct.pack(">II", 1, first_frame_offset)),
    )
    dinf = box(b"dinf", full_box(b"dref", 0, struct.pack(">I", 1), full_box(b"url ", 1)))  # 1: data in this file
    minf = box(b"minf", full_box(b"vmhd", 1, b"\0" * 8), dinf, stbl)
    mdia = box(
        b"mdia",
        full_box(b"mdhd", 0, struct.pack(">IIIIHH", 0, 0, timescale, ticks, 0x55C4, 0)),  # language "und"
        full_box(b"hdlr", 0, struct.pack(">I4s", 0, b"vide"), b"\0" * 12 + b"V\0"),
        minf,
    )
    tkhd = full_box(
        b"tkhd",
        3,  # enabled, in the movie
        struct.pack(">IIIII", 0, 0, 1, 0, milliseconds) + b"\0" * 16,
        UNITY_MATRIX,
        struct.pack(">II", width << 16, height << 16),
    )
    mvhd = full_box(
        b"mvhd",
        0,
        struct.pack(">IIIIIH", 0, 0, 1000, milliseconds, 0x10000, 0x100) + b"\0" * 10,  # rate 1.0, volume 1.0
        UNITY_MATRIX,
        b"\0" * 24 + struct.pack(">I", 2),  # next track id
    )
    Path(path).write_bytes(ftyp + mdat + box(b"moov", mvhd, box(b"trak", tkhd, mdia)))
