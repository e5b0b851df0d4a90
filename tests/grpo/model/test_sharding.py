"""A step on several ranks equals the step on one, with prompts, videos and completions of unequal lengths."""

import copy
import dataclasses
import functools
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

import train
from data.loader import checked
from data.sample import InputError
from grpo.config import Config
from grpo.logprobs import completion_logprobs
from grpo.model import sharding
from grpo.model.load import SpecialTokens
from grpo.model.optimizer import component_of, freeze, make_optimizer
from grpo.ranks import COLLECTIVE_TIMEOUT, full_tensor, raise_together, start_processes
from grpo.rollout import SamplingParams, ScoredRollout, generate
from grpo.run.batches import resolve_batch_sizes
from grpo.run.start import load_initial_model
from tests.conftest import Tiny, run_ranks

ADVANTAGES = torch.tensor([[1.0, -0.5, 0.25], [0.7, -0.2, 0.4], [-1.0, 2.0, 0.5], [0.3, 0.1, -0.4]])
OFTEN = list(range(0, 300, 6))
ZERO_ADVANTAGES = 1  # a seed that stands for: every second group has none
UNEQUAL = "only the first of two ranks has advantages"
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


@dataclass
class Case:
    """How a step is done."""

    settings: dict
    data: str = "tiny"
    checkpointing: bool = False
    reorder: bool = False


def step(tiny: Tiny, device: torch.device, case: Case) -> dict:
    """Do one update on this rank's share of the four groups; return gradients, metrics and new weights."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # No clipping, so that the gradients can be read.
    settings = {"temperature": 0.7, "learning_rate": 1e-3, "max_grad_norm": 1e9, "global_batch_size": 4}
    config = Config(**settings | case.settings)
    config = resolve_batch_sizes(config, world_size)
    scored = with_advantages(rollouts_of(tiny), config.seed)
    if case.reorder:
        scored = [padded(one, 3) for one in reversed(scored)]
    model = copy.deepcopy(tiny.model).train()
    if case.checkpointing:
        sharding.checkpoint_activations(model)
    sampling = sharding.SamplingModel(model)
    freeze(model, config)
    sharding.apply_fsdp(model, device)
    reference = None
    if config.beta > 0:
        reference = copy.deepcopy(tiny.model).requires_grad_(False)
        with torch.no_grad():  # another policy, so that the KL is not 0
            reference.lm_head.weight *= 1.1
        sharding.apply_fsdp(reference, device, is_trained=False)
    optimizer, _ = make_optimizer(model, config, total_steps=1)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate
    own = scored[rank::world_size]
    models = sharding.Models(model, sampling, reference)
    metrics = train.update_phase(models, optimizer, own, tiny.suppress_tokens, config)
    gradients = full_gradients(model)
    if reference and world_size > 1:  # what it has gathered for its passes is gone
        assert all(isinstance(parameter, DTensor) for parameter in reference.parameters())
    sampling.sync(model)
    weights = [p.detach().clone() for p in sampling.model.parameters()]
    return {"gradients": gradients, "metrics": metrics, "weights": weights}


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
    UNEQUAL: {"seed": ZERO_ADVANTAGES},
    "supervised": {"supervised": True},
}


VARIANT_CASES = {variant: Case(settings) for variant, settings in VARIANTS.items()}
OTHER_ORDER = {
    f"{variant}, in another order": Case({"per_device_train_batch_size": 2} | settings, reorder=True)
    for variant, settings in VARIANTS.items()
}
TEXT_ONLY = {
    "text only": Case({}, data="mixed"),
    "text only, supervised": Case({"supervised": True}, data="mixed"),
    "text only, with KL": Case({"num_iterations": 2, "beta": 0.1}, data="mixed"),
}
FROZEN = {
    "without language model": Case({"freeze_llm": True}),
    "without vision tower": Case({"freeze_vision_tower": True}),
    "without merger": Case({"freeze_merger": True}),
}
CASES = {  # by the number of ranks and of those of a node
    (1, 1): VARIANT_CASES
    | OTHER_ORDER
    | TEXT_ONLY
    | {
        "four passes": Case({"gradient_accumulation_steps": 4}),
        "checkpointing": Case({}, checkpointing=True),
    },
    (2, 2): VARIANT_CASES
    | TEXT_ONLY
    | FROZEN
    | {"two passes": Case({"gradient_accumulation_steps": 2}, checkpointing=True)},
    (4, 4): {
        variant: VARIANT_CASES[variant]
        for variant in ("dapo", "grpo, two iterations", "with KL", "supervised", UNEQUAL)
    },
    (4, 2): {"dapo": VARIANT_CASES["dapo"]},
}


def do_steps(data: dict[str, Tiny], path: str, cases: dict[str, Case]) -> None:
    device = start_processes()
    results = {name: step(data[case.data], device, case) for name, case in cases.items()}
    groups = sharding.device_mesh(device).get_all_groups()
    results["time limits"] = [group._get_backend(device).options._timeout.total_seconds() for group in groups]
    if dist.get_rank() == 0:
        torch.save(results, path)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def done(tiny, mixed, tmp_path_factory):
    """What a case gives on some ranks; the same processes do all cases of as many ranks."""
    data = {"tiny": tiny, "mixed": dataclasses.replace(mixed, prompts=mixed.prompts[:4])}

    @functools.cache
    def results_of(ranks: tuple[int, int]) -> dict:
        path = str(tmp_path_factory.mktemp("steps") / "steps.pt")
        run_ranks(do_steps, ranks[0], data, path, CASES[ranks], local_world_size=ranks[1])
        return torch.load(path)

    return lambda name, ranks=(1, 1): results_of(ranks)[name]


def assert_equal_steps(split: dict, whole: dict) -> None:
    assert whole["metrics"]["grad_norm"] > 1e-3
    assert relative(split["gradients"], whole["gradients"]) < 1e-5
    assert relative(split["weights"], whole["weights"]) < 1e-5
    assert split["metrics"] == pytest.approx(whole["metrics"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("four passes", (1, 1)),
        ("checkpointing", (1, 1)),
        ("two passes", (2, 2)),
        ("dapo", (4, 4)),
        ("dapo", (4, 2)),
    ],
    ids=["four passes", "checkpointing", "2 ranks x 2 passes", "4 ranks", "2 nodes of 2"],
)
def test_a_step_does_not_depend_on_how_its_work_is_split(done, name, ranks):
    assert_equal_steps(done(name, ranks), done("dapo"))


@pytest.mark.parametrize(("ranks", "num_groups"), [((2, 2), 1), ((4, 2), 2)], ids=["1 node", "2 nodes"])
def test_every_group_of_ranks_has_our_time_limit(done, ranks, num_groups):
    assert done("time limits", ranks) == [COLLECTIVE_TIMEOUT.total_seconds()] * num_groups


def test_models_are_built_without_a_warning_on_a_machine_with_several_gpus(tiny, monkeypatch):
    """Such as of a function that goes, or of random numbers of each GPU."""
    device = start_processes()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    config = Config(gradient_checkpointing=True, lora_enable=True, lora_rank=2)
    with warnings.catch_warnings(action="error"):
        policy = sharding.build_models(copy.deepcopy(tiny.model), config, device).policy
    dist.destroy_process_group()
    assert policy.model.language_model.layers[0].gradient_checkpointing


@pytest.mark.parametrize(
    ("variant", "ranks"),
    [(variant, ranks) for ranks in ((2, 2), (4, 4)) for variant in CASES[ranks] if variant in VARIANTS],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]} ranks",
)
def test_no_variant_of_the_loss_depends_on_the_number_of_ranks(done, variant, ranks):
    assert_equal_steps(done(variant, ranks), done(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_passes_order_of_the_prompts_and_padding_change_nothing(done, variant):
    other = done(f"{variant}, in another order")
    assert relative(other["gradients"], done(variant)["gradients"]) < 1e-5
    assert other["metrics"] == pytest.approx(done(variant)["metrics"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_a_rank_whose_prompts_are_text_only_keeps_in_step(mixed, done, name):
    assert [len(prompt.patches) > 0 for prompt in mixed.prompts[:4]] == [True, False, True, False]
    assert_equal_steps(done(name, (2, 2)), done(name))


@pytest.mark.parametrize("name", FROZEN)
def test_a_step_with_a_frozen_part_has_the_other_parts_gradients(tiny, done, name):
    found, frozen = done(name, (2, 2))["gradients"], name.removeprefix("without ")
    names = [name for name, _ in tiny.model.named_parameters()]
    for name, ours in zip(names, found, strict=True):
        assert (ours is None) == (component_of(name) == frozen), name
    kept = [(a, b) for a, b in zip(found, done("dapo")["gradients"], strict=True) if a is not None]
    assert relative(*zip(*kept, strict=True)) < 1e-5


def test_the_variants_differ(done):
    gradients = [torch.cat([g.flatten() for g in done(variant)["gradients"]]) for variant in VARIANTS]
    for i, first in enumerate(gradients):
        for second in gradients[:i]:
            assert relative([first], [second]) > 1e-3


def test_the_gradient_is_that_of_the_trained_tokens_divided_by_their_number(tiny, done):
    model = copy.deepcopy(tiny.model)
    loss, num_tokens, rollouts = 0.0, 0, rollouts_of(tiny)
    for one in with_advantages(rollouts):
        rollout, ids, mask = one.rollout, one.rollout.completion_ids, one.rollout.completion_mask
        ((logprobs, *_),) = completion_logprobs(model, [rollout.prompt], [ids], [mask], 0.7, tiny.suppress_tokens)
        loss = loss - (logprobs * one.advantages[:, None])[one.loss_mask].sum()  # REINFORCE: the ratio is 1
        num_tokens += int(one.loss_mask.sum())
    assert 0 < num_tokens < sum(int(r.completion_mask.sum()) for r in rollouts if not r.prompt.is_padding)
    (loss / num_tokens).backward()
    assert relative([p.grad for p in model.parameters()], done("dapo")["gradients"]) < 1e-5


def what_a_rank_has(tiny: Tiny, folder: str) -> None:
    """On every rank, what the functions below return, by their names."""
    device = start_processes()
    tasks = (error_of_another, doubled, spread, spread_with_adapters, spread_frozen_in_bfloat16)
    tasks += (has_loaded, in_bfloat16)
    torch.save({task.__name__: task(tiny, device, folder) for task in tasks}, f"{folder}/{dist.get_rank()}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tiny, tmp_path_factory):
    """`what_a_rank_has`, on each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(what_a_rank_has, 2, tiny, str(folder))
    return [torch.load(folder / str(rank)) for rank in (0, 1)]


def error_of_another(tiny: Tiny, device: torch.device, folder: str) -> str:
    """What a rank hears of an error on rank 1 alone."""
    with pytest.raises(InputError) as raised:
        raise_together(checked, [InputError("sample 's3': broken")] if dist.get_rank() == 1 else ["a prompt"])
    return str(raised.value)


def test_what_stops_one_rank_stops_all_with_the_same_line(ranks):
    assert [rank["error_of_another"] for rank in ranks] == ["sample 's3': broken"] * 2


def doubled(tiny: Tiny, device: torch.device, folder: str) -> dict:
    """Change the sharded weights; the sampling model must follow at the next sync."""
    model = copy.deepcopy(tiny.model)
    sampling = sharding.SamplingModel(model)
    sharding.apply_fsdp(model, device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    sampling.sync(model)
    expected = zip(sampling.model.named_parameters(), tiny.model.parameters(), strict=True)
    wrong = [name for (name, now), before in expected if not torch.equal(now, 2 * before)]
    return {"wrong": wrong, "shared": sampling.model.lm_head.weight is sampling.model.get_input_embeddings().weight}


def test_the_sampling_weights_are_those_of_the_sharded_model_on_every_rank(ranks):
    assert [rank["doubled"] for rank in ranks] == [{"wrong": [], "shared": True}] * 2


def test_the_sampling_weights_of_one_rank_are_those_of_its_model(tiny):
    assert doubled(tiny, start_processes(), "") == {"wrong": [], "shared": True}
    dist.destroy_process_group()


def spread(tiny: Tiny, device: torch.device, folder: str, **settings) -> dict:
    """Load the model on rank 0 only, as a run does; return what each rank then has of it."""
    loaded = copy.deepcopy(tiny.model) if dist.get_rank() == 0 else None
    if loaded is not None:
        loaded.generation_config.eos_token_id = [3, 5]  # of generation_config.json, which the config does not know
    models = sharding.build_models(loaded, Config(**settings or {"beta": 0.1}), device)
    model, sampling, reference = models.policy, models.sampling, models.reference
    sampling.sync(model)
    return {
        "whole": {name: p.detach().clone() for name, p in sampling.model.named_parameters()},
        "sharded": {name: full_tensor(p).detach() for name, p in model.named_parameters()},
        "own": sum(p.to_local().numel() for p in model.parameters()),
        "reference": reference and {name: full_tensor(p).detach() for name, p in reference.named_parameters()},
        "buffers": {name: b.clone() for name, b in [*model.named_buffers(), *sampling.model.named_buffers()]},
        "stop": model.generation_config.eos_token_id,
    }


def spread_with_adapters(tiny: Tiny, device: torch.device, folder: str) -> dict:
    return spread(tiny, device, folder, lora_enable=True, lora_rank=2)


def spread_frozen_in_bfloat16(tiny: Tiny, device: torch.device, folder: str) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "compute_dtype", lambda device: torch.bfloat16)
        return spread(tiny, device, folder, freeze_vision_tower=True, freeze_llm=True)


def test_frozen_weights_arrive_in_compute_precision(tiny, ranks):
    for rank in ranks:
        found = rank["spread_frozen_in_bfloat16"]
        for name, weight in tiny.model.named_parameters():
            dtype = torch.float32 if component_of(name) == "merger" else torch.bfloat16
            assert found["sharded"][name].dtype == dtype and torch.equal(found["sharded"][name], weight.to(dtype))
            assert torch.equal(found["whole"][name], weight.bfloat16())


@pytest.mark.parametrize("how", ["spread", "spread_with_adapters"])
def test_the_model_that_rank_0_has_read_is_spread_over_all_ranks(tiny, ranks, how):
    expected, found = dict(tiny.model.named_parameters()), [rank[how] for rank in ranks]
    for rank in found:
        assert rank["whole"].keys() == expected.keys()
        assert all(torch.equal(p, rank["whole"][name]) for name, p in expected.items())
        assert all(torch.equal(p, found[0]["sharded"][name]) for name, p in rank["sharded"].items())
        assert all(torch.equal(b, rank["buffers"][name]) for name, b in tiny.model.named_buffers())
        assert rank["stop"] == [3, 5]
        if how == "spread":
            assert all(torch.equal(p, rank["reference"][name]) for name, p in expected.items())
        else:  # random adapters, the same on both
            assert any(".lora_A." in name and p.any() for name, p in rank["sharded"].items())
    number = sum(p.numel() for p in found[0]["sharded"].values())
    assert sum(rank["own"] for rank in found) == number and max(rank["own"] for rank in found) < 0.6 * number


def has_loaded(tiny: Tiny, device: torch.device, folder: str) -> bool:
    """Load what a run needs; return whether this rank got a model."""
    return load_initial_model(Config(model_id=str(tiny.folder / "model"))) is not None


def test_only_rank_0_reads_the_weights(ranks):
    assert [rank["has_loaded"] for rank in ranks] == [True, False]


def in_bfloat16(tiny: Tiny, device: torch.device, folder: str) -> dict:
    """Compute as on a GPU, with bfloat16 weights: sharded, and unsharded as in sampling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "compute_dtype", lambda device: torch.bfloat16)
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
    same = all(torch.equal(a, b) for (a, *_), (b, *_) in zip(ours, theirs, strict=True))
    difference = max((r.logprobs - a).abs().max().item() for r, (a, *_) in zip(rollouts, ours, strict=True))
    return {"same": same, "difference": difference}


def test_sharded_and_sampling_weights_compute_the_same_in_bfloat16(ranks):
    assert all(rank["in_bfloat16"]["same"] and rank["in_bfloat16"]["difference"] < 0.1 for rank in ranks)
