"""Sample G completions of one prompt: encode its videos once, prefill its tokens once, decode the group together.

| P | prompt tokens | G | completions | C | completion tokens, padded | V | vocabulary | E | hidden size |
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.loader import Prompt
from grpo.attention import GroupCache
from grpo.logprobs import embed_prompt, sampling_logprobs


@dataclass
class Rollout:
    """One group. Column t of every tensor speaks of `completion_ids[:, t]`."""

    prompt: Prompt
    completion_ids: Tensor  # (G, C)
    completion_mask: Tensor  # (G, C), True for the tokens that were sampled, the stop token included
    logprobs: Tensor  # (G, C) float32, as recorded while sampling
    is_stopped: Tensor  # (G,), False where a completion was cut at the length limit


def prefill(model, prompt: Prompt, cache: GroupCache) -> Tensor:
    """Pass the prompt through the model, keep its keys and values, return the last hidden state: (1, E)."""
    return model.model.language_model(
        inputs_embeds=embed_prompt(model, prompt),
        position_ids=prompt.position_ids[:, None],
        use_cache=False,
        attend_fn=cache.prefill,
    ).last_hidden_state[:, -1]


def decode_one_token(model, token_ids: Tensor, position: Tensor, cache: GroupCache) -> Tensor:
    """Pass one further token of each completion, (G,), at mRoPE position `position`; return hidden states (G, E)."""
    hidden = model.model.language_model(
        inputs_embeds=model.get_input_embeddings()(token_ids[:, None]),
        position_ids=position.expand(3, len(token_ids), 1),
        use_cache=False,
        attend_fn=cache.decode,
    ).last_hidden_state[:, -1]
    cache.length += 1
    return hidden


def sample(logprobs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one token per row, (G, V) -> (G,); the most probable one without a generator."""
    if generator is None:
        return logprobs.argmax(dim=1)
    return torch.multinomial(logprobs.exp(), num_samples=1, generator=generator)[:, 0]


@torch.no_grad()
def generate(
    model,
    prompt: Prompt,
    num_generations: int,
    max_completion_length: int,
    temperature: float,
    stop_ids: Tensor,
    banned_ids: Tensor,
    generator: torch.Generator | None,
) -> Rollout:
    """Sample a group of completions, each to its stop token or to the length limit; greedily without a generator.

    Touches this process alone: ranks decode different numbers of tokens without waiting for each other.
    """
    cache = GroupCache(num_generations, max_completion_length)
    hidden = prefill(model, prompt, cache).expand(num_generations, -1)  # (G, E)
    position = prompt.position_ids.max() + 1
    running = torch.ones(num_generations, dtype=torch.bool, device=hidden.device)  # (G,)
    ids, mask, logprobs = [], [], []  # C times (G,)
    while True:
        distribution = sampling_logprobs(hidden, model.lm_head.weight, temperature, banned_ids)  # (G, V)
        ids.append(sample(distribution, generator))
        mask.append(running)
        logprobs.append(torch.where(running, distribution.gather(1, ids[-1][:, None])[:, 0], 0.0))
        running = running & ~torch.isin(ids[-1], stop_ids)
        if len(ids) == max_completion_length or not running.any():
            break
        hidden = decode_one_token(model, ids[-1], position, cache)
        position = position + 1
    ids, mask, logprobs = (torch.stack(rows, dim=1) for rows in (ids, mask, logprobs))  # (G, C)
    # What is drawn behind a stop token is not part of the completion.
    return Rollout(prompt, torch.where(mask, ids, stop_ids[0]), mask, logprobs, is_stopped=~running)
