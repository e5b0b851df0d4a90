"""Faster replacements for some of Hugging Face's layers.

Each computes what the layer computes, with the layer's own weights; modules, names and checkpoints stay the same.
"""

from functools import partial

import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, rotate_half

import grpo.attention  # noqa: F401  registers the attention functions named below


def use_our_layers(model) -> Qwen2_5_VLForConditionalGeneration:
    """Make the model use the functions of `grpo/attention.py` and of this file, and a `LastLayer`; in place."""
    model.set_attn_implementation({"text_config": "shared_prefix", "vision_config": "varlen_like_flash"})
    patch_embed, last = model.model.visual.patch_embed, model.model.language_model.layers[-1]
    patch_embed.forward = partial(embed_patches, patch_embed)
    norm_class = type(model.model.language_model.norm)  # also of the vision tower
    for module in model.modules():
        if isinstance(module, norm_class):
            module.forward = partial(rms_norm, module)
    if not isinstance(last, LastLayer):
        # Hugging Face's layers checkpoint gradients in `__call__`, so the replacement must be a class, not a function;
        # changing the class of the layer keeps its weights and their names.
        last.__class__ = LastLayer
    return model


def use_hugging_faces_layers(model) -> None:
    """Undo `use_our_layers`, in place. A `LastLayer` then computes all positions."""
    model.set_attn_implementation("sdpa")
    for layer in model.modules():
        vars(layer).pop("forward", None)


def embed_patches(patch_embed, pixels: Tensor) -> Tensor:
    """Embed patches, (S, 1176) -> (S, hidden size).

    The convolution sees each patch once, so it is a matrix product, which takes a fraction of the time.
    """
    weight = patch_embed.proj.weight
    return F.linear(pixels.to(weight.dtype), weight.flatten(1))


def rms_norm(norm, x: Tensor) -> Tensor:
    """Normalise (..., E) in one operator: of float32 the same to the bit, of bfloat16 rounded once instead of twice."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


class LastLayer(Qwen2_5_VLDecoderLayer):
    """The last decoder layer, computed only for the requested positions.

    Of a prompt, only the last token's state predicts anything. The other tokens' keys and values are needed, their
    queries, attention and MLP are not.
    """

    def forward(self, hidden: Tensor, position_embeddings, query_indices: Tensor | None = None, **kwargs) -> Tensor:
        """Run a row, (1, L, E) -> (1, queries, E); query_indices: (queries,) positions in the row, None for all."""
        if query_indices is None:
            return super().forward(hidden, position_embeddings=position_embeddings, **kwargs)
        attention, states = self.self_attn, self.input_layernorm(hidden)
        cos, sin = (x[:, None] for x in position_embeddings)  # (1, 1, L, D)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (-1, attention.head_dim)).transpose(1, 2)  # (1, L, heads · D) -> (1, heads, L, D)

        query = heads(attention.q_proj(states[:, query_indices]))
        query = query * cos[:, :, query_indices] + rotate_half(query) * sin[:, :, query_indices]
        key, value = heads(attention.k_proj(states)), heads(attention.v_proj(states))
        key = key * cos + rotate_half(key) * sin
        out = kwargs["attention_fn"](query, key, value, attention.layer_idx)
        hidden = hidden[:, query_indices] + attention.o_proj(out.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))
