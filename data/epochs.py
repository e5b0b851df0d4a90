"""Which samples a step takes, fixed by the seed alone: the same on any number of ranks, and after a resume.

| n | samples | B | prompts on this rank in a step |
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Epochs:
    """The order of the samples in every epoch."""

    sizes: list[int]  # samples of each file
    seed: int
    weights: list[float] = ()  # how often an epoch sees the samples of each file; none: once

    def __len__(self) -> int:
        """The number of samples in an epoch."""
        return sum(self.shares)

    @property
    def shares(self) -> list[int]:
        """How many samples an epoch takes from each file, at least one."""
        weights = self.weights or [1] * len(self.sizes)
        return [max(1, round(weight * size)) for weight, size in zip(weights, self.sizes, strict=True)]

    def order(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the indices of an epoch's samples, (n,), shuffled differently in every epoch, and each one's turn.

        The turn of a sample is how many times it was taken before: without weights the number of the epoch.
        """
        shuffled = permutation(len(self), self.seed * 1_000_003 + epoch)
        if not self.weights:
            return shuffled, torch.full_like(shuffled, epoch)
        indices, turns = (torch.cat(parts) for parts in zip(*self.taken(epoch), strict=True))
        return indices[shuffled], turns[shuffled]

    def taken(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the indices and turns of the samples that an epoch takes from each file.

        A file gives them from an endless repetition of all its samples in one random order: with a weight of 0.25
        other ones in each of four epochs, and with 1.5 all of them three times in two.
        """
        first = 0
        for number, (size, share) in enumerate(zip(self.sizes, self.shares, strict=True)):
            order = permutation(size, random.Random(f"{self.seed} {number}").getrandbits(63))
            places = torch.arange(epoch * share, (epoch + 1) * share)
            yield first + order[places % size], places // size
            first += size


def permutation(n: int, seed: int) -> Tensor:
    """Return the numbers below n in an order that the seed decides."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class BatchItem:
    """Assigns a sample to a position of the step's global batch."""

    position: int
    index: int  # of the sample
    is_padding: bool = False
    turn: int = 0  # how many times the run has taken this sample before


def rank_batches(
    epochs: Epochs, global_batch_size: int, total_steps: int, *, rank: int, world_size: int, start_step: int = 0
) -> Iterator[list[BatchItem]]:
    """Yield this rank's part of each step's batch, B items, from step number `start_step` (counted from 0) on.

    A step takes the next `global_batch_size` samples of the epoch; the last step of an epoch takes those that remain.
    Every rank gets the same number of items, because sharded ranks must run the same number of forward passes: if
    there are too few samples, some are repeated as padding.
    """
    steps_per_epoch = -(-len(epochs) // global_batch_size)
    for step in range(start_step, total_steps):
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        if step_in_epoch == 0 or step == start_step:
            order, turns = epochs.order(epoch)
        here = slice(step_in_epoch * global_batch_size, (step_in_epoch + 1) * global_batch_size)
        batch = zip(order[here].tolist(), turns[here].tolist(), strict=True)
        items = [BatchItem(position, index, turn=turn) for position, (index, turn) in enumerate(batch)]
        num_items = len(items)
        while len(items) % world_size:
            repeated = items[len(items) - num_items]
            items.append(replace(repeated, position=len(items), is_padding=True))
        yield items[rank::world_size]
