"""The samples of JSON and JSONL files (`entry.py` has the format), read where they are needed.

In memory is only where each one stands, so that files of many gigabytes cost neither the ranks nor their data workers
anything. (A JSON list is read whole once, to find its items: large files should be JSONL.) Every mistake is an
InputError of one line, before training starts.
"""

import codecs
import json
import os
import re
import weakref
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from data.entry import read_sample
from data.sample import DuplicateId, InputError, Sample

SPACE = re.compile(r"[ \t\n\r]*")  # what JSON allows between values
CHUNK = 1 << 20  # bytes that are read at a time, where lines are counted


class Entries(Sequence):
    """The entries of a file, as they are written in it: a JSON list, or JSONL with one entry per line."""

    def __init__(self, path: str):
        """Find where each entry stands. Raises InputError if the file cannot be read."""
        self.path = path
        if os.path.isdir(path):
            raise InputError(f"{path!r} is a directory: give JSON or JSONL files of samples")
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"{path!r} is no ordinary file, which could be read again: write the samples to one")
        self._counted = (0, 1)  # a byte, and the line on which it stands
        try:
            self._file = os.open(path, os.O_RDONLY)  # kept: a file that takes this one's place later changes nothing
            weakref.finalize(self, os.close, self._file)
            with open(self._file, "rb", closefd=False) as file:
                self._start = len(codecs.BOM_UTF8) * (file.read(3) == codecs.BOM_UTF8)
                file.seek(self._start)
                first = next((line for line in file if line.strip()), b"")
                is_lines = not first.lstrip().startswith(b"[") and (path.endswith(".jsonl") or _is_object(first))
                is_lines = is_lines or not first
                del first  # for memory: of a list, it may be the whole file
                file.seek(self._start)
                found = self._lines(file) if is_lines else self._items(file.read())
                self._places, self._checksums = array("q"), array("I")  # first byte and number of bytes of each; CRC-32
                for place, text in found:
                    self._places.extend((place, len(text)))
                    self._checksums.append(zlib.crc32(text))
        except OSError as error:
            raise InputError(f"cannot read {path!r} ({error.strerror}): check the path") from error

    def __len__(self) -> int:
        return len(self._checksums)

    def __getitem__(self, index: int):
        """Read and parse an entry. Raises InputError."""
        index = range(len(self))[index]  # raises IndexError, at which an iteration ends
        place, size = self._places[2 * index : 2 * index + 2]
        try:
            text = os.pread(self._file, size, place)  # at a place of its own: forked workers share the file's position
        except OSError as error:
            raise InputError(f"cannot read {self.path!r} any more ({error.strerror})") from error
        if zlib.crc32(text) != self._checksums[index]:
            raise InputError(f"{self.path!r} was changed while it is in use: restore it, and continue")
        return self._parse(self._decode(text, place), place)

    def _lines(self, file) -> Iterator[tuple[int, bytes]]:
        place = self._start
        for line in file:  # not splitlines(): it also splits at characters that may occur inside a JSON string
            if line.strip():
                yield place, line.rstrip(b"\n")
            place += len(line)

    def _items(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield the items of a JSON list."""
        text = self._decode(data, self._start)
        del data  # for memory
        at, place, scan = 0, self._start, json.JSONDecoder().raw_decode
        try:
            separator = "["
            while (before := SPACE.match(text, at).end()) < len(text) and text[before] == separator:
                start = SPACE.match(text, before + 1).end()
                if separator == "[" and text[start] == "]":
                    end = start
                else:
                    _, end = scan(text, start)
                    place += len(text[at:start].encode())
                    item = text[start:end].encode()
                    yield place, item
                    place += len(item)
                at, separator = end, ","
            if separator == "," and text[before] == "]" and not text[before + 1 :].strip():
                return
        except (ValueError, RecursionError, IndexError):
            pass  # the whole text says what is wrong, and where
        self._parse(text, self._start)
        raise InputError(
            f"{self.path!r} is not a list: write the samples as [{{...}}, {{...}}], or one per line (JSONL)"
        )

    def _decode(self, data: bytes, place: int) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path!r} is not UTF-8 (byte {place + error.start}): save it as UTF-8") from error

    def _parse(self, text: str, place: int):
        """Parse JSON that stands at a place of the file."""
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            where = f"line {self._line_of(place) + error.lineno - 1}, column {error.colno}"
            raise InputError(f"{self.path!r}: malformed JSON at {where} ({error.msg}): correct it there") from error
        except (ValueError, RecursionError) as error:  # numbers with thousands of digits, thousands of nested brackets
            where = f"from line {self._line_of(place)} on"
            raise InputError(f"{self.path!r}: unreadable JSON {where} ({error}): correct it") from error

    def _line_of(self, place: int) -> int:
        """Return the number of the line, counted from 1, on which a byte stands; from the last one counted on."""
        at, line = self._counted if self._counted[0] <= place else (0, 1)
        while at < place:
            text = os.pread(self._file, min(CHUNK, place - at), at)
            if not text:  # the file has become shorter
                break
            at, line = at + len(text), line + text.count(b"\n")
        self._counted = at, line
        return line


def _is_object(line: bytes) -> bool:
    """Return whether a line is a whole JSON object, as the first line of a JSONL file is."""
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


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
        number, place = self.place_of(index)
        return self._read(number, place, self.files[number][place])

    def place_of(self, index: int) -> tuple[int, int]:
        """Return the number of a sample's file, and its place in it."""
        number = bisect_right(self._ends, index)
        return number, index - self._ends[number] + len(self.files[number])

    def _read(self, number: int, place: int, entry) -> Sample:
        path, default_id = self.files[number].path, default_id_of(number, place)
        return read_sample(entry, f"{path!r}: entry #{place + 1}", path, default_id, self.image_folder)

    def each(self) -> Iterator[tuple[str, object, Sample | InputError]]:
        """Yield each entry: the id that it has if it names none, what is written, and its sample, not prepared.

        In the place of a sample that is wrong stands the InputError that says why; an entry that is no JSON is None.
        Files of videos and images need not exist. Of samples with the same id, the first is valid.
        """
        ids = Ids()
        for number, file in enumerate(self.files):
            for place in range(len(file)):
                entry = None
                try:
                    entry = file[place]
                    sample = self._read(number, place, entry)
                    ids.add(sample.id, file.path)
                except InputError as error:
                    sample = error
                yield default_id_of(number, place), entry, sample

    def refuse_missing(self, missing: dict[str, str]) -> None:
        """Raise InputError if files are missing: path -> the id of the first sample that names it."""
        if missing:
            first = ", ".join(f"{path!r} (sample {sample_id!r})" for path, sample_id in list(missing.items())[:3])
            raise InputError(
                f"{' '.join(file.path for file in self.files)!r}: {len(missing)} file(s) missing: {first}"
                f"{', ...' if len(missing) > 3 else ''}: set --image_folder (now {self.image_folder!r}) to the folder "
                "that holds them, or correct the paths"
            )


class Ids:
    """The ids of samples, which must differ over all files."""

    def __init__(self) -> None:
        self._files = {}

    def __len__(self) -> int:
        return len(self._files)

    def add(self, sample_id: str, path: str) -> None:
        """Add an id from a file; raise DuplicateId if it is there already."""
        if sample_id in self._files:
            first = self._files[sample_id]
            there = "" if first == path else f", first in {first!r}"
            raise DuplicateId(f"{path!r}: the id {sample_id!r} occurs twice{there}: give every sample its own id")
        self._files[sample_id] = path


def default_id_of(number: int, place: int) -> str:
    """Return the id of a sample that names none: its position, and for the second file and later ones the file's."""
    return f"#{place + 1}" if number == 0 else f"#{number + 1}.{place + 1}"


def add_missing(missing: dict[str, str], sample: Sample) -> None:
    """Add those files of a sample that do not exist: path -> its id."""
    for media in sample.media:
        for path in media.missing():
            missing.setdefault(path, sample.id)


def load_samples(paths: list[str], image_folder: str = "") -> Samples:
    """Find the samples of some files, and check all of them; raise InputError."""
    samples, missing = Samples(paths, image_folder), {}
    for _, _, sample in samples.each():
        if isinstance(sample, InputError):
            raise sample
        add_missing(missing, sample)
    samples.refuse_missing(missing)
    return samples
