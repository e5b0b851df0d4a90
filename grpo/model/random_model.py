"""A Qwen2.5-VL with random weights, of any size: for the demo, the benchmark and tests."""

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

TOKENS_PER_SECOND = 2  # the pace of mRoPE's time axis, as in Qwen2.5-VL
# hidden size, layers, heads, key heads, intermediate size, vocabulary, tied embeddings, M-RoPE sections; then of the
# vision tower: hidden size, blocks, heads, intermediate size, blocks with full attention. 3b and 7b: as published.
SIZES = {
    "tiny": ((128, 4, 4, 2, 256, 512, True, [4, 6, 6]), (64, 2, 2, 128, [1])),
    "cpu": ((512, 8, 8, 2, 1152, 4096, True, [8, 12, 12]), (320, 4, 4, 855, [3])),
    "3b": ((2048, 36, 16, 2, 11008, 151936, True, [16, 24, 24]), (1280, 32, 16, 3420, [7, 15, 23, 31])),
    "7b": ((3584, 28, 28, 4, 18944, 152064, False, [16, 24, 24]), (1280, 32, 16, 3420, [7, 15, 23, 31])),
}


def random_model(
    text: tuple, vision: tuple, ids: dict[str, int], rope_theta: float = 1e6, initializer_range: float = 0.02
) -> Qwen2_5_VLForConditionalGeneration:
    """Draw the weights of a model with sizes as in `SIZES`; ids: of the special tokens, under the config's names."""
    hidden, layers, heads, key_heads, intermediate, vocabulary, tied, sections = text
    names = ("hidden_size", "depth", "num_heads", "intermediate_size", "fullatt_block_indexes")
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "intermediate_size": intermediate,
            "vocab_size": vocabulary,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, "mrope_section": sections},
            "tie_word_embeddings": tied,
            "initializer_range": initializer_range,
            **{name: ids[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        },
        vision_config={
            **dict(zip(names, vision, strict=True)),
            "out_hidden_size": hidden,
            "tokens_per_second": TOKENS_PER_SECOND,
            "initializer_range": initializer_range,
        },
        tie_word_embeddings=tied,
        **ids,
    )
    return Qwen2_5_VLForConditionalGeneration(config)
