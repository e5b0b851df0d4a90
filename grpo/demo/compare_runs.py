"""A run of the comparison: a model trained on one core, judged on hearts of its own, and recorded.

A run that is done is a line of `reward/results.jsonl`, with what decides its result, and is not done again.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from data.sample import InputError
from grpo.config import DEMO_DEFAULTS, DemoTask
from grpo.demo.demo import NUM_CARELESS, NUM_TRAIN, WARM_START_STEPS, as_words
from grpo.demo.supervised import BATCH, SupervisedConfig

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "reward" / "results.jsonl"
RECORDING = threading.Lock()

BEFORE = "before"  # the row of the warm start
NUM_TEST = 768  # hearts on which models are compared
DATA_FLAGS = "max_videos nframes video_resized_width video_resized_height max_completion_length".split()
NOT_COMPARED = {"output_dir", "max_steps", "eval_steps", "eval_on_start", "per_device_eval_batch_size"}
FIGURES = {  # of an evaluation: title and digits in the table
    "mae": ("MAE", 2),
    "median_error": ("median error", 2),
    "r2": ("R²", 3),
    "ccc": ("CCC", 3),
    "sd_ratio": ("sd(answer) / sd(truth)", 2),
    "mae_40": ("MAE, truth below 40", 2),
    "clipped_ratio": ("share cut", 3),
    "out_of_range": ("answers outside 0–100", 1),
    "distinct_answers": ("distinct answers", 1),
}


@dataclass
class Run:
    """One trained model."""

    task: DemoTask
    seed: int
    row: str  # of the table
    flags: list[str]  # of train.py; none: supervised, or not trained
    steps: int | None = 0  # None: not known before other runs are done

    def folder(self, output_dir: str) -> Path:
        """Where it is written."""
        return Path(output_dir, self.task, f"seed-{self.seed}", self.row.replace(" ", "_")).absolute()


def call(arguments: list[str], log: Path) -> float:
    """Run a command on one core; return the CPU seconds it took. Raises InputError if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command, one_core = [sys.executable, *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=one_core, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise InputError(f"{' '.join(arguments[:3])} … failed: {log} says why")
    return usage.ru_utime + usage.ru_stime


def prepare(task: DemoTask, seed: int, output_dir: str) -> None:
    """Draw the hearts and train the warm start, as the demo does, and draw those on which models are compared."""
    start = Path(output_dir, task, f"seed-{seed}", "start").absolute()
    if not start.exists():
        part = start.with_name("start.part")
        shutil.rmtree(part, ignore_errors=True)
        code = "from pathlib import Path; from grpo.demo.demo import make_start, write_samples; "
        code += f"make_start(Path({str(part)!r}), {task!r}, {seed}); "
        code += f"write_samples(Path({str(part / 'data')!r}), 'test', {NUM_TEST}, {seed}, {task!r})"
        call(["-c", code], start.with_name("start.log"))
        part.rename(start)


def settings_of(run: Run) -> dict:
    """Return what decides the result of a run, beside task, seed and row."""
    settings = {"careless": NUM_CARELESS, "train": NUM_TRAIN, "test": NUM_TEST, "warm_start": WARM_START_STEPS}
    names = DEMO_DEFAULTS.keys() - NOT_COMPARED if run.flags else DATA_FLAGS
    settings |= {"flags": run.flags, "demo": {name: DEMO_DEFAULTS[name] for name in sorted(names)}}
    if not run.flags and run.row != BEFORE:
        settings["supervised"] = {"batch": BATCH, "learning_rate": SupervisedConfig.learning_rate}
    return settings | {"steps": run.steps}


def check_settings(settings: dict, run: Run, path: Path, fix: str) -> None:
    """Raise InputError if a run was made with other settings than it would have now."""
    if settings != settings_of(run):
        what = f"{run.task}, seed {run.seed}, {run.row}"
        raise InputError(f"{str(path)!r}: {what} was made with other settings: {fix}")


def record_of(run: Run) -> dict | None:
    """Return the record of a run, None if it is not done; raise InputError if it was done in another way."""
    if run.steps is None or not RECORDS.exists():
        return None
    with RECORDING:
        lines = RECORDS.read_text().splitlines()
    found = None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{str(RECORDS)!r}: line {number} is damaged ({error}): remove it") from error
        if (record["task"], record["seed"], record["row"]) == (run.task, run.seed, run.row):
            found = record
    if found:
        check_settings(found["settings"], run, RECORDS, "remove its line")
    return found


def do(run: Run, output_dir: str) -> None:
    """Train a model, let it answer the hearts of the test, and record the figures, unless that is done."""
    if record_of(run):
        return
    folder = run.folder(output_dir)
    start, log, report = folder.with_name("start"), folder.with_name(f"{folder.name}.log"), folder / "eval"
    model, seconds = train(run, start, folder, log)
    if not (report / "metrics.json").exists():
        flags = {"model_id": model, "data_path": start / "data" / "test.json", "output_dir": report}
        flags |= {"image_folder": start / "data" / "videos", "frame_cache": start / "frames"}
        flags |= {name: DEMO_DEFAULTS[name] for name in DATA_FLAGS}
        call(["-m", "grpo.evaluate", *as_words(flags)], log)
    metrics = json.loads((report / "metrics.json").read_text())
    record = {"task": run.task, "seed": run.seed, "row": run.row, "settings": settings_of(run)}
    record |= {"date": time.strftime("%Y-%m-%d"), "steps": run.steps, "cpu_seconds": seconds}
    record |= {name: metrics[name]["value"] for name in FIGURES}
    with RECORDING, open(RECORDS, "a") as file:
        file.write(json.dumps(record) + "\n")


def train(run: Run, start: Path, folder: Path, log: Path) -> tuple[Path, float]:
    """Train the model of a run, unless that is done; return its folder and the CPU seconds that it took."""
    if not run.steps:
        return start / "warm_start", 0.0
    output, done = folder / "run", folder / "seconds.json"
    flags = {"model_id": start / "warm_start", "data_path": start / "data" / "train.json", "seed": run.seed}
    flags |= {"image_folder": start / "data" / "videos", "output_dir": output}
    if run.flags:
        flags = DEMO_DEFAULTS | flags | {"frame_cache": start / "frames", "max_steps": run.steps}
        flags |= {"eval_steps": 0, "eval_on_start": False, "logging_steps": 10}  # nobody watches
        flags |= {"dataloader_num_workers": 0}  # one process: one core
        command, model = ["train.py", *as_words(flags), *run.flags], output / "final"
    else:
        command, model = ["-m", "grpo.demo.supervised", *as_words(flags | {"steps": run.steps})], output
    if not done.exists():
        shutil.rmtree(output, ignore_errors=True)  # an interrupted run begins anew: its time is that of the whole
        seconds = call(command, log)
        if not (model / "config.json").exists():  # a signal ends train.py in order
            raise InputError(f"{' '.join(command[:3])} … was interrupted: {log}")
        if not run.flags:  # of training alone, without the time to load and decode
            seconds = json.loads((output / "seconds.json").read_text())["cpu_seconds"]
        done.write_text(json.dumps({"cpu_seconds": seconds, "settings": settings_of(run)}))
    trained = json.loads(done.read_text())
    check_settings(trained["settings"], run, folder, "name a new --output_dir")
    return model, trained["cpu_seconds"]
