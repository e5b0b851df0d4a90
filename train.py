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

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from data.dataset import InputError
from data.loader import Prompt, PromptDataset, checked, prompt_batches, rank_slots
from grpo.config import Config, count_steps, parse_config, video_options
from grpo.demo import demo
from grpo.logprobs import encode_videos
from grpo.loss import (
    clipped_loss,
    completion_weights,
    group_advantages,
    importance_ratios,
    kl_estimate,
    trained_tokens,
    weighted_sum,
)
from grpo.model.load import SpecialTokens, processor_files, special_tokens
from grpo.model.lora import adapters_off, gather_adapter, without_dropout
from grpo.model.optimizer import make_optimizer, table_of_parts
from grpo.model.sharding import make_trainable
from grpo.ranks import any_rank, from_rank_0, raise_together, say, start_processes, whole_tensor
from grpo.rollout import Rollout, generate, generators
from grpo.run import checkpoint
from grpo.run.inputs import load_inputs
from grpo.run.preflight import memory_preflight
from grpo.run.scoring import score
from grpo.run.stopping import StopRequest
from grpo.run.tracking import LOGP_DIFFERENCE, SUMS, Clock, Totals, Tracker, add_up, gather_groups, update_metrics
from reward.numerical import numerical_video_reward

REWARD_FUNCTIONS = [numerical_video_reward]  # a completion's reward is their sum


def batched(items: list, size: int) -> Iterator[list]:
    """Cut a list into pieces of `size`; `--per_device_train_batch_size` prompts pass through the model at a time."""
    return (items[i : i + size] for i in range(0, len(items), size))


def rollout_phase(model, prompts: list[Prompt], tokens: SpecialTokens, config: Config, step: int) -> list[Rollout]:
    """Sample a group for every prompt of this rank, with whole weights and without waiting for other ranks."""
    rollouts = []
    for batch in batched(prompts, config.per_device_train_batch_size):
        on_device = [prompt.to(tokens.device) for prompt in batch]
        if config.freeze_vision_tower and not config.vision_lora:
            batch = on_device = [encode_videos(model, prompt) for prompt in on_device]  # once, for the update too
        sampled = generate(
            model,
            on_device,
            config.num_generations,
            config.max_completion_length,
            config.temperature,
            tokens.stop_ids,
            tokens.banned_ids,
            generators(batch, config.seed, step, tokens.device),
            config.top_p,
            config.top_k,
        )
        for rollout, prompt in zip(sampled, batch, strict=True):
            rollout.prompt = prompt  # pixels wait in the host's memory for the update
        rollouts += sampled
    return rollouts


def reward_phase(rollouts: list[Rollout], tokenizer, config: Config, step: int) -> tuple:
    """Score the completions; return the records of all ranks, their totals, and own texts, rewards, advantages."""
    texts = [text for r in rollouts for text in tokenizer.batch_decode(r.completion_ids, skip_special_tokens=True)]
    by_function = raise_together(score, REWARD_FUNCTIONS, rollouts, texts, step, config.reward_timeout)
    rewards = sum(by_function.values())  # (B, G), nan where a completion was not scored
    for rollout, row in zip(rollouts, rewards.to(rollouts[0].logprobs.device), strict=True):
        rollout.train_mask = rollout.prompt.counts & trained_tokens(
            rollout.completion_mask, row, rollout.is_stopped, config.mask_truncated_completions
        )
    groups = gather_groups(rollouts, by_function, rewards)  # of all ranks
    totals = add_up(groups)  # among them the one denominator
    advantages = group_advantages(rewards, config.scale_rewards, totals.reward_std)  # (B, G)
    for rollout, row in zip(rollouts, advantages, strict=True):
        rollout.advantages = row.to(rollout.logprobs.device)
    return groups, totals, texts, rewards, advantages


def update_phase(
    model, reference, optimizer, rollouts: list[Rollout], totals: Totals, banned_ids: Tensor, config: Config
) -> dict[str, float]:
    """Improve the policy on one batch of rollouts; returns the metrics of all ranks."""
    sums, difference_max = torch.zeros(len(SUMS), device=banned_ids.device), torch.zeros((), device=banned_ids.device)
    is_bad = False
    for iteration in range(config.num_iterations):
        optimizer.zero_grad()
        for batch in batched(rollouts, config.per_device_train_batch_size):
            inputs = (
                [rollout.prompt.to(banned_ids.device) for rollout in batch],
                [rollout.completion_ids for rollout in batch],
                [rollout.completion_mask for rollout in batch],
                config.temperature,
                banned_ids,
            )
            results = model.completion_logprobs(*inputs)
            if iteration == 0:
                scored = results  # by the weights that sampled: the ratio is exactly 1 here
                if config.num_iterations > 1 and config.lora_enable and config.lora_dropout > 0:
                    with torch.no_grad(), without_dropout(model):  # later ratios compare policies, not dropouts
                        scored = model.completion_logprobs(*inputs)
                for rollout, (logprobs, _) in zip(batch, scored, strict=True):
                    rollout.old_logprobs = logprobs.detach()
                    difference = (rollout.logprobs - rollout.old_logprobs).abs() * rollout.train_mask
                    sums[SUMS.index(LOGP_DIFFERENCE)] += difference.sum()
                    difference_max = torch.maximum(difference_max, difference.max())
                if config.beta > 0:
                    with torch.no_grad(), adapters_off(reference):
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
        grad_norm = whole_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm))
        if any_rank(not torch.isfinite(sums[0] + grad_norm)):  # sums[0] is the loss
            is_bad = True  # weights and optimizer stay as they are
        else:
            optimizer.step()
    metrics = update_metrics(sums, difference_max, totals.num_tokens, config.num_iterations)
    return metrics | {"grad_norm": grad_norm.item(), "bad_steps": float(is_bad)}


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


def train(config: Config, device: torch.device, stop: StopRequest) -> bool:
    """Train as the flags say, or until `stop`, which gives False; raise InputError, on all ranks, for what the user
    can mend."""
    config, samples, num_cut, start, tokenizer, loaded = raise_together(load_inputs, config)
    start = from_rank_0(start)
    if start.is_complete:
        say(*start.words)
        return True
    model, whole, reference = make_trainable(loaded, config, device)
    del loaded  # what rank 0 has read
    tokens = special_tokens(model, tokenizer, device)
    total_steps = count_steps(config, len(samples))
    optimizer, schedule = make_optimizer(model, config, total_steps)
    pace = model.config.vision_config.tokens_per_second
    dataset = PromptDataset(samples, tokenizer, pace, video_options(config), config.on_bad_video)
    if config.memory_preflight or (config.memory_preflight is None and device.type == "cuda"):
        models, phases = (model, whole, reference), (rollout_phase, update_phase)
        say(memory_preflight(dataset, tokens, optimizer, config, models, phases))
    checkpoint.load(start.folder, start.step, model, optimizer, schedule)
    place = dist.get_rank(), dist.get_world_size()
    slots = rank_slots(len(samples), config.global_batch_size, total_steps, config.seed, *place, start.step)
    tracker = Tracker(config, total_steps, start.step, start.counts)
    say(f"{len(samples)} samples, {total_steps} steps of {config.global_batch_size} prompts")
    if num_cut:
        say(f"{num_cut} samples have more than --max_videos {config.max_videos} videos: the rest is left out")
    say(*table_of_parts(model, config).splitlines(), *start.words)
    extras = processor_files(config.model_id)

    def save(name: str, step: int, is_needed: bool = True) -> None:
        """Write the trained model, or its adapters, and beside it what it takes to go on."""
        trained = gather_adapter(model, config) if config.lora_enable else whole.refresh(model)
        state = {} if name == "final" else checkpoint.trainer_state(model, optimizer)
        progress = start.run | {"step": step, "counts": tracker.counts}
        checkpoint.save(config, name, (trained, tokenizer, extras), state, progress, is_needed)

    stop.listen()
    clock = Clock()
    for step, batch in enumerate(prompt_batches(dataset, slots, config.dataloader_num_workers), start=start.step + 1):
        prompts = raise_together(checked, batch)
        clock.lap("data")

        whole.refresh(model)
        rollouts = rollout_phase(whole.module, prompts, tokens, config, step)
        clock.lap("rollout")

        groups, totals, texts, rewards, advantages = reward_phase(rollouts, tokenizer, config, step)
        clock.lap("reward")

        torch.manual_seed(hash((config.seed, step, dist.get_rank())) % 2**63)  # dropout, too, depends on nothing else
        metrics = update_phase(model, reference, optimizer, rollouts, totals, tokens.banned_ids, config)
        metrics["learning_rate"] = schedule.get_last_lr()[0]
        schedule.step()
        clock.lap("update")

        if tracker.log(step, groups, metrics, clock):
            tracker.show_completions(step, rollouts, texts, rewards, advantages)
        is_stopped = stop.is_made()
        if is_stopped or (config.save_steps and step % config.save_steps == 0):
            save(f"checkpoint-{step}", step, is_needed=is_stopped)
        if is_stopped:
            tracker.close()
            say(f"stopped after step {step}: the same command with --resume_from_checkpoint auto goes on from there")
            return False
        clock = Clock()  # what logging and saving took is no part of the next step
    save("final", total_steps)
    tracker.close()
    say(f"done: the trained model is in {Path(config.output_dir, 'final')}")
    return True


def main(argv: list[str]) -> int:
    """Run; return 2, with one line, for what the user can mend."""
    began, code, stop = time.time(), 0, StopRequest()
    try:
        config = parse_config(argv)
        device = start_processes()
        if config.demo:
            config = demo.prepare(config)
            if train(config, device, stop):
                demo.report(config, began)
        else:
            train(config, device, stop)
    except InputError as error:  # raised on all ranks together
        say(f"train.py: error: {error}", file=sys.stderr)
        code = 2
    finally:
        stop.release()
    if dist.is_initialized():  # after any other error the ranks do not wait for each other
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(record(main)(sys.argv[1:]))
