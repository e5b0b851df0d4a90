"""Turn EchoNet-Dynamic (Ouyang et al., Nature 2020, doi 10.1038/s41586-020-2145-8) into files for this trainer.

    python -m data.echonet --root EchoNet-Dynamic --output echonet

ROOT holds `FileList.csv`, with a row per video (of its columns FileName, EF and Split are read), and `Videos/*.avi`.
Written are train.json, val.json and test.json. A video that is listed and missing is named and left out.
"""

import csv
import os
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from data.dataset import write_entries
from data.flags import parse_flags
from data.sample import InputError
from reward.flags import flag

SPLITS = ("train", "val", "test")
QUESTION = "<video>\nWhat is the ejection fraction in this video?"
ANSWER = "The ejection fraction is {:.1f}%."


@dataclass
class EchoNetFlags:
    """What is turned into what."""

    heading = "folders"
    root: str = flag("", "folder of the data set, with FileList.csv and Videos/")
    output: str = flag("", "folder for train.json, val.json and test.json")


def read_list(path: Path) -> dict[str, dict[str, float]]:
    """Read FileList.csv: split -> a video's name without .avi -> its EF in percent. Raises InputError."""
    videos, seen = {split: {} for split in SPLITS}, set()
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            for row in reader:
                name, split, fraction = row["FileName"].removesuffix(".avi"), row["Split"].lower(), float(row["EF"])
                if not name or "\\" in name or Path(name).name != name or name in seen:
                    raise ValueError(f"the FileName {row['FileName']!r} is no name of a file, or there twice")
                if split not in SPLITS or not 0 <= fraction <= 100:  # false for nan, too
                    raise ValueError(f"{name!r} cannot have the Split {row['Split']!r} and the EF {fraction:g}")
                videos[split][name] = fraction
                seen.add(name)
    except OSError as error:
        raise InputError(f"{error}: give the folder that holds it as --root") from error
    except (KeyError, ValueError, csv.Error) as error:
        mend = "make it CSV in UTF-8 with FileName (a file in Videos/), EF (0 to 100) and Split (TRAIN, VAL or TEST)"
        raise InputError(f"{str(path)!r}, line {reader.line_num}: {error}: {mend}") from error
    return videos


def convert(root: str, output: str) -> None:
    """Write the samples of each split, and print what was found; raise InputError."""
    folder, contents, missing, table = Path(root, "Videos"), {}, [], []
    for split, listed in read_list(Path(root, "FileList.csv")).items():
        path = Path(output, f"{split}.json")
        if os.path.lexists(path):  # of an empty split, too, where an old file would mislead
            raise InputError(f"{str(path)!r} exists: name another folder as --output")
        # os.path, since Path.is_file raises where a name is too long.
        found = {name: fraction for name, fraction in listed.items() if os.path.isfile(folder / f"{name}.avi")}
        missing += [f"missing: {str(folder / f'{name}.avi')!r}" for name in listed if name not in found]
        figures = "   no file is written"
        if numbers := found.values():
            contents[path] = []
            for name, fraction in found.items():
                turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER.format(fraction)}]
                contents[path].append({"id": name, "video": [f"{name}.avi"], "conversations": turns})
            figures = f"{min(numbers):10.1f}{statistics.mean(numbers):7.1f}{max(numbers):7.1f}"
        table.append(f"{split:8}{len(found):8}{len(listed) - len(found):9}{figures}")
    if not contents:
        raise InputError(f"none of the {len(missing)} listed videos is in {str(folder)!r}: give its parent as --root")
    written = []
    try:
        for path, samples in contents.items():
            write_entries(samples, str(path), "output")
            written.append(path)
    except InputError:  # the same command begins anew
        for path in written:
            path.unlink()
        raise
    print(*missing, f"{'split':8}{'samples':>8}{'missing':>9}{'least EF':>10}{'mean':>7}{'most':>7}", *table, sep="\n")
    train, val, _ = (Path(output, f"{split}.json") for split in SPLITS)
    if train in contents:
        data, images = f"--data_path {shlex.quote(str(train))}", f"--image_folder {shlex.quote(str(folder))}"
        held_out = f" --eval_data_path {shlex.quote(str(val))}" * (val in contents)
        print(f"next:\n  python -m data.check {data} {images}\n  python train.py {data}{held_out} {images} …")


def main(argv: list[str]) -> int:
    """Convert; return 2, with one line, for what the user can fix."""
    try:
        flags = parse_flags(EchoNetFlags, argv, "python -m data.echonet", description=__doc__)
        if not (flags.root and flags.output):
            raise InputError("name both folders, --root and --output: --help explains them")
        convert(flags.root, flags.output)
    except InputError as error:
        print(f"python -m data.echonet: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
