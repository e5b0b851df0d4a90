"""Per-token log-probabilities of a group's completions, from one packed forward pass.

| P | prompt tokens | G | completions | C | completion tokens, padded | V | vocabulary | E | hidden size |
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data.loader import Prompt
from grpo.attention import packed

TOKENS_PER_CHUNK = 1024  # logits of so many tokens exist at a time: 0.6 GB with Qwen's 152k words in float32


def sampling_logprobs(hidden: Tensor, lm_head: Tensor, temperature: float, banned_ids: Tensor) -> Tensor:
    """Return the log-probabilities of the distribution that is sampled from: the one and only place that defines it.

    hidden: (N, E); lm_head: (V, E); banned_ids: token ids that a completion must not hold. Returns (N, V) in float32.
    """
    logits = F.linear(hidden.float(), lm_head.float()) / temperature
    return torch.log_softmax(logits.index_fill(1, banned_ids, -torch.inf), dim=1)


def _chosen_logprobs(hidden, ids, lm_head, temperature, banned_ids) -> tuple[Tensor, Tensor]:
    """Return log-probability and entropy at each token: hidden (N, E), ids (N,) -> (N,), (N,)."""
    logprobs = sampling_logprobs(hidden, lm_head, temperature, banned_ids)
    with torch.no_grad():  # clamp: a banned token would add 0 · -inf = nan
        entropy = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(dim=1)
    return logprobs.gather(1, ids[:, None])[:, 0], entropy


def embed_prompt(model, prompt: Prompt) -> Tensor:
    """Embed the prompt's tokens and put the encoded videos in their places: (1, P, E)."""
    embeddings = model.get_input_embeddings()(prompt.prompt_ids[None])
    features = model.model.get_video_features(prompt.pixel_values_videos, prompt.video_grid_thw).pooler_output
    is_video = (prompt.prompt_ids == model.config.video_token_id)[None, :, None]
    return embeddings.masked_scatter(is_video, torch.cat(features).to(embeddings.dtype))


def completion_logprobs(
    model, prompt: Prompt, completion_ids: Tensor, completion_mask: Tensor, temperature: float, banned_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability and the entropy at every trained token of a group.

    completion_ids, completion_mask: (G, C). Returns two (G, C), float32, 0 where the mask is False. The videos are
    encoded once and the prompt passes once, whatever G is. Only the log-probabilities carry gradients.
    """
    G, C = completion_ids.shape
    P = len(prompt.prompt_ids)
    tokens = model.get_input_embeddings()(completion_ids.reshape(1, G * C))
    embeddings = torch.cat([embed_prompt(model, prompt), tokens], dim=1)  # (1, P + G·C, E)
    # Every completion continues the prompt, so each one's positions begin anew behind the prompt's.
    own = prompt.position_ids.max() + 1 + torch.arange(C, device=completion_ids.device)
    position_ids = torch.cat([prompt.position_ids, own.repeat(G).expand(3, -1)], dim=1)[:, None]  # (3, 1, P + G·C)
    hidden = model.model.language_model(
        inputs_embeds=embeddings, position_ids=position_ids, use_cache=False, attend_fn=packed(P, G)
    ).last_hidden_state[0]  # (P + G·C, E)

    # A token is predicted from the one before it, the first of each completion from the last prompt token.
    first, rest = hidden[P - 1].expand(G, 1, -1), hidden[P:].unflatten(0, (G, C))[:, :-1]
    predictors = torch.cat([first, rest], dim=1)[completion_mask]  # (tokens, E)
    chosen = completion_ids[completion_mask]
    # Recomputing the logits of a chunk in the backward pass keeps memory free of (G · C, V).
    chunks = [
        checkpoint(_chosen_logprobs, h, i, model.lm_head.weight, temperature, banned_ids, use_reentrant=False)
        for h, i in zip(predictors.split(TOKENS_PER_CHUNK), chosen.split(TOKENS_PER_CHUNK), strict=True)
    ]
    zeros = torch.zeros(G, C, device=hidden.device)
    logprobs, entropy = (zeros.masked_scatter(completion_mask, torch.cat(part)) for part in zip(*chunks, strict=True))
    return logprobs, entropy
