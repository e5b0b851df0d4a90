"""What `python -m data.check` prints: the table of problems, and what is known of the valid samples."""

from collections import Counter

import numpy as np
import torch

from data.media.images import has_frame_files
from data.media.patches import Grid
from data.prompt import encode_prompt, media_lengths
from data.sample import InputError, Media, Sample, first_line, first_of
from data.video_cap import cap_videos, choice_of
from reward.extract import extract_number
from reward.functions import keys_of
from reward.zero_skill import zero_skill


def print_problems(found: dict[str, list[tuple[str, str]]], kept: tuple[str, ...]) -> None:
    """Print a row per problem -> the name of each sample that has it, and the reason."""
    print(f"{'problem':24}{'samples':>8}  {'action':10}first ids, and the first reason")
    for problem, samples in found.items():
        action = ("kept" if problem in kept else "left out") if samples else ""
        print(f"{problem:24}{len(samples):>8}  {action:10}{first_of([name for name, _ in samples])}".rstrip())
        if samples:
            print(f"    {samples[0][1]}")


def print_report(samples: list[Sample], checked: dict[Media, Grid | Exception], args, tokenizer, functions) -> None:
    """Print what is known of valid samples: forms, sizes, rare keys, truths, and what a constant answer earns."""
    forms = Counter()
    for sample in samples:
        forms[" and ".join(sorted({f"{media.kind}s" for media in sample.media})) or "text only"] += 1
        forms["frames in files"] += any(has_frame_files(media) for media in sample.media)
        forms["options of their own"] += any(media.options for media in sample.media)
    print(f"\n{'valid samples with':44}{'samples':>8}")
    for form, num in (+forms).items():  # those that there are
        print(f"{form:44}{num:>8}")
    # What is over a cap is not counted in frames and tokens.
    choose = choice_of(args.video_cap)
    capped = [cap_videos(sample, args.max_videos, args.max_images, choose) for sample in samples]
    lengths = [prompt_tokens(sample, checked, tokenizer) for sample in capped]
    long = [repr(sample.id) for sample, num in zip(capped, lengths, strict=True) if num > args.max_prompt_length > 0]
    if long:
        print(f"{'over --max_prompt_length':44}{len(long):>8}  {first_of(long)}")
    used = {media for sample in capped for media in sample.media}
    rows = {
        "videos per sample": [sum(media.kind == "video" for media in sample.media) for sample in samples],
        "images per sample": [sum(media.kind == "image" for media in sample.media) for sample in samples],
        "frames read per video": [2 * checked[media].t for media in used if media.kind == "video"],
        "prompt tokens" if tokenizer else "video and image tokens (text not counted)": lengths,
    }
    print(f"\n{'valid samples':44}{'min':>8}{'median':>10}{'mean':>10}{'max':>8}")
    for name, numbers in rows.items():
        if any(numbers):
            middle = f"{np.median(numbers):>10.1f}{np.mean(numbers):>10.1f}"
            print(f"{name:44}{min(numbers):>8}{middle}{max(numbers):>8}")
    print()
    keys = keys_of(samples)
    for key in keys:
        having = [repr(sample.id) for sample in samples if key in sample.extra]
        if len(having) < len(samples) / 2:
            print(f"key {key!r}: only {len(having)} of {len(samples)} samples have it ({first_of(having)})")
    truths = np.array([extract_number(sample.answer) for sample in samples], dtype=float)  # None becomes nan
    for line in (outside_line(truths, args.valid_range), zero_skill(functions, samples, truths, keys)):
        if line:
            print(line)


def outside_line(truths: np.ndarray, valid_range: list[float]) -> str | None:
    """Say how many truths are outside the range of possible answers; None if none is."""
    lowest, highest = valid_range
    outside = truths[(truths < lowest) | (truths > highest)]
    if not len(outside):
        return None
    return (
        f"{len(outside)} truths, such as {outside[0]:g}, are outside --valid_range {lowest:g} {highest:g}, "
        "so that no answer to them can be right: set it to the range of the truths"
    )


def prompt_tokens(sample: Sample, checked: dict[Media, Grid | Exception], tokenizer) -> int:
    """Count the tokens of a prompt, without a tokenizer only those of its videos and images. Raises InputError."""
    grid_thw = torch.tensor([checked[media] for media in sample.media], dtype=torch.long).view(-1, 3)  # (M, 3)
    if not tokenizer:
        return int(media_lengths(grid_thw).sum())
    try:
        return len(encode_prompt(sample.turns, tokenizer, grid_thw, torch.ones(len(grid_thw)), 1)[0])
    except Exception as error:  # a chat template may raise anything
        reason = f"its tokenizer cannot encode sample {sample.id!r} ({first_line(error)})"
        raise InputError(f"--model_id: {reason}: take the tokenizer of a Qwen2.5-VL") from error
