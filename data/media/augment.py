"""What differs whenever a sample is taken: which of its videos are seen, and how each of them is.

All of it is a function of seed, sample and turn (how many times it was taken before: without weights of files the
epoch), so that a resumed run sees what an uninterrupted one does.
"""

import random
from dataclasses import dataclass, replace

from data.media.load import MediaOptions, load_media
from data.media.patches import LoadedMedia
from data.sample import Sample
from data.video_cap import at_random, cap_videos, varies


@dataclass(frozen=True)
class Augmentation:
    """How the samples of a training run are varied."""

    seed: int = 0
    max_videos: int = 0  # that are seen of a sample, others in each turn; 0: all
    frame_jitter: bool = False  # move the frames of a video, all by the same share of a step: at most half of one

    @classmethod
    def of(cls, flags) -> "Augmentation":
        """Take it from the flags of training."""
        return cls(flags.seed, flags.max_videos * varies(flags.video_cap), flags.frame_jitter)

    def choose(self, sample: Sample, turn: int) -> Sample:
        """Return a sample with the videos that are seen in this turn."""
        if not self.max_videos:
            return sample
        return cap_videos(sample, self.max_videos, choose=at_random(self.seed, sample.id, turn))

    def load(self, sample: Sample, place: int, turn: int, options: MediaOptions) -> LoadedMedia:
        """Load one of a sample's videos or images as it is seen in this turn. Raises what `load_media` does."""
        media, seed = sample.media[place], f"{self.seed} {turn} {sample.id} {place}"
        draw = random.Random(seed.encode("utf-8", "surrogatepass"))  # an id may hold half a character
        if self.frame_jitter and media.kind == "video":
            media = replace(media, options=(*media.options, ("jitter", draw.uniform(-0.5, 0.5))))
        return load_media(media, options)


NO_AUGMENTATION = Augmentation()
