"""Where the stock model's layers compute what nobody needs, or slowly: our functions in their place.

Every one does what the layer does, on the layer's own weights; Hugging Face's modules, names and checkpoints stay.
"""

from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, rotate_half

import grpo.attention  # noqa: F401  registers the attention functions named below

FEW_ROWS = 8  # while decoding, a linear layer sees about so many


def use_our_layers(model) -> Qwen2_5_VLForConditionalGeneration:
    """Let the model call the attention functions of `grpo/attention.py` and `embed_patches`; give it a `LastLayer`."""
    model.set_attn_implementation({"text_config": "shared_prefix", "vision_config": "segments_like_flash"})
    patch_embed, last = model.model.visual.patch_embed, model.model.language_model.layers[-1]
    patch_embed.forward = partial(embed_patches, patch_embed)
    if not isinstance(last, LastLayer):
        last.__class__ = LastLayer  # a class, since Hugging Face wraps the forward of one in gradient checkpointing
    return model


def embed_patches(patch_embed, pixels: Tensor) -> Tensor:
    """Embed patches, (S, 1176) -> (S, hidden size): the convolution sees each patch once, so it is a matrix product.

    As such it takes a fraction of the time.
    """
    weight = patch_embed.proj.weight
    return F.linear(pixels.to(weight.dtype), weight.flatten(1))


class LastLayer(Qwen2_5_VLDecoderLayer):
    """The language model's last layer, for the tokens that the caller has a use for.

    Of a prompt the completions need its last token's state alone, and for attention all keys and values: the other
    tokens' queries and MLP would be computed for nobody.
    """

    def forward(self, hidden: Tensor, position_embeddings, kept: Tensor | None = None, **kwargs) -> Tensor:
        """Pass a row, (1, L, E) -> (1, kept, E); kept: the places of the tokens in the row, None for all."""
        if kept is None:
            return super().forward(hidden, position_embeddings=position_embeddings, **kwargs)
        attention, states = self.self_attn, self.input_layernorm(hidden)
        cos, sin = (x[:, None] for x in position_embeddings)  # (1, 1, L, D)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (-1, attention.head_dim)).transpose(1, 2)  # (1, L, heads · D) -> (1, heads, L, D)

        query = heads(attention.q_proj(states[:, kept]))
        query = query * cos[:, :, kept] + rotate_half(query) * sin[:, :, kept]
        key, value = heads(attention.k_proj(states)), heads(attention.v_proj(states))
        key = key * cos + rotate_half(key) * sin
        out = kwargs["attend_fn"](query, key, value, attention.layer_idx)
        hidden = hidden[:, kept] + attention.o_proj(out.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def pack_weights(module) -> None:
    """Let linear layers compute with copies of their weights in the order in which oneDNN reads them.

    On a CPU with these operators, which torch.compile uses too, a token takes a fifth less time to sample.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), FEW_ROWS)
            layer.forward = partial(packed_linear, packed, layer.bias)


def packed_linear(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Do what `nn.Linear` does."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
