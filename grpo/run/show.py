"""What TensorBoard shows of a step besides curves: completions as a table, and a contact sheet of frames."""

import html
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data.loader import Prompt
from data.video import PATCH_SIZE, unpatchify

WIDTH, MARGIN, LINE = 1200, 8, 16  # of a contact sheet: its width, borders, and the height of a line, in pixels
TEXT_SIZE = 12
MAX_FRAMES, MAX_VIDEOS, MAX_COMPLETIONS, MAX_LINES = 16, 40, 16, 3  # shown; a completion has up to 3 lines
MAX_ROW = 224  # pixels; height of the largest frames


def completions_table(groups: list, num_prompts: int) -> str:
    """Write the best, middle and worst completion of the first prompts as Markdown; groups: of `GroupRecord`."""
    lines = ["| prompt | truth | completion | number | reward | advantage |", "|---|---|---|---|---|---|"]
    for group in groups[:num_prompts]:
        for i in bands(group.rewards):
            cells = " | ".join(table_cell(cell) for cell in (group.question, group.truth, group.texts[i]))
            numbers = number_text(group.numbers[i]), f"{group.rewards[i]:.3f}", f"{group.advantages[i]:+.3f}"
            lines.append(f"| {cells} | {' | '.join(numbers)} |")
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
    return html.escape(one_line(text)).replace("|", "&#124;").replace("`", "&#96;")


def one_line(text: str) -> str:
    """Replace line breaks and control characters by spaces."""
    return "".join(c if c.isprintable() else " " for c in text)


def contact_sheet(prompt: Prompt, group, step: int) -> np.ndarray:
    """Draw what the model saw of a prompt and what it answered: uint8 (height, 1200, 3).

    A row of frames per video, as they were after the cap, sampling and resizing; below, the completions of the group
    (a `GroupRecord`) with their rewards and advantages.
    """
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")), TEXT_SIZE)
    columns = int((WIDTH - 2 * MARGIN) / font.getlength("0"))
    rows = video_rows(prompt)
    head = wrapped(f"step {step}, sample {group.sample_id}, {len(prompt.video_grid_thw)} videos", columns)
    head += wrapped(f"question: {group.question}", columns) + wrapped(f"truth: {group.truth}", columns)
    tail = [f"{'reward':>8} {'advantage':>9} {'number':>8}  completion"]
    for i in range(min(len(group.texts), MAX_COMPLETIONS)):
        begin = f"{group.rewards[i]:8.3f} {group.advantages[i]:+9.3f} {number_text(group.numbers[i]):>8.8}  "
        first, *others = wrapped(group.texts[i], columns - len(begin)) or [""]
        tail += [begin + first, *(" " * len(begin) + line for line in others)]
    if len(group.texts) > MAX_COMPLETIONS:
        tail.append(f"… and {len(group.texts) - MAX_COMPLETIONS} more")

    height = 2 * MARGIN + LINE * (len(head) + len(tail)) + sum(LINE + row.height for _, row in rows) + MARGIN
    sheet = Image.new("RGB", (WIDTH, height), "white")
    draw, y = ImageDraw.Draw(sheet), MARGIN
    for line in head:
        draw.text((MARGIN, y), line, "black", font)
        y += LINE
    for label, row in rows:
        draw.text((MARGIN, y), label[:columns], "#555555", font)
        sheet.paste(row, (MARGIN, y + LINE))
        y += LINE + row.height
    y += MARGIN
    for line in tail:
        draw.text((MARGIN, y), line, "black", font)
        y += LINE
    return np.asarray(sheet)


def video_rows(prompt: Prompt) -> list[tuple[str, Image.Image]]:
    """Draw the frames of each video of a prompt in a row, with a line about them."""
    rows = []
    sizes = prompt.video_grid_thw.prod(dim=1).tolist()
    videos = list(zip(prompt.sample.videos, prompt.pixel_values_videos.split(sizes), strict=True))
    for (path, pixels), (t, h, w) in list(zip(videos, prompt.video_grid_thw.tolist(), strict=True))[:MAX_VIDEOS]:
        shown = np.unique(np.linspace(0, 2 * t - 1, min(2 * t, MAX_FRAMES)).round().astype(int))
        frames = unpatchify(pixels, (t, h, w))[shown].permute(0, 2, 3, 1).numpy()  # (frames, H, W, 3)
        row = Image.fromarray(np.concatenate(list(frames), axis=1))
        scale = min((WIDTH - 2 * MARGIN) / row.width, MAX_ROW / row.height, 2.0)
        row = row.resize((max(1, int(row.width * scale)), max(1, int(row.height * scale))))
        some = "" if len(shown) == 2 * t else f"{len(shown)} of "
        label = f"{Path(path).name}: {some}{2 * t} frames of {w * PATCH_SIZE}x{h * PATCH_SIZE}"
        rows.append((one_line(label), row))
    if len(videos) > MAX_VIDEOS:
        rows.append((f"… and {len(videos) - MAX_VIDEOS} more videos", Image.new("RGB", (1, 1), "white")))
    return rows


def wrapped(text: str, columns: int) -> list[str]:
    """Cut a text into at most 3 lines."""
    return textwrap.wrap(one_line(text), columns, max_lines=MAX_LINES, placeholder=" …")
