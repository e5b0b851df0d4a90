"""Check a data set before training: read every sample, decode every video as the trainer does, report all problems.

    python -m data.check --data_path train.json --image_folder videos --nframes 16 --write_clean clean.json

Samples that the trainer would refuse are "left out" of the cleaned file, and the exit code is 1. Two problems are only
reported, and the sample is "kept": an answer without a number, from which nothing is learned, and more videos than
--max_videos. The videos over that cap are checked, too. Keys of their own that only few samples have are listed, since
one may be misspelt, and so is what the best constant answer earns. Nothing is written except the cleaned file.
"""

import argparse
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tqdm import tqdm

from data.check.media import FORKSERVER, PRELOAD, MediaProblem, check_in_own_process
from data.check.report import print_problems, print_report
from data.dataset import Samples
from data.media.fetch import DEFAULT_CACHE
from data.media.frame_cache import FrameCache
from data.media.frames import VideoOptions
from data.media.images import ImageOptions
from data.media.load import MediaOptions
from data.media.patches import Grid
from data.prompt import load_tokenizer
from data.sample import DuplicateId, InputError, Media, Sample, TagMismatch, read_system_prompt, with_system_prompt
from data.video_cap import cap_videos, choice_of, varies
from reward.extract import extract_number
from reward.functions import ARGUMENTS, RewardError, RewardFunction, check_keys, keys_of, load_reward_functions

KEPT = ("no number in the truth", "over --max_videos", "over --max_images")
PROBLEMS = ("malformed sample", "tags and files differ", "duplicate id", "missing file", "undecodable video")
PROBLEMS += ("undecodable image", "too few frames", *KEPT)


def find_problems(
    sample: Sample | InputError, checked: dict[Media, Grid | MediaProblem], args: argparse.Namespace
) -> dict[str, str]:
    """Return everything that is wrong with a sample: problem -> the first reason.

    checked: the results of `check_media`; args: the flags about the caps.
    """
    if isinstance(sample, InputError):
        kinds = {TagMismatch: "tags and files differ", DuplicateId: "duplicate id"}
        return {kinds.get(type(sample), "malformed sample"): str(sample)}
    problems = {}
    if taken := [key for key in sample.extra if key in ARGUMENTS]:
        problems["malformed sample"] = f"key {taken[0]!r}: reward functions are given something else under this name"
    max_videos = 0 if varies(args.video_cap) else args.max_videos  # where it varies, each is used in some epoch
    used = cap_videos(sample, max_videos, args.max_images, choice_of(args.video_cap)).media
    not_used = {"video": "", "image": ""}
    for media in dict.fromkeys(sample.media):
        if isinstance(checked[media], MediaProblem):
            problem, reason = checked[media]
            if media not in used:
                not_used[media.kind] += f"; not used: {reason}"
            if media in used or problem == "missing file":  # the trainer decodes only what it uses, but all must exist
                problems.setdefault(problem, reason)
    if extract_number(sample.answer) is None:
        problems["no number in the truth"] = f"{sample.answer!r}: a numerical reward gives every completion 0.5"
    for kind, most in (("video", args.max_videos), ("image", args.max_images)):
        have = sum(media.kind == kind for media in sample.media)
        if 0 < most < have:
            problems[f"over --max_{kind}s"] = f"{have} {kind}s, only {most} are used{not_used[kind]}"
    return problems


def check(args: argparse.Namespace, options: MediaOptions, functions: list[RewardFunction]) -> int:
    """Check the data set, print the report, write the cleaned file if asked; return the exit code."""
    entries = [
        (name, entry, with_system_prompt(sample, args.system_prompt) if isinstance(sample, Sample) else sample)
        for name, entry, sample in Samples(args.data_path, args.image_folder).each()
    ]
    keys = keys_of([sample for _, _, sample in entries if isinstance(sample, Sample)])
    check_keys(functions, [key for key in keys if key not in ARGUMENTS])  # those are in the table
    tokenizer = load_tokenizer(args.model_id) if args.model_id else None
    media = list(dict.fromkeys(media for _, _, sample in entries for media in getattr(sample, "media", ())))
    with ThreadPoolExecutor(args.num_workers) as threads:
        results = threads.map(partial(check_in_own_process, options=options), media)
        checked = dict(zip(media, tqdm(results, total=len(media), unit="file"), strict=True))

    found, valid = {problem: [] for problem in PROBLEMS}, []
    for name, entry, sample in entries:
        problems = find_problems(sample, checked, args)
        has_id = isinstance(entry, dict) and isinstance(entry.get("id"), str | int)
        for problem, reason in problems.items():
            found[problem].append((repr(str(entry["id"])) if has_id else name, reason))
        if problems.keys() <= set(KEPT):
            # An entry without an id gets it from its position, which may be another in the cleaned file.
            valid.append((entry if has_id else entry | {"id": sample.id}, sample))
    print_problems(found, KEPT)
    if valid:
        print_report([sample for _, sample in valid], checked, args, tokenizer, functions)
    num_left_out = len(entries) - len(valid)
    num_images = sum(one.kind == "image" for one in checked)
    counted = f"{len(checked) - num_images} videos" + f", {num_images} images" * bool(num_images)
    print(f"{len(entries)} samples, {counted}: {len(valid)} valid samples, {num_left_out} left out")
    if args.write_clean and valid:
        write_entries([entry for entry, _ in valid], args.write_clean)
        print(f"the valid samples are in {args.write_clean!r}")
    return int(num_left_out > 0)


def write_entries(entries: list[dict], path: str) -> None:
    """Write entries to a new JSON file, or JSONL by its name; raise InputError and leave no file if that fails."""
    lines = [json.dumps(entry) for entry in entries]
    with open(path, "x") as file:
        try:
            file.write("\n".join(lines) + "\n" if path.endswith(".jsonl") else "[\n" + ",\n".join(lines) + "\n]\n")
            file.flush()
        except OSError as error:
            os.unlink(path)
            raise InputError(
                f"--write_clean {path!r} cannot be written ({error.strerror}): name another place"
            ) from error


def parse(argv: list[str]) -> tuple[argparse.Namespace, MediaOptions, list[RewardFunction]]:
    """Parse the flags; raise InputError if one is wrong."""
    style = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=120)
    usage = "python -m data.check --data_path FILE [flags]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=style)
    parser.allow_abbrev, parser.error = False, _fail
    flag = partial(parser.add_argument, metavar="")
    flag("--data_path", required=True, nargs="+", help="JSON or JSONL files of samples")
    flag("--image_folder", default="", help="folder of the videos whose path in the JSON does not exist as it is")
    flag("--write_clean", default="", help="new JSON or JSONL file for the valid samples, unchanged")
    flag("--model_id", default="", help="count text tokens with this model's tokenizer; without it, only video tokens")
    flag("--system_prompt", default="", help="text, or its file, before conversations without a system turn")
    flag("--num_workers", type=int, default=os.cpu_count(), help="videos to check at a time (%(default)s)")
    # The flags of train.py once more, since data/ does not import grpo/; tests compare the defaults.
    flag = partial(parser.add_argument_group("videos and images, as in train.py").add_argument, metavar="")
    flag("--max_videos", type=int, default=5, help="videos kept per sample (%(default)s); 0: all of them")
    choices, text = ["first", "even", "random"], "which: the first, evenly spread ones, or others in each epoch (first)"
    flag("--video_cap", choices=choices, default="first", help=text)
    flag("--max_images", type=int, default=0, help="images kept per sample; 0: all of them (%(default)s)")
    flag("--max_prompt_length", type=int, default=0, help="with --model_id: count longer prompts; 0: any (%(default)s)")
    flag("--fps", type=float, help="frames per second read from a video (2 if --nframes is not given either)")
    flag("--nframes", type=int, help="frames read from every video (rounded to even), instead of --fps")
    flag("--video_resized_width", type=int, help="width of the frames in pixels, rounded to a multiple of 28")
    flag("--video_resized_height", type=int, help="height of the frames in pixels, rounded to a multiple of 28")
    pixels = "pixels per frame (%(default)s), where width and height are not given"
    flag("--video_min_pixels", type=int, default=VideoOptions.min_pixels, help=f"least {pixels}")
    flag("--video_max_pixels", type=int, default=VideoOptions.max_pixels, help=f"most {pixels}")
    flag("--image_min_pixels", type=int, default=ImageOptions.min_pixels, help="least pixels per image (%(default)s)")
    flag("--image_max_pixels", type=int, default=ImageOptions.max_pixels, help="most pixels per image (%(default)s)")
    flag("--media_cache", default=DEFAULT_CACHE, help="folder for files at http(s) addresses (%(default)s)")
    flag("--frame_cache", default="", help="folder that is filled with decoded frames, for training")
    flag("--frame_cache_gb", type=float, default=100.0, help="size of that folder (%(default)g)")
    flag = partial(parser.add_argument_group("rewards, as in train.py").add_argument, metavar="")
    one = ["numerical_video_reward"]
    flag("--reward_funcs", nargs="+", default=one, help="reward functions: names in reward/, or file.py:function")
    flag("--reward_weights", nargs="+", type=float, default=[], help="weight of each reward function (1 each)")
    flag("--reward_kwargs", default="", help="JSON object of arguments for the functions that take them")
    flag("--valid_range", nargs=2, type=float, default=[0.0, 100.0], help="lowest and highest possible answer (0 100)")
    args = parser.parse_args(argv)
    if args.num_workers < 1 or args.max_videos < 0 or args.max_images < 0:
        _fail("--num_workers must be at least 1, --max_videos and --max_images at least 0")
    if args.video_cap != "first" and not args.max_videos:
        _fail(f"--video_cap {args.video_cap} has no effect with --max_videos 0, which keeps all: give a number")
    if not 0 < args.frame_cache_gb <= 1e9:
        _fail(f"--frame_cache_gb {args.frame_cache_gb}: must be above 0, and at most 1e9")
    if args.max_prompt_length and not args.model_id:
        _fail("--max_prompt_length counts text, too: name the model with --model_id")
    if os.path.lexists(args.write_clean):
        _fail(f"--write_clean {args.write_clean!r} exists: name a new file")
    if args.write_clean and not os.access(os.path.dirname(args.write_clean) or ".", os.W_OK):
        _fail(f"--write_clean {args.write_clean!r} cannot be written: name another place")
    size = args.video_resized_width, args.video_resized_height
    if not -math.inf < args.valid_range[0] < args.valid_range[1] < math.inf:
        _fail("--valid_range: give the lowest and the highest possible answer, as in 0 100")
    args.system_prompt = read_system_prompt(args.system_prompt)
    rewards = args.reward_funcs, args.reward_weights, args.reward_kwargs, args.valid_range
    try:
        video = VideoOptions(args.fps, args.nframes, *size, args.video_min_pixels, args.video_max_pixels)
        image = ImageOptions(args.image_min_pixels, args.image_max_pixels)
        frames = FrameCache(args.frame_cache, int(args.frame_cache_gb * 1e9)) if args.frame_cache else None
        options = MediaOptions(video, image, args.media_cache, frames)
        return args, options, load_reward_functions(*rewards)
    except ValueError as error:
        return _fail(str(error))
    except RewardError as error:
        print(error.details, end="", file=sys.stderr)
        raise InputError(str(error)) from error


def _fail(message: str):
    raise InputError(f"{message} (--help explains the flags)")


def main(argv: list[str]) -> int:
    """Run the check and return the exit code.

    0: every sample is valid; 1: some are left out; 2: a flag is wrong or the file unreadable, which one line says.
    """
    try:
        return check(*parse(argv))
    except (InputError, OSError, RewardError) as error:
        print(f"python -m data.check: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    FORKSERVER.set_forkserver_preload(PRELOAD)
    sys.exit(main(sys.argv[1:]))
