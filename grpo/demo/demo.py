"""`python train.py --demo`: everything a run needs, made on the spot, and what the run achieved.

Draws beating hearts (`synthetic_echo.py`), builds a Qwen2.5-VL of the real class with a million parameters and its own
tokenizer, and gives it a short supervised warm start on biased labels (too high): it then answers in the right form,
and badly. Then the ordinary loop runs on these folders, so that everything it gains is learned from rewards only.
"""

import dataclasses
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration, get_cosine_schedule_with_warmup

from data.dataset import InputError, load_samples
from data.loader import Prompt, load_prompt
from data.video import VideoOptions
from grpo.config import DEMO_DEFAULTS, Config, default_of
from grpo.demo.synthetic_echo import ANSWER, NUM_FRAMES, QUESTION, SIZE, write_samples
from grpo.demo.tiny_tokenizer import build_tokenizer
from grpo.model.layers import use_our_layers
from grpo.model.random_model import TOKENS_PER_SECOND, TextSize, VisionSize, random_model
from grpo.ranks import broadcast_object, raise_together
from grpo.run.checkpoint import read_evaluations
from grpo.run.lock import lock_folder
from reward.extract import extract_number

NUM_TRAIN, NUM_HELDOUT = 640, 96
WARM_START_STEPS, WARM_START_BATCH, WARM_START_RATE = 350, 8, 1e-3
LABEL_BIAS, LABEL_NOISE = 12.0, 8.0  # points: how much too high the biased labels are, and their standard deviation
INIT_RANGE = 0.06  # standard deviation of the initial weights; with 0.02, learning starts late in such small layers
# Words of the chat format, so that the tokenizer learns each as one token.
CHAT_WORDS = "system\nYou are a helpful assistant.\nuser\nassistant\n" * 2
VIDEO_OPTIONS = VideoOptions(nframes=NUM_FRAMES, resized_width=SIZE, resized_height=SIZE)


def build_model(tokenizer, seed: int, hidden_size: int = 128, layers: int = 4) -> Qwen2_5_VLForConditionalGeneration:
    """Make a small Qwen2.5-VL of the real class with random weights; about 1 million parameters as it is."""
    words = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "eos_token_id": "<|im_end|>"}
    words |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    words |= {"bos_token_id": "<|endoftext|>", "pad_token_id": "<|endoftext|>"}
    ids = {name: tokenizer.convert_tokens_to_ids(word) for name, word in words.items()}
    heads = hidden_size // 32
    text = TextSize(hidden_size, layers, heads, heads // 2, 2 * hidden_size, len(tokenizer), True, [4, 6, 6])
    vision = VisionSize(hidden_size // 2, 2, heads // 2, hidden_size, [1])
    torch.manual_seed(seed)
    return use_our_layers(random_model(text, vision, ids, rope_theta=1e4, initializer_range=INIT_RANGE))


def supervised_loss(model, prompts: list[Prompt], answer_ids: list[Tensor]) -> Tensor:
    """Mean cross-entropy of the answers; padding is on the right, where causal attention never looks."""
    rows, positions, labels = [], [], []
    for prompt, answer in zip(prompts, answer_ids, strict=True):
        rows.append(torch.cat([prompt.prompt_ids, answer]))
        positions.append(torch.cat([prompt.position_ids, prompt.completion_positions(len(answer))], dim=1).T)
        labels.append(torch.cat([torch.full_like(prompt.prompt_ids, -100), answer]))
    pad = torch.nn.utils.rnn.pad_sequence
    return model(
        input_ids=pad(rows, batch_first=True),
        position_ids=pad(positions, batch_first=True).permute(2, 0, 1),  # (3, N, L)
        pixel_values_videos=torch.cat([prompt.pixel_values_videos for prompt in prompts]),
        video_grid_thw=torch.cat([prompt.video_grid_thw for prompt in prompts]),
        labels=pad(labels, batch_first=True, padding_value=-100),
        use_cache=False,
    ).loss


def write_warm_start(folder: Path, prompts: list[Prompt], tokenizer, seed: int) -> None:
    """Train a new model on biased labels and save it as a model folder."""
    model = build_model(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_START_RATE, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 20, WARM_START_STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(WARM_START_STEPS), desc="warm start", leave=False, disable=None):
        batch = [prompts[i] for i in torch.randperm(len(prompts), generator=generator)[:WARM_START_BATCH]]
        answers = []
        for prompt in batch:
            bias = LABEL_BIAS + LABEL_NOISE * torch.randn((), generator=generator).item()
            label = round(min(max(extract_number(prompt.sample.answer) + bias, 5), 95))
            answers.append(torch.tensor(tokenizer.encode(ANSWER.format(label)) + [tokenizer.eos_token_id]))
        optimizer.zero_grad()
        supervised_loss(model, batch, answers).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_prompts(json_path: Path, tokenizer) -> list[Prompt]:
    """Decode all samples of a JSON of synthetic hearts."""
    samples = load_samples(str(json_path), str(json_path.parent / "videos"))
    return [load_prompt(sample, tokenizer, TOKENS_PER_SECOND, VIDEO_OPTIONS) for sample in samples]


def prepare(config: Config) -> Config:
    """Make data and a warm-started model in `output_dir`; return the ordinary flags that train on them. Collective.

    A folder whose run has begun is only continued; one in which an earlier `prepare` was interrupted is used again.
    """
    config = broadcast_object(raise_together(choose_folder, config))
    output = Path(config.output_dir)
    data, model_folder = output / "data", output / "warm_start"
    if dist.get_rank() == 0 and not has_begun(output):
        print(f"Drawing {NUM_TRAIN + NUM_HELDOUT} hearts, and teaching a small Qwen2.5-VL to answer, in {output}")
        train_json = write_samples(data, "train", NUM_TRAIN, config.seed)
        write_samples(data, "heldout", NUM_HELDOUT, config.seed)
        tokenizer = build_tokenizer([QUESTION, ANSWER.format(0), CHAT_WORDS])
        write_warm_start(model_folder, load_prompts(train_json, tokenizer), tokenizer, config.seed)
    dist.barrier()
    config = dataclasses.replace(
        config,
        demo=False,
        model_id=str(model_folder),
        data_path=str(data / "train.json"),
        eval_data_path=str(data / "heldout.json"),
        image_folder=str(data / "videos"),
    )
    if dist.get_rank() == 0:
        print(f"The same run by hand:\n  {command(config)}\nIts curves:\n  tensorboard --logdir {output}")
    return config


def choose_folder(config: Config) -> Config | None:
    """On rank 0, find the folder of the run, make and lock it; raise InputError if it cannot be used.

    The default is the first of output/demo, output/demo-2, … that no other run has begun in or has locked; with
    --resume_from_checkpoint auto the last one in which a run has begun.
    """
    if dist.get_rank() != 0:
        return None
    folders, wanted = [Path(config.output_dir)], config.resume_from_checkpoint
    if config.output_dir == DEMO_DEFAULTS["output_dir"] and wanted in ("none", "auto"):
        folders += [Path(f"{config.output_dir}-{n}") for n in range(2, 1000)]
    candidates = [folder for folder in folders if not is_in_use(folder)]
    if wanted != "none" and (begun := [folder for folder in folders if has_begun(folder)]):
        candidates = begun[-1:]
    if not candidates:
        fix = "name a new folder"
        if has_begun(folders[0]):
            fix += ", or continue with --resume_from_checkpoint auto"
        raise InputError(f"--output_dir {config.output_dir!r} exists: {fix}")
    for folder in candidates:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock_folder(str(folder))
            break
        except OSError as error:
            raise InputError(
                f"--output_dir {str(folder)!r} cannot be made ({error.strerror}): name another place"
            ) from error
        except InputError:  # locked by a demo that is still preparing
            if folder == candidates[-1]:
                raise
    return dataclasses.replace(config, output_dir=str(folder))


def is_in_use(output: Path) -> bool:
    """True if a folder holds anything but what an interrupted `prepare` leaves."""
    return output.exists() and not {path.name for path in output.glob("*")} <= {"data", "warm_start", ".lock"}


def has_begun(output: Path) -> bool:
    """True if a run has begun in the folder, so that its data and model are complete."""
    return (output / "config.json").exists()


def command(config: Config) -> str:
    """Return a command line with the flags that differ from their defaults."""
    flags = [
        f"--{field.name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != default_of(field) and field.name != "output_dir"
    ]
    return " ".join(["python train.py", *flags, "--output_dir output/again"])


def report(config: Config, began: float) -> None:
    """Print the first and the last evaluation on held-out hearts, and write `demo_report.json`. Collective."""
    if dist.get_rank() == 0:
        evaluations = read_evaluations(Path(config.output_dir, "final"))
        rows = {} if evaluations[0]["step"] else {"before": evaluations[0]}  # without --eval_on_start there is none
        rows["after"] = evaluations[-1]
        rows = {when: {name.removeprefix("eval/"): value for name, value in row.items()} for when, row in rows.items()}
        print(f"\n{NUM_HELDOUT} held-out samples, greedy answers:")
        print(f"{'':14} reward   error (points)   parsable      R²     CCC   sd ratio")
        for when, row in rows.items():
            r2, ccc, spread = (row.get(name, float("nan")) for name in ("r2", "ccc", "sd_ratio"))
            print(
                f"{when:14} {row['reward']:6.3f} {row['mae']:16.2f} {row['parse_rate']:10.0%}"
                f" {r2:7.2f} {ccc:7.2f} {spread:10.2f}"
            )
        print(f"{'best constant':14} {row['zero_skill_reward']:6.3f} {row['zero_skill_mae']:16.2f}")
        rows["seconds"] = round(time.time() - began, 1)
        path = Path(config.output_dir, "demo_report.json")
        path.write_text(json.dumps(rows, indent=2) + "\n")
        print(f"{rows['seconds']:.0f} seconds in all; written to {path}")
    dist.barrier()
