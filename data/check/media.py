"""Load a video or an image as training would, in a process of its own, and say what is wrong with it."""

import multiprocessing
import os

from data.media.load import MediaOptions, load_media
from data.media.patches import Grid
from data.sample import BadMedia, InputError, Media, shown

# Forking beside threads is unsafe. A fork server is safe, and fast, since it has imported these modules already.
FORKSERVER = multiprocessing.get_context("forkserver")
PRELOAD = ["jinja2", "PIL.ImageOps", "data.check.media", "data.check.report", "reward.functions", "reward.zero_skill"]


def send_grid(sender, media: Media, options: MediaOptions) -> None:
    """Load a video or an image as the trainer would; send its grid, or what is wrong with it or with a cache."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # FFmpeg's messages would break up the progress bar
    try:
        sender.send(load_media(media, options).grid_thw)
    except (FileNotFoundError, BadMedia, InputError) as error:
        sender.send(error)


def check_media(media: Media, options: MediaOptions, timeout: float = 600.0, function=send_grid) -> Grid | Exception:
    """Return what `send_grid` sends from a process of its own, because a broken file may crash the decoder or hang it.

    timeout: in seconds. Raises InputError if a cache cannot be written.
    """
    receiver, sender = FORKSERVER.Pipe(duplex=False)
    process = FORKSERVER.Process(target=function, args=(sender, media, options), daemon=True)
    process.start()
    sender.close()
    name = repr(shown(media.files[0]))
    result = BadMedia(f"{name} hangs the decoder: no frames within {timeout:g} s")
    try:
        if receiver.poll(timeout):
            result = receiver.recv()
    except EOFError:
        process.join()
        result = BadMedia(f"{name} crashes the decoder (exit code {process.exitcode})")
    process.kill()
    process.join()
    if isinstance(result, InputError):
        raise result
    return result
