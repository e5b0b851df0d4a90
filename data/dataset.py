"""Read a JSON or JSONL file of conversations about videos and images, and check all of it before anything is loaded.

    {"id": "s1", "video": ["a.mp4", "b.mp4"],
     "conversations": [{"from": "human", "value": "<video>\\n<video>\\nWhat is the EF?"},
                       {"from": "gpt", "value": "55%"}]}

The last turn is the answer, the turns before it are the prompt. "video" and "image" are optional. Each `<video>` tag in
a human turn stands for one video, in order, and each `<image>` tag for one image; without any tags of a kind, all of
that kind come first. A video may be a folder of frames, or a list of their files; an object with options of its own
stands for a path with those of the flags. Other keys are data for reward functions, unless they look like a misspelt
one. Every mistake is an InputError of one line, before training starts.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from data.fetch import FetchError, check_address, is_address, shown

VIDEO_TAG, IMAGE_TAG = "<video>", "<image>"
TAG_PATTERN = re.compile(f"{VIDEO_TAG}|{IMAGE_TAG}")
KEYS = ("id", "video", "image", "conversations")
IMAGE_OPTIONS = ("resized_width", "resized_height", "min_pixels", "max_pixels")
VIDEO_OPTIONS = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end", *IMAGE_OPTIONS)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class InputError(Exception):
    """A mistake in the user's input; str() is one line to print: what is wrong, where, and how to fix it."""


class TagMismatch(InputError):
    """The numbers of a sample's tags and of its videos or images differ."""


class DuplicateId(InputError):
    """A sample has the id of an earlier one."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Media:
    """A video or an image of a sample."""

    kind: Literal["video", "image"]
    path: str | tuple[str, ...]  # of its file, of the folder of its frames, or of the files of its frames in order
    options: tuple[tuple[str, float], ...] = ()  # its own, in place of the flags

    @property
    def name(self) -> str:
        """Its name without folders, to show; equal for equal names in another place."""
        first, *others = map(shown, self.files)
        return os.path.basename(first.rstrip("/")) + (f" and {len(others)} more frames" if others else "")

    @property
    def files(self) -> tuple[str, ...]:
        """Its path, or the paths of its frames."""
        return (self.path,) if isinstance(self.path, str) else self.path

    def missing(self) -> list[str]:
        """Return those of its paths at which there is nothing."""
        may_be_folder = self.kind == "video" and isinstance(self.path, str)
        is_there = (is_address, os.path.isfile, *[os.path.isdir] * may_be_folder)
        return [path for path in self.files if not any(test(path) for test in is_there)]


@dataclass(frozen=True)
class Sample:
    """One prompt with its videos and images, and its true answer."""

    id: str
    media: tuple[Media, ...]  # M, in the order of their tags
    turns: tuple[tuple[str, str], ...]  # (role, text); M tags in all user turns together; the last turn is a user's
    answer: str
    extra: dict = field(default_factory=dict, hash=False)  # the other keys of its entry, for reward functions


def keep_media(sample: Sample, is_kept: list[bool]) -> Sample:
    """Keep some of a sample's videos and images, each with its tag."""
    of_tag, turns = iter(is_kept), []
    for role, text in sample.turns:
        text, *others = re.split(f"({TAG_PATTERN.pattern})", text)
        for tag, after in zip(others[::2], others[1::2], strict=True):
            text += tag + after if next(of_tag) else after.removeprefix("\n")
        turns.append((role, text))
    media = tuple(one for one, kept in zip(sample.media, is_kept, strict=True) if kept)
    return replace(sample, media=media, turns=tuple(turns))


def load_samples(data_path: str, image_folder: str = "") -> list[Sample]:
    """Read and check every sample of a file; all videos and images must exist.

    A path is used as written if there is such a file or folder, else joined to `image_folder`. Raises InputError.
    """
    samples, missing = [], {}
    for _, sample in read_samples(data_path, image_folder):
        if isinstance(sample, InputError):
            raise sample
        samples.append(sample)
        for media in sample.media:
            for path in media.missing():
                missing.setdefault(path, sample.id)
    if missing:
        first = ", ".join(f"{path!r} (sample {sample_id!r})" for path, sample_id in list(missing.items())[:3])
        raise InputError(
            f"{data_path!r}: {len(missing)} file(s) missing: {first}{', ...' if len(missing) > 3 else ''}: "
            f"set --image_folder (now {image_folder!r}) to the folder that holds them, or correct the paths"
        )
    return samples


def read_samples(data_path: str, image_folder: str = "") -> Iterator[tuple[object, Sample | InputError]]:
    """Yield each entry of a file, as written, with its Sample, or with the InputError that says what is wrong.

    Files need not exist. Of samples with the same id, the first is valid. Raises InputError if there are no entries.
    """
    entries, seen = _read_entries(data_path), set()
    if not entries:
        raise InputError(f"{data_path!r} contains no samples: give a file with at least one")
    for position, entry in enumerate(entries, start=1):
        try:
            sample = _read_sample(entry, f"{data_path!r}: entry #{position}", data_path, f"#{position}", image_folder)
            if sample.id in seen:
                raise DuplicateId(f"{data_path!r}: the id {sample.id!r} occurs twice: give every sample its own id")
            seen.add(sample.id)
        except InputError as error:
            sample = error
        yield entry, sample


def _read_entries(data_path: str) -> list:
    """Parse the file as a JSON list, or as JSONL if its name or its first line shows that it is."""
    if os.path.isdir(data_path):
        raise InputError(f"{data_path!r} is a directory: --data_path takes a JSON or JSONL file")
    try:
        with open(data_path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise InputError(f"cannot read {data_path!r} ({error.strerror}): check --data_path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{data_path!r} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    if not text.strip():
        return []
    if not text.lstrip().startswith("[") and (data_path.endswith(".jsonl") or _is_object(text.lstrip().split("\n")[0])):
        # Not splitlines(): it also splits at characters that may occur inside a JSON string, such as U+2028.
        lines = enumerate(text.split("\n"), start=1)
        return [_parse_json(line, data_path, number) for number, line in lines if line.strip()]
    entries = _parse_json(text, data_path)
    if not isinstance(entries, list):
        raise InputError(
            f"{data_path!r} is not a list: write the samples as [{{...}}, {{...}}], or one per line (JSONL)"
        )
    return entries


def _is_object(line: str) -> bool:
    """Return whether a line is a whole JSON object, as the first line of a JSONL file is."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parse_json(text: str, data_path: str, first_line: int = 1):
    """Parse JSON that begins on line `first_line` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{data_path!r}: malformed JSON at {where} ({error.msg}): correct it there") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, thousands of nested brackets
        raise InputError(f"{data_path!r}: unreadable JSON from line {first_line} on ({error}): correct it") from error


def _read_sample(entry, where: str, data_path: str, default_id: str, image_folder: str) -> Sample:
    """Check one entry of the file and turn it into a Sample; every error message begins with `where`."""
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {_json_type(entry)}, not an object: write it as {{...}}")
    sample_id = default_id if entry.get("id") is None else entry["id"]
    if isinstance(sample_id, bool) or not isinstance(sample_id, str | int) or sample_id == "":
        raise InputError(f"{where}: 'id' is {_json_type(sample_id)}: give a string or a whole number")
    sample_id = str(sample_id)
    where = f"{data_path!r}: sample {sample_id!r}"

    _check_keys(entry, where)
    *prompt, (_, answer) = _read_turns(entry, where)
    of_tag = {}
    for kind, tag in (("video", VIDEO_TAG), ("image", IMAGE_TAG)):
        found = _read_media(entry.get(kind), kind, where, image_folder)
        tags = sum(text.count(tag) for _, text in prompt)
        if tags == 0:
            first_user = [role for role, _ in prompt].index("user")
            prompt[first_user] = ("user", f"{tag}\n" * len(found) + prompt[first_user][1])
        elif tags != len(found):
            raise TagMismatch(
                f"{where}: {tags} {tag} tag(s) in the human turns but {len(found)} in {kind!r}: "
                "make the numbers equal, or remove all tags"
            )
        of_tag[tag] = iter(found)
    media = tuple(next(of_tag[tag]) for _, text in prompt for tag in TAG_PATTERN.findall(text))
    return Sample(sample_id, media, tuple(prompt), answer, {key: entry[key] for key in entry if key not in KEYS})


def _check_keys(entry: dict, where: str) -> None:
    """Raise InputError for a key that looks like a misspelt 'video', 'image' or 'conversations'.

    Other keys are the user's own data. So are keys of several words, such as 'conversation_id' and 'videoId', which
    resemble one of ours by accident.
    """
    for key in entry:
        word = key.strip().lower()
        if word == "id" and key != "id":
            raise InputError(f"{where}: unknown key {key!r}, did you mean 'id'?")
        known = difflib.get_close_matches(word, ("video", "image", "conversations"), n=1, cutoff=0.8)
        is_one_word = not re.search(r"[_\d]|[a-z][A-Z]", key)
        if known and key != known[0] and is_one_word:
            raise InputError(f"{where}: unknown key {key!r}, did you mean {known[0]!r}?")


def _read_media(written, kind: str, where: str, image_folder: str) -> list[Media]:
    """Read what stands under 'video' or 'image': nothing, one of it, or a list."""
    if written is None:
        return []
    if not isinstance(written, list | str | dict):
        raise InputError(f"{where}: {kind!r} is {_json_type(written)}: give a path or a list of paths")
    listed = written if isinstance(written, list) else [written]
    return [_read_one(one, kind, f"{where}: {kind!r}", image_folder) for one in listed]


def _read_one(written, kind: str, where: str, image_folder: str) -> Media:
    """Read one video or image: a path, a list of frames, or an object with either of them and its own options."""
    options = ()
    if isinstance(written, dict):
        if kind not in written:
            raise InputError(f"{where} contains an object without {kind!r}: name its file there")
        options = _read_options({key: written[key] for key in written if key != kind}, kind, where)
        written = written[kind]
    frames = written if kind == "video" and isinstance(written, list) and written else [written]
    for path in frames:
        if not isinstance(path, str) or not path.strip():
            raise InputError(f"{where} contains {_json_type(path)}: every entry must be a path")
        if is_address(path):
            try:
                check_address(path)
            except FetchError as error:
                raise InputError(f"{where}: {error}") from error
    paths = tuple(path if is_address(path) else _resolve(path, image_folder) for path in frames)
    if isinstance(written, list):
        return Media(kind, paths, options)
    if kind == "video" and shown(written).lower().endswith(IMAGE_SUFFIXES):
        raise InputError(
            f"{where} contains {shown(written)!r}: put the frames of a video in a list of their own, [[...]]"
        )
    return Media(kind, paths[0], options)


def _read_options(written: dict, kind: str, where: str) -> tuple[tuple[str, float], ...]:
    """Read the options of one video or image; their values are bounded where it is opened."""
    known = VIDEO_OPTIONS if kind == "video" else IMAGE_OPTIONS
    for name, value in written.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            mend = f"did you mean {nearest[0]!r}?" if nearest else f"known ones are {', '.join(known)}"
            raise InputError(f"{where}: unknown option {name!r}: {mend}")
        is_whole = name not in ("fps", "video_start", "video_end")
        if isinstance(value, bool) or not isinstance(value, int if is_whole else int | float):
            raise InputError(f"{where}: {name!r} is {value!r}: give a {'whole ' * is_whole}number")
        if not 0 <= value <= 1e9 or (value == 0 and name != "video_start"):
            raise InputError(f"{where}: {name!r} is {value!r}: give a number above 0, and at most 1e9")
    return tuple(sorted(written.items()))


def _resolve(path: str, image_folder: str) -> str:
    """Return the path as written if that file exists, else the path inside `image_folder`; files before folders."""
    inside = os.path.join(image_folder, path)
    if os.path.isfile(path) or (os.path.isdir(path) and not os.path.isfile(inside)):
        return path
    return inside


def _read_turns(entry: dict, where: str) -> list[tuple[str, str]]:
    """Return all turns as (role, text): a prompt that ends with a user's turn, then the answer."""
    conversations = entry.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise InputError(f"{where} has no 'conversations': give a list of turns, the last one from 'gpt'")
    turns = [_read_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(conversations, start=1)]
    roles = [role for role, _ in turns]
    if "user" not in roles:
        raise InputError(f"{where} has no human turn: put the question in a turn from 'human'")
    if "assistant" not in roles:
        raise InputError(f"{where} has no gpt turn: put the answer in a last turn from 'gpt'")
    if roles[-1] != "assistant":
        raise InputError(f"{where} does not end with a gpt turn: the last turn must be the answer")
    if roles[-2] != "user":
        raise InputError(f"{where}: the turn before the answer is not human: put the question right before the answer")
    if not turns[-1][1].strip():
        raise InputError(f"{where} has an empty answer: fill the last gpt turn")
    return turns


def _read_turn(turn, where: str) -> tuple[str, str]:
    """Return one turn as (role, text)."""
    if not isinstance(turn, dict):
        raise InputError(f"{where} is {_json_type(turn)}: write it as {{'from': ..., 'value': ...}}")
    for key in ("from", "value"):
        if not isinstance(turn.get(key), str):
            problem = f"is {_json_type(turn[key])}" if key in turn else "is missing"
            raise InputError(f"{where}: {key!r} {problem}: give a string")
    speaker, text = turn["from"], turn["value"]
    if speaker not in ROLES:
        raise InputError(f"{where}: unknown 'from' {speaker!r}: use 'human', 'gpt' or 'system'")
    for tag in re.findall(r"<\s*(?:videos?|images?)\s*>", text, re.IGNORECASE):
        if tag not in (VIDEO_TAG, IMAGE_TAG):
            raise InputError(f"{where}: {tag} in 'value': write {VIDEO_TAG if 'v' in tag.lower() else IMAGE_TAG}")
    if ROLES[speaker] != "user" and (tag := TAG_PATTERN.search(text)):
        raise InputError(f"{where}: {tag.group()} in a turn from {speaker!r}: move it to a human turn")
    try:
        text.encode()  # JSON may contain lone surrogates, which a tokenizer cannot encode
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: 'value' contains half a character (a lone surrogate): remove it") from error
    return ROLES[speaker], text


def _json_type(value) -> str:
    """Name the type of a JSON value for an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string" if value.strip() else "an empty string"
    return "a list" if isinstance(value, list) else "an object"


def read_system_prompt(value: str) -> str:
    """Return the text of --system_prompt, which is the text itself or the name of its file; raise InputError."""
    if not os.path.isfile(value):
        is_path = value.split() == [value] and ("/" in value or value.endswith((".txt", ".md")))
        if is_path:
            raise InputError(f"--system_prompt {value!r}: there is no such file, and it is no prompt: correct it")
        return value.strip()
    try:
        with open(value, encoding="utf-8-sig") as file:
            text = file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--system_prompt {value!r} cannot be read ({first_line(error)}): correct the file") from error
    if not text:
        raise InputError(f"--system_prompt {value!r} is an empty file: write the prompt into it, or leave out the flag")
    return text


def with_system_prompt(sample: Sample, text: str) -> Sample:
    """Put a text before a conversation that has no system turn of its own; "" changes nothing."""
    if not text or "system" in dict(sample.turns):
        return sample
    return replace(sample, turns=(("system", text), *sample.turns))
