"""What differs from epoch to epoch: which videos of a sample are seen, and which frames of them.

All of it is a function of seed, epoch and sample, so that a resumed run sees what an uninterrupted one does.
"""

import random
from dataclasses import dataclass, replace

from data.dataset import Sample
from data.video_cap import cap_videos, random_of


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
