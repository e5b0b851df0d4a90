"""Video file -> patches for Qwen2.5-VL's vision tower, in plain torch.

decord decodes the frames. The chosen ones are resized as uint8 pixels (bicubic, antialiased), normalised with CLIP's
mean and standard deviation, and cut into patches. The choice of frames and their size follow qwen-vl-utils
(https://github.com/QwenLM/Qwen2.5-VL, qwen-vl-utils/src/qwen_vl_utils/vision_process.py); the order of the patches
follows HF's Qwen2VLVideoProcessor. Neither is a dependency, since both need torchvision.

T frames, H x W pixels, S = t·h·w patches of one video with t = T / 2, h = H / 14, w = W / 14.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch  # before decord: on some machines decord's bundled libraries clash with torch's if they are loaded first
import torch.nn.functional as F  # noqa: N812
from decord import DECORDError, DECORDLimitReachedError, VideoReader

from data.mp4_check import check_mp4

PATCH_SIZE = 14
MERGE_SIZE = 2  # the tower merges 2 x 2 patches into one token
TEMPORAL_PATCH_SIZE = 2  # frames in a patch
PATCH_VALUES = 3 * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2
SIZE_FACTOR = PATCH_SIZE * MERGE_SIZE  # height and width are multiples of 28 pixels
PIXELS_PER_TOKEN = SIZE_FACTOR**2

DEFAULT_FPS = 2.0
MIN_FRAMES, MAX_FRAMES = 4, 768
MAX_FRAME_PIXELS = 768 * PIXELS_PER_TOKEN
MAX_VIDEO_PIXELS = 128000 * PIXELS_PER_TOKEN * 0.9  # 90% of the model's context of 128,000 tokens
MAX_ASPECT_RATIO = 200

FRAME_COUNTS, SIZES = ("fps", "nframes"), ("resized_width", "resized_height")  # one of each set decides

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class BadMedia(Exception):
    """A file that exists but has no usable frames; the message is one line with its path and the reason."""


class TooFewFrames(BadMedia):
    """A video has fewer frames than the options ask for."""


class Grid(NamedTuple):
    """Patches of a video or an image along time, height and width."""

    t: int
    h: int
    w: int


@dataclass(frozen=True)
class VideoOptions:
    """Which frames of a video to read, and the size to resize them to.

    fps: frames to read per second of video; 2.0 if nframes is not given either.
    nframes: frames to read from every video, rounded to an even number.
    resized_width, resized_height: pixels, rounded to multiples of 28 (64 x 64 becomes 56 x 56).
    min_pixels, max_pixels: bounds of width x height where no size is given; the aspect ratio is kept. As in
    qwen-vl-utils, max_pixels is at most 768·28·28, and less where more than 300 frames are read.
    min_frames, max_frames: bounds of the number of frames where fps decides; a video's own, as what follows.
    video_start, video_end: seconds; frames are read from this part only.
    jitter: how far the frames are moved, in steps between them, from -0.5 to 0.5.
    Raises ValueError if the options contradict each other.
    """

    fps: float | None = None
    nframes: int | None = None
    resized_width: int | None = None
    resized_height: int | None = None
    min_pixels: int = 128 * PIXELS_PER_TOKEN
    max_pixels: int = 768 * PIXELS_PER_TOKEN
    min_frames: int = MIN_FRAMES
    max_frames: int = MAX_FRAMES
    video_start: float = 0.0
    video_end: float | None = None
    jitter: float = 0.0

    def with_own(self, own: dict[str, float]) -> "VideoOptions":
        """Return the options with a video's own in their place; raise ValueError, naming them, if they are wrong."""
        replaced = [names for names in (FRAME_COUNTS, SIZES) if own.keys() & names]
        try:
            return replace(self, **{name: None for names in replaced for name in names} | own)
        except ValueError as error:
            text = str(error).replace("--video_", "").replace("--", "")
            raise ValueError(f"has options of its own that cannot be: {text}") from error

    def __post_init__(self) -> None:
        if self.fps is not None and self.nframes is not None:
            raise ValueError("give --fps or --nframes, not both")
        if (self.resized_width is None) != (self.resized_height is None):
            raise ValueError("give --video_resized_width and --video_resized_height together")
        for name in ("fps", "nframes", "resized_width", "resized_height", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                flag = name if name in ("fps", "nframes") else f"video_{name}"
                raise ValueError(f"--{flag} must be positive, got {value}")
        if self.nframes is not None and self.nframes < 2:
            raise ValueError(f"--nframes must be at least 2, got {self.nframes}")
        if self.resized_width is None and self.min_pixels > self.max_pixels:
            raise ValueError(f"--video_min_pixels {self.min_pixels} is more than --video_max_pixels {self.max_pixels}")
        if self.min_frames > self.max_frames or self.max_frames < 2:
            raise ValueError(f"max_frames {self.max_frames} must be at least 2 and min_frames {self.min_frames}")
        if self.video_end is not None and not self.video_start < self.video_end:
            raise ValueError(f"video_end {self.video_end:g} must be after video_start {self.video_start:g}")
        sides = sorted((self.resized_width or 1, self.resized_height or 1))
        if sides[1] > MAX_ASPECT_RATIO * sides[0]:
            raise ValueError(
                f"--video_resized_width {self.resized_width} and --video_resized_height {self.resized_height}: "
                f"the longer side must be at most {MAX_ASPECT_RATIO} times the shorter one"
            )
        limit = max(MAX_FRAME_PIXELS, int(self.min_pixels * 1.05))
        if self.resized_width is None and self.max_pixels > limit:
            raise ValueError(f"--video_max_pixels {self.max_pixels} is above the limit of qwen-vl-utils: give {limit}")


def frame_span(total_frames: int, video_fps: float, options: VideoOptions) -> range:
    """Return the frames from video_start to video_end, both inclusive; raise ValueError if there are none."""
    seconds = total_frames / video_fps
    for name in ("video_start", "video_end"):
        if (getattr(options, name) or 0) > seconds:
            raise ValueError(f"lasts {seconds:g} seconds: {name} {getattr(options, name):g} is beyond its end")
    first = math.ceil(options.video_start * video_fps)
    last = total_frames - 1
    if options.video_end is not None:
        last = min(math.floor(options.video_end * video_fps), last)
    return range(first, last + 1)


def frame_indices(total_frames: int, video_fps: float, options: VideoOptions) -> list[int]:
    """Choose which frames to read of a video or its part: an even number, evenly spaced from the first to the last.

    With nframes: that many, rounded to even. With fps: seconds x fps, clamped to 4..768 and to the frames there are,
    then rounded down to even. Equals smart_nframes and linspace of qwen-vl-utils. A choice that does not span the whole
    part must change `sampled_fps` in `open_video`, too: positions in time follow from it.
    Raises ValueError when there are too few frames.
    """
    if options.nframes is not None:
        count = round(options.nframes / 2) * 2
        required = f"--nframes {options.nframes} asks for {count}"
    else:
        wanted = total_frames / video_fps * (DEFAULT_FPS if options.fps is None else options.fps)
        least, most = math.ceil(options.min_frames / 2) * 2, math.floor(options.max_frames / 2) * 2
        count = math.floor(min(max(wanted, least), most, total_frames) / 2) * 2
        required = "at least 2 are needed"
    if not 2 <= count <= total_frames:
        raise ValueError(f"has {total_frames} frame{'s' * (total_frames != 1)}, {required}")
    places = torch.linspace(0, total_frames - 1, count)
    if options.jitter and count < total_frames:
        places = (places + options.jitter * (total_frames - 1) / (count - 1)).clamp(0, total_frames - 1)
    return places.round().long().tolist()


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: float) -> tuple[int, int]:
    """Return the nearest size (height, width) in multiples of 28 that has min_pixels to max_pixels pixels.

    Equals smart_resize of qwen-vl-utils, except that a side is at least 28 where theirs may become 0.
    Raises ValueError if one side is more than 200 times the other.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"has frames of {width}x{height} pixels: the longer side is more than {MAX_ASPECT_RATIO} times the shorter"
        )
    new_height = max(SIZE_FACTOR, round(height / SIZE_FACTOR) * SIZE_FACTOR)
    new_width = max(SIZE_FACTOR, round(width / SIZE_FACTOR) * SIZE_FACTOR)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(SIZE_FACTOR, math.floor(height / shrink / SIZE_FACTOR) * SIZE_FACTOR)
        new_width = max(SIZE_FACTOR, math.floor(width / shrink / SIZE_FACTOR) * SIZE_FACTOR)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / SIZE_FACTOR) * SIZE_FACTOR
        new_width = math.ceil(width * grow / SIZE_FACTOR) * SIZE_FACTOR
    return new_height, new_width


def target_size(height: int, width: int, num_frames: int, options: VideoOptions) -> tuple[int, int]:
    """Return the size (height, width) to which to resize num_frames frames of height x width pixels."""
    if options.resized_height is not None and options.resized_width is not None:
        # qwen-vl-utils clamps an explicit size to its bounds for images: 4 to 16384 tokens
        bounds = 4 * PIXELS_PER_TOKEN, 16384 * PIXELS_PER_TOKEN
        return smart_resize(options.resized_height, options.resized_width, *bounds)
    # The frames of a long video share the model's context; a token covers two frames.
    context_share = MAX_VIDEO_PIXELS / num_frames * TEMPORAL_PATCH_SIZE
    limit = max(min(MAX_FRAME_PIXELS, context_share), int(options.min_pixels * 1.05))
    return smart_resize(height, width, options.min_pixels, min(options.max_pixels, limit))


def resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize uint8 frames (T, 3, H, W) to uint8 (T, 3, height, width), bicubic with antialiasing.

    Computed on uint8, as in HF's video processor, in less than a tenth of the time of float32. Rounding and clipping
    between the two passes, width then height, change pixels beside hard edges. Measured on 900 random images (noise,
    blocks, stripes, discs; sides of 20 to 300 resized to 56 to 420): at most 2 levels from PIL where PIL has the same
    order of passes; PIL 13 resizes the height first for many images that become lower: there up to 31. Mean of all
    900: 0.40. From rounded float32: up to 32, mean 1.0.
    """
    if frames.shape[-2:] == (height, width):
        return frames
    return F.interpolate(frames, (height, width), mode="bicubic", antialias=True)


def patchify(frames: torch.Tensor) -> tuple[torch.Tensor, Grid]:
    """Normalise frames and cut them into patches, in the order that the vision tower expects.

    frames: (T, 3, H, W) uint8, T even, H and W multiples of 28.
    Returns pixel_values (S, 1176) float32 and the grid (t, h, w) of patches. A row of pixel_values is one patch
    (3, 2, 14, 14), flattened; the four patches that are merged into one token follow each other.
    """
    num_frames, channels, height, width = frames.shape
    t, h, w = num_frames // TEMPORAL_PATCH_SIZE, height // PATCH_SIZE, width // PATCH_SIZE
    mean = torch.tensor(CLIP_MEAN).view(3, 1, 1)
    std = torch.tensor(CLIP_STD).view(3, 1, 1)
    pixels = (frames.float() / 255).sub_(mean).div_(std)  # (T, 3, H, W)
    patches = pixels.reshape(
        *(t, TEMPORAL_PATCH_SIZE, channels),
        *(h // MERGE_SIZE, MERGE_SIZE, PATCH_SIZE),
        *(w // MERGE_SIZE, MERGE_SIZE, PATCH_SIZE),
    )  # (t, 2, 3, h/2, 2, 14, w/2, 2, 14)
    patches = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # (t, h/2, w/2, 2, 2, 3, 2, 14, 14)
    return patches.reshape(t * h * w, -1), Grid(t, h, w)  # (S, 1176)


def unpatchify(pixel_values: torch.Tensor, grid_thw: tuple[int, int, int]) -> torch.Tensor:
    """Undo `patchify`: (S, 1176) and the grid (t, h, w) -> uint8 (T, 3, H, W), the frames that the model sees."""
    t, h, w = grid_thw
    patches = pixel_values.reshape(
        *(t, h // MERGE_SIZE, w // MERGE_SIZE, MERGE_SIZE, MERGE_SIZE),
        *(3, TEMPORAL_PATCH_SIZE, PATCH_SIZE, PATCH_SIZE),
    )  # (t, h/2, w/2, 2, 2, 3, 2, 14, 14)
    pixels = patches.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)  # (t, 2, 3, h/2, 2, 14, w/2, 2, 14)
    pixels = pixels.reshape(t * TEMPORAL_PATCH_SIZE, 3, h * PATCH_SIZE, w * PATCH_SIZE)
    mean = torch.tensor(CLIP_MEAN).view(3, 1, 1)
    std = torch.tensor(CLIP_STD).view(3, 1, 1)
    return ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


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


class LoadedMedia(NamedTuple):
    """A video or an image as input of the vision tower."""

    pixel_values: torch.Tensor  # (S, 1176) float32
    grid_thw: Grid
    second_per_grid_t: float  # seconds of video between two steps of the grid's time axis; of an image 0


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


def as_patches(frames: torch.Tensor, sampled_fps: float) -> LoadedMedia:
    """Cut resized frames, uint8 (T, 3, H, W), into patches."""
    return LoadedMedia(*patchify(frames), TEMPORAL_PATCH_SIZE / sampled_fps)
