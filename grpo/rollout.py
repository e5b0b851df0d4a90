"""Sample G completions per prompt: encode the videos once, prefill the prompts once, decode all completions together.

| B | prompts | P | prompt tokens | G | completions of a prompt | C | completion tokens, padded to the group's longest |
| V | vocabulary | E | hidden size |
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from data.loader import Prompt
from grpo.decoding import decoder_for, prefill
from grpo.logprobs import sampling_logprobs

LEAST_ROOM = 2048  # prompt tokens, whose keys and values take a hundredth of the memory that the weights take


@dataclass
class Rollout:
    """One group. Column t of every tensor speaks of `completion_ids[:, t]`."""

    prompt: Prompt
    completion_ids: Tensor  # (G, C)
    completion_mask: Tensor  # (G, C), True for the tokens that were sampled, the stop token included
    logprobs: Tensor  # (G, C) float32, as recorded while sampling; 0 where the mask is False
    is_stopped: Tensor  # (G,), False where a completion was cut at the length limit
    # What the loop finds out about it on the way:
    train_mask: Tensor | None = None  # (G, C), True for the tokens that are trained
    advantages: Tensor | None = None  # (G,)
    old_logprobs: Tensor | None = None  # (G, C), of the policy before the first update
    reference_logprobs: Tensor | None = None  # (G, C), of the initial policy


def generators(prompts: list[Prompt], seed: int, step: int, device: torch.device) -> list[torch.Generator]:
    """Make the random numbers of each prompt a function of seed, step and place in the batch, and of nothing else."""
    seeds = [hashlib.sha256(f"{seed} {step} {prompt.slot}".encode()).digest()[:8] for prompt in prompts]
    return [torch.Generator(device).manual_seed(int.from_bytes(s) >> 1) for s in seeds]


def most_probable(logprobs: Tensor, top_p: float, top_k: int) -> Tensor:
    """Keep the most probable tokens of each row, (N, V) -> (N, V), renormalised; the others get -inf.

    top_k: how many, 0 for all. top_p: as few as make up this probability (nucleus sampling, arXiv:1904.09751).
    What is left out is sampled too rarely and the rest too often. The ratio of the update does not see it, since both
    of its policies are whole distributions; `sampling/sampling_logp_difference` does.
    """
    if top_k:
        least = logprobs.topk(min(top_k, logprobs.shape[1])).values[:, -1:]
        logprobs = torch.where(logprobs >= least, logprobs, -torch.inf).log_softmax(dim=1)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=1, descending=True)
        before = ordered.exp().cumsum(dim=1) - ordered.exp()  # probability of what is more probable
        ordered = torch.where(before < top_p, ordered, -torch.inf)
        logprobs = torch.empty_like(logprobs).scatter(1, order, ordered).log_softmax(dim=1)
    return logprobs


def sample(logprobs: Tensor, generators: list[torch.Generator] | None) -> Tensor:
    """Draw a token per row, (B·G, V) -> (B·G,), with a generator per prompt; the most probable one without.

    By the Gumbel-max trick (arXiv:1411.0030): with a Gumbel variable added to each log-probability, the largest sum is
    a draw. Unlike torch.multinomial it lets a GPU go on without waiting.
    """
    if generators is not None:
        shape = len(logprobs) // len(generators), logprobs.shape[1]  # float64: float32 has no draws below 1e-7
        draws = [torch.rand(shape, generator=g, device=g.device, dtype=torch.float64) for g in generators]
        logprobs = logprobs - (-torch.cat(draws).log()).log()
    return logprobs.argmax(dim=1)


@torch.no_grad()
def generate(
    model,
    prompts: list[Prompt],
    num_generations: int,
    max_completion_length: int,
    temperature: float,
    stop_ids: Tensor,
    banned_ids: Tensor,
    generators: list[torch.Generator] | None,
    top_p: float = 1.0,
    top_k: int = 0,
) -> list[Rollout]:
    """Sample a group per prompt, each completion to its stop token or the length limit; greedily without generators.

    Touches this process alone: ranks decode different numbers of tokens without waiting for each other.
    """
    B, G, P = len(prompts), num_generations, max(len(prompt.prompt_ids) for prompt in prompts)
    if model.device.type == "cuda":
        # One graph serves most lengths, and which one it is must not depend on earlier prompts.
        P = max(LEAST_ROOM, 1 << (P - 1).bit_length())
    decoder = decoder_for(model, B, G, P, max_completion_length)
    hidden = prefill(model, prompts, decoder.cache).repeat_interleave(G, dim=0)  # (B·G, E)
    positions = torch.stack([prompt.position_ids.max() + 1 for prompt in prompts]).repeat_interleave(G)  # (B·G,)
    running = torch.ones(B * G, dtype=torch.bool, device=hidden.device)
    ids, mask, logprobs = [], [], []  # one (B·G,) per token
    while True:
        distribution = sampling_logprobs(hidden, model.lm_head.weight, temperature, banned_ids)  # (B·G, V)
        distribution = most_probable(distribution, top_p, top_k)
        ids.append(sample(distribution, generators))
        mask.append(running)
        logprobs.append(distribution.gather(1, ids[-1][:, None])[:, 0])
        running = running & ~torch.isin(ids[-1], stop_ids)
        if len(ids) == max_completion_length or not running.any():
            break
        hidden = decoder.step(ids[-1], positions)
        positions = positions + 1
    groups = zip(prompts, *(torch.stack(rows, dim=1).split(G) for rows in (ids, mask, logprobs)), strict=True)
    rollouts = []
    for (prompt, ids, mask, logprobs), is_running in zip(groups, running.split(G), strict=True):
        C = int(mask.sum(dim=1).max())  # other groups may have gone on for longer
        ids, mask, logprobs = ids[:, :C], mask[:, :C], logprobs[:, :C]
        # What is drawn behind a stop token is no part of the completion.
        ids, logprobs = torch.where(mask, ids, stop_ids[0]), torch.where(mask, logprobs, 0.0)
        rollouts.append(Rollout(prompt, ids, mask, logprobs, is_stopped=~is_running))
    return rollouts
