"""Sample G completions per prompt: encode the videos once, prefill the prompts once, decode all completions together.

| B | prompts | P | prompt tokens | G | completions of a prompt | C | completion tokens, padded to the group's longest |
| V | vocabulary | E | hidden size |
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data.loader import Prompt
from data.prompt import encode_answer
from grpo.decoding import decoder_for, prefill
from grpo.logprobs import sampling_logprobs
from grpo.model.load import SpecialTokens
from grpo.ranks import all_gather_object

# Once in so many tokens the host asks whether all completions have ended, for which it waits for a GPU to be there.
TOKENS_PER_QUESTION = {"cpu": 1, "cuda": 8}


@dataclass
class SamplingParams:
    """How completions are sampled: the flags of these names."""

    num_generations: int
    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def of(cls, config, num_generations: int, temperature: float) -> "SamplingParams":
        """Take them from the flags, of training or of an evaluation."""
        return cls(num_generations, config.max_completion_length, temperature, config.top_p, config.top_k)


@dataclass(frozen=True)
class Rollout:
    """The group of one prompt, as sampled. All (G, C) tensors are aligned with `completion_ids`."""

    prompt: Prompt
    completion_ids: Tensor  # (G, C)
    completion_mask: Tensor  # (G, C), True for sampled tokens, the end-of-sequence token included
    logprobs: Tensor  # (G, C) float32, recorded while sampling; 0 where the mask is False
    is_stopped: Tensor  # (G,), False where a completion was cut at the length limit


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout, and what the update needs to know of its rewards."""

    rollout: Rollout
    advantages: Tensor  # (G,)
    loss_mask: Tensor  # (G, C), True for tokens that are trained


def generators(prompts: list[Prompt], seed: int, step: int, device: torch.device) -> list[torch.Generator]:
    """Make a generator per prompt, seeded by seed, step and position in the global batch only."""
    seeds = [hashlib.sha256(f"{seed} {step} {prompt.position}".encode()).digest()[:8] for prompt in prompts]
    return [torch.Generator(device).manual_seed(int.from_bytes(s) >> 1) for s in seeds]


def filter_top_k_top_p(logprobs: Tensor, top_p: float, top_k: int) -> Tensor:
    """Keep the most probable tokens of each row, (N, V) -> (N, V), renormalised; the others get -inf.

    top_k: how many, 0 for all. top_p: as few as make up this probability (nucleus sampling, arXiv:1904.09751).
    Sampling is then truncated and the ratio does not correct for it, since both of its policies are full distributions;
    `sampling/sampling_logp_difference` shows how far apart they are.
    """
    if top_k:
        least = logprobs.topk(min(top_k, logprobs.shape[1])).values[:, -1:]
        logprobs = torch.where(logprobs >= least, logprobs, -torch.inf).log_softmax(dim=1)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=1, descending=True)
        before = ordered.exp().cumsum(dim=1) - ordered.exp()  # total probability of the more probable tokens
        ordered = torch.where(before < top_p, ordered, -torch.inf)
        logprobs = torch.empty_like(logprobs).scatter(1, order, ordered).log_softmax(dim=1)
    return logprobs


def sample(logprobs: Tensor, generators: list[torch.Generator] | None) -> Tensor:
    """Draw a token per row, (B·G, V) -> (B·G,), with a generator per prompt; greedily without generators.

    By the Gumbel-max trick (arXiv:1411.0030): the argmax of log-probabilities plus Gumbel noise is a sample. Unlike
    torch.multinomial it does not make a GPU wait.
    """
    if generators is not None:
        shape = len(logprobs) // len(generators), logprobs.shape[1]  # float64, since float32 never draws below 1e-7
        draws = [torch.rand(shape, generator=g, device=g.device, dtype=torch.float64) for g in generators]
        logprobs = logprobs - (-torch.cat(draws).log()).log()
    return logprobs.argmax(dim=1)


@torch.no_grad()
def generate(
    model,
    prompts: list[Prompt],
    tokens: SpecialTokens,
    params: SamplingParams,
    generators: list[torch.Generator] | None = None,
) -> list[Rollout]:
    """Sample a group per prompt, each completion to its end or to the length limit; greedily without generators.

    model: unsharded. Nothing here communicates, so ranks may decode different numbers of tokens. The rollouts keep the
    prompts as given: pixels in the host's memory wait there for the update.
    """
    B, G, P = len(prompts), params.num_generations, max(len(prompt.prompt_ids) for prompt in prompts)
    decoder = decoder_for(model, B, G, P, params.max_completion_length)
    tokens_per_question = TOKENS_PER_QUESTION[model.device.type]
    on_device = [prompt.to(model.device) for prompt in prompts]
    hidden = prefill(model, on_device, decoder.cache).repeat_interleave(G, dim=0)  # (B·G, E)
    positions = torch.cat([prompt.completion_positions(1)[0] for prompt in on_device]).repeat_interleave(G)  # (B·G,)
    running = torch.ones(B * G, dtype=torch.bool, device=hidden.device)
    ids, mask, logprobs = [], [], []  # one (B·G,) per token
    head = model.lm_head.weight, params.temperature, tokens.suppress_tokens
    while True:
        distribution = sampling_logprobs(hidden, *head)  # (B·G, V)
        if generators is not None:  # greedily it changes nothing
            distribution = filter_top_k_top_p(distribution, params.top_p, params.top_k)
        ids.append(sample(distribution, generators))
        mask.append(running)
        logprobs.append(distribution.gather(1, ids[-1][:, None])[:, 0])
        running = running & ~torch.isin(ids[-1], tokens.eos_token_ids)
        if len(ids) == params.max_completion_length or (len(ids) % tokens_per_question == 0 and not running.any()):
            break
        hidden = decoder.step(ids[-1], positions)
        positions = positions + 1
    ids, mask, logprobs = (torch.stack(rows, dim=1) for rows in (ids, mask, logprobs))  # (B·G, longest C)
    # Tokens drawn after the end are not part of the completion.
    ids, logprobs = torch.where(mask, ids, tokens.eos_token_ids[0]), torch.where(mask, logprobs, 0.0)
    rollouts, lengths = [], mask.sum(dim=1).view(B, G).amax(dim=1).tolist()  # other groups may have gone on for longer
    for b, (prompt, C) in enumerate(zip(prompts, lengths, strict=True)):
        group = slice(b * G, (b + 1) * G)
        rollouts.append(Rollout(prompt, ids[group, :C], mask[group, :C], logprobs[group, :C], ~running[group]))
    return rollouts


def true_answers(prompts: list[Prompt], tokens: SpecialTokens) -> list[Rollout]:
    """Return the true answer to each prompt, as if it had been sampled: a group of one."""
    rollouts = []
    for prompt in prompts:
        ids = encode_answer(prompt.sample.answer, tokens.tokenizer).to(tokens.device)[None]  # (1, C)
        mask = torch.ones_like(ids, dtype=torch.bool)
        rollouts.append(Rollout(prompt, ids, mask, torch.zeros_like(ids, dtype=torch.float32), mask[:, -1]))
    return rollouts


def rollouts_to_train(scored: list[ScoredRollout], batch_size: int) -> list[ScoredRollout]:
    """Leave out rollouts without trained tokens, except where a rank would make fewer passes than others; collective.

    Returns none if no rank has any to train.
    """
    trained = [one for one in scored if one.loss_mask.any()]
    untrained = [one for one in scored if not one.loss_mask.any()]
    passes = max(all_gather_object(math.ceil(len(trained) / batch_size)))
    missing = (passes - 1) * batch_size + 1 - len(trained)  # until the last pass has a rollout
    return trained + untrained[: max(0, missing)]
