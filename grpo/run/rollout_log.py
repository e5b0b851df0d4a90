"""rollouts.jsonl: every completion of every step, a line each; in rollouts-2.jsonl and so on once a file is large.

A new file begins with a step, after one that reached the limit; that depends on what was written only, so that a
resumed run leaves the same files as an uninterrupted one.
"""

import json
import os
from itertools import takewhile
from pathlib import Path

LIMIT = 256 * 2**20  # bytes after which the next step begins a new file


def files(folder: Path) -> list[Path]:
    """Return the files of a run, oldest first."""
    return sorted(folder.glob("rollouts*.jsonl"), key=lambda path: (len(path.name), path.name))


def append(folder: Path, lines: list[dict], limit: int = LIMIT) -> None:
    """Add the completions of a step, all or none; raises OSError."""
    there = files(folder)
    path = there[-1] if there else folder / "rollouts.jsonl"
    if there and path.stat().st_size >= limit:
        path = folder / f"rollouts-{len(there) + 1}.jsonl"
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        if file.write(data) < len(data):  # the disk is full
            file.truncate(size)
            raise OSError(28, os.strerror(28), str(path))


def truncate(folder: Path, step: int) -> None:
    """Remove the lines after `step`, and what a killed run has left of a line."""
    for path in reversed(files(folder)):
        with open(path, "rb") as file:
            kept = takewhile(lambda line: line.endswith(b"\n") and json.loads(line)["step"] <= step, file)
            end = sum(map(len, kept))
        os.truncate(path, end)
        if end > 0:
            return  # earlier files hold earlier steps
        path.unlink()
