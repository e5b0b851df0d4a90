"""A video, a folder or a list of frames, or an image of a sample -> patches for Qwen2.5-VL's vision tower.

Pillow opens images, the right way up (EXIF), transparency on white. Their sizes follow qwen-vl-utils; to the tower an
image is a video of two equal frames. Frames in files are those of a video of `fps` frames per second (2 if not given).

T frames, H x W pixels, S patches.
"""

import os
import re
import struct
import warnings
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from data.media.fetch import DEFAULT_CACHE, FetchError, fetch, is_address
from data.media.frame_cache import FrameCache
from data.media.frames import DEFAULT_FPS, VideoOptions, frame_indices, frame_span, smart_resize
from data.media.patches import PATCH_SIZE, PIXELS_PER_TOKEN, Grid, LoadedMedia, as_patches, patchify, resize
from data.media.video import grid_of, load_video, resize_frames, video_grid
from data.sample import IMAGE_SUFFIXES, BadMedia, Media, TooFewFrames

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
            raise ValueError(
                f"--image_min_pixels {self.min_pixels} must be above 0 and at most --image_max_pixels {self.max_pixels}"
            )
        if (self.resized_width is None) != (self.resized_height is None):
            raise ValueError("give resized_width and resized_height together")


class MediaOptions(NamedTuple):
    """What the flags say about videos and images."""

    video: VideoOptions
    image: ImageOptions = ImageOptions()
    media_cache: str = DEFAULT_CACHE  # folder for files at http(s) addresses
    frame_cache: FrameCache | None = None  # of the frames of video files
    threads: int = 1  # that decode the videos of a sample side by side


def read_image(path: str) -> torch.Tensor:
    """Read an image as it is meant to be seen: uint8 (3, H, W).

    Raises FileNotFoundError if there is no such file, BadMedia if it is not an image that can be used.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no image at {path!r}")
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            image = Image.open(path)
        with image:
            check_image(image)
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = np.array(image.convert("RGB"))  # (H, W, 3)
    except BadMedia as error:
        raise BadMedia(f"{path!r} {error}") from error
    except Image.UnidentifiedImageError as error:
        raise BadMedia(f"{path!r} is not an image that Pillow can open") from error
    # Of a broken file, decoders raise anything.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, struct.error) as error:
        raise BadMedia(f"{path!r} is damaged: its pixels cannot be decoded ({error})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadMedia(f"{path!r} has more than {Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def check_image(image: Image.Image) -> None:
    """Raise BadMedia, before any pixel is decoded, for an image that cannot be used."""
    width, height = image.size
    if min(width, height) < 2:
        raise BadMedia(f"has {width}x{height} pixels: a side must have at least 2")
    if image.mode in DEEP_MODES:
        raise BadMedia(f"has more than 8 bits per pixel (mode {image.mode}): save it with 8")


def image_size(path: str, image: torch.Tensor, media: Media, options: ImageOptions) -> tuple[int, int]:
    """Return the size (height, width) to which to resize an image, (3, H, W). Raises BadMedia."""
    try:
        options = replace(options, **dict(media.options))
        if options.resized_height is None or options.resized_width is None:
            return smart_resize(*image.shape[1:], options.min_pixels, options.max_pixels)
        bounds = ImageOptions.min_pixels, ImageOptions.max_pixels
        return smart_resize(options.resized_height, options.resized_width, *bounds)
    except ValueError as error:
        raise BadMedia(f"{path!r} {error}") from error


class FrameFiles(NamedTuple):
    """The files of a video's frames."""

    paths: list[str]  # of the chosen ones, in order; a last one may stand twice, since there must be an even number
    sampled_fps: float  # how many of them are in a second


def frame_files(media: Media, options: VideoOptions) -> FrameFiles:
    """Choose among the files of frames: by --nframes or --fps, or else all of them. Raises BadMedia, TooFewFrames.

    An odd number of all is made even with the last one once more, as in qwen-vl-utils.
    """
    paths, fps = list(media.files), dict(media.options).get("fps", DEFAULT_FPS)
    if isinstance(media.path, str):
        try:
            names = [name for name in os.listdir(media.path) if name.lower().endswith(IMAGE_SUFFIXES)]
        except OSError as error:
            raise BadMedia(f"{media.path!r} cannot be read ({error.strerror})") from error
        paths = [os.path.join(media.path, name) for name in sorted(names, key=natural_order)]
    name = f"{media.path!r}" if isinstance(media.path, str) else f"the list of {len(paths)} frames from {paths[0]!r} on"
    if len(paths) < 2:
        raise TooFewFrames(f"{name} has {len(paths)} frame{'s' * (len(paths) != 1)} ({', '.join(IMAGE_SUFFIXES)})")
    try:
        span = frame_span(len(paths), fps, options)
    except ValueError as error:
        raise BadMedia(f"{name} {error}") from error
    if options.nframes is None and options.fps is None:
        if 2 <= len(span) <= options.max_frames:
            return FrameFiles([paths[index] for index in (*span, *[span[-1]] * (len(span) % 2))], fps)
        options = replace(options, nframes=options.max_frames // 2 * 2)
    try:
        indices = [span[index] for index in frame_indices(len(span), fps, options)]
    except ValueError as error:
        raise TooFewFrames(f"{name} {error}") from error
    return FrameFiles([paths[index] for index in indices], len(indices) / len(span) * fps)


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


def own_video_options(media: Media, options: VideoOptions) -> VideoOptions:
    """Return the options of one video; the fps of frames in files are theirs, not a choice among them."""
    own = dict(media.options)
    if has_frame_files(media):
        own.pop("fps", None)
    try:
        return options.with_own(own)
    except ValueError as error:
        raise BadMedia(f"{media.files[0]!r} {error}") from error


def has_frame_files(media: Media) -> bool:
    """Say whether the frames of a video are files."""
    return not isinstance(media.path, str) or os.path.isdir(media.path)


def fetched(media: Media, cache: str) -> Media:
    """Return a video or an image with files in place of addresses. Raises BadMedia."""
    if not any(map(is_address, media.files)):
        return media
    try:
        files = tuple(fetch(path, cache) if is_address(path) else path for path in media.files)
    except FetchError as error:
        raise BadMedia(str(error)) from error
    return replace(media, path=files[0] if isinstance(media.path, str) else files)


def load_media(media: Media, options: MediaOptions) -> LoadedMedia:
    """Read a video or an image as input for the vision tower. Raises FileNotFoundError, BadMedia, naming the file."""
    media = fetched(media, options.media_cache)
    if media.kind == "image":
        image = read_image(media.path)
        image = resize(image[None], *image_size(media.path, image, media, options.image))
        return LoadedMedia(*patchify(image.expand(2, -1, -1, -1)), 0.0)
    video_options = own_video_options(media, options.video)
    if has_frame_files(media):
        paths, sampled_fps = frame_files(media, video_options)
        return as_patches(resize_frames(paths[0], read_frame_files(paths), video_options), sampled_fps)
    if options.frame_cache:
        return as_patches(*options.frame_cache.frames(media.path, video_options))
    return load_video(media.path, video_options)


def media_grid(media: Media, options: MediaOptions) -> Grid:
    """Return the grid (t, h, w) of `load_media`, decoding only a first frame. Raises FileNotFoundError, BadMedia."""
    media = fetched(media, options.media_cache)
    if media.kind == "image":
        height, width = image_size(media.path, read_image(media.path), media, options.image)
        return Grid(1, height // PATCH_SIZE, width // PATCH_SIZE)
    video_options = own_video_options(media, options.video)
    if not has_frame_files(media):
        return video_grid(media.path, video_options)
    paths, _ = frame_files(media, video_options)
    return grid_of(paths[0], read_image(paths[0])[None], len(paths), video_options)
