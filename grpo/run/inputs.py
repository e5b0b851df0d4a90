"""Load and check everything that a run needs, before anything is trained or written."""

import os
from dataclasses import dataclass

import torch.distributed as dist

from data.epochs import Epochs
from data.loader import prompt_options
from data.prompt import load_tokenizer
from data.sample import InputError
from grpo.config import Config
from grpo.model.load import load_model
from grpo.model.lora import layers_to_adapt
from grpo.run.batches import resolve_batch_sizes
from grpo.run.lock import lock_folder
from grpo.run.resume import ResumeState, find_resume_state
from grpo.run.scoring import Scorer, load_scorer
from grpo.run.survey import Survey, check_truths, note_truths_outside, survey
from reward.numerical import log_path
from reward.zero_skill import ZeroSkill, zero_skill


@dataclass
class Inputs:
    """Everything that a run starts from."""

    config: Config  # with all batch sizes filled in
    data: Survey
    heldout: Survey | None  # with --eval_data_path
    epochs: Epochs
    scorer: Scorer
    zero_skill: ZeroSkill | None  # of the samples, on rank 0
    tokenizer: object
    model: object  # unsharded, on rank 0; None on the others
    resume: ResumeState
    messages: list[str]  # lines about the samples, for the user


def load_inputs(config: Config) -> Inputs:
    """Load and check what a run needs; raise InputError."""
    config = resolve_batch_sizes(config, dist.get_world_size())
    threads = prompt_options(config).media.threads
    messages = [
        f"{config.dataloader_num_workers} data workers per rank, each of which decodes {threads} videos at a time"
    ]
    data = survey(config.data_path, config, messages, is_training=True)
    heldout = survey(config.eval_data_path, config, messages) if config.eval_data_path else None
    if heldout:
        check_truths(heldout, "--eval_data_path", config.eval_data_path, config.valid_range, messages)
    note_truths_outside(data, config.data_path, config.valid_range, messages)
    scorer = load_scorer(config, data.keys + (heldout.keys if heldout else []))
    epochs = Epochs(data.samples.sizes, config.seed, config.data_weights)
    check_scorer(scorer, config)
    is_main, output = dist.get_rank() == 0, config.output_dir
    if is_main and os.path.isdir(output):
        lock_folder(output)  # what is in it must not change from here on
    try:
        resume = find_resume_state(config, epochs, data, heldout, scorer)
    except OSError as error:
        raise InputError(f"--output_dir {output!r} cannot be read ({error.strerror}): name another") from error
    tokenizer = load_tokenizer(config.model_id)
    model = load_model(config.model_id) if is_main else None  # `build_models` shards it over all ranks
    if config.lora_enable and model is not None:
        layers_to_adapt(model, config)  # raises InputError if there are none
    try:
        if log := log_path():
            open(log, "ab").close()  # the log for debugging, if one is wanted, must be writable
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
    is_shown = is_main and not resume.is_complete
    found = zero_skill(scorer.functions, data.samples, data.truths, scorer.keys) if is_shown else None
    messages += [str(found)] if found else []
    return Inputs(config, data, heldout, epochs, scorer, found, tokenizer, model, resume, messages)


def check_scorer(scorer: Scorer, config: Config) -> None:
    """Raise InputError where functions of the whole step have nothing to compare, or evaluations no reward."""
    together = [function for function in scorer.functions if function.is_whole_step and function.weight]
    if together and config.global_batch_size == 1:
        raise InputError(
            f"--global_batch_size 1: reward function {together[0].name} compares the prompts of a step: take more"
        )
    has_say = any(function.weight and not function.is_whole_step for function in scorer.functions)
    if config.metric_for_best_model == "eval/reward" and not has_say:
        raise InputError(
            "--metric_for_best_model eval/reward: functions of the whole step have no say in evaluations: take another"
        )
