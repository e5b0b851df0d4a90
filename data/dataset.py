"""The samples of JSON and JSONL files (`entry.py` has the format), parsed where they are needed.

Of JSONL only the place of each entry is in memory, so that files of many gigabytes cost neither the ranks nor their
data workers anything. A JSON list is parsed whole once and kept as JSONL in memory, which forked workers share: large
files should be JSONL. Every mistake is an InputError of one line, before training starts.
"""

import codecs
import hashlib
import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from data.entry import read_sample
from data.sample import DuplicateId, InputError, Sample, first_of, writing


class Entries(Sequence):
    """The entries of a file, as they are written in it: a JSON list, or JSONL with one entry per line."""

    def __init__(self, path: str):
        """Find where each entry stands. Raises InputError if the file cannot be read."""
        self.path = path
        self._starts = array("q")  # where each entry begins, and the end of the last one
        self._lines = array("q")  # the number of each entry's line
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"{path!r} is no ordinary file: give JSON or JSONL files of samples, no folder or pipe")
        try:
            self._file = open(path, "rb")  # noqa: SIM115, kept: a file that takes its place later changes nothing
            self.digest = hashlib.file_digest(self._file, "sha256").hexdigest()
            self._file.seek(0)
            start = len(codecs.BOM_UTF8) * (self._file.read(3) == codecs.BOM_UTF8)
            self._file.seek(start)
            first_line = next((line for line in self._file if line.strip()), b"")
            self._file.seek(start)
            if first_line.lstrip().startswith(b"["):
                items, start = self._parse(self._file.read(), line=1), 0
                self._file = os.fdopen(os.memfd_create("samples"), "w+b")
                self._file.writelines(json.dumps(item).encode() + b"\n" for item in items)
                self._file.seek(0)
            for number, line in enumerate(self._file, 1):  # splitlines() splits inside JSON strings, too
                if line.strip():
                    self._starts.append(start)
                    self._lines.append(number)
                start += len(line)
            self._starts.append(start)
            self._status = self._read_status()
        except OSError as error:
            raise InputError(f"cannot read {path!r} ({error.strerror})") from error

    def _read_status(self) -> tuple[int, int]:
        """Return what differs after every change of the file."""
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int):
        """Read and parse an entry. Raises InputError, also if the file was changed in the meantime."""
        index = range(len(self))[index]  # raises IndexError, at which an iteration ends
        start, end = self._starts[index : index + 2]
        try:
            # At a place of its own, since forked workers share the file's position.
            text, status = os.pread(self._file.fileno(), end - start, start), self._read_status()
        except OSError as error:
            raise InputError(f"cannot read {self.path!r} any more ({error.strerror})") from error
        if status != self._status:
            raise InputError(f"{self.path!r} was changed while it is in use: restore it, and continue")
        return self._parse(text.rstrip(), self._lines[index])

    def _parse(self, text: bytes, line: int):
        """Parse JSON that begins on a line of the file; raise InputError."""
        try:
            return json.loads(text.decode())
        except (ValueError, RecursionError) as error:  # no UTF-8, numbers of thousands of digits, nested too deeply
            is_found = isinstance(error, json.JSONDecodeError)
            where = f"line {line + error.lineno - 1}, column {error.colno}" if is_found else f"line {line}"
            mend = "write the samples as [{...}, {...}], or each on one line of its own (JSONL)"
            reason = getattr(error, "msg", error)
            raise InputError(f"{self.path!r}: malformed JSON at {where} ({reason}): {mend}") from error


class Samples(Sequence):
    """The samples of some files, one file after the other.

    A path in them is used as written if there is such a file or folder, else joined to `image_folder`.
    """

    def __init__(self, paths: list[str], image_folder: str = ""):
        """Find where each sample stands; `each` reads them. Raises InputError if a file is unreadable or has none."""
        self.files, self.image_folder = [Entries(path) for path in paths], image_folder
        self.prepare: Callable[[Sample], Sample] | None = None  # applied to every sample that is asked for by its index
        for number, file in enumerate(self.files):
            if os.path.realpath(file.path) in map(os.path.realpath, paths[:number]):
                raise InputError(f"{file.path!r} is given twice: name it once, with a weight if it shall count more")
            if not len(file):
                raise InputError(f"{file.path!r} contains no samples: give a file with at least one")
        self.sizes = [len(file) for file in self.files]  # the number of samples of each
        self._ends = list(accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Read a sample. Raises InputError."""
        index = range(len(self))[index]  # raises IndexError, at which an iteration ends
        file, place, default_id = self.where(index)
        sample = read_sample(file[place], file.path, default_id, self.image_folder)
        return self.prepare(sample) if self.prepare else sample

    def where(self, index: int) -> tuple[Entries, int, str]:
        """Return a sample's file, its place in it, and the id that it has if it names none."""
        number = bisect_right(self._ends, index)
        place = index - self._ends[number] + self.sizes[number]
        return self.files[number], place, f"#{place + 1}" if number == 0 else f"#{number + 1}.{place + 1}"

    def each(self) -> Iterator[tuple[str, object, Sample | InputError]]:
        """Yield each entry: the id that it has if it names none, what is written, and its sample, not prepared.

        In the place of a sample that is wrong stands the InputError that says why; an entry that is no JSON is None.
        Files of videos and images need not exist. Of samples with the same id, the first is valid.
        """
        ids = {}
        for index in range(len(self)):
            (file, place, default_id), entry = self.where(index), None
            try:
                entry = file[place]
                sample = read_sample(entry, file.path, default_id, self.image_folder)
                add_id(ids, sample.id, file.path)
            except InputError as error:
                sample = error
            yield default_id, entry, sample

    def refuse_missing(self, missing: dict[str, str]) -> None:
        """Raise InputError if files are missing: path -> the id of the first sample that names it."""
        if missing:
            paths = " ".join(file.path for file in self.files)
            found = first_of([f"{path!r} (sample {sample_id!r})" for path, sample_id in missing.items()])
            mend = f"set --image_folder (now {self.image_folder!r}) to the folder that holds them, or correct the paths"
            raise InputError(f"{paths!r}: {len(missing)} file(s) missing: {found}: {mend}")


def write_entries(entries: list[dict], path: str, flag: str) -> None:
    """Write entries to a new JSON or JSONL file; raise InputError, naming a flag, and leave no file if that fails."""
    start, between, end = ("", "\n", "\n") if path.endswith(".jsonl") else ("[\n", ",\n", "\n]\n")
    with writing(flag, path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "x") as file:
            try:
                file.write(start + between.join(map(json.dumps, entries)) + end)
                file.flush()
            except OSError:
                os.unlink(path)
                raise


def add_id(ids: dict[str, str], sample_id: str, path: str) -> None:
    """Add an id to those so far, id -> path of its file; raise DuplicateId if it is there already, in whatever file."""
    if first := ids.get(sample_id):
        there = "" if first == path else f", first in {first!r}"
        raise DuplicateId(f"{path!r}: the id {sample_id!r} occurs twice{there}: give every sample its own id")
    ids[sample_id] = path


def load_samples(paths: list[str], image_folder: str = "") -> Samples:
    """Find the samples of some files, and check all of them; raise InputError."""
    samples, missing = Samples(paths, image_folder), {}
    for _, _, sample in samples.each():
        if isinstance(sample, InputError):
            raise sample
        for path in sample.missing():
            missing.setdefault(path, sample.id)
    samples.refuse_missing(missing)
    return samples
