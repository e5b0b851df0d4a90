"""What `data/check.py` prints below its table of problems."""

import argparse
import statistics

import numpy as np
import torch

from data.check.media import MediaProblem
from data.media.images import has_frame_files
from data.media.patches import Grid
from data.prompt import encode_prompt, media_lengths
from data.sample import InputError, Media, Sample, first_line
from data.video_cap import cap_videos, even, first

FORMS = ("videos only", "images only", "videos and images", "text only", "frames in files", "options of their own")


def forms_of(sample: Sample) -> set[str]:
    """Return which of FORMS a sample has."""
    if not sample.media:
        return {"text only"}
    forms = {media.kind for media in sample.media}
    found = {"videos and images"} if len(forms) == 2 else {f"{forms.pop()}s only"}
    found |= {"frames in files"} if any(m.kind == "video" and has_frame_files(m) for m in sample.media) else set()
    return found | ({"options of their own"} if any(media.options for media in sample.media) else set())


def print_rare_keys(samples: list[Sample]) -> None:
    """List the samples' own keys that fewer than half of them have."""
    ids = {}
    for sample in samples:
        for key in sample.extra:
            ids.setdefault(key, []).append(sample.id)
    for key, having in ids.items():
        if len(having) < len(samples) / 2:
            shown = ", ".join(map(repr, having[:3])) + ", ..." * (len(having) > 3)
            print(f"key {key!r}: only {len(having)} of {len(samples)} samples have it ({shown})")


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


def print_sizes(
    samples: list[Sample], checked: dict[Media, Grid | MediaProblem], args: argparse.Namespace, tokenizer
) -> None:
    """Print tables of the forms and sizes of valid samples; what is over a cap is not counted in frames and tokens.

    Of videos that are chosen at random, the even choice is counted.
    """
    print(f"\n{'valid samples with':44}{'samples':>8}")
    for form in FORMS:
        if num := sum(form in forms_of(sample) for sample in samples):
            print(f"{form:44}{num:>8}")
    choose = first if args.video_cap == "first" else even
    capped = [cap_videos(sample, args.max_videos, args.max_images, choose) for sample in samples]
    num_tokens = []
    for sample in capped:
        grid = torch.tensor([checked[media] for media in sample.media], dtype=torch.long).view(-1, 3)  # (M, 3)
        try:
            ids = tokenizer and encode_prompt(sample.turns, tokenizer, grid, torch.ones(len(grid)), 1)[0]
        except Exception as error:  # a chat template may raise anything
            raise InputError(
                f"--model_id {args.model_id!r}: its tokenizer cannot encode sample {sample.id!r} "
                f"({first_line(error)}): take the tokenizer of a Qwen2.5-VL"
            ) from error
        num_tokens.append(len(ids) if tokenizer else int(media_lengths(grid).sum()))
    long = [sample.id for sample, num in zip(capped, num_tokens, strict=True) if num > args.max_prompt_length > 0]
    if long:
        ids = ", ".join(map(repr, long[:3])) + ", ..." * (len(long) > 3)
        print(f"{'over --max_prompt_length':44}{len(long):>8}  {ids}")
    used = {media for sample in capped for media in sample.media}
    rows = {
        "videos per sample": [sum(media.kind == "video" for media in sample.media) for sample in samples],
        "images per sample": [sum(media.kind == "image" for media in sample.media) for sample in samples],
        "frames read per video": [2 * checked[media].t for media in used if media.kind == "video"],
        "prompt tokens" if tokenizer else "video and image tokens (text not counted)": num_tokens,
    }
    print(f"\n{'valid samples':44}{'min':>8}{'median':>10}{'mean':>10}{'max':>8}")
    for name, numbers in rows.items():
        if not any(numbers):
            continue
        median, mean = statistics.median(numbers), statistics.mean(numbers)
        print(f"{name:44}{min(numbers):>8}{median:>10.1f}{mean:>10.1f}{max(numbers):>8}")
    print()
