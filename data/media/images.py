"""Files of images -> pixels: the images of samples, and the frames of videos whose frames are files.

Pillow opens images, the right way up (EXIF), transparency on white. Their sizes follow qwen-vl-utils. Frames in files
are those of a video of `fps` frames per second (2 if not given).

T frames, H x W pixels.
"""

import os
import re
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageOps

from data.media.frames import DEFAULT_FPS, VideoOptions, choose_frames, frame_span, smart_resize
from data.media.patches import PIXELS_PER_TOKEN
from data.sample import IMAGE_SUFFIXES, BadMedia, Media, TooFewFrames, first_line, named

DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L")  # more than 8 bits per pixel, which would be clipped to white


@dataclass(frozen=True)
class ImageOptions:
    """The size to resize images to: bounds of width x height, where an image has no size of its own."""

    min_pixels: int = 4 * PIXELS_PER_TOKEN
    max_pixels: int = 16384 * PIXELS_PER_TOKEN
    resized_width: int | None = None
    resized_height: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            bounds = f"--image_min_pixels {self.min_pixels} must be above 0 and at most --image_max_pixels"
            raise ValueError(f"{bounds} {self.max_pixels}")
        if (self.resized_width is None) != (self.resized_height is None):
            raise ValueError("give resized_width and resized_height together")


def read_image(path: str) -> torch.Tensor:
    """Read an image as it is meant to be seen: uint8 (3, H, W).

    Raises FileNotFoundError if there is no such file, BadMedia if it is not an image that can be used.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no image at {path!r}")
    with named(repr(path)):
        try:
            bombs = warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)
            with bombs, Image.open(path) as image:
                if min(image.size) < 2:
                    raise BadMedia(f"has {image.width}x{image.height} pixels: a side must have at least 2")
                if image.mode in DEEP_MODES:
                    raise BadMedia(f"has more than 8 bits per pixel (mode {image.mode}): save it with 8")
                image = ImageOps.exif_transpose(image)
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                pixels = np.array(image.convert("RGB"))  # (H, W, 3)
        except BadMedia:
            raise
        except Exception as error:  # of a broken file, decoders raise anything
            raise BadMedia(f"is no image that Pillow can read ({first_line(error)})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def image_size(path: str, image: torch.Tensor, media: Media, options: ImageOptions) -> tuple[int, int]:
    """Return the size (height, width) to which to resize an image, (3, H, W). Raises BadMedia."""
    with named(repr(path)):
        options = replace(options, **dict(media.options))
        if options.resized_height is None:  # and so the width
            return smart_resize(*image.shape[1:], options.min_pixels, options.max_pixels)
        bounds = ImageOptions.min_pixels, ImageOptions.max_pixels
        return smart_resize(options.resized_height, options.resized_width, *bounds)


def has_frame_files(media: Media) -> bool:
    """Say whether the frames of a video are files."""
    return not isinstance(media.path, str) or os.path.isdir(media.path)


def frame_files(media: Media, options: VideoOptions) -> tuple[list[str], float]:
    """Choose among the files of frames: by --nframes or --fps, or else all of them. Raises BadMedia, TooFewFrames.

    Returns their paths in order, and how many of them are in a second. An odd number of all is made even with the last
    one once more, as in qwen-vl-utils.
    """
    paths, fps = list(media.files), dict(media.options).get("fps", DEFAULT_FPS)
    is_folder = isinstance(media.path, str)
    with named(repr(media.path) if is_folder else f"the list of {len(paths)} frames from {paths[0]!r} on"):
        if is_folder:
            # Hidden files are no frames: macOS leaves a ._frame_1.png beside a frame_1.png that it copies.
            names = sorted((name for name in os.listdir(media.path) if name[0] != "."), key=natural_order)
            paths = [os.path.join(media.path, name) for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        if len(paths) < 2:
            raise TooFewFrames(f"has {len(paths)} frame{'s' * (len(paths) != 1)} ({', '.join(IMAGE_SUFFIXES)})")
        if options.nframes is None and options.fps is None:
            span = frame_span(len(paths), fps, options)
            if 2 <= len(span) <= options.max_frames:
                return [paths[index] for index in (*span, *[span[-1]] * (len(span) % 2))], fps
            options = replace(options, nframes=options.max_frames // 2 * 2)
        indices, sampled_fps = choose_frames(len(paths), fps, options)
        return [paths[index] for index in indices], sampled_fps


def natural_order(name: str) -> list:
    """Return a key that sorts frame_2 before frame_10."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"([0-9]+)", name))]


def read_frame_files(paths: list[str]) -> torch.Tensor:
    """Read the files of frames: uint8 (T, 3, H, W). Raises FileNotFoundError, BadMedia."""
    frames = [read_image(path) for path in paths]
    for path, frame in zip(paths, frames, strict=True):
        if frame.shape != frames[0].shape:
            (_, h, w), (_, h0, w0) = frame.shape, frames[0].shape
            raise BadMedia(f"{path!r} is a frame of {w}x{h} pixels, the first one of its video has {w0}x{h0}")
    return torch.stack(frames)
