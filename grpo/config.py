"""Every flag of `train.py`, each with its meaning; nothing else decides how a run goes.

`check_flags.py` refuses what cannot be, `settings.py` has what follows from them.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from data.loader import OnLongPrompt
from data.video_cap import VideoCap
from grpo.flags import flag
from grpo.loss import ImportanceSamplingLevel, LossType, ScaleRewards

DemoTask = Literal["easy", "hard"]
BestModelMetric = Literal[
    "eval/mae", "eval/median_error", "eval/rmse", "eval/bias", "eval/r2", "eval/pearson", "eval/ccc", "eval/within_5",
    "eval/reward", "eval/parse_rate",
]  # fmt: skip


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
    max_completion_length: int = flag(512, "tokens after which a completion is cut", demo=12)
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
    max_steps: int = flag(0, "steps, in place of --num_train_epochs; 0: whole epochs", demo=150)

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
