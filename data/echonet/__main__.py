"""Turn EchoNet-Dynamic (Ouyang et al., Nature 2020, doi 10.1038/s41586-020-2145-8) into files for this trainer.

    python -m data.echonet --root EchoNet-Dynamic --output echonet

ROOT holds `FileList.csv`, with a row per video (of its columns FileName, EF and Split are read), and `Videos/*.avi`.
Written are train.json, val.json and test.json. A video that is listed and missing is named and left out.
"""

import argparse
import csv
import json
import math
import os
import shlex
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data.sample import InputError

SPLITS = ("train", "val", "test")
QUESTION = "<video>\nWhat is the ejection fraction in this video?"
ANSWER = "The ejection fraction is {:.1f}%."


class Video(NamedTuple):
    """A row of FileList.csv."""

    name: str  # without .avi
    ejection_fraction: float  # percent
    split: str  # one of SPLITS


def read_list(root: str) -> list[Video]:
    """Read and check FileList.csv; raise InputError."""
    path = str(Path(root, "FileList.csv"))
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            for column in ("FileName", "EF", "Split"):
                if column not in columns:
                    others = ", ".join(map(repr, columns)) or "an empty first line"
                    raise InputError(f"{path!r} has no column {column!r}, only {others}: name it in the first line")
            videos = [read_row(row, f"{path!r}, line {reader.line_num}") for row in reader]
    except OSError as error:
        raise InputError(f"cannot read {path!r} ({error.strerror}): give the folder that holds it as --root") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path!r} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except csv.Error as error:
        raise InputError(f"{path!r} is not a CSV file ({error})") from error
    seen = set()
    for video in videos:
        if video.name in seen:
            raise InputError(f"{path!r}: the FileName {video.name!r} occurs twice: remove one of its rows")
        seen.add(video.name)
    return videos


def read_row(row: dict, where: str) -> Video:
    """Check a row; every error message begins with `where`."""
    name = (row["FileName"] or "").removesuffix(".avi")
    if not name or "\\" in name or Path(name).name != name:
        raise InputError(f"{where}: the FileName {row['FileName']!r} is no name of a file in Videos/: correct it")
    try:
        ejection_fraction = float(row["EF"] or "")
    except ValueError:
        ejection_fraction = math.nan
    if not 0 <= ejection_fraction <= 100:  # false for nan, too
        raise InputError(f"{where}: the EF {row['EF']!r} of {name!r} is no number between 0 and 100: correct it")
    split = (row["Split"] or "").lower()
    if split not in SPLITS:
        raise InputError(f"{where}: the Split {row['Split']!r} of {name!r} is none of TRAIN, VAL, TEST: correct it")
    return Video(name, ejection_fraction, split)


def sample_of(video: Video) -> dict:
    """Describe a video as a sample of one video, one question and its answer."""
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER.format(video.ejection_fraction)}]
    return {"id": video.name, "video": [f"{video.name}.avi"], "conversations": turns}


def write_all(contents: dict[str, list[dict]], output: str) -> None:
    """Write files, name -> samples, into a folder, all or none; raise InputError."""
    moved = []
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        # A folder of their own, so that no file of the user has one of the temporary names.
        with tempfile.TemporaryDirectory(prefix=".echonet-", dir=output) as unfinished:
            for name, samples in contents.items():
                Path(unfinished, name).write_text(json.dumps(samples, indent=1) + "\n")
            for name in contents:
                os.replace(Path(unfinished, name), Path(output, name))
                moved.append(Path(output, name))
    except OSError as error:
        for path in moved:
            path.unlink()
        reason = f"cannot be written ({error.strerror}): make room, or name another folder"
        raise InputError(f"--output {output!r} {reason}") from error


def convert(root: str, output: str) -> None:
    """Write the samples of each split, and print what was found; raise InputError."""
    videos, folder = read_list(root), Path(root, "Videos")
    # os.path, since Path.is_file raises where a name is too long.
    there = {video.name for video in videos if os.path.isfile(folder / f"{video.name}.avi")}
    if not there:
        raise InputError(f"none of the {len(videos)} listed videos is in {str(folder)!r}: give its parent as --root")
    by_split = {split: [video for video in videos if video.split == split] for split in SPLITS}
    found = {split: [video for video in listed if video.name in there] for split, listed in by_split.items()}
    for path in (Path(output, f"{split}.json") for split in SPLITS):  # an old one of an empty split would mislead, too
        if os.path.lexists(path):
            raise InputError(f"{str(path)!r} exists: name another folder as --output")
    paths = {split: Path(output, f"{split}.json") for split in SPLITS if found[split]}
    write_all({path.name: [sample_of(video) for video in found[split]] for split, path in paths.items()}, output)
    for video in videos:
        if video.name not in there:
            print(f"missing: {str(folder / f'{video.name}.avi')!r}")
    print(f"{'split':8}{'samples':>8}{'missing':>9}{'least EF':>10}{'mean':>7}{'most':>7}")
    for split, listed in by_split.items():
        numbers = [video.ejection_fraction for video in found[split]]
        sizes = f"{split:8}{len(numbers):8}{len(listed) - len(numbers):9}"
        if numbers:
            print(f"{sizes}{min(numbers):10.1f}{statistics.mean(numbers):7.1f}{max(numbers):7.1f}")
        else:
            print(f"{sizes}   no file is written")
    if "train" in paths:
        data = f"--data_path {shlex.quote(str(paths['train']))}"
        held_out = f" --eval_data_path {shlex.quote(str(paths['val']))}" if "val" in paths else ""
        images = f"--image_folder {shlex.quote(str(folder))}"
        print(f"next:\n  python -m data.check {data} {images}\n  python train.py {data}{held_out} {images} …")


def _fail(message: str):
    raise InputError(f"{message} (--help explains the flags)")


def main(argv: list[str]) -> int:
    """Convert; return 2, with one line, for what the user can fix."""
    style = partial(argparse.RawDescriptionHelpFormatter, width=120)
    parser = argparse.ArgumentParser(prog="python -m data.echonet", description=__doc__, formatter_class=style)
    parser.allow_abbrev, parser.error = False, _fail
    parser.add_argument("--root", required=True, help="folder of the data set, with FileList.csv and Videos/")
    parser.add_argument("--output", required=True, help="folder for train.json, val.json and test.json")
    try:
        convert(**vars(parser.parse_args(argv)))
    except InputError as error:
        print(f"python -m data.echonet: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
