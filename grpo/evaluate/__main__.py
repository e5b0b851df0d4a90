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
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import grpo  # noqa: F401  first of all, since it sets how torch's threads wait

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from data.dataset import InputError, Sample, first_line
from data.loader import PromptDataset, worker_failure
from data.prompt import load_tokenizer
from grpo.config import Config, check_bounds, default_of, flag, parse_flags, video_options
from grpo.evaluate.answer import AnswerOptions, Prediction, answer, answers_of, truths_of
from grpo.evaluate.metrics import NUM_RESAMPLES, Answers, best_answers, figures, median_answers
from grpo.evaluate.pictures import pictures
from grpo.export import base_of, load_merged
from grpo.model.layers import pack_weights
from grpo.model.load import load_model
from grpo.model.sharding import compute_dtype
from grpo.ranks import abort_rank, broadcast_object, print_rank0, raise_together, start_processes
from grpo.run.inputs import load_capped_samples
from grpo.run.lock import lock_folder
from grpo.run.resume import fingerprint
from grpo.run.scoring import score_texts
from reward import REWARD_FUNCTIONS
from reward.extract import extract_number

PROG = "python -m grpo.evaluate"


def shared(name: str, heading: str | None = None):
    """Return the flag of `train.py` with its default and help."""
    (field,) = (field for field in dataclasses.fields(Config) if field.name == name)
    return flag(default_of(field), field.metadata["help"], heading)


@dataclass
class EvaluateConfig:
    """The flags; those of `train.py` have its meaning and defaults."""

    run: str = flag("", "folder of a run: its final/, its held-out samples and all its settings", heading="what")
    model_id: str = flag("", "Qwen2.5-VL: a local folder or a hub name (with --run: its final/)")
    adapter: str = flag("", "folder of adapters that training with --lora_enable has written, for this model")
    data_path: str = flag("", "JSON or JSONL file of samples (with --run: its --eval_data_path)")
    image_folder: str = shared("image_folder")
    output_dir: str = flag("", "folder for predictions.jsonl, metrics.json and pictures (with --run: its eval/)")

    num_samples: int = flag(1, "answers per sample", heading="answers")
    temperature: float = flag(0.0, "sampling temperature; 0: greedy, the most probable token each time")
    max_completion_length: int = shared("max_completion_length")
    per_device_eval_batch_size: int = shared("per_device_eval_batch_size")
    seed: int = shared("seed")
    reward_timeout: float = shared("reward_timeout")

    valid_range: list[float] = shared("valid_range", heading="figures")
    cuts: list[float] = shared("cuts")

    max_videos: int = shared("max_videos", heading="videos")
    fps: float | None = shared("fps")
    nframes: int | None = shared("nframes")
    video_resized_width: int | None = shared("video_resized_width")
    video_resized_height: int | None = shared("video_resized_height")
    video_min_pixels: int = shared("video_min_pixels")
    video_max_pixels: int = shared("video_max_pixels")
    on_bad_video: Literal["error", "skip"] = shared("on_bad_video")
    dataloader_num_workers: int = shared("dataloader_num_workers")


# What decides the answers; other flags may differ when an evaluation continues.
DECISIVE = """
    num_samples temperature max_completion_length max_videos fps nframes video_resized_width video_resized_height
    video_min_pixels video_max_pixels
""".split()


def parse(argv: list[str]) -> EvaluateConfig:
    """Read the flags, with those of a run as defaults; raise InputError."""
    given = parse_flags(EvaluateConfig, argv, PROG)
    config = parse_flags(EvaluateConfig, argv, PROG, defaults_of_run(given)) if given.run else given
    if config.adapter and not config.model_id:
        config.model_id = base_of(config.adapter)
    for name in ("model_id", "data_path", "output_dir"):
        if not getattr(config, name):
            hint = "" if config.run else ", or a whole run with --run"
            raise InputError(f"--{name} is missing: name it{hint}")
    check_bounds(config)
    if config.num_samples > 1 and config.temperature < 0.01:
        raise InputError(
            f"--num_samples {config.num_samples} --temperature {config.temperature:g}: greedy answers are all equal, "
            "give a temperature of 0.01 or more"
        )
    if 0 < config.temperature < 0.01:
        raise InputError(f"--temperature {config.temperature}: must be 0.01 or more, or 0 for greedy answers")
    return config


def defaults_of_run(given: EvaluateConfig) -> dict:
    """Return the flags that a run supplies: model, held-out samples, and how it prepared and sampled."""
    path = Path(given.run, "config.json")
    try:
        run = json.loads(path.read_text())
        names = {field.name for field in dataclasses.fields(EvaluateConfig)} - {"run", "adapter", "temperature"}
        defaults = {name: value for name, value in run.items() if name in names}
        defaults |= {"data_path": run.get("eval_data_path", ""), "output_dir": os.path.join(given.run, "eval")}
        final = os.path.join(given.run, "final")
        if run["lora_enable"] and not given.model_id:
            defaults["adapter"] = given.adapter or final
        elif not run["lora_enable"]:
            defaults["model_id"] = final
    except OSError as error:
        raise InputError(
            f"--run {given.run!r} is no folder of a run: {path} cannot be read ({error.strerror})"
        ) from error
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"--run {given.run!r}: {path} is damaged ({first_line(error)})") from error
    if not (given.model_id or given.adapter or os.path.isdir(final)):
        raise InputError(
            f"--run {given.run!r} has no final/ yet: name a checkpoint-N in it with --model_id or --adapter"
        )
    if not (given.data_path or defaults["data_path"]):
        raise InputError(f"--run {given.run!r} had no --eval_data_path: name the samples with --data_path")
    return defaults


def load_for_sampling(config: EvaluateConfig, device: torch.device):
    """Load the model, with the adapter merged into it, in the precision in which training samples."""
    dtype = compute_dtype(device)
    if config.adapter:
        base_of(config.adapter)  # raises InputError if it is no adapter folder
        model = load_merged(config.adapter, config.model_id, dtype)
    else:
        model = load_model(config.model_id, dtype)
    model.to(device).eval()
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        pack_weights(model.model)
    return model


def digest_of(model) -> str:
    """Return a digest of all weights, to tell models under one name apart."""
    hashes = [(name, torch.hash_tensor(weight.detach()).item()) for name, weight in sorted(model.named_parameters())]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]


class Predictions:
    """predictions.jsonl, and settings.json beside it, which says what its answers are of; written by rank 0."""

    def __init__(self, config: EvaluateConfig, settings: dict, samples: list[Sample]):
        """Read what is there. Raises InputError if it is of another model, other samples or other flags."""
        self.path, self.done = Path(config.output_dir, "predictions.jsonl"), {}
        if dist.get_rank() != 0:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock_folder(config.output_dir)
            settings_path = self.path.with_name("settings.json")
            if self.path.exists():
                self.check(settings_path, settings)
                self.read({sample.id for sample in samples})
            else:
                write_whole(settings_path, json.dumps(settings, indent=2).encode())
        except OSError as error:
            raise InputError(
                f"--output_dir {config.output_dir!r} cannot be written ({error.strerror}): name another folder"
            ) from error

    def check(self, path: Path, settings: dict) -> None:
        """Compare the settings with those of the predictions that are there."""
        try:
            old = json.loads(path.read_text())
            changed = [
                f"{name} {new!r} was {old.get(name)!r}" for name, new in settings.items() if old.get(name) != new
            ]
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(
                f"{str(self.path)!r} is there, but {path.name} beside it cannot be read ({first_line(error)}): name a "
                "new --output_dir"
            ) from error
        if changed:
            raise InputError(f"{str(self.path)!r} is of other settings ({', '.join(changed)}): name a new --output_dir")

    def read(self, ids: set[str]) -> None:
        """Read the lines; what an interruption has left of a last line is removed."""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                prediction = Prediction(**json.loads(line))
                if prediction.id not in ids or prediction.id in self.done:
                    raise ValueError(f"unexpected id {prediction.id!r}")
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"{str(self.path)!r}, line {number} is damaged ({first_line(error)}): remove the line, or name a "
                    "new --output_dir"
                ) from error
            self.done[prediction.id] = prediction
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))

    def append(self, predictions: list[Prediction]) -> None:
        """Add predictions; raise InputError if the disk is full."""
        self.done |= {prediction.id: prediction for prediction in predictions}
        if dist.get_rank() != 0:
            return
        lines = "".join(json.dumps(dataclasses.asdict(prediction)) + "\n" for prediction in predictions)
        try:
            with open(self.path, "a") as file:
                file.write(lines)
        except OSError as error:
            raise InputError(
                f"{str(self.path)!r} cannot be written ({error.strerror}): make room; the same command continues"
            ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, which gets its name once it is complete."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


def evaluate(config: EvaluateConfig, device: torch.device) -> None:
    """Answer what has no answer yet; write the figures and pictures, and print the figures. Collective."""
    messages = []
    samples = raise_together(load_capped_samples, config.data_path, config, messages)
    if all(extract_number(sample.answer) is None for sample in samples):
        raise InputError(f"--data_path {config.data_path!r}: no answer in it contains a number")
    print_rank0(*messages)
    tokenizer = raise_together(load_tokenizer, config.model_id)
    model = raise_together(load_for_sampling, config, device)
    options = AnswerOptions(
        num_samples=config.num_samples,
        temperature=config.temperature,
        max_completion_length=config.max_completion_length,
        batch_size=config.per_device_eval_batch_size,
        seed=config.seed,
        num_workers=config.dataloader_num_workers,
        reward_functions=REWARD_FUNCTIONS,
        reward_timeout=config.reward_timeout,
    )
    settings = {name: getattr(config, name) for name in DECISIVE}
    settings |= {"seed": config.seed} if config.temperature else {}
    settings |= {"samples": fingerprint(samples), "weights": digest_of(model)}
    predictions = raise_together(Predictions, config, settings, samples)
    done = broadcast_object(list(predictions.done))
    tokens_per_second = model.config.vision_config.tokens_per_second
    dataset = PromptDataset(samples, tokenizer, tokens_per_second, video_options(config), config.on_bad_video)
    indices = [i for i, sample in enumerate(samples) if sample.id not in set(done)]
    if done:
        print_rank0(f"{len(done)} of {len(samples)} samples are answered already")
    bar = tqdm(
        total=len(samples),
        initial=len(done),
        unit="sample",
        mininterval=0.1 if sys.stderr.isatty() else 10,  # between drawings: a log file keeps each of them
        disable=dist.get_rank() != 0,
    )
    with bar:
        for answered in answer(model, dataset, indices, options):
            raise_together(predictions.append, answered.predictions)
            print_rank0(*(f"left out: {line}" for line in answered.bad_videos))
            bar.update(len(answered.predictions))
            bar.set_postfix_str(f"mean error {running_error(predictions.done):.2f}", refresh=False)
    raise_together(report, config, settings, samples, predictions.done, options)


def running_error(done: dict[str, Prediction]) -> float:
    """Return the mean absolute error of the answers so far that have a number."""
    pairs = [(p.truth_number, number) for p in done.values() for number in p.numbers]
    found = [abs(truth - number) for truth, number in pairs if truth is not None and number is not None]
    return sum(found) / len(found) if found else float("nan")


def report(
    config: EvaluateConfig, settings: dict, samples: list[Sample], done: dict[str, Prediction], options: AnswerOptions
) -> None:
    """On rank 0, write metrics.json and the pictures, and print the table; raise InputError."""
    if dist.get_rank() != 0:
        return
    answered = [sample for sample in samples if sample.id in done]
    used = [sample for sample in answered if done[sample.id].truth_number is not None]
    if not used:
        raise InputError(f"--data_path {config.data_path!r}: no sample with a number in its truth could be answered")
    truths, answers = truths_of(used, options), answers_of([done[sample.id] for sample in used])
    ways = {"greedy" if not config.temperature else "single": answers}
    if config.num_samples > 1:
        medians = median_answers(answers, config.valid_range)
        ways[f"median of {config.num_samples}"] = Answers(
            medians, score_numbers(medians, used, options), answers.is_stopped.all(axis=1, keepdims=True)
        )
        ways[f"best of {config.num_samples}"] = best_answers(truths.numbers, answers, config.valid_range)
    found = {way: figures(truths, given, config.valid_range, config.cuts, NUM_RESAMPLES) for way, given in ways.items()}
    main, *others = found
    metrics = {
        "model_id": config.model_id,
        "adapter": config.adapter,
        "data_path": config.data_path,
        "settings": settings,
        "samples": len(samples),
        "samples_left_out": len(samples) - len(answered),
        "samples_without_true_number": len(answered) - len(used),
        "answers": main,
        **found[main],
        **{way.replace(" ", "_"): found[way] for way in others},
    }
    drawn = pictures(truths.numbers, answers, found[main], config.valid_range, config.cuts, Path(config.data_path).name)
    output = Path(config.output_dir)
    try:
        write_whole(output / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
        for name, data in drawn.items():
            write_whole(output / f"{name}.png", data)
    except OSError as error:
        raise InputError(
            f"--output_dir {config.output_dir!r} cannot be written ({error.strerror}): make room; the same command "
            "continues"
        ) from error
    print("\n" + table(found))
    for name, what in (
        ("samples_left_out", "left out, for their videos"),
        ("samples_without_true_number", "not in the figures, since their truth has no number"),
    ):
        if metrics[name]:
            print(f"{metrics[name]} samples {what}")
    print(f"written to {output}")


def score_numbers(numbers: np.ndarray, samples: list[Sample], options: AnswerOptions) -> np.ndarray:
    """Return the reward of answering each sample with a number, (n, 1) -> (n, 1); nan is an empty answer."""
    texts = ["" if np.isnan(number) else f"{number:g}%" for number in numbers[:, 0]]
    rewards = score_texts(options.reward_functions, samples, texts, None, options.reward_timeout)
    return sum(rewards.values()).numpy()[:, None]


LABELS = {
    "n": "samples",
    "parse_rate": "share with a number",
    "reward": "mean reward",
    "mae": "mean absolute error",
    "median_error": "median absolute error",
    "rmse": "root mean squared error",
    "r2": "R²",
    "pearson": "Pearson's r",
    "ccc": "concordance (CCC)",
    "bias": "bias (predicted - true)",
    "limit_low": "lower limit of agreement",
    "limit_high": "upper limit of agreement",
    "within_5": "share within 5 points",
    "sd_ratio": "sd of answers / sd of truths",
    "distinct_answers": "different answers",
    "out_of_range": "answers out of range",
    "clipped_ratio": "share cut at the length limit",
    "zero_skill_answer": "best constant answer",
    "zero_skill_mae": "... its mean absolute error",
    "zero_skill_reward": "reward of the best constant",
}


def table(found: dict[str, dict]) -> str:
    """Write the figures as a table, a column for each way of answering, with the 95 % intervals."""
    lines = [f"{'':30}" + "".join(f"{way:>12}{'95 % interval':>20}" for way in found)]
    for name in next(iter(found.values())):
        kind, _, cut = name.partition("_")
        label = LABELS.get(name) or f"{'AUC' if kind == 'auc' else kind}, below {cut}"
        line = f"{label:30}"
        for figures_of_way in found.values():
            figure = figures_of_way[name]
            low, high = figure["low"], figure["high"]
            interval = "" if low is None or low == high else f"{number(low)} to {number(high)}"
            line += f"{number(figure['value']):>12}{interval:>20}"
        lines.append(line)
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Write a figure with up to three decimals."""
    return "undefined" if value is None else f"{value:.0f}" if value == int(value) else f"{value:.3f}"


def main(argv: list[str]) -> int:
    """Evaluate; return 2, after one line, for what the user can fix."""
    code = 0
    try:
        config = parse(argv[1:] if argv[:1] == ["--"] else argv)  # torchrun of some versions hands its "--" on
        evaluate(config, start_processes())
    except InputError as error:  # raised on all ranks together
        print_rank0(f"grpo.evaluate: error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print_rank0("interrupted: the same command continues", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if line := worker_failure(error):  # on this rank alone
            abort_rank(f"grpo.evaluate: error: rank {dist.get_rank()}: {line}")
        raise
    if dist.is_initialized():  # after any other error the ranks do not wait for each other
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(record(main)(sys.argv[1:]))
