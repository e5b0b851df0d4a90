"""Decoded, resized frames on a disk: `--frame_cache DIR`, shared by ranks, workers and runs.

An entry is keyed by the video's path, size and time stamp, and by all options that decide its frames; it gets its name
when it is whole, and is decoded again where its checksum is wrong. Those that were not used for longest are removed
when the folder grows over its bound.
"""

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from data.media.frames import VideoOptions
from data.media.video import resized_frames

ENDING = ".frames"
KEPT_SHARE = 0.9  # of the bound, when entries are removed


class CacheError(Exception):
    """The folder cannot be written; the message is one line."""


@dataclass(frozen=True)
class FrameCache:
    """A folder of decoded frames, and its bound."""

    folder: str
    max_bytes: int

    def frames(
        self, path: str, options: VideoOptions, decode: Callable[[str, VideoOptions], tuple] = resized_frames
    ) -> tuple[torch.Tensor, float]:
        """Return what `resized_frames` does, from the folder where it is there. Raises CacheError, and what it raises.

        Frames: uint8 (T, 3, H, W), beside how many of them are in a second.
        """
        try:
            status = os.stat(path)
        except OSError:
            return decode(path, options)  # which says what is wrong
        key = [os.path.abspath(path), status.st_size, status.st_mtime_ns, asdict(options), torch.__version__]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40]
        entry = Path(self.folder, name + ENDING)
        found = read(entry)
        if found is None:
            found = decode(path, options)
            self.write(entry, *found)
        return found

    def write(self, entry: Path, frames: torch.Tensor, sampled_fps: float) -> None:
        """Write an entry whole, and now and then see to the bound; raise CacheError."""
        frames = frames.contiguous()
        metadata = {"sampled_fps": repr(sampled_fps), "crc32": str(checksum(frames))}
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=entry.parent, suffix=".unfinished", delete=False) as file:
                try:
                    file.write(save({"frames": frames}, metadata))
                    file.close()
                    os.replace(file.name, entry)
                except OSError:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            raise CacheError(f"--frame_cache {self.folder!r} cannot be written ({error.strerror})") from error
        if entry.name[0] == "0":  # every 16th entry on average, since it reads the whole folder
            self.remove_oldest()

    def remove_oldest(self) -> None:
        """Remove the entries that were not used for longest, if all are larger than the bound."""
        entries = []
        for found in os.scandir(self.folder):
            try:
                if found.name.endswith(ENDING):
                    status = found.stat()
                    entries.append((status.st_mtime_ns, status.st_size, found.path))
            except FileNotFoundError:  # another process removes some, too
                continue
        total = sum(size for _, size, _ in entries)
        if total <= self.max_bytes:
            return
        for _, size, path in sorted(entries):
            if total <= KEPT_SHARE * self.max_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= size


def read(entry: Path) -> tuple[torch.Tensor, float] | None:
    """Read an entry and note that it was used; None if it is not there or is damaged."""
    try:
        with safe_open(entry, "pt") as file:
            frames, metadata = file.get_tensor("frames"), file.metadata()
            if int(metadata["crc32"]) != checksum(frames):
                return None
            os.utime(entry)
            return frames, float(metadata["sampled_fps"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def checksum(frames: torch.Tensor) -> int:
    """Return a checksum of the pixels and their shape."""
    return zlib.crc32(frames.numpy().tobytes(), zlib.crc32(repr(tuple(frames.shape)).encode()))
