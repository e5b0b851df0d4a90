"""What follows from the flags: options of the data path, batch sizes, steps."""

import dataclasses
import math
import os

from data.loader import PromptOptions
from data.media.augment import Augmentation
from data.media.fetch import DEFAULT_CACHE
from data.media.frame_cache import FrameCache
from data.media.frames import VideoOptions
from data.media.images import ImageOptions
from data.media.load import MediaOptions
from data.sample import InputError
from grpo.config import Config


def media_options(config: Config) -> MediaOptions:
    """Return the flags about frames, images and their size; raise ValueError for a contradiction."""
    video = VideoOptions(
        fps=config.fps,
        nframes=config.nframes,
        resized_width=config.video_resized_width,
        resized_height=config.video_resized_height,
        min_pixels=config.video_min_pixels,
        max_pixels=config.video_max_pixels,
    )
    image = ImageOptions(config.image_min_pixels, config.image_max_pixels)
    frames = FrameCache(config.frame_cache, int(config.frame_cache_gb * 1e9)) if config.frame_cache else None
    threads = max(1, cores_per_rank() // max(1, config.dataloader_num_workers or 0))
    return MediaOptions(video, image, config.media_cache or DEFAULT_CACHE, frames, threads)


def cores_per_rank() -> int:
    """Return the cores of this machine that a rank may use, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def resolve_workers(config):
    """Fill in --dataloader_num_workers if it was not given: a core for each, and one for the rank itself."""
    if config.dataloader_num_workers is not None:
        return config
    return dataclasses.replace(config, dataloader_num_workers=min(8, max(1, cores_per_rank() - 1)))


def prompt_options(config, is_training: bool = False) -> PromptOptions:
    """Return the flags about how samples become prompts; what differs between epochs does so in training only."""
    augmentation = None
    if is_training and (config.frame_jitter or config.video_cap == "random"):
        max_videos = config.max_videos if config.video_cap == "random" else 0
        augmentation = Augmentation(config.seed, max_videos, config.frame_jitter)
    long = config.max_prompt_length, config.on_long_prompt
    return PromptOptions(media_options(config), config.on_bad_video, *long, augmentation)


def count_steps(config: Config, num_samples: int) -> int:
    """Return the steps of the whole run: --max_steps, or as many as the epochs take."""
    steps_per_epoch = math.ceil(num_samples / config.global_batch_size)
    return config.max_steps or math.ceil(config.num_train_epochs * steps_per_epoch)


def resolve_batch_sizes(config: Config, world_size: int) -> Config:
    """Fill in the batch sizes that were left out: global = per device x ranks x accumulation.

    Raise InputError that says the arithmetic when the given ones contradict each other.
    """
    total, device, accumulation = (
        config.global_batch_size,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
    )
    given = {"--per_device_train_batch_size": device, "--gradient_accumulation_steps": accumulation}
    ranks = f"{world_size} rank" + ("s" if world_size > 1 else "")
    factors = [ranks, *(f"{name} {value}" for name, value in given.items() if value is not None)]
    product = world_size * (device or 1) * (accumulation or 1)
    if total is None:
        total = product
    elif total % product or (device is not None and accumulation is not None and total != product):
        relation = "a multiple of" if device is None or accumulation is None else "equal to"
        arithmetic = f"{product} = {' x '.join(factors)}" if len(factors) > 1 else factors[0]
        raise InputError(f"--global_batch_size {total} is not {relation} {arithmetic}: change it, or leave it out")
    if device is None:
        accumulation = accumulation or 1
        device = total // (world_size * accumulation)
    return dataclasses.replace(
        config,
        global_batch_size=total,
        per_device_train_batch_size=device,
        gradient_accumulation_steps=accumulation or total // (world_size * device),
    )
