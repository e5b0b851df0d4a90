"""Batch sizes that complete each other, and the number of steps."""

import dataclasses
import math

from data.sample import InputError
from grpo.config import Config


def count_steps(config: Config, num_samples: int) -> int:
    """Return the steps of the whole run: --max_steps, or as many as the epochs take."""
    steps_per_epoch = math.ceil(num_samples / config.global_batch_size)
    return config.max_steps or math.ceil(config.num_train_epochs * steps_per_epoch)


def resolve_batch_sizes(config: Config, world_size: int) -> Config:
    """Fill in the batch sizes that were left out: global = per device x ranks x accumulation.

    Raise InputError that says the arithmetic when the given ones contradict each other.
    """
    total, device = config.global_batch_size, config.per_device_train_batch_size
    accumulation = config.gradient_accumulation_steps
    given = {"--per_device_train_batch_size": device, "--gradient_accumulation_steps": accumulation}
    factors = [f"{world_size} rank" + "s" * (world_size > 1), *(f"{name} {n}" for name, n in given.items() if n)]
    product = world_size * (device or 1) * (accumulation or 1)
    total = total or product
    if total % product or (device and accumulation and total != product):
        relation = "equal to" if device and accumulation else "a multiple of"
        arithmetic = f"{product} = {' x '.join(factors)}" if len(factors) > 1 else factors[0]
        raise InputError(f"--global_batch_size {total} is not {relation} {arithmetic}: change it, or leave it out")
    device, of_a_rank = device or total // product, total // world_size
    return dataclasses.replace(
        config,
        global_batch_size=total,
        per_device_train_batch_size=device,
        gradient_accumulation_steps=of_a_rank // device,
        per_device_generation_batch_size=config.per_device_generation_batch_size or of_a_rank,
    )
