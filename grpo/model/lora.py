"""LoRA (arXiv:2106.09685): y = W x + (lora_alpha / lora_rank) B A x, where W is frozen and A and B are trained.

The adapters are peft's layers, put into the decoder layers (and vision blocks) so that they are sharded with them.
Sampling, evaluation and the exported model use the merged matrix W + (lora_alpha / lora_rank) B A: no extra work per
token, and no dropout (`SamplingModel` in `grpo/model/sharding.py`).

| r | rank of the adapters | A | (r, inputs) | B | (outputs, r) | W | (outputs, inputs) |
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from data.sample import InputError
from grpo.config import Config
from grpo.ranks import full_tensor


def layers_to_adapt(model, config: Config) -> list[str]:
    """Name the linear layers that get an adapter; raise InputError if none is left or an exclusion matches nothing.

    They are those of the language model and, with --vision_lora, of the vision tower; never lm_head or the merger.
    """
    given = config.lora_namespan_exclude
    excluded = re.findall(r"[^][()\s,'\"]+", given)  # "['a', 'b']" and "a, b" alike
    for word in excluded:
        if not any(word in name for name, _ in model.named_modules()):
            raise InputError(f"--lora_namespan_exclude: no module of the model has {word!r} in its name: correct it")
    within = ("model.language_model.", "model.visual.blocks.") if config.vision_lora else "model.language_model."
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linear if name.startswith(within) and not any(word in name for word in excluded)]
    if not names:
        raise InputError(f"--lora_namespan_exclude {given!r} leaves no layer for an adapter: name fewer")
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
    """Add an adapter with B = 0, at first without effect, to each of `layers_to_adapt`, in place.

    A layer's own weights move to its `base_layer`. peft freezes everything else, so call `freeze` after.
    """
    with torch.random.fork_rng(devices=[]):  # else it would make a context on every GPU of the machine
        torch.manual_seed(config.seed)  # each rank keeps its shard of A, so all must draw the same A
        inject_adapter_in_model(peft_config(config, layers_to_adapt(model, config)), model)


def lora_layers(model) -> dict[str, LoraLayer]:
    """Find the layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def merged_weight(layer: LoraLayer) -> Tensor:
    """Return W + scaling B A of a gathered layer, (outputs, inputs), summed up in float32."""
    A, B = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    return layer.base_layer.weight + layer.scaling["default"] * (B @ A)


@contextmanager
def disable_adapters(model) -> Iterator[None]:
    """Compute with the base weights only: the model as its own reference policy.

    That is the initial policy only if nothing but adapters is trained (`trains_only_adapters`).
    """
    with ExitStack() as at_the_end:
        for layer in lora_layers(model).values():
            layer.enable_adapters(False)
            at_the_end.callback(layer.enable_adapters, True)
        yield


def trains_only_adapters(model) -> bool:
    """True if the base weights never change, since the vision tower and the merger are frozen."""
    return all(".lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


@contextmanager
def without_dropout(model) -> Iterator[None]:
    """Compute without dropout; a backward pass that recomputes activations must be inside, too."""
    with ExitStack() as at_the_end:
        for layer in model.modules():
            if isinstance(layer, nn.Dropout) and layer.training:
                layer.eval()
                at_the_end.callback(layer.train)
        yield


@dataclass
class Adapter:
    """All weights that a run with LoRA has trained, ready to be saved."""

    config: LoraConfig
    weights: dict[str, Tensor]  # under peft's names

    def save_pretrained(self, folder: Path) -> None:
        """Write an ordinary PEFT folder, which `PeftModel.from_pretrained(base, folder)` loads."""
        self.config.save_pretrained(folder)
        save_file(self.weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def gather_adapter(model, config: Config) -> Adapter:
    """Gather all trained weights of the sharded model; collective.

    Modules of the vision tower and the merger that are trained beside the adapters are saved in full in the same
    folder, as peft's `modules_to_save`.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {
        "base_model.model." + name.replace(".default.", "."): full_tensor(parameter).cpu().contiguous()
        for name, parameter in trained.items()
    }
    # Such as model.visual.blocks.0 or model.visual.merger; peft cannot save a list such as visual.blocks.
    in_full = [re.match(r"model\.visual\.(blocks\.\d+|\w+)", name).group() for name in trained if ".lora_" not in name]
    layers, modules_to_save = list(lora_layers(model)), list(dict.fromkeys(in_full)) or None
    return Adapter(peft_config(config, layers, modules_to_save=modules_to_save, inference_mode=True), weights)
