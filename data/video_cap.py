"""Cap the number of videos per sample. Edit this file to choose which videos are kept.

The cap is a memory setting, not a limit of the method: with `max_videos = 0` or a large value, samples of 30 and more
videos train as well, if memory suffices. The trainer that this one replaces raised an IndexError on many videos. Its
prompts held more placeholders than videos, since it kept the `<video>` tags in the text and also added each video as a
media item. Here a tag and its video are kept or dropped together.
"""

from collections.abc import Iterable
from dataclasses import replace

from data.dataset import VIDEO_TAG, InputError, Sample


def cap_videos(sample: Sample, max_videos: int) -> Sample:
    """Keep the first `max_videos` videos and their tags, drop the rest; 0 means no cap.

    The newline right after a dropped tag is dropped too, so that no blank line remains.
    Raises InputError if `max_videos` is negative.
    """
    if max_videos < 0:
        raise InputError(f"--max_videos is {max_videos}: give 0 (no cap) or the number of videos to keep")
    if max_videos == 0:
        return sample
    remaining = max_videos
    turns = []
    for role, text in sample.turns:
        text, *after_tags = text.split(VIDEO_TAG)
        for after_tag in after_tags:
            text += VIDEO_TAG + after_tag if remaining > 0 else after_tag.removeprefix("\n")
            remaining -= 1
        turns.append((role, text))
    return replace(sample, videos=sample.videos[:max_videos], turns=tuple(turns))


def cap_all(samples: Iterable[Sample], max_videos: int) -> tuple[list[Sample], int]:
    """Cap every sample; return the capped samples and how many of them lost videos."""
    samples = list(samples)
    capped = [cap_videos(sample, max_videos) for sample in samples]
    num_cut = sum(len(new.videos) < len(old.videos) for new, old in zip(capped, samples, strict=True))
    return capped, num_cut
