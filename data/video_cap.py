"""Cap the number of videos and images per sample. Edit this file to choose which are kept.

The cap is a memory setting, not a limit of the method: with `max_videos = 0` or a large value, samples of 30 and more
videos train as well, if memory suffices. The trainer that this one replaces raised an IndexError on many videos. Its
prompts held more placeholders than videos, since it kept the `<video>` tags in the text and also added each video as a
media item. Here a tag and its video are kept or dropped together.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

from data.dataset import TAG_PATTERN, InputError, Sample


def cap_videos(sample: Sample, max_videos: int, max_images: int = 0) -> Sample:
    """Keep the first `max_videos` videos, the first `max_images` images and their tags, drop the rest; 0 means no cap.

    The newline right after a dropped tag is dropped too, so that no blank line remains.
    Raises InputError if a cap is negative.
    """
    left = {"video": max_videos, "image": max_images}
    for kind, most in left.items():
        if most < 0:
            raise InputError(f"--max_{kind}s is {most}: give 0 (no cap) or the number of {kind}s to keep")
        left[kind] = most or len(sample.media)
    is_kept = []
    for media in sample.media:
        is_kept.append(left[media.kind] > 0)
        left[media.kind] -= 1
    of_tag, turns = iter(is_kept), []
    for role, text in sample.turns:
        text, *others = re.split(f"({TAG_PATTERN.pattern})", text)
        for tag, after in zip(others[::2], others[1::2], strict=True):
            text += tag + after if next(of_tag) else after.removeprefix("\n")
        turns.append((role, text))
    media = tuple(one for one, kept in zip(sample.media, is_kept, strict=True) if kept)
    return replace(sample, media=media, turns=tuple(turns))


def cap_all(samples: Iterable[Sample], max_videos: int, max_images: int = 0) -> tuple[list[Sample], int]:
    """Cap every sample; return the capped samples and how many of them lost videos or images."""
    samples = list(samples)
    capped = [cap_videos(sample, max_videos, max_images) for sample in samples]
    return capped, sum(len(new.media) < len(old.media) for new, old in zip(capped, samples, strict=True))
