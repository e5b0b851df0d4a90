"""Everything that a run has before its first step: models, optimizer, data, and where it is written."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch.utils.data import ConcatDataset

from data.epochs import rank_batches
from data.loader import Prompt, PromptDataset, load_ahead, prompt_options
from data.sample import InputError
from grpo.config import Config
from grpo.model.load import ModelFiles, SpecialTokens, processor_files, special_tokens
from grpo.model.lora import gather_adapter
from grpo.model.optimizer import components_table, make_optimizer
from grpo.model.sharding import Models, build_models
from grpo.ranks import broadcast_object, print_rank0, raise_together
from grpo.run import checkpoint
from grpo.run.batches import count_steps
from grpo.run.inputs import Inputs, load_initial_model, load_inputs, take_folders
from grpo.run.preflight import memory_preflight, trial_step
from grpo.run.survey import check_same_on_all_ranks
from grpo.run.tracking import Tracker


@dataclass
class Run:
    """What the training loop works with."""

    inputs: Inputs
    total_steps: int
    dataset: PromptDataset
    heldout: PromptDataset | None
    tokens: SpecialTokens
    models: Models
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def batches(self) -> Iterator[list[Prompt | InputError]]:
        """Yield this rank's prompts of each step that is left, decoded ahead."""
        config, ranks = self.inputs.config, {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
        steps = {"total_steps": self.total_steps, "start_step": self.inputs.resume.step}
        batches = rank_batches(self.inputs.epochs, config.global_batch_size, **steps, **ranks)
        return load_ahead(self.dataset, batches, config.dataloader_num_workers)

    def save(self, tracker: Tracker, name: str, step: int, is_needed: bool = True) -> bool:
        """Write the trained model, or its adapters; a checkpoint also holds what resuming needs. Collective."""
        config, policy = self.inputs.config, self.models.policy
        trained = gather_adapter(policy, config) if config.lora_enable else self.models.sampling.sync(policy)
        state = {} if name in ("final", "best") else checkpoint.trainer_state(policy, self.optimizer)
        progress = self.inputs.resume.metadata | {"step": step} | tracker.state()
        files = ModelFiles(trained, self.inputs.tokenizer, processor_files(config.model_id))
        return checkpoint.save(config, name, files, state, progress, is_needed)


def start(config: Config, device: torch.device, rollout_phase: Callable, update_phase: Callable) -> Run | None:
    """Load, check and print everything that comes before the first step; None if the run is complete already.

    rollout_phase, update_phase: those of train.py, to try whether a step of full length fits into memory. Collective;
    raises InputError.
    """
    inputs = raise_together(load_inputs, config)
    config, data, heldout = inputs.config, inputs.data, inputs.heldout
    check_same_on_all_ranks(*filter(None, (data, heldout)), functions=inputs.scorer.functions)
    inputs = replace(inputs, resume=broadcast_object(inputs.resume))
    resume = inputs.resume
    if resume.is_complete:
        print_rank0(*resume.messages)
        return None
    initial = raise_together(load_initial_model, config)
    raise_together(take_folders, config)
    models = build_models(initial, config, device)
    del initial  # free the copy on rank 0
    tokens = special_tokens(models.policy, inputs.tokenizer, device)
    total_steps = count_steps(config, len(inputs.epochs))
    optimizer, schedule = make_optimizer(models.policy, config, total_steps)

    def dataset(samples, is_training: bool) -> PromptDataset:
        tokens_per_second = models.policy.config.vision_config.tokens_per_second
        return PromptDataset(samples, inputs.tokenizer, tokens_per_second, prompt_options(config, is_training))

    if config.memory_preflight or (config.memory_preflight is None and device.type == "cuda"):
        everyone = ConcatDataset([data.samples, heldout.samples]) if heldout else data.samples
        step_on = partial(trial_step, rollout_phase, update_phase, models, optimizer, tokens, config)
        print_rank0(memory_preflight(dataset(everyone, True), optimizer, config, step_on))
    checkpoint.load(resume.folder, resume.step, models.policy, optimizer, schedule)
    print_rank0(f"{len(data.samples)} samples, {total_steps} steps of {config.global_batch_size} prompts")
    print_rank0(*inputs.messages, *components_table(models.policy, config).splitlines(), *resume.messages)
    return Run(
        inputs=inputs,
        total_steps=total_steps,
        dataset=dataset(data.samples, True),
        heldout=dataset(heldout.samples, False) if heldout else None,
        tokens=tokens,
        models=models,
        optimizer=optimizer,
        schedule=schedule,
    )
