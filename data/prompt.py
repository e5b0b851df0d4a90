"""Conversation -> prompt ids and their mRoPE positions.

The tokenizer's chat template writes one <|video_pad|> per video and one <|image_pad|> per image; it is repeated, once
per token of the video or image.
Positions have three axes (time, height, width), the multimodal RoPE of Qwen2-VL (arXiv:2409.12191, section 2.1) and
Qwen2.5-VL (arXiv:2502.13923, section 2.1.2). For text all three count up together; inside a video or an
image they are the coordinates in its grid, with time in units of 1 / tokens_per_second seconds. Text after a video
continues at the largest position of any axis, time included, plus 1. The weights were trained with these positions.
transformers 5.3 and later continue at the longer side of the grid instead, inside the video's own time (data/README.md
has the versions).

P prompt tokens with videos and images expanded, M videos and images.
"""

import os
import re

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from data.media.patches import MERGE_SIZE
from data.sample import VISION_TOKENS, InputError, check_text, first_line

TAG_PATTERN = re.compile(r"\n?<(video|image)>\n?")  # the tag includes one newline on each side
PLACEHOLDERS = ("<|video_pad|>", "<|image_pad|>")


def load_tokenizer(model_id: str):
    """Load the tokenizer of a Qwen2.5-VL, from a folder or by its name on the hub. Raises InputError."""
    if os.path.isfile(os.path.join(model_id, "adapter_config.json")):
        merge = f"python -m grpo.export --adapter {model_id} --output MERGED"
        raise InputError(f"--model_id {model_id!r} holds adapters: merge them ({merge}), or evaluate them as --adapter")
    try:
        config = AutoConfig.from_pretrained(model_id)
        if config.model_type != "qwen2_5_vl":
            raise ValueError(f"it is a {config.model_type} model")
        tokenizer = AutoTokenizer.from_pretrained(model_id)
        if missing := set(VISION_TOKENS) - set(tokenizer.get_vocab()):
            raise ValueError(f"its tokenizer has no {min(missing)}")
        content = [{"type": "video"}, {"type": "image"}]
        text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        if any(text.count(placeholder) != 1 for placeholder in PLACEHOLDERS):
            raise ValueError("its chat template knows no videos or images")
    except Exception as error:  # of any type, where a file was edited by hand
        why = f"its config, tokenizer or chat template cannot be used: {first_line(error)}"
        raise InputError(f"--model_id {model_id!r} is no Qwen2.5-VL, or {why}") from error
    return tokenizer


def encode_prompt(
    turns: tuple[tuple[str, str], ...],
    tokenizer: PreTrainedTokenizerBase,
    grid_thw: torch.Tensor,
    second_per_grid_ts: torch.Tensor,
    tokens_per_second: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompt_ids (P,) and position_ids (3, P) of a conversation, up to where the assistant's answer begins.

    turns: (role, text) with the roles system, user and assistant. The k-th `<video>` or `<image>` tag in the user texts
    stands for row k of grid_thw (M, 3), in patches. second_per_grid_ts: (M,) seconds, 0 for images. tokens_per_second:
    from the vision config. Raises ValueError if the numbers of tags and rows differ, or a text contains special tokens.
    """
    check_text(turns)
    messages = []
    for role, text in turns:
        parts = TAG_PATTERN.split(text) if role == "user" else [text]  # a text, a kind of media, a text, …, a text
        content = [{"type": part} if i % 2 else {"type": "text", "text": part} for i, part in enumerate(parts)]
        messages.append({"role": role, "content": content})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    is_media = torch.isin(ids, torch.tensor(tokenizer.convert_tokens_to_ids(PLACEHOLDERS)))
    if (num_tags := int(is_media.sum())) != len(grid_thw):
        raise ValueError(f"the text has {num_tags} tags for {len(grid_thw)} videos and images")
    # A special token always becomes exactly one id, so repeating the id equals tokenizing the repeated text.
    repeats = torch.ones_like(ids)
    repeats[is_media] = media_lengths(grid_thw)
    is_media = is_media.repeat_interleave(repeats)  # (P,)
    return ids.repeat_interleave(repeats), mrope_positions(is_media, grid_thw, second_per_grid_ts, tokens_per_second)


def encode_answer(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the token ids of an answer, (C,), its end included. Raises ValueError if it contains special tokens."""
    check_text([("answer", text)])
    return torch.tensor([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id])


def media_lengths(grid_thw: torch.Tensor) -> torch.Tensor:
    """Return the number of tokens of each video or image: (M, 3) patches -> (M,)."""
    return grid_thw.prod(dim=-1) // MERGE_SIZE**2


def mrope_positions(
    is_media: torch.Tensor, grid_thw: torch.Tensor, second_per_grid_ts: torch.Tensor, tokens_per_second: int
) -> torch.Tensor:
    """Return the position of every prompt token on the three axes: (3, P).

    is_media: (P,) True at the tokens of videos and images; grid_thw: (M, 3) patches; second_per_grid_ts: (M,) seconds.
    Equals `rope2d` of Qwen's own fine-tuning code. Raises ValueError if the prompt has more or fewer
    placeholders than the grids have tokens.
    """
    lengths, placeholders = media_lengths(grid_thw), is_media.nonzero().flatten()
    if len(placeholders) != lengths.sum():
        raise ValueError(f"the prompt has {len(placeholders)} placeholders for {lengths.sum()} tokens")
    # Seconds are multiplied before they are cut to whole positions. In float32, as in Qwen's code: in float64 a product
    # such as 45 * 1.4 falls on the other side of a whole number.
    steps = tokens_per_second * torch.as_tensor(second_per_grid_ts, dtype=torch.float32)  # (M,)

    spans = []
    done = 0  # number of prompt tokens that have their positions
    position = 0  # of the next token
    starts = placeholders[lengths.cumsum(0) - lengths].tolist()  # (M,) the first token of each
    for (t, h, w), start, step in zip(grid_thw.tolist(), starts, steps, strict=True):
        spans.append((torch.arange(start - done) + position).expand(3, -1))
        position += start - done

        h, w = h // MERGE_SIZE, w // MERGE_SIZE
        time = (torch.arange(t) * step).long()
        grid = torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")  # 3 x (t, h/2, w/2)
        spans.append(torch.stack(grid).flatten(1) + position)
        position += max(int(time[-1]) + 1, h, w)
        done = start + t * h * w
    spans.append((torch.arange(len(is_media) - done) + position).expand(3, -1))
    return torch.cat(spans, dim=1)  # (3, P)
