"""Shared-prefix attention: a prompt and its G completions in one packed row, the prompt computed once.

A group shares its prompt, and with 30 videos the prompt is nearly all of the work. So one row
`[prompt | c1 | … | cG]` of P + G·C tokens goes through the stock Hugging Face model, and only attention has to know:

    prompt tokens      attend causally to the prompt;
    completion tokens  attend to the prompt and causally to their own completion, never to another one.

That equals G separate rows `[prompt | ci]` (proved in `tests/test_packed.py`) at about 1/G of the cost. Several groups
may follow each other in a row. While sampling, the same split lets G completions read one copy of the prompt's keys
and values.

How it is plugged in: the model's attention layers call `attend` with their query, key and value; which tokens see which
is decided by the function that the caller passes down through the model's keyword arguments.

| B | prompts | P | prompt tokens | G | completions of a prompt | C | completion tokens |
| H | query heads | K | key heads | D | head size | L | tokens of a row |
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

# (query (N, H, L, D), key (N, K, L, D), value (N, K, L, D), layer index) -> (N, H, L, D)
AttendFn = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def causal(query: Tensor, key: Tensor, value: Tensor, layer: int = 0) -> Tensor:
    """Attend causally within each row: an ordinary language model."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def group_attention(query: Tensor, key: Tensor, value: Tensor, P: int, G: int) -> Tensor:
    """Attend within one group `[prompt | c1 | … | cG]`: two SDPA calls, no (P + G·C)² mask.

    query: (1, H, P + G·C, D); key, value: (1, K, P + G·C, D). Returns the shape of query.
    """
    H, K, D = query.shape[1], key.shape[1], query.shape[3]
    C = (query.shape[2] - P) // G

    def completions(x: Tensor) -> Tensor:
        return x[0, :, P:].unflatten(1, (G, C)).transpose(0, 1)  # (1, heads, P + G·C, D) -> (G, heads, C, D)

    prompt_out = causal(query[:, :, :P], key[:, :, :P], value[:, :, :P])  # (1, H, P, D)
    keys = torch.cat([key[:, :, :P].expand(G, -1, -1, -1), completions(key)], dim=2)  # (G, K, P + C, D)
    values = torch.cat([value[:, :, :P].expand(G, -1, -1, -1), completions(value)], dim=2)
    # The H / K query heads of a key head become rows of one query, so that keys and values need no repeating.
    queries = completions(query).reshape(G, K, H // K * C, D)
    own = torch.ones(C, C, dtype=torch.bool, device=query.device).tril()
    mask = torch.cat([own.new_ones(C, P), own], dim=1).repeat(H // K, 1)  # (H / K · C, P + C), True: is seen
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    out = out.reshape(G, H, C, D).transpose(0, 1).reshape(1, H, G * C, D)
    return torch.cat([prompt_out, out], dim=2)


def packed(prompt_lengths: list[int], group_lengths: list[int], num_completions: int) -> AttendFn:
    """Return the attention of a row of groups; of each its P and its P + G·C are given."""

    def attend_packed(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        groups = zip(*(x.split(group_lengths, dim=2) for x in (query, key, value)), prompt_lengths, strict=True)
        return torch.cat([group_attention(q, k, v, P, num_completions) for q, k, v, P in groups], dim=2)

    return attend_packed


class GroupCache:
    """Keys and values of B prompts, one copy each, and of their G completions with room for C tokens, by layer."""

    def __init__(self, prompt_lengths: list[int], num_completions: int, max_completion_length: int):
        self.prompt_lengths, self.G, self.C = prompt_lengths, num_completions, max_completion_length
        # Keys are float32: scores of Qwen's large keys, rounded to bfloat16 before the softmax, would be far off.
        self.prompts: list[tuple[Tensor, Tensor]] = []  # per layer: keys, values (B, K, P, D), padded to the longest P
        self.own: list[tuple[Tensor, Tensor]] = []  # per layer: keys, values (B, G, K, C, D)
        self.length = 0  # completion tokens held
        self.is_padding = torch.arange(max(prompt_lengths)) >= torch.tensor(prompt_lengths)[:, None]  # (B, P)

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """Attend causally within each prompt of the row `[p1 | … | pB]`, (1, H, L, D); keep keys and values."""
        queries, keys, values = (x.split(self.prompt_lengths, dim=2) for x in (query, key, value))

        def padded(rows: tuple[Tensor, ...]) -> Tensor:
            rows = [row[0].transpose(0, 1) for row in rows]  # B times (P, K, D)
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2)  # (B, K, P, D)

        self.prompts.append((padded(keys).float(), padded(values)))
        room = (len(keys), self.G, key.shape[1], self.C, key.shape[3])
        self.own.append((key.new_empty(room, dtype=torch.float32), value.new_empty(room)))
        self.is_padding = self.is_padding.to(key.device)
        return torch.cat([causal(q, k, v) for q, k, v in zip(queries, keys, values, strict=True)], dim=2)

    def decode(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """Attend from one new token of each completion, (B·G, H, 1, D), to its prompt and to what precedes it."""
        (prompt_keys, prompt_values), (own_keys, own_values) = self.prompts[layer], self.own[layer]
        B, G, K, C, D = own_keys.shape
        H, P, end = query.shape[1], prompt_keys.shape[2], self.length + 1
        own_keys[:, :, :, self.length] = key.view(B, G, K, D)
        own_values[:, :, :, self.length] = value.view(B, G, K, D)

        # All G·H/K queries of a key head read the prompt in one matrix product; no per-completion copy of it exists.
        query = query.reshape(B, G, K, H // K, D).float() * D**-0.5
        grouped = query.transpose(1, 2).reshape(B, K, G * (H // K), D)
        prompt_scores = (grouped @ prompt_keys.transpose(2, 3)).masked_fill(self.is_padding[:, None, None], -torch.inf)
        prompt_scores = prompt_scores.unflatten(2, (G, H // K)).transpose(1, 2)  # (B, G, K, H / K, P)
        own_scores = query @ own_keys[:, :, :, :end].transpose(3, 4)  # (B, G, K, H / K, end)
        weights = torch.cat([prompt_scores, own_scores], dim=4).softmax(dim=4).to(value.dtype)
        grouped = weights[..., :P].transpose(1, 2).reshape(B, K, G * (H // K), P)
        out = (grouped @ prompt_values).unflatten(2, (G, H // K)).transpose(1, 2)  # (B, G, K, H / K, D)
        return (out + weights[..., P:] @ own_values[:, :, :, :end]).reshape(B * G, H, 1, D)


def attend(module, query, key, value, attention_mask, attend_fn: AttendFn = causal, **kwargs):
    """Language model attention for Hugging Face's interface: hand over to the caller's `attend_fn`."""
    return attend_fn(query, key, value, module.layer_idx).transpose(1, 2), None  # (N, L, H, D)


def attend_segments(module, query, key, value, attention_mask, cu_seq_lens_q: Tensor, **kwargs):
    """Vision tower attention: every segment (a window or a frame) attends to itself, equal lengths in one SDPA call.

    Frames of a study have equal sizes, so that this is one call where Hugging Face loops over hundreds of windows.

    query, key, value: (1, H, S, D); cu_seq_lens_q: (segments + 1,) where segments begin and the last one ends.
    """
    starts, lengths = cu_seq_lens_q[:-1].long(), cu_seq_lens_q.diff().long()
    out = torch.empty_like(query.transpose(1, 2))  # (1, S, H, D)
    for length in lengths.unique().tolist():
        rows = starts[lengths == length, None] + torch.arange(length, device=query.device)  # (n, length)
        q, k, v = (x[0][:, rows].transpose(0, 1) for x in (query, key, value))  # (n, H, length, D)
        out[0, rows] = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return out, None


# Hugging Face hands whole sequences with their segment boundaries only to an attention with "flash" in its name;
# to any other it hands one segment at a time.
AttentionInterface.register("shared_prefix", attend)
AttentionInterface.register("segments_like_flash", attend_segments)
