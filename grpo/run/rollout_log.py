"""rollouts.jsonl: every completion of every step, a line each; in rollouts-2.jsonl and so on once a file is large.

A new file begins with a step, after one that reached the limit; that depends on what was written only, so that a
resumed run leaves the same files as an uninterrupted one.
"""

import json
import os
from pathlib import Path

LIMIT = 256 * 2**20  # bytes after which the next step begins a new file


def files(folder: Path) -> list[Path]:
    """Return the files of a run, oldest first."""
    found, number = [], 1
    while (path := path_of(folder, number)).exists():
        found.append(path)
        number += 1
    return found


def path_of(folder: Path, number: int) -> Path:
    """Return the path of a file; they are numbered from 1."""
    return folder / ("rollouts.jsonl" if number == 1 else f"rollouts-{number}.jsonl")


def append(folder: Path, lines: list[dict], limit: int = LIMIT) -> None:
    """Add the completions of a step, all or none; raises OSError."""
    there = files(folder)
    is_full = bool(there) and there[-1].stat().st_size >= limit
    path = path_of(folder, len(there) + 1) if is_full or not there else there[-1]
    size = path.stat().st_size if path.exists() else 0
    with open(path, "ab", buffering=0) as file:
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        if file.write(data) < len(data):  # the disk is full
            os.truncate(path, size)
            raise OSError(28, os.strerror(28), str(path))


def truncate(folder: Path, step: int) -> None:
    """Remove the lines after `step`, and what a killed run has left of a line."""
    for path in reversed(files(folder)):
        end = 0
        with open(path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
                end += len(line)
        os.truncate(path, end)
        if end > 0:
            return  # earlier files hold earlier steps
        path.unlink()
