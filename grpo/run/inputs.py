"""Load and check everything that a run needs, before anything is trained or written."""

import os
from dataclasses import dataclass

import torch.distributed as dist

from data.dataset import InputError, Sample, load_samples, with_system_prompt
from data.prompt import check_text, load_tokenizer
from data.video_cap import cap_videos, even, first
from grpo.config import Config, media_options, resolve_batch_sizes
from grpo.model.load import load_model
from grpo.model.lora import layers_to_adapt
from grpo.run.lock import lock_folder
from grpo.run.resume import ResumeState, find_resume_state
from grpo.run.scoring import Scorer, load_scorer
from reward.extract import extract_number
from reward.numerical import append_to_log
from reward.zero_skill import ZeroSkill, zero_skill


@dataclass
class Inputs:
    """Everything that a run starts from."""

    config: Config  # with all batch sizes filled in
    samples: list[Sample]  # capped
    heldout: list[Sample]  # capped; empty without --eval_data_path
    scorer: Scorer
    zero_skill: ZeroSkill | None  # of the samples, on rank 0
    tokenizer: object
    model: object  # unsharded, on rank 0; None on the others
    resume: ResumeState
    messages: list[str]  # lines about the samples, for the user


def load_capped_samples(path: str, config, messages: list[str], is_training: bool = False) -> list[Sample]:
    """Load samples, cap their videos, and put the system prompt before their conversations; raises InputError.

    Adds a line to `messages` if videos are left out. Where each epoch of the training samples sees other videos, they
    keep all; held-out samples then have those of the even choice.
    """
    caps = config.max_videos, config.max_images, first if config.video_cap == "first" else even
    whole = load_samples(path, config.image_folder)
    samples = [cap_videos(sample, *caps) for sample in whole]
    num_cut = sum(len(new.media) < len(old.media) for new, old in zip(samples, whole, strict=True))
    if is_training and config.video_cap == "random":
        samples = [cap_videos(sample, 0, config.max_images, even) for sample in whole]
    samples = [with_system_prompt(sample, config.system_prompt) for sample in samples]
    if num_cut:
        each = " of each epoch" if is_training and config.video_cap == "random" else ""
        messages.append(
            f"{path!r}: {num_cut} samples have more than --max_videos {config.max_videos} videos or --max_images "
            f"{config.max_images} images: the rest is left out{each}"
        )
    for sample in samples:
        try:
            check_text(sample.turns)
        except ValueError as error:
            raise InputError(f"sample {sample.id!r}: {error}") from error
    return samples


def check_truths(samples: list[Sample], flag: str, path: str, valid_range: list[float], messages: list[str]) -> None:
    """Raise InputError if no truth has a number; add a line to `messages` if some are outside the range."""
    if all(extract_number(sample.answer) is None for sample in samples):
        raise InputError(f"{flag} {path!r}: no answer in it contains a number")
    note_truths_outside(samples, path, valid_range, messages)


def note_truths_outside(samples: list[Sample], path: str, valid_range: list[float], messages: list[str]) -> None:
    """Add a line to `messages` if truths are outside the range."""
    numbers = [number for sample in samples if (number := extract_number(sample.answer)) is not None]
    outside = [number for number in numbers if not valid_range[0] <= number <= valid_range[1]]
    if outside:
        given = " ".join(f"{bound:g}" for bound in valid_range)
        messages.append(
            f"{path!r}: {len(outside)} truths, such as {outside[0]:g}, are outside --valid_range {given}, so that no "
            "answer to them can be right: set it to the range of the truths"
        )


def load_inputs(config: Config) -> Inputs:
    """Load and check what a run needs; raise InputError."""
    config = resolve_batch_sizes(config, dist.get_world_size())
    threads = media_options(config).threads
    messages = [
        f"{config.dataloader_num_workers} data workers per rank, each of which decodes {threads} videos at a time"
    ]
    samples = load_capped_samples(config.data_path, config, messages, is_training=True)
    heldout = load_capped_samples(config.eval_data_path, config, messages) if config.eval_data_path else []
    if heldout:
        check_truths(heldout, "--eval_data_path", config.eval_data_path, config.valid_range, messages)
    note_truths_outside(samples, config.data_path, config.valid_range, messages)
    scorer = load_scorer(config, samples + heldout)
    check_scorer(scorer, config)
    is_main, output = dist.get_rank() == 0, config.output_dir
    if is_main and os.path.isdir(output):
        lock_folder(output)  # what is in it must not change from here on
    try:
        resume = find_resume_state(config, samples, heldout, scorer)
    except OSError as error:
        raise InputError(f"--output_dir {output!r} cannot be read ({error.strerror}): name another") from error
    tokenizer = load_tokenizer(config.model_id)
    model = load_model(config.model_id) if is_main else None  # `build_models` shards it over all ranks
    if config.lora_enable and model is not None:
        layers_to_adapt(model, config)  # raises InputError if there are none
    try:
        append_to_log([])  # the log for debugging, if one is wanted, must be writable
        os.makedirs(output, exist_ok=True)
    except OSError as error:
        raise InputError(f"{error.filename!r} cannot be written ({error.strerror}): name another place") from error
    if config.frame_cache:
        try:
            os.makedirs(config.frame_cache, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--frame_cache {config.frame_cache!r} cannot be written ({error.strerror}): name another place"
            ) from error
    if not os.access(output, os.W_OK):
        raise InputError(f"--output_dir {output!r} cannot be written: name another folder")
    if is_main:
        lock_folder(output)
    found = zero_skill(scorer.functions, samples, scorer.keys) if is_main and not resume.is_complete else None
    messages += [str(found)] if found else []
    return Inputs(config, samples, heldout, scorer, found, tokenizer, model, resume, messages)


def check_scorer(scorer: Scorer, config: Config) -> None:
    """Raise InputError where functions of the whole step have nothing to compare, or evaluations no reward."""
    together = [function for function in scorer.functions if function.is_whole_step and function.weight]
    if together and config.global_batch_size == 1:
        raise InputError(
            f"--global_batch_size 1: reward function {together[0].name} compares the prompts of a step: take more"
        )
    if config.metric_for_best_model == "eval/reward" and all(function.is_whole_step for function in scorer.functions):
        raise InputError(
            "--metric_for_best_model eval/reward: functions of the whole step have no say in evaluations: take another"
        )
