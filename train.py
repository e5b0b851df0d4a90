"""GRPO for Qwen2.5-VL on samples with many videos and a numerical answer. The algorithm, top to bottom.

    python train.py --demo                                        a whole run on this machine, nothing needed
    torchrun --nproc_per_node 8 train.py --model_id … --data_path … --output_dir …

One step, for a batch of prompts:

    sample G completions per prompt         grpo/rollout.py         videos encoded once, prompt prefilled once
    score them                              reward/numerical.py
    advantage: the reward, normalised       grpo/loss.py            within its group
    log-probabilities of the completions    grpo/logprobs.py        one packed pass per prompt
    clipped loss, backward                  grpo/loss.py            divided by the tokens of all ranks
    clip the gradient, step

Each rank samples the whole groups of its own prompts. What is sampled is a function of the weights and of (seed, step,
place in the batch): neither the number of ranks nor what a rank did before changes it.
"""

import hashlib
import math
import os
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm

from data.dataset import InputError, load_samples
from data.loader import Prompt, PromptDataset, prompt_batches, rank_slots
from data.prompt import check_text
from data.video_cap import cap_all
from grpo import demo
from grpo.config import Config, parse_config, resolve_batch_sizes, video_options
from grpo.lora import add_adapters, gather_adapter, layers_to_adapt
from grpo.loss import clipped_policy_loss, group_advantages
from grpo.model import (
    SpecialTokens,
    freeze,
    load_model,
    load_tokenizer,
    parameter_groups,
    processor_files,
    save_model,
    special_tokens,
    table_of_parts,
)
from grpo.rollout import Rollout, generate
from grpo.sharding import WholeWeights, raise_together, shard, start_processes
from grpo.tracking import Clock, Tracker, gather_groups, update_metrics
from reward.numerical import numerical_video_reward

REWARD_FUNCTIONS = [numerical_video_reward]  # a completion's reward is their sum


def batched(items: list, size: int) -> Iterator[list]:
    """Cut a list into pieces of `size`; `--per_device_train_batch_size` prompts pass through the model at a time."""
    return (items[i : i + size] for i in range(0, len(items), size))


def rollout_phase(model, prompts: list[Prompt], tokens: SpecialTokens, config: Config, step: int) -> list[Rollout]:
    """Sample a group for every prompt of this rank, with whole weights and without waiting for other ranks."""
    rollouts = []
    for batch in batched(prompts, config.per_device_train_batch_size):
        generators = []
        for prompt in batch:
            digest = hashlib.sha256(f"{config.seed} {step} {prompt.slot}".encode()).digest()
            generators.append(torch.Generator(tokens.device).manual_seed(int.from_bytes(digest[:8], "big") >> 1))
        rollouts += generate(
            model,
            [prompt.to(tokens.device) for prompt in batch],
            config.num_generations,
            config.max_completion_length,
            config.temperature,
            tokens.stop_ids,
            tokens.banned_ids,
            generators,
        )
    return rollouts


def score(rollouts: list[Rollout], texts: list[str], step: int) -> dict[str, Tensor]:
    """Apply every reward function to all completions of this rank; texts: B·G. Returns {function name: (B, G)}."""
    B, G = len(rollouts), len(texts) // len(rollouts)
    samples = [rollout.prompt.sample for rollout in rollouts for _ in range(G)]
    arguments = {
        "prompts": [[{"role": role, "content": text} for role, text in sample.turns] for sample in samples],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "assistant": [{"role": "assistant", "content": sample.answer} for sample in samples],
        "sample_id": [sample.id for sample in samples],
        "step": step,
    }
    rewards = {function.__name__: function(**arguments) for function in REWARD_FUNCTIONS}
    return {name: torch.tensor(values, dtype=torch.float32).view(B, G) for name, values in rewards.items()}


def update_phase(
    model, optimizer, rollouts: list[Rollout], advantages: Tensor, num_tokens: int, banned_ids: Tensor, config: Config
) -> dict[str, float]:
    """Improve the policy on one batch of rollouts; advantages: (B, G). Returns the metrics of all ranks."""
    sums, difference_max = advantages.new_zeros(5), advantages.new_zeros(())
    old_logprobs = []  # per rollout: (G, C)
    for iteration in range(config.num_iterations):
        optimizer.zero_grad()
        for indices in batched(range(len(rollouts)), config.per_device_train_batch_size):
            batch = [rollouts[b] for b in indices]
            results = model.completion_logprobs(
                [rollout.prompt for rollout in batch],
                [rollout.completion_ids for rollout in batch],
                [rollout.completion_mask for rollout in batch],
                config.temperature,
                banned_ids,
            )
            loss_sum = 0.0
            for b, rollout, (logprobs, entropy) in zip(indices, batch, results, strict=True):
                if iteration == 0:  # the weights are those that sampled, so the ratio is exactly 1 here
                    old_logprobs.append(logprobs.detach())
                mask = rollout.completion_mask & rollout.prompt.counts
                loss, clipped = clipped_policy_loss(
                    logprobs, old_logprobs[b], advantages[b], mask, config.epsilon, config.epsilon_high
                )
                loss_sum = loss_sum + loss
                difference = (rollout.logprobs - old_logprobs[b]).abs() * mask * (iteration == 0)
                sums += torch.stack(
                    [loss.detach(), (entropy * mask).sum(), clipped["low"], clipped["high"], difference.sum()]
                )
                difference_max = torch.maximum(difference_max, difference.max())
            # FSDP takes the mean of the ranks' gradients; the loss is their sum over the tokens of all of them.
            (loss_sum / num_tokens * dist.get_world_size()).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
    metrics = update_metrics(sums, difference_max, num_tokens, config.num_iterations)
    return metrics | {"grad_norm": grad_norm.full_tensor().item()}


def make_optimizer(model, config: Config, total_steps: int):
    """AdamW, each part at its own learning rate, weight decay on matrices alone; warm-up, then a cosine to 0."""
    optimizer = torch.optim.AdamW(parameter_groups(model, config))
    warmup = math.ceil(config.warmup_ratio * total_steps)
    # The first step already moves: its rollouts cost as much as any.
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=max(warmup, 1))
    fall = CosineAnnealingLR(optimizer, T_max=max(total_steps - warmup, 1))
    return optimizer, SequentialLR(optimizer, [rise, fall], milestones=[warmup])


def load_inputs(config: Config) -> tuple:
    """Load and check what a run needs; return the resolved flags, the capped samples, how many were cut, the tokenizer
    and the model."""
    config = resolve_batch_sizes(config, dist.get_world_size())
    if os.path.exists(os.path.join(config.output_dir, "config.json")):
        raise InputError(f"--output_dir {config.output_dir!r} holds another run: name a new folder")
    samples, num_cut = cap_all(load_samples(config.data_path, config.image_folder), config.max_videos)
    for sample in samples:
        try:
            check_text(sample.turns)
        except ValueError as error:
            raise InputError(f"sample {sample.id!r}: {error}") from error
    tokenizer = load_tokenizer(config.model_id)
    model = load_model(config.model_id)
    if config.lora_enable:
        layers_to_adapt(model, config)  # there must be some
    try:
        numerical_video_reward([], [])  # opens its debug log, if one is wanted
        os.makedirs(config.output_dir, exist_ok=True)
    except OSError as error:
        raise InputError(f"{error.filename!r} cannot be written ({error.strerror}): name another place") from error
    if not os.access(config.output_dir, os.W_OK):
        raise InputError(f"--output_dir {config.output_dir!r} cannot be written: name another folder")
    return config, samples, num_cut, tokenizer, model


def train(config: Config, device: torch.device) -> None:
    """Train as the flags say; raise InputError, on all ranks, for what the user can mend."""
    try:
        inputs = load_inputs(config)
    except InputError as error:
        inputs = (error,)
    raise_together(inputs)
    config, samples, num_cut, tokenizer, model = inputs
    if config.gradient_checkpointing or (config.gradient_checkpointing is None and device.type == "cuda"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = special_tokens(model, tokenizer, device)
    whole = WholeWeights(model)  # for sampling
    if config.lora_enable:
        add_adapters(model, config)
    freeze(model, config)
    shard(model, device)

    steps_per_epoch = math.ceil(len(samples) / config.global_batch_size)
    total_steps = config.max_steps or math.ceil(config.num_train_epochs * steps_per_epoch)
    optimizer, schedule = make_optimizer(model, config, total_steps)
    pace = model.config.vision_config.tokens_per_second
    dataset = PromptDataset(samples, tokenizer, pace, video_options(config), config.on_bad_video)
    slots = rank_slots(
        len(samples), config.global_batch_size, total_steps, config.seed, dist.get_rank(), dist.get_world_size()
    )
    tracker = Tracker(config, total_steps)
    tracker.say(f"{len(samples)} samples, {total_steps} steps of {config.global_batch_size} prompts")
    if num_cut:
        tracker.say(f"{num_cut} samples have more than --max_videos {config.max_videos} videos: the rest is left out")

    tracker.say(table_of_parts(model, config))
    extras = processor_files(config.model_id)

    def save(name: str) -> None:
        if config.lora_enable:
            trained = gather_adapter(model, config)
        else:
            whole.refresh(model)
            trained = whole.module
        if dist.get_rank() == 0:
            save_model(trained, tokenizer, os.path.join(config.output_dir, name), extras)
        dist.barrier()

    clock = Clock()
    for step, prompts in enumerate(prompt_batches(dataset, slots, config.dataloader_num_workers), start=1):
        raise_together(prompts)
        clock.lap("data")

        whole.refresh(model)
        rollouts = rollout_phase(whole.module, prompts, tokens, config, step)
        clock.lap("rollout")

        texts = [text for r in rollouts for text in tokenizer.batch_decode(r.completion_ids, skip_special_tokens=True)]
        by_function = score(rollouts, texts, step)
        rewards = sum(by_function.values())  # (B, G)
        advantages = group_advantages(rewards)  # (B, G)
        clock.lap("reward")

        groups = gather_groups(rollouts, by_function, rewards)  # of all ranks
        num_tokens = sum(int(group["lengths"].sum()) for group in groups if group["counts"])  # the one denominator
        metrics = update_phase(
            model, optimizer, rollouts, advantages.to(device), max(num_tokens, 1), tokens.banned_ids, config
        )
        metrics["learning_rate"] = schedule.get_last_lr()[0]
        schedule.step()
        clock.lap("update")

        if tracker.log(step, groups, metrics, clock):
            tracker.show_completions(step, rollouts, texts, rewards, advantages)
        if config.save_steps and step % config.save_steps == 0 and step < total_steps:
            save(f"checkpoint-{step}")
        clock = Clock()  # what logging and saving took is no part of the next step
    save("final")
    tracker.say(f"done: the trained model is in {os.path.join(config.output_dir, 'final')}")
    tracker.close()


def main(argv: list[str]) -> int:
    """Run; return 2, with one line, for what the user can mend."""
    began = time.time()
    try:
        config = parse_config(argv)
        device = start_processes()
        if config.demo:
            config = demo.prepare(config)
            train(config, device)
            demo.report(config, began)
        else:
            train(config, device)
    except InputError as error:  # raised on all ranks together
        if int(os.environ.get("RANK", 0)) == 0:
            tqdm.write(f"train.py: error: {error}", file=sys.stderr)  # on a line of its own, not behind the bar
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
