"""Refuse mp4 files that decord would silently read wrongly, judging by their boxes (ISO/IEC 14496-12)."""

import os
import struct

CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")  # boxes of boxes, on the way to a track's tables


def check_mp4(path: str) -> None:
    """Raise ValueError if an mp4 file is cut off or its index contradicts itself or the file's size.

    Files of other formats pass: read as boxes, they contain none of the kinds below. decord accepts broken mp4 files:
    it fills the missing part of a frame with arbitrary memory, drops frames beyond the end of the file, and crashes
    the interpreter if the index announces too many frames.
    """
    size, position, is_video, num_times = os.path.getsize(path), 0, False, 0
    with open(path, "rb") as file:
        while position + 8 <= size:
            file.seek(position)
            length, kind = struct.unpack(">I4s", file.read(8))
            if length == 1:  # the length follows, in 8 bytes
                length = int.from_bytes(file.read(8), "big")
            elif length == 0:  # the box extends to the end of the file
                return
            if kind in (b"moov", b"moof", b"mdat") and position + length > size:
                raise ValueError(f"is cut off: it has {size} bytes and should have at least {position + length}")
            if kind == b"trak":
                is_video, num_times = False, 0
            if kind in CONTAINERS:
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
