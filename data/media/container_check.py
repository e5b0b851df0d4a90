"""Refuse video files that decord would silently read wrongly, judging by the headers of their containers.

decord accepts broken files: it fills the missing part of a frame with arbitrary memory, leaves out frames that it does
not find, so that all later ones move, and crashes the interpreter if a header announces too many frames.
"""

import os
import struct
from typing import BinaryIO

BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl")  # mp4: boxes of boxes, on the way to a track's tables
SEGMENT, INFO, CLUSTER, TIMESTAMP_SCALE, DURATION = 0x18538067, 0x1549A966, 0x1F43B675, 0x2AD7B1, 0x4489  # Matroska
ASF_FACTS = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # wmv: before the facts about the file
FLV_TAGS = (8, 9, 18)  # sound, video, facts


def check_container(path: str) -> int:
    """Return how many frames the index of a video file lists at least; 0 if it has none or is of another format.

    Raises ValueError if the file is cut off or contradicts itself, or decord loses frames of its format.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(2000)
        if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
            return check_avi(file, size)
        if b"GGG" in (start[:377:188], start[4:389:192]):  # the sync byte of each packet
            raise ValueError("is an MPEG transport stream, not a format that can be read exactly: re-encode it as mp4")
        if start[:4] == b"\x1aE\xdf\xa3":
            check_matroska(file, size)
        elif start[:3] == b"FLV":
            check_flv(file, size, start)
        elif (at := start.find(ASF_FACTS)) > 0 and not int.from_bytes(start[at + 88 : at + 89]) & 1:  # 1: live, no size
            check_end(int.from_bytes(start[at + 40 : at + 48], "little"), size)
        elif start[:4] == b"\0\0\1\xba":
            check_mpeg(file, size)
        else:
            check_mp4(file, size)
    return 0


def check_end(end: int, size: int) -> None:
    """Raise ValueError if a file of `size` bytes should go on to `end`."""
    if end > size:
        raise ValueError(f"is cut off: it has {size} bytes and should have at least {end}")


def check_duration(seconds: float, size: int) -> None:
    """Raise ValueError for more seconds than bytes: decord makes room for a frame rate times as many frames."""
    if seconds > size:
        raise ValueError(f"is damaged: its header announces {seconds:g} seconds, too many for its {size} bytes")


def check_mp4(file: BinaryIO, size: int) -> None:
    """Check an mp4 or QuickTime file by its boxes (ISO/IEC 14496-12).

    Files of other formats pass: read as boxes, they contain none of the kinds below.
    """
    position, is_video, num_times = 0, False, 0
    while position + 8 <= size:
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        if length == 1:  # the length follows, in 8 bytes
            length = int.from_bytes(file.read(8), "big")
        elif length == 0:  # the box extends to the end of the file
            return
        if kind in (b"moov", b"moof", b"mdat"):
            check_end(position + length, size)
        if kind == b"trak":
            is_video, num_times = False, 0
        if kind in BOXES:
            length = 8  # skip only the header: the boxes inside come next
        elif kind == b"hdlr":  # comes before the tables of its track
            is_video = file.read(12)[8:] == b"vide"
        elif kind == b"stts":  # the times: pairs (number of frames, duration of each)
            (num_entries,) = struct.unpack(">4xI", file.read(8).ljust(8, b"\0"))
            if length < 16 + 8 * num_entries or position + length > size:
                raise ValueError("is damaged: its table of frame times is cut off")
            num_times = sum(count for count, _ in struct.iter_unpack(">II", file.read(8 * num_entries)))
        elif kind == b"stsz":  # the sizes: one for all frames, or a table
            size_of_all, num_frames = struct.unpack(">4xII", file.read(12).ljust(12, b"\0"))
            table = file.read(length - 20) if length > 20 else b""
            sizes = struct.unpack_from(f">{min(num_frames, len(table) // 4)}I", table)
            if num_times > num_frames or (not size_of_all and len(sizes) < num_frames):
                raise ValueError("is damaged: its index announces more frames than it lists")
            if is_video and (size_of_all * num_frames or sum(sizes)) > size:
                raise ValueError("is cut off or damaged: its frames take more bytes than the file has")
        position += max(length, 8)


def check_avi(file: BinaryIO, size: int) -> int:
    """Check an AVI file by its RIFF chunks, several for a long one (OpenDML); return the frames in its index."""
    position, stream, video, frames = 0, -1, b"", set()
    while position + 12 <= size:
        file.seek(position)
        kind, length, form = struct.unpack("<4sI4s", file.read(12))
        if kind == b"RIFF":
            check_end(position + length, size)  # without its header's 8 bytes, which some programs count, too
        if kind == b"strh":
            stream += 1
            if form == b"vids" and not video:
                video = b"%02d" % stream
                (num_frames,) = struct.unpack("<28xI", file.read(32).ljust(32, b"\0"))
                if 8 * num_frames > size:
                    raise ValueError(f"is damaged: its {size} bytes cannot be the {num_frames} frames it announces")
        elif kind == b"idx1":
            table = form + file.read(max(0, length - 4))
            for name, _, offset, num_bytes in struct.iter_unpack("<4s3I", table[: len(table) // 16 * 16]):
                if name in (video + b"dc", video + b"db") and num_bytes:  # empty: the frame before it once more
                    frames.add(offset)
        position += 12 if kind in (b"RIFF", b"LIST") and form != b"movi" else 8 + length + length % 2
    return len(frames)


def check_matroska(file: BinaryIO, size: int) -> None:
    """Check a Matroska or webm file by its EBML elements (RFC 8794, RFC 9559), down to the blocks of frames."""
    position, end, scale, seconds = 0, size, 10**6, 0.0
    while position < end:
        file.seek(position)
        head = file.read(12).ljust(12, b"\0")
        id_bytes = 9 - head[0].bit_length()  # its first bits say how many: 1 is one byte, 01 two, 001 three
        num_bytes = 9 - head[min(id_bytes, 4)].bit_length()  # of the length, in the same way
        if id_bytes > 4 or num_bytes > 8:
            raise ValueError(f"is cut off or damaged: no part of it begins at byte {position}")
        kind, unknown = int.from_bytes(head[:id_bytes], "big"), 2 ** (7 * num_bytes) - 1
        length = int.from_bytes(head[id_bytes : id_bytes + num_bytes], "big") & unknown
        position += id_bytes + num_bytes
        file.seek(position)
        if kind == SEGMENT and length != unknown:  # in a live stream it is
            check_end(position + length, size)
            end = position + length
        elif kind == TIMESTAMP_SCALE:
            scale = int.from_bytes(file.read(min(length, 8)), "big")
        elif kind == DURATION and length in (4, 8):
            (seconds,) = struct.unpack(">f" if length == 4 else ">d", file.read(length).ljust(length, b"\0"))
        if kind not in (SEGMENT, INFO, CLUSTER):  # of those, only the header is skipped: what is inside comes next
            position += length
    check_end(position, size)
    check_duration(seconds * scale / 1e9, size)


def check_flv(file: BinaryIO, size: int, start: bytes) -> None:
    """Check an flv file by its tags, each of a frame or of sound."""
    if (at := start.find(b"\0\x08duration\0")) >= 0:
        check_duration(*struct.unpack(">d", start[at + 11 : at + 19].ljust(8, b"\0")), size)
    position = int.from_bytes(start[5:9], "big") + 4
    while position < size:
        file.seek(position)
        kind, length = divmod(int.from_bytes(file.read(4), "big"), 1 << 24)
        if kind & 31 not in FLV_TAGS:
            raise ValueError(f"is cut off or damaged: no part of it begins at byte {position}")
        position += 11 + length + 4
    check_end(position - 4, size)  # the last 4 say how long the tag was


def check_mpeg(file: BinaryIO, size: int) -> None:
    """Check an MPEG program stream (ISO/IEC 13818-1) by its packets, as far as they follow each other."""
    position = 0
    while position + 14 <= size:
        file.seek(position)
        head = file.read(14)
        if head[:3] != b"\0\0\1" or head[3] < 0xBA:
            return  # padding
        if head[3] > 0xBA:
            position += 6 + int.from_bytes(head[4:6], "big")
        else:
            position += 14 + head[13] % 8 if head[4] >> 6 == 1 else 12  # of MPEG-2 or MPEG-1
    check_end(position, size)
