"""`python -m grpo.benchmark`: what a step costs on this machine, without data or weights.

Builds a Qwen2.5-VL with random weights and a prompt with random pixels, and times the trainer's own rollout and update,
in turn with a baseline in the same precision and sharding, in which nothing is shared (`repeated_rows.py`). All
completions have `--completion_length` tokens. Under torchrun every rank has one prompt, as in training.
With `--on_paper` nothing is measured: what a step needs on GPUs is computed from the sizes alone (`on_paper.py`).
"""

import ctypes
import gc
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import torch.distributed as dist
import transformers

from data.flags import default_of, parse_flags
from data.loader import Prompt
from data.media.patches import MERGE_SIZE, PATCH_VALUES
from data.prompt import mrope_positions
from data.sample import InputError, Sample
from grpo.benchmark.on_paper import decode_bytes, on_paper, paper_table, update_operations
from grpo.benchmark.repeated_rows import repeated_rollout, repeated_update
from grpo.benchmark.sizes import Plan, video_grid
from grpo.config import Config
from grpo.decoding import DECODERS
from grpo.model.layers import use_hugging_faces_layers, use_our_layers
from grpo.model.load import SpecialTokens
from grpo.model.optimizer import init_optimizer_state, make_optimizer
from grpo.model.random_model import SIZES, TOKENS_PER_SECOND, random_model
from grpo.model.sharding import Models, build_models, compute_dtype
from grpo.ranks import abort_rank, exit_code, start_processes
from grpo.rollout import Rollout
from grpo.run.preflight import with_trial_advantages
from grpo.run.tracking import peak_memory_gb
from reward.flags import NOT_NEGATIVE, POSITIVE, Bounds, flag
from train import rollout_phase, update_phase

PROG = "python -m grpo.benchmark"
IDS = {"video_token_id": 1, "vision_start_token_id": 2, "vision_end_token_id": 3, "image_token_id": 4}
VISION_TOKENS = list(IDS.values())
IDS |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FIGURES = ("rollout_seconds", "update_seconds", "step_seconds", "peak_memory_gb")
ROWS = ("prefill_seconds", "decode_seconds", *FIGURES)
AT_LEAST_2 = Bounds(lambda n: n >= 2, "must be at least 2")
# The machine's limits are measured by a copy of this many bytes, and by a product of matrices of this size.
COPIED_BYTES, MATRIX_SIDE = 2**29, {"cuda": 8192, "cpu": 2048}


@dataclass
class Options:
    """The flags."""

    heading = "step"
    size: Literal["tiny", "cpu", "3b", "7b"] = flag("cpu", "the model: 1, 29, 3,755 or 8,292 million parameters")
    num_videos: int = flag(5, "videos of the prompt", POSITIVE)
    frames: int = flag(8, "frames of a video", Bounds(lambda n: n >= 2 and n % 2 == 0, "must be even, and at least 2"))
    resolution: int = flag(84, "width and height of the frames in pixels, rounded to a multiple of 28", POSITIVE)
    num_generations: int = flag(8, "completions per prompt (G)", AT_LEAST_2)
    completion_length: int = flag(32, "tokens of every completion", AT_LEAST_2)
    freeze_vision_tower: bool = flag(False, "do not train the vision tower")
    lora_enable: bool = flag(False, "train adapters on the language model")
    lora_rank: int = flag(64, "rank of the adapters", POSITIVE)
    beta: float = flag(0.0, "above 0: with a reference model, which the baseline leaves out", NOT_NEGATIVE)
    gradient_checkpointing: bool | None = flag(None, "recompute activations to save memory (on a GPU: on)")
    runs: int = flag(3, "measured runs, whose medians are shown, each after one for its peak memory", POSITIVE)
    baseline: bool = flag(True, "also measure the baseline: one copy of the prompt per completion")
    json: str = flag("", "file to write the figures to")
    on_paper: bool = flag(False, "compute from the sizes what a step needs on GPUs; measure nothing")
    gpus: int = flag(8, "--on_paper: GPUs of a node, which share the weights; 0: a CPU, in float32", NOT_NEGATIVE)
    bandwidth_gb_per_second: float = flag(3350.0, "--on_paper: memory bandwidth of a GPU (H100)", POSITIVE)
    tflop_per_second: float = flag(989.0, "--on_paper: matrix products of a GPU (H100, bfloat16)", POSITIVE)


def random_prompt(options: Options) -> Prompt:
    """Make a prompt with random pixels."""
    (t, h, w), video_token = video_grid(options), IDS["video_token_id"]
    grid = torch.tensor([[t, h, w]] * options.num_videos)
    seconds = torch.ones(options.num_videos)
    placeholders = [video_token] * (t * h * w // MERGE_SIZE**2)
    video = [IDS["vision_start_token_id"], *placeholders, IDS["vision_end_token_id"]]
    ids = torch.tensor([5] * 20 + video * options.num_videos + [6] * 20)
    positions = mrope_positions(ids == video_token, grid, seconds, TOKENS_PER_SECOND)
    patches = torch.randint(256, (int(grid.prod(dim=1).sum()), PATCH_VALUES), dtype=torch.uint8)
    return Prompt(Sample("random", (), (), ""), ids, positions, patches, grid, seconds)


def reset_peak_memory() -> None:
    """Make `peak_memory_gb` start from what is in use now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # return freed memory, which would count for the next measurement
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak of resident memory: man 5 proc


def timed(function, *arguments) -> tuple[float, object]:
    """Time a call on all ranks together; return the seconds and the result."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    dist.barrier()
    began = time.perf_counter()
    result = function(*arguments)
    wait()
    return time.perf_counter() - began, result


def measure(rollout, update) -> dict[str, float]:
    """Return the figures of a step of two phases; the second takes the result of the first.

    It runs twice, for its peak memory and then for its times: allocating returned memory again takes time that
    training, one step after the other, does not spend.
    """
    reset_peak_memory()
    update(rollout())
    peak = peak_memory_gb()
    in_rollout, rollouts = timed(rollout)
    in_update, _ = timed(update, rollouts)
    return dict(zip(FIGURES, (in_rollout, in_update, in_rollout + in_update, peak), strict=True))


def best_of_five(function) -> float:
    """Return the least seconds of five calls."""
    return min(timed(function)[0] for _ in range(5))


def shares_of_the_machine(model, options: Options, figures: dict) -> dict:
    """Return what share of the memory bandwidth decoding reaches, and of the matrix products the update.

    model: unsharded. Attention and recomputation are not counted as work.
    """
    words = torch.ones(COPIED_BYTES // model.dtype.itemsize, dtype=model.dtype, device=model.device)
    there, side = torch.empty_like(words), MATRIX_SIDE[model.device.type]
    bandwidth = 2 * COPIED_BYTES / best_of_five(lambda: there.copy_(words))  # read and written, bytes per second
    square = words[: side * side].view(side, side)
    flops = 2 * side**3 / best_of_five(lambda: square @ square)

    plan = Plan.of(replace(options, gpus=dist.get_world_size() if model.device.type == "cuda" else 0))
    decode_seconds = figures["decode_seconds"] / (options.completion_length - 1)  # per token
    return {
        "decode_tokens_per_second": options.num_generations / decode_seconds,
        "decode_share_of_bandwidth": decode_bytes(plan) / decode_seconds / bandwidth,
        "update_share_of_flops": update_operations(plan, checkpointing=False) / figures["update_seconds"] / flops,
        "machine": {"bandwidth_gb_per_second": bandwidth / 1e9, "tflop_per_second": flops / 1e12},
    }


@dataclass
class Step:
    """A step's phases, and what they work with."""

    models: Models
    optimizer: torch.optim.Optimizer
    prompt: Prompt
    tokens: SpecialTokens
    config: Config

    def rollout(self, length: int | None = None) -> list[Rollout]:
        """Sample completions of this length, by default that of the flags."""
        config = replace(self.config, max_completion_length=length or self.config.max_completion_length)
        return rollout_phase(self.models.sampling.sync(self.models.policy), [self.prompt], self.tokens, config, step=1)

    def update(self, rollouts: list[Rollout]) -> None:
        """Train on the result of `rollout`."""
        scored = with_trial_advantages(rollouts)
        update_phase(self.models, self.optimizer, scored, self.tokens.suppress_tokens, self.config)


def prepare(options: Options, device: torch.device) -> Step:
    """Build the model and its optimizer; collective."""
    config = Config(
        num_generations=options.num_generations,
        max_completion_length=options.completion_length,
        temperature=1.0,
        per_device_train_batch_size=1,
        per_device_generation_batch_size=1,
        freeze_vision_tower=options.freeze_vision_tower,
        lora_enable=options.lora_enable,
        lora_rank=options.lora_rank,
        beta=options.beta,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    torch.manual_seed(0)
    with device:
        loaded = random_model(*SIZES[options.size], IDS) if dist.get_rank() == 0 else None
    models = build_models(loaded, config, device)
    optimizer, _ = make_optimizer(models.policy, config, total_steps=1)
    init_optimizer_state(optimizer)  # else the peak memory of the first step would lack it
    # No token ends a completion.
    tokens = SpecialTokens(torch.tensor([-1], device=device), torch.tensor(VISION_TOKENS, device=device))
    return Step(models, optimizer, random_prompt(options), tokens, config)


def run(options: Options, device: torch.device) -> dict:
    """Measure, ours and the baseline in turn; return all figures of this rank."""
    step, G, C = prepare(options, device), options.num_generations, options.completion_length
    policy, sampling_model = step.models.policy, step.models.sampling.model
    prompt, advantages = step.prompt, torch.linspace(-1, 1, G, device=device)
    suppressed = step.tokens.suppress_tokens
    baseline = (
        lambda: repeated_rollout(sampling_model, prompt.to(device), G, C, suppressed),
        lambda ids: repeated_update(policy, step.optimizer, prompt.to(device), ids, advantages, suppressed),
    )
    ours, theirs = [], []
    for _ in range(options.runs):  # in turn, so that a machine that becomes slower slows both down
        ours.append(measure(step.rollout, step.update))
        if options.baseline:
            DECODERS.clear()  # free our cache
            step.models.sampling.sync(policy)  # not part of the baseline's time
            for module in (policy, sampling_model):
                use_hugging_faces_layers(module)
            theirs.append(measure(*baseline))
            for module in (policy, sampling_model):
                use_our_layers(module)

    ours, theirs = (
        {name: median(run[name] for run in runs) for name in FIGURES} if runs else None for runs in (ours, theirs)
    )
    prefill_seconds = best_of_five(lambda: step.rollout(1))
    decode_seconds = ours["rollout_seconds"] - prefill_seconds
    figures = ours | {"prefill_seconds": prefill_seconds, "decode_seconds": decode_seconds, "baseline": theirs}
    return figures | shares_of_the_machine(sampling_model, options, figures)


def run_what_fits(options: Options, device: torch.device) -> dict:
    """Measure; if the baseline runs out of memory, measure without it; raise InputError if ours does."""
    try:
        return run(options, device) | {"baseline_out_of_memory": False}
    except torch.OutOfMemoryError as error:
        line = "out of memory: lower a figure, or add --gradient_checkpointing true"
        line += " or --baseline False" if options.baseline else ""
        if dist.get_world_size() > 1:  # this rank cannot tell the others
            abort_rank(f"{PROG}: error: rank {dist.get_rank()}: {line}")
        if not options.baseline:
            raise InputError(line) from error
    # An interrupted pass leaves the model in an undefined state: start again, without the baseline.
    DECODERS.clear()
    gc.collect()
    return run_what_fits(replace(options, baseline=False), device) | {"baseline_out_of_memory": True}


def table(figures: dict) -> str:
    """Return a table of the figures, ours beside the baseline's."""
    lines = [f"{'':24} {'ours':>10} {'baseline':>14} {'ratio':>8}"]
    theirs, machine = figures["baseline"], figures["machine"]
    missing = "out of memory" if figures["baseline_out_of_memory"] else "-"
    for name in ROWS:
        other = f"{missing if name in FIGURES else '-':>14}"
        if theirs and name in theirs:
            other = f"{theirs[name]:14.3f} {theirs[name] / figures[name]:7.1f}x"
        lines.append(f"{name.replace('_', ' '):24} {figures[name]:10.3f} {other}")
    return "\n".join(lines) + (
        f"\ndecoding: {figures['decode_tokens_per_second']:,.0f} tokens per second, "
        f"{figures['decode_share_of_bandwidth']:.0%} of the memory bandwidth measured here "
        f"({machine['bandwidth_gb_per_second']:,.0f} GB/s)"
        f"\nupdate: {figures['update_share_of_flops']:.0%} of the matrix products measured here "
        f"({machine['tflop_per_second']:,.2f} TFLOP/s)"
    )


def check_flags(options: Options) -> None:
    """Raise InputError for a flag that is given but has no effect."""
    given = [field.name for field in fields(options) if getattr(options, field.name) != default_of(field)]
    useless, why = ("gpus", "bandwidth_gb_per_second", "tflop_per_second"), "is for --on_paper: add it"
    if options.on_paper:  # where both are shown, with checkpointing and without
        useless = ("runs", "baseline", "gradient_checkpointing")
        why = "is for what is measured: leave out this or --on_paper"
    if found := [name for name in given if name in useless]:
        raise InputError(f"--{found[0]}: {why}")
    if "lora_rank" in given and not options.lora_enable:
        raise InputError("--lora_rank: is about adapters: add --lora_enable, or leave it out")


def benchmark(argv: list[str]) -> None:
    """Measure; print a table and write the JSON file on rank 0. Raises InputError."""
    options = parse_flags(Options, argv, PROG)
    if options.json and not os.access(Path(options.json).absolute().parent, os.W_OK):
        raise InputError(f"--json {options.json!r} cannot be written: name a file in a folder that is yours")
    check_flags(options)
    if options.on_paper:
        figures = {"options": asdict(options), **on_paper(options)}
        print(paper_table(options, figures))
        if options.json:
            Path(options.json).write_text(json.dumps(figures, indent=2))
        return
    device = start_processes()
    figures = {
        "options": asdict(options),
        "ranks": dist.get_world_size(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "precision": str(compute_dtype(device)),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **run_what_fits(options, device),
    }
    if dist.get_rank() == 0:
        print(table(figures))
        if options.json:
            Path(options.json).write_text(json.dumps(figures, indent=2))


def main(argv: list[str]) -> int:
    """Run; return 2, after one line, for what the user can fix."""
    return exit_code(lambda: benchmark(argv), PROG)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
