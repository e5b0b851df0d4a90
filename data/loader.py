"""Samples -> tensors, decoded by worker processes ahead of the loop, in an order that the seed alone decides.

| B | prompts on this rank in a step | P | prompt tokens | M | videos | S | vision patches |
"""

import atexit
import dataclasses
import gc
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.dataset import InputError, Sample
from data.prompt import encode_prompt
from data.video import BadVideo, VideoOptions, load_video


@dataclass
class Prompt:
    """One sample as the model sees it."""

    sample: Sample
    prompt_ids: Tensor  # (P,) token ids, the videos' placeholders included
    position_ids: Tensor  # (3, P) mRoPE positions
    pixel_values_videos: Tensor  # (S, 1176) patches of all videos
    video_grid_thw: Tensor  # (M, 3) patches per video along time, height, width
    second_per_grid_ts: Tensor  # (M,) seconds between patches along time
    vision_states: Tensor | None = None  # (S, hidden size of the tower): what a frozen one makes of the pixels
    slot: int = 0  # position in the step's global batch
    counts: bool = True  # False: only keeps this rank in step with the others, weighs nothing
    bad_video: str = ""  # why the sample meant for this slot was left out, if it was

    def to(self, device: torch.device) -> "Prompt":
        """Copy the tensors to `device`."""
        tensors = {name: v.to(device, non_blocking=True) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **tensors)


@dataclass(frozen=True)
class Slot:
    """Where in the step's global batch which sample goes."""

    position: int
    index: int
    counts: bool


def load_prompt(sample: Sample, tokenizer, tokens_per_second: int, options: VideoOptions) -> Prompt:
    """Decode the videos of a sample and encode its conversation; raise BadVideo naming the file."""
    patches, grids, seconds = zip(*(load_video(path, options) for path in sample.videos), strict=True)
    video_grid_thw, second_per_grid_ts = torch.tensor(grids), torch.tensor(seconds)
    prompt_ids, position_ids = encode_prompt(
        sample.turns, tokenizer, video_grid_thw, second_per_grid_ts, tokens_per_second
    )
    return Prompt(sample, prompt_ids, position_ids, torch.cat(patches), video_grid_thw, second_per_grid_ts)


class PromptDataset(Dataset):
    """Decoded prompts by slot.

    With `on_bad_video="skip"` a sample with an unreadable video is replaced by the next readable one, which does not
    count. What stops the run is returned, not raised, since an error raised in a worker arrives as a page of traceback.
    """

    def __init__(
        self, samples: list[Sample], tokenizer, tokens_per_second: int, options: VideoOptions, on_bad_video: str
    ):
        self.samples, self.tokenizer, self.tokens_per_second = samples, tokenizer, tokens_per_second
        self.options, self.on_bad_video = options, on_bad_video

    def __getitem__(self, slot: Slot) -> Prompt | InputError:
        bad_video = ""
        for offset in range(len(self.samples)):
            sample = self.samples[(slot.index + offset) % len(self.samples)]
            try:
                prompt = load_prompt(sample, self.tokenizer, self.tokens_per_second, self.options)
            except (BadVideo, FileNotFoundError) as error:
                bad_video = bad_video or f"sample {sample.id!r}: {error}"
                if self.on_bad_video == "error":
                    return InputError(f"{bad_video}; mend the file, or leave such samples out with --on_bad_video skip")
                continue
            except ValueError as error:
                return InputError(f"sample {sample.id!r}: {error}")
            counts = slot.counts and not bad_video
            # A slot that only keeps a rank in step repeats a sample, whose bad video is reported in its own place.
            bad_video = bad_video if slot.counts else ""
            return dataclasses.replace(prompt, slot=slot.position, counts=counts, bad_video=bad_video)
        return InputError(f"no sample has readable videos; the first: {bad_video}")


def checked(batch: list[Prompt | InputError]) -> list[Prompt]:
    """Return a step's prompts; raise the first error among them."""
    for item in batch:
        if isinstance(item, InputError):
            raise item
    return batch


def epoch_order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """Shuffle the sample indices, differently in every epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_samples, generator=generator).tolist()


def rank_slots(
    num_samples: int,
    global_batch_size: int,
    total_steps: int,
    seed: int,
    rank: int,
    world_size: int,
    first_step: int = 0,
) -> Iterator[list[Slot]]:
    """Yield this rank's slots of every step from `first_step` on, the number of steps that are done already.

    A step takes the next `global_batch_size` samples of the epoch, the last step of an epoch what remains. Every rank
    gets equally many slots, because sharded ranks must run equally many passes: where the samples do not suffice, some
    are repeated and do not count.
    """
    steps_per_epoch = -(-num_samples // global_batch_size)
    for step in range(first_step, total_steps):
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        if step_in_epoch == 0 or step == first_step:
            order = epoch_order(num_samples, seed, epoch)
        batch = order[step_in_epoch * global_batch_size :][:global_batch_size]
        slots = [Slot(position, index, counts=True) for position, index in enumerate(batch)]
        while len(slots) % world_size:
            slots.append(dataclasses.replace(slots[len(slots) - len(batch)], position=len(slots), counts=False))
        yield slots[rank::world_size]


def prompt_batches(dataset: PromptDataset, slots: Iterator[list[Slot]], num_workers: int) -> DataLoader:
    """Load each step's prompts in order, workers some steps ahead. Iterating gives list[Prompt | InputError]."""
    atexit.register(kill_workers)
    gc.collect()  # here, where its threads are, not in a worker
    return DataLoader(
        dataset,
        batch_sampler=slots,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=begin_worker,
        multiprocessing_context="fork" if num_workers else None,  # as children, they notice when their rank is killed
    )


def begin_worker(worker: int) -> None:
    """Let a worker outlive the signals that stop a run: they reach all processes, and the step needs its prompts.

    What it has inherited it must not collect: the end of a process group waits for threads that a fork leaves behind.
    """
    gc.freeze()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def kill_workers() -> None:
    """End the workers that are left when the program ends; Python would ask with a SIGTERM, and wait."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
