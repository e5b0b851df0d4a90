"""Check a data set before training: read every sample, open every video as the trainer does, say what is wrong.

    python -m data.check --data_path train.json --image_folder videos --nframes 16 --write_clean clean.json

What the trainer refuses is "left out" of the cleaned file and makes the exit code 1. What it takes is "kept" and only
mentioned: a truth without a number, from which nothing is learned, and videos that --max_videos cuts off, which are
opened too. Nothing is written but the cleaned file.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from tqdm import tqdm

from data.dataset import DuplicateId, InputError, Sample, TagMismatch, read_samples
from data.prompt import check_text, encode_prompt, load_tokenizer, video_lengths
from data.video import BadVideo, TooFewFrames, VideoOptions, grid_of, read_frames
from data.video_cap import cap_videos
from reward.extract import extract_number

KEPT = ("no number in the truth", "over --max_videos")
PROBLEMS = ("malformed sample", "tags and videos differ", "duplicate id", "missing video", "undecodable video")
PROBLEMS += ("too few frames", *KEPT)
# Processes that start beside threads safely, and fast since they begin with what they need.
PROCESSES = multiprocessing.get_context("forkserver")
PRELOAD = ["jinja2", "data.prompt", "data.video", "data.video_cap", "reward.numerical"]


def open_video(path: str, options: VideoOptions) -> tuple:
    """Decode the frames that the trainer would read; return the grid (t, h, w), or a problem and its reason."""
    try:
        frames, _ = read_frames(path, options)
        return grid_of(path, frames, len(frames), options)
    except FileNotFoundError as error:
        return "missing video", str(error)
    except TooFewFrames as error:
        return "too few frames", str(error)
    except BadVideo as error:
        return "undecodable video", str(error)


def open_apart(path: str, options: VideoOptions, seconds: float = 600.0, function=open_video) -> tuple:
    """Open a video in a process of its own, since broken files may crash the decoder, or hang it."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_answer, args=(sender, function, path, options), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        return "undecodable video", f"{path!r} hangs the decoder: no frames within {seconds:g} s"
    except EOFError:
        process.join()
        return "undecodable video", f"{path!r} crashes the decoder (exit code {process.exitcode})"
    finally:
        process.kill()
        process.join()
        receiver.close()


def _answer(sender, function, path: str, options: VideoOptions) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # FFmpeg's own words, amid the progress bar
    sender.send(function(path, options))


def problems_of(sample: Sample | InputError, opened: dict[str, tuple], max_videos: int) -> dict[str, str]:
    """Return all that is wrong with a sample: problem -> the first reason."""
    if isinstance(sample, InputError):
        kinds = {TagMismatch: "tags and videos differ", DuplicateId: "duplicate id"}
        return {kinds.get(type(sample), "malformed sample"): str(sample)}
    problems = {}
    try:
        check_text(sample.turns)
    except ValueError as error:
        problems["malformed sample"] = str(error)
    used = cap_videos(sample, max_videos).videos
    bad = {path: opened[path] for path in sample.videos if isinstance(opened[path][0], str)}
    for path, (problem, reason) in bad.items():
        if path in used or problem == "missing video":  # the trainer wants all files there, and opens those it uses
            problems.setdefault(problem, reason)
    if extract_number(sample.answer) is None:
        problems["no number in the truth"] = f"{sample.answer!r}: every completion is rewarded with 0.5"
    if len(used) < len(sample.videos):
        beyond = "".join(f"; beyond them {reason}" for path, (_, reason) in bad.items() if path not in used)
        problems["over --max_videos"] = f"{len(sample.videos)} videos, of which the first {len(used)} are used{beyond}"
    return problems


def check(a: argparse.Namespace, options: VideoOptions) -> int:
    """Check, print and write as the flags say; return the exit code."""
    entries = list(read_samples(a.data_path, a.image_folder))
    tokenizer = load_tokenizer(a.model_id) if a.model_id else None
    paths = list(dict.fromkeys(path for _, sample in entries for path in getattr(sample, "videos", ())))
    with ThreadPoolExecutor(a.num_workers) as threads:
        grids = threads.map(partial(open_apart, options=options), paths)
        opened = dict(zip(paths, tqdm(grids, total=len(paths), unit="video"), strict=True))

    found, fit = {problem: [] for problem in PROBLEMS}, []
    for position, (entry, sample) in enumerate(entries, start=1):
        problems = problems_of(sample, opened, a.max_videos)
        named = isinstance(entry, dict) and isinstance(entry.get("id"), str | int)
        for problem, reason in problems.items():
            found[problem].append((repr(str(entry["id"])) if named else f"#{position}", reason))
        if problems.keys() <= set(KEPT):
            fit.append((entry if named else entry | {"id": sample.id}, sample))  # their positions will be others

    print(f"{'problem':24}{'samples':>8}  {'they are':10}first ids, and the first reason")
    for problem, samples in found.items():
        outcome = ("kept" if problem in KEPT else "left out") if samples else ""
        ids = ", ".join(name for name, _ in samples[:3]) + ", ..." * (len(samples) > 3)
        print(f"{problem:24}{len(samples):>8}  {outcome:10}{ids}".rstrip())
        if samples:
            print(f"    {samples[0][1]}")
    if fit:
        show_sizes([sample for _, sample in fit], opened, a, tokenizer)
    print(f"{len(entries)} samples, {len(opened)} videos: {len(fit)} samples fit, {len(entries) - len(fit)} left out")
    if a.write_clean and fit:
        lines = [json.dumps(entry) for entry, _ in fit]
        jsonl = a.write_clean.endswith(".jsonl")
        with open(a.write_clean, "x") as file:
            try:
                file.write("\n".join(lines) + "\n" if jsonl else "[\n" + ",\n".join(lines) + "\n]\n")
                file.flush()
            except OSError as error:
                os.unlink(a.write_clean)
                raise InputError(f"--write_clean {a.write_clean!r} cannot be written ({error.strerror})") from error
        print(f"the fit samples are in {a.write_clean!r}")
    return int(len(fit) < len(entries))


def show_sizes(samples: list[Sample], opened: dict[str, tuple], a: argparse.Namespace, tokenizer) -> None:
    """Print a table of how large the fit samples are; tokens are counted after the cap, as trained."""
    capped = [cap_videos(sample, a.max_videos) for sample in samples]
    num_tokens = []
    for sample in capped:
        grid = torch.tensor([opened[path] for path in sample.videos])  # (M, 3)
        try:
            ids = tokenizer and encode_prompt(sample.turns, tokenizer, grid, torch.ones(len(grid)), 1)[0]
        except Exception as error:
            raise InputError(f"--model_id {a.model_id!r}: its tokenizer writes no prompt ({error})") from error
        num_tokens.append(len(ids) if tokenizer else int(video_lengths(grid).sum()))
    rows = {
        "videos per sample": [len(sample.videos) for sample in samples],
        "frames read per video": [2 * opened[path][0] for path in {p for sample in capped for p in sample.videos}],
        "prompt tokens" if tokenizer else "video tokens per prompt (text not counted)": num_tokens,
    }
    print(f"\n{'of the fit samples':44}{'min':>8}{'median':>10}{'mean':>10}{'max':>8}")
    for name, numbers in rows.items():
        median, mean = statistics.median(numbers), statistics.mean(numbers)
        print(f"{name:44}{min(numbers):>8}{median:>10.1f}{mean:>10.1f}{max(numbers):>8}")
    print()


def parse(argv: list[str]) -> tuple[argparse.Namespace, VideoOptions]:
    """Read the flags; raise InputError."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m data.check", description=__doc__, formatter_class=style)
    parser.allow_abbrev, parser.error = False, _fail
    parser.add_argument("--data_path", required=True, help="JSON or JSONL file of samples")
    parser.add_argument("--image_folder", default="", help="folder of videos whose path in the JSON does not exist")
    parser.add_argument("--write_clean", default="", help="new file for the fit samples, each as it was written")
    parser.add_argument(
        "--model_id", default="", help="count prompt tokens with its tokenizer; without: of videos alone"
    )
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="videos that are opened at a time")
    parser.add_argument("--max_videos", type=int, default=5, help="as in train.py, like all that follow")
    parser.add_argument("--fps", type=float)
    for name in ("nframes", "video_resized_width", "video_resized_height"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--video_min_pixels", type=int, default=VideoOptions.min_pixels)
    parser.add_argument("--video_max_pixels", type=int, default=VideoOptions.max_pixels)
    a = parser.parse_args(argv)
    if a.num_workers < 1 or a.max_videos < 0:
        _fail("--num_workers must be at least 1, --max_videos at least 0")
    if os.path.lexists(a.write_clean):
        _fail(f"--write_clean {a.write_clean!r} exists: name a new file")
    if a.write_clean and not os.access(os.path.dirname(a.write_clean) or ".", os.W_OK):
        _fail(f"--write_clean {a.write_clean!r} cannot be written: name another place")
    size = a.video_resized_width, a.video_resized_height
    try:
        return a, VideoOptions(a.fps, a.nframes, *size, a.video_min_pixels, a.video_max_pixels)
    except ValueError as error:
        return _fail(str(error))


def _fail(message: str):
    raise InputError(f"{message} (--help explains the flags)")


def main(argv: list[str]) -> int:
    """Check; return 0 if every sample is fit, 1 if not, 2, with one line, for wrong flags or an unreadable file."""
    try:
        return check(*parse(argv))
    except (InputError, OSError) as error:
        print(f"python -m data.check: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    PROCESSES.set_forkserver_preload(PRELOAD)
    sys.exit(main(sys.argv[1:]))
