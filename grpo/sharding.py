"""Processes and sharding: the same code on one CPU, one GPU, or many nodes.

FSDP2 (`fully_shard`) splits float32 master weights, gradients and optimizer states over the ranks and computes in
bfloat16 on GPUs. Sampling wants whole weights, thousands of times in a row; `WholeWeights` gathers them once per step.
"""

import copy
import os
import types

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from data.dataset import InputError
from grpo.config import Config
from grpo.logprobs import completion_logprobs
from grpo.lora import add_adapters, lora_layers, merged_weight, trains_adapters_alone
from grpo.model import freeze, load_model


def start_processes() -> torch.device:
    """Join the process group that torchrun describes, or make one of a single process; return this rank's device."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def raise_together(function, *arguments):
    """Call a function on every rank; where it raises InputError on any, raise it on all, so that none waits."""
    result, error = None, None
    try:
        result = function(*arguments)
    except InputError as raised:
        error = str(raised)
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            raise InputError(error)
    return result


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
    mesh = device_mesh(device)
    # Inputs keep their dtype: the rotary tables of the vision tower are float32, when sampling as in the update.
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype(device), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in [*model.model.visual.blocks, *model.model.language_model.layers]:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    model.completion_logprobs = types.MethodType(completion_logprobs, model)
    register_fsdp_forward_method(model, "completion_logprobs")  # the root gathers its weights around this call
    return model


class WholeWeights:
    """The model with whole weights in compute precision, for sampling, evaluating and saving.

    `module` is an ordinary Hugging Face model, into which adapters are merged. `refresh` is collective; between
    refreshes nothing here communicates. On a single CPU process weights are whole already and are shared, not copied,
    but for those that an adapter changes.
    """

    def __init__(self, model):
        """Make the twin before `model` gets adapters and is sharded: the same modules around (for now) the same
        weights."""
        self.module = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
        self.module.eval()
        self.is_filled = False

    @torch.no_grad()
    def refresh(self, model) -> None:
        """Bring in the present weights of the sharded `model`."""
        device = next(model.parameters()).device
        dtype = compute_dtype(device)
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
            if dist.get_world_size() == 1:
                whole.data = sharded.to_local().to(dtype)
            else:
                whole.data = sharded.to(dtype).full_tensor()
        self.module.to(device)  # buffers
        self.is_filled = True


def make_trainable(model, config: Config, device: torch.device) -> tuple:
    """Add adapters, freeze and shard, in place; return the whole weights for sampling, and the reference policy."""
    if config.gradient_checkpointing or (config.gradient_checkpointing is None and device.type == "cuda"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    whole = WholeWeights(model)
    if config.lora_enable:
        add_adapters(model, config)
    freeze(model, config)
    shard(model, device)
    if config.beta == 0:
        return whole, None
    if trains_adapters_alone(model):  # without its adapters the model is the initial policy
        return whole, model
    return whole, shard(load_model(config.model_id).requires_grad_(False), device)
