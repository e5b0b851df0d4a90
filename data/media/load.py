"""A video, a folder or a list of frames, or an image of a sample -> patches for Qwen2.5-VL's vision tower.

S = t·h·w patches of one of them, with t = T / 2, h = H / 14, w = W / 14. To the tower an image is a video of two equal
frames.
"""

from dataclasses import replace
from typing import NamedTuple

from data.media.fetch import DEFAULT_CACHE, fetch
from data.media.frame_cache import FrameCache
from data.media.frames import VideoOptions, resize_frames, target_size
from data.media.images import ImageOptions, frame_files, has_frame_files, image_size, read_frame_files, read_image
from data.media.patches import PATCH_SIZE, TEMPORAL_PATCH_SIZE, Grid, LoadedMedia, as_patches, patchify, resize
from data.media.video import first_frame, resized_frames
from data.sample import Media, is_address, named


class MediaOptions(NamedTuple):
    """What the flags say about videos and images."""

    video: VideoOptions
    image: ImageOptions = ImageOptions()
    media_cache: str = DEFAULT_CACHE  # folder for files at http(s) addresses
    frame_cache: FrameCache | None = None  # of the frames of video files
    threads: int = 1  # that decode the videos of a sample side by side


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
    read = options.frame_cache.frames if options.frame_cache else resized_frames
    return as_patches(*read(media.path, video_options))


def media_grid(media: Media, options: MediaOptions) -> Grid:
    """Return the grid (t, h, w) of `load_media`, decoding only a first frame. Raises FileNotFoundError, BadMedia."""
    media = fetched(media, options.media_cache)
    if media.kind == "image":
        num_frames, (height, width) = 2, image_size(media.path, read_image(media.path), media, options.image)
    else:
        path, video_options = media.path, own_video_options(media, options.video)
        if has_frame_files(media):
            (path, *others), _ = frame_files(media, video_options)
            first, num_frames = read_image(path)[None], 1 + len(others)
        else:
            first, num_frames = first_frame(path, video_options)
        with named(repr(path)):
            height, width = target_size(*first.shape[2:], num_frames, video_options)
    return Grid(num_frames // TEMPORAL_PATCH_SIZE, height // PATCH_SIZE, width // PATCH_SIZE)


def own_video_options(media: Media, options: VideoOptions) -> VideoOptions:
    """Return the options of one video; the fps of frames in files are theirs, not a choice among them."""
    own = dict(media.options)
    if has_frame_files(media):
        own.pop("fps", None)
    with named(f"{media.files[0]!r} has options of its own that cannot be:"):
        return options.with_own(own)


def fetched(media: Media, cache: str) -> Media:
    """Return a video or an image with files in place of addresses. Raises BadMedia."""
    if not any(map(is_address, media.files)):
        return media
    files = tuple(fetch(path, cache) if is_address(path) else path for path in media.files)
    return replace(media, path=files[0] if isinstance(media.path, str) else files)
