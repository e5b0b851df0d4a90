"""Everything that a run has before its first step: what is read and checked, models, optimizer, and its folder."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from data.epochs import Epochs, rank_batches
from data.loader import Prompt, PromptDataset, load_ahead, prompt_options
from data.prompt import load_tokenizer
from data.sample import InputError
from grpo.config import Config
from grpo.model.load import ModelFiles, SpecialTokens, load_model, processor_files, special_tokens
from grpo.model.lora import gather_adapter
from grpo.model.optimizer import components_table, make_optimizer
from grpo.model.sharding import Models, build_models
from grpo.ranks import broadcast_object, print_rank0, raise_together
from grpo.run import checkpoint
from grpo.run.batches import count_steps, resolve_batch_sizes
from grpo.run.lock import lock_folder
from grpo.run.preflight import memory_preflight
from grpo.run.resume import ResumeState, find_resume_state
from grpo.run.scoring import Scorer, load_scorer
from grpo.run.survey import check_same_on_all_ranks, survey
from grpo.run.tracking import Tracker
from reward.debug_log import log_path
from reward.zero_skill import zero_skill


@dataclass
class Run:
    """What the training loop works with."""

    config: Config  # with all batch sizes filled in
    epochs: Epochs
    total_steps: int
    dataset: PromptDataset
    heldout: PromptDataset | None  # with --eval_data_path
    scorer: Scorer
    zero_skill_reward: float | None  # on rank 0: the best mean reward of a constant answer to the samples
    tokens: SpecialTokens
    models: Models
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    resume: ResumeState  # rank 0's

    def batches(self) -> Iterator[list[Prompt | InputError]]:
        """Yield this rank's prompts of each step that is left, decoded ahead."""
        steps = {"total_steps": self.total_steps, "start_step": self.resume.step}
        ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
        batches = rank_batches(self.epochs, self.config.global_batch_size, **steps, **ranks)
        return load_ahead(self.dataset, batches, self.config.dataloader_num_workers)

    def save(self, tracker: Tracker, name: str, step: int, is_needed: bool = True) -> bool:
        """Write the trained model, or its adapters; a checkpoint also holds what resuming needs. Collective."""
        config, policy = self.config, self.models.policy
        trained = gather_adapter(policy, config) if config.lora_enable else self.models.sampling.sync(policy)
        state = {} if name in ("final", "best") else checkpoint.trainer_state(policy, self.optimizer)
        progress = self.resume.metadata | {"step": step} | tracker.state()
        files = ModelFiles(trained, self.tokens.tokenizer, processor_files(config.model_id))
        return checkpoint.save(config, name, files, state, progress, is_needed)


def start(config: Config, device: torch.device, rollout_phase: Callable, update_phase: Callable) -> Run | None:
    """Load, check and print everything that comes before the first step; None if the run is complete already.

    rollout_phase, update_phase: those of train.py, to try whether a step of full length fits into memory. Collective;
    raises InputError.
    """
    config = raise_together(resolve_batch_sizes, config, dist.get_world_size())
    if os.path.isdir(config.model_id):  # what is saved names it, and may be read from another folder
        config = replace(config, model_id=os.path.abspath(config.model_id))
    tokenizer = raise_together(load_tokenizer, config.model_id)
    data = raise_together(survey, config.data_path, config, True, tokenizer if config.supervised else None)
    heldout = raise_together(survey, config.eval_data_path, config) if config.eval_data_path else None
    found = [data, heldout] if heldout else [data]
    scorer = raise_together(load_training_scorer, config, [key for one in found for key in one.keys])
    check_same_on_all_ranks(*found, functions=scorer.functions)
    epochs = Epochs(data.samples.sizes, config.seed, config.data_weights)
    total_steps = count_steps(config, len(epochs))
    if broadcast_object(os.path.isdir(config.output_dir)):
        raise_together(take_folders, config)  # what is in it does not change from here on
    resume = broadcast_object(raise_together(find_resume_state, config, epochs, data, heldout, scorer))
    if resume.is_complete:
        print_rank0(*resume.messages)
        return None
    is_wanted = dist.get_rank() == 0 and not config.supervised
    constant = raise_together(
        lambda: is_wanted and zero_skill(scorer.functions, data.samples, data.truths, scorer.keys)
    )
    models = build_models(raise_together(load_initial_model, config), config, device)
    raise_together(take_folders, config)
    optimizer, schedule = make_optimizer(models.policy, config, total_steps)
    read_by = tokenizer, models.policy.config.vision_config.tokens_per_second
    run = Run(
        config=config,
        epochs=epochs,
        total_steps=total_steps,
        dataset=PromptDataset(data.samples, *read_by, prompt_options(config, is_training=True)),
        heldout=PromptDataset(heldout.samples, *read_by, prompt_options(config)) if heldout else None,
        scorer=scorer,
        zero_skill_reward=constant.reward if constant else None,
        tokens=special_tokens(models.policy, tokenizer, device),
        models=models,
        optimizer=optimizer,
        schedule=schedule,
        resume=resume,
    )
    if config.memory_preflight or (config.memory_preflight is None and device.type == "cuda"):
        print_rank0(memory_preflight(run, rollout_phase, update_phase))
    checkpoint.load(resume.folder, resume.step, models.policy, optimizer, schedule)
    workers, threads = config.dataloader_num_workers, run.dataset.options.media.threads
    print_rank0(
        f"{len(data.samples)} samples, {total_steps} steps of {config.global_batch_size} prompts",
        f"{workers} data workers per rank, each of which decodes {threads} videos at a time",
        *([str(constant)] if constant else []),
        *components_table(models.policy, config).splitlines(),
        *resume.messages,
    )
    return run


def load_training_scorer(config: Config, keys: list[str]) -> Scorer:
    """Load the reward functions of a run; raise InputError, also for those of the whole step where they have no say."""
    scorer = load_scorer(config, keys)
    weighted = [function for function in scorer.functions if function.weight]
    together = [function.name for function in weighted if function.is_whole_step]
    if together and config.global_batch_size == 1 and not config.supervised:
        raise InputError(f"--global_batch_size 1: reward function {together[0]} compares a step's prompts: take more")
    if config.metric_for_best_model == "eval/reward" and len(together) == len(weighted):
        raise InputError(
            "--metric_for_best_model eval/reward: functions of the whole step have no say in evaluations: take another"
        )
    return scorer


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
    return load_model(config.model_id) if dist.get_rank() == 0 else None
