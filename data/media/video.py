"""Video file -> frames -> patches: decord decodes the frames that `frames.py` chooses, `patches.py` cuts them.

T frames, H x W pixels, S = t·h·w patches of one video with t = T / 2, h = H / 14, w = W / 14.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch  # before decord: on some machines decord's bundled libraries clash with torch's if they are loaded first
from decord import DECORDError, DECORDLimitReachedError, VideoReader

from data.media.frames import VideoOptions, frame_indices, frame_span, target_size
from data.media.mp4_check import check_mp4
from data.media.patches import PATCH_SIZE, TEMPORAL_PATCH_SIZE, Grid, LoadedMedia, as_patches, resize
from data.sample import BadMedia, TooFewFrames


class OpenVideo(NamedTuple):
    """A video file that is ready to be decoded."""

    reader: VideoReader
    indices: list[int]  # of the frames to read, ascending
    sampled_fps: float  # how many of them are in a second of video


def open_video(path: str | Path, options: VideoOptions) -> OpenVideo:
    """Open a video file and choose its frames.

    Returns the reader, the indices of the frames to read, and how many of those there are per second of video.
    Raises FileNotFoundError if there is no such file, BadMedia if it is not a readable video, TooFewFrames if it is
    too short.
    """
    path = str(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no video at {path!r}")
    try:
        check_mp4(path)
        # An absolute path, since FFmpeg reads "view:2.mp4" as a URL. One thread, since the data workers already run in
        # parallel. fault_tol: raise as soon as one frame is not found, instead of repeating its neighbour; decord
        # ignores a fault_tol of 0, hence the tiny number.
        reader = VideoReader(os.path.abspath(path), num_threads=1, fault_tol=1e-9)
        video_fps, times = reader.get_avg_fps(), reader.get_frame_timestamp(range(len(reader)))[:, 0]
    except OSError as error:
        raise BadMedia(f"{path!r} cannot be read ({error.strerror})") from error
    except UnicodeEncodeError as error:  # a ValueError
        raise BadMedia(f"{path!r} has a name that decord cannot open: it is not UTF-8") from error
    except ValueError as error:
        raise BadMedia(f"{path!r} {error}") from error
    except (DECORDError, RuntimeError, AssertionError, IndexError) as error:
        raise BadMedia(f"{path!r} is not a video that decord can open") from error
    if not 0 < video_fps < math.inf:  # false for nan, too
        raise BadMedia(f"{path!r} has no valid frame rate (decord reads {video_fps})")
    # A video trimmed without re-encoding still stores frames from before its beginning, with negative times. decord
    # counts them but never returns them. Files without times (AVI) have -3e17 for each: those frames do exist.
    total_frames = len(times) - int(((times < 0) & (times > -1e9)).sum())
    try:
        span = frame_span(total_frames, video_fps, options)
    except ValueError as error:
        raise BadMedia(f"{path!r} {error}") from error
    try:
        indices = [span[index] for index in frame_indices(len(span), video_fps, options)]
    except ValueError as error:
        raise TooFewFrames(f"{path!r} {error}") from error
    sampled_fps = len(indices) / len(span) * video_fps  # as in qwen-vl-utils; the frames span the whole part
    return OpenVideo(reader, indices, sampled_fps)


def without_row_padding(frame: np.ndarray) -> np.ndarray:
    """Return the RGB pixels of a frame from decord: (H, W, C) -> (H, W, 3).

    FFmpeg pads rows to a multiple of 32 pixels. decord takes bytes per row / W for the number of channels where that is
    a whole number, so that C is 48 at W = 2 and 4 at W = 72 (11 widths from 1 to 72): each row is then its 3·W bytes
    of RGB, followed by padding. Where C is 3, nothing changes.
    """
    height, width, _ = frame.shape
    return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def decode(path: str | Path, reader: VideoReader, indices: list[int]) -> torch.Tensor:
    """Decode frames of a video that was just opened: uint8 (T, 3, H, W). Raises BadMedia.

    indices: ascending. Every frame up to the last index is decoded: decord can seek, but silently returns wrong frames
    where frames shown before a key frame are stored after it (open groups of pictures, common with x265).
    """
    wanted, frames = set(indices), []
    try:
        for index in range(indices[-1] + 1):
            frame = reader.next()
            if index in wanted:
                frames.append(torch.from_numpy(without_row_padding(frame.asnumpy())))  # (H, W, 3)
    except (DECORDError, DECORDLimitReachedError, RuntimeError, StopIteration) as error:
        raise BadMedia(f"{str(path)!r} is damaged: its frames cannot be decoded") from error
    return torch.stack(frames).permute(0, 3, 1, 2)  # (T, 3, H, W)


def read_frames(path: str | Path, options: VideoOptions) -> tuple[torch.Tensor, float]:
    """Decode the frames that the options ask for.

    Returns the frames, uint8 (T, 3, H, W), and how many of them there are per second of video.
    Raises FileNotFoundError if there is no such file, BadMedia if the frames cannot be decoded.
    """
    reader, indices, sampled_fps = open_video(path, options)
    return decode(path, reader, indices), sampled_fps


def grid_of(path: str | Path, frames: torch.Tensor, num_frames: int, options: VideoOptions) -> Grid:
    """Return the grid (t, h, w) of num_frames frames of this size, (T, 3, H, W). Raises BadMedia if too narrow."""
    try:
        height, width = target_size(frames.shape[2], frames.shape[3], num_frames, options)
    except ValueError as error:
        raise BadMedia(f"{str(path)!r} {error}") from error
    return Grid(num_frames // TEMPORAL_PATCH_SIZE, height // PATCH_SIZE, width // PATCH_SIZE)


def video_grid(path: str | Path, options: VideoOptions) -> Grid:
    """Return the grid (t, h, w) of `load_video`, decoding only the first frame; raises the same errors."""
    reader, indices, _ = open_video(path, options)
    return grid_of(path, decode(path, reader, indices[:1]), len(indices), options)


def load_video(path: str | Path, options: VideoOptions) -> LoadedMedia:
    """Read a video file as input for the vision tower.

    Returns pixel_values (S, 1176) float32, its grid (t, h, w), and second_per_grid_t: seconds of video per step
    along t.
    Raises FileNotFoundError if there is no such file, BadMedia if it has no usable frames.
    """
    return as_patches(*resized_frames(path, options))


def resized_frames(path: str | Path, options: VideoOptions) -> tuple[torch.Tensor, float]:
    """Decode and resize the frames of a video: uint8 (T, 3, H, W), and how many there are per second of video."""
    frames, sampled_fps = read_frames(path, options)
    return resize_frames(path, frames, options), sampled_fps


def resize_frames(path: str | Path, frames: torch.Tensor, options: VideoOptions) -> torch.Tensor:
    """Resize the frames of a video, uint8 (T, 3, H, W), as the options say. Raises BadMedia if they are too narrow."""
    _, h, w = grid_of(path, frames, len(frames), options)
    return resize(frames, h * PATCH_SIZE, w * PATCH_SIZE)
