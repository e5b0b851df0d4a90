"""Decoded, resized frames on a disk: `--frame_cache DIR`, shared by ranks, workers and runs.

An entry is keyed by the video's path, size and time stamp, and by all options that decide its frames; it gets its name
when it is whole, and is decoded again where its checksum is wrong. Those that were not used for longest are removed
when the folder grows over its bound.
"""

import hashlib
import json
import os
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from data.media.frames import VideoOptions
from data.media.video import resized_frames
from data.sample import writing

ENDING = ".frames"
KEPT_SHARE = 0.9  # of the bound, when entries are removed


@dataclass(frozen=True)
class FrameCache:
    """A folder of decoded frames, and its bound."""

    folder: str
    max_bytes: int

    def frames(self, path: str, options: VideoOptions) -> tuple[torch.Tensor, float]:
        """Return what `resized_frames` does, from the folder where it is there.

        Frames: uint8 (T, 3, H, W), beside how many of them are in a second. Raises what `resized_frames` does, and
        InputError if the folder cannot be written.
        """
        if not os.path.isfile(path):
            return resized_frames(path, options)  # which says what is wrong
        status = os.stat(path)
        key = [os.path.abspath(path), status.st_size, status.st_mtime_ns, asdict(options), torch.__version__]
        entry = Path(self.folder, hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40] + ENDING)
        found = read(entry)
        if found is None:
            found = resized_frames(path, options)
            self.write(entry, *found)
        return found

    def write(self, entry: Path, frames: torch.Tensor, sampled_fps: float) -> None:
        """Write an entry whole, and now and then see to the bound; raise InputError."""
        with writing("frame_cache", self.folder):
            entry.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=entry.parent, suffix=".unfinished") as unfinished:
                whole = Path(unfinished, "frames.npz")
                np.savez(whole, frames=frames.numpy(), sampled_fps=sampled_fps)
                os.replace(whole, entry)
        if entry.name[0] == "0":  # every 16th entry on average, since it reads the whole folder
            self.remove_oldest()

    def remove_oldest(self) -> None:
        """Remove the entries that were not used for longest, if all are larger than the bound."""
        entries = []
        for path in Path(self.folder).glob(f"*{ENDING}"):
            with suppress(FileNotFoundError):  # another process removes some, too
                entries.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in entries)
        most = self.max_bytes if total <= self.max_bytes else KEPT_SHARE * self.max_bytes
        for _, size, path in sorted(entries):
            if total <= most:
                break
            path.unlink(missing_ok=True)
            total -= size


def read(entry: Path) -> tuple[torch.Tensor, float] | None:
    """Read an entry and note that it was used; None if it is not there or is damaged, which zip's checksums tell."""
    try:
        with np.load(entry) as file:
            found = torch.from_numpy(file["frames"]), float(file["sampled_fps"])
        os.utime(entry)
        return found
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
