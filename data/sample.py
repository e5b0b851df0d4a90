"""One sample: a conversation about videos and images, with its true answer. And the errors for what users give."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Literal

TAG_PATTERN = re.compile("<video>|<image>")

# Written in a text, these would become placeholders without a video, or begin and end turns.
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL_TOKENS = re.compile("|".join(map(re.escape, (*VISION_TOKENS, "<|im_start|>", "<|im_end|>", "<|endoftext|>"))))

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


class InputError(Exception):
    """A mistake in the user's input; str() is one line to print: what is wrong, where, and how to fix it."""


class WrongTags(InputError):
    """The numbers of a sample's tags and of its videos or images differ."""


class DuplicateId(InputError):
    """A sample has the id of an earlier one."""


class BadMedia(ValueError):
    """A file that exists but has no usable frames; the message is one line with its path and the reason."""


class TooFewFrames(BadMedia):
    """A video has fewer frames than the options ask for."""


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the name of a file before what is wrong with it: a ValueError or OSError becomes BadMedia."""
    try:
        yield
    except (ValueError, OSError) as error:
        kind = TooFewFrames if isinstance(error, TooFewFrames) else BadMedia
        reason = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else error
        raise kind(f"{name} {reason}") from error


@contextmanager
def writing(flag: str, path: str) -> Iterator[None]:
    """Raise InputError, naming a flag and the file or folder that it leads to, if that cannot be written."""
    try:
        yield
    except OSError as error:
        reason = f"cannot be written ({error.strerror}): make room, or name another place"
        raise InputError(f"--{flag} {path!r} {reason}") from error


def is_address(path: str) -> bool:
    """Say whether a path is an address such as https://…, of whatever scheme."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def shown(path: str) -> str:
    """Return a path as it may be printed: an address without credentials."""
    return re.sub(r"://[^/]*@", "://", re.split("[?#]", path)[0]) if is_address(path) else path


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_of(names: list[str]) -> str:
    """Return the first three names."""
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


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
        exists = os.path.exists if self.kind == "video" and isinstance(self.path, str) else os.path.isfile
        return [path for path in self.files if not (is_address(path) or exists(path))]


@dataclass(frozen=True)
class Sample:
    """One prompt with its videos and images, and its true answer."""

    id: str
    media: tuple[Media, ...]  # M, in the order of their tags
    turns: tuple[tuple[str, str], ...]  # (role, text); M tags in all user turns together; the last turn is a user's
    answer: str
    extra: dict = field(default_factory=dict, hash=False)  # the other keys of its entry, for reward functions

    @property
    def question(self) -> str:
        """The text of the last turn, to show."""
        return TAG_PATTERN.sub("", self.turns[-1][1]).strip()

    def missing(self) -> list[str]:
        """Return those paths of its videos and images at which there is nothing."""
        return [path for media in self.media for path in media.missing()]


def check_text(turns: Sequence[tuple[str, str]]) -> None:
    """Raise ValueError if a text of some turns, (role, text), contains special tokens or half a character."""
    for role, text in turns:
        text.encode()  # JSON may contain lone surrogates, which a tokenizer cannot encode
        if special := SPECIAL_TOKENS.search(text):
            raise ValueError(f"the {role} text contains the special token {special.group()}: remove it")


def keep_media(sample: Sample, is_kept: list[bool]) -> Sample:
    """Keep some of a sample's videos and images, each with its tag."""
    if all(is_kept):
        return sample
    of_tag = iter(is_kept)
    with_newline = re.compile(rf"({TAG_PATTERN.pattern})\n?")
    turns = [(role, with_newline.sub(lambda tag: tag[0] if next(of_tag) else "", text)) for role, text in sample.turns]
    return replace(sample, media=tuple(compress(sample.media, is_kept)), turns=tuple(turns))


def read_system_prompt(value: str) -> str:
    """Return the text of --system_prompt, which is the text itself or the name of its file; raise InputError."""
    try:
        is_file = os.path.isfile(value)
        text = (Path(value).read_text("utf-8-sig") if is_file else value).strip()
        check_text([("system", text)])
    except (OSError, ValueError) as error:
        raise InputError(f"--system_prompt cannot be used ({first_line(error)}): correct it") from error
    if is_file and not text:
        raise InputError(f"--system_prompt {value!r} is an empty file: write the prompt into it, or leave it out")
    if not is_file and value.split() == [value] and ("/" in value or value.endswith((".txt", ".md"))):
        raise InputError(f"--system_prompt {value!r}: there is no such file, and it is no prompt: correct it")
    return text


def with_system_prompt(sample: Sample, text: str) -> Sample:
    """Put a text before a conversation that has no system turn of its own; "" changes nothing."""
    if not text or "system" in dict(sample.turns):
        return sample
    return replace(sample, turns=(("system", text), *sample.turns))
