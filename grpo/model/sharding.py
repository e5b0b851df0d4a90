"""Processes and sharding: the same code on one CPU, one GPU, or many nodes.

FSDP2 (`fully_shard`) splits float32 master weights, gradients and optimizer states over the ranks and computes in
bfloat16 on GPUs; a CPU process of its own has nothing to split. Rank 0 alone reads the weights and hands out the
shards, so that a host holds one copy of them, not one per GPU. Sampling wants whole weights, thousands of times in a
row; `WholeWeights` gathers them once per step.
"""

import copy
import os
import types

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from grpo.config import Config
from grpo.logprobs import completion_logprobs
from grpo.model.layers import pack_weights, use_our_layers
from grpo.model.lora import add_adapters, lora_layers, merged_weight, trains_adapters_alone
from grpo.model.optimizer import freeze
from grpo.ranks import from_rank_0


def device_mesh(device: torch.device) -> DeviceMesh:
    """Lay out the ranks: shard within a node, where links are fast, and replicate across nodes."""
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if local < world:
        return init_device_mesh(device.type, (world // local, local), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs, float32 on CPUs."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def shard(model, device: torch.device):
    """Shard each decoder layer, each vision block and the rest, in place; make `model.completion_logprobs` callable."""
    model.completion_logprobs = types.MethodType(completion_logprobs, model)
    if dist.get_world_size() == 1 and compute_dtype(device) == torch.float32:
        return model  # nothing to split, nothing to round, and FSDP's copies would cost a tenth of the update
    mesh = device_mesh(device)
    # Inputs keep their dtype: the rotary tables of the vision tower are float32, when sampling as in the update.
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype(device), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in [*model.model.visual.blocks, *model.model.language_model.layers]:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    register_fsdp_forward_method(model, "completion_logprobs")  # the root gathers its weights around this call
    return model


class WholeWeights:
    """The model with whole weights in compute precision, for sampling, evaluating and saving.

    `module` is an ordinary Hugging Face model, into which adapters are merged. `refresh` is collective; between
    refreshes nothing here communicates. A model that is not sharded lends its weights, but for those that an adapter
    changes; after they have changed, linear layers need a refresh nevertheless (`pack_weights`).
    """

    def __init__(self, model):
        """Make the twin before `model` gets adapters and is sharded: the same modules, without weights of their own
        until the first refresh."""
        self.module = copy.deepcopy(model).eval()
        self.is_filled = False

    def allocate(self, model) -> None:
        """Make room on the device of `model`, in compute precision."""
        device = next(model.parameters()).device
        self.module.to(compute_dtype(device)).to_empty(device=device)
        self.module.tie_weights()
        for name, buffer in model.named_buffers():  # rotary frequencies: float32 whatever the weights are
            owner, _, own_name = name.rpartition(".")
            setattr(self.module.get_submodule(owner), own_name, buffer)

    @torch.no_grad()
    def refresh(self, model):
        """Bring in the present weights of the sharded `model`; return `module`."""
        if not self.is_filled:
            self.allocate(model)
        adapted = lora_layers(model)
        own = dict(self.module.named_parameters())
        for name, sharded in model.named_parameters():
            if ".lora_" in name:
                continue
            layer_name, _, kind = name.rpartition(".base_layer.")
            if kind == "weight" and layer_name in adapted:
                sharded = merged_weight(adapted[layer_name])
            elif self.is_filled and not sharded.requires_grad:
                continue  # frozen: as it was
            whole = own[name.replace(".base_layer.", ".")]
            if isinstance(model, FSDPModule):  # into the same memory, from which captured graphs read
                whole.copy_(sharded.to(whole.dtype).full_tensor())
            else:
                whole.data = sharded.data
        self.is_filled = True
        if self.module.device.type == "cpu" and torch.backends.mkldnn.is_available():
            pack_weights(self.module.model)
        return self.module


@torch.no_grad()
def distribute(model, loaded, device: torch.device) -> None:
    """Fill the sharded `model`, in place, with the weights and buffers of rank 0's `loaded`; collective."""
    buffers = from_rank_0(None if loaded is None else {name: buffer.cpu() for name, buffer in loaded.named_buffers()})
    model.to_empty(device=device)
    model.tie_weights()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    whole = {} if loaded is None else dict(loaded.named_parameters())
    for name, sharded in model.named_parameters():
        weight = torch.empty(sharded.shape, device=device) if loaded is None else whole[name].to(device)
        if isinstance(model, FSDPModule):
            weight = distribute_tensor(weight, sharded.device_mesh, sharded.placements)
        sharded.copy_(weight)


def make_trainable(loaded, config: Config, device: torch.device) -> tuple:
    """Spread the model that rank 0 has loaded over all ranks, with adapters and frozen parts as the flags say.

    loaded: with whole weights on rank 0, None on the others. Returns the sharded model, the whole weights for sampling,
    and the reference policy.
    """
    described, generation = from_rank_0(None if loaded is None else (loaded.config.to_dict(), loaded.generation_config))
    with torch.device("meta"):  # shapes alone
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(described))
    use_our_layers(model)
    model.generation_config = generation
    reference = copy.deepcopy(model).requires_grad_(False) if config.beta > 0 else None
    if config.gradient_checkpointing or (config.gradient_checkpointing is None and device.type == "cuda"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    whole = WholeWeights(model)
    if config.lora_enable:
        add_adapters(model, config)
    freeze(model, config)
    if reference is not None and trains_adapters_alone(model):
        reference = model  # without its adapters it is the initial policy
    elif reference is not None:
        distribute(shard(reference, device), loaded, device)
    if config.lora_enable and loaded is not None:
        add_adapters(loaded, config)
    distribute(shard(model, device), loaded, device)
    return model, whole, reference
