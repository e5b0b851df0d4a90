"""`python train.py --demo`: everything a run needs, made on the spot, and what the run achieved.

Draws beating hearts (`synthetic_echo.py`), and builds a small Qwen2.5-VL of the real class and its own tokenizer. Two
ordinary runs follow: supervised training on careless answers, after which the model answers in the right form, and
badly; and GRPO, so that everything it gains from there is learned from rewards only.
"""

import dataclasses
import json
import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen2_5_VLForConditionalGeneration

from data.flags import TrainingMediaFlags, default_of
from data.sample import InputError
from grpo.config import DEMO_DEFAULTS, Config, DemoTask
from grpo.demo.synthetic_echo import ANSWER, QUESTION, write_samples
from grpo.demo.tiny_tokenizer import build_tokenizer
from grpo.evaluate.report import number
from grpo.model.layers import use_our_layers
from grpo.model.random_model import TextSize, VisionSize, random_model
from grpo.ranks import broadcast_object, print_rank0, raise_together
from grpo.run.batches import resolve_batch_sizes
from grpo.run.lock import FolderInUse
from grpo.run.start import load_training_scorer, take_folders

# True answers are few, careless ones many, as where experts read few cases; `reward/RESULTS.md` has other numbers, too.
NUM_CARELESS, NUM_TRAIN, NUM_HELDOUT = 640, 80, 192
WARM_START_STEPS = 800
SUPERVISED = {"supervised": True, "global_batch_size": 8, "learning_rate": 1e-3, "warmup_ratio": 0.025}
SUPERVISED |= {"weight_decay": 0.01}
# Of the model, which then has 0.7 million parameters: its decoder layers, and the blocks of its vision tower.
HIDDEN_SIZE, LAYERS, BLOCKS = 128, 3, 1
INIT_RANGE = 0.06  # standard deviation of the initial weights; with 0.02, learning starts late in such small layers
# Words of the chat format, so that the tokenizer learns each as one token.
CHAT_WORDS = "system\nYou are a helpful assistant.\nuser\nassistant\n" * 2


def build_model(tokenizer, seed: int, hidden_size: int, layers: int, blocks: int) -> Qwen2_5_VLForConditionalGeneration:
    """Make a small Qwen2.5-VL of the real class with random weights."""
    words = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "eos_token_id": "<|im_end|>"}
    words |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    words |= {"bos_token_id": "<|endoftext|>", "pad_token_id": "<|endoftext|>"}
    ids = {name: tokenizer.convert_tokens_to_ids(word) for name, word in words.items()}
    heads = hidden_size // 32
    text = TextSize(hidden_size, layers, heads, heads // 2, 2 * hidden_size, len(tokenizer), True, [4, 6, 6])
    vision = VisionSize(hidden_size // 2, blocks, heads // 2, hidden_size, [blocks - 1])
    torch.manual_seed(seed)
    return use_our_layers(random_model(text, vision, ids, rope_theta=1e4, initializer_range=INIT_RANGE))


def make_start(folder: Path, task: DemoTask, seed: int) -> None:
    """Draw all hearts into `folder`/data, and save a new model as `untrained`."""
    write_samples(folder / "data", "careless", NUM_CARELESS, seed, task, is_careless=True)
    write_samples(folder / "data", "train", NUM_TRAIN, seed, task)
    write_samples(folder / "data", "heldout", NUM_HELDOUT, seed, task)
    tokenizer = build_tokenizer([QUESTION, ANSWER.format(0), CHAT_WORDS])
    build_model(tokenizer, seed, HIDDEN_SIZE, LAYERS, BLOCKS).save_pretrained(folder / "untrained")
    tokenizer.save_pretrained(folder / "untrained")


def flags_of_warm_start(config: Config) -> Config:
    """Return the flags of the warm start in the folder of a demo: supervised training on the careless answers."""
    output = Path(config.output_dir)
    media = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainingMediaFlags)}
    return Config(
        **media,
        model_id=str(output / "untrained"),
        data_path=[str(output / "data" / "careless.json")],
        image_folder=str(output / "data" / "videos"),
        output_dir=str(output / "warm_start"),
        resume_from_checkpoint="auto",
        seed=config.seed,
        max_completion_length=config.max_completion_length,
        max_steps=WARM_START_STEPS,
        logging_steps=10,
        **SUPERVISED,
    )


def flags_of_grpo(config: Config) -> Config:
    """Return the flags of the demo's own run: GRPO on the true answers, from the warm start."""
    output = Path(config.output_dir)
    return dataclasses.replace(
        config,
        demo=False,
        demo_task=Config.demo_task,
        model_id=str(output / "warm_start" / "final"),
        data_path=[str(output / "data" / "train.json")],
        eval_data_path=[str(output / "data" / "heldout.json")],
        image_folder=str(output / "data" / "videos"),
    )


def prepare(config: Config, train: Callable[[Config], bool]) -> Config | None:
    """Make data and a warm-started model in `output_dir`; return the ordinary flags that train on them. Collective.

    train: runs training, and returns False if a signal stopped it; then None is returned. With
    --resume_from_checkpoint auto a warm start or run that has begun is continued.
    """
    raise_together(load_training_scorer, config, [])  # mistakes are known before anything is made
    raise_together(resolve_batch_sizes, config, dist.get_world_size())
    config = broadcast_object(raise_together(choose_folder, config))
    output = Path(config.output_dir)
    if not config.frame_jitter:  # which reads other frames each time
        config.frame_cache = config.frame_cache or str(output / "data" / "frames")
    if not broadcast_object(has_begun(output)):
        num_hearts = NUM_CARELESS + NUM_TRAIN + NUM_HELDOUT
        print_rank0(f"Drawing {num_hearts} hearts for a small Qwen2.5-VL, in {output}")
        if dist.get_rank() == 0:
            make_start(output, config.demo_task, config.seed)
        dist.barrier()
    if not broadcast_object((output / "config.json").exists()):
        print_rank0("The warm start: supervised training on careless answers")
        warm_start, ranks = flags_of_warm_start(config), dist.get_world_size()
        size = math.ceil(warm_start.global_batch_size / ranks) * ranks  # any number of ranks may have a part
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # its steps are so small that sharing them out takes longer than they do
        if not train(dataclasses.replace(warm_start, global_batch_size=size)):
            return None
        torch.set_num_threads(threads)
    config = flags_of_grpo(config)
    again = shlex.join(["python", *command_of(dataclasses.replace(config, output_dir="output/again"))])
    print_rank0("GRPO from its answers; the same run by hand:", f"  {again}", "Its curves:")
    print_rank0(f"  tensorboard --logdir {output}")
    return config


def choose_folder(config: Config) -> Config | None:
    """On rank 0, find the folder of the run, make and lock it; raise InputError if it cannot be used.

    The default is the first of output/demo, output/demo-2, … that no other run has begun in or has locked; with
    --resume_from_checkpoint auto the last one in which a run has begun.
    """
    if dist.get_rank() != 0:
        return None
    folders, wanted, refused = [Path(config.output_dir)], config.resume_from_checkpoint, []
    if config.output_dir == DEMO_DEFAULTS["output_dir"] and wanted in ("none", "auto"):
        folders += [Path(f"{config.output_dir}-{n}") for n in range(2, 1000)]
    begun = [folder for folder in folders if has_begun(folder)]
    candidates = begun[-1:] if wanted != "none" else []
    for folder in candidates or [folder for folder in folders if is_free(folder)]:
        try:
            take_folders(chosen := dataclasses.replace(config, output_dir=str(folder)))
            return chosen
        except FolderInUse as error:  # by a demo that is still preparing
            refused.append(error)
    mend = "name a new folder" + (", or continue with --resume_from_checkpoint auto" if begun else "")
    raise refused[0] if refused else InputError(f"--output_dir {config.output_dir!r} exists: {mend}")


def is_free(output: Path) -> bool:
    """True if a folder is not there, or holds nothing but what is left of a demo whose warm start has not begun."""
    names = {path.name for path in output.glob("*")}
    return names <= {"data", "untrained", "warm_start", ".lock"} and not has_begun(output)


def has_begun(output: Path) -> bool:
    """True if a warm start or run has begun in the folder, so that its data and untrained model are complete."""
    return (output / "config.json").exists() or (output / "warm_start" / "config.json").exists()


def command_of(config: Config) -> list[str]:
    """Return the command of a run, a word each: all flags that differ from their defaults."""
    words = ["train.py"]
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if value != default_of(field):
            words += [f"--{field.name}", *map(str, value if isinstance(value, list) else [value])]
    return words


FIGURES = {"reward": "reward", "mae": "error", "bias": "bias", "pearson": "correlation", "clipped_ratio": "share cut"}


def report(config: Config, began: float) -> None:
    """Print how good the run's answers were at each evaluation, beside the best constant one, and write it down."""
    if dist.get_rank() != 0:
        return
    output = Path(config.output_dir)
    evaluations = json.loads((output / "final" / "progress.json").read_text())["evaluations"]
    rows = {f"step {one['step']}": {name: one.get(f"eval/{name}") for name in FIGURES} for one in evaluations}
    rows["best constant"] = {name: evaluations[-1].get(f"eval/zero_skill_{name}") for name in ("reward", "mae")}
    print(f"\n{NUM_HELDOUT} held-out hearts, greedy answers; errors in points:")
    print(f"{'':14}" + "".join(f"{title:>13}" for title in FIGURES.values()))
    for when, row in rows.items():
        print(f"{when:14}" + "".join(f"{number(row[name]) if name in row else '':>13}" for name in FIGURES))
    seconds, path = round(time.time() - began, 1), output / "demo_report.json"
    path.write_text(json.dumps(rows | {"seconds": seconds}, indent=2) + "\n")
    print(f"{seconds:.0f} seconds in all; written to {path}")
