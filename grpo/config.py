"""Every flag of `train.py`, each with its meaning, and which of them contradict each other.

Nothing else decides how a run goes. Those about samples and media stand in `data/flags.py`, those about rewards in
`reward/flags.py`, where it is also said how a flag is declared.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from data.flags import SampleFlags, TrainingMediaFlags, default_of, parse_flags
from data.loader import resolve_data_flags
from data.sample import InputError
from grpo.loss import ImportanceSamplingLevel, LossType, ScaleRewards
from reward.flags import BELOW_1, NOT_NEGATIVE, POSITIVE, SHARE, UP_TO_1, Bounds, RewardFlags, flag

DemoTask = Literal["easy", "hard"]
BestModelMetric = Literal[
    "eval/mae", "eval/median_error", "eval/rmse", "eval/bias", "eval/r2", "eval/pearson", "eval/ccc", "eval/within_5",
    "eval/reward", "eval/parse_rate",
]  # fmt: skip


@dataclass
class ModelFlags(SampleFlags):
    """What is trained on which samples."""

    data_weights: list[float] = flag(
        [],
        "how often an epoch sees the samples of each file (once); 0.5: half of them",
        Bounds(lambda weights: all(0 < w <= 1000 for w in weights), "give numbers above 0, and at most 1000"),
    )
    output_dir: str = flag("", "new folder for curves, checkpoints, models", demo="output/demo", may_change=True)
    supervised: bool = flag(False, "train on the true answers (supervised fine-tuning) in place of sampled ones")
    demo: bool = flag(False, "make synthetic hearts and a small model, train, show before and after", may_change=True)
    demo_task: DemoTask = flag("easy", "the demo's hearts: a few clear clips, or up to 30 of differing quality")


@dataclass
class Seed:
    """The seed."""

    seed: int = flag(0, "seed of the data order and of the sampling", NOT_NEGATIVE, decides=True)


@dataclass
class SamplingFlags:
    """How a completion is sampled."""

    max_completion_length: int = flag(512, "tokens after which a completion is cut", POSITIVE, demo=12, decides=True)
    temperature: float = flag(
        0.7,
        "sampling temperature, also that of the trained log-probabilities",
        Bounds(lambda x: 0.01 <= x <= 1e9, "must be 0.01 or more, so that completions of a group differ"),
        demo=1.0,
        decides=True,
    )
    top_p: float = flag(1.0, "sample from the most probable tokens that add up to this; 1: all", SHARE, decides=True)
    top_k: int = flag(0, "sample only from this many most probable tokens; 0: from all", NOT_NEGATIVE, decides=True)


@dataclass
class GroupFlags(SamplingFlags):
    """How a group is sampled."""

    heading = "group sampling"
    num_generations: int = flag(
        8,
        "completions sampled per prompt (G)",
        Bounds(lambda n: 2 <= n <= 1e9, "advantages are differences within a group of at least 2 completions"),
        demo=16,
    )


@dataclass
class ObjectiveFlags:
    """The loss."""

    heading = "objective"
    loss_type: LossType = flag("dapo", "weight of a token: equal for all, per completion, or by the length limit")
    scale_rewards: ScaleRewards = flag("group", "what advantages are divided by: the group's or batch's std, or none")
    importance_sampling_level: ImportanceSamplingLevel = flag("token", "a ratio per token, or per completion (GSPO)")
    beta: float = flag(0.0, "weight of the KL divergence from the initial policy; 0: none", NOT_NEGATIVE, demo=0.04)
    mask_truncated_completions: bool = flag(False, "do not train on completions that were cut at the length limit")
    epsilon: float = flag(0.05, "clipping: no gradient below a ratio of 1 - epsilon if the advantage is < 0", UP_TO_1)
    epsilon_high: float = flag(0.1, "the same above 1 + epsilon_high, for a positive advantage", POSITIVE)
    num_iterations: int = flag(1, "updates per batch of rollouts", POSITIVE)


@dataclass
class TrainedFlags:
    """Adapters, and what is frozen."""

    heading = "what is trained"
    lora_enable: bool = flag(False, "train adapters (LoRA) on the language model, whose own weights stay frozen")
    lora_rank: int = flag(64, "rank of the adapters", POSITIVE)
    lora_alpha: int = flag(16, "the adapters' product is scaled by lora_alpha / lora_rank", POSITIVE)
    lora_dropout: float = flag(0.05, "dropout in front of the adapters, in the update only", BELOW_1)
    vision_lora: bool = flag(False, "adapters on the vision tower too, with --freeze_vision_tower")
    lora_namespan_exclude: str = flag("", "no adapters on layers whose name contains one of: \"['o_proj', 'mlp']\"")
    freeze_vision_tower: bool = flag(False, "do not train the vision tower (the merger is a component of its own)")
    freeze_llm: bool = flag(False, "do not train the language model; implied by --lora_enable")
    freeze_merger: bool = flag(False, "do not train the merger, between vision tower and language model")


@dataclass
class BatchFlags:
    """How many prompts make a step, and how its work is split, which does not change results."""

    heading = "batches (sizes count prompts; any may be left out)"
    global_batch_size: int | None = flag(None, "prompts per step on all ranks (else 1 per rank)", POSITIVE, demo=8)
    per_device_train_batch_size: int | None = flag(None, "prompts of a rank in one pass", POSITIVE, may_change=True)
    gradient_accumulation_steps: int | None = flag(None, "passes of a rank per step", POSITIVE, may_change=True)
    per_device_generation_batch_size: int | None = flag(
        None, "prompts of a rank whose completions are sampled together (else all of a step)", POSITIVE, may_change=True
    )
    # With another number of steps the learning rate goes on as in a run of the new length.
    num_train_epochs: float = flag(1.0, "epochs", POSITIVE, may_change=True)
    max_steps: int = flag(0, "steps; 0: as --num_train_epochs says", NOT_NEGATIVE, demo=150, may_change=True)


@dataclass
class OptimizerFlags:
    """The optimizer."""

    heading = "optimizer"
    learning_rate: float = flag(1e-6, "AdamW's peak rate after warm-up; then a cosine to 0", POSITIVE, demo=2e-4)
    vision_lr: float | None = flag(None, "the vision tower's and its adapters' (default: --learning_rate)", POSITIVE)
    merger_lr: float | None = flag(None, "the merger's (default: --learning_rate)", POSITIVE)
    weight_decay: float = flag(0.0, "weight decay of the weight matrices", NOT_NEGATIVE)
    warmup_ratio: float = flag(0.03, "share of the steps in which the learning rate rises", UP_TO_1)
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm", POSITIVE)
    gradient_checkpointing: bool | None = flag(None, "save memory by recomputation (on a GPU: on)", may_change=True)


@dataclass
class HeldOutFlags:
    """How held-out samples are answered, and which figures are made of it."""

    heading = "evaluation"
    per_device_eval_batch_size: int = flag(
        8, "held-out prompts of a rank that are answered together", POSITIVE, demo=32, may_change=True, decides=True
    )
    cuts: list[float] = flag(
        [35.0, 40.0, 50.0],
        "values below which an answer means disease: AUC and accuracy at each",
        Bounds(lambda cuts: all(map(math.isfinite, cuts)) and len(set(cuts)) == len(cuts), "give different numbers"),
        may_change=True,
    )


@dataclass
class EvaluationFlags(HeldOutFlags):
    """When a run is evaluated."""

    eval_data_path: list[str] = flag([], "JSON or JSONL files of held-out samples", may_change=True)
    eval_steps: int = flag(0, "steps between evaluations (also one at the end)", NOT_NEGATIVE, demo=50, may_change=True)
    eval_on_start: bool = flag(False, "evaluate before the first step, too", demo=True, may_change=True)
    metric_for_best_model: BestModelMetric = flag("eval/mae", "best/ is chosen by it; of errors, the least")


@dataclass
class RunFlags(Seed):
    """The run."""

    heading = "the run"
    memory_preflight: bool | None = flag(None, "first try a step on the longest prompt (on a GPU: on)", may_change=True)
    logging_steps: int = flag(1, "steps between points of the curves", POSITIVE, may_change=True)
    log_completions: int = flag(
        4, "prompts of a step whose best, middle and worst completion TensorBoard shows", NOT_NEGATIVE, may_change=True
    )
    save_steps: int = flag(0, "steps between checkpoints; 0: only if a signal stops it", NOT_NEGATIVE, may_change=True)
    save_total_limit: int = flag(0, "checkpoints kept, the newest; 0: all of them", NOT_NEGATIVE, may_change=True)
    resume_from_checkpoint: str = flag(
        "none",
        "resume from this folder checkpoint-N; auto: the newest in --output_dir",
        Bounds(bool, "name a folder checkpoint-N, or auto, or none"),
        may_change=True,
    )
    max_bad_steps: int = flag(10, "stop after so many steps in a row of no finite gradient", POSITIVE, may_change=True)


@dataclass
class Config(
    ModelFlags,
    TrainingMediaFlags,
    GroupFlags,
    RewardFlags,
    ObjectiveFlags,
    TrainedFlags,
    BatchFlags,
    OptimizerFlags,
    EvaluationFlags,
    RunFlags,
):
    """The flags, in the sections of --help. Names and defaults are those of TRL and of the original system."""


DEMO_DEFAULTS = {
    field.name: field.metadata["demo"] for field in dataclasses.fields(Config) if field.metadata["demo"] is not None
}


def parse_config(argv: list[str]) -> Config:
    """Read the flags; raise InputError for unknown flags, impossible values and contradictions."""
    config = parse_flags(Config, argv, "python train.py")
    if config.demo:  # other defaults, which flags beside it override
        config = parse_flags(Config, argv, "python train.py", DEMO_DEFAULTS)
    resolve_data_flags(config)
    if not config.demo:
        for name in ("model_id", "data_path", "output_dir"):
            if getattr(config, name) in ("", [], [""]):
                raise InputError(f"--{name} is missing (or try: python train.py --demo)")
        weights, files = len(config.data_weights), len(config.data_path)
        if weights not in (0, files):
            raise InputError(f"--data_weights: {weights} weights for {files} files: give each one, or none")
    check_contradictions(config)
    return config


def check_contradictions(c: Config) -> None:
    """Raise InputError for a flag that is given although others leave it without effect or cannot go with it."""
    of_sampling = {field.name for section in (GroupFlags, ObjectiveFlags) for field in dataclasses.fields(section)}
    of_sampling -= {"max_completion_length"}  # which evaluations use
    of_sampling |= {"per_device_generation_batch_size"}
    of_own_model = ("model_id", "data_path", "data_weights", "image_folder", "eval_data_path", "supervised")
    of_held_out = ("eval_steps", "eval_on_start", "metric_for_best_model")
    of_adapters = ("vision_lora", "lora_namespan_exclude", "lora_rank", "lora_alpha", "lora_dropout")
    has_old_tower = c.freeze_vision_tower and not c.vision_lora
    is_all_frozen = c.freeze_vision_tower and c.freeze_llm and c.freeze_merger and not c.lora_enable
    one = "leave out one of them"
    rules = [  # flags, whether they are wrong, and why, with the mend
        (["frame_cache"], c.frame_jitter, f"is of no use: --frame_jitter reads other frames in each epoch: {one}"),
        (of_own_model, c.demo, f"has no effect: --demo makes and trains a model of its own: {one}"),
        (["demo_task"], not c.demo, "is about the demo: add --demo, or leave it out"),
        (of_held_out, not c.eval_data_path and not c.demo, "is about held-out samples: add --eval_data_path"),
        (of_sampling, c.supervised, f"has no effect with --supervised: {one}"),
        (["reward_weights"], c.supervised, f"weighs rewards of training, which --supervised has not: {one}"),
        (of_adapters, not c.lora_enable, "is about adapters: add --lora_enable, or leave it out"),
        (["vision_lora"], not c.freeze_vision_tower, "is for a frozen vision tower: add --freeze_vision_tower"),
        (["freeze_llm"], is_all_frozen, f"and other --freeze_* leave nothing to train: {one}, or add --lora_enable"),
        (["vision_lr"], has_old_tower, f"has no effect with --freeze_vision_tower: {one}"),
        (["merger_lr"], c.freeze_merger, f"has no effect with --freeze_merger: {one}"),
    ]
    given = [field.name for field in dataclasses.fields(c) if getattr(c, field.name) != default_of(field)]
    for names, is_wrong, why in rules:
        if is_wrong and (useless := [name for name in given if name in names]):
            raise InputError(f"--{useless[0]} {why}")
