"""GRPO for Qwen2.5-VL on samples with many videos and a numerical answer. The algorithm, top to bottom.

    python train.py --demo                                        a complete run, without weights or data
    torchrun --nproc_per_node 8 train.py --model_id … --data_path … --output_dir …

One step, for a batch of prompts:

    sample G completions per prompt         grpo/rollout.py         videos encoded once, prompt prefilled once
    score them                              reward/
    advantage: the reward, normalised       grpo/loss.py            within its group
    log-probabilities of the completions    grpo/logprobs.py        one packed pass per prompt
    clipped loss, backward                  grpo/loss.py            divided by the tokens of all ranks
    clip the gradient, step

With --supervised the true answers take the place of sampled ones, and cross-entropy that of the clipped loss.
Each rank samples the whole groups of its own prompts. Sampling depends only on the weights, the seed, the step and the
position in the batch: neither the number of ranks nor what a rank did before changes it.
"""

import sys
import time
from functools import partial
from pathlib import Path

import grpo  # noqa: F401  first of all, since it sets how torch's threads wait

# isort: split
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from data.loader import Prompt, checked
from grpo import loss as objective
from grpo.config import Config, parse_config
from grpo.demo import demo
from grpo.evaluate.heldout import HeldOut
from grpo.logprobs import encode_media
from grpo.model.load import SpecialTokens
from grpo.model.lora import disable_adapters, without_dropout
from grpo.model.sharding import Models
from grpo.ranks import any_rank, exit_code, full_tensor, print_rank0, raise_together, start_processes
from grpo.rollout import Rollout, SamplingParams, ScoredRollout, generate, generators, rollouts_to_train, true_answers
from grpo.run.records import StepRecords, TokenSums, gather_records, global_counts, group_records, std_of_step
from grpo.run.scoring import Scorer, score
from grpo.run.start import start
from grpo.run.stopping import StopRequest
from grpo.run.tracking import Clock, Tracker


def batched(items: list, size: int) -> list[list]:
    """Cut a list into pieces of `size`: so many prompts pass through the model at a time."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def rollout_phase(model, prompts: list[Prompt], tokens: SpecialTokens, config: Config, step: int) -> list[Rollout]:
    """Sample a group for every prompt of this rank. model: unsharded, so that ranks do not wait for each other."""
    params = SamplingParams.of(config, config.num_generations, config.temperature)
    rollouts = []
    for batch in batched(prompts, config.per_device_generation_batch_size):
        if config.freeze_vision_tower and not config.vision_lora:
            batch = [encode_media(model, prompt.to(tokens.device)) for prompt in batch]  # once, for the update too
        rollouts += generate(model, batch, tokens, params, generators(batch, config.seed, step, tokens.device))
    return rollouts


def reward_phase(
    rollouts: list[Rollout], tokenizer, scorer: Scorer, config: Config, step: int
) -> tuple[list[ScoredRollout], StepRecords]:
    """Score the completions and compute their advantages; the records are those of all ranks."""
    texts = [tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True) for rollout in rollouts]
    rewards, by_function = score(scorer, rollouts, texts, step)  # (B, G)
    is_padding = torch.tensor([rollout.prompt.is_padding for rollout in rollouts])
    rewards = rewards.masked_fill(is_padding[:, None], torch.nan)  # (B, G), nan where not scored
    advantages = objective.group_advantages(rewards, config.scale_rewards, std_of_step(rewards))  # (B, G)
    scored, device, how = [], rollouts[0].logprobs.device, (config.mask_truncated_completions, config.beta)
    for rollout, own_rewards, own_advantages in zip(rollouts, rewards.to(device), advantages.to(device), strict=True):
        mask = objective.loss_mask(rollout.completion_mask, own_rewards, rollout.is_stopped, *how)
        scored.append(ScoredRollout(rollout, own_advantages, mask))
    return scored, gather_records(rollouts, group_records(scored, texts, rewards, by_function))


def supervised_phase(prompts: list[Prompt], tokens: SpecialTokens) -> tuple[list[ScoredRollout], StepRecords]:
    """Take the true answers in place of sampled ones: groups of one, with an advantage of 1."""
    rollouts, one = true_answers(prompts, tokens), torch.ones(1, device=tokens.device)
    masks = [rollout.completion_mask & (not rollout.prompt.is_padding) for rollout in rollouts]
    scored = [ScoredRollout(rollout, one, mask) for rollout, mask in zip(rollouts, masks, strict=True)]
    return scored, gather_records(rollouts, [])


def update_phase(
    models: Models, optimizer, scored: list[ScoredRollout], suppress_tokens: Tensor, config: Config
) -> dict[str, float]:
    """Update the policy on one batch of rollouts, `num_iterations` times; return the metrics of all ranks."""
    num_tokens, num_completions = global_counts(scored)  # of all ranks: the denominators
    sums, is_bad = TokenSums(suppress_tokens.device), False
    size = config.per_device_train_batch_size
    passes = batched(rollouts_to_train(scored, size), size)
    fixed = []  # per pass: log-probabilities of the old and the reference policy
    for iteration in range(config.num_iterations):
        optimizer.zero_grad()
        for number, batch in enumerate(passes):
            results = policy_logprobs(models.policy, batch, suppress_tokens, config)
            if iteration == 0:
                fixed.append(fixed_logprobs(models, batch, results, suppress_tokens, config))
            loss = 0.0
            for one, (logprobs, entropy, is_top), old_and_reference in zip(batch, results, fixed[number], strict=True):
                mask = one.loss_mask
                sums.add("entropy", entropy, mask)
                if config.supervised:
                    token_loss = -logprobs  # cross-entropy, whose gradient `clipped_loss` has for an advantage of 1
                    sums.add("token_accuracy", is_top, mask)
                else:
                    token_loss = policy_loss(one, logprobs, *old_and_reference, sums, config)
                totals = num_tokens, num_completions, config.max_completion_length
                weights = objective.completion_weights(config.loss_type, mask.sum(dim=1), *totals)
                loss = loss + objective.weighted_sum(token_loss, mask, weights)
            # FSDP averages the gradients of the ranks, but the step's loss is the sum of their losses.
            (loss * dist.get_world_size()).backward()
            sums.loss += loss.detach()
        grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(models.policy.parameters(), config.max_grad_norm))
        if any_rank(not torch.isfinite(sums.loss + grad_norm)):
            is_bad = True  # weights and optimizer stay as they are, in the remaining iterations too
        else:
            optimizer.step()
    metrics = sums.means(num_tokens, config.num_iterations)
    return metrics | {"grad_norm": grad_norm.item(), "run/bad_steps": float(is_bad)}


def policy_loss(
    one: ScoredRollout, logprobs: Tensor, old: Tensor, reference: Tensor | None, sums: TokenSums, config: Config
) -> Tensor:
    """Return the loss of each token of a group, (G, C), and add what it is made of to `sums`.

    logprobs, old, reference: (G, C), of the policy, of the one that has sampled, and of the initial one.
    """
    mask, advantages, bounds = one.loss_mask, one.advantages, (config.epsilon, config.epsilon_high)
    ratio = objective.importance_ratios(logprobs, old, mask, config.importance_sampling_level)
    token_loss = objective.clipped_loss(ratio, advantages, *bounds)
    if reference is not None:
        kl = objective.kl_estimate(logprobs, reference)
        token_loss = token_loss + config.beta * kl
        sums.add("kl", kl, mask)
    sums.add_difference(one.rollout.logprobs, old, mask)
    if config.num_iterations > 1:  # in the first update every ratio is 1
        low, high = objective.clipped_tokens(ratio, advantages, *bounds)
        sums.add("clip_ratio/low_mean", low, mask)
        sums.add("clip_ratio/high_mean", high, mask)
    return token_loss


def policy_logprobs(
    policy, batch: list[ScoredRollout], suppress_tokens: Tensor, config: Config
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return log-probabilities, entropies and `is_top` of the completions, (G, C) per rollout, in one packed pass."""
    prompts = [one.rollout.prompt.to(suppress_tokens.device) for one in batch]
    ids, masks = zip(*((one.rollout.completion_ids, one.rollout.completion_mask) for one in batch), strict=True)
    distribution = config.temperature, suppress_tokens
    if config.supervised:
        distribution = 1.0, suppress_tokens[:0]  # the model's own, not one that is sampled from
    return policy.completion_logprobs(prompts, ids, masks, *distribution)


def fixed_logprobs(
    models: Models, batch: list[ScoredRollout], results: list[tuple], suppress_tokens: Tensor, config: Config
) -> list[tuple[Tensor, Tensor | None]]:
    """Return the log-probabilities of the policy before its first update, and of the reference policy if there is one.

    results: those of the first update's own pass, so that its ratio is exactly 1.
    """
    if config.num_iterations > 1 and config.lora_enable and config.lora_dropout > 0:
        with torch.no_grad(), without_dropout(models.policy):  # later ratios compare policies, not dropout masks
            results = policy_logprobs(models.policy, batch, suppress_tokens, config)
    old, reference = [logprobs.detach() for logprobs, *_ in results], [None] * len(batch)
    if config.beta > 0:
        with torch.no_grad(), disable_adapters(models.reference):
            results = policy_logprobs(models.reference, batch, suppress_tokens, config)
        reference = [logprobs for logprobs, *_ in results]
    return list(zip(old, reference, strict=True))


def train(config: Config, device: torch.device, stop: StopRequest) -> bool:
    """Train; return False if a signal stopped the run. Raises InputError, on all ranks, for what the user can fix."""
    run = start(config, device, rollout_phase, update_phase)
    if run is None:
        return True
    config, scorer, tokens, first = run.config, run.scorer, run.tokens, run.resume.step
    models, optimizer = run.models, run.optimizer
    heldout = HeldOut(run.heldout, scorer, config) if run.heldout else None
    tracker = Tracker(config, run.total_steps, run.resume, run.zero_skill_reward)  # after all that may be refused
    save = partial(run.save, tracker)

    def evaluate(step: int) -> None:
        """Evaluate the policy if it is due; keep it in best/ if none was better."""
        if heldout and tracker.is_evaluation_due(step):
            heldout.evaluate_policy(models.sampling.sync(models.policy), step, tracker, save, stop.requested)

    stop.listen()
    evaluate(first)  # before the first step, or where a signal came first
    if stop.requested():
        return tracker.stopped(first)
    clock = Clock()
    for step, batch in enumerate(run.batches(), first + 1):
        prompts = raise_together(checked, batch)
        clock.lap("data")

        if config.supervised:
            scored, records = supervised_phase(prompts, tokens)
        else:
            rollouts = rollout_phase(models.sampling.sync(models.policy), prompts, tokens, config, step)
            clock.lap("rollout")
            scored, records = reward_phase(rollouts, tokens.tokenizer, scorer, config, step)
            clock.lap("reward")

        torch.manual_seed(hash((config.seed, step, dist.get_rank())) % 2**63)  # for dropout
        metrics = update_phase(models, optimizer, scored, tokens.suppress_tokens, config)
        metrics["learning_rate"] = run.schedule.get_last_lr()[0]
        run.schedule.step()
        clock.lap("update")

        tracker.log(step, records, metrics, clock, prompts[0])
        if not stop.requested():
            evaluate(step)
        is_stopped = stop.requested()
        if is_stopped or (config.save_steps and step % config.save_steps == 0):
            save(f"checkpoint-{step}", step, is_needed=is_stopped)
        if is_stopped:
            return tracker.stopped(step)
        clock = Clock()  # time spent on logging and saving does not count to the next step
    save("final", run.total_steps)
    tracker.close()
    print_rank0(f"done: the trained model is in {Path(config.output_dir, 'final')}")
    return True


def main(argv: list[str]) -> int:
    """Run; return 2, after one line, for what the user can fix."""
    began, stop = time.time(), StopRequest()

    def run() -> None:
        config = parse_config(argv)
        run_it = partial(train, device=start_processes(), stop=stop)
        if not config.demo:
            run_it(config)
        elif (prepared := demo.prepare(config, run_it)) and run_it(prepared):
            demo.report(prepared, began)

    try:
        return exit_code(run, "train.py")
    finally:
        stop.restore()


if __name__ == "__main__":
    sys.exit(record(main)(sys.argv[1:]))
