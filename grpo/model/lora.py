"""LoRA (arXiv:2106.09685): y = W x + (lora_alpha / lora_rank) B A x, where W is frozen and A and B are trained.

The adapters are peft's layers, put into the decoder layers (and vision blocks) so that they are sharded with them.
Sampling, evaluating and the exported model use W + (lora_alpha / lora_rank) B A instead, one matrix as before: no
further work per token, and no dropout (`WholeWeights` in `grpo/model/sharding.py`).

| r | rank of the adapters | A | (r, inputs) | B | (outputs, r) | W | (outputs, inputs) |
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from data.dataset import InputError
from grpo.config import Config
from grpo.model.optimizer import part_of
from grpo.ranks import whole_tensor


def layers_to_adapt(model, config: Config) -> list[str]:
    """Name the linear layers that get an adapter; raise InputError if there are none, or what is excluded is nowhere.

    They are those of the language model, and of the vision tower with --vision_lora; never lm_head or the merger.
    """
    excluded = re.findall(r"[^][()\s,'\"]+", config.lora_namespan_exclude)  # "['a', 'b']" and "a, b" alike
    for word in excluded:
        if not any(word in name for name, _ in model.named_modules()):
            raise InputError(f"--lora_namespan_exclude: no part of the model has {word!r} in its name: mend or drop it")
    within = ("model.language_model.", "model.visual.blocks.") if config.vision_lora else "model.language_model."
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(within) and not any(word in name for word in excluded)
    ]
    if not names:
        raise InputError(
            f"--lora_namespan_exclude {config.lora_namespan_exclude!r} leaves no layer for an adapter: name fewer"
        )
    return names


def peft_config(config: Config, layers: list[str], **more) -> LoraConfig:
    """Describe the adapters on `layers` to peft."""
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=layers,
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.model_id,
        **more,
    )


def add_adapters(model, config: Config) -> None:
    """Put an adapter, at first without effect (B = 0), around each of `layers_to_adapt`, in place.

    A layer's own weights move to `base_layer` below its old name. peft freezes everything else: `freeze` comes after.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # every rank shards its own A, so all must draw the same
        inject_adapter_in_model(peft_config(config, layers_to_adapt(model, config)), model)


def lora_layers(model) -> dict[str, LoraLayer]:
    """Find the layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def merged_weight(layer: LoraLayer) -> Tensor:
    """Return W + scaling B A of a sharded layer, (outputs, inputs), in the precision and sharding of W.

    W and B are split into the same rows, so each rank merges its own and nothing but the small A is gathered.
    """
    weight, A, B = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if isinstance(A, DTensor):
        A = A.redistribute(placements=[Replicate()] * A.device_mesh.ndim)
    return weight + layer.scaling["default"] * (B @ A)


@contextmanager
def adapters_off(model) -> Iterator[None]:
    """Compute with the base weights alone: the model as its own reference.

    It is the initial model only while nothing but adapters is trained (`trains_adapters_alone`).
    """
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def trains_adapters_alone(model) -> bool:
    """True if the vision tower and the merger are frozen, so that the base weights never change."""
    return all(".lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


@contextmanager
def without_dropout(model) -> Iterator[None]:
    """Compute without dropout; a backward pass that recomputes activations must come within, too."""
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.training]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()


@dataclass
class Adapter:
    """What a run with LoRA has trained, on its way into a folder."""

    config: LoraConfig
    weights: dict[str, Tensor]  # under peft's names

    def save_pretrained(self, folder: Path) -> None:
        """Write an ordinary PEFT folder, which `PeftModel.from_pretrained(base, folder)` loads."""
        self.config.save_pretrained(folder)
        save_file(self.weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def gather_adapter(model, config: Config) -> Adapter:
    """Collect all trained weights of the sharded model from all ranks; collective.

    Modules of the vision tower and the merger that are trained beside the adapters go into the same folder whole, as
    peft's `modules_to_save`.
    """
    weights, whole_modules = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            peft_name = "base_model.model." + name.replace(".default.", ".")
            weights[peft_name] = whole_tensor(parameter).cpu().contiguous()
            if not part_of(name).startswith("adapters"):
                # model.visual.blocks.0, model.visual.patch_embed, model.visual.merger: peft takes no lists of modules
                module = re.match(r"model\.visual\.(blocks\.\d+|\w+)", name).group()
                whole_modules[module] = True
    described = peft_config(
        config, list(lora_layers(model)), modules_to_save=list(whole_modules) or None, inference_mode=True
    )
    return Adapter(described, weights)
