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
import stat
from functools import lru_cache

from data.media.fetch import FetchError, check_address, is_address, shown
from data.sample import IMAGE_SUFFIXES, IMAGE_TAG, TAG_PATTERN, VIDEO_TAG, InputError, Media, Sample, TagMismatch

KEYS = ("id", "video", "image", "conversations")
IMAGE_OPTIONS = ("resized_width", "resized_height", "min_pixels", "max_pixels")
VIDEO_OPTIONS = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end", *IMAGE_OPTIONS)
LIKE_A_TAG = re.compile(r"<\s*(?:videos?|images?)\s*>", re.IGNORECASE)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_sample(entry, where: str, data_path: str, default_id: str, image_folder: str) -> Sample:
    """Check one entry of the file and turn it into a Sample; errors say `where` it stands until its id is known."""
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
        if key not in KEYS and (meant := _meant_key(key)):
            raise InputError(f"{where}: unknown key {key!r}, did you mean {meant!r}?")


@lru_cache(1000)
def _meant_key(key: str) -> str | None:
    """Return which of ours a key resembles, if any."""
    word = key.strip().lower()
    if word == "id":
        return "id"
    is_one_word = not re.search(r"[_\d]|[a-z][A-Z]", key)
    return next(iter(difflib.get_close_matches(word, KEYS[1:], n=1, cutoff=0.8)), None) if is_one_word else None


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
    if kind == "video" and isinstance(written, list) and written:
        return Media(kind, tuple(_read_path(path, where, image_folder) for path in written), options)
    path = _read_path(written, where, image_folder)
    if kind == "video" and shown(written).lower().endswith(IMAGE_SUFFIXES):
        raise InputError(
            f"{where} contains {shown(written)!r}: put the frames of a video in a list of their own, [[...]]"
        )
    return Media(kind, path, options)


def _read_path(written, where: str, image_folder: str) -> str:
    """Return an address as it is, and of a path where it leads to."""
    if not isinstance(written, str) or not written.strip():
        raise InputError(f"{where} contains {_json_type(written)}: every entry must be a path")
    if not is_address(written):
        return _resolve(written, image_folder)
    try:
        check_address(written)
    except FetchError as error:
        raise InputError(f"{where}: {error}") from error
    return written


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
    try:
        if not os.access(path, os.F_OK):  # without an exception, since most paths are inside
            return inside
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return inside
    return path if stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and not os.path.isfile(inside)) else inside


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
    for tag in LIKE_A_TAG.findall(text):
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
