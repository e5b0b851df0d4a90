"""Beating hearts with a known ejection fraction: the demo's data, and that of the tests.

The left ventricle is an ellipse whose short axis shrinks and grows with the beat. Its volume is proportional to
length · width², so that EF = 1 - V_min / V_max gives width_min = width_max · sqrt(1 - EF). Size, position, tilt,
brightness, heart rate, phase and speckle vary from clip to clip, independently of the EF, as do file names, ids, the
question and the number of clips: only the motion shows the answer.
"""

import json
from pathlib import Path

import numpy as np

from grpo.demo.mp4 import write_mp4

QUESTION = "What is the ejection fraction in these videos?"
ANSWER = "The ejection fraction is {}%."
SIZE = 56  # pixels, square
NUM_FRAMES = 8
FPS = 8


def draw_clip(ejection_fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Draw one view of a heart over about one beat: (8, 56, 56, 3) uint8, grey.

    ejection_fraction: in percent.
    """
    phase, rate = rng.uniform(0, 1), rng.uniform(0.9, 1.1)  # beats at the first frame, beats per second
    beat = phase + rate * np.arange(NUM_FRAMES) / FPS
    contraction = 0.5 - 0.5 * np.cos(2 * np.pi * beat)  # (T,), 0: filled, 1: emptied
    width_max = rng.uniform(12.0, 14.0)
    width = width_max * (1 - contraction * (1 - np.sqrt(1 - ejection_fraction / 100)))  # (T,) half axis, pixels
    length = rng.uniform(18.0, 23.0)
    centre_y, centre_x = SIZE / 2 + rng.uniform(-2, 2, size=2)
    tilt = rng.uniform(-0.2, 0.2)

    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    across = (x - centre_x) * np.cos(tilt) + (y - centre_y) * np.sin(tilt)
    along = (y - centre_y) * np.cos(tilt) - (x - centre_x) * np.sin(tilt)
    # Distance from the wall in units of the half axes, softened to about a pixel: no staircase at the border.
    radius = np.sqrt((across / width[:, None, None]) ** 2 + (along / length) ** 2)  # (T, H, W)
    cavity = 1 / (1 + np.exp((radius - 1) * width[:, None, None] * 1.5))
    wall = np.exp(-(((radius - 1.15) * width[:, None, None] / 3) ** 2))
    tissue, bright = rng.uniform(0.35, 0.5), rng.uniform(0.3, 0.45)
    image = tissue * (1 - cavity) + bright * wall
    image = image * rng.gamma(30, 1 / 30, size=image.shape) + rng.normal(0, 0.02, size=image.shape)
    grey = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)


def write_samples(folder: str | Path, name: str, num_samples: int, seed: int, clips: tuple[int, int] = (2, 3)) -> Path:
    """Write `name`.json and its videos; return the path of the JSON.

    clips: fewest and most clips of a sample. Ejection fractions are whole percents, uniform from 20 to 80.
    """
    folder = Path(folder)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *name.encode()])
    samples = []
    for number in range(num_samples):
        ejection_fraction = int(rng.integers(20, 81))
        videos = []
        for clip in range(rng.integers(clips[0], clips[1] + 1)):
            videos.append(f"{name}_{number:04d}_{clip}.mp4")
            write_mp4(folder / "videos" / videos[-1], draw_clip(ejection_fraction, rng), FPS)
        samples.append(
            {
                "id": f"{name}_{number:04d}",
                "video": videos,
                "conversations": [
                    {"from": "human", "value": "<video>\n" * len(videos) + QUESTION},
                    {"from": "gpt", "value": ANSWER.format(ejection_fraction)},
                ],
            }
        )
    path = folder / f"{name}.json"
    path.write_text(json.dumps(samples, indent=1))
    return path
