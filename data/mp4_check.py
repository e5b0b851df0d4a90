"""Refuse mp4 files that decord would read wrongly without saying so, by their boxes (ISO/IEC 14496-12)."""

import os
import struct

CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


def check_mp4(path: str) -> None:
    """Raise ValueError when an mp4 file is cut off, or its index cannot be true.

    Other formats pass: read as boxes, they end at once or name none of these. decord takes broken files: it fills what
    is missing of a picture with what was in memory, leaves out frames behind the end of the file, and brings the
    interpreter down when the index counts too many.
    """
    size, position, is_video, num_timed = os.path.getsize(path), 0, False, 0
    with open(path, "rb") as file:
        while position + 8 <= size:
            file.seek(position)
            length, kind = struct.unpack(">I4s", file.read(8))
            if length == 1:  # the length follows, in 8 bytes
                length = int.from_bytes(file.read(8), "big")
            elif length == 0:  # up to the end of the file
                return
            if kind in (b"moov", b"moof", b"mdat") and position + length > size:
                raise ValueError(f"is cut off: it has {size} of at least {position + length} bytes")
            if kind == b"trak":
                is_video, num_timed = False, 0
            if kind in CONTAINERS:
                length = 8  # go on inside
            elif kind == b"hdlr":  # stands before the tables of its track
                is_video = file.read(12)[8:] == b"vide"
            elif kind == b"stts":  # so many frames, so long; and so on
                (num_entries,) = struct.unpack(">4xI", file.read(8).ljust(8, b"\0"))
                if length < 16 + 8 * num_entries or position + length > size:
                    raise ValueError("is damaged: its index promises more than it holds")
                num_timed = sum(count for count, _ in struct.iter_unpack(">II", file.read(8 * num_entries)))
            elif kind == b"stsz":
                each, num_frames = struct.unpack(">4xII", file.read(12).ljust(12, b"\0"))
                table = file.read(length - 20) if length > 20 else b""
                sizes = struct.unpack_from(f">{min(num_frames, len(table) // 4)}I", table)
                if num_timed > num_frames or (not each and len(sizes) < num_frames):
                    raise ValueError("is damaged: its index counts more frames than it lists")
                if is_video and (each * num_frames or sum(sizes)) > size:
                    raise ValueError("is cut off or damaged: its index lists more than the file holds")
            position += max(length, 8)
