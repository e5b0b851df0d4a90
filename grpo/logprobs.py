"""Per-token log-probabilities of completions, from one packed forward pass.

| P | prompt tokens | G | completions of a prompt | C | completion tokens, padded to the group's longest |
| L | tokens of a packed row | V | vocabulary | E | hidden size |
"""

import dataclasses

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from data.loader import Prompt
from data.media.patches import MERGE_SIZE, PATCH_VALUES, normalise
from grpo.attention import matmul_float32, packed

TOKENS_PER_CHUNK = 1024  # logits of this many tokens exist at a time: 0.6 GB in float32, with Qwen's 152k words
PATCHES_PER_PASS = {"cpu": 2048, "cuda": 16384}  # of the tower: with more, activations outgrow a CPU's caches


def sampling_logprobs(hidden: Tensor, lm_head: Tensor, temperature: float, suppress_tokens: Tensor) -> Tensor:
    """Return the log-probabilities of the distribution that is sampled from; nothing else defines it.

    hidden: (N, E); lm_head: (V, E); suppress_tokens: ids that never occur in a completion. Returns (N, V), float32.
    """
    logits = matmul_float32(hidden, lm_head.T).div_(temperature)  # in place: one (N, V) less
    return torch.log_softmax(logits.index_fill_(1, suppress_tokens, -torch.inf), dim=1)


class ChosenLogprobs(torch.autograd.Function):
    """What the model says of each token: (N,) log-probability, entropy and `is_top`, 0 or 1.

    Only the first has a gradient. (N, V) is too large to wait for the backward pass, which computes it again, except
    where `keep` says that it comes next.
    """

    @staticmethod
    def forward(ctx, hidden, ids, lm_head, temperature: float, suppress_tokens, keep: bool):
        """hidden: (N, E), of the tokens before; ids: (N,), the tokens; lm_head: (V, E)."""
        logprobs = sampling_logprobs(hidden, lm_head, temperature, suppress_tokens)  # (N, V)
        probabilities = logprobs.exp()
        entropy = torch.special.entr(probabilities, out=probabilities).sum(dim=1)  # in place: one (N, V) less
        ctx.save_for_backward(hidden, ids, lm_head, suppress_tokens)
        ctx.temperature, ctx.kept = temperature, logprobs if keep else None
        is_top = (logprobs.argmax(dim=1) == ids).float()
        ctx.mark_non_differentiable(entropy, is_top)
        return logprobs.gather(1, ids[:, None])[:, 0], entropy, is_top

    @staticmethod
    def backward(ctx, gradient, *_):
        """gradient: (N,), by the log-probabilities."""
        hidden, ids, lm_head, suppress_tokens = ctx.saved_tensors
        logprobs, ctx.kept = ctx.kept, None
        if logprobs is None:
            logprobs = sampling_logprobs(hidden, lm_head, ctx.temperature, suppress_tokens)
        # The derivative of log p(chosen) by a logit is 1 at the chosen token, minus p everywhere.
        gradient = gradient[:, None] / ctx.temperature
        of_logits = logprobs.exp_().mul_(-gradient).scatter_add_(1, ids[:, None], gradient).to(lm_head.dtype)
        needs_hidden, _, needs_lm_head, *_ = ctx.needs_input_grad
        of_hidden = of_logits @ lm_head if needs_hidden else None
        of_lm_head = of_logits.T @ hidden if needs_lm_head else None
        return of_hidden, None, of_lm_head, None, None, None


def media_features(model, prompts: list[Prompt]) -> list[Tensor]:
    """Encode the videos and images of some prompts, a few at a time; return each one's embeddings (tokens, E).

    Prompts of text only give those of a blank image, which no token takes: sharded ranks must all run the tower.
    """
    patches = torch.cat([prompt.patches for prompt in prompts])
    grids = torch.cat([prompt.grid_thw for prompt in prompts])  # (M of all, 3)
    if not len(grids):
        grids = grids.new_tensor([[1, MERGE_SIZE, MERGE_SIZE]])
        patches = patches.new_zeros(MERGE_SIZE**2, PATCH_VALUES)
    sizes = grids.prod(dim=1)
    # With FSDP every pass gathers the weights again, so there is only one.
    fitting = max(1, PATCHES_PER_PASS[patches.device.type] // int(sizes.max()))
    at_once = len(grids) if isinstance(model, FSDPModule) else fitting
    pieces = patches.split([int(size.sum()) for size in sizes.split(at_once)])
    features = []
    for piece, grid in zip(pieces, grids.split(at_once), strict=True):
        features += model.model.get_video_features(normalise(piece), grid).pooler_output
    return features


def embed(model, token_ids: Tensor, prompts: list[Prompt]) -> Tensor:
    """Embed a row of tokens, (L,), with the encoded videos and images in place of their placeholders: (1, L, E)."""
    embeddings = model.get_input_embeddings()(token_ids[None])
    if prompts[0].vision_states is None:
        features = torch.cat(media_features(model, prompts))
    else:
        features = model.model.visual.merger(torch.cat([prompt.vision_states for prompt in prompts]))
    is_media = (token_ids == model.config.video_token_id) | (token_ids == model.config.image_token_id)
    return embeddings.masked_scatter(is_media[None, :, None], features.to(embeddings.dtype))


@torch.no_grad()
def encode_media(model, prompt: Prompt) -> Prompt:
    """Return the prompt with the vision tower's output, (S, E of the tower), in place of patches.

    For a frozen tower, which then runs once. The merger behind it, which may be trained, still runs in every pass.
    """
    # Replace the merger by its own input, four neighbouring patches a row; the tower then restores their order.
    merger = model.model.visual.merger
    with merger.register_forward_hook(lambda _, inputs, out: inputs[0].reshape(len(out), -1)):
        states = torch.cat(media_features(model, [prompt])).unflatten(1, (MERGE_SIZE**2, -1)).flatten(0, 1)
    states = states[: len(prompt.patches)]  # none for a prompt of text only
    return dataclasses.replace(prompt, vision_states=states, patches=prompt.patches.new_empty(0))


def completion_logprobs(
    model,
    prompts: list[Prompt],
    completion_ids: list[Tensor],
    completion_mask: list[Tensor],
    temperature: float,
    suppress_tokens: Tensor,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Compute what the model says of every completion token of some prompts' groups, in one row.

    completion_ids, completion_mask: per prompt (G, C), each with its own C. Returns per prompt three (G, C), float32, 0
    where the mask is False: the log-probability, which alone carries gradients; the entropy; whether no token was more
    probable, 1 or 0.
    """
    G = len(completion_ids[0])
    tokens, positions = [], []
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        tokens += [prompt.prompt_ids, ids.flatten()]
        # Every completion continues the prompt, so each one's positions start right after the prompt's.
        positions += [prompt.position_ids, prompt.completion_positions(ids.shape[1]).repeat(1, G)]
    prompt_lengths = [len(prompt.prompt_ids) for prompt in prompts]
    group_lengths = [P + ids.numel() for P, ids in zip(prompt_lengths, completion_ids, strict=True)]
    # A token is predicted from the one before it, the first of each completion from the last prompt token.
    indices = torch.arange(sum(group_lengths), device=suppress_tokens.device).split(group_lengths)
    query_indices = [group[P - 1 :] for group, P in zip(indices, prompt_lengths, strict=True)]  # per group 1 + G·C
    hidden = model.model.language_model(
        inputs_embeds=embed(model, torch.cat(tokens), prompts),
        position_ids=torch.cat(positions, dim=1)[:, None],  # (3, 1, L)
        use_cache=False,
        attention_fn=packed(prompt_lengths, group_lengths, G),
        query_indices=torch.cat(query_indices),
    ).last_hidden_state[0]  # (queries, E)
    predictors = []
    for row, mask in zip(hidden.split([len(queries) for queries in query_indices]), completion_mask, strict=True):
        first, rest = row[0].expand(G, 1, -1), row[1:].unflatten(0, mask.shape)[:, :-1]
        predictors.append(torch.cat([first, rest], dim=1)[mask])  # (tokens, E)
    chosen = [ids[mask] for ids, mask in zip(completion_ids, completion_mask, strict=True)]  # (tokens,)
    # The backward pass begins with the last chunk, so dropping its logits would save no memory.
    chunks = list(zip(*(torch.cat(rows).split(TOKENS_PER_CHUNK) for rows in (predictors, chosen)), strict=True))
    head = model.lm_head.weight, temperature, suppress_tokens
    results = [ChosenLogprobs.apply(*chunk, *head, chunk is chunks[-1]) for chunk in chunks]
    num_tokens = [len(ids) for ids in chosen]
    per_prompt = zip(*(torch.cat(parts).split(num_tokens) for parts in zip(*results, strict=True)), strict=True)
    return [
        tuple(torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values) for values in found)
        for mask, found in zip(completion_mask, per_prompt, strict=True)
    ]
