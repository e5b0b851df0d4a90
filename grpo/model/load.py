"""Load a Qwen2.5-VL, know its special tokens, and save it as an ordinary Hugging Face folder."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import cached_file, logging

from data.sample import VISION_TOKENS, InputError, first_line
from grpo.model.layers import use_our_layers

logging.disable_progress_bar()  # of loading and saving; the run has a bar of its own

# Files that inference servers expect beside weights, config and tokenizer.
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")


@dataclass
class SpecialTokens:
    """Token ids with a role in sampling, on the model's device, and the tokenizer."""

    eos_token_ids: Tensor  # a completion ends with one of these
    suppress_tokens: Tensor  # never sampled: the model would look for a video behind a placeholder in a completion
    tokenizer: object = None

    @property
    def device(self) -> torch.device:
        return self.eos_token_ids.device

    def without_eos(self) -> "SpecialTokens":
        """Return a copy in which no token ends a completion, so that all have full length."""
        return replace(self, eos_token_ids=torch.full_like(self.eos_token_ids, -1))


def load_model(model_id: str, dtype=torch.float32) -> Qwen2_5_VLForConditionalGeneration:
    """Load the model, by default in float32, the precision of the master weights, with shared-prefix attention.

    dtype: "auto" for the precision in which it is stored.
    Raises InputError if weights cannot be read, or some are missing, in whose place there would be random ones.
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
    eos = model.generation_config.eos_token_id
    eos = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    suppressed = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
    ids = (torch.tensor(ids, device=device) for ids in (sorted(eos), suppressed))
    return SpecialTokens(*ids, tokenizer)


def processor_files(model_id: str) -> list[str]:
    """Find the small files of the model's processor; inference servers need them beside a saved model."""
    paths = (cached_file(model_id, name, _raise_exceptions_for_missing_entries=False) for name in PROCESSOR_FILES)
    return [path for path in paths if path]


@dataclass
class ModelFiles:
    """What a model folder holds."""

    model: object  # an unsharded model, or an `Adapter`
    tokenizer: object
    processor_files: list[str]  # paths of small files to copy

    def write(self, folder: Path) -> None:
        """Write weights, config, tokenizer and the processor's files, which inference servers want to find."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        for path in self.processor_files:
            if not (folder / Path(path).name).exists():
                shutil.copy(path, folder)
