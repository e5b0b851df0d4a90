"""One entry of a data file -> a `Sample`; every mistake in it is an InputError of one line.

    {"id": "s1", "video": ["a.mp4", "b.mp4"],
     "conversations": [{"from": "human", "value": "<video>\\n<video>\\nWhat is the EF?"},
                       {"from": "gpt", "value": "55%"}]}

The last turn is the answer, the turns before it are the prompt. "video" and "image" are optional. Each `<video>` tag in
a human turn stands for one video, in order, and each `<image>` tag for one image; without any tags of a kind, all of
that kind come first. A video may be a folder of frames, or a list of their files; an object with options of its own
stands for a path with those of the flags. Other keys are data for reward functions, unless they look like a misspelt
one.
"""

import difflib
import os
import re
import unicodedata
from functools import lru_cache

from data.media.fetch import check_address
from data.sample import IMAGE_SUFFIXES, TAG_PATTERN, InputError, Media, Sample, WrongTags, check_text, is_address, shown

KEYS = ("id", "video", "image", "conversations")
IMAGE_OPTIONS = ("resized_width", "resized_height", "min_pixels", "max_pixels")
VIDEO_OPTIONS = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end", *IMAGE_OPTIONS)
LIKE_A_TAG = re.compile(r"<\s*(video|image)s?\s*>", re.IGNORECASE)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TYPES = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}


def read_sample(entry, data_path: str, default_id: str, image_folder: str) -> Sample:
    """Check an entry of a file and turn it into a Sample, of a default id if it names none; raise InputError."""
    where = f"{data_path!r}: entry {default_id}"
    try:
        _expect(entry, [dict], "it", "write it as {...}")
        sample_id = default_id if entry.get("id") is None else entry["id"]
        _expect(None if sample_id == "" else sample_id, [str, int], "'id'", "give a string or a whole number")
        sample_id = str(sample_id)
        where = f"{data_path!r}: sample {sample_id!r}"
        extra = {key: value for key, value in entry.items() if key not in KEYS}
        for key in extra:
            if meant := _meant_key(key):
                raise ValueError(f"unknown key {key!r}, did you mean {meant!r}?")
        *prompt, (_, answer) = _read_turns(entry.get("conversations"))
        of_tag = {}
        for kind in ("video", "image"):
            tag, found = f"<{kind}>", _read_media(entry.get(kind), kind, image_folder)
            tags = sum(text.count(tag) for _, text in prompt)
            if tags == 0:
                first_user = [role for role, _ in prompt].index("user")
                prompt[first_user] = ("user", f"{tag}\n" * len(found) + prompt[first_user][1])
            elif tags != len(found):
                mismatch = f"{tags} {tag} tag(s) in the human turns but {len(found)} in {kind!r}"
                raise WrongTags(f"{where}: {mismatch}: make the numbers equal, or remove all tags")
            of_tag[tag] = iter(found)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    media = tuple(next(of_tag[tag]) for _, text in prompt for tag in TAG_PATTERN.findall(text))
    return Sample(sample_id, media, tuple(prompt), answer, extra)


def _expect(value, types: list[type], name: str, mend: str) -> None:
    """Raise ValueError if a JSON value is of none of some types. It is not shown, since it may be an address."""
    if type(value) not in types:
        raise ValueError(f"{name} is {TYPES.get(type(value), 'missing or empty')}: {mend}")


@lru_cache(1000)
def _meant_key(key: str) -> str | None:
    """Return which of ours a key looks like, misspelt; None for the user's own."""
    if re.search(r"[_\d]|[a-z][A-Z]", key):  # of several words, such as 'conversation_id': like ours by accident
        return None
    word = key.strip().lower()
    return "id" if word == "id" else next(iter(difflib.get_close_matches(word, KEYS[1:], n=1, cutoff=0.8)), None)


def _read_media(written, kind: str, image_folder: str) -> list[Media]:
    """Read what stands under 'video' or 'image': nothing, one of it, or a list. Raises ValueError."""
    if not isinstance(written, list):
        written = [] if written is None else [written]
    found = []
    for one in written:
        options = dict(one) if isinstance(one, dict) else {kind: one}
        path = options.pop(kind, None)
        if kind == "video" and isinstance(path, list) and path:
            paths = tuple(_read_path(frame, kind, image_folder) for frame in path)
        else:
            paths = _read_path(path, kind, image_folder)
            if kind == "video" and (name := shown(path)).lower().endswith(IMAGE_SUFFIXES):
                raise ValueError(f"{kind!r} holds {name!r}: put the frames of a video in a list of their own, [[...]]")
        found.append(Media(kind, paths, _read_options(options, kind)))
    return found


def _read_path(written, kind: str, image_folder: str) -> str:
    """Return an address as it is, and of a path where it leads to: as written if that file exists, else inside.

    Where nothing is there, the path that is meant may be written otherwise (`_on_disk`).
    """
    _expect(written or None, [str], f"a path in {kind!r}", f"give a string, or an object with one under {kind!r}")
    if is_address(written):
        check_address(written)
        return written
    inside = os.path.join(image_folder, written)
    is_meant = os.path.exists(written) and (os.path.isfile(written) or not os.path.isfile(inside))
    path = written if is_meant else inside
    if path.isascii() or os.path.exists(path):
        return path
    return next(filter(os.path.exists, map(_on_disk, (written, inside))), path)


def _on_disk(path: str) -> str:
    """Return a path with each part in the Unicode form that it has on the disk: macOS splits "é" into "e" and "´"."""
    if path.isascii() or os.path.exists(path):
        return path
    folder, name = os.path.split(path)
    forms = (os.path.join(_on_disk(folder), unicodedata.normalize(form, name)) for form in ("NFC", "NFD"))
    return next(filter(os.path.exists, forms), path)


def _read_options(written: dict, kind: str) -> tuple[tuple[str, float], ...]:
    """Read the options of one video or image; their values are bounded where it is opened. Raises ValueError."""
    known = VIDEO_OPTIONS if kind == "video" else IMAGE_OPTIONS
    for name, value in written.items():
        if name not in known:
            raise ValueError(f"{kind!r} has an unknown option {name!r}: known ones are {', '.join(known)}")
        types = (int, float) if name in ("fps", "video_start", "video_end") else (int,)
        if type(value) not in types or not (0 < value <= 1e9 or name == "video_start" and value == 0):
            whole = "whole " * (float not in types)
            raise ValueError(f"{kind!r}: {name!r} is {value!r}: give a {whole}number above 0, and at most 1e9")
    return tuple(sorted(written.items()))


def _read_turns(written) -> list[tuple[str, str]]:
    """Return all turns as (role, text): a prompt that ends with a user's turn, then the answer. Raises ValueError."""
    _expect(written or None, [list], "'conversations'", "give a list of turns, the last one from 'gpt'")
    turns = [_read_turn(turn, f"turn {number}") for number, turn in enumerate(written, start=1)]
    if [role for role, _ in turns[-2:]] != ["user", "assistant"]:
        raise ValueError("the last two turns must be the question, from 'human', and the answer, from 'gpt'")
    if not turns[-1][1].strip():
        raise ValueError("it has an empty answer: fill the last gpt turn")
    check_text(turns[:-1])
    turns[-1][1].encode()  # half a character has no bytes
    return turns


def _read_turn(turn, name: str) -> tuple[str, str]:
    """Return one turn as (role, text). Raises ValueError."""
    _expect(turn, [dict], name, "write it as {'from': ..., 'value': ...}")
    speaker, text = turn.get("from"), turn.get("value")
    _expect(text, [str], f"{name}: 'value'", "give a string")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise ValueError(f"{name}: unknown 'from' {speaker!r}: use 'human', 'gpt' or 'system'")
    for tag in LIKE_A_TAG.finditer(text):
        if tag[0] != (meant := f"<{tag[1].lower()}>"):
            raise ValueError(f"{name}: {tag[0]} in 'value': write {meant}")
    if ROLES[speaker] != "user" and (tag := TAG_PATTERN.search(text)):
        raise ValueError(f"{name}: {tag.group()} in a turn from {speaker!r}: move it to a human turn")
    return ROLES[speaker], text
