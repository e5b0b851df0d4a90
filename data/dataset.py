"""The samples of JSON and JSONL files (`entry.py` has the format), parsed where they are needed.

Of JSONL only the place of each line is in memory, so that files of many gigabytes cost neither the ranks nor their data
workers anything. A JSON list is parsed whole once and kept as compact lines, which forked workers share: large files
should be JSONL. Every mistake is an InputError of one line, before training starts.
"""

import codecs
import hashlib
import json
import os
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from data.entry import read_sample
from data.sample import DuplicateId, InputError, Sample


class Entries(Sequence):
    """The entries of a file, as they are written in it: a JSON list, or JSONL with one entry per line."""

    def __init__(self, path: str):
        """Find where each entry stands. Raises InputError if the file cannot be read."""
        self.path = path
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"{path!r} is no ordinary file: give JSON or JSONL files of samples, no folder or pipe")
        self._list = None  # the text of the items of a JSON list
        self._starts = array("q")  # where each entry begins, in that text or in the file, and the end of the last one
        self._lines = array("q")  # of JSONL, the number of each entry's line
        try:
            self._file = os.open(path, os.O_RDONLY)  # kept: a file that takes this one's place later changes nothing
            weakref.finalize(self, os.close, self._file)
            self._status = self._read_status()
            with open(self._file, "rb", closefd=False) as file:
                self.digest = hashlib.file_digest(file, "sha256").hexdigest()
                file.seek(0)
                start = len(codecs.BOM_UTF8) * (file.read(3) == codecs.BOM_UTF8)
                file.seek(start)
                is_list = next((line for line in file if line.strip()), b"").lstrip().startswith(b"[")
                file.seek(start)
                if is_list:
                    self._keep_items(self._parse(file.read(), start, line=1))
                else:
                    self._find_lines(file, start)
        except OSError as error:
            raise InputError(f"cannot read {path!r} ({error.strerror}): check the path") from error

    def _keep_items(self, items: list) -> None:
        lines = [json.dumps(item).encode() for item in items]
        self._list = b"".join(lines)
        self._starts.extend(accumulate(map(len, lines), initial=0))

    def _find_lines(self, file, start: int) -> None:
        for number, line in enumerate(file, 1):  # not splitlines(): it splits at characters inside JSON strings, too
            if line.strip():
                self._starts.append(start)
                self._lines.append(number)
            start += len(line)
        self._starts.append(start)

    def _read_status(self) -> tuple[int, int]:
        """Return what differs after every change of the file."""
        status = os.fstat(self._file)
        return status.st_size, status.st_mtime_ns

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int):
        """Read and parse an entry. Raises InputError, also if the file was changed in the meantime."""
        index = range(len(self))[index]  # raises IndexError, at which an iteration ends
        start, end = self._starts[index : index + 2]
        if self._list is not None:
            return json.loads(self._list[start:end])
        try:
            # At a place of its own, since forked workers share the file's position.
            text, status = os.pread(self._file, end - start, start), self._read_status()
        except OSError as error:
            raise InputError(f"cannot read {self.path!r} any more ({error.strerror})") from error
        if status != self._status:
            raise InputError(f"{self.path!r} was changed while it is in use: restore it, and continue")
        return self._parse(text.rstrip(), start, self._lines[index])

    def _parse(self, text: bytes, place: int, line: int):
        """Parse JSON that begins at a byte, on a line, of the file."""
        try:
            return json.loads(text.decode())
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path!r} is not UTF-8 (byte {place + error.start}): save it as UTF-8") from error
        except json.JSONDecodeError as error:
            where = f"line {line + error.lineno - 1}, column {error.colno}"
            raise InputError(
                f"{self.path!r}: malformed JSON at {where} ({error.msg}): write the samples as [{{...}}, {{...}}], or "
                "each on one line of its own (JSONL)"
            ) from error
        except (ValueError, RecursionError) as error:  # numbers with thousands of digits, thousands of nested brackets
            raise InputError(f"{self.path!r}: unreadable JSON from line {line} on ({error}): correct it") from error


class Samples(Sequence):
    """The samples of some files, one file after the other.

    A path in them is used as written if there is such a file or folder, else joined to `image_folder`.
    """

    def __init__(self, paths: list[str], image_folder: str = "", prepare: Callable[[Sample], Sample] | None = None):
        """Find where each sample stands; `each` reads them. Raises InputError if a file is unreadable or has none.

        prepare: applied to every sample that is asked for by its index.
        """
        self.files, self.image_folder, self.prepare = [Entries(path) for path in paths], image_folder, prepare
        for number, file in enumerate(self.files):
            if os.path.realpath(file.path) in map(os.path.realpath, paths[:number]):
                raise InputError(f"{file.path!r} is given twice: name it once, with a weight if it shall count more")
            if not len(file):
                raise InputError(f"{file.path!r} contains no samples: give a file with at least one")
        self._ends = list(accumulate(self.sizes))

    @property
    def sizes(self) -> list[int]:
        """The number of samples of each file."""
        return [len(file) for file in self.files]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Read a sample, or several. Raises InputError."""
        index = range(len(self))[index]  # raises IndexError, at which an iteration ends
        if isinstance(index, range):
            return [self[i] for i in index]
        sample = self.as_written(index)
        return self.prepare(sample) if self.prepare else sample

    def as_written(self, index: int) -> Sample:
        """Read a sample that is not prepared. Raises InputError."""
        file, place, default_id = self.where(index)
        return read_sample(file[place], file.path, place, default_id, self.image_folder)

    def where(self, index: int) -> tuple[Entries, int, str]:
        """Return a sample's file, its place in it, and the id that it has if it names none."""
        number = bisect_right(self._ends, index)
        file = self.files[number]
        place = index - self._ends[number] + len(file)
        return file, place, f"#{place + 1}" if number == 0 else f"#{number + 1}.{place + 1}"

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
                sample = read_sample(entry, file.path, place, default_id, self.image_folder)
                add_id(ids, sample.id, file.path)
            except InputError as error:
                sample = error
            yield default_id, entry, sample

    def refuse_missing(self, missing: dict[str, str]) -> None:
        """Raise InputError if files are missing: path -> the id of the first sample that names it."""
        if missing:
            first = ", ".join(f"{path!r} (sample {sample_id!r})" for path, sample_id in list(missing.items())[:3])
            raise InputError(
                f"{' '.join(file.path for file in self.files)!r}: {len(missing)} file(s) missing: {first}"
                f"{', ...' if len(missing) > 3 else ''}: set --image_folder (now {self.image_folder!r}) to the folder "
                "that holds them, or correct the paths"
            )


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
