"""Everything that a run has before its first step: models, optimizer, data, and where it is written."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch.utils.data import ConcatDataset

from data.epochs import Epochs, rank_batches
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
from grpo.run.inputs import load_inputs
from grpo.run.preflight import memory_preflight
from grpo.run.resume import ResumeState
from grpo.run.scoring import Scorer
from grpo.run.survey import check_same_on_all_ranks
from grpo.run.tracking import Tracker


@dataclass
class Run:
    """What the training loop works with."""

    config: Config  # with all batch sizes filled in
    resume: ResumeState
    total_steps: int
    epochs: Epochs
    dataset: PromptDataset
    heldout: PromptDataset | None
    scorer: Scorer
    tokenizer: object
    tokens: SpecialTokens
    models: Models
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    zero_skill_reward: float | None  # the best mean reward of a constant answer to the samples
    tracker: Tracker | None = None  # from `track` on

    def track(self) -> Tracker:
        """Begin to write curves and completions, after everything that may be refused. Collective."""
        self.tracker = Tracker(self.config, self.total_steps, self.resume, self.zero_skill_reward)
        return self.tracker

    def batches(self) -> Iterator[list[Prompt | InputError]]:
        """Yield this rank's prompts of each step that is left, decoded ahead."""
        ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
        size, first = self.config.global_batch_size, self.resume.step
        batches = rank_batches(self.epochs, size, self.total_steps, **ranks, start_step=first)
        return load_ahead(self.dataset, batches, self.config.dataloader_num_workers)

    def save(self, name: str, step: int, is_needed: bool = True) -> bool:
        """Write the trained model, or its adapters; a checkpoint also holds what resuming needs. Collective."""
        config, policy = self.config, self.models.policy
        trained = gather_adapter(policy, config) if config.lora_enable else self.models.sampling.sync(policy)
        state = {} if name in ("final", "best") else checkpoint.trainer_state(policy, self.optimizer)
        progress = self.resume.metadata | {"step": step} | self.tracker.state()
        files = ModelFiles(trained, self.tokenizer, processor_files(config.model_id))
        return checkpoint.save(config, name, files, state, progress, is_needed)


def start(config: Config, device: torch.device, trial_step: Callable) -> Run | None:
    """Load, check and print everything that comes before the first step; None if the run is complete already.

    trial_step: takes models, optimizer, tokens, config and prompts, and does a step of full length, to see whether it
    fits into memory. Collective; raises InputError.
    """
    inputs = raise_together(load_inputs, config)
    read = [inputs.data] + ([inputs.heldout] if inputs.heldout else [])
    check_same_on_all_ranks(*read, functions=inputs.scorer.functions)
    config, tokenizer = inputs.config, inputs.tokenizer
    samples, heldout_samples = inputs.data.samples, inputs.heldout and inputs.heldout.samples
    resume = broadcast_object(inputs.resume)
    if resume.is_complete:
        print_rank0(*resume.messages)
        return None
    models = build_models(inputs.model, config, device)
    inputs.model = None  # free the copy on rank 0
    policy, tokens = models.policy, special_tokens(models.policy, tokenizer, device)
    total_steps = count_steps(config, len(inputs.epochs))
    optimizer, schedule = make_optimizer(policy, config, total_steps)
    tokens_per_second = policy.config.vision_config.tokens_per_second
    options, varied = prompt_options(config), prompt_options(config, is_training=True)
    dataset = PromptDataset(samples, tokenizer, tokens_per_second, varied)
    heldout = PromptDataset(heldout_samples, tokenizer, tokens_per_second, options) if inputs.heldout else None
    if config.memory_preflight or (config.memory_preflight is None and device.type == "cuda"):
        both = ConcatDataset([samples, heldout_samples]) if heldout_samples else samples
        everyone = PromptDataset(both, tokenizer, tokens_per_second, varied)
        step_on = partial(trial_step, models, optimizer, tokens, config)
        print_rank0(memory_preflight(everyone, optimizer, config, step_on))
    checkpoint.load(resume.folder, resume.step, policy, optimizer, schedule)
    print_rank0(f"{len(samples)} samples, {total_steps} steps of {config.global_batch_size} prompts", *inputs.messages)
    print_rank0(*components_table(policy, config).splitlines(), *resume.messages)
    zero_skill = broadcast_object(inputs.zero_skill)
    parts = dataset, heldout, inputs.scorer, tokenizer, tokens, models, optimizer, schedule
    return Run(config, resume, total_steps, inputs.epochs, *parts, zero_skill.reward if zero_skill else None)
