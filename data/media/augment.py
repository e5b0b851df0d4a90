"""What differs whenever a sample is taken: which of its videos are seen, and which frames of them.

All of it is a function of seed, sample and turn (how many times it was taken before: without weights of files the
epoch), so that a resumed run sees what an uninterrupted one does.
"""

import random
from dataclasses import dataclass, replace

from data.sample import Sample
from data.video_cap import at_random, cap_videos


@dataclass(frozen=True)
class Augmentation:
    """How the samples of a training run are varied."""

    seed: int = 0
    max_videos: int = 0  # that are seen of a sample, others in each turn; 0: all
    frame_jitter: bool = False  # move the frames of a video, all by the same share of a step: at most half of one

    def of(self, sample: Sample, turn: int) -> Sample:
        """Return a sample as it is seen in this turn."""
        if self.max_videos:
            sample = cap_videos(sample, self.max_videos, choose=at_random(self.seed, sample.id, turn))
        if self.frame_jitter:
            draw = random.Random(f"{self.seed} {turn} {sample.id}").uniform
            media = (
                replace(one, options=(*one.options, ("jitter", draw(-0.5, 0.5)))) if one.kind == "video" else one
                for one in sample.media
            )
            sample = replace(sample, media=tuple(media))
        return sample
