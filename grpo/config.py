"""Every flag of `train.py`, each with its meaning; nothing else decides how a run goes."""

import argparse
import copy
import dataclasses
import difflib
import math
import os
from dataclasses import dataclass
from typing import Literal

from transformers import HfArgumentParser

from data.augment import Augmentation
from data.fetch import DEFAULT_CACHE
from data.frame_cache import FrameCache
from data.loader import PromptOptions
from data.media import ImageOptions, MediaOptions
from data.sample import InputError, read_system_prompt
from data.video import VideoOptions
from grpo.loss import ImportanceSamplingLevel, LossType, ScaleRewards

DemoTask = Literal["easy", "hard"]
VideoCap = Literal["first", "even", "random"]
OnLongPrompt = Literal["error", "skip", "fewer_videos"]
BestModelMetric = Literal[
    "eval/mae", "eval/median_error", "eval/rmse", "eval/bias", "eval/r2", "eval/pearson", "eval/ccc", "eval/within_5",
    "eval/reward", "eval/parse_rate",
]  # fmt: skip


def flag(default, help: str, heading: str | None = None, demo=None, alias: str | None = None):
    """Describe a flag; a heading starts a section of --help, demo is the default with --demo, alias a second name."""
    metadata = {"help": help, "heading": heading, "demo": demo, "aliases": [alias] if alias else []}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def default_of(field: dataclasses.Field):
    """Return a flag's default; a list is a new one each time."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@dataclass
class Config:
    """The flags. Names and defaults are those of TRL and of the original system where they have one."""

    model_id: str = flag("", "Qwen2.5-VL: a local folder or a hub name", heading="model and data")
    data_path: list[str] = flag([], "JSON or JSONL files of samples (data/README.md)")
    data_weights: list[float] = flag([], "how often an epoch sees the samples of each file (once); 0.5: half of them")
    image_folder: str = flag("", "folder of the videos whose path in the JSON does not exist as it is")
    output_dir: str = flag("", "new folder for curves, flags, checkpoints and the trained model", demo="output/demo")
    demo: bool = flag(False, "make synthetic beating hearts and a small model, train on them, show before and after")
    demo_task: DemoTask = flag("easy", "the demo's hearts: a few clear clips, or up to 30 of differing quality")

    max_videos: int = flag(
        5, "videos kept per sample, a memory setting; 0: all of them", heading="videos and images", demo=0
    )
    video_cap: VideoCap = flag(
        "first", "which of more than --max_videos: the first, evenly spread ones, or others at random in each epoch"
    )
    max_images: int = flag(0, "images kept per sample; 0: all of them")
    fps: float | None = flag(None, "frames per second read from a video (2 if --nframes is not given either)")
    nframes: int | None = flag(None, "frames read from every video (rounded to even), instead of --fps", demo=8)
    video_resized_width: int | None = flag(None, "width of the frames in pixels, rounded to a multiple of 28", demo=56)
    video_resized_height: int | None = flag(
        None, "height of the frames in pixels, rounded to a multiple of 28", demo=56
    )
    video_min_pixels: int = flag(128 * 28 * 28, "least pixels per frame, where width and height are not given")
    video_max_pixels: int = flag(768 * 28 * 28, "most pixels per frame, where width and height are not given")
    image_min_pixels: int = flag(4 * 28 * 28, "least pixels per image")
    image_max_pixels: int = flag(16384 * 28 * 28, "most pixels per image")
    frame_jitter: bool = flag(False, "move the frames read from a video by up to half a step, anew in each epoch")
    max_prompt_length: int = flag(0, "tokens of a prompt, its videos and images included; 0: any")
    on_long_prompt: OnLongPrompt = flag(
        "error", "a longer prompt: stop, leave its sample out, or leave out the last of its videos"
    )
    media_cache: str = flag("", "folder for files at http(s) addresses, which are fetched once (default: in ~/.cache)")
    on_bad_video: Literal["error", "skip"] = flag(
        "error", "a video or image that cannot be read: stop, or leave its sample out", alias="--on_bad_media"
    )
    frame_cache: str = flag("", "folder for decoded frames, which later epochs and runs then need not decode")
    frame_cache_gb: float = flag(100.0, "size of that folder; frames that were not used for longest are removed")
    dataloader_num_workers: int | None = flag(
        None, "processes per rank that decode videos ahead (by the cores there are, at most 8); 0: decode in the loop"
    )

    num_generations: int = flag(8, "completions sampled per prompt (G)", heading="group sampling", demo=16)
    max_completion_length: int = flag(512, "tokens after which a completion is cut", demo=16)
    temperature: float = flag(0.7, "sampling temperature, also that of the trained log-probabilities", demo=1.0)
    top_p: float = flag(1.0, "sample only from the most probable tokens that make up this probability; 1: from all")
    top_k: int = flag(0, "sample only from this many most probable tokens; 0: from all")

    reward_funcs: list[str] = flag(
        ["numerical_video_reward"],
        "reward functions: names in reward/, or file.py:function",
        heading="rewards (reward/README.md)",
        demo=["smooth_numerical_reward"],
    )
    reward_weights: list[float] = flag([], "weight of each reward function (1 each); 0: only a curve")
    reward_kwargs: str = flag("", "JSON object of arguments for the functions that take them: '{\"error_scale\": 8}'")
    reward_timeout: float = flag(600.0, "seconds that a reward function may take for a step's completions")
    system_prompt: str = flag("", "text, or a file with it, before conversations without a system turn of their own")

    loss_type: LossType = flag(
        "dapo", "weight of a token: equal for all, per completion, or by the length limit", heading="objective"
    )
    scale_rewards: ScaleRewards = flag("group", "what advantages are divided by: the group's or batch's std, or none")
    importance_sampling_level: ImportanceSamplingLevel = flag("token", "a ratio per token, or per completion (GSPO)")
    beta: float = flag(0.0, "weight of the KL divergence from the initial policy; 0: no reference model", demo=0.04)
    mask_truncated_completions: bool = flag(False, "do not train on completions that were cut at the length limit")
    epsilon: float = flag(0.05, "lower clipping: below 1 - epsilon, tokens with a negative advantage have no gradient")
    epsilon_high: float = flag(0.1, "upper clipping: the same above 1 + epsilon_high, for a positive advantage")
    num_iterations: int = flag(1, "updates per batch of rollouts")

    lora_enable: bool = flag(
        False, "train adapters (LoRA) on the language model, whose own weights stay frozen", heading="what is trained"
    )
    lora_rank: int = flag(64, "rank of the adapters")
    lora_alpha: int = flag(16, "the adapters' product is scaled by lora_alpha / lora_rank")
    lora_dropout: float = flag(0.05, "dropout in front of the adapters, in the update only")
    vision_lora: bool = flag(False, "adapters on the vision tower too, with --freeze_vision_tower")
    lora_namespan_exclude: str = flag("", "no adapters on layers whose name contains one of: \"['o_proj', 'mlp']\"")
    freeze_vision_tower: bool = flag(False, "do not train the vision tower (the merger is a component of its own)")
    freeze_llm: bool = flag(False, "do not train the language model; implied by --lora_enable")
    freeze_merger: bool = flag(False, "do not train the merger, between vision tower and language model")

    global_batch_size: int | None = flag(
        None,
        "prompts per step on all ranks (1 per rank if no size is given)",
        heading="batches (sizes count prompts; any may be left out)",
        demo=8,
    )
    per_device_train_batch_size: int | None = flag(None, "prompts of a rank that pass through the model together")
    gradient_accumulation_steps: int | None = flag(
        None, "forward and backward passes of a rank per step: global / (per device x ranks)"
    )
    num_train_epochs: float = flag(1.0, "epochs")
    max_steps: int = flag(0, "steps, in place of --num_train_epochs; 0: whole epochs", demo=200)

    learning_rate: float = flag(
        1e-6, "peak learning rate of AdamW, reached after warm-up, then a cosine to 0", heading="optimizer", demo=2e-4
    )
    vision_lr: float | None = flag(
        None, "learning rate of the vision tower and its adapters (--learning_rate if not given)"
    )
    merger_lr: float | None = flag(None, "learning rate of the merger (--learning_rate if not given)")
    weight_decay: float = flag(0.0, "weight decay of the weight matrices")
    warmup_ratio: float = flag(0.03, "share of the steps in which the learning rate rises")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm")
    gradient_checkpointing: bool | None = flag(None, "recompute activations to save memory (on a GPU: on)")

    eval_data_path: list[str] = flag([], "JSON or JSONL files of held-out samples", heading="evaluation")
    eval_steps: int = flag(0, "steps between evaluations; there is always one at the end", demo=50)
    eval_on_start: bool = flag(False, "evaluate before the first step, too", demo=True)
    per_device_eval_batch_size: int = flag(8, "held-out prompts of a rank that are answered together", demo=16)
    metric_for_best_model: BestModelMetric = flag(
        "eval/mae", "the figure by which best/ is chosen, errors by their least"
    )
    valid_range: list[float] = flag([0.0, 100.0], "lowest and highest possible answer; others count as no number")
    cuts: list[float] = flag([35.0, 40.0, 50.0], "values below which an answer means disease: AUC and accuracy at each")

    memory_preflight: bool | None = flag(
        None, "first try a step on the longest prompt, for its memory (on a GPU: on)", heading="the run"
    )
    logging_steps: int = flag(1, "steps between points of the curves")
    log_completions: int = flag(4, "prompts of a step whose best, middle and worst completion TensorBoard shows")
    save_steps: int = flag(0, "steps between checkpoints; 0: only where a signal stops the run")
    save_total_limit: int = flag(0, "checkpoints kept, the newest; 0: all of them")
    resume_from_checkpoint: str = flag("none", "resume from this folder checkpoint-N; auto: the newest in --output_dir")
    max_bad_steps: int = flag(10, "stop after this many steps in a row without a finite loss and gradient")
    seed: int = flag(0, "seed of the data order and of the sampling")


DEMO_DEFAULTS = {
    field.name: field.metadata["demo"] for field in dataclasses.fields(Config) if field.metadata["demo"] is not None
}


def parse_config(argv: list[str]) -> Config:
    """Read the flags; raise InputError for unknown flags and impossible values."""
    config = parse_flags(Config, argv, "python train.py")
    if config.demo:  # other defaults, which flags beside it override
        config = parse_flags(Config, argv, "python train.py", DEMO_DEFAULTS)
    _check(config)
    return resolve_workers(config)


class _HelpFormatter(argparse.HelpFormatter):
    """Show each flag in one spelling: HfArgumentParser also takes hyphens in place of underscores."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        values = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
        return action.option_strings[-1 if "-h" in action.option_strings else 0] + values


def as_typed(value):
    """Return a value as it is typed on the command line, where a list has no brackets."""
    if not isinstance(value, list):
        return value
    return " ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)


def parse_flags(cls: type, argv: list[str], prog: str, defaults: dict | None = None):
    """Read a dataclass of `flag`s from the command line; raise InputError for what it does not understand."""
    sections = {}
    for field in dataclasses.fields(cls):
        heading = field.metadata["heading"] or list(sections)[-1]
        default = default_of(field)
        shown, demo = as_typed(default), field.metadata["demo"]
        known = [f"default: {shown}"] if shown not in (None, "") and shown is not False else []
        known += [f"with --demo: {as_typed(demo)}"] if demo is not None else []
        text = field.metadata["help"] + (f" ({'; '.join(known)})" if known else "")
        described = copy.copy(field)
        described.metadata = {"help": text.replace("%", "%%"), "aliases": field.metadata["aliases"]}
        sections.setdefault(heading, []).append((field.name, field.type, described))
    groups = [
        dataclasses.make_dataclass("Section", fields, namespace={"_argument_group_name": heading})
        for heading, fields in sections.items()
    ]

    def fail(message: str):
        raise InputError(f"{message}: {prog} --help explains the flags")

    parser = HfArgumentParser(
        groups, prog=prog, usage=f"{prog} [flags]", formatter_class=_HelpFormatter, allow_abbrev=False
    )
    parser.error = fail
    parser.set_defaults(**(defaults or {}))
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        names = [f"--{field.name}" for field in dataclasses.fields(cls)]
        nearest = difflib.get_close_matches(unknown[0].split("=")[0], names, 1)
        fail(f"unknown flag {unknown[0]!r}" + (f" (did you mean {nearest[0]}?)" if nearest else ""))
    return cls(**{name: value for section in parsed for name, value in vars(section).items()})


def _check(config: Config) -> None:
    c = config
    if c.frame_jitter and c.frame_cache:
        raise InputError("--frame_jitter reads other frames in each epoch: leave out --frame_cache, or it")
    if c.video_cap != "first" and not c.max_videos:
        raise InputError(f"--video_cap {c.video_cap} has no effect with --max_videos 0, which keeps all: give a number")
    if c.on_long_prompt != "error" and not c.max_prompt_length:
        raise InputError(
            f"--on_long_prompt {c.on_long_prompt} has no effect: say with --max_prompt_length what is long"
        )
    if c.demo:
        for name in ("model_id", "data_path", "data_weights", "image_folder", "eval_data_path"):
            if getattr(c, name):
                raise InputError(f"--demo makes its own model and data: leave out --{name}, or --demo")
    else:
        if c.demo_task != "easy":
            raise InputError("--demo_task is about the demo: add --demo, or leave it out")
        for name in ("model_id", "data_path", "output_dir"):
            if getattr(c, name) in ("", [], [""]):
                raise InputError(f"--{name} is missing (or try: python train.py --demo)")
        if c.data_weights and len(c.data_weights) != len(c.data_path):
            raise InputError(
                f"--data_weights: {len(c.data_weights)} weights for {len(c.data_path)} files: give each one, or none"
            )
        if not all(0 < weight <= 1000 for weight in c.data_weights):  # nan, too
            raise InputError(f"--data_weights {as_typed(c.data_weights)}: give numbers above 0, and at most 1000")
    if c.num_generations < 2:
        raise InputError(
            f"--num_generations {c.num_generations}: a group needs at least 2 completions, since advantages are "
            "differences within the group"
        )
    check_bounds(c)
    if not c.eval_data_path and not c.demo:
        for name in ("eval_steps", "eval_on_start", "metric_for_best_model"):
            if getattr(c, name) != getattr(Config, name):
                raise InputError(f"--{name} is about held-out samples: name them with --eval_data_path")
    if c.temperature < 0.01:
        raise InputError(f"--temperature {c.temperature}: must be 0.01 or more, so that completions of a group differ")
    if not 0 < c.top_p <= 1:
        raise InputError(f"--top_p {c.top_p}: must be above 0, and at most 1")
    if not c.resume_from_checkpoint:
        raise InputError("--resume_from_checkpoint '': name a folder checkpoint-N, or auto, or none")
    for name in ("epsilon", "warmup_ratio"):
        if not 0 <= getattr(c, name) <= 1:
            raise InputError(f"--{name} {getattr(c, name)}: must lie between 0 and 1")
    _check_what_is_trained(c)


POSITIVE = """
    max_completion_length epsilon_high num_iterations global_batch_size learning_rate per_device_train_batch_size
    gradient_accumulation_steps num_train_epochs max_grad_norm logging_steps lora_rank lora_alpha vision_lr merger_lr
    max_bad_steps per_device_eval_batch_size num_samples frame_cache_gb
""".split()
NOT_NEGATIVE = """
    max_videos max_images max_prompt_length dataloader_num_workers max_steps weight_decay log_completions save_steps
    seed beta top_k save_total_limit eval_steps temperature
""".split()


def check_bounds(config) -> None:
    """Raise InputError for values out of bounds, and contradictions about videos, in any dataclass of such flags."""
    try:
        media_options(config)
    except ValueError as error:
        raise InputError(str(error)) from error
    config.system_prompt = read_system_prompt(config.system_prompt)  # so that it is kept, wherever the file goes
    values = vars(config)
    for name in POSITIVE:
        if values.get(name) is not None and not 0 < values[name] <= 1e9:
            raise InputError(f"--{name} {values[name]}: must be above 0, and at most 1e9")
    for name in NOT_NEGATIVE:
        if not 0 <= (values.get(name) or 0) <= 1e9:
            raise InputError(f"--{name} {values[name]}: must lie between 0 and 1e9")
    if not 0 < config.reward_timeout <= 1500:  # the other ranks wait meanwhile: see `start_processes`
        raise InputError(f"--reward_timeout {config.reward_timeout}: must be above 0, and at most 1500 seconds")
    lowest, *others = config.valid_range
    if len(others) != 1 or not -math.inf < lowest < others[0] < math.inf:
        given = " ".join(f"{value:g}" for value in config.valid_range)
        raise InputError(f"--valid_range {given}: give the lowest and the highest possible answer, as in 0 100")
    if not all(map(math.isfinite, config.cuts)) or len(set(config.cuts)) < len(config.cuts):
        raise InputError(f"--cuts {' '.join(f'{cut:g}' for cut in config.cuts)}: give different numbers")


def _check_what_is_trained(config: Config) -> None:
    c = config
    if not 0 <= c.lora_dropout < 1:
        raise InputError(f"--lora_dropout {c.lora_dropout}: must be 0 or more, and below 1")
    for name in ("vision_lora", "lora_namespan_exclude", "lora_rank", "lora_alpha", "lora_dropout"):
        if getattr(c, name) != getattr(Config, name) and not c.lora_enable:
            raise InputError(f"--{name} is about adapters: add --lora_enable, or leave it out")
    if c.vision_lora and not c.freeze_vision_tower:
        raise InputError(
            "--vision_lora puts adapters on a vision tower that is itself trained: add --freeze_vision_tower"
        )
    if c.freeze_vision_tower and c.freeze_merger and c.freeze_llm and not c.lora_enable:
        raise InputError(
            "--freeze_vision_tower --freeze_llm --freeze_merger leave nothing to train: leave one of them out, or add "
            "--lora_enable"
        )
    if c.vision_lr is not None and c.freeze_vision_tower and not c.vision_lora:
        raise InputError("--vision_lr has no effect with --freeze_vision_tower: leave out one of them")
    if c.merger_lr is not None and c.freeze_merger:
        raise InputError("--merger_lr has no effect with --freeze_merger: leave out one of them")


def media_options(config: Config) -> MediaOptions:
    """Return the flags about frames, images and their size; raise ValueError for a contradiction."""
    video = VideoOptions(
        fps=config.fps,
        nframes=config.nframes,
        resized_width=config.video_resized_width,
        resized_height=config.video_resized_height,
        min_pixels=config.video_min_pixels,
        max_pixels=config.video_max_pixels,
    )
    image = ImageOptions(config.image_min_pixels, config.image_max_pixels)
    frames = FrameCache(config.frame_cache, int(config.frame_cache_gb * 1e9)) if config.frame_cache else None
    threads = max(1, cores_per_rank() // max(1, config.dataloader_num_workers or 0))
    return MediaOptions(video, image, config.media_cache or DEFAULT_CACHE, frames, threads)


def cores_per_rank() -> int:
    """Return the cores of this machine that a rank may use, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def resolve_workers(config):
    """Fill in --dataloader_num_workers if it was not given: a core for each, and one for the rank itself."""
    if config.dataloader_num_workers is not None:
        return config
    return dataclasses.replace(config, dataloader_num_workers=min(8, max(1, cores_per_rank() - 1)))


def prompt_options(config, is_training: bool = False) -> PromptOptions:
    """Return the flags about how samples become prompts; what differs between epochs does so in training only."""
    augmentation = None
    if is_training and (config.frame_jitter or config.video_cap == "random"):
        max_videos = config.max_videos if config.video_cap == "random" else 0
        augmentation = Augmentation(config.seed, max_videos, config.frame_jitter)
    long = config.max_prompt_length, config.on_long_prompt
    return PromptOptions(media_options(config), config.on_bad_video, *long, augmentation)


def count_steps(config: Config, num_samples: int) -> int:
    """Return the steps of the whole run: --max_steps, or as many as the epochs take."""
    steps_per_epoch = math.ceil(num_samples / config.global_batch_size)
    return config.max_steps or math.ceil(config.num_train_epochs * steps_per_epoch)


def resolve_batch_sizes(config: Config, world_size: int) -> Config:
    """Fill in the batch sizes that were left out: global = per device x ranks x accumulation.

    Raise InputError that says the arithmetic when the given ones contradict each other.
    """
    total, device, accumulation = (
        config.global_batch_size,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
    )
    given = {"--per_device_train_batch_size": device, "--gradient_accumulation_steps": accumulation}
    ranks = f"{world_size} rank" + ("s" if world_size > 1 else "")
    factors = [ranks, *(f"{name} {value}" for name, value in given.items() if value is not None)]
    product = world_size * (device or 1) * (accumulation or 1)
    if total is None:
        total = product
    elif total % product or (device is not None and accumulation is not None and total != product):
        relation = "a multiple of" if device is None or accumulation is None else "equal to"
        arithmetic = f"{product} = {' x '.join(factors)}" if len(factors) > 1 else factors[0]
        raise InputError(f"--global_batch_size {total} is not {relation} {arithmetic}: change it, or leave it out")
    if device is None:
        accumulation = accumulation or 1
        device = total // (world_size * accumulation)
    return dataclasses.replace(
        config,
        global_batch_size=total,
        per_device_train_batch_size=device,
        gradient_accumulation_steps=accumulation or total // (world_size * device),
    )
