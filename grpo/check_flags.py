"""Refuse flags that are out of bounds or contradict each other, in one line."""

import math

from data.sample import InputError, read_system_prompt
from grpo.config import DEMO_DEFAULTS, Config
from grpo.flags import as_typed, parse_flags
from grpo.settings import media_options, resolve_workers


def parse_config(argv: list[str]) -> Config:
    """Read the flags; raise InputError for unknown flags and impossible values."""
    config = parse_flags(Config, argv, "python train.py")
    if config.demo:  # other defaults, which flags beside it override
        config = parse_flags(Config, argv, "python train.py", DEMO_DEFAULTS)
    _check(config)
    return resolve_workers(config)


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
    config.system_prompt = read_system_prompt(config.system_prompt)  # so that it is kept, wherever the file goes
    values = vars(config)
    for name in POSITIVE:
        if values.get(name) is not None and not 0 < values[name] <= 1e9:
            raise InputError(f"--{name} {values[name]}: must be above 0, and at most 1e9")
    for name in NOT_NEGATIVE:
        if not 0 <= (values.get(name) or 0) <= 1e9:
            raise InputError(f"--{name} {values[name]}: must lie between 0 and 1e9")
    try:
        media_options(config)
    except ValueError as error:
        raise InputError(str(error)) from error
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
