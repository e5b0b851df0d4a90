"""Shared-prefix attention: a prompt and its G completions in one packed row, the prompt computed once.

A group shares its prompt, and with 30 videos the prompt is nearly all of the work. So one row
`[prompt | c1 | … | cG]` of P + G·C tokens goes through the stock Hugging Face model, and only attention has to know:

    prompt tokens      attend causally to the prompt;
    completion tokens  attend to the prompt and causally to their own completion, never to another one.

That equals G rows `[prompt | ci]` (proved in `tests/grpo/test_packed.py`) at about 1/G of the cost. Several groups may
follow each other in a row. In sampling, too, G completions read one copy of the prompt's keys and values
(`grpo/decoding.py`).

| B | prompts | P | prompt tokens | G | completions of a prompt | C | completion tokens |
| H | query heads | K | key heads | D | head size | L | tokens of a row |
"""

import functools
from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from transformers import AttentionInterface

# (query (N, H, L, D), key (N, K, L, D), value (N, K, L, D), layer index) -> (N, H, L, D)
AttentionFn = Callable[[Tensor, Tensor, Tensor, int], Tensor]

NO_MEMORY = torch.empty(0)


def causal(query: Tensor, key: Tensor, value: Tensor, layer: int = 0) -> Tensor:
    """Causal attention; the queries may be those of the last tokens only."""
    bias, is_square = None, query.shape[2] == key.shape[2]
    if not is_square:
        # As torch's `causal_lower_right`, which allocates queries x keys, and fails under a TorchDispatchMode.
        bias = Tensor._make_subclass(CausalBias, NO_MEMORY)
        bias.variant, bias.seq_len_q, bias.seq_len_kv = CausalVariant.LOWER_RIGHT, query.shape[2], key.shape[2]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=is_square, enable_gqa=True)


def group_attention(query: Tensor, key: Tensor, value: Tensor, P: int, G: int) -> Tensor:
    """Attend within N groups `[prompt | c1 | … | cG]` of equal lengths: two SDPA calls, no (P + G·C)² mask.

    query: (N, H, Q + G·C, D), the last Q prompt tokens and all completions; key, value: (N, K, P + G·C, D). Returns the
    shape of query.
    """
    if G == 1:  # [prompt | c] is an ordinary sequence
        return causal(query, key, value)
    num_completion_tokens = key.shape[2] - P  # of a group

    # Splitting costs one copy in the backward pass; a slice would add to a tensor of zeros.
    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        """Part (N, heads, n + G·C, D) into (N, heads, n, D) of the prompt and (N·G, heads, C, D)."""
        prompt, completions = x.split([x.shape[2] - num_completion_tokens, num_completion_tokens], dim=2)
        return prompt, completions.unflatten(2, (G, -1)).transpose(1, 2).flatten(0, 1)

    def with_prompt(prompt: Tensor, completions: Tensor) -> Tensor:
        prompt = prompt[:, None].expand(-1, G, -1, -1, -1).flatten(0, 1)
        return torch.cat([prompt, completions], dim=2)  # (N·G, K, P + C, D)

    queries, keys, values = parts(query), parts(key), parts(value)
    prompt_out = causal(queries[0], keys[0], values[0])  # (N, H, Q, D)
    # Completions shorter than C need no mask: padding comes last, and causal attention never looks ahead.
    out = causal(queries[1], with_prompt(*keys), with_prompt(*values))  # (N·G, H, C, D)
    return torch.cat([prompt_out, out.unflatten(0, (-1, G)).transpose(1, 2).flatten(2, 3)], dim=2)


def packed(prompt_lengths: list[int], group_lengths: list[int], num_completions: int) -> AttentionFn:
    """Return the attention function for a row of groups; neighbours of equal lengths are computed together.

    prompt_lengths, group_lengths: P and P + G·C of each group. The queries are either those of all tokens, or of each
    group those of the last prompt token and the completions.
    """
    both = zip(prompt_lengths, group_lengths, strict=True)
    runs = [(P, length, len(list(run))) for (P, length), run in groupby(both)]
    key_lengths = [N * length for _, length, N in runs]
    query_lengths = [N * (length - P + 1) for P, length, N in runs]

    def attend_packed(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        queries = query.split(key_lengths if query.shape[2] == key.shape[2] else query_lengths, dim=2)
        keys, values, outs = key.split(key_lengths, dim=2), value.split(key_lengths, dim=2), []
        for (P, _, N), *of_run in zip(runs, queries, keys, values, strict=True):
            q, k, v = (x[0].unflatten(1, (N, -1)).transpose(0, 1) for x in of_run)  # (N, heads, …, D)
            out = group_attention(q, k, v, P, num_completions)
            outs.append(out.transpose(0, 1).flatten(1, 2)[None])
        return torch.cat(outs, dim=2)

    return attend_packed


def matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices, or batches of them; the result is float32, in which GPUs accumulate anyway.

    Rounded to bfloat16, the attention scores of Qwen's large keys, and its logits, would be far off.
    """
    if a.is_cuda and a.dtype == torch.bfloat16:
        return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def shared_prefix_attention(module, query, key, value, attention_mask, attention_fn: AttentionFn = causal, **kwargs):
    """Attention of the language model, in Hugging Face's interface: calls the `attention_fn` given to the model."""
    return attention_fn(query, key, value, module.layer_idx).transpose(1, 2), None  # (N, L, H, D)


@functools.lru_cache(maxsize=2)  # keyed by tensor identity: one for windows, one for frames
def segments_by_length(cu_seq_lens: Tensor) -> list[Tensor]:
    """Return the places of the segments of each length: (segments, length) per length.

    Finding them makes a GPU wait for the host, so it is done once, not in every block.
    """
    starts, lengths = cu_seq_lens[:-1].long(), cu_seq_lens.diff()
    return [
        starts[lengths == length, None] + torch.arange(length, device=starts.device)
        for length in lengths.unique().tolist()
    ]


def varlen_attention(module, query, key, value, attention_mask, cu_seq_lens_q: Tensor, **kwargs):
    """Attention of the vision tower: each segment (a window or a frame) attends to itself.

    query, key, value: (1, H, S, D); cu_seq_lens_q: (segments + 1,), cumulative lengths from 0 to S. Segments of equal
    length share one SDPA call: usually there is one, where Hugging Face loops over hundreds of windows.
    """
    segments = segments_by_length(cu_seq_lens_q)
    if len(segments) == 1:  # views (segments, H, length, D), no copies
        q, k, v = (x[0].unflatten(1, segments[0].shape).transpose(0, 1) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)[None], None
    out = torch.empty_like(query.transpose(1, 2))  # (1, S, H, D)
    for rows in segments:
        q, k, v = (x[0][:, rows].transpose(0, 1) for x in (query, key, value))
        out[0, rows] = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return out, None


# Hugging Face passes whole sequences with their boundaries only to an attention function with "flash" in its name; to
# any other it passes one segment at a time.
AttentionInterface.register("shared_prefix", shared_prefix_attention)
AttentionInterface.register("varlen_like_flash", varlen_attention)
