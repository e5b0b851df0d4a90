"""A step on several ranks equals the step on one, with prompts, videos and completions of unequal lengths."""

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist

import train
from data.dataset import InputError
from grpo import sharding
from grpo.config import Config, resolve_batch_sizes
from grpo.logprobs import completion_logprobs
from grpo.model import freeze
from grpo.rollout import generate
from tests.conftest import Tiny, run_ranks

ADVANTAGES = torch.tensor([[1.0, -0.5, 0.25], [0.7, -0.2, 0.4], [-1.0, 2.0, 0.5], [0.3, 0.1, -0.4]])
OFTEN = list(range(0, 300, 6))


def whole_gradients(model) -> list[torch.Tensor]:
    return [None if p.grad is None else p.grad.full_tensor() for p in model.parameters()]


def rollouts_of(tiny: Tiny) -> list:
    """Groups of unequal lengths; the second is one that does not count."""
    prompts = [dataclasses.replace(prompt, counts=n != 1) for n, prompt in enumerate(tiny.prompts)]
    generators = [torch.Generator().manual_seed(n) for n in range(4)]
    return generate(tiny.model, prompts, 3, 8, 0.7, torch.tensor(OFTEN), tiny.banned_ids, generators)


def step(tiny: Tiny, path: str, settings: dict, checkpointing: bool = False) -> None:
    """Do one update on this rank's share of the four groups; rank 0 writes gradients, metrics and new weights."""
    device = sharding.start_processes()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # No clipping, so that the gradients can be read.
    config = Config(temperature=0.7, learning_rate=1e-3, max_grad_norm=1e9, **settings)
    config = resolve_batch_sizes(config, world_size)
    rollouts = rollouts_of(tiny)
    num_tokens = sum(int(r.completion_mask.sum()) for r in rollouts if r.prompt.counts)
    model = copy.deepcopy(tiny.model).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    whole = sharding.WholeWeights(model)
    freeze(model, config)
    sharding.shard(model, device)
    optimizer, _ = train.make_optimizer(model, config, total_steps=1)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate
    metrics = train.update_phase(
        model, optimizer, rollouts[rank::world_size], ADVANTAGES[rank::world_size], num_tokens, tiny.banned_ids, config
    )
    gradients = whole_gradients(model)
    whole.refresh(model)
    if rank == 0:
        weights = [p.detach().clone() for p in whole.module.parameters()]
        torch.save({"gradients": gradients, "metrics": metrics, "weights": weights}, path)
    dist.destroy_process_group()


def relative(a, b):
    a, b = (torch.cat([x.flatten() for x in xs]) for xs in (a, b))
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def one_rank(tiny, tmp_path_factory):
    """The step in one process, all four groups in one packed pass."""
    path = str(tmp_path_factory.mktemp("one") / "step.pt")
    run_ranks(step, 1, tiny, path, {"global_batch_size": 4})
    return torch.load(path)


@pytest.mark.parametrize(
    ("world_size", "settings", "checkpointing", "local"),
    [
        (1, {"global_batch_size": 4, "gradient_accumulation_steps": 4}, False, None),
        (1, {"global_batch_size": 4}, True, None),
        (2, {"global_batch_size": 4}, False, None),
        (2, {"global_batch_size": 4, "gradient_accumulation_steps": 2}, True, None),
        (4, {"global_batch_size": 4}, False, None),
        (4, {"global_batch_size": 4}, False, 2),
    ],
    ids=["four passes", "checkpointing", "2 ranks", "2 ranks x 2 passes", "4 ranks", "2 nodes of 2"],
)
def test_a_step_does_not_depend_on_how_its_work_is_split(
    tiny, one_rank, tmp_path, world_size, settings, checkpointing, local
):
    path = str(tmp_path / "step.pt")
    run_ranks(step, world_size, tiny, path, settings, checkpointing, local_world_size=local)
    split = torch.load(path)
    assert one_rank["metrics"]["grad_norm"] > 1e-3
    assert relative(split["gradients"], one_rank["gradients"]) < 1e-5
    assert relative(split["weights"], one_rank["weights"]) < 1e-5
    assert split["metrics"] == pytest.approx(one_rank["metrics"], rel=1e-4, abs=1e-6)


def test_the_gradient_is_that_of_the_counted_tokens_divided_by_their_number(tiny, one_rank):
    model, rollouts = copy.deepcopy(tiny.model), [rollouts_of(tiny)[n] for n in (0, 2, 3)]
    loss, num_tokens = 0.0, 0
    for rollout, advantages in zip(rollouts, ADVANTAGES[[0, 2, 3]], strict=True):
        ids, mask = rollout.completion_ids, rollout.completion_mask
        ((logprobs, _),) = completion_logprobs(model, [rollout.prompt], [ids], [mask], 0.7, tiny.banned_ids)
        loss = loss - (logprobs * advantages[:, None])[mask].sum()  # REINFORCE: the ratio is 1
        num_tokens += int(mask.sum())
    (loss / num_tokens).backward()
    assert relative([p.grad for p in model.parameters()], one_rank["gradients"]) < 1e-5


def fetch(bad_rank: int, path: str) -> None:
    sharding.start_processes()
    items = [InputError("sample 's3': broken")] if dist.get_rank() == bad_rank else ["a prompt"]
    try:
        sharding.raise_together(items)
    except InputError as error:
        with open(f"{path}{dist.get_rank()}", "w") as file:
            file.write(str(error))
    dist.destroy_process_group()


def test_what_stops_one_rank_stops_all_with_the_same_line(tmp_path):
    run_ranks(fetch, 2, 1, str(tmp_path / "rank"))
    assert [(tmp_path / f"rank{r}").read_text() for r in (0, 1)] == ["sample 's3': broken"] * 2


def two_models(tiny: Tiny, path: str) -> None:
    """Change the sharded weights; the whole copy must follow on refresh, and only then if it is a copy."""
    device = sharding.start_processes()
    model = copy.deepcopy(tiny.model)
    whole = sharding.WholeWeights(model)
    sharding.shard(model, device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    whole.refresh(model)
    expected = zip(whole.module.named_parameters(), tiny.model.parameters(), strict=True)
    wrong = [name for (name, now), before in expected if not torch.equal(now, 2 * before)]
    shared = whole.module.lm_head.weight is whole.module.get_input_embeddings().weight
    torch.save({"wrong": wrong, "shared": shared}, f"{path}{dist.get_rank()}")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 2])
def test_whole_weights_are_those_of_the_sharded_model_on_every_rank(tiny, tmp_path, world_size):
    run_ranks(two_models, world_size, tiny, str(tmp_path / "rank"))
    for rank in range(world_size):
        assert torch.load(tmp_path / f"rank{rank}") == {"wrong": [], "shared": True}


def in_bfloat16(tiny: Tiny, path: str) -> None:
    """Compute as on a GPU, with bfloat16 weights: sharded, and whole as they sample."""
    sharding.compute_dtype = lambda device: torch.bfloat16
    device = sharding.start_processes()
    model = copy.deepcopy(tiny.model)
    whole = sharding.WholeWeights(model)
    sharding.shard(model, device)
    whole.refresh(model)
    rollouts = rollouts_of(dataclasses.replace(tiny, model=whole.module))
    arguments = (
        [r.prompt for r in rollouts],
        [r.completion_ids for r in rollouts],
        [r.completion_mask for r in rollouts],
    )
    with torch.no_grad():
        ours = model.completion_logprobs(*arguments, 0.7, tiny.banned_ids)
        theirs = completion_logprobs(whole.module, *arguments, 0.7, tiny.banned_ids)
    same = all(torch.equal(a, b) for (a, _), (b, _) in zip(ours, theirs, strict=True))
    difference = max((r.logprobs - a).abs().max().item() for r, (a, _) in zip(rollouts, ours, strict=True))
    torch.save({"same": same, "difference": difference}, path)
    dist.destroy_process_group()


def test_sharded_and_whole_weights_compute_the_same_in_bfloat16(tiny, tmp_path):
    run_ranks(in_bfloat16, 1, tiny, str(tmp_path / "result"))
    result = torch.load(tmp_path / "result")
    assert result["same"] and result["difference"] < 0.1
