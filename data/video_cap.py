"""Cap the number of videos and images per sample. Edit this file to choose which are kept.

The cap is a memory setting, not a limit of the method: with `max_videos = 0` or a large value, samples of 30 and more
videos train as well, if memory suffices. The trainer that this one replaces raised an IndexError on many videos. Its
prompts held more placeholders than videos, since it kept the `<video>` tags in the text and also added each video as a
media item. Here a tag and its video are kept or dropped together.
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

from data.dataset import TAG_PATTERN, InputError, Sample

VideoCap = Literal["first", "even", "random"]


def first(num: int, most: int) -> set[int]:
    """Choose the first `most` of `num`."""
    return set(range(min(num, most)))


def even(num: int, most: int) -> set[int]:
    """Choose `most` of `num`, evenly spread over the list: the middles of `most` equal parts."""
    return {int((i + 0.5) * num / most) for i in range(most)} if most < num else set(range(num))


def random_of(sample_id: str, seed: int, epoch: int) -> Callable[[int, int], set[int]]:
    """Choose `most` of `num` at random, as seed, epoch and sample decide; all are chosen within num / most epochs."""

    def choose(num: int, most: int) -> set[int]:
        shuffled = random.Random(f"{seed} {sample_id}").sample(range(num), num)
        return {shuffled[(epoch * most + i) % num] for i in range(min(num, most))}

    return choose


def cap_videos(
    sample: Sample, max_videos: int, max_images: int = 0, choose: Callable[[int, int], set[int]] = first
) -> Sample:
    """Keep at most `max_videos` videos and `max_images` images with their tags, drop the rest; 0 means no cap.

    choose: returns which of how many to keep. The newline right after a dropped tag is dropped too, so that no blank
    line remains. Raises InputError if a cap is negative.
    """
    chosen = set()
    for kind, most in (("video", max_videos), ("image", max_images)):
        if most < 0:
            raise InputError(f"--max_{kind}s is {most}: give 0 (no cap) or the number of {kind}s to keep")
        places = [place for place, media in enumerate(sample.media) if media.kind == kind]
        if places:
            chosen |= {places[i] for i in choose(len(places), most or len(places))}
    return keep(sample, [place in chosen for place in range(len(sample.media))])


def keep(sample: Sample, is_kept: list[bool]) -> Sample:
    """Keep some of a sample's videos and images, each with its tag."""
    of_tag, turns = iter(is_kept), []
    for role, text in sample.turns:
        text, *others = re.split(f"({TAG_PATTERN.pattern})", text)
        for tag, after in zip(others[::2], others[1::2], strict=True):
            text += tag + after if next(of_tag) else after.removeprefix("\n")
        turns.append((role, text))
    media = tuple(one for one, kept in zip(sample.media, is_kept, strict=True) if kept)
    return replace(sample, media=media, turns=tuple(turns))


def cap_all(
    samples: Iterable[Sample], max_videos: int, max_images: int = 0, choose: Callable[[int, int], set[int]] = first
) -> tuple[list[Sample], int]:
    """Cap every sample; return the capped samples and how many of them lost videos or images."""
    samples = list(samples)
    capped = [cap_videos(sample, max_videos, max_images, choose) for sample in samples]
    return capped, sum(len(new.media) < len(old.media) for new, old in zip(capped, samples, strict=True))
