"""Cap the number of videos per sample: edit this to choose which videos stay.

The cap is a memory setting, not a limit of the method: with `max_videos = 0`, or a large one, 30 videos and more train
just as well where they fit. The trainer before this one broke with an IndexError on many videos, and no tensor was too
small: it left the `<video>` tags in the text and also added the videos as media items, so tags and videos were counted
apart and the prompt held more placeholders than there were videos. Here a tag and its video go together.
"""

from collections.abc import Iterable
from dataclasses import replace

from data.dataset import VIDEO_TAG, InputError, Sample


def cap_videos(sample: Sample, max_videos: int) -> Sample:
    """Keep the first `max_videos` videos and their tags, and drop the later ones together; 0 means no cap.

    The newline right after a dropped tag goes too, so that no blank lines are left. Raises InputError below 0.
    """
    if max_videos < 0:
        raise InputError(f"--max_videos is {max_videos}: give 0 (no cap) or the number of videos to keep")
    if max_videos == 0:
        return sample
    left = max_videos
    turns = []
    for role, text in sample.turns:
        text, *after_tags = text.split(VIDEO_TAG)
        for after_tag in after_tags:
            text += VIDEO_TAG + after_tag if left > 0 else after_tag.removeprefix("\n")
            left -= 1
        turns.append((role, text))
    return replace(sample, videos=sample.videos[:max_videos], turns=tuple(turns))


def cap_all(samples: Iterable[Sample], max_videos: int) -> tuple[list[Sample], int]:
    """Cap every sample; return them and how many of them lost videos."""
    samples = list(samples)
    capped = [cap_videos(sample, max_videos) for sample in samples]
    cut = sum(len(new.videos) < len(old.videos) for new, old in zip(capped, samples, strict=True))
    return capped, cut
