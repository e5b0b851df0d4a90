"""Load a Qwen2.5-VL, know its special tokens, and save it as an ordinary Hugging Face folder."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.utils import cached_file, logging

import grpo.attention  # noqa: F401  registers the attention functions named below
from data.dataset import InputError

logging.disable_progress_bar()  # of loading and saving; the run has a bar of its own

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
# What else an inference server wants to find beside weights, config and tokenizer.
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")


@dataclass
class SpecialTokens:
    """Token ids that sampling treats apart, on the model's device."""

    stop_ids: Tensor  # a completion ends with one of these
    banned_ids: Tensor  # never sampled: a placeholder in a completion would ask the model for a video

    @property
    def device(self) -> torch.device:
        return self.stop_ids.device


def load_tokenizer(model_id: str):
    """Load the tokenizer of a Qwen2.5-VL folder or hub name; raise InputError if it is none."""
    try:
        config = AutoConfig.from_pretrained(model_id)
        tokenizer = AutoTokenizer.from_pretrained(model_id)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--model_id {model_id!r}: no config and tokenizer can be read ({first_line(error)})"
        ) from error
    if config.model_type != "qwen2_5_vl":
        raise InputError(f"--model_id {model_id!r} is a {config.model_type} model: give a Qwen2.5-VL")
    missing = [token for token in VISION_TOKENS if token not in tokenizer.get_vocab()]
    if missing or not tokenizer.chat_template:
        lack = ", ".join(missing) or "chat template"
        raise InputError(f"--model_id {model_id!r}: its tokenizer has no {lack}: take the tokenizer of a Qwen2.5-VL")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)
    except TemplateError as error:
        raise InputError(f"--model_id {model_id!r}: its chat template fails ({first_line(error)})") from error
    return tokenizer


def load_model(model_id: str) -> Qwen2_5_VLForConditionalGeneration:
    """Load the model in float32, the precision of the master weights, ready to train, with shared-prefix attention.

    Raise InputError if weights cannot be read, or some are missing, which would be random ones.
    """
    try:
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model_id, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"--model_id {model_id!r}: its weights cannot be read ({first_line(error)})") from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"--model_id {model_id!r} lacks {len(missing)} weights, such as {missing[0]}: fetch it anew")
    return use_our_attention(model).train()


def first_line(error: Exception) -> str:
    """Say what an error of a library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def use_our_attention(model) -> Qwen2_5_VLForConditionalGeneration:
    """Let the language model and the vision tower call the functions of `grpo/attention.py`."""
    model.set_attn_implementation({"text_config": "shared_prefix", "vision_config": "segments_like_flash"})
    return model


def special_tokens(model, tokenizer, device) -> SpecialTokens:
    """Find the ids that end a completion and those that must not occur in one."""
    stop = model.generation_config.eos_token_id
    stop = {*(stop if isinstance(stop, list) else [stop]), tokenizer.eos_token_id} - {None}
    banned = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
    return SpecialTokens(
        stop_ids=torch.tensor(sorted(stop), device=device), banned_ids=torch.tensor(banned, device=device)
    )


def processor_files(model_id: str) -> list[str]:
    """Find the small files of the model's processor, which let a saved model serve wherever the old one did."""
    paths = (cached_file(model_id, name, _raise_exceptions_for_missing_entries=False) for name in PROCESSOR_FILES)
    return [path for path in paths if path]


def save_model(model, tokenizer, folder: str, processor_files: list[str]) -> None:
    """Write weights, config and tokenizer; the folder appears under its name only when it is whole.

    model: with whole, not sharded, weights.
    """
    unfinished = Path(f"{folder}.unfinished")
    if unfinished.exists():  # left by a run that was killed while saving
        shutil.rmtree(unfinished)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    for path in processor_files:
        if not (unfinished / Path(path).name).exists():
            shutil.copy(path, unfinished)
    os.rename(unfinished, folder)
