"""Load a Qwen2.5-VL, know its special tokens and its parts, and save it as an ordinary Hugging Face folder.

Its parts are the language model, the vision tower, the merger between them, and with LoRA their adapters: each is
trained or frozen as a whole, at a learning rate of its own.
"""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.utils import cached_file, logging

from data.dataset import InputError
from grpo.config import Config
from grpo.model.layers import use_our_layers

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
    except Exception as error:  # what is edited by hand fails in every way
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
        text = tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)
    except Exception as error:
        raise InputError(f"--model_id {model_id!r}: its chat template fails ({first_line(error)})") from error
    if text.count("<|video_pad|>") != 1:
        raise InputError(f"--model_id {model_id!r}: its chat template knows no videos: take that of a Qwen2.5-VL")
    return tokenizer


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


def first_line(error: Exception) -> str:
    """Say what an error of a library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def whole_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor that is sharded, as in `grpo/model/sharding.py`; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def special_tokens(model, tokenizer, device) -> SpecialTokens:
    """Find the ids that end a completion and those that must not occur in one."""
    stop = model.generation_config.eos_token_id
    stop = {*(stop if isinstance(stop, list) else [stop]), tokenizer.eos_token_id} - {None}
    banned = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
    return SpecialTokens(
        stop_ids=torch.tensor(sorted(stop), device=device), banned_ids=torch.tensor(banned, device=device)
    )


def learning_rates(config: Config) -> dict[str, float | None]:
    """Return the peak learning rate of each part; None: the part is frozen. Parts without parameters are listed too."""
    vision_lr = config.learning_rate if config.vision_lr is None else config.vision_lr
    merger_lr = config.learning_rate if config.merger_lr is None else config.merger_lr
    return {
        "language model": None if config.freeze_llm or config.lora_enable else config.learning_rate,
        "adapters of the language model": config.learning_rate,
        "vision tower": None if config.freeze_vision_tower else vision_lr,
        "adapters of the vision tower": vision_lr,
        "merger": None if config.freeze_merger else merger_lr,
    }


def part_of(name: str) -> str:
    """Name the part that a parameter belongs to: a key of `learning_rates`."""
    part = "merger" if "visual.merger." in name else "vision tower" if "visual." in name else "language model"
    return f"adapters of the {part}" if ".lora_" in name else part


def freeze(model, config: Config) -> None:
    """Let gradients flow to the trained parts alone; do it before sharding, with the adapters in place."""
    rates = learning_rates(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rates[part_of(name)] is not None)


def parameter_groups(model, config: Config) -> list[dict]:
    """Group the trained parameters for the optimizer: by part, each with its learning rate; only matrices decay."""
    groups = []
    for part, lr in learning_rates(config).items():
        own = [p for name, p in model.named_parameters() if part_of(name) == part and p.requires_grad]
        matrices, vectors = [p for p in own if p.ndim >= 2], [p for p in own if p.ndim < 2]
        for parameters, decay in ((matrices, config.weight_decay), (vectors, 0.0)):
            if parameters:
                groups.append({"name": part, "params": parameters, "lr": lr, "weight_decay": decay})
    return groups


def make_optimizer(model, config: Config, total_steps: int):
    """AdamW, each part at its own learning rate, weight decay on matrices alone; warm-up, then a cosine to 0."""
    optimizer = torch.optim.AdamW(parameter_groups(model, config), fused=True)
    warmup = math.ceil(config.warmup_ratio * total_steps)
    # The first step already moves: its rollouts cost as much as any.
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=max(warmup, 1))
    fall = CosineAnnealingLR(optimizer, T_max=max(total_steps - warmup, 1))
    return optimizer, SequentialLR(optimizer, [rise, fall], milestones=[warmup])


@torch.no_grad()
def make_states(optimizer) -> None:
    """Let AdamW make its states, two more copies of what is trained, by a step with gradients of 0.

    Else its first step makes them after the backward pass, whose peak of memory would lack them. The learning rate or
    the weight decay must be 0, so that the weights stay as they are.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def table_of_parts(model, config: Config) -> str:
    """Show what is trained: part, parameters, trained or not, learning rate."""
    sizes = {}
    for name, parameter in model.named_parameters():
        sizes[part_of(name)] = sizes.get(part_of(name), 0) + parameter.numel()
    lines = [f"{'part':30} {'parameters':>15}   trained   learning rate"]
    rates = learning_rates(config)
    for part, size in sizes.items():
        rate = "no                    -" if rates[part] is None else f"yes {rates[part]:>19g}"
        lines.append(f"{part:30} {size:15,}   {rate}")
    total, trained = sum(sizes.values()), sum(size for part, size in sizes.items() if rates[part] is not None)
    return "\n".join([*lines, f"{'trained in all':30} {trained:15,}   of {total:,} ({trained / total:.1%})"])


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
