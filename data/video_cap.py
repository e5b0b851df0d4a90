"""Cap the number of videos and images per sample. Edit this file to choose which are kept.

The cap is a memory setting, not a limit of the method: samples of 30 and more videos train as well, if memory
suffices. A tag and its video are kept or dropped together, so that a prompt has as many placeholders as videos.
"""

import random
from collections.abc import Callable
from typing import Literal

from data.sample import Sample, keep_media

VideoCap = Literal["first", "even", "random"]
Choose = Callable[[int, int], set[int]]  # of how many, how many at most -> the places of those that are kept


def first(num: int, most: int) -> set[int]:
    """Choose the first `most` of `num`."""
    return set(range(min(num, most)))


def even(num: int, most: int) -> set[int]:
    """Choose `most` of `num`, evenly spread over the list: the middles of `most` equal parts."""
    return {int((i + 0.5) * num / most) for i in range(most)} if most < num else set(range(num))


def at_random(seed: int, sample_id: str, turn: int) -> Choose:
    """Choose others in each turn of a sample, all of them within num / most turns."""

    def choose(num: int, most: int) -> set[int]:
        shuffled = random.Random(f"{seed} {sample_id}").sample(range(num), num)
        return {shuffled[(turn * most + i) % num] for i in range(min(num, most))}

    return choose


def choice_of(cap: VideoCap) -> Choose:
    """Return the choice of a cap; of a random one what held-out samples have, the even one."""
    return {"first": first, "even": even, "random": even}[cap]


def varies(cap: VideoCap) -> bool:
    """Say whether `augment.py` caps the training samples, differently in each turn, and they keep all until then."""
    return cap == "random"


def cap_videos(sample: Sample, max_videos: int, max_images: int = 0, choose: Choose = first) -> Sample:
    """Keep at most `max_videos` videos and `max_images` images with their tags, drop the rest; 0 means no cap.

    The newline right after a dropped tag is dropped too, so that no blank line remains.
    """
    chosen = set()
    for kind, most in (("video", max_videos), ("image", max_images)):
        places = [place for place, media in enumerate(sample.media) if media.kind == kind]
        chosen |= {places[i] for i in choose(len(places), most or len(places))}
    return keep_media(sample, [place in chosen for place in range(len(sample.media))])
