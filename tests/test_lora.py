"""LoRA: what is adapted and merged, that ranks agree, and that what is saved is what was trained."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

import train
from grpo import export, sharding
from grpo.config import Config, resolve_batch_sizes
from grpo.logprobs import completion_logprobs
from grpo.lora import (
    add_adapters,
    adapters_off,
    gather_adapter,
    layers_to_adapt,
    lora_layers,
    trains_adapters_alone,
    without_dropout,
)
from grpo.model import freeze, save_model, use_our_attention
from grpo.rollout import generate
from tests.conftest import Tiny, run_ranks
from tests.test_sharding import ADVANTAGES, relative, rollouts_of
from tests.test_train import curves, flags, run_main, weights

LORA = {"lora_enable": True, "lora_rank": 4, "lora_dropout": 0.0, "temperature": 0.7, "learning_rate": 1e-2}
FROZEN = {"freeze_vision_tower": True, "freeze_merger": True}
LORA_FLAGS = ["--lora_enable", "--lora_rank", "4", "--global_batch_size", "4", "--learning_rate", "1e-2"]


def adapted(tiny: Tiny, config: Config):
    """The model on one rank with adapters that are not zero: the twin that samples, and the sharded one."""
    device = sharding.start_processes()
    torch.manual_seed(dist.get_rank())  # ranks may have drawn different numbers before
    model = copy.deepcopy(tiny.model).train()
    whole = sharding.WholeWeights(model)
    add_adapters(model, config)
    freeze(model, config)
    sharding.shard(model, device)
    return whole, model


def set_B(model) -> None:
    """Give every B the same numbers on any number of ranks."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            B = layer.lora_B["default"].weight
            values = torch.randn(B.shape, generator=generator) * 0.1
            B.copy_(torch.distributed.tensor.distribute_tensor(values, B.device_mesh, B.placements))


def score(model, tiny: Tiny, compute=None) -> list[torch.Tensor]:
    """Log-probabilities of fixed completions of all prompts."""
    rollouts = rollouts_of(tiny)
    compute = compute or (lambda *arguments: completion_logprobs(model, *arguments))
    prompts, ids, masks = zip(*((r.prompt, r.completion_ids, r.completion_mask) for r in rollouts), strict=True)
    with torch.no_grad():
        return [logprobs for logprobs, _ in compute(list(prompts), list(ids), list(masks), 0.7, tiny.banned_ids)]


def sharded_score(model, tiny: Tiny) -> list[torch.Tensor]:
    return score(model, tiny, model.completion_logprobs)


def update(tiny: Tiny, model, config: Config) -> list[torch.Tensor]:
    """Do one step on this rank's share of the groups; return the whole gradients."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = resolve_batch_sizes(config, world_size)
    rollouts = rollouts_of(tiny)
    num_tokens = sum(int(r.completion_mask.sum()) for r in rollouts if r.prompt.counts)
    optimizer, _ = train.make_optimizer(model, config, total_steps=1)
    arguments = rollouts[rank::world_size], ADVANTAGES[rank::world_size], num_tokens, tiny.banned_ids, config
    train.update_phase(model, optimizer, *arguments)
    return [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]


def distance(a, b) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def step(tiny: Tiny, path: str, settings: dict) -> None:
    config = Config(**LORA | {"max_grad_norm": 1e9, "global_batch_size": 4} | settings)
    whole, model = adapted(tiny, config)
    set_B(model)
    whole.refresh(model)
    result = {"merged": score(whole.module, tiny), "unmerged": sharded_score(model, tiny)}
    with adapters_off(model):
        result["off"] = sharded_score(model, tiny)
    result["on again"] = sharded_score(model, tiny)
    result["gradients"] = update(tiny, model, config)
    result["alone"] = trains_adapters_alone(model)
    whole.refresh(model)
    result["after"] = score(whole.module, tiny)
    adapter = gather_adapter(model, config)
    if dist.get_rank() == 0:
        torch.save(result, path)
        adapter.config.base_model_name_or_path = str(tiny.folder / "model")
        save_model(adapter, tiny.tokenizer, f"{path}.adapter", [])
    dist.destroy_process_group()


CASES = {
    "language model": FROZEN,
    "with vision": FROZEN | {"vision_lora": True},
    "beside tower and merger": {},
    "beside the merger": {"freeze_vision_tower": True},
}


@pytest.fixture(scope="module", params=CASES)
def case(tiny, request, tmp_path_factory):
    """One update on one rank: its settings, what was computed, and the folder it saved."""
    path = str(tmp_path_factory.mktemp("lora") / "step.pt")
    run_ranks(step, 1, tiny, path, CASES[request.param])
    return CASES[request.param], torch.load(path), f"{path}.adapter"


def test_merged_and_unmerged_adapters_agree(tiny, case):
    _, result, _ = case
    assert distance(result["merged"], result["unmerged"]) < 1e-4
    assert distance(result["merged"], score(tiny.model, tiny)) > 0.1
    assert distance(result["after"], result["merged"]) > 1e-2


def test_with_adapters_off_the_model_is_its_base_exactly_and_then_itself_again(tiny, case):
    settings, result, _ = case
    assert distance(result["off"], score(tiny.model, tiny)) == 0
    assert distance(result["on again"], result["unmerged"]) == 0
    assert result["alone"] == ("freeze_merger" in settings)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_with_one(tiny, case, tmp_path, world_size):
    settings, one, _ = case
    path = str(tmp_path / "step.pt")
    settings = settings | ({"global_batch_size": 6} if world_size == 3 else {})
    if world_size == 3:
        pytest.skip()
    run_ranks(step, world_size, tiny, path, settings)
    two = torch.load(path)
    assert len(two["gradients"]) == len(one["gradients"]) and sum(g.norm() for g in one["gradients"]) > 1e-3
    assert relative(two["gradients"], one["gradients"]) < 1e-5
    for name in ("merged", "unmerged", "off", "after"):
        assert distance(two[name], one[name]) < 1e-4, name


def test_peft_loads_what_was_saved_and_it_is_what_was_trained(tiny, case):
    _, result, folder = case
    base = use_our_attention(Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny.folder / "model"))
    loaded = PeftModel.from_pretrained(base, folder).eval()
    assert distance(score(loaded.get_base_model(), tiny), result["after"]) < 1e-4
    assert {path.name for path in Path(folder).iterdir()} >= {
        *("adapter_model.safetensors", "adapter_config.json", "tokenizer.json")
    }
