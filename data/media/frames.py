"""Which frames of a video to read, and which size to give them.

The rules are those of qwen-vl-utils, which is no dependency, since it needs torchvision:
https://github.com/QwenLM/Qwen2.5-VL, qwen-vl-utils/src/qwen_vl_utils/vision_process.py.
"""

import math
from dataclasses import dataclass, replace

import torch

from data.media.patches import PIXELS_PER_TOKEN, SIZE_FACTOR, TEMPORAL_PATCH_SIZE, resize
from data.sample import TooFewFrames, named

DEFAULT_FPS = 2.0
MAX_FRAME_PIXELS = 768 * PIXELS_PER_TOKEN
MAX_VIDEO_PIXELS = 128000 * PIXELS_PER_TOKEN * 0.9  # 90% of the model's context of 128,000 tokens
MAX_ASPECT_RATIO = 200
FRAME_COUNTS, SIZES = ("fps", "nframes"), ("resized_width", "resized_height")  # one of each set decides


@dataclass(frozen=True)
class VideoOptions:
    """Which frames of a video to read, and the size to resize them to; ValueError if they contradict each other.

    The first six are flags, too. Without resized_* the aspect ratio is kept; as in qwen-vl-utils, max_pixels is then at
    most 768·28·28, and less where more than 300 frames are read.
    """

    fps: float | None = None  # frames to read per second of video; 2.0 if nframes is not given either
    nframes: int | None = None  # frames to read, rounded to an even number
    resized_width: int | None = None  # pixels, rounded to a multiple of 28 (64 x 64 becomes 56 x 56)
    resized_height: int | None = None
    min_pixels: int = 128 * PIXELS_PER_TOKEN  # bounds of width x height
    max_pixels: int = 768 * PIXELS_PER_TOKEN
    min_frames: int = 4  # bounds of the number of frames where fps decides
    max_frames: int = 768
    video_start: float = 0.0  # seconds; frames are read from this part only
    video_end: float | None = None
    jitter: float = 0.0  # how far the frames are moved, in steps between them, from -0.5 to 0.5

    def with_own(self, own: dict[str, float]) -> "VideoOptions":
        """Return the options with a video's own in their place; raise ValueError, naming them, if they are wrong."""
        replaced = [names for names in (FRAME_COUNTS, SIZES) if own.keys() & names]
        return replace(self, **{name: None for names in replaced for name in names} | own)

    def __post_init__(self) -> None:
        for name in (*FRAME_COUNTS, *SIZES, "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.fps is not None and self.nframes is not None:
            raise ValueError("give fps or nframes, not both")
        if self.nframes is not None and self.nframes < 2:
            raise ValueError(f"nframes must be at least 2, got {self.nframes}")
        if self.max_frames < max(2, self.min_frames):
            raise ValueError(f"max_frames {self.max_frames} must be at least 2 and min_frames {self.min_frames}")
        if self.video_end is not None and self.video_end <= self.video_start:
            raise ValueError(f"video_end {self.video_end} must be after video_start {self.video_start}")
        width, height, least, most = self.resized_width, self.resized_height, self.min_pixels, self.max_pixels
        if (width is None) != (height is None):
            raise ValueError("give resized_width and resized_height together")
        if width is None:
            if least > most:
                raise ValueError(f"min_pixels {least} is more than max_pixels {most}")
            if most > (limit := max(MAX_FRAME_PIXELS, int(least * 1.05))):
                raise ValueError(f"max_pixels {most} is above the limit of qwen-vl-utils: give {limit}")
        elif max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            ratio = f"the longer side must be at most {MAX_ASPECT_RATIO} times the shorter one"
            raise ValueError(f"resized_width {width} and resized_height {height}: {ratio}")


def choose_frames(total_frames: int, video_fps: float, options: VideoOptions) -> tuple[list[int], float]:
    """Return which frames of a video to read, ascending, and how many of them there are per second of it.

    They are an even number, evenly spaced from the first to the last of its part. With nframes: that many, rounded to
    even. With fps: seconds x fps, clamped to 4..768 and to the frames there are, then rounded down to even. Equals
    smart_nframes and linspace of qwen-vl-utils. Raises ValueError if it has no such part, TooFewFrames.
    """
    span = frame_span(total_frames, video_fps, options)
    if options.nframes is not None:
        count = round(options.nframes / 2) * 2
        required = f"--nframes {options.nframes} asks for {count}"
    else:
        wanted = len(span) / video_fps * (options.fps or DEFAULT_FPS)
        least, most = math.ceil(options.min_frames / 2) * 2, math.floor(options.max_frames / 2) * 2
        count = math.floor(min(max(wanted, least), most, len(span)) / 2) * 2
        required = "at least 2 are needed"
    if not 2 <= count <= len(span):
        raise TooFewFrames(f"has {len(span)} frame{'s' * (len(span) != 1)}, {required}")
    places = torch.linspace(0, len(span) - 1, count)
    if options.jitter and count < len(span):
        places = (places + options.jitter * (len(span) - 1) / (count - 1)).clamp(0, len(span) - 1)
    indices = [span[place] for place in places.round().long().tolist()]
    return indices, count / len(span) * video_fps  # as in qwen-vl-utils; the frames span the whole part


def frame_span(total_frames: int, video_fps: float, options: VideoOptions) -> range:
    """Return the frames from video_start to video_end, both inclusive; raise ValueError if there are none."""
    seconds = total_frames / video_fps
    end = seconds if options.video_end is None else options.video_end
    if max(options.video_start, end) > seconds:
        part = f"video_start {options.video_start:g} to video_end {end:g}"
        raise ValueError(f"lasts {seconds:g} seconds, and so has no part from {part}")
    last = min(math.floor(end * video_fps), total_frames - 1)
    return range(math.ceil(options.video_start * video_fps), last + 1)


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: float) -> tuple[int, int]:
    """Return the nearest size (height, width) in multiples of 28 that has min_pixels to max_pixels pixels.

    Equals smart_resize of qwen-vl-utils, except that a side is at least 28 where theirs may become 0.
    Raises ValueError if one side is more than 200 times the other.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(f"has frames of {width}x{height} pixels: one side is over {MAX_ASPECT_RATIO} times the other")
    tiles = [max(1, round(side / SIZE_FACTOR)) for side in (height, width)]
    if math.prod(tiles) * PIXELS_PER_TOKEN > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        tiles = [max(1, math.floor(side / shrink / SIZE_FACTOR)) for side in (height, width)]
    elif math.prod(tiles) * PIXELS_PER_TOKEN < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        tiles = [math.ceil(side * grow / SIZE_FACTOR) for side in (height, width)]
    return tiles[0] * SIZE_FACTOR, tiles[1] * SIZE_FACTOR


def target_size(height: int, width: int, num_frames: int, options: VideoOptions) -> tuple[int, int]:
    """Return the size (height, width) to which to resize num_frames frames of height x width pixels."""
    if options.resized_height is not None:  # and so the width
        # qwen-vl-utils clamps an explicit size to its bounds for images: 4 to 16384 tokens
        bounds = 4 * PIXELS_PER_TOKEN, 16384 * PIXELS_PER_TOKEN
        return smart_resize(options.resized_height, options.resized_width, *bounds)
    # The frames of a long video share the model's context; a token covers two frames.
    context_share = MAX_VIDEO_PIXELS / num_frames * TEMPORAL_PATCH_SIZE
    limit = max(min(MAX_FRAME_PIXELS, context_share), int(options.min_pixels * 1.05))
    return smart_resize(height, width, options.min_pixels, min(options.max_pixels, limit))


def resize_frames(path: str, frames: torch.Tensor, options: VideoOptions) -> torch.Tensor:
    """Resize the frames of a video, uint8 (T, 3, H, W), as the options say. Raises BadMedia if they are too narrow."""
    with named(repr(path)):
        height, width = target_size(*frames.shape[2:], len(frames), options)
    return resize(frames, height, width)
