"""Load and check all that a run needs, before anything is trained or written."""

import os

import torch.distributed as dist

from data.dataset import InputError, load_samples
from data.prompt import check_text, load_tokenizer
from data.video_cap import cap_all
from grpo.config import Config, resolve_batch_sizes
from grpo.model.load import load_model
from grpo.model.lora import layers_to_adapt
from grpo.run.resume import find_start
from reward.numerical import numerical_video_reward


def load_inputs(config: Config) -> tuple:
    """Load and check what a run needs; return the resolved flags, the capped samples, how many were cut, where the run
    begins, the tokenizer and, on rank 0, the model."""
    config = resolve_batch_sizes(config, dist.get_world_size())
    samples, num_cut = cap_all(load_samples(config.data_path, config.image_folder), config.max_videos)
    for sample in samples:
        try:
            check_text(sample.turns)
        except ValueError as error:
            raise InputError(f"sample {sample.id!r}: {error}") from error
    try:
        start = find_start(config, samples)
    except OSError as error:
        raise InputError(
            f"--output_dir {config.output_dir!r} cannot be read ({error.strerror}): name another"
        ) from error
    tokenizer = load_tokenizer(config.model_id)
    model = load_model(config.model_id) if dist.get_rank() == 0 else None  # `make_trainable` spreads it
    if config.lora_enable and model is not None:
        layers_to_adapt(model, config)  # there must be some
    try:
        numerical_video_reward([], [])  # opens its debug log, if one is wanted
        os.makedirs(config.output_dir, exist_ok=True)
    except OSError as error:
        raise InputError(f"{error.filename!r} cannot be written ({error.strerror}): name another place") from error
    if not os.access(config.output_dir, os.W_OK):
        raise InputError(f"--output_dir {config.output_dir!r} cannot be written: name another folder")
    return config, samples, num_cut, start, tokenizer, model
