"""What is computed from sizes is what runs on a CPU need.

`python -m tests.grpo.benchmark.test_on_paper` compares more of them, in some minutes.
"""

import gc
import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import grpo.benchmark.__main__ as benchmark
from grpo.benchmark import memory, on_paper
from grpo.benchmark.__main__ import IDS, SIZES, Options, prepare, random_model, random_prompt
from grpo.benchmark.memory import peak, rollout_moments, update_moments
from grpo.benchmark.sizes import Parameters, Plan
from grpo.decoding import DECODERS
from grpo.ranks import start_processes
from grpo.run.checkpoint import trainer_state

ON_CPU = Options(gpus=0, completion_length=16, frames=4)  # fewer than by default take less time


def allocated(function) -> tuple[object, int, int]:
    """Call it; return its result, and how many more bytes of tensors there are than before: at the end, at the peak."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        result = function()
        gc.collect()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return result, sum(changes), max(itertools.accumulate(changes, initial=0))


def prepare_second_step(options: Options) -> benchmark.Step:
    """Build the model as it is after a step, with the gradients still there."""
    step = prepare(options, torch.device("cpu"))
    for parameter in step.models.policy.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return step


def measured_and_computed(options: Options) -> tuple[list[float], list[float]]:
    """Return the bytes at the peak of a rollout and of an update, as allocated and as on paper."""
    DECODERS.clear()
    step, there, _ = allocated(lambda: prepare_second_step(options))
    rollouts, kept, at_most = allocated(step.rollout)
    _, _, more = allocated(lambda: step.update(rollouts))
    plan = Plan.of(options)
    moments = rollout_moments(plan), update_moments(plan, bool(options.gradient_checkpointing))
    computed = [sum(peak(plan, of_phase).values()) for of_phase in moments]
    return [there + at_most, there + kept + more], computed


@pytest.fixture
def one_process():
    start_processes()
    yield
    DECODERS.clear()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "flags",
    [
        {"size": "tiny", "gradient_checkpointing": True},
        {"size": "tiny", "num_videos": 30, "num_generations": 16},
        {"size": "tiny", "num_videos": 30, "num_generations": 16, "gradient_checkpointing": True},
        {"size": "tiny", "num_videos": 30, "beta": 0.1},
        {"size": "tiny", "num_videos": 30, "lora_enable": True},
        {"size": "tiny", "num_videos": 30, "lora_enable": True, "gradient_checkpointing": True},
        {"size": "tiny", "num_videos": 30, "freeze_vision_tower": True},
        {"size": "cpu", "num_generations": 16},
        {"size": "cpu", "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_peaks_are_those_of_real_runs(flags, one_process):
    measured, computed = measured_and_computed(replace(ON_CPU, **flags))
    assert computed == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_model(size):
    with torch.device("meta"):
        model = random_model(*SIZES[size], IDS)
    plan = Plan.of(Options(size=size))
    parameters = Parameters.of(plan)
    assert parameters.counts(plan)[0] == sum(p.numel() for p in model.parameters())
    blocks = [*model.model.language_model.layers, *model.model.visual.blocks]
    of_root = set(model.parameters()) - {p for block in blocks for p in block.parameters()}
    assert parameters.root(plan) == sum(p.numel() for p in of_root)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_trained_and_saved_with_adapters_is_what_a_run_trains_and_saves(frozen, one_process):
    options = replace(ON_CPU, size="tiny", lora_enable=True, freeze_vision_tower=frozen)
    plan, step = Plan.of(options), prepare(options, torch.device("cpu"))
    _, trained, frozen = Parameters.of(plan).counts(plan)
    policy = step.models.policy
    assert trained == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert frozen == sum(p.numel() for p in policy.parameters() if not p.requires_grad)
    state = trainer_state(policy, step.optimizer)
    model, checkpoint = memory.disk(plan)
    assert model == 4 * trained
    assert checkpoint - model == sum(t.nbytes for name, t in state.items() if not name.endswith(".step"))


def test_prompt_has_the_size_of_the_one_that_is_measured():
    for options in (Options(), Options(num_videos=3, frames=6, resolution=112)):
        plan, prompt = Plan.of(options), random_prompt(options)
        assert len(prompt.prompt_ids) == plan.P and len(prompt.patches) == plan.S


def test_states_of_7b_on_8_gpus():
    """8,292,166,656 parameters: of 4 bytes each and 8 for Adam a GPU has an eighth; and a copy of 2 bytes each."""
    plan = Plan.of(Options(size="7b", beta=0.1))
    terms = memory.resident(plan)
    assert terms["weights"] == 8_292_166_656 * 4 / 8 and terms["Adam"] == 2 * terms["weights"]
    assert terms["sampling copy"] == 8_292_166_656 * 2 and terms["reference model"] == terms["sampling copy"] / 8
    # Keys and values of 28 layers with 4 heads of 128, for 2,048 prompt tokens, the least room, and 8 x 32 others.
    assert terms["key-value cache"] == 2 * 28 * 4 * 128 * (2048 + 8 * 32) * 2
    adapters = Plan.of(Options(size="7b", lora_enable=True))
    _, trained, frozen = Parameters.of(adapters).counts(adapters)
    assert memory.resident(adapters)["weights"] == (4 * trained + 2 * frozen) / 8


def test_times_are_those_of_bytes_and_operations():
    options = Options(size="tiny", num_videos=1, frames=2, resolution=28, num_generations=2, completion_length=4)
    plan = Plan.of(options)
    assert (plan.P, plan.S, plan.L) == (43, 4, 51)
    layer, head = Parameters.of(plan).layer, 128 * 512
    # Half of the completions' 8 tokens are there on average; keys and values of 4 layers have 64 numbers each.
    assert on_paper.decode_bytes(plan) == 2 * (4 * layer + head + 2 * 4 * 64 * (43 + 4))
    text, vision = on_paper.operations(plan, plan.L, 8)
    assert text == 2 * (4 * layer * 51 + head * 8)
    more = on_paper.update_operations(plan, True) - on_paper.update_operations(plan, False)
    assert more == text + vision  # everything is computed once more
    slow, fast = (on_paper.seconds(plan, bandwidth, 1e12) for bandwidth in (1e6, 2e6))
    prefill = sum(on_paper.operations(plan, 43, 1)) / 1e12
    assert slow["rollout"] - prefill == pytest.approx(3 * on_paper.decode_bytes(plan) / 1e6)
    assert slow["rollout"] - prefill == pytest.approx(2 * (fast["rollout"] - prefill))


def test_table_and_row_and_file_are_written(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert benchmark.main(f"--on_paper --size 7b --num_videos 30 --gpus 4 --json {file}".split()) == 0
    printed, figures = capsys.readouterr().out, json.loads(file.read_text())
    for terms in figures["memory_gb"].values():
        assert sum(terms.values()) == pytest.approx(2 * terms["total"])
    *_, head, line, row = printed.splitlines()
    assert head.count("|") == line.count("|") == row.count("|") and row.startswith("| 7b | 84x84 |")
    assert f" {figures['memory_gb']['update']['total']:.0f} GB " in row and "computed, not measured" in printed


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--gpus 4", "--gpus: is for --on_paper"),
        ("--on_paper --lora_rank 8", "--lora_rank: is about adapters"),
        ("--on_paper --runs 2", "--runs: is for what is measured"),
        ("--on_paper --gpus -1", "--gpus -1: must lie between"),
        ("--on_paper --tflop_per_second 0", "--tflop_per_second 0.0: must be above 0"),
    ],
)
def test_flags_without_effect_are_refused_in_a_line(flags, words, capsys):
    assert benchmark.main(flags.split()) == 2
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") == 1


def main() -> None:
    """Print a line per run: GB measured, computed, and the difference, of rollout and update."""
    start_processes()
    for size, M, G, checkpointing in itertools.product(("tiny", "cpu"), (5, 30), (8, 16), (False, True)):
        flags = {"num_videos": M, "num_generations": G, "gradient_checkpointing": checkpointing}
        both = zip(*measured_and_computed(replace(ON_CPU, size=size, **flags)), strict=True)
        cells = [f"{a / 2**30:.3f} {b / 2**30:.3f} {b / a - 1:+.1%}" for a, b in both]
        print(f"{size:5} videos {M:2}  G {G:2}  {'checkpointing' * checkpointing:13}  {'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
