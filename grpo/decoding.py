"""Prefill each prompt once, then decode all its G completions together from one copy of the prompt's keys and values.

Prefill runs Hugging Face's layers. Decoding has a pass of its own over the same weights, with half as many operators:
for a few rows each of them takes longer to launch than to compute.

| B | prompts | P | prompt tokens | G | completions of a prompt | C | completion tokens |
| H | query heads | K | key heads | D | head size | E | hidden size | N | rows, B·G |
"""

import functools
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from data.loader import Prompt
from grpo.attention import causal, matmul_float32
from grpo.logprobs import embed

MIN_PROMPT_CAPACITY = 2048  # tokens, on a GPU; their keys and values take a hundredth of the weights' memory


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
        """Empty the cache for at most B prompts of these lengths; rows beyond them compute what nobody reads."""
        self.prompt_lengths = prompt_lengths
        unused = [0] * (len(self.bias) - len(prompt_lengths))
        lengths = torch.tensor(prompt_lengths + unused, device=self.bias.device)
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
        """Attention of one new token per completion to its prompt and the completion so far.

        query: (N, H, D); key, value: (N, K, D). Returns (N, H·D).
        """
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
        out = torch.baddbmm(out.view(B * K, G * R, D), weights[:, :, :P], prompt_values)
        return out.view(B, K, G, R, D).transpose(1, 2).reshape(B * G, K * R * D)


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


class LayerWeights(NamedTuple):
    """The weights of a decoder layer as decoding reads them: one matrix for what has the same input."""

    input_norm: Tensor  # (E,)
    query_key_value: Tensor  # (H·D + 2·K·D, E)
    query_key_value_bias: Tensor
    out: Tensor  # (E, H·D)
    mlp_norm: Tensor  # (E,)
    gate_up: Tensor  # (2 · MLP, E)
    down: Tensor  # (E, MLP)


def joined(parameters: list[torch.nn.Parameter]) -> Tensor:
    """Return parameters of equal width as one tensor, row below row, of which they are views from now on.

    So whoever writes into a parameter writes into the tensor. For the same parameters it is the same memory again.
    """
    first = parameters[0].detach()
    storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    if len(storages) == 1 and all(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in pairwise(parameters)):
        return first.as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())
    tensor = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, rows in zip(parameters, tensor.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = rows
    return tensor


def layer_weights(layer) -> LayerWeights:
    """Lay the weights of a decoder layer out for decoding; the layer itself computes with them as before."""
    attention, mlp = layer.self_attn, layer.mlp
    same_input = attention.q_proj, attention.k_proj, attention.v_proj
    return LayerWeights(
        input_norm=layer.input_layernorm.weight,
        query_key_value=joined([linear.weight for linear in same_input]),
        query_key_value_bias=joined([linear.bias for linear in same_input]),
        out=attention.o_proj.weight,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=joined([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight,
    )


def decode_one_token(
    model, layers: list[LayerWeights], token_ids: Tensor, positions: Tensor, cache: SharedPrefixKVCache
) -> Tensor:
    """Run the next token of each completion, (N,), at its position, (N,); return the hidden states (N, E)."""
    text, text_model = model.config.text_config, model.model.language_model
    H, K, E, eps = text.num_attention_heads, text.num_key_value_heads, text.hidden_size, text.rms_norm_eps
    D = E // H
    cache.unmask_next()
    hidden = F.embedding(token_ids, text_model.embed_tokens.weight)  # (N, E)
    # Of text, all three position axes are the same. Rotation: x · cos + (-second half, first half of x) · sin.
    cos, sin = text_model.rotary_emb(hidden, positions.expand(3, -1)[:, :, None])  # (N, 1, D)
    signed_sin = torch.cat([-sin[:, :, : D // 2], sin[:, :, D // 2 :]], dim=2)
    for number, layer in enumerate(layers):
        states = F.rms_norm(hidden, (E,), layer.input_norm, eps)
        states = F.linear(states, layer.query_key_value, layer.query_key_value_bias).view(-1, H + 2 * K, D)
        query_key, value = states.split([H + K, K], dim=1)
        query_key = torch.addcmul(query_key * cos, query_key.roll(D // 2, dims=2), signed_sin)
        attended = cache.decode(*query_key.split([H, K], dim=1), value, number)  # (N, H·D)
        hidden = torch.addmm(hidden, attended, layer.out.T)
        states = F.rms_norm(hidden, (E,), layer.mlp_norm, eps)
        gate, up = F.linear(states, layer.gate_up).chunk(2, dim=1)
        hidden = torch.addmm(hidden, F.silu(gate) * up, layer.down.T)
    return F.rms_norm(hidden, (E,), text_model.norm.weight, eps)


class Decoder:
    """Decode token by token with a static cache, which has room for B prompts of P tokens.

    On a GPU a step is captured once as a CUDA graph and then replayed, so that a token costs GPU time only, not the
    time that Python takes to launch hundreds of kernels.
    """

    def __init__(self, model, B: int, G: int, P: int, C: int):
        self.model, self.cache, self.room = model, SharedPrefixKVCache(model, B, G, P, C), (B, P)
        self.layers = [layer_weights(layer) for layer in model.model.language_model.layers]
        self.token_ids, self.positions = torch.zeros(2, B * G, dtype=torch.long, device=model.device)
        self.graph = None

    def step(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Run the next token of each completion; return the hidden states (N, E), valid until the next step."""
        N = len(token_ids)
        self.token_ids[:N] = token_ids
        self.positions[:N] = positions
        if self.graph is None and self.token_ids.is_cuda:
            self.capture()
        if self.graph is None:
            hidden = self.decode()
        else:
            self.graph.replay()
            hidden = self.hidden
        self.cache.length += 1
        return hidden[:N]

    def decode(self) -> Tensor:
        """Run a step on what stands in `token_ids` and `positions`."""
        return decode_one_token(self.model, self.layers, self.token_ids, self.positions, self.cache)

    def capture(self) -> None:
        """Record a step; the replay that follows overwrites what the warm-up here has written."""
        stream = capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.decode()  # warm-up: libraries initialise themselves, which cannot be captured
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as NCCL's, may call CUDA during the capture
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.hidden = self.decode()


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """Return the one stream for all captures; cuBLAS keeps memory for every stream it has seen."""
    return torch.cuda.Stream()


DECODERS: dict[tuple[int, int], Decoder] = {}  # by G and C: that of training, and that of evaluations


def decoder_for(model, B: int, G: int, P: int, C: int) -> Decoder:
    """Return a decoder for B prompts of at most P tokens, the last one again if it has this room.

    More room means new memory and, on a GPU, a new graph. So there the room is generous, and never shrinks.
    """
    last = DECODERS.pop((G, C), None)
    if last is not None and last.model is not model:
        last = None
    if model.device.type == "cuda":
        P = max(MIN_PROMPT_CAPACITY, 1 << (P - 1).bit_length())
        if last is not None:
            B, P = max(B, last.room[0]), max(P, last.room[1])
    if last is None or last.room != (B, P):
        last = None  # free it before the next one allocates
        last = Decoder(model, B, G, P, C)
    DECODERS[G, C] = last
    return last
