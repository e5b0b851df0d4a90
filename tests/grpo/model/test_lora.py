"""LoRA: what is adapted and merged, that ranks agree, and that what is saved is what was trained."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Qwen2_5_VLForConditionalGeneration

import train
from grpo import export
from grpo.config import Config
from grpo.logprobs import completion_logprobs
from grpo.model import sharding
from grpo.model.layers import use_our_layers
from grpo.model.load import ModelFiles
from grpo.model.lora import (
    add_adapters,
    disable_adapters,
    gather_adapter,
    layers_to_adapt,
    lora_layers,
    trains_only_adapters,
    without_dropout,
)
from grpo.model.optimizer import freeze, make_optimizer
from grpo.ranks import full_tensor, start_processes
from grpo.run.batches import resolve_batch_sizes
from tests.conftest import Tiny, run_ranks
from tests.grpo.model.test_sharding import relative, rollouts_of, with_advantages
from tests.test_train import curves, flags, run_main, weights

LORA = {"lora_enable": True, "lora_rank": 4, "lora_dropout": 0.0, "temperature": 0.7, "learning_rate": 1e-2}
FROZEN = {"freeze_vision_tower": True, "freeze_merger": True}
LORA_FLAGS = "--lora_enable --lora_rank 4 --global_batch_size 4 --learning_rate 1e-2 --log_completions 0".split()


def adapted(tiny: Tiny, device: torch.device, config: Config):
    """The model on one rank with adapters that are not zero: the sampling model and the sharded one."""
    torch.manual_seed(dist.get_rank())  # ranks may have drawn different numbers before
    model = copy.deepcopy(tiny.model).train()
    sampling = sharding.SamplingModel(model)
    add_adapters(model, config)
    freeze(model, config)
    sharding.apply_fsdp(model, device)
    return sharding.Models(model, sampling, None)


def set_B(model) -> None:
    """Give every B the same numbers on any number of ranks."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            B = layer.lora_B["default"].weight
            values = torch.randn(B.shape, generator=generator) * 0.1
            if isinstance(B, DTensor):
                values = distribute_tensor(values, B.device_mesh, B.placements)
            B.copy_(values)


def score(model, tiny: Tiny, compute=None) -> list[torch.Tensor]:
    """Log-probabilities of fixed completions of all prompts."""
    rollouts = rollouts_of(tiny)
    compute = compute or (lambda *arguments: completion_logprobs(model, *arguments))
    prompts, ids, masks = zip(*((r.prompt, r.completion_ids, r.completion_mask) for r in rollouts), strict=True)
    with torch.no_grad():
        return [logprobs for logprobs, *_ in compute(list(prompts), list(ids), list(masks), 0.7, tiny.suppress_tokens)]


def sharded_score(model, tiny: Tiny) -> list[torch.Tensor]:
    return score(model, tiny, model.completion_logprobs)


def update(tiny: Tiny, models: sharding.Models, optimizer, config: Config) -> list[torch.Tensor]:
    """Do one step on this rank's share of the groups; return the full gradients."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = resolve_batch_sizes(config, world_size)
    scored = with_advantages(rollouts_of(tiny))
    train.update_phase(models, optimizer, scored[rank::world_size], tiny.suppress_tokens, config)
    return [full_tensor(p.grad) for p in models.policy.parameters() if p.grad is not None]


def distance(a, b) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


CASES = {
    "language model": FROZEN,
    "with vision": FROZEN | {"vision_lora": True},
    "beside tower and merger": {},
    "beside the merger": {"freeze_vision_tower": True},
}


def step(tiny: Tiny, device: torch.device, settings: dict, folder: str) -> dict:
    """Do one update, and save what it has trained; return what was computed."""
    config = Config(**LORA | {"max_grad_norm": 1e9, "global_batch_size": 4} | settings)
    base = score(tiny.model, tiny)  # here, since the number of threads, which a process sets, changes the last bits
    models = adapted(tiny, device, config)
    model, sampling = models.policy, models.sampling
    optimizer, _ = make_optimizer(model, config, total_steps=1)  # before FSDP puts unsharded weights in their place
    set_B(model)
    sampling.sync(model)
    result = {"base": base, "merged": score(sampling.model, tiny), "unmerged": sharded_score(model, tiny)}
    result["dtypes"] = {parameter.dtype for parameter in sampling.model.parameters()}
    with disable_adapters(model):
        result["off"] = sharded_score(model, tiny)
    result["on again"] = sharded_score(model, tiny)
    result["gradients"] = update(tiny, models, optimizer, config)
    result["alone"] = trains_only_adapters(model)
    sampling.sync(model)
    result["after"] = score(sampling.model, tiny)
    adapter = gather_adapter(model, config)
    if dist.get_rank() == 0:
        adapter.config.base_model_name_or_path = str(tiny.folder / "model")
        ModelFiles(adapter, tiny.tokenizer, []).write(Path(folder))
    return result


def step_in_bfloat16(tiny: Tiny, device: torch.device, folder: str) -> dict:
    """Merge, score and update in the precision of a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "compute_dtype", lambda device: torch.bfloat16)
        return step(tiny, device, {}, folder)


def dropped(tiny: Tiny, device: torch.device) -> dict:
    models = adapted(tiny, device, Config(**LORA | FROZEN | {"lora_dropout": 0.5}))
    model, sampling = models.policy, models.sampling
    set_B(model)
    sampling.sync(model)
    result = {"update": [sharded_score(model, tiny) for _ in range(2)], "merged": score(sampling.model, tiny)}
    with without_dropout(model):
        result["scoring"] = [sharded_score(model, tiny) for _ in range(2)]
    result["update again"] = sharded_score(model, tiny)
    a, b = (rollouts_of(dataclasses.replace(tiny, model=sampling.model)) for _ in range(2))
    result["same sampling"] = all(torch.equal(x.completion_ids, y.completion_ids) for x, y in zip(a, b, strict=True))
    return result


def do_steps(tiny: Tiny, folder: str) -> None:
    """All that is computed on some ranks; rank 0 writes it."""
    device, world_size = start_processes(), dist.get_world_size()
    results = {name: step(tiny, device, settings, f"{folder}/{name}") for name, settings in CASES.items()}
    if world_size == 1:
        results["dropped"] = dropped(tiny, device)
    else:
        results["in bfloat16"] = step_in_bfloat16(tiny, device, f"{folder}/in bfloat16")
    if dist.get_rank() == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_rank(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run_ranks(do_steps, 1, tiny, str(folder))
    return folder, torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def two_ranks(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_ranks(do_steps, 2, tiny, str(folder))
    return torch.load(folder / "results.pt")


@pytest.fixture(params=CASES)
def case(one_rank, request):
    """One update on one rank: its settings, what was computed, and the folder it saved."""
    folder, results = one_rank
    return CASES[request.param], results[request.param], folder / request.param


def test_merged_and_unmerged_adapters_agree(case):
    _, result, _ = case
    assert distance(result["merged"], result["unmerged"]) < 1e-4
    assert distance(result["merged"], result["base"]) > 0.1
    assert distance(result["after"], result["merged"]) > 1e-2


def test_with_adapters_off_the_model_is_its_base_exactly_and_then_itself_again(case):
    settings, result, _ = case
    assert distance(result["off"], result["base"]) == 0
    assert distance(result["on again"], result["unmerged"]) == 0
    assert result["alone"] == ("freeze_merger" in settings)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_agree_with_one(one_rank, two_ranks, name):
    one, two = one_rank[1][name], two_ranks[name]
    assert relative(two["gradients"], one["gradients"]) < 1e-5
    for name in ("merged", "unmerged", "off", "after"):
        assert distance(two[name], one[name]) < 1e-4, name


def test_every_adapter_and_every_trained_part_gets_a_gradient_and_nothing_else(tiny, case):
    settings, result, folder = case
    saved = load_file(f"{folder}/adapter_model.safetensors")
    assert len(result["gradients"]) == len(saved)  # also after the adapters were off
    assert min(gradient.norm() for gradient in result["gradients"]) > 0
    in_language, in_tower = 2 * 7, 2 * 5 if "vision_lora" in settings else 0  # layers of 7 and blocks of 5 matrices
    assert sum("lora_A" in name for name in saved) == in_language + in_tower
    assert any("visual.blocks" in name and "lora" not in name for name in saved) == (not settings)
    assert any("visual.merger" in name for name in saved) == ("freeze_merger" not in settings)


def test_peft_loads_what_was_saved_and_it_is_what_was_trained(tiny, case):
    _, result, folder = case
    base = use_our_layers(Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny.folder / "model"))
    loaded = PeftModel.from_pretrained(base, folder).eval()
    assert distance(score(loaded.get_base_model(), tiny), result["after"]) < 1e-4
    assert json.loads((folder / "adapter_config.json").read_text())["inference_mode"]
    # All of it is the adapter's to peft: saved again, nothing is left out.
    assert get_peft_model_state_dict(loaded).keys() == load_file(f"{folder}/adapter_model.safetensors").keys()
    assert {path.name for path in folder.iterdir()} >= {
        *("adapter_model.safetensors", "adapter_config.json", "tokenizer.json")
    }


@pytest.mark.parametrize("excluded", ["['lm_head', 'mlp']", "mlp,embed_tokens"])
def test_excluded_names_get_no_adapter_and_lm_head_never_does(tiny, excluded):
    every = layers_to_adapt(tiny.model, Config(**LORA))
    rest = layers_to_adapt(tiny.model, Config(**LORA, lora_namespan_exclude=excluded))
    assert len(every) == 2 * 7 and not any("lm_head" in name or "visual" in name for name in every)
    assert rest == [name for name in every if "mlp" not in name] and len(rest) == 2 * 4


def test_dropout_acts_in_the_update_alone(one_rank):
    result = one_rank[1]["dropped"]
    assert distance(result["update"][0], result["update"][1]) > 1e-3
    assert result["same sampling"]
    assert distance(result["scoring"][0], result["scoring"][1]) == 0
    assert distance(result["scoring"][0], result["merged"]) < 1e-4
    assert distance(result["update again"], result["scoring"][0]) > 1e-3


def test_adapters_work_in_bfloat16(one_rank, two_ranks):
    result, float32 = two_ranks["in bfloat16"], one_rank[1]["beside tower and merger"]
    assert result["dtypes"] == {torch.bfloat16} and float32["dtypes"] == {torch.float32}
    assert distance(result["merged"], result["unmerged"]) < 0.1
    assert distance(result["merged"], float32["merged"]) < 0.1
    assert all(gradient.dtype == torch.float32 for gradient in result["gradients"])
    assert relative(result["gradients"], float32["gradients"]) < 0.1


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The whole program with LoRA on two ranks, from a base in bfloat16."""
    folder = tmp_path_factory.mktemp("lora")
    base = copy.deepcopy(tiny.model).to(torch.bfloat16)
    base.save_pretrained(folder / "base")
    tiny.tokenizer.save_pretrained(folder / "base")
    more = [*LORA_FLAGS, "--model_id", folder / "base", "--save_steps", "1", "--num_train_epochs", "2"]
    more += ["--freeze_vision_tower", "--vision_lora", "--lora_dropout", "0", "--gradient_checkpointing", "true"]
    printed = run_main(2, flags(tiny, folder / "out", *more), folder)
    return folder, printed


def test_a_run_with_adapters_samples_from_what_it_trains_and_says_what_it_trains(run):
    folder, printed = run
    found = curves(folder / "out")
    assert len(found["grad_norm"]) == 2 and min(found["grad_norm"]) > 0
    # Merged weights sample what adapters beside frozen weights compute, at every step.
    assert max(found["sampling/sampling_logp_difference/max"]) < 1e-4
    rows = {line[:30].strip(): line[30:].split() for line in printed.splitlines()}
    assert rows["language model"][1:] == rows["vision tower"][1:] == ["frozen"]
    assert rows["merger"][1:] == rows["adapters of the vision tower"][1:] == ["0.01"]
    trained = load_file(folder / "out" / "final" / "adapter_model.safetensors")
    assert rows["trained in total"][0] == f"{sum(tensor.numel() for tensor in trained.values()):,}"


def test_checkpoints_are_adapter_folders_that_differ(run):
    saved = [load_file(run[0] / "out" / name / "adapter_model.safetensors") for name in ("checkpoint-1", "final")]
    assert saved[0].keys() == saved[1].keys() and not any(
        torch.equal(saved[0][name], saved[1][name]) for name in saved[0]
    )


def test_the_exported_model_has_the_bases_precision_and_the_adapters_answers(tiny, run, capsys):
    folder, _ = run
    arguments = ["--adapter", str(folder / "out" / "final"), "--output", str(folder / "merged")]
    (folder / "merged.unfinished").mkdir()
    (folder / "merged.unfinished" / "model-00001-of-00002.safetensors").write_text("of an export that was killed")
    assert export.main(arguments) == 0
    assert {path.name for path in folder.glob("merged*")} == {"merged"}
    assert not (folder / "merged" / "model-00001-of-00002.safetensors").exists()
    merged = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "base", dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(use_our_layers(base), folder / "out" / "final").eval()
    rounded = peft_model.merge_and_unload().to(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), rounded.parameters(), strict=True))
    assert not torch.equal(weights(folder / "merged"), weights(folder / "base"))
    assert export.main(arguments) == 2 and "exists" in capsys.readouterr().err
    arguments[-1] = str(folder / "base" / "config.json" / "merged")
    assert export.main(arguments) == 2 and "cannot be written" in capsys.readouterr().err


def test_the_exported_model_can_be_trained_on(tiny, run, tmp_path):
    folder, _ = run
    export.export(str(folder / "out" / "final"), str(tmp_path / "merged"), str(folder / "base"))
    assert train.main(flags(tiny, tmp_path / "out", *LORA_FLAGS, "--model_id", tmp_path / "merged")) == 0


def test_a_base_with_a_relative_path_is_found_from_every_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.folder)
    given, output = (
        flags(tiny, tmp_path / "out", *LORA_FLAGS, "--model_id", "model", "--max_steps", "1"),
        tmp_path / "out",
    )
    assert train.main(given) == 0
    monkeypatch.chdir(tmp_path)
    assert export.main(["--adapter", "out/final", "--output", "merged"]) == 0
    assert json.loads((output / "config.json").read_text())["model_id"] == str(tiny.folder / "model")
    assert f"from_pretrained({str(tiny.folder / 'model')!r})" in (output / "final" / "README.md").read_text()


def test_a_base_of_the_hub_is_found_by_its_name_in_the_cache(run, tmp_path, monkeypatch):
    adapter, cached = tmp_path / "adapter", tmp_path / "hub" / "models--org--base"
    shutil.copytree(run[0] / "base", cached / "snapshots" / "0")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    shutil.copytree(run[0] / "out" / "final", adapter)
    described = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    assert export.main(["--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0


def spoil(adapter: Path, how: str) -> None:
    path = adapter / "adapter_model.safetensors"
    described, tensors = json.loads((adapter / "adapter_config.json").read_text()), load_file(path)
    name = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_A.weight"
    if how == "another base's shapes":
        tensors[name] = torch.zeros(4, 7)
    elif how == "a deeper base":
        tensors[name.replace("layers.1", "layers.2")] = tensors[name].clone()
    elif how == "a weight gone":
        del tensors[name]
    elif how == "other layers":
        described["target_modules"] = ["model.layers.0.wq"]
    elif how == "not LoRA":
        described["peft_type"] = "IA3"
    elif how == "no base":
        described["base_model_name_or_path"] = None
    elif how == "gone base":
        described["base_model_name_or_path"] = "models/nowhere"
    save_file(tensors, path)
    (adapter / "adapter_config.json").write_text("{" if how == "no JSON" else json.dumps(described))
    if how == "no config":
        (adapter / "adapter_config.json").unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("another base's shapes", ["does not fit", "--model_id"]),
        ("a deeper base", ["does not fit", "layers.2.mlp.up_proj"]),
        ("a weight gone", ["does not fit", "layers.1.mlp.up_proj"]),
        ("other layers", ["does not fit"]),
        ("not LoRA", ["no LoRA adapter"]),
        ("no base", ["base model ''", "--model_id"]),
        ("gone base", ["base model 'models/nowhere' is not found", "--model_id"]),
        ("no JSON", ["adapter_config.json"]),
        ("no config", ["no adapter folder", "adapter_config.json"]),
        ("cut", ["cannot be read"]),
    ],
)
def test_an_adapter_that_cannot_be_exported_gets_one_line(run, tmp_path, capfd, how, words):
    adapter = tmp_path / "adapter"
    shutil.copytree(run[0] / "out" / "final", adapter)
    spoil(adapter, how)
    capfd.readouterr()
    assert export.main(["--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("grpo.export: error: ") and all(
        word in line for word in [f"--adapter {str(adapter)!r}", *words]
    )
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [("", "--adapter : must be given"), ("--adapter a", "--output : must be given"), ("--base c", "flag '--base'")],
)
def test_export_without_its_flags_gets_one_line(capfd, given, words):
    assert export.main(given.split()) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("grpo.export: error: ") and words in line
