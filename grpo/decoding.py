"""Pass prompts once, then decode token by token, reading one copy of each prompt's keys and values for all its G
completions.

| B | prompts | P | prompt tokens | G | completions of a prompt | C | completion tokens |
| H | query heads | K | key heads | D | head size | E | hidden size |
"""

import functools

import torch
from torch import Tensor

from data.loader import Prompt
from grpo.attention import causal, matmul_float32
from grpo.logprobs import embed


class GroupCache:
    """Keys and values of B prompts, one copy each, and of their G completions, by layer.

    All memory is taken at once and stays where it is, and what is held where is known to tensors alone, so that one
    decoding step can be captured as a CUDA graph and replayed for every other. P and C are what there is room for.
    """

    def __init__(self, model, B: int, G: int, P: int, C: int):
        config, dtype, device = model.config.text_config, model.dtype, model.device
        layers, K, D = config.num_hidden_layers, config.num_key_value_heads, config.hidden_size
        D = D // config.num_attention_heads
        self.prompt_keys, self.prompt_values = torch.empty(2, layers, B, K, P, D, dtype=dtype, device=device)
        self.own_keys, self.own_values = torch.empty(2, layers, B, K, G, C, D, dtype=dtype, device=device)
        self.bias = torch.zeros(B, 1, 1, P + C, device=device)  # 0 for what is held, -inf for empty room
        self.length = torch.zeros(1, dtype=torch.long, device=device)  # completion tokens held
        self.prompt_lengths: list[int] = []

    def begin(self, prompt_lengths: list[int]) -> None:
        """Forget what is held; expect prompts of these lengths."""
        self.prompt_lengths = prompt_lengths
        lengths = torch.tensor(prompt_lengths, device=self.bias.device)
        is_held = torch.arange(self.bias.shape[3], device=lengths.device) < lengths[:, None]
        self.bias.copy_(torch.where(is_held, 0.0, -torch.inf)[:, None, None])
        self.length.zero_()
        for held in (self.prompt_keys, self.prompt_values, self.own_keys, self.own_values):
            held.zero_()  # what is not held yet must be finite, since it is weighed with 0

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """Attend causally within each prompt of the row `[p1 | … | pB]`, (1, H, L, D); keep keys and values.

        Queries may be those of all tokens, or the last one of each prompt: (1, H, B, D).
        """
        queries = query.split(self.prompt_lengths if query.shape[2] == key.shape[2] else 1, dim=2)
        keys, values = (x.split(self.prompt_lengths, dim=2) for x in (key, value))
        prompts = list(zip(queries, keys, values, strict=True))
        for b, (_, k, v) in enumerate(prompts):
            self.prompt_keys[layer, b, :, : k.shape[2]] = k[0]
            self.prompt_values[layer, b, :, : v.shape[2]] = v[0]
        return torch.cat([causal(q, k, v) for q, k, v in prompts], dim=2)

    def open_slot(self) -> None:
        """Let the next token of each completion be seen; once per step, before the layers `decode`."""
        self.bias.index_fill_(3, self.length + self.prompt_keys.shape[3], 0.0)

    def decode(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """Attend from one new token of each completion, (B·G, H, 1, D), to its prompt and to what precedes it."""
        prompt_keys, prompt_values = self.prompt_keys[layer].flatten(0, 1), self.prompt_values[layer].flatten(0, 1)
        own_keys, own_values = self.own_keys[layer], self.own_values[layer]
        B, K, G, C, D = own_keys.shape
        P, R = prompt_keys.shape[1], query.shape[1] // K  # R query heads share a key head
        own_keys.index_copy_(3, self.length, key.view(B, G, K, 1, D).transpose(1, 2))
        own_values.index_copy_(3, self.length, value.view(B, G, K, 1, D).transpose(1, 2))

        # All G·R queries of a key head read the prompt in one matrix product; no per-completion copy of it exists.
        queries = query.view(B, G, K, R, D).transpose(1, 2).reshape(B * K, G * R, D)
        prompt_scores = matmul_float32(queries, prompt_keys.transpose(1, 2))  # (B·K, G·R, P)
        own_scores = matmul_float32(queries.view(-1, R, D), own_keys.view(-1, C, D).transpose(1, 2))  # (B·K·G, R, C)
        scores = torch.cat([prompt_scores, own_scores.view(B * K, G * R, C)], dim=2).view(B, K, G * R, P + C)
        weights = torch.add(self.bias, scores, alpha=D**-0.5).softmax(dim=3).to(value.dtype).flatten(0, 1)
        out = weights[:, :, P:].reshape(-1, R, C) @ own_values.view(-1, C, D)  # (B·K·G, R, D)
        out = out.view(B * K, G * R, D) + weights[:, :, :P] @ prompt_values
        return out.view(B, K, G, R, D).transpose(1, 2).reshape(B * G, K * R, 1, D)


def prefill(model, prompts: list[Prompt], cache: GroupCache) -> Tensor:
    """Pass the prompts through the model, keep their keys and values, return their last hidden states: (B, E)."""
    cache.begin([len(prompt.prompt_ids) for prompt in prompts])
    token_ids = torch.cat([prompt.prompt_ids for prompt in prompts])
    last_tokens = torch.tensor(cache.prompt_lengths, device=token_ids.device).cumsum(0) - 1
    return model.model.language_model(
        inputs_embeds=embed(model, token_ids, prompts),
        position_ids=torch.cat([prompt.position_ids for prompt in prompts], dim=1)[:, None],
        use_cache=False,
        attend_fn=cache.prefill,
        kept=last_tokens,
    ).last_hidden_state[0]


def decode_one_token(model, token_ids: Tensor, positions: Tensor, cache: GroupCache) -> Tensor:
    """Pass one further token of each completion, (B·G,), at its mRoPE position, (B·G,); return (B·G, E)."""
    cache.open_slot()
    return model.model.language_model(
        inputs_embeds=model.get_input_embeddings()(token_ids[:, None]),
        position_ids=positions.expand(3, -1)[:, :, None],
        use_cache=False,
        attend_fn=cache.decode,
    ).last_hidden_state[:, 0]


class Decoder:
    """Decode token by token over tensors that stay where they are.

    On a GPU a step is captured once, as a CUDA graph, and replayed from then on: a token costs what the GPU needs for
    it, not what Python needs to launch some thousand kernels.
    """

    def __init__(self, model, B: int, G: int, P: int, C: int):
        self.model, self.cache = model, GroupCache(model, B, G, P, C)
        self.token_ids, self.positions = torch.zeros(2, B * G, dtype=torch.long, device=model.device)
        self.graph = None

    def step(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Pass one further token of each completion; return the last hidden states, valid until the next step."""
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
        """Record a step, which writes what the replay writes again."""
        arguments = (self.model, self.token_ids, self.positions, self.cache)
        beside = capture_stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            decode_one_token(*arguments)  # libraries set themselves up, which cannot be captured
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as NCCL's, may go on calling CUDA meanwhile
        with torch.cuda.graph(self.graph, stream=beside, capture_error_mode="thread_local"):
            self.hidden = decode_one_token(*arguments)


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """Return the stream for all captures: for each that there is, cuBLAS keeps some memory for good."""
    return torch.cuda.Stream()


@functools.lru_cache(maxsize=1)
def decoder_for(model, B: int, G: int, P: int, C: int) -> Decoder:
    """Keep a decoder while the shapes stay the same; others mean new memory and a new graph.

    There is never more than one, lest a run needs more memory than its trial step on the longest prompt.
    """
    decoder_for.cache_clear()  # the former one goes before the next takes its memory
    return Decoder(model, B, G, P, C)
