"""Supervised fine-tuning of the demo's model: its warm start, and what GRPO is compared with.

    python -m grpo.demo.supervised --model_id output/demo/warm_start --data_path output/demo/data/train.json \\
        --image_folder output/demo/data/videos --output_dir output/supervised --steps 1500
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import grpo  # noqa: F401  first of all, since it sets how torch's threads wait

# isort: split
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from data.dataset import load_samples
from data.flags import parse_flags
from data.loader import Prompt, load_prompt
from data.media.frames import VideoOptions
from data.media.load import MediaOptions
from data.prompt import load_tokenizer
from data.sample import BadMedia, InputError
from grpo.demo.synthetic_echo import NUM_FRAMES, SIZE
from grpo.logprobs import completion_logprobs
from grpo.model.load import load_model
from grpo.model.random_model import TOKENS_PER_SECOND
from reward.flags import flag

BATCH, WARMUP_STEPS, WEIGHT_DECAY = 8, 20, 0.01
VIDEO_OPTIONS = MediaOptions(VideoOptions(nframes=NUM_FRAMES, resized_width=SIZE, resized_height=SIZE))


@dataclass
class SupervisedConfig:
    """The flags."""

    heading = "what"
    model_id: str = flag("", "folder of the demo's model")
    data_path: str = flag("", "JSON file of samples")
    image_folder: str = flag("", "folder of the videos (videos, beside the file)")
    output_dir: str = flag("", "folder for the trained model and seconds.json")
    steps: int = flag(1500, f"steps of {BATCH} samples")
    learning_rate: float = flag(1e-3, "peak learning rate")
    seed: int = flag(0, "seed of the order of the samples")


def supervised_loss(model, prompts: list[Prompt], answer_ids: list[Tensor]) -> Tensor:
    """Mean cross-entropy of the answers, each (C,): a group of one completion per prompt, in the trainer's own pass."""
    masks = [torch.ones_like(ids, dtype=torch.bool)[None] for ids in answer_ids]
    groups = completion_logprobs(model, prompts, [ids[None] for ids in answer_ids], masks, 1.0, torch.tensor([]).long())
    return -torch.cat([logprobs[0] for logprobs, _ in groups]).mean()


def load_prompts(json_path: Path, tokenizer, image_folder: str = "") -> list[Prompt]:
    """Decode all samples of a JSON of synthetic hearts; their videos lie beside it if no folder is given."""
    samples = load_samples([str(json_path)], image_folder or str(json_path.parent / "videos"))
    return [load_prompt(sample, tokenizer, TOKENS_PER_SECOND, VIDEO_OPTIONS) for sample in samples]


def fit(model, prompts: list[Prompt], tokenizer, config: SupervisedConfig) -> None:
    """Train on the samples' answers, in the flags' number of steps; every epoch in an order of its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, config.steps)
    answer_ids = [torch.tensor(tokenizer.encode(p.sample.answer) + [tokenizer.eos_token_id]) for p in prompts]
    generator, left = torch.Generator().manual_seed(config.seed), []
    for _ in tqdm(range(config.steps), desc="supervised", leave=False, disable=None):
        if len(left) < BATCH:
            left = torch.randperm(len(prompts), generator=generator).tolist()
        batch, left = left[:BATCH], left[BATCH:]
        optimizer.zero_grad()
        supervised_loss(model, [prompts[i] for i in batch], [answer_ids[i] for i in batch]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def main(argv: list[str]) -> int:
    """Train on the true answers; return 2, after one line, for what the user can fix."""
    try:
        config = parse_flags(SupervisedConfig, argv, "python -m grpo.demo.supervised")
        if config.steps < 1 or not 0 < config.learning_rate < 1:
            raise InputError("--steps must be at least 1, and --learning_rate between 0 and 1")
        if not config.output_dir or os.path.exists(config.output_dir):
            raise InputError(f"--output_dir {config.output_dir!r}: name a new folder")
        model, tokenizer = load_model(config.model_id), load_tokenizer(config.model_id)
        prompts = load_prompts(Path(config.data_path), tokenizer, config.image_folder)
    except (InputError, BadMedia) as error:
        print(f"grpo.demo.supervised: error: {error}", file=sys.stderr)
        return 2
    began = time.process_time()
    fit(model, prompts, tokenizer, config)
    seconds = time.process_time() - began
    model.save_pretrained(config.output_dir)
    tokenizer.save_pretrained(config.output_dir)
    Path(config.output_dir, "seconds.json").write_text(json.dumps({"cpu_seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
