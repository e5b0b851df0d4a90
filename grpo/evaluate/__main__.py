"""Evaluate a model on held-out samples: answers, figures with intervals, and pictures.

python -m grpo.evaluate --run output/ef
python -m grpo.evaluate --model_id MODEL --data_path test.json --image_folder videos --output_dir out/eval
torchrun --nproc_per_node 8 -m grpo.evaluate -- --run output/ef --num_samples 8 --temperature 0.7

The "--" keeps torchrun from taking --run for one of its own flags.

The same command continues where an interrupted one stopped: samples in predictions.jsonl are not answered again.
"""

import dataclasses
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpo  # noqa: F401  first of all, since it sets how torch's threads wait

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from data.flags import LoaderFlags, SampleFlags, parse_flags
from data.loader import PromptDataset, prompt_options, resolve_data_flags
from data.prompt import load_tokenizer
from data.sample import InputError, first_line
from grpo.config import HeldOutFlags, SamplingFlags, Seed
from grpo.evaluate.answer import Prediction, answer
from grpo.evaluate.predictions import append_predictions, open_predictions
from grpo.evaluate.report import report
from grpo.export import base_of, load_merged
from grpo.model.load import load_model
from grpo.model.sharding import compute_dtype, distribute_weights, without_weights
from grpo.ranks import broadcast_object, exit_code, print_rank0, raise_together, start_processes
from grpo.run.scoring import load_scorer
from grpo.run.survey import check_same_on_all_ranks, survey
from reward.flags import POSITIVE, Bounds, RewardFlags, flag

PROG = "python -m grpo.evaluate"


@dataclass
class WhatFlags(SampleFlags):
    """Which model answers which samples."""

    heading = "what"
    model_id: str = flag("", "Qwen2.5-VL: a local folder or a hub name (with --run: its final/)")
    data_path: list[str] = flag([], "JSON or JSONL files of samples (with --run: its --eval_data_path)")
    run: str = flag("", "folder of a run: its final/, its held-out samples and all its settings")
    adapter: str = flag("", "folder of adapters that training with --lora_enable has written, for this model")
    output_dir: str = flag("", "folder for predictions.jsonl, metrics.json and pictures (with --run: its eval/)")


@dataclass
class AnswerFlags(SamplingFlags, Seed):
    """How they are answered."""

    heading = "answers"
    num_samples: int = flag(1, "answers per sample", POSITIVE, decides=True)
    temperature: float = flag(
        0.0,
        "sampling temperature; 0: greedy, the most probable token each time",
        Bounds(lambda x: x == 0 or 0.01 <= x <= 1e9, "must be 0.01 or more, or 0 for greedy answers"),
        decides=True,
    )


@dataclass
class EvaluateConfig(WhatFlags, AnswerFlags, RewardFlags, HeldOutFlags, LoaderFlags):
    """The flags; those of `train.py` have its meaning and defaults."""


def parse(argv: list[str]) -> EvaluateConfig:
    """Read the flags, with those of a run as defaults; raise InputError."""
    given = parse_flags(EvaluateConfig, argv, PROG, {"reward_funcs": None})  # None: they are not given
    config = parse_flags(EvaluateConfig, argv, PROG, defaults_of_run(given) if given.run else {})
    if config.adapter:
        config.model_id = base_of(config.adapter, config.model_id)
    for name in ("model_id", "data_path", "output_dir"):
        if getattr(config, name) in ("", [], [""]):
            raise InputError(f"--{name} is missing: name it, or a run that has it with --run")
    resolve_data_flags(config)
    if config.num_samples > 1 and not config.temperature:
        raise InputError(f"--num_samples {config.num_samples}: greedy answers are all equal: give a --temperature")
    return config


def defaults_of_run(given: EvaluateConfig) -> dict:
    """Return the flags that a run supplies: model, held-out samples, and how it prepared and sampled."""
    final = os.path.join(given.run, "final")
    names = {field.name for field in dataclasses.fields(EvaluateConfig)} - {"run", "adapter", "model_id", "temperature"}
    if given.reward_funcs is not None:  # the run's weights and arguments are those of other functions
        names -= {"reward_weights", "reward_kwargs"}
    try:
        run = json.loads(Path(given.run, "config.json").read_text())
        defaults = {name: value for name, value in run.items() if name in names}
        defaults |= {"data_path": run["eval_data_path"], "output_dir": os.path.join(given.run, "eval")}
        if not given.model_id:
            defaults["adapter" if run["lora_enable"] else "model_id"] = final
    except (OSError, ValueError, KeyError, AttributeError) as error:
        why = f"its config.json cannot be read ({first_line(error)})"
        raise InputError(f"--run {given.run!r} is no folder of a run: {why}") from error
    if not (given.model_id or given.adapter or os.path.isdir(final)):
        mend = "name a checkpoint-N in it with --model_id or --adapter"
        raise InputError(f"--run {given.run!r} has no final/ yet: {mend}")
    return defaults


def decisive_flags(config: EvaluateConfig) -> dict:
    """Return the flags that decide what is answered; others may differ when an evaluation continues."""
    names = [field.name for field in dataclasses.fields(config) if field.metadata["decides"]]
    return {name: getattr(config, name) for name in names if config.temperature or name != "seed"}


def load_for_sampling(config: EvaluateConfig, device: torch.device):
    """Load the model, an adapter merged into it, in the precision in which training samples. Collective.

    Rank 0 alone reads, so that a host holds one copy. Raises InputError.
    """
    load = partial(load_merged, config.adapter) if config.adapter else load_model
    is_first, dtype = dist.get_rank() == 0, compute_dtype(device)
    loaded = raise_together(lambda: load(config.model_id, dtype) if is_first else None)
    model = without_weights(loaded).eval()
    distribute_weights(model, loaded, device)
    return model


def digest_of(model) -> str:
    """Return a digest of all weights, to tell models under one name apart."""
    hashes = [(name, torch.hash_tensor(weight.detach()).item()) for name, weight in sorted(model.named_parameters())]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]


def evaluate(config: EvaluateConfig, device: torch.device) -> None:
    """Answer what has no answer yet; write the figures and pictures, and print the figures. Collective."""
    found = raise_together(survey, config.data_path, config)
    scorer = raise_together(load_scorer, config, found.keys)
    check_same_on_all_ranks(found, functions=scorer.functions)
    tokenizer = raise_together(load_tokenizer, config.model_id)
    model = load_for_sampling(config, device)
    settings = decisive_flags(config)
    settings["rewards"] = [[f.name, f.weight, f.options, f.digest] for f in scorer.functions]
    settings |= {"samples": found.fingerprint, "weights": digest_of(model)}
    done = raise_together(open_predictions, config.output_dir, settings)
    skipped, is_first = broadcast_object(set(done)), dist.get_rank() == 0  # ids
    samples, tokens_per_second = found.samples, model.config.vision_config.tokens_per_second
    dataset = PromptDataset(samples, tokenizer, tokens_per_second, prompt_options(config))
    if skipped:
        print_rank0(f"{len(skipped)} of {len(samples)} samples are answered already")
    seconds = 0.1 if sys.stderr.isatty() else 10  # between drawings: a log file keeps each of them
    bar = tqdm(total=len(samples), initial=len(done), unit="sample", mininterval=seconds, disable=not is_first)
    with bar:
        for predictions in answer(model, dataset, scorer, config, config.num_samples, config.temperature, skipped):
            raise_together(append_predictions, config.output_dir, predictions)
            done |= {prediction.id: prediction for prediction in predictions}
            bar.update(len(predictions))
            bar.set_postfix_str(f"mean error {running_error(done):.2f}", refresh=False)
    if is_first:  # the others have nothing to wait for
        report(config, settings, samples, done, scorer)


def running_error(done: dict[str, Prediction]) -> float:
    """Return the mean absolute error of the answers so far that have a number."""
    pairs = [(p.truth_number, number) for p in done.values() for number in p.numbers]
    return np.mean([abs(truth - number) for truth, number in pairs if None not in (truth, number)] or np.nan)


def main(argv: list[str]) -> int:
    """Evaluate; return 2, after one line, for what the user can fix."""

    def run() -> None:
        config = parse(argv[1:] if argv[:1] == ["--"] else argv)  # torchrun of some versions hands its "--" on
        evaluate(config, start_processes())

    return exit_code(run, "grpo.evaluate", "interrupted: the same command continues")


if __name__ == "__main__":
    sys.exit(record(main)(sys.argv[1:]))
