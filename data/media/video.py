"""Video file -> frames: decord decodes those that `frames.py` chooses, T of H x W pixels."""

import math
import os

import numpy as np
import torch  # before decord: on some machines decord's bundled libraries clash with torch's if they are loaded first
from decord import DECORDError, DECORDLimitReachedError, VideoReader

from data.media.container_check import check_container
from data.media.frames import VideoOptions, choose_frames, resize_frames
from data.sample import BadMedia, named


def open_video(path: str, options: VideoOptions) -> tuple[VideoReader, list[int], float]:
    """Open a video file; return also which frames to read, ascending, and how many of them are in a second of it.

    Raises FileNotFoundError if there is no such file, BadMedia if it is not a readable video, TooFewFrames if it is
    too short.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no video at {path!r}")
    with named(repr(path)):
        try:
            num_listed = check_container(path)
            # An absolute path, since FFmpeg reads "view:2.mp4" as a URL. One thread, since the data workers already run
            # in parallel. fault_tol: raise as soon as one frame is not found, instead of repeating its neighbour;
            # decord ignores a fault_tol of 0, hence the tiny number.
            reader = VideoReader(os.path.abspath(path), num_threads=1, fault_tol=1e-9)
            video_fps, times = reader.get_avg_fps(), reader.get_frame_timestamp(range(len(reader)))[:, 0]
        except (DECORDError, RuntimeError, AssertionError, IndexError) as error:
            raise BadMedia("is not a video that decord can open") from error
        if len(times) < num_listed:  # those behind a lost one would take its place
            raise BadMedia(f"is damaged: of {num_listed} frames in its index, {len(times)} are found")
        if not 0 < video_fps < math.inf:  # false for nan, too
            raise BadMedia(f"has no valid frame rate (decord reads {video_fps})")
        # A video trimmed without re-encoding still stores frames from before its beginning, with negative times. decord
        # counts them but never returns them. Files without times (AVI) have -3e17 for each: those frames do exist.
        total_frames = len(times) - int(((times < 0) & (times > -1e9)).sum())
        return reader, *choose_frames(total_frames, video_fps, options)


def without_row_padding(frame: np.ndarray) -> np.ndarray:
    """Return the RGB pixels of a frame from decord: (H, W, C) -> (H, W, 3).

    FFmpeg pads rows to a multiple of 32 pixels. decord takes bytes per row / W for the number of channels where that is
    a whole number, so that C is 48 at W = 2 and 4 at W = 72 (11 widths from 1 to 72): each row is then its 3·W bytes
    of RGB, followed by padding. Where C is 3, nothing changes.
    """
    height, width, _ = frame.shape
    return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def decode(path: str, reader: VideoReader, indices: list[int]) -> torch.Tensor:
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
        raise BadMedia(f"{path!r} is damaged: its frames cannot be decoded") from error
    return torch.stack(frames).permute(0, 3, 1, 2)  # (T, 3, H, W)


def resized_frames(path: str, options: VideoOptions) -> tuple[torch.Tensor, float]:
    """Decode and resize the frames that the options ask for: uint8 (T, 3, H, W), and how many of them are in a second.

    Raises FileNotFoundError if there is no such file, BadMedia if the frames cannot be decoded.
    """
    reader, indices, sampled_fps = open_video(path, options)
    frames = decode(path, reader, indices)
    if all((frame == frames[0, :, :1, :1]).all() for frame in frames):
        reason = "as decord reads pixels with a palette (uncompressed AVI of 8 bits, QuickTime Animation)"
        raise BadMedia(f"{path!r} has frames of one single colour, {reason}: re-encode it, for example as H.264 in mp4")
    return resize_frames(path, frames, options), sampled_fps


def first_frame(path: str, options: VideoOptions) -> tuple[torch.Tensor, int]:
    """Decode only the first of these frames, uint8 (1, 3, H, W), and say how many there are; raises the same errors."""
    reader, indices, _ = open_video(path, options)
    return decode(path, reader, indices[:1]), len(indices)
