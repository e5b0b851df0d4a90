"""Prefill each prompt once, then decode all its G completions together from one copy of the prompt's keys and values.

| B | prompts | P | prompt tokens | G | completions of a prompt | C | completion tokens |
| H | query heads | K | key heads | D | head size | E | hidden size |
"""

import functools

import torch
from torch import Tensor

from data.loader import Prompt
from grpo.attention import causal, matmul_float32
from grpo.logprobs import embed


class SharedPrefixKVCache:
    """Keys and values per layer: one copy for each of B prompts, and those of their B·G completions.

    All memory is allocated once, with room for P prompt and C completion tokens, and all bookkeeping is in tensors, so
    that one decoding step can be captured as a CUDA graph and replayed for every other.
    """

    def __init__(self, model, B: int, G: int, P: int, C: int):
        config, dtype, device = model.config.text_config, model.dtype, model.device
        layers, K, D = config.num_hidden_layers, config.num_key_value_heads, config.hidden_size
        D = D // config.num_attention_heads
        self.prompt_keys, self.prompt_values = torch.empty(2, layers, B, K, P, D, dtype=dtype, device=device)
        self.completion_keys, self.completion_values = torch.empty(2, layers, B, K, G, C, D, dtype=dtype, device=device)
        self.bias = torch.zeros(B, 1, 1, P + C, device=device)  # 0 for tokens in the cache, -inf for unused slots
        self.length = torch.zeros(1, dtype=torch.long, device=device)  # completion tokens in the cache
        self.prompt_lengths: list[int] = []

    def begin(self, prompt_lengths: list[int]) -> None:
        """Empty the cache for prompts of these lengths."""
        self.prompt_lengths = prompt_lengths
        lengths = torch.tensor(prompt_lengths, device=self.bias.device)
        is_used = torch.arange(self.bias.shape[3], device=lengths.device) < lengths[:, None]
        self.bias.copy_(torch.where(is_used, 0.0, -torch.inf)[:, None, None])
        self.length.zero_()
        for cache in (self.prompt_keys, self.prompt_values, self.completion_keys, self.completion_values):
            cache.zero_()  # unused slots have weight 0 but must be finite: 0 * nan is nan

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """Causal attention within each prompt of the row `[p1 | … | pB]`, (1, H, L, D); stores keys and values.

        The queries are either those of all tokens, or the last one of each prompt: (1, H, B, D).
        """
        queries = query.split(self.prompt_lengths if query.shape[2] == key.shape[2] else 1, dim=2)
        keys, values = (x.split(self.prompt_lengths, dim=2) for x in (key, value))
        prompts = list(zip(queries, keys, values, strict=True))
        for b, (_, k, v) in enumerate(prompts):
            self.prompt_keys[layer, b, :, : k.shape[2]] = k[0]
            self.prompt_values[layer, b, :, : v.shape[2]] = v[0]
        return torch.cat([causal(q, k, v) for q, k, v in prompts], dim=2)

    def unmask_next(self) -> None:
        """Unmask the slot of each completion's next token; once per step, before the layers call `decode`."""
        self.bias.index_fill_(3, self.length + self.prompt_keys.shape[3], 0.0)

    def decode(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """Attention of one new token per completion, (B·G, H, 1, D), to its prompt and the completion so far."""
        prompt_keys, prompt_values = self.prompt_keys[layer].flatten(0, 1), self.prompt_values[layer].flatten(0, 1)
        completion_keys, completion_values = self.completion_keys[layer], self.completion_values[layer]
        B, K, G, C, D = completion_keys.shape
        P, R = prompt_keys.shape[1], query.shape[1] // K  # R query heads share a key head
        completion_keys.index_copy_(3, self.length, key.view(B, G, K, 1, D).transpose(1, 2))
        completion_values.index_copy_(3, self.length, value.view(B, G, K, 1, D).transpose(1, 2))

        # All G·R queries of a key head read the prompt in one matrix product; no per-completion copy of it exists.
        queries = query.view(B, G, K, R, D).transpose(1, 2).reshape(B * K, G * R, D)
        prompt_scores = matmul_float32(queries, prompt_keys.transpose(1, 2))  # (B·K, G·R, P)
        completion_scores = matmul_float32(
            queries.view(-1, R, D), completion_keys.view(-1, C, D).transpose(1, 2)
        )  # (B·K·G, R, C)
        scores = torch.cat([prompt_scores, completion_scores.view(B * K, G * R, C)], dim=2).view(B, K, G * R, P + C)
        weights = torch.add(self.bias, scores, alpha=D**-0.5).softmax(dim=3).to(value.dtype).flatten(0, 1)
        out = weights[:, :, P:].reshape(-1, R, C) @ completion_values.view(-1, C, D)  # (B·K·G, R, D)
        out = out.view(B * K, G * R, D) + weights[:, :, :P] @ prompt_values
        return out.view(B, K, G, R, D).transpose(1, 2).reshape(B * G, K * R, 1, D)


def prefill(model, prompts: list[Prompt], cache: SharedPrefixKVCache) -> Tensor:
    """Run the prompts through the model and fill the cache; return the hidden states of their last tokens: (B, E)."""
    cache.begin([len(prompt.prompt_ids) for prompt in prompts])
    token_ids = torch.cat([prompt.prompt_ids for prompt in prompts])
    last_tokens = torch.tensor(cache.prompt_lengths, device=token_ids.device).cumsum(0) - 1
    return model.model.language_model(
        inputs_embeds=embed(model, token_ids, prompts),
        position_ids=torch.cat([prompt.position_ids for prompt in prompts], dim=1)[:, None],
        use_cache=False,
        attention_fn=cache.prefill,
        query_indices=last_tokens,
    ).last_hidden_state[0]


def decode_one_token(model, token_ids: Tensor, positions: Tensor, cache: SharedPrefixKVCache) -> Tensor:
    """Run the next token of each completion, (B·G,), at its position, (B·G,); return the hidden states (B·G, E)."""
    cache.unmask_next()
    return model.model.language_model(
        inputs_embeds=model.get_input_embeddings()(token_ids[:, None]),
        position_ids=positions.expand(3, -1)[:, :, None],
        use_cache=False,
        attention_fn=cache.decode,
    ).last_hidden_state[:, 0]


class Decoder:
    """Decode token by token with a static cache.

    On a GPU a step is captured once as a CUDA graph and then replayed, so that a token costs GPU time only, not the
    time that Python takes to launch some thousand kernels.
    """

    def __init__(self, model, B: int, G: int, P: int, C: int):
        self.model, self.cache = model, SharedPrefixKVCache(model, B, G, P, C)
        self.token_ids, self.positions = torch.zeros(2, B * G, dtype=torch.long, device=model.device)
        self.graph = None

    def step(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Run the next token of each completion; return the hidden states (B·G, E), valid until the next step."""
        self.token_ids.copy_(token_ids)
        self.positions.copy_(positions)
        if self.graph is None and self.token_ids.is_cuda:
            self.capture()
        if self.graph is None:
            hidden = decode_one_token(self.model, self.token_ids, self.positions, self.cache)
        else:
            self.graph.replay()
            hidden = self.hidden
        self.cache.length += 1
        return hidden

    def capture(self) -> None:
        """Record a step; the replay that follows overwrites what the warm-up here has written."""
        arguments = (self.model, self.token_ids, self.positions, self.cache)
        stream = capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            decode_one_token(*arguments)  # warm-up: libraries initialise themselves, which cannot be captured
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as NCCL's, may call CUDA during the capture
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.hidden = decode_one_token(*arguments)


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """Return the one stream for all captures; cuBLAS keeps memory for every stream it has seen."""
    return torch.cuda.Stream()


@functools.lru_cache(maxsize=1)
def decoder_for(model, B: int, G: int, P: int, C: int) -> Decoder:
    """Return the decoder for these shapes, the last one again if they are the same.

    Other shapes mean new memory and a new graph. Only one decoder exists at a time, so that a run never needs more
    memory than its trial step on the longest prompt.
    """
    decoder_for.cache_clear()  # free the previous decoder before the next one allocates
    return Decoder(model, B, G, P, C)
