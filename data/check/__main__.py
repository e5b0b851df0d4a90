"""Check a data set before training: read every sample, decode every video as the trainer does, report all problems.

    python -m data.check --data_path train.json --image_folder videos --nframes 16 --write_clean clean.json

Samples that the trainer would refuse are "left out" of the cleaned file, and the exit code is 1. Some problems are only
reported, and the sample is "kept": an answer without a number, from which nothing is learned, or with two of them or a
negative one, which may be read otherwise than it is meant, and more videos than --max_videos. The videos over that cap
are checked, too. Keys of their own that only few samples have are listed, since one may be misspelt, and so is what the
best constant answer earns. Nothing is written except the cleaned file.
"""

import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from data.check.media import FORKSERVER, PRELOAD, check_media
from data.check.report import print_problems, print_report
from data.dataset import Samples, write_entries
from data.flags import MediaFlags, SampleFlags, parse_flags
from data.loader import media_options, resolve_data_flags
from data.media.patches import Grid
from data.prompt import load_tokenizer
from data.sample import BadMedia, DuplicateId, InputError, Media, Sample, TooFewFrames, WrongTags, with_system_prompt
from data.video_cap import cap_videos, choice_of, varies
from reward.extract import extract_number, says_two_numbers
from reward.flags import Bounds, WeightedFlags, flag
from reward.functions import ARGUMENTS, RewardError, check_keys, keys_of, load_reward_functions

OF_ERROR = {WrongTags: "tags and files differ", DuplicateId: "duplicate id", InputError: "malformed sample"}
OF_ERROR |= {FileNotFoundError: "missing file", TooFewFrames: "too few frames"}
KEPT = ("no number in the truth", "two numbers in the truth", "negative truth")
KEPT += ("over --max_videos", "over --max_images")
PROBLEMS = (*OF_ERROR.values(), "undecodable video", "undecodable image", *KEPT)


@dataclass
class WhatFlags(SampleFlags):
    """What is checked."""

    heading = "what"
    model_id: str = flag("", "count text tokens with this model's tokenizer; without it, only video tokens")
    write_clean: str = flag("", "new JSON or JSONL file for the valid samples, unchanged")
    num_workers: int = flag(os.cpu_count(), "videos to check at a time", Bounds(lambda n: n >= 1, "must be at least 1"))


@dataclass
class CheckConfig(WhatFlags, MediaFlags, WeightedFlags):
    """The flags; those of `train.py` have its meaning and defaults."""


def find_problems(
    sample: Sample | InputError, checked: dict[Media, Grid | Exception], args: CheckConfig
) -> dict[str, str]:
    """Return everything that is wrong with a sample: problem -> the first reason. checked: of `check_media`."""
    if isinstance(sample, InputError):
        return {OF_ERROR[type(sample)]: str(sample)}
    problems = {}
    if taken := [key for key in sample.extra if key in ARGUMENTS]:
        problems["malformed sample"] = f"key {taken[0]!r}: reward functions are given something else under this name"
    max_videos = 0 if varies(args.video_cap) else args.max_videos  # where it varies, each is used in some epoch
    used = cap_videos(sample, max_videos, args.max_images, choice_of(args.video_cap)).media
    for media in sample.media:
        error = checked[media]
        if isinstance(error, FileNotFoundError) or (media in used and isinstance(error, BadMedia)):  # all must exist
            problems.setdefault(OF_ERROR.get(type(error), f"undecodable {media.kind}"), str(error))
    truth = extract_number(sample.answer)
    if truth is None:
        problems["no number in the truth"] = f"{sample.answer!r}: a numerical reward gives every completion 0.5"
    elif says_two_numbers(sample.answer):
        mend = "leave only the answer, or make it the only percentage"
        problems["two numbers in the truth"] = f"{sample.answer!r} is read as {truth:g}: {mend}"
    if truth and truth < 0:
        problems["negative truth"] = f"{sample.answer!r} is read as {truth:g}: correct it if that is no minus sign"
    for kind, most in (("video", args.max_videos), ("image", args.max_images)):
        of_kind = [media for media in sample.media if media.kind == kind]
        if 0 < most < len(of_kind):
            bad = [str(checked[media]) for media in of_kind if not (media in used or isinstance(checked[media], Grid))]
            over = f"{len(of_kind)} {kind}s, only {most} are used"
            problems[f"over --max_{kind}s"] = "; not used: ".join([over, *bad])
    return problems


def check(args: CheckConfig) -> int:
    """Check the data set, print the report, write the cleaned file if asked; return the exit code."""
    functions = load_reward_functions(args.reward_funcs, args.reward_weights, args.reward_kwargs, args.valid_range)
    entries = list(Samples(args.data_path, args.image_folder).each())
    samples = [sample for _, _, sample in entries if isinstance(sample, Sample)]
    check_keys(functions, [key for key in keys_of(samples) if key not in ARGUMENTS])  # those are in the table
    tokenizer = load_tokenizer(args.model_id) if args.model_id else None
    media = list(dict.fromkeys(media for sample in samples for media in sample.media))
    with ThreadPoolExecutor(args.num_workers) as threads:
        results = threads.map(partial(check_media, options=media_options(args)), media)
        checked = dict(zip(media, tqdm(results, total=len(media), unit="file"), strict=True))

    found, valid = {problem: [] for problem in PROBLEMS}, []
    for name, entry, sample in entries:
        problems = find_problems(sample, checked, args)
        has_id = isinstance(entry, dict) and isinstance(entry.get("id"), str | int)
        for problem, reason in problems.items():
            found[problem].append((repr(str(entry["id"])) if has_id else name, reason))
        if problems.keys() <= set(KEPT):
            # An entry without an id gets it from its position, which may be another in the cleaned file.
            sample = with_system_prompt(sample, args.system_prompt)
            valid.append((entry if has_id else entry | {"id": sample.id}, sample))
    print_problems(found, KEPT)
    if valid:
        print_report([sample for _, sample in valid], checked, args, tokenizer, functions)
    num_left_out, num = len(entries) - len(valid), Counter(one.kind for one in media)
    counted = f"{len(entries)} samples, {num['video']} videos, {num['image']} images"
    print(f"{counted}: {len(valid)} valid samples, {num_left_out} left out")
    if args.write_clean and valid:
        write_entries([entry for entry, _ in valid], args.write_clean, "write_clean")
        print(f"the valid samples are in {args.write_clean!r}")
    return int(num_left_out > 0)


def parse(argv: list[str]) -> CheckConfig:
    """Read the flags; raise InputError if one is wrong."""
    config = parse_flags(CheckConfig, argv, "python -m data.check", description=__doc__)
    if config.data_path in ([], [""]):
        raise InputError("--data_path is missing: name the files to check")
    if config.max_prompt_length and not config.model_id:
        raise InputError("--max_prompt_length counts text, too: name the model with --model_id")
    place = os.path.dirname(config.write_clean) or "."
    if config.write_clean and (os.path.lexists(config.write_clean) or not os.access(place, os.W_OK)):
        raise InputError(f"--write_clean {config.write_clean!r} exists or cannot be written: name a new file")
    resolve_data_flags(config)
    return config


def main(argv: list[str]) -> int:
    """Run the check; return 0 if every sample is valid, 1 if some are left out, 2, with one line, for wrong input."""
    try:
        return check(parse(argv))
    except (InputError, OSError, RewardError) as error:
        print(f"{getattr(error, 'details', '')}python -m data.check: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    FORKSERVER.set_forkserver_preload(PRELOAD)
    sys.exit(main(sys.argv[1:]))
