"""Turn EchoNet-Dynamic (Ouyang et al., Nature 2020, doi 10.1038/s41586-020-2145-8) into files for this trainer.

    python -m data.echonet --root EchoNet-Dynamic --output echonet

ROOT holds `FileList.csv`, with a row per video (of its columns FileName, EF and Split are read), and `Videos/*.avi`.
Written are train.json, val.json and test.json. A video that is listed and missing is named and left out.
"""

import argparse
import csv
import json
import os
import shlex
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

from data.sample import InputError

SPLITS = ("train", "val", "test")
QUESTION = "<video>\nWhat is the ejection fraction in this video?"
ANSWER = "The ejection fraction is {:.1f}%."


def read_list(path: Path) -> dict[str, tuple[str, float]]:
    """Read FileList.csv: a video's name without .avi -> its split, and its EF in percent. Raises InputError."""
    videos = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for column in ("FileName", "EF", "Split"):
                if column not in (reader.fieldnames or []):
                    raise InputError(f"{str(path)!r} has no column {column!r}, only {reader.fieldnames}: name it")
            for row in reader:
                where = f"{str(path)!r}, line {reader.line_num}"
                name, *found = read_row(row, where)
                if name in videos:
                    raise InputError(f"{where}: the FileName {name!r} occurs twice: remove one of its rows")
                videos[name] = found
    except OSError as error:
        reason = f"({error.strerror}): give the folder that holds it as --root"
        raise InputError(f"cannot read {str(path)!r} {reason}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{str(path)!r} is not a CSV file in UTF-8 ({error})") from error
    return videos


def read_row(row: dict, where: str) -> tuple[str, str, float]:
    """Return a video's name, split and EF; every error message begins with `where`."""
    name, split = (row["FileName"] or "").removesuffix(".avi"), (row["Split"] or "").lower()
    if not name or "\\" in name or Path(name).name != name:
        raise InputError(f"{where}: the FileName {row['FileName']!r} is no name of a file in Videos/: correct it")
    try:
        ejection_fraction = float(row["EF"] or "")
    except ValueError:
        ejection_fraction = -1.0
    if not 0 <= ejection_fraction <= 100:  # false for nan, too
        raise InputError(f"{where}: the EF {row['EF']!r} of {name!r} is no number between 0 and 100: correct it")
    if split not in SPLITS:
        raise InputError(f"{where}: the Split {row['Split']!r} of {name!r} is none of TRAIN, VAL, TEST: correct it")
    return name, split, ejection_fraction


def sample_of(name: str, ejection_fraction: float) -> dict:
    """Describe a video as a sample of one video, one question and its answer."""
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER.format(ejection_fraction)}]
    return {"id": name, "video": [f"{name}.avi"], "conversations": turns}


def write_all(contents: dict[Path, list[dict]], output: str) -> None:
    """Write files, path -> samples, when the last one is whole; raise InputError."""
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        # A folder of their own, so that no file of the user has one of the temporary names.
        with tempfile.TemporaryDirectory(prefix=".echonet-", dir=output) as unfinished:
            for path, samples in contents.items():
                Path(unfinished, path.name).write_text(json.dumps(samples, indent=1) + "\n")
            for path in contents:
                os.replace(Path(unfinished, path.name), path)
    except OSError as error:
        reason = f"cannot be written ({error.strerror}): make room, or name another folder"
        raise InputError(f"--output {output!r} {reason}") from error


def convert(root: str, output: str) -> None:
    """Write the samples of each split, and print what was found; raise InputError."""
    videos, folder = read_list(Path(root, "FileList.csv")), Path(root, "Videos")
    # os.path, since Path.is_file raises where a name is too long.
    missing = dict.fromkeys(name for name in videos if not os.path.isfile(folder / f"{name}.avi"))
    if len(missing) == len(videos):
        raise InputError(f"none of the {len(videos)} listed videos is in {str(folder)!r}: give its parent as --root")
    found = {split: {} for split in SPLITS}  # name -> EF
    for name, (split, ejection_fraction) in videos.items():
        if name not in missing:
            found[split][name] = ejection_fraction
    paths = {split: Path(output, f"{split}.json") for split in SPLITS}
    for path in paths.values():  # an old one of an empty split would mislead, too
        if os.path.lexists(path):
            raise InputError(f"{str(path)!r} exists: name another folder as --output")
    paths = {split: path for split, path in paths.items() if found[split]}
    write_all({path: [sample_of(*video) for video in found[split].items()] for split, path in paths.items()}, output)
    for name in missing:
        print(f"missing: {str(folder / f'{name}.avi')!r}")
    print(f"{'split':8}{'samples':>8}{'missing':>9}{'least EF':>10}{'mean':>7}{'most':>7}")
    for split in SPLITS:
        numbers, figures = found[split].values(), "   no file is written"
        if numbers:
            figures = f"{min(numbers):10.1f}{statistics.mean(numbers):7.1f}{max(numbers):7.1f}"
        print(f"{split:8}{len(numbers):8}{sum(videos[name][0] == split for name in missing):9}{figures}")
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
    parser = argparse.ArgumentParser("python -m data.echonet", description=__doc__, formatter_class=style)
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
