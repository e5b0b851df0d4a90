"""What TensorBoard shows of a step besides curves: completions as a table, and a contact sheet of frames."""

import html
import io
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from data.loader import Prompt
from data.media.patches import PATCH_SIZE, unpatchify
from grpo.ranks import printable

WIDTH, MARGIN, LINE, TEXT_SIZE = 1200, 8, 16, 12  # of a contact sheet, in pixels; a line is 16 high
MAX_FRAMES, MAX_VIDEOS, MAX_COMPLETIONS, MAX_LINES = 16, 60, 16, 3  # shown; a completion has up to 3 lines
FRAME_SIZES = 48, 224  # pixels: a frame is at least so wide, and at most so high


def completions_table(groups: list, num_prompts: int) -> str:
    """Write the best, middle and worst completion of the first prompts as Markdown; groups: of `GroupRecord`."""
    lines = ["| prompt | truth | completion | number | reward | advantage |", "|---|---|---|---|---|---|"]
    for group in groups[:num_prompts]:
        question, truth = group.sample.question, group.sample.answer
        for i in bands(group.rewards):
            texts = map(table_cell, (question, truth, group.texts[i], number_text(group.numbers[i])))
            lines.append(f"| {' | '.join(texts)} | {group.rewards[i]:.3f} | {group.advantages[i]:+.3f} |")
    return "\n".join(lines)


def bands(rewards: torch.Tensor) -> list[int]:
    """Choose the best, the middle and the worst of a group, (G,), by index; those without a reward come last."""
    order = rewards.nan_to_num(-torch.inf).argsort(descending=True, stable=True).tolist()
    return list(dict.fromkeys((order[0], order[len(order) // 2], order[-1])))


def number_text(number: float | None) -> str:
    """Write the number that was read from a completion."""
    return "none" if number is None else f"{number:g}"


def table_cell(text: str) -> str:
    """Keep sampled text within its table cell: no markup, no line breaks, no control characters."""
    return html.escape(printable(text)).replace("|", "&#124;").replace("`", "&#96;")


def contact_sheet(prompt: Prompt, group, step: int) -> np.ndarray:
    """Draw what the model saw of a prompt and what it answered: uint8 (height, 1200, 3).

    A strip of frames per video, as they were after the cap, sampling and resizing; below, the completions of the group
    (a `GroupRecord`, None in supervised training) with their rewards and advantages.
    """
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")), TEXT_SIZE)
    columns = int((WIDTH - 2 * MARGIN) / font.getlength("0"))
    strips = video_strips(prompt)
    sample = prompt.sample
    head = wrapped(f"step {step}, sample {sample.id}, {len(prompt.grid_thw)} videos and images", columns)
    head += wrapped(f"question: {sample.question}", columns) + wrapped(f"truth: {sample.answer}", columns)
    texts = group.texts if group else []
    tail = [f"{'reward':>8} {'advantage':>9} {'number':>12}  completion"] if group else []
    for i in range(min(len(texts), MAX_COMPLETIONS)):
        begin = f"{group.rewards[i]:8.3f} {group.advantages[i]:+9.3f} {number_text(group.numbers[i]):>12}  "
        tail += wrapped(texts[i], columns, begin) or [begin]
    if len(texts) > MAX_COMPLETIONS:
        tail.append(f"… and {len(texts) - MAX_COMPLETIONS} more")

    margin = np.full((MARGIN, WIDTH, 3), 255, np.uint8)
    parts, num_columns = [margin, text_block(head, font)], columns_for(len(strips))
    for first in range(0, len(strips), num_columns):
        row = strips[first : first + num_columns]
        image = Image.new("RGB", (WIDTH, LINE + max(strip.height for _, strip in row)), "white")
        for i, (label, strip) in enumerate(row):
            x = MARGIN + i * (WIDTH - MARGIN) // num_columns
            ImageDraw.Draw(image).text((x, 0), label[: columns // num_columns], "#555555", font)
            image.paste(strip, (x, LINE))
        parts.append(np.asarray(image))
    return np.concatenate([*parts, margin, text_block(tail, font), margin])


def add_jpeg(writer: SummaryWriter, tag: str, image: np.ndarray, step: int) -> None:
    """Add an image, uint8 (height, width, 3), as JPEG: `add_image` makes a PNG, which takes 0.2 s for noisy frames."""
    data, (height, width, _) = io.BytesIO(), image.shape
    Image.fromarray(image).save(data, "JPEG", quality=85)
    jpeg = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=jpeg)]), step)


def text_block(lines: list[str], font) -> np.ndarray:
    """Draw lines of text below each other: uint8 (height, 1200, 3)."""
    image = Image.new("RGB", (WIDTH, LINE * len(lines)), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((MARGIN, i * LINE), line, "black", font)
    return np.asarray(image)


def columns_for(num_videos: int) -> int:
    """Choose how many videos to put side by side, so that a sheet fits on a screen."""
    return 1 if num_videos <= 6 else 2 if num_videos <= 16 else 3


def video_strips(prompt: Prompt) -> list[tuple[str, Image.Image]]:
    """Draw the frames of each video and image of a prompt side by side, with a line about them."""
    num_columns = columns_for(len(prompt.grid_thw))
    width = (WIDTH - MARGIN) // num_columns - MARGIN
    strips, patches_of = [], prompt.patches.split(prompt.grid_thw.prod(dim=1).tolist())
    videos = list(zip(prompt.sample.media, patches_of, prompt.grid_thw.tolist(), strict=True))
    for media, patches, (t, h, w) in videos[:MAX_VIDEOS]:
        num_shown = 1 if media.kind == "image" else min(2 * t, MAX_FRAMES, width // FRAME_SIZES[0])
        shown = np.linspace(0, 2 * t - 1, num_shown).round().astype(int)
        frames = unpatchify(patches, (t, h, w))[shown].permute(0, 2, 3, 1).numpy()  # (frames, H, W, 3)
        strip = Image.fromarray(np.concatenate(list(frames), axis=1))
        scale = min(width / strip.width, FRAME_SIZES[1] / strip.height, 2.0)
        strip = strip.resize((max(1, int(strip.width * scale)), max(1, int(strip.height * scale))))
        some = "" if num_shown == 2 * t else f"{num_shown} of "
        what = "image" if media.kind == "image" else f"{some}{2 * t} frames"
        strips.append((printable(f"{what} of {w * PATCH_SIZE}x{h * PATCH_SIZE}: {media.name}"), strip))
    if len(videos) > MAX_VIDEOS:
        strips.append((f"… and {len(videos) - MAX_VIDEOS} more", Image.new("RGB", (1, 1), "white")))
    return strips


def wrapped(text: str, columns: int, begin: str = "") -> list[str]:
    """Cut a text into at most 3 lines; begin: stands before the first, and as much space before the others."""
    indents = {"initial_indent": begin, "subsequent_indent": " " * len(begin)}
    return textwrap.wrap(printable(text), columns, **indents, max_lines=MAX_LINES, placeholder=" …")
