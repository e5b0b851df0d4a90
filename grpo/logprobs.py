"""Per-token log-probabilities of completions, from one packed forward pass.

| P | prompt tokens | G | completions of a prompt | C | completion tokens, padded to the group's longest |
| L | tokens of a packed row | V | vocabulary | E | hidden size |
"""

import dataclasses

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from data.loader import Prompt
from grpo.attention import matmul_float32, packed

TOKENS_PER_CHUNK = 1024  # logits of so many tokens exist at a time: 0.6 GB each copy, with Qwen's 152k words in float32
PATCHES_PER_PASS = 2048  # enough to keep a GPU busy; more would be slower on a CPU, whose caches they outgrow


class Logits(torch.autograd.Function):
    """Logits (N, V) in float32 from hidden (N, E) and lm_head (V, E) of any precision, in which the gradients are."""

    @staticmethod
    def forward(ctx, hidden, lm_head):
        ctx.save_for_backward(hidden, lm_head)
        return matmul_float32(hidden, lm_head.T)

    @staticmethod
    def backward(ctx, gradient):
        hidden, lm_head = ctx.saved_tensors
        gradient = gradient.to(lm_head.dtype)
        wanted = ctx.needs_input_grad
        return gradient @ lm_head if wanted[0] else None, gradient.T @ hidden if wanted[1] else None


def sampling_logprobs(hidden: Tensor, lm_head: Tensor, temperature: float, banned_ids: Tensor) -> Tensor:
    """Return the log-probabilities of the distribution that is sampled from: the one and only place that defines it.

    hidden: (N, E); lm_head: (V, E); banned_ids: token ids that a completion must not hold. Returns (N, V) in float32.
    """
    logits = Logits.apply(hidden, lm_head).div_(temperature)  # in place: one (N, V) less
    return torch.log_softmax(logits.index_fill_(1, banned_ids, -torch.inf), dim=1)


def _chosen_logprobs(hidden, ids, lm_head, temperature, banned_ids) -> tuple[Tensor, Tensor]:
    """Return log-probability and entropy at each token: hidden (N, E), ids (N,) -> (N,), (N,)."""
    logprobs = sampling_logprobs(hidden, lm_head, temperature, banned_ids)
    with torch.no_grad():  # clamp: a banned token would add 0 · -inf = nan
        entropy = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(dim=1)
    return logprobs.gather(1, ids[:, None])[:, 0], entropy


def video_features(model, prompts: list[Prompt]) -> list[Tensor]:
    """Encode the videos of some prompts, a few at a time: per video the states (tokens, E) for its placeholders."""
    pixels = torch.cat([prompt.pixel_values_videos for prompt in prompts])
    grids = torch.cat([prompt.video_grid_thw for prompt in prompts])  # (M of all, 3)
    sizes = grids.prod(dim=1)
    # Sharded weights would be gathered anew for each pass.
    at_once = len(grids) if isinstance(model, FSDPModule) else max(1, PATCHES_PER_PASS // int(sizes.max()))
    pieces = pixels.split([int(size.sum()) for size in sizes.split(at_once)])
    passes = zip(pieces, grids.split(at_once), strict=True)
    return [states for piece in passes for states in model.model.get_video_features(*piece).pooler_output]


def embed(model, token_ids: Tensor, prompts: list[Prompt]) -> Tensor:
    """Embed a row of tokens, (L,), and put the encoded videos of the prompts in it into their places: (1, L, E)."""
    embeddings = model.get_input_embeddings()(token_ids[None])
    if prompts[0].vision_states is None:
        features = torch.cat(video_features(model, prompts))
    else:
        features = model.model.visual.merger(torch.cat([prompt.vision_states for prompt in prompts]))
    is_video = (token_ids == model.config.video_token_id)[None, :, None]
    return embeddings.masked_scatter(is_video, features.to(embeddings.dtype))


@torch.no_grad()
def encode_videos(model, prompt: Prompt) -> Prompt:
    """Return the prompt with what the vision tower makes of its videos, (S, E of the tower), in place of their pixels.

    For a frozen tower, whose work is then done once for sampling and all updates. The merger may be trained: it comes
    behind the tower and runs in every pass.
    """
    # In the merger's place, keep its input: four neighbouring patches a row, which the tower puts back into order.
    hook = model.model.visual.merger.register_forward_hook(lambda _, inputs, out: inputs[0].reshape(len(out), -1))
    try:
        states = video_features(model, [prompt])
    finally:
        hook.remove()
    states = torch.cat(states).view(len(prompt.pixel_values_videos), -1)
    return dataclasses.replace(prompt, vision_states=states, pixel_values_videos=states.new_empty(0))


def completion_logprobs(
    model,
    prompts: list[Prompt],
    completion_ids: list[Tensor],
    completion_mask: list[Tensor],
    temperature: float,
    banned_ids: Tensor,
) -> list[tuple[Tensor, Tensor]]:
    """Compute the log-probability and the entropy at every trained token of the groups of some prompts.

    completion_ids, completion_mask: per prompt (G, C), each with its own C. Returns per prompt two (G, C), float32, 0
    where the mask is False; the log-probabilities alone carry gradients. All groups pass in one row; the videos are
    encoded once and the prompts pass once, whatever G is.
    """
    G = len(completion_ids[0])
    tokens, positions = [], []
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        tokens += [prompt.prompt_ids, ids.flatten()]
        # Every completion continues the prompt, so each one's positions begin anew behind the prompt's.
        own = prompt.position_ids.max() + 1 + torch.arange(ids.shape[1], device=ids.device)
        positions += [prompt.position_ids, own.repeat(G).expand(3, -1)]
    prompt_lengths = [len(prompt.prompt_ids) for prompt in prompts]
    group_lengths = [P + ids.numel() for P, ids in zip(prompt_lengths, completion_ids, strict=True)]
    # A token is predicted from the one before it, the first of each completion from the last prompt token.
    places = torch.arange(sum(group_lengths), device=banned_ids.device).split(group_lengths)
    kept = [row[P - 1 :] for row, P in zip(places, prompt_lengths, strict=True)]  # per group 1 + G·C
    hidden = model.model.language_model(
        inputs_embeds=embed(model, torch.cat(tokens), prompts),
        position_ids=torch.cat(positions, dim=1)[:, None],  # (3, 1, L)
        use_cache=False,
        attend_fn=packed(prompt_lengths, group_lengths, G),
        kept=torch.cat(kept),
    ).last_hidden_state[0]  # (kept, E)
    predictors = []
    for row, mask in zip(hidden.split([len(places) for places in kept]), completion_mask, strict=True):
        first, rest = row[0].expand(G, 1, -1), row[1:].unflatten(0, mask.shape)[:, :-1]
        predictors.append(torch.cat([first, rest], dim=1)[mask])  # (tokens, E)
    chosen = [ids[mask] for ids, mask in zip(completion_ids, completion_mask, strict=True)]  # (tokens,)
    # Recomputing the logits of a chunk in the backward pass keeps memory free of (tokens, V). The backward pass begins
    # with the last chunk: nothing is gained by forgetting that one.
    *chunks, last = zip(
        torch.cat(predictors).split(TOKENS_PER_CHUNK), torch.cat(chosen).split(TOKENS_PER_CHUNK), strict=True
    )
    head = model.lm_head.weight, temperature, banned_ids
    results = [checkpoint(_chosen_logprobs, *chunk, *head, use_reentrant=False) for chunk in chunks]
    results.append(_chosen_logprobs(*last, *head))
    num_tokens = [len(ids) for ids in chosen]
    logprobs, entropy = (torch.cat(parts).split(num_tokens) for parts in zip(*results, strict=True))
    return [
        tuple(torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values) for values in pair)
        for mask, *pair in zip(completion_mask, logprobs, entropy, strict=True)
    ]
