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
from grpo.run.survey import Survey, survey
from reward.debug_log import log_path
from reward.zero_skill import zero_skill


@dataclass
class Inputs:
    """Everything that a run starts from, but the model."""

    config: Config  # with all batch sizes filled in
    data: Survey
    heldout: Survey | None  # with --eval_data_path
    epochs: Epochs
    scorer: Scorer
    tokenizer: object
    resume: ResumeState  # rank 0's counts
    zero_skill_reward: float | None  # on rank 0: the best mean reward of a constant answer to the samples
    messages: list[str]  # lines about the samples, for the user


def load_inputs(config: Config) -> Inputs:
    """Load and check what a run needs; raise InputError."""
    config = resolve_batch_sizes(config, dist.get_world_size())
    workers, threads = config.dataloader_num_workers, prompt_options(config).media.threads
    messages = [f"{workers} data workers per rank, each of which decodes {threads} videos at a time"]
    tokenizer = load_tokenizer(config.model_id)
    answers = tokenizer if config.supervised else None
    data = survey(config.data_path, config, messages, is_training=True, tokenizer=answers)
    heldout = survey(config.eval_data_path, config, messages) if config.eval_data_path else None
    scorer = load_scorer(config, data.keys + (heldout.keys if heldout else []))
    check_scorer(scorer, config)
    epochs = Epochs(data.samples.sizes, config.seed, config.data_weights)
    if os.path.isdir(config.output_dir):
        take_folders(config)  # what is in it does not change from here on
    resume = find_resume_state(config, epochs, data, heldout, scorer)
    is_wanted = dist.get_rank() == 0 and not (resume.is_complete or config.supervised)
    found = zero_skill(scorer.functions, data.samples, data.truths, scorer.keys) if is_wanted else None
    messages += [str(found)] if found else []
    reward = found.reward if found else None
    return Inputs(config, data, heldout, epochs, scorer, tokenizer, resume, reward, messages)


def check_scorer(scorer: Scorer, config: Config) -> None:
    """Raise InputError where functions of the whole step have nothing to compare, or evaluations no reward."""
    weighted = [function for function in scorer.functions if function.weight]
    together = [function.name for function in weighted if function.is_whole_step]
    if together and config.global_batch_size == 1 and not config.supervised:
        raise InputError(f"--global_batch_size 1: reward function {together[0]} compares a step's prompts: take more")
    if config.metric_for_best_model == "eval/reward" and len(together) == len(weighted):
        raise InputError(
            "--metric_for_best_model eval/reward: functions of the whole step have no say in evaluations: take another"
        )


def take_folders(config: Config) -> None:
    """Make the folders that a run writes to, and lock its own; raise InputError if it cannot write there.

    A new folder is made at last, so that what is refused before leaves none.
    """
    try:
        if log := log_path():
            open(log, "ab").close()  # the rewards' log for debugging, if one is wanted
        for folder in filter(None, (config.output_dir, config.frame_cache)):
            os.makedirs(folder, exist_ok=True)
        if dist.get_rank() == 0:
            lock_folder(config.output_dir)
    except OSError as error:
        raise InputError(f"{str(error.filename)!r} cannot be written ({error.strerror}): name another place") from error


def load_initial_model(config: Config):
    """Load the model on rank 0, which hands it to the others (`build_models`); None on these. Raises InputError."""
    if dist.get_rank() != 0:
        return None
    model = load_model(config.model_id)
    if config.lora_enable:
        layers_to_adapt(model, config)  # raises InputError if there are none
    return model
