"""Beating hearts with a known ejection fraction: the demo's data, and that of the tests.

The left ventricle is an ellipse whose short axis shrinks and grows with the beat. Its volume is proportional to
length · width², so that EF = 1 - V_min / V_max gives width_min = width_max · sqrt(1 - EF). Size and rate vary from
heart to heart, position, tilt, brightness, phase and speckle from clip to clip, all independently of the EF, as do file
names, ids, the question and the number of clips: only the motion shows the answer.

Two tasks:

    easy   2 or 3 clear clips; ejection fractions uniform from 20 to 80
    hard   1 to 30 clips, mostly few, of which most are noisy and show less of the motion than there is;
           ejection fractions as in a clinic: most from 50 to 70, few below 35

The careless answers of the warm start overestimate large hearts and underestimate fast ones, which no constant and no
straight line through them repairs.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grpo.config import DemoTask
from grpo.demo.mp4 import write_mp4

QUESTION = "What is the ejection fraction in these videos?"
ANSWER = "The ejection fraction is {}%."
SIZE = 56  # pixels, square
NUM_FRAMES = 8
FPS = 8
# Points that a careless reader is off, at most, by a heart's size and rate; the standard deviation of what remains.
ERROR_OF_SIZE, ERROR_OF_RATE, LABEL_NOISE = 14.0, 10.0, 2.0


@dataclass
class Heart:
    """What all clips of a heart have in common."""

    ejection_fraction: int  # percent
    size: float  # -1: the smallest, 1: the largest
    rate: float  # -1: the slowest, 1: the fastest

    def careless_label(self, rng: np.random.Generator) -> int:
        """Read the ejection fraction as someone whom size and rate mislead."""
        error = ERROR_OF_SIZE * self.size - ERROR_OF_RATE * self.rate + LABEL_NOISE * rng.normal()
        return round(min(max(self.ejection_fraction + error, 5), 95))


def draw_heart(task: DemoTask, rng: np.random.Generator) -> Heart:
    """Draw a heart from the distribution of a task."""
    ejection_fraction = rng.integers(20, 81)
    if task == "hard":
        is_healthy = rng.uniform() < 0.8
        ejection_fraction = round(min(max(rng.normal(60, 6) if is_healthy else rng.uniform(15, 55), 15), 80))
    return Heart(int(ejection_fraction), *rng.uniform(-1, 1, size=2))


def draw_clarities(task: DemoTask, rng: np.random.Generator) -> list[float]:
    """Draw how clear each clip of a heart is, from 0 to 1; the length of the list is the number of clips."""
    if task == "easy":
        return [1.0] * rng.integers(2, 4)
    clarities = [1.0 if rng.uniform() < 0.3 else rng.uniform(0, 0.5) for _ in range(int(31 ** rng.uniform() ** 3))]
    clarities[rng.integers(len(clarities))] = 1.0  # at least one shows the beat well
    return clarities


def draw_clip(heart: Heart, clarity: float, rng: np.random.Generator) -> np.ndarray:
    """Draw one view of a heart over about one beat: (8, 56, 56, 3) uint8, grey.

    clarity: 1 shows the whole motion; less shows less of it, in less contrast and more speckle.
    """
    phase, rate = rng.uniform(0, 1), 1.05 + 0.25 * heart.rate  # beats at the first frame, beats per second
    beat = phase + rate * np.arange(NUM_FRAMES) / FPS
    contraction = 0.5 - 0.5 * np.cos(2 * np.pi * beat)  # (T,), 0: filled, 1: emptied
    shortening = (0.3 + 0.7 * clarity) * (1 - np.sqrt(1 - heart.ejection_fraction / 100))
    width_max = 13 + 1.5 * heart.size + rng.uniform(-0.25, 0.25)
    width = width_max * (1 - contraction * shortening)  # (T,) half axis, pixels
    length = 20.5 + 2 * heart.size + rng.uniform(-1, 1)
    centre_y, centre_x = SIZE / 2 + rng.uniform(-2, 2, size=2)
    tilt = rng.uniform(-0.2, 0.2)

    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    across = (x - centre_x) * np.cos(tilt) + (y - centre_y) * np.sin(tilt)
    along = (y - centre_y) * np.cos(tilt) - (x - centre_x) * np.sin(tilt)
    # Distance from the wall in units of the half axes, softened to about a pixel: no staircase at the border.
    radius = np.sqrt((across / width[:, None, None]) ** 2 + (along / length) ** 2)  # (T, H, W)
    cavity = 1 / (1 + np.exp((radius - 1) * width[:, None, None] * 1.5))
    wall = np.exp(-(((radius - 1.15) * width[:, None, None] / 3) ** 2))
    contrast = 0.4 + 0.6 * clarity
    tissue, bright = rng.uniform(0.35, 0.5), rng.uniform(0.3, 0.45)
    image = tissue * (1 - contrast * cavity) + contrast * bright * wall
    looks = 4 + 26 * clarity  # of the speckle: its variance is 1 / looks
    image = image * rng.gamma(looks, 1 / looks, size=image.shape) + rng.normal(0, 0.02, size=image.shape)
    grey = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)


def write_samples(
    folder: str | Path, name: str, num_samples: int, seed: int, task: DemoTask = "easy", is_careless: bool = False
) -> Path:
    """Write `name`.json and its videos; return the path of the JSON.

    is_careless: careless answers; as many clips as the task has, but all clear, of hearts of any ejection fraction.
    """
    folder = Path(folder)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *name.encode()])
    samples = []
    for number in range(num_samples):
        heart = draw_heart("easy" if is_careless else task, rng)
        videos = []
        for clip, clarity in enumerate(draw_clarities(task, rng)):
            clarity = 1.0 if is_careless else clarity
            videos.append(f"{name}_{number:04d}_{clip}.mp4")
            write_mp4(folder / "videos" / videos[-1], draw_clip(heart, clarity, rng), FPS)
        label = heart.careless_label(rng) if is_careless else heart.ejection_fraction
        turns = [{"from": "human", "value": "<video>\n" * len(videos) + QUESTION}]
        turns += [{"from": "gpt", "value": ANSWER.format(label)}]
        samples.append({"id": f"{name}_{number:04d}", "video": videos, "conversations": turns})
    path = folder / f"{name}.json"
    path.write_text(json.dumps(samples, indent=1))
    return path
