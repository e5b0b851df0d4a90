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
from data.loader import Prompt, PromptDataset, checked, prompt_batches, rank_slots
from data.prompt import check_text
from data.video_cap import cap_all
from grpo import demo
from grpo.config import Config, parse_config, resolve_batch_sizes, video_options
from grpo.loss import (
    clipped_loss,
    completion_weights,
    group_advantages,
    importance_ratios,
    kl_estimate,
    trained_tokens,
    weighted_sum,
)
from grpo.model import SpecialTokens, load_model, load_tokenizer, processor_files, save_model, special_tokens
from grpo.rollout import Rollout, generate
from grpo.scoring import score
from grpo.sharding import WholeWeights, raise_together, shard, start_processes
from grpo.tracking import LOGP_DIFFERENCE, SUMS, Clock, Totals, Tracker, add_up, gather_groups, update_metrics
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
            config.top_p,
            config.top_k,
        )
    return rollouts


def update_phase(
    model, reference, optimizer, rollouts: list[Rollout], totals: Totals, banned_ids: Tensor, config: Config
) -> dict[str, float]:
    """Improve the policy on one batch of rollouts; returns the metrics of all ranks."""
    sums, difference_max = torch.zeros(len(SUMS), device=banned_ids.device), torch.zeros((), device=banned_ids.device)
    for iteration in range(config.num_iterations):
        optimizer.zero_grad()
        for batch in batched(rollouts, config.per_device_train_batch_size):
            inputs = (
                [rollout.prompt for rollout in batch],
                [rollout.completion_ids for rollout in batch],
                [rollout.completion_mask for rollout in batch],
                config.temperature,
                banned_ids,
            )
            results = model.completion_logprobs(*inputs)
            if iteration == 0:
                for rollout, (logprobs, _) in zip(batch, results, strict=True):
                    rollout.old_logprobs = logprobs.detach()  # the weights that sampled: the ratio is exactly 1 here
                    difference = (rollout.logprobs - rollout.old_logprobs).abs() * rollout.train_mask
                    sums[SUMS.index(LOGP_DIFFERENCE)] += difference.sum()
                    difference_max = torch.maximum(difference_max, difference.max())
                if config.beta > 0:
                    with torch.no_grad():
                        initial = reference.completion_logprobs(*inputs)
                    for rollout, (logprobs, _) in zip(batch, initial, strict=True):
                        rollout.reference_logprobs = logprobs

            loss = 0.0
            for rollout, (logprobs, entropy) in zip(batch, results, strict=True):
                share, clipped, kl = group_loss(rollout, logprobs, totals, config)
                loss = loss + share
                entropy = (entropy * rollout.train_mask).sum()
                sums[:5] += torch.stack([share.detach(), entropy, clipped["low"], clipped["high"], kl])
            # FSDP takes the mean of the ranks' gradients; the loss is the sum of their shares.
            (loss * dist.get_world_size()).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
    metrics = update_metrics(sums, difference_max, totals.num_tokens, config.num_iterations)
    return metrics | {"grad_norm": grad_norm.full_tensor().item()}


def group_loss(rollout: Rollout, logprobs: Tensor, totals: Totals, config: Config) -> tuple[Tensor, dict, Tensor]:
    """Return a group's share of the step's loss, the numbers of its tokens that were clipped, and its summed KL."""
    mask = rollout.train_mask
    ratio = importance_ratios(logprobs, rollout.old_logprobs, mask, config.importance_sampling_level)
    loss, low, high = clipped_loss(ratio, rollout.advantages, config.epsilon, config.epsilon_high)
    kl = torch.zeros_like(loss)
    if config.beta > 0:
        kl = kl_estimate(logprobs, rollout.reference_logprobs)
        loss = loss + config.beta * kl
    weights = completion_weights(
        config.loss_type, mask.sum(dim=1), totals.num_tokens, totals.num_completions, config.max_completion_length
    )
    clipped = {"low": (low & mask).sum(), "high": (high & mask).sum()}
    return weighted_sum(loss, mask, weights), clipped, (kl.detach() * mask).sum()


def make_optimizer(model, config: Config, total_steps: int):
    """AdamW, weight decay on matrices alone; warm-up, then a cosine to 0."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
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
    config, samples, num_cut, tokenizer, model = raise_together(load_inputs, config)
    if config.gradient_checkpointing or (config.gradient_checkpointing is None and device.type == "cuda"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = special_tokens(model, tokenizer, device)
    whole = WholeWeights(model)  # for sampling
    shard(model, device)
    reference = None
    if config.beta > 0:  # the initial policy, frozen
        reference = shard(load_model(config.model_id).requires_grad_(False), device)

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

    extras = processor_files(config.model_id)

    def save(name: str) -> None:
        whole.refresh(model)
        if dist.get_rank() == 0:
            save_model(whole.module, tokenizer, os.path.join(config.output_dir, name), extras)
        dist.barrier()

    clock = Clock()
    for step, batch in enumerate(prompt_batches(dataset, slots, config.dataloader_num_workers), start=1):
        prompts = raise_together(checked, batch)
        clock.lap("data")

        whole.refresh(model)
        rollouts = rollout_phase(whole.module, prompts, tokens, config, step)
        clock.lap("rollout")

        texts = [text for r in rollouts for text in tokenizer.batch_decode(r.completion_ids, skip_special_tokens=True)]
        by_function = raise_together(score, REWARD_FUNCTIONS, rollouts, texts, step)
        rewards = sum(by_function.values())  # (B, G), nan where a completion was not scored
        for rollout, row in zip(rollouts, rewards, strict=True):
            rollout.train_mask = rollout.prompt.counts & trained_tokens(
                rollout.completion_mask, row.to(device), rollout.is_stopped, config.mask_truncated_completions
            )
        groups = gather_groups(rollouts, by_function, rewards)  # of all ranks
        totals = add_up(groups)  # among them the one denominator
        advantages = group_advantages(rewards, config.scale_rewards, totals.reward_std)  # (B, G)
        for rollout, row in zip(rollouts, advantages.to(device), strict=True):
            rollout.advantages = row
        clock.lap("reward")

        metrics = update_phase(model, reference, optimizer, rollouts, totals, tokens.banned_ids, config)
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
