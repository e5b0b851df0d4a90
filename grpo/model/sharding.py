"""FSDP2 sharding of the policy, and its unsharded copy for sampling: the same code on one CPU, one GPU, or many nodes.

FSDP2 (`fully_shard`) splits float32 master weights, gradients and optimizer states over the ranks and computes in
bfloat16 on GPUs, the precision in which frozen weights are kept; a single CPU process has nothing to split and does
without it. Rank 0 alone reads the weights and hands out the shards, so that a host holds one copy of them, not one per
GPU. Sampling reads all weights for every token, so `SamplingModel` gathers them once per step.
"""

import copy
import os
import types
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from grpo.config import Config
from grpo.logprobs import completion_logprobs
from grpo.model.layers import use_our_layers
from grpo.model.lora import add_adapters, lora_layers, merged_weight, trains_only_adapters
from grpo.model.optimizer import freeze
from grpo.ranks import COLLECTIVE_TIMEOUT, broadcast_object


def device_mesh(device: torch.device) -> DeviceMesh:
    """Lay out the ranks: shard within a node, where links are fast, and replicate across nodes."""
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if local == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    nodes = torch.arange(world).view(-1, local)
    # `init_device_mesh` would give the groups of a rank's row and column torch's own time limit.
    groups = [
        dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=COLLECTIVE_TIMEOUT)[0] for ranks in (nodes.T, nodes)
    ]
    return DeviceMesh.from_group(groups, device.type, nodes, mesh_dim_names=("replicate", "shard"))


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs, float32 on CPUs."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def apply_fsdp(model, device: torch.device, is_trained: bool = True):
    """Shard each decoder layer, each vision block and the rest, in place; adds `model.completion_logprobs`.

    Frozen weights are kept in compute precision. is_trained: a backward pass follows each forward pass.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.to(compute_dtype(device))
    model.completion_logprobs = types.MethodType(completion_logprobs, model)
    if dist.get_world_size() == 1 and compute_dtype(device) == torch.float32:
        return model  # nothing to split or to round, and FSDP's copies would cost a tenth of the update
    mesh = device_mesh(device)
    # Inputs keep their dtype: the rotary tables of the vision tower are float32 in sampling, so here too.
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype(device), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in [*model.model.visual.blocks, *model.model.language_model.layers]:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    # Between forward and backward pass the rest stays gathered, where there is a backward pass.
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=not is_trained)
    register_fsdp_forward_method(model, "completion_logprobs")  # the root gathers its weights around this call
    return model


def checkpoint_activations(model) -> None:
    """Let each layer recompute its activations in the backward pass, in place of keeping them; in place."""
    # Its name before transformers 5.23 is the second one.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


class SamplingModel:
    """An unsharded copy of the policy in compute precision, for sampling, evaluation and saving.

    `model` is an ordinary Hugging Face model, with the adapters merged into its weights. `sync` is collective; between
    syncs nothing communicates.
    """

    def __init__(self, policy):
        """Copy the modules, without weights until the first sync. Call it before adapters and sharding."""
        self.model = copy.deepcopy(policy).eval().to("meta")

    def allocate(self, policy) -> None:
        """Allocate the weights on the device of the policy, in compute precision."""
        device = next(policy.parameters()).device
        self.model.to(compute_dtype(device)).to_empty(device=device)
        self.model.tie_weights()
        for name, buffer in policy.named_buffers():  # rotary frequencies: float32 whatever the weights are
            owner, _, buffer_name = name.rpartition(".")
            setattr(self.model.get_submodule(owner), buffer_name, buffer)

    @torch.no_grad()
    def sync(self, policy):
        """Copy the policy's current weights into `model` and return it; collective.

        They are copied in place, since what decodes, such as a captured graph, reads this memory.
        """
        is_first = self.model.device.type == "meta"
        if is_first:
            self.allocate(policy)
        weights, adapted = dict(self.model.named_parameters()), lora_layers(policy)
        for prefix, module in policy.named_modules():
            is_sharded = isinstance(module, FSDPModule)  # a layer or block, which is gathered as one piece, or the root
            if not (is_sharded or module is policy):
                continue
            if not (is_first or any(parameter.requires_grad for parameter in module.parameters())):
                continue  # frozen, so it has not changed
            if is_sharded:
                module.unshard()
            targets, sources = [], []
            for name, weight in module.named_parameters(prefix):
                if isinstance(weight, DTensor) or ".lora_" in name:
                    continue  # the part of another piece, or merged below
                layer_name, _, kind = name.rpartition(".base_layer.")
                if kind == "weight":
                    weight = merged_weight(adapted[layer_name])
                elif not (is_first or weight.requires_grad):
                    continue
                targets.append(weights[name.replace(".base_layer.", ".")])
                sources.append(weight)
            if targets:
                torch._foreach_copy_(targets, sources)
            if is_sharded:
                module.reshard()
        return self.model


def without_weights(loaded) -> Qwen2_5_VLForConditionalGeneration:
    """Return on every rank a copy, without weights, of rank 0's `loaded`, which is None on the others; collective."""
    described = loaded and (loaded.config.to_dict(), loaded.dtype, loaded.generation_config)
    config, dtype, generation = broadcast_object(described)
    with torch.device("meta"):  # shapes only, no memory
        model = AutoModelForImageTextToText.from_config(Qwen2_5_VLConfig.from_dict(config), dtype=dtype)
    model.generation_config = generation
    return use_our_layers(model)


@torch.no_grad()
def distribute_weights(model, loaded, device: torch.device) -> None:
    """Fill `model`, sharded or not, in place with the weights and buffers of rank 0's `loaded`; collective."""
    weights = {} if loaded is None else dict(loaded.named_parameters())
    buffers = broadcast_object(loaded and {name: buffer.cpu() for name, buffer in loaded.named_buffers()})
    model.to_empty(device=device)
    model.tie_weights()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    for name, sharded in model.named_parameters():
        weight = torch.empty(sharded.shape, dtype=sharded.dtype, device=device)
        if loaded is not None:
            weight.copy_(weights[name])
        if isinstance(model, FSDPModule):
            weight = distribute_tensor(weight, sharded.device_mesh, sharded.placements)
        else:
            dist.broadcast(weight, src=0)
        sharded.copy_(weight)


@dataclass
class Models:
    """The models of a run."""

    policy: nn.Module  # trained: sharded, float32 master weights
    sampling: SamplingModel  # its unsharded copy
    reference: nn.Module | None  # the initial policy, sharded; None without a KL term


def build_models(loaded, config: Config, device: torch.device) -> Models:
    """Shard the model that rank 0 has loaded over all ranks, with adapters and frozen components as the flags say.

    loaded: the unsharded model on rank 0, None on the others. Collective.
    """
    policy = without_weights(loaded)
    reference = copy.deepcopy(policy).requires_grad_(False) if config.beta > 0 else None
    if config.gradient_checkpointing or (config.gradient_checkpointing is None and device.type == "cuda"):
        checkpoint_activations(policy)
    sampling = SamplingModel(policy)
    if config.lora_enable:
        add_adapters(policy, config)
    freeze(policy, config)
    if reference is not None and trains_only_adapters(policy):
        reference = policy  # with its adapters disabled it is the initial policy
    elif reference is not None:
        distribute_weights(apply_fsdp(reference, device, is_trained=False), loaded, device)
    if config.lora_enable and loaded is not None:
        add_adapters(loaded, config)
    distribute_weights(apply_fsdp(policy, device), loaded, device)
    return Models(policy, sampling, reference)
