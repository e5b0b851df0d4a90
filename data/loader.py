"""Samples -> tensors, decoded ahead of the training loop by worker processes.

| P | prompt tokens | C | completion tokens |
| M | videos and images | S | vision patches |
"""

import ctypes
import dataclasses
import gc
import mmap
import multiprocessing
import os
import re
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from multiprocessing.util import Finalize

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.epochs import BatchItem
from data.flags import LoaderFlags, MediaFlags, OnBadMedia, OnLongPrompt
from data.media.augment import NO_AUGMENTATION, Augmentation
from data.media.fetch import DEFAULT_CACHE
from data.media.frame_cache import FrameCache
from data.media.frames import VideoOptions
from data.media.images import ImageOptions
from data.media.load import MediaOptions, media_grid
from data.media.patches import PATCH_VALUES
from data.prompt import encode_prompt
from data.sample import BadMedia, InputError, Sample, keep_media, named, read_system_prompt

PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent ends
NUM_NOTES, NOTE_BYTES = 4096, 256
NOTES = mmap.mmap(-1, NUM_NOTES * NOTE_BYTES)  # shared with the workers, which are forked: the sample each decodes


@dataclass
class Prompt:
    """One sample as input for the model."""

    sample: Sample
    prompt_ids: Tensor  # (P,) token ids, one placeholder per token of a video or image
    position_ids: Tensor  # (3, P) mRoPE positions
    patches: Tensor  # (S, 1176) uint8, of all videos and images in the order of their tags
    grid_thw: Tensor  # (M, 3) patches of each along time, height, width
    second_per_grid_ts: Tensor  # (M,) seconds between patches along time
    vision_states: Tensor | None = None  # (S, hidden size of the tower): a frozen tower's output, replaces patches
    position: int = 0  # in the step's global batch
    is_padding: bool = False  # True: keeps this rank in step with the others; excluded from loss and metrics
    bad_media: str = ""  # if the sample for this position was left out: why
    shortened: str = ""  # if videos were left out because the prompt was too long: which sample and how many

    def completion_positions(self, length: int) -> Tensor:
        """Return the positions of the first `length` completion tokens, (3, C): from the prompt's maximum + 1 on."""
        start = self.position_ids.max() + 1
        return (start + torch.arange(length, device=start.device)).expand(3, -1)

    def __getstate__(self) -> dict:
        """Hand over arrays when a worker sends a prompt: of each tensor, torch would make a file in shared memory."""
        return {name: v.numpy() if isinstance(v, Tensor) else v for name, v in vars(self).items()}

    def __setstate__(self, state: dict) -> None:
        vars(self).update({name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in state.items()})

    def to(self, device: torch.device) -> "Prompt":
        """Copy the tensors to `device`."""
        tensors = {name: v.to(device, non_blocking=True) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **tensors)


@dataclass(frozen=True)
class PromptOptions:
    """How samples become prompts."""

    media: MediaOptions
    on_bad_video: OnBadMedia = "error"
    max_prompt_length: int = 0  # tokens; 0: any
    on_long_prompt: OnLongPrompt = "error"
    augmentation: Augmentation = NO_AUGMENTATION


def cores_per_rank() -> int:
    """Return the cores of this machine that a rank may use, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def media_options(flags: MediaFlags, threads: int = 1) -> MediaOptions:
    """Return the flags about frames, images and their size; raise InputError for a contradiction."""
    size = flags.video_resized_width, flags.video_resized_height
    try:
        with named("--fps, --nframes and --video_*:"):
            video = VideoOptions(flags.fps, flags.nframes, *size, flags.video_min_pixels, flags.video_max_pixels)
        image = ImageOptions(flags.image_min_pixels, flags.image_max_pixels)
    except ValueError as error:
        raise InputError(str(error)) from error
    frames = FrameCache(flags.frame_cache, int(flags.frame_cache_gb * 1e9)) if flags.frame_cache else None
    return MediaOptions(video, image, flags.media_cache or DEFAULT_CACHE, frames, threads)


def prompt_options(flags: LoaderFlags, is_training: bool = False) -> PromptOptions:
    """Return the flags about how samples become prompts; what differs between epochs does so in training only."""
    augmentation = Augmentation.of(flags) if is_training else NO_AUGMENTATION
    media = media_options(flags, threads=max(1, cores_per_rank() // max(1, flags.dataloader_num_workers)))
    return PromptOptions(media, flags.on_bad_video, flags.max_prompt_length, flags.on_long_prompt, augmentation)


def resolve_data_flags(flags: MediaFlags) -> None:
    """Fill in, in place, what flags about samples leave open; raise InputError if they contradict each other."""
    flags.system_prompt = read_system_prompt(flags.system_prompt)  # so that it is kept, wherever its file goes
    media_options(flags)
    if flags.video_cap != "first" and not flags.max_videos:
        raise InputError(f"--video_cap {flags.video_cap} has no effect with --max_videos 0, which keeps all")
    if not isinstance(flags, LoaderFlags):
        return
    if flags.dataloader_num_workers is None:
        flags.dataloader_num_workers = min(8, max(1, cores_per_rank() - 1))  # a core is left for the rank itself
    if flags.on_long_prompt != "error" and not flags.max_prompt_length:
        raise InputError(f"--on_long_prompt {flags.on_long_prompt} has no effect without --max_prompt_length: add it")


class LongPrompt(Exception):
    """A prompt has more tokens than it may; the message says how many."""


def load_prompt(
    sample: Sample,
    tokenizer,
    tokens_per_second: int,
    options: MediaOptions,
    augmentation: Augmentation = NO_AUGMENTATION,
    turn: int = 0,
) -> Prompt:
    """Decode the videos and images of a sample, as they are seen in its turn, and encode its conversation.

    Raises BadMedia or FileNotFoundError, which name the file, and ValueError if the text contains special tokens.
    """
    with ThreadPoolExecutor(options.threads) as pool:
        places = range(len(sample.media))
        loaded = list(pool.map(lambda place: augmentation.load(sample, place, turn, options), places))
    patches = torch.cat([torch.empty(0, PATCH_VALUES, dtype=torch.uint8), *(one.patches for one in loaded)])
    grid_thw = torch.tensor([one.grid_thw for one in loaded], dtype=torch.long).view(-1, 3)
    seconds = torch.tensor([one.second_per_grid_t for one in loaded])
    prompt_ids, position_ids = encode_prompt(sample.turns, tokenizer, grid_thw, seconds, tokens_per_second)
    return Prompt(sample, prompt_ids, position_ids, patches, grid_thw, seconds)


def fit_prompt(sample: Sample, tokenizer, options: PromptOptions) -> tuple[Sample, int]:
    """Return a sample and its number of prompt tokens, known from the headers of its videos and images.

    One that is too long loses its last videos, or else LongPrompt is raised. Also raises what `load_prompt` does.
    """
    grids, most = [media_grid(media, options.media) for media in sample.media], options.max_prompt_length
    videos = [place for place, media in enumerate(sample.media) if media.kind == "video"]
    for left in range(len(videos), -1, -1):
        is_kept = [place not in videos[left:] for place in range(len(sample.media))]
        shorter, kept = keep_media(sample, is_kept), list(compress(grids, is_kept))
        grid_thw = torch.tensor(kept, dtype=torch.long).view(-1, 3)
        length = len(encode_prompt(shorter.turns, tokenizer, grid_thw, torch.ones(len(kept)), 1)[0])
        if not most or length <= most:
            return shorter, length
        if options.on_long_prompt != "fewer_videos":
            break
    raise LongPrompt(f"its prompt has {length:,} tokens, more than --max_prompt_length {most:,}")


class PromptDataset(Dataset):
    """Maps a `BatchItem` to its decoded prompt.

    Where the options say "skip", a sample with an unreadable file, or whose prompt is too long, is replaced by the next
    usable one, as padding. Errors are returned, not raised, because an error raised in a worker process prints a page
    of traceback.
    """

    def __init__(self, samples: Sequence[Sample], tokenizer, tokens_per_second: int, options: PromptOptions):
        self.samples, self.tokenizer, self.tokens_per_second = samples, tokenizer, tokens_per_second
        self.options = options

    def sample(self, item: BatchItem, offset: int = 0) -> Sample:
        """Return the sample of an item, or one behind it, as the item's turn sees it."""
        sample = self.samples[(item.index + offset) % len(self.samples)]
        return self.options.augmentation.choose(sample, item.turn)

    def __getitem__(self, item: BatchItem) -> Prompt | InputError:
        bad_media, options = "", self.options
        for offset in range(len(self.samples)):
            try:
                sample = whole = self.sample(item, offset)
                with noted(sample.id):
                    if options.max_prompt_length:
                        sample, _ = fit_prompt(whole, self.tokenizer, options)
                    how = options.media, options.augmentation, item.turn
                    prompt = load_prompt(sample, self.tokenizer, self.tokens_per_second, *how)
            except (BadMedia, FileNotFoundError, LongPrompt) as error:
                bad_media = bad_media or f"sample {sample.id!r}: {error}"
                choice = "on_long_prompt" if isinstance(error, LongPrompt) else "on_bad_video"
                if getattr(options, choice) != "skip":
                    return InputError(f"{bad_media}; mend this, or skip such samples with --{choice} skip")
            except InputError as error:  # the file of samples has changed, or a cache cannot be written
                return error
            except ValueError as error:
                return InputError(f"sample {sample.id!r}: {error}")
            else:
                prompt.position, prompt.is_padding = item.position, item.is_padding or bool(bad_media)
                if not item.is_padding:  # which repeats a sample of the same step, where its bad file is reported
                    prompt.bad_media = bad_media
                if not prompt.is_padding and (cut := len(whole.media) - len(sample.media)):
                    prompt.shortened = f"sample {sample.id!r}: its prompt is too long, and has {cut} videos fewer"
                return prompt
        return InputError(f"no sample can be used; the first error: {bad_media}")


def checked(batch: list[Prompt | InputError]) -> list[Prompt]:
    """Return a step's prompts, or raise the first error among them."""
    for item in batch:
        if isinstance(item, InputError):
            raise InputError(str(item))  # a new one: its traceback must not keep the batch, and so the workers, alive
    return batch


def load_ahead(dataset: Dataset, batches: Iterator[list], num_workers: int) -> Iterator[list]:
    """Yield each batch's items, such as a step's prompts, in order; worker processes, forked here, load some ahead.

    Workers must not garbage-collect objects inherited through the fork: destroying a process group would wait forever
    for threads that a fork does not copy. What is frozen while they fork is never collected in them.
    """
    Finalize(None, kill_workers, exitpriority=100)  # when this process ends
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=begin_worker,
        multiprocessing_context="fork" if num_workers else None,  # children that notice when their rank is killed
    )
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()


def begin_worker(worker: int) -> None:
    """In a worker, ignore the signals that stop a run, because it still needs prompts to finish its current step.

    Only the end of its rank ends it, at once: it would wait for someone to read what it has in its pipe, and hold the
    rank's connections open, by whose end the other ranks learn of it.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def kill_workers() -> None:
    """Kill the remaining workers when this process ends: Python would send SIGTERM, which they ignore, and hang.

    One that never got a batch would not even see that its queue is closed.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def note_place(pid: int) -> slice:
    """Return the place of a process's note."""
    at = pid % NUM_NOTES * NOTE_BYTES
    return slice(at, at + NOTE_BYTES)


@contextmanager
def noted(sample_id: str) -> Iterator[None]:
    """Note which sample this process decodes, for the line about its death."""
    place = note_place(os.getpid())
    NOTES[place] = repr(sample_id).encode()[:NOTE_BYTES].ljust(NOTE_BYTES, b"\0")
    try:
        yield
    finally:
        NOTES[place] = bytes(NOTE_BYTES)


def worker_failure(error: BaseException | None) -> str | None:
    """Return one line about a worker process that died, or None if the error is about something else.

    PyTorch raises the news wherever the main thread happens to be; code there may wrap it in an error of its own.
    """
    while error is not None:
        if found := re.search(r"DataLoader worker \(pid(?:\(s\))? ([0-9, ]+).*", " ".join(str(error).split())):
            notes = [NOTES[note_place(int(pid))].rstrip(b"\0").decode(errors="ignore") for pid in found[1].split(",")]
            samples = "".join(f". It was decoding sample {note}" for note in notes if note)
            mend = "If memory ran out, lower --dataloader_num_workers (0: none)"
            crash = "If a broken video crashed the decoder, python -m data.check names it"
            return f"{found[0].rstrip('.')}{samples}. {mend}. {crash}"
        error = error.__cause__ or error.__context__
    return None
