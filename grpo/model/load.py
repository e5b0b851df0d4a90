"""Load a Qwen2.5-VL, know its special tokens, and save it as an ordinary Hugging Face folder."""
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import cached_file, logging

from data.dataset import InputError, first_line
from data.prompt import VISION_TOKENS
from grpo.model.layers import use_our_layers

logging.disable_progress_bar()  # of loading and saving; the run has a bar of its own

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


def load_model(model_id: str, dtype=torch.float32) -> Qwen2_5_VLForConditionalGeneration:
    """Load the model in float32, the precision of the master weights, ready to train, with shared-prefix attention.

    dtype: "auto" for the precision that it is stored in.
    Raise InputError if weights cannot be read, or some are missing, which would be random ones.
    """
    try:
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model_id, dtype=dtype, output_loading_info=True
        )
    except Exception as error:
        raise InputError(f"--model_id {model_id!r}: its weights cannot be read ({first_line(error)})") from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"--model_id {model_id!r} lacks {len(missing)} weights, such as {missing[0]}: fetch it anew")
    return use_our_layers(model).train()


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

    model: with whole, not sharded, weights; or an `Adapter`.
    """
    unfinished = Path(f"{folder}.unfinished")
    if unfinished.exists():  # left by a program that was killed while saving
        shutil.rmtree(unfinished)
    write_model(model, tokenizer, processor_files, unfinished)
    os.rename(unfinished, folder)


def write_model(model, tokenizer, processor_files: list[str], folder: Path) -> None:
    """Write weights, config, tokenizer and what else an inference server wants to find."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in processor_files:
        if not (folder / Path(path).name).exists():
            shutil.copy(path, folder)
