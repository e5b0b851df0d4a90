"""Freezing and learning rates: what is named is trained, at its own rate, and the rest keeps every bit."""

import copy
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import torch.distributed as dist
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention

import train
from data.sample import InputError
from grpo.config import Config, parse_config
from grpo.logprobs import completion_logprobs, encode_media
from grpo.model import sharding
from grpo.model.lora import add_adapters
from grpo.model.optimizer import component_of, freeze, make_optimizer
from grpo.ranks import start_processes
from tests.conftest import run_ranks
from tests.grpo.model.test_lora import LORA
from tests.grpo.model.test_sharding import relative, rollouts_of
from tests.grpo.rewards import named
from tests.grpo.test_config import GIVEN
from tests.test_train import flags

PARTS = {"language model", "vision tower", "merger"}
FREEZE = {"language model": "--freeze_llm", "vision tower": "--freeze_vision_tower", "merger": "--freeze_merger"}


def parts(folder) -> dict[str, torch.Tensor]:
    """All weights of each part in one tensor."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    return {
        part: torch.cat([p.detach().flatten() for name, p in model.named_parameters() if component_of(name) == part])
        for part in PARTS
    }


@pytest.mark.parametrize(
    "frozen",
    [["vision tower"], ["language model"], ["vision tower", "merger"], ["vision tower", "language model"]],
    ids=" and ".join,
)
def test_a_frozen_part_keeps_every_bit_and_the_others_change(tiny, tmp_path, frozen):
    more = ["--global_batch_size", "2", "--weight_decay", "0.1", *(FREEZE[part] for part in frozen)]
    more += ["--gradient_checkpointing", str("merger" in frozen)]
    assert train.main(flags(tiny, tmp_path / "out", *more)) == 0
    before, after = parts(tiny.folder / "model"), parts(tmp_path / "out" / "final")
    assert {part for part in PARTS if torch.equal(before[part], after[part])} == set(frozen)


def test_the_parts_are_all_of_the_model(tiny):
    sizes = {"language model": 0, "vision tower": 0, "merger": 0}
    for name, parameter in tiny.model.named_parameters():
        sizes[component_of(name)] += parameter.numel()
    visual = tiny.model.model.visual
    assert sizes["merger"] == sum(p.numel() for p in visual.merger.parameters())
    assert sizes["vision tower"] == sum(p.numel() for p in visual.parameters()) - sizes["merger"]
    assert sizes["language model"] == sum(p.numel() for p in tiny.model.model.language_model.parameters())


def groups(tiny, *, total_steps=4, **settings):
    config = Config(**{"learning_rate": 1e-3, "weight_decay": 0.1, "warmup_ratio": 0} | settings)
    model = copy.deepcopy(tiny.model)
    if config.lora_enable:
        add_adapters(model, config)
    freeze(model, config)
    return model, *make_optimizer(model, config, total_steps)


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, {"language model": 1e-3, "vision tower": 1e-3, "merger": 1e-3}),
        ({"vision_lr": 2e-4, "merger_lr": 3e-5}, {"language model": 1e-3, "vision tower": 2e-4, "merger": 3e-5}),
        ({"freeze_llm": True, "merger_lr": 3e-5}, {"vision tower": 1e-3, "merger": 3e-5}),
        (
            LORA | {"learning_rate": 1e-3, "freeze_vision_tower": True, "vision_lora": True, "vision_lr": 2e-4},
            {"adapters of the language model": 1e-3, "adapters of the vision tower": 2e-4, "merger": 1e-3},
        ),
    ],
    ids=str,
)
def test_every_part_has_the_learning_rate_of_its_flag_throughout(tiny, settings, rates):
    model, optimizer, schedule = groups(tiny, **{k: v for k, v in settings.items() if k != "learning_rate"})
    where = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for share in (1, 0.5):  # a cosine from 1 over 4 steps: half of it after two
        for name, parameter in model.named_parameters():
            if component_of(name) in rates:
                group = where[id(parameter)]
                assert group["lr"] == pytest.approx(share * rates[component_of(name)]), name
                assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0), name
            else:
                assert id(parameter) not in where and not parameter.requires_grad, name
        for _ in range(2):
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize(
    ("warmup_ratio", "shares"),
    [(0.5, [0.25, 0.5, 0.75, 1, 0.75, 0.25, 0]), (0, [1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873, 0])],
)
def test_the_learning_rate_rises_evenly_and_falls_as_a_cosine_to_0(tiny, warmup_ratio, shares):
    _, optimizer, schedule = groups(tiny, total_steps=6, warmup_ratio=warmup_ratio)
    found = []
    for _ in shares:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx([1e-3 * share for share in shares], abs=1e-10)


CHOICES = [
    (name, choice)
    for name, kind in get_type_hints(Config).items()
    for choice in (get_args(kind) if get_origin(kind) is Literal else (True,) if kind is bool else ())
]


@pytest.mark.parametrize(("name", "choice"), CHOICES, ids=lambda value: str(value))
def test_no_choice_among_the_flags_makes_an_optimizer_that_ignores_the_parts_learning_rates(tiny, name, choice):
    """Whichever optimizer a flag chooses, every trained parameter has its own part's rate."""
    model, optimizer, _ = groups(tiny, **{"vision_lr": 2e-4, "merger_lr": 3e-5} | {name: choice})
    rates = {"language model": 1e-3, "vision tower": 2e-4, "merger": 3e-5}
    rates |= {f"adapters of the {part}": rate for part, rate in rates.items()}
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {id(p): rates[component_of(n)] for n, p in model.named_parameters() if p.requires_grad}
    assert found == pytest.approx(expected) and found


def test_a_parameter_of_no_known_part_is_an_error():
    with pytest.raises(ValueError, match="model.audio.proj.weight belongs to no component"):
        component_of("model.audio.proj.weight")


def refreshed(tiny, path: str) -> None:
    """Gather weights twice, with a frozen tower, in the precision of a GPU; write which come anew, and where to."""
    sharding.compute_dtype = lambda device: torch.bfloat16
    device = start_processes()
    model = copy.deepcopy(tiny.model)
    sampling = sharding.SamplingModel(model)
    freeze(model, Config(freeze_vision_tower=True))
    sharding.apply_fsdp(model, device)
    sampling.sync(model)
    first = dict(sampling.model.named_parameters())
    kept = {name: (p.data_ptr(), p.detach().clone()) for name, p in first.items()}
    for parameter in first.values():
        parameter.data.fill_(7)
    sampling.sync(model)
    again = {component_of(name) for name, p in first.items() if torch.equal(p, kept[name][1])}
    left = {component_of(name) for name, p in first.items() if (p == 7).all()}
    moved = [name for name, p in first.items() if p.data_ptr() != kept[name][0]]
    kept_in = {(component_of(name), p.dtype) for name, p in model.named_parameters()}
    dtypes = {p.dtype for p in first.values()}
    torch.save({"dtypes": dtypes, "kept_in": kept_in, "again": again, "left": left, "moved": moved}, path)
    dist.destroy_process_group()


def test_frozen_weights_are_gathered_once_and_all_stay_where_they_are(tiny, tmp_path):
    run_ranks(refreshed, 2, tiny, str(tmp_path / "result"))
    assert torch.load(tmp_path / "result") == {
        "dtypes": {torch.bfloat16},
        "kept_in": {("vision tower", torch.bfloat16), ("language model", torch.float32), ("merger", torch.float32)},
        "again": {"language model", "merger"},
        "left": {"vision tower"},
        "moved": [],  # graphs that were captured read from there
    }


def test_a_frozen_tower_encodes_once_and_gives_the_same_log_probabilities_and_gradients(tiny):
    rollouts, results = rollouts_of(tiny), []
    ids, masks = [r.completion_ids for r in rollouts], [r.completion_mask for r in rollouts]
    for encode in (False, True):
        model = copy.deepcopy(tiny.model)
        freeze(model, Config(freeze_vision_tower=True))
        prompts = [encode_media(model, prompt) for prompt in tiny.prompts] if encode else tiny.prompts
        assert all(len(prompt.patches) == 0 for prompt in prompts) == encode
        logprobs = [
            logprobs for logprobs, *_ in completion_logprobs(model, prompts, ids, masks, 0.7, tiny.suppress_tokens)
        ]
        sum(row.sum() for row in logprobs).backward()
        results.append((logprobs, [p.grad for p in model.parameters() if p.grad is not None]))
    assert relative(results[1][0], results[0][0]) < 1e-6
    assert len(results[0][1]) == len(results[1][1]) and relative(results[1][1], results[0][1]) < 1e-5


@pytest.mark.parametrize(("more", "passes"), [([], 2 + 2 * 2), (["--freeze_vision_tower"], 2)])
def test_a_run_encodes_the_videos_of_a_frozen_tower_once_per_step(tiny, tmp_path, monkeypatch, more, passes):
    calls, attention = [], Qwen2_5_VLVisionAttention.forward
    monkeypatch.setattr(Qwen2_5_VLVisionAttention, "forward", lambda *a, **k: (calls.append(1), attention(*a, **k))[1])
    run = ["--max_steps", "2", "--num_iterations", "2", "--global_batch_size", "1", *named("by_length"), *more]
    assert train.main(flags(tiny, tmp_path / "out", *run)) == 0
    assert len(calls) == passes * tiny.model.config.vision_config.depth


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--freeze_vision_tower --freeze_llm --freeze_merger", ["nothing to train", "--lora_enable"]),
        ("--lora_enable --vision_lora", ["--vision_lora", "--freeze_vision_tower"]),
        ("--vision_lora --freeze_vision_tower", ["--vision_lora", "--lora_enable"]),
        ("--lora_namespan_exclude mlp", ["--lora_namespan_exclude", "--lora_enable"]),
        ("--lora_rank 8", ["--lora_rank", "--lora_enable"]),
        ("--lora_alpha 32 --lora_dropout 0", ["--lora_alpha", "--lora_enable"]),
        ("--lora_enable --lora_rank 0", ["--lora_rank 0"]),
        ("--lora_enable --lora_alpha 0", ["--lora_alpha 0"]),
        ("--lora_enable --lora_dropout 1", ["--lora_dropout 1"]),
        ("--vision_lr 0", ["--vision_lr 0"]),
        ("--merger_lr nan", ["--merger_lr nan"]),
        ("--vision_lr 1e-6 --freeze_vision_tower", ["--vision_lr", "--freeze_vision_tower"]),
        ("--merger_lr 1e-6 --freeze_merger", ["--merger_lr", "--freeze_merger"]),
    ],
)
def test_what_cannot_be_trained_gets_one_line(more, words):
    with pytest.raises(InputError) as raised:
        parse_config([*GIVEN, *more.split()])
    line = str(raised.value)
    assert "\n" not in line and all(word in line for word in words), line


def test_what_goes_together_is_accepted():
    everything = "--lora_enable --freeze_llm --freeze_vision_tower --freeze_merger --vision_lora --vision_lr 1e-6"
    config = parse_config([*GIVEN, *everything.split(), "--lora_namespan_exclude", "['lm_head','embed_tokens']"])
    assert config.vision_lora and config.vision_lr == 1e-6


@pytest.mark.parametrize(("excluded", "words"), [("proj", "'proj' leaves no layer"), ("mlp,nowhere", "'nowhere'")])
def test_excluding_every_layer_or_what_is_nowhere_stops_the_run_before_training(tiny, tmp_path, capfd, excluded, words):
    arguments = flags(tiny, tmp_path / "out", "--lora_enable", "--lora_namespan_exclude", excluded)
    assert train.main(arguments) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("train.py: error: --lora_namespan_exclude") and words in line
    assert not (tmp_path / "out").exists()
