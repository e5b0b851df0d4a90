"""A Qwen2.5-VL with random weights, of any size: for the demo, the benchmark and tests."""

from typing import NamedTuple

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

TOKENS_PER_SECOND = 2  # mRoPE time positions per second of video, as in Qwen2.5-VL


class TextSize(NamedTuple):
    """Sizes of a language model, under the config's names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    mrope_section: list[int]  # for time, height and width; they add up to half the head size


class VisionSize(NamedTuple):
    """Sizes of a vision tower, under the config's names."""

    hidden_size: int
    depth: int
    num_heads: int
    intermediate_size: int
    fullatt_block_indexes: list[int]  # blocks that attend to whole frames instead of windows


# 3b and 7b: as published.
PUBLISHED_TOWER = VisionSize(1280, 32, 16, 3420, [7, 15, 23, 31])
SIZES = {
    "tiny": (TextSize(128, 4, 4, 2, 256, 512, True, [4, 6, 6]), VisionSize(64, 2, 2, 128, [1])),
    "cpu": (TextSize(512, 8, 8, 2, 1152, 4096, True, [8, 12, 12]), VisionSize(320, 4, 4, 855, [3])),
    "3b": (TextSize(2048, 36, 16, 2, 11008, 151936, True, [16, 24, 24]), PUBLISHED_TOWER),
    "7b": (TextSize(3584, 28, 28, 4, 18944, 152064, False, [16, 24, 24]), PUBLISHED_TOWER),
}


def random_model(
    text: TextSize, vision: VisionSize, ids: dict[str, int], rope_theta: float = 1e6, initializer_range: float = 0.02
) -> Qwen2_5_VLForConditionalGeneration:
    """Make a model of these sizes with random weights; ids: of the special tokens, under the config's names."""
    sizes = text._asdict()
    rope = {"rope_type": "default", "rope_theta": rope_theta, "mrope_section": sizes.pop("mrope_section")}
    config = Qwen2_5_VLConfig(
        text_config={
            **sizes,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": rope,
            "initializer_range": initializer_range,
            **{name: ids[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        },
        vision_config={
            **vision._asdict(),
            "out_hidden_size": text.hidden_size,
            "tokens_per_second": TOKENS_PER_SECOND,
            "initializer_range": initializer_range,
        },
        tie_word_embeddings=text.tie_word_embeddings,
        **ids,
    )
    return Qwen2_5_VLForConditionalGeneration(config)
