"""Read flags from the command line, and the flags about samples, videos and images.

Flags are declared as `reward/flags.py` says. What follows from those about samples stands in `loader.py`.
"""

import argparse
import copy
import dataclasses
import difflib
import inspect
from dataclasses import dataclass
from typing import Literal

from transformers import HfArgumentParser

from data.sample import InputError
from data.video_cap import VideoCap
from reward.flags import NOT_NEGATIVE, POSITIVE, flag

OnLongPrompt = Literal["error", "skip", "fewer_videos"]
OnBadMedia = Literal["error", "skip"]


@dataclass
class SampleFlags:
    """Which model is asked about which samples."""

    heading = "model and data"
    model_id: str = flag("", "Qwen2.5-VL: a local folder or a hub name")
    data_path: list[str] = flag([], "JSON or JSONL files of samples (data/README.md)", may_change=True)
    image_folder: str = flag("", "folder of the videos whose path in the JSON does not exist as it is", may_change=True)
    system_prompt: str = flag("", "text or its file, before conversations without a system turn", decides=True)


@dataclass
class MediaFlags:
    """What is seen of a sample's videos and images."""

    heading = "videos and images"
    max_videos: int = flag(5, "videos kept per sample, a memory setting; 0: all", NOT_NEGATIVE, demo=0, decides=True)
    video_cap: VideoCap = flag("first", "which are kept: the first, evenly spread, or others each epoch", decides=True)
    max_images: int = flag(0, "images kept per sample; 0: all of them", NOT_NEGATIVE, decides=True)
    fps: float | None = flag(None, "frames read per second of video (2, if no --nframes)", decides=True)
    nframes: int | None = flag(None, "frames read per video, rounded to even, instead of --fps", demo=8, decides=True)
    video_resized_width: int | None = flag(None, "frame width, rounded to a multiple of 28", demo=56, decides=True)
    video_resized_height: int | None = flag(None, "frame height, rounded to a multiple of 28", demo=56, decides=True)
    video_min_pixels: int = flag(128 * 28 * 28, "least pixels per frame, where no size is given", decides=True)
    video_max_pixels: int = flag(768 * 28 * 28, "most pixels per frame, where no size is given", decides=True)
    image_min_pixels: int = flag(4 * 28 * 28, "least pixels per image", decides=True)
    image_max_pixels: int = flag(16384 * 28 * 28, "most pixels per image", decides=True)
    max_prompt_length: int = flag(0, "tokens of a prompt, those of media included; 0: any", NOT_NEGATIVE, decides=True)
    media_cache: str = flag("", "folder for files from http(s) addresses (default: in ~/.cache)", may_change=True)
    frame_cache: str = flag("", "folder for decoded frames, which later epochs and runs then reuse", may_change=True)
    frame_cache_gb: float = flag(100.0, "its size; frames unused for longest are removed", POSITIVE, may_change=True)


@dataclass
class LoaderFlags(MediaFlags):
    """How samples become prompts."""

    on_long_prompt: OnLongPrompt = flag(
        "error", "a longer prompt: stop, leave its sample out, or leave out the last of its videos", decides=True
    )
    on_bad_video: OnBadMedia = flag(
        "error", "unreadable video or image: stop, or leave its sample out", may_change=True, alias="--on_bad_media"
    )
    dataloader_num_workers: int | None = flag(
        None, "processes per rank that decode ahead (by the cores, at most 8); 0: none", NOT_NEGATIVE, may_change=True
    )


@dataclass
class TrainingMediaFlags(LoaderFlags):
    """How samples become the prompts of training."""

    frame_jitter: bool = flag(False, "move the frames read from a video by up to half a step, anew in each epoch")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Show each flag in one spelling: HfArgumentParser also takes hyphens in place of underscores."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=120)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        values = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
        return action.option_strings[-1 if "-h" in action.option_strings else 0] + values


def default_of(field: dataclasses.Field):
    """Return a flag's default; a list is a new one each time."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def as_typed(value):
    """Return a value as it is typed on the command line, where a list has no brackets."""
    if not isinstance(value, list):
        return value
    return " ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)


def for_help(section: type, has_demo: bool) -> type:
    """Return a section of flags whose help texts also name the defaults; has_demo: those with --demo, too."""
    fields = []
    for field in dataclasses.fields(section):
        described, shown, demo = copy.copy(field), as_typed(default_of(field)), field.metadata["demo"]
        known = [f"default: {shown}"] if shown not in (None, "") and shown is not False else []
        known += [f"with --demo: {as_typed(demo)}"] if has_demo and demo is not None else []
        text = field.metadata["help"] + (f" ({'; '.join(known)})" if known else "")
        described.metadata = {"help": text.replace("%", "%%"), "aliases": field.metadata["aliases"]}
        fields.append((field.name, field.type, described))
    return dataclasses.make_dataclass("Section", fields, namespace={"_argument_group_name": section.heading})


def parse_flags(cls: type, argv: list[str], prog: str, defaults: dict | None = None, description: str = ""):
    """Read a dataclass of flags from the command line; raise InputError for what is unknown or out of bounds.

    defaults: in place of some of the dataclass's own. description: stands before the flags in --help.
    """
    sections = [cls] if inspect.get_annotations(cls) else cls.__bases__

    def fail(message: str):
        raise InputError(f"{message}: {prog} --help explains the flags")

    parser = HfArgumentParser(
        [for_help(section, hasattr(cls, "demo")) for section in sections],
        prog=prog,
        usage=f"{prog} [flags]",
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    parser.set_defaults(**(defaults or {}))
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        names = [f"--{field.name}" for field in dataclasses.fields(cls)]
        nearest = difflib.get_close_matches(unknown[0].split("=")[0], names, 1)
        fail(f"unknown flag {unknown[0]!r}" + (f" (did you mean {nearest[0]}?)" if nearest else ""))
    config = cls(**{name: value for section in parsed for name, value in vars(section).items()})
    for field in dataclasses.fields(config):
        bounds, value = field.metadata["bounds"], getattr(config, field.name)
        if bounds and value is not None and not bounds.holds(value):
            raise InputError(f"--{field.name} {as_typed(value)}: {bounds.text}")
    return config
