"""Which samples a step takes, fixed by the seed alone: the same on any number of ranks, and after a resume.

| n | samples | B | prompts on this rank in a step |
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

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

    def order(self, epoch: int) -> Tensor:
        """Return the indices of an epoch's samples, (n,), shuffled differently in every epoch."""
        shuffled = permutation(len(self), self.seed * 1_000_003 + epoch)
        return torch.cat(self.taken(epoch))[shuffled] if self.weights else shuffled

    def taken(self, epoch: int) -> list[Tensor]:
        """Return the indices of the samples that an epoch takes from each file.

        Each file gives its samples in turn, in an order that is drawn anew whenever all have been taken: with a weight
        of 0.25 all are seen in every four epochs, and with 1.5 twice in two.
        """
        found, first = [], 0
        for number, (size, share) in enumerate(zip(self.sizes, self.shares, strict=True)):
            begin, end = epoch * share, (epoch + 1) * share
            turns = [
                permutation(size, random.Random(f"{self.seed} {number} {turn}").getrandbits(63))
                for turn in range(begin // size, -(-end // size))
            ]
            found.append(first + torch.cat(turns)[begin % size :][:share])
            first += size
        return found


def permutation(n: int, seed: int) -> Tensor:
    """Return the numbers below n in an order that the seed decides."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class BatchItem:
    """Assigns a sample to a position of the step's global batch."""

    position: int
    index: int  # of the sample
    is_padding: bool = False
    epoch: int = 0


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
            order = epochs.order(epoch)
        batch = order[step_in_epoch * global_batch_size :][:global_batch_size].tolist()
        items = [BatchItem(position, index, epoch=epoch) for position, index in enumerate(batch)]
        while len(items) % world_size:
            repeated = items[len(items) - len(batch)].index
            items.append(BatchItem(len(items), repeated, is_padding=True, epoch=epoch))
        yield items[rank::world_size]
