"""What differs from epoch to epoch: which videos of a sample are seen, and which frames of them.

All of it is a function of seed, epoch and sample, so that a resumed run sees what an uninterrupted one does.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from data.sample import Sample
from data.video_cap import cap_videos


@dataclass(frozen=True)
class Augmentation:
    """How the samples of a training run are varied."""

    seed: int
    max_videos: int = 0  # that an epoch sees of a sample, others in each; 0: all
    frame_jitter: bool = False  # move the frames of a video, all by the same share of a step: at most half of one

    def of(self, sample: Sample, epoch: int) -> Sample:
        """Return a sample as this epoch sees it."""
        if self.max_videos:
            sample = cap_videos(sample, self.max_videos, choose=random_of(sample.id, self.seed, epoch))
        if self.frame_jitter:
            draw = random.Random(f"{self.seed} {epoch} {sample.id}").uniform
            media = (
                replace(one, options=(*one.options, ("jitter", draw(-0.5, 0.5)))) if one.kind == "video" else one
                for one in sample.media
            )
            sample = replace(sample, media=tuple(media))
        return sample


def random_of(sample_id: str, seed: int, epoch: int) -> Callable[[int, int], set[int]]:
    """Choose `most` of `num` at random, as seed, epoch and sample decide; all are chosen within num / most epochs."""

    def choose(num: int, most: int) -> set[int]:
        shuffled = random.Random(f"{seed} {sample_id}").sample(range(num), num)
        return {shuffled[(epoch * most + i) % num] for i in range(min(num, most))}

    return choose
