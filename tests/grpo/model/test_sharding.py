"""A step on several ranks equals the step on one, with prompts, videos and completions of unequal lengths."""

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import train
from data.loader import checked
from data.sample import InputError
from grpo.config import Config
from grpo.logprobs import completion_logprobs
from grpo.model import sharding
from grpo.model.load import SpecialTokens
from grpo.model.optimizer import freeze, make_optimizer
from grpo.ranks import full_tensor, raise_together, start_processes
from grpo.rollout import SamplingParams, ScoredRollout, generate
from grpo.run.batches import resolve_batch_sizes
from grpo.run.inputs import load_initial_model
from tests.conftest import Tiny, run_ranks

ADVANTAGES = torch.tensor([[1.0, -0.5, 0.25], [0.7, -0.2, 0.4], [-1.0, 2.0, 0.5], [0.3, 0.1, -0.4]])
OFTEN = list(range(0, 300, 6))
ZERO_ADVANTAGES = 1  # a seed that stands for: every second group has none
COLUMNS = ("completion_ids", "completion_mask", "logprobs")


def full_gradients(model) -> list[torch.Tensor]:
    return [None if p.grad is None else full_tensor(p.grad) for p in model.parameters()]


def rollouts_of(tiny: Tiny) -> list:
    """Groups of unequal lengths; the second is padding."""
    prompts = [dataclasses.replace(prompt, is_padding=n == 1) for n, prompt in enumerate(tiny.prompts)]
    generators = [torch.Generator().manual_seed(n) for n in range(4)]
    ends = SpecialTokens(torch.tensor(OFTEN), tiny.suppress_tokens)
    return generate(tiny.model, prompts, ends, SamplingParams(3, 8, 0.7), generators)


def with_advantages(rollouts: list, seed: int = 0) -> list[ScoredRollout]:
    """What scoring makes of the rollouts, for given advantages; one completion of the third group is not trained."""
    scored = []
    for n, (rollout, advantages) in enumerate(zip(rollouts, ADVANTAGES, strict=True)):
        mask = rollout.completion_mask & (not rollout.prompt.is_padding)
        if n == 2:
            mask = mask & torch.tensor([[True], [False], [True]])
        scored.append(ScoredRollout(rollout, advantages * (seed != ZERO_ADVANTAGES or n % 2 == 0), mask))
    return scored


def padded(one: ScoredRollout, extra: int) -> ScoredRollout:
    """Widen a group by columns that belong to no completion."""
    wider = {name: F.pad(getattr(one.rollout, name), (0, extra)) for name in COLUMNS}
    return ScoredRollout(dataclasses.replace(one.rollout, **wider), one.advantages, F.pad(one.loss_mask, (0, extra)))


def step(tiny: Tiny, path: str, settings: dict, checkpointing: bool = False, reorder: bool = False) -> None:
    """Do one update on this rank's share of the four groups; rank 0 writes gradients, metrics and new weights."""
    device = start_processes()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # No clipping, so that the gradients can be read.
    config = Config(temperature=0.7, learning_rate=1e-3, max_grad_norm=1e9, **settings)
    config = resolve_batch_sizes(config, world_size)
    scored = with_advantages(rollouts_of(tiny), config.seed)
    if reorder:
        scored = [padded(one, 3) for one in reversed(scored)]
    model = copy.deepcopy(tiny.model).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sampling = sharding.SamplingModel(model)
    freeze(model, config)
    sharding.apply_fsdp(model, device)
    reference = None
    if config.beta > 0:
        reference = copy.deepcopy(tiny.model).requires_grad_(False)
        with torch.no_grad():  # another policy, so that the KL is not 0
            reference.lm_head.weight *= 1.1
        sharding.apply_fsdp(reference, device)
    optimizer, _ = make_optimizer(model, config, total_steps=1)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate
    own = scored[rank::world_size]
    models = sharding.Models(model, sampling, reference)
    metrics = train.update_phase(models, optimizer, own, tiny.suppress_tokens, config)
    gradients = full_gradients(model)
    sampling.sync(model)
    if rank == 0:
        weights = [p.detach().clone() for p in sampling.model.parameters()]
        torch.save({"gradients": gradients, "metrics": metrics, "weights": weights}, path)
    dist.destroy_process_group()


def relative(a, b):
    a, b = (torch.cat([x.flatten() for x in xs]) for xs in (a, b))
    return ((a - b).norm() / b.norm()).item()


VARIANTS = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 8},
    "two iterations": {"num_iterations": 2},
    "grpo, two iterations": {"loss_type": "grpo", "num_iterations": 2},
    "dr_grpo, two iterations": {"loss_type": "dr_grpo", "num_iterations": 2},
    "sequence level": {"importance_sampling_level": "sequence", "num_iterations": 2},
    "with KL": {"beta": 0.1, "num_iterations": 2},
    "only the first of two ranks has advantages": {"seed": ZERO_ADVANTAGES},
}


@pytest.fixture(scope="module")
def one_rank(tiny, tmp_path_factory):
    """The step in one process, all four groups in one packed pass; by variant."""
    results = {}

    def result(variant: str) -> dict:
        if variant not in results:
            path = str(tmp_path_factory.mktemp("one") / "step.pt")
            run_ranks(step, 1, tiny, path, {"global_batch_size": 4} | VARIANTS[variant])
            results[variant] = torch.load(path)
        return results[variant]

    return result


def check_split(tiny, one_rank, tmp_path, variant, world_size, settings, checkpointing=False, local=None):
    path = str(tmp_path / "step.pt")
    settings = {"global_batch_size": 4} | settings | VARIANTS[variant]
    run_ranks(step, world_size, tiny, path, settings, checkpointing, local_world_size=local)
    whole, split = one_rank(variant), torch.load(path)
    assert whole["metrics"]["grad_norm"] > 1e-3
    assert relative(split["gradients"], whole["gradients"]) < 1e-5
    assert relative(split["weights"], whole["weights"]) < 1e-5
    assert split["metrics"] == pytest.approx(whole["metrics"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("world_size", "settings", "checkpointing", "local"),
    [
        (1, {"gradient_accumulation_steps": 4}, False, None),
        (1, {}, True, None),
        (2, {"gradient_accumulation_steps": 2}, True, None),
        (4, {}, False, None),
        (4, {}, False, 2),
    ],
    ids=["four passes", "checkpointing", "2 ranks x 2 passes", "4 ranks", "2 nodes of 2"],
)
def test_a_step_does_not_depend_on_how_its_work_is_split(
    tiny, one_rank, tmp_path, world_size, settings, checkpointing, local
):
    check_split(tiny, one_rank, tmp_path, "dapo", world_size, settings, checkpointing, local)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_variant_of_the_loss_depends_on_the_number_of_ranks(tiny, one_rank, tmp_path, variant, world_size):
    check_split(tiny, one_rank, tmp_path, variant, world_size, {})


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2, "beta": 0.1}], ids=["plain", "with KL"])
def test_a_rank_whose_prompts_are_text_only_keeps_in_step(mixed, tmp_path, settings):
    four, results = dataclasses.replace(mixed, prompts=mixed.prompts[:4]), []
    assert [len(prompt.pixel_values) > 0 for prompt in four.prompts] == [True, False, True, False]
    for world_size in (1, 2):
        run_ranks(step, world_size, four, str(tmp_path / "step.pt"), {"global_batch_size": 4} | settings)
        results.append(torch.load(tmp_path / "step.pt"))
    whole, split = results
    assert relative(split["gradients"], whole["gradients"]) < 1e-5
    assert relative(split["weights"], whole["weights"]) < 1e-5
    assert split["metrics"] == pytest.approx(whole["metrics"], rel=1e-4, abs=1e-6)


def test_the_variants_differ(one_rank):
    gradients = [torch.cat([g.flatten() for g in one_rank(variant)["gradients"]]) for variant in VARIANTS]
    for i, first in enumerate(gradients):
        for second in gradients[:i]:
            assert relative([first], [second]) > 1e-3


def test_the_gradient_is_that_of_the_trained_tokens_divided_by_their_number(tiny, one_rank):
    model = copy.deepcopy(tiny.model)
    loss, num_tokens, rollouts = 0.0, 0, rollouts_of(tiny)
    for one in with_advantages(rollouts):
        rollout, ids, mask = one.rollout, one.rollout.completion_ids, one.rollout.completion_mask
        ((logprobs, _),) = completion_logprobs(model, [rollout.prompt], [ids], [mask], 0.7, tiny.suppress_tokens)
        loss = loss - (logprobs * one.advantages[:, None])[one.loss_mask].sum()  # REINFORCE: the ratio is 1
        num_tokens += int(one.loss_mask.sum())
    assert 0 < num_tokens < sum(int(r.completion_mask.sum()) for r in rollouts if not r.prompt.is_padding)
    (loss / num_tokens).backward()
    assert relative([p.grad for p in model.parameters()], one_rank("dapo")["gradients"]) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_passes_order_of_the_prompts_and_padding_change_nothing(tiny, one_rank, tmp_path, variant):
    path = str(tmp_path / "step.pt")
    settings = {"global_batch_size": 4, "per_device_train_batch_size": 2} | VARIANTS[variant]
    run_ranks(step, 1, tiny, path, settings, False, True)
    other = torch.load(path)
    assert relative(other["gradients"], one_rank(variant)["gradients"]) < 1e-5
    assert other["metrics"] == pytest.approx(one_rank(variant)["metrics"], rel=1e-4, abs=1e-6)


def fetch(bad_rank: int, path: str) -> None:
    start_processes()
    items = [InputError("sample 's3': broken")] if dist.get_rank() == bad_rank else ["a prompt"]
    try:
        raise_together(checked, items)
    except InputError as error:
        with open(f"{path}{dist.get_rank()}", "w") as file:
            file.write(str(error))
    dist.destroy_process_group()


def test_what_stops_one_rank_stops_all_with_the_same_line(tmp_path):
    run_ranks(fetch, 2, 1, str(tmp_path / "rank"))
    assert [(tmp_path / f"rank{r}").read_text() for r in (0, 1)] == ["sample 's3': broken"] * 2


def two_models(tiny: Tiny, path: str) -> None:
    """Change the sharded weights; the sampling model must follow at the next sync."""
    device = start_processes()
    model = copy.deepcopy(tiny.model)
    sampling = sharding.SamplingModel(model)
    sharding.apply_fsdp(model, device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    sampling.sync(model)
    expected = zip(sampling.model.named_parameters(), tiny.model.parameters(), strict=True)
    wrong = [name for (name, now), before in expected if not torch.equal(now, 2 * before)]
    shared = sampling.model.lm_head.weight is sampling.model.get_input_embeddings().weight
    torch.save({"wrong": wrong, "shared": shared}, f"{path}{dist.get_rank()}")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_sampling_weights_are_those_of_the_sharded_model_on_every_rank(tiny, tmp_path, world_size):
    run_ranks(two_models, world_size, tiny, str(tmp_path / "rank"))
    for rank in range(world_size):
        assert torch.load(tmp_path / f"rank{rank}") == {"wrong": [], "shared": True}


def spread(tiny: Tiny, path: str, settings: dict) -> None:
    """Load the model on rank 0 only, as a run does; write what each rank then has of it."""
    device = start_processes()
    loaded = copy.deepcopy(tiny.model) if dist.get_rank() == 0 else None
    if loaded is not None:
        loaded.generation_config.eos_token_id = [3, 5]  # of generation_config.json, which the config does not know
    models = sharding.build_models(loaded, Config(**settings), device)
    model, sampling, reference = models.policy, models.sampling, models.reference
    sampling.sync(model)
    result = {
        "whole": {name: p.detach().clone() for name, p in sampling.model.named_parameters()},
        "sharded": {name: full_tensor(p).detach() for name, p in model.named_parameters()},
        "own": sum(p.to_local().numel() for p in model.parameters()),
        "reference": reference and {name: full_tensor(p).detach() for name, p in reference.named_parameters()},
        "buffers": {name: b.clone() for name, b in [*model.named_buffers(), *sampling.model.named_buffers()]},
        "stop": model.generation_config.eos_token_id,
    }
    torch.save(result, f"{path}{dist.get_rank()}")
    dist.destroy_process_group()


@pytest.mark.parametrize("settings", [{"beta": 0.1}, {"lora_enable": True, "lora_rank": 2}], ids=["whole", "adapters"])
def test_the_model_that_rank_0_has_read_is_spread_over_all_ranks(tiny, tmp_path, settings):
    run_ranks(spread, 2, tiny, str(tmp_path / "rank"), settings)
    expected, ranks = dict(tiny.model.named_parameters()), [torch.load(tmp_path / f"rank{rank}") for rank in (0, 1)]
    for rank in ranks:
        assert rank["whole"].keys() == expected.keys()
        assert all(torch.equal(p, rank["whole"][name]) for name, p in expected.items())
        assert all(torch.equal(p, ranks[0]["sharded"][name]) for name, p in rank["sharded"].items())
        assert all(torch.equal(b, rank["buffers"][name]) for name, b in tiny.model.named_buffers())
        assert rank["stop"] == [3, 5]
        if "beta" in settings:
            assert all(torch.equal(p, rank["reference"][name]) for name, p in expected.items())
        else:  # random adapters, the same on both
            assert any(".lora_A." in name and p.any() for name, p in rank["sharded"].items())
    number = sum(p.numel() for p in ranks[0]["sharded"].values())
    assert sum(rank["own"] for rank in ranks) == number and max(rank["own"] for rank in ranks) < 0.6 * number


def test_only_rank_0_reads_the_weights(tiny, tmp_path):
    run_ranks(load, 2, tiny, str(tmp_path / "rank"))
    assert [torch.load(tmp_path / f"rank{rank}") for rank in (0, 1)] == [True, False]


def load(tiny: Tiny, path: str) -> None:
    """Write whether this rank got a model."""
    start_processes()
    config = Config(model_id=str(tiny.folder / "model"))
    torch.save(load_initial_model(config) is not None, f"{path}{dist.get_rank()}")
    dist.destroy_process_group()


def in_bfloat16(tiny: Tiny, path: str) -> None:
    """Compute as on a GPU, with bfloat16 weights: sharded, and unsharded as in sampling."""
    sharding.compute_dtype = lambda device: torch.bfloat16
    device = start_processes()
    model = copy.deepcopy(tiny.model)
    sampling = sharding.SamplingModel(model)
    sharding.apply_fsdp(model, device)
    sampling.sync(model)
    rollouts = rollouts_of(dataclasses.replace(tiny, model=sampling.model))
    arguments = (
        [r.prompt for r in rollouts],
        [r.completion_ids for r in rollouts],
        [r.completion_mask for r in rollouts],
    )
    with torch.no_grad():
        ours = model.completion_logprobs(*arguments, 0.7, tiny.suppress_tokens)
        theirs = completion_logprobs(sampling.model, *arguments, 0.7, tiny.suppress_tokens)
    same = all(torch.equal(a, b) for (a, _), (b, _) in zip(ours, theirs, strict=True))
    difference = max((r.logprobs - a).abs().max().item() for r, (a, _) in zip(rollouts, ours, strict=True))
    torch.save({"same": same, "difference": difference}, path)
    dist.destroy_process_group()


def test_sharded_and_sampling_weights_compute_the_same_in_bfloat16(tiny, tmp_path):
    run_ranks(in_bfloat16, 1, tiny, str(tmp_path / "result"))
    result = torch.load(tmp_path / "result")
    assert result["same"] and result["difference"] < 0.1
