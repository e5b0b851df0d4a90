"""Load a video or an image as training would, in a process of its own, and say what is wrong with it."""

import multiprocessing
import os
from typing import NamedTuple

from data.media.load import MediaOptions, load_media
from data.media.patches import Grid
from data.sample import BadMedia, InputError, Media, TooFewFrames, shown

# Forking beside threads is unsafe. A fork server is safe, and fast, since it has imported these modules already.
FORKSERVER = multiprocessing.get_context("forkserver")
PRELOAD = ["jinja2", "PIL.ImageOps", "data.check.media", "data.check.report", "reward.functions", "reward.zero_skill"]


class MediaProblem(NamedTuple):
    """Why the trainer would refuse a video or an image."""

    problem: str  # one of those that `__main__.py` lists
    reason: str  # one line that names the file


def check_media(media: Media, options: MediaOptions) -> Grid | MediaProblem | InputError:
    """Load a video or an image as the trainer would; return its grid, or what is wrong with it or with a cache."""
    try:
        return load_media(media, options).grid_thw
    except InputError as error:
        return error
    except (FileNotFoundError, BadMedia) as error:
        kinds = {FileNotFoundError: "missing file", TooFewFrames: "too few frames"}
        return MediaProblem(kinds.get(type(error), f"undecodable {media.kind}"), str(error))


def check_in_own_process(
    media: Media, options: MediaOptions, timeout: float = 600.0, function=check_media
) -> Grid | MediaProblem:
    """Call `check_media` in a process of its own, because a broken file may crash the decoder or hang it.

    timeout: in seconds. Raises InputError if a cache cannot be written.
    """
    receiver, sender = FORKSERVER.Pipe(duplex=False)
    process = FORKSERVER.Process(target=_send_result, args=(sender, function, media, options), daemon=True)
    process.start()
    sender.close()
    try:
        result = receiver.recv() if receiver.poll(timeout) else f"hangs the decoder: no frames within {timeout:g} s"
    except EOFError:
        process.join()
        result = f"crashes the decoder (exit code {process.exitcode})"
    process.kill()
    process.join()
    if isinstance(result, InputError):
        raise result
    if isinstance(result, str):
        return MediaProblem(f"undecodable {media.kind}", f"{shown(media.files[0])!r} {result}")
    return result


def _send_result(sender, function, media: Media, options: MediaOptions) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # FFmpeg's messages would break up the progress bar
    sender.send(function(media, options))
