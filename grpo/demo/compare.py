"""Compare rewards, and GRPO with supervised training on the labels it is rewarded by: `reward/RESULTS.md`.

    python -m grpo.demo.compare

For each of the demo's tasks and each seed: the same hearts and the same warm start; GRPO with each reward and each
--scale_rewards; supervised training on the true answers: stopped early, as long as GRPO took, and until it has
converged. The demo's own settings, and supervised training, also on seeds that nothing was chosen on. All answers are
greedy and judged by `python -m grpo.evaluate` on 768 hearts of their own: on the 192 of the demo's evaluations the
difference of two models is uncertain by half a point.

Runs go side by side, each on one core. Each that is done is a line of `reward/results.jsonl`, and not done again: the
same command continues where it was interrupted, on another machine, too.
"""

import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data.sample import InputError
from grpo.config import DEMO_DEFAULTS, Config, DemoTask
from grpo.demo.demo import NUM_CARELESS, NUM_TRAIN, WARM_START_STEPS, as_flags
from grpo.demo.supervised import BATCH, SupervisedConfig
from grpo.flags import flag, parse_flags
from grpo.loss import ScaleRewards

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "reward" / "RESULTS.md"
RECORDS = ROOT / "reward" / "results.jsonl"  # a line per run that is done
RECORDING = threading.Lock()
BY_HAND = "## Many true labels or few"  # from this heading on, the results are written by hand and kept

REWARDS = {
    "original": ["--reward_funcs", "numerical_video_reward"],
    "smooth": ["--reward_funcs", "smooth_numerical_reward"],
    "smooth + 0.5 concordance": [
        *["--reward_funcs", "smooth_numerical_reward", "concordance_reward", "--reward_weights", "1", "0.5"]
    ],
}
SCALES = ScaleRewards.__args__
EARLY, SAME_TIME, CONVERGED = "supervised, stopped early", "supervised, same time", "supervised, converged"
NOT_COMPARED = {"output_dir", "max_steps", "eval_steps", "eval_on_start", "per_device_eval_batch_size"}
DATA_FLAGS = "max_videos nframes video_resized_width video_resized_height max_completion_length".split()
NUM_TEST = 768  # hearts on which models are compared
EARLY_STEPS = 100  # of supervised training that stops before it knows the training answers by heart
FIGURES = {
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
class CompareConfig:
    """The flags."""

    output_dir: str = flag("output/compare", "folder for the models of all runs", heading="runs")
    tasks: list[str] = flag(["easy", "hard"], "tasks of the demo")
    seeds: list[int] = flag([0, 1, 2], "seeds on which all rows are compared")
    new_seeds: list[int] = flag([10, 11, 12], "seeds for the demo's own settings and supervised training alone")
    steps: int = flag(DEMO_DEFAULTS["max_steps"], "steps of GRPO")
    supervised_steps: int = flag(600, "steps of supervised training until it has converged")
    jobs: int = flag(os.cpu_count(), "runs side by side, each on one core")


@dataclass
class Run:
    """One trained model."""

    task: DemoTask
    seed: int
    row: str  # of the table
    flags: list[str]  # of train.py; none: supervised, or not trained
    steps: int = 0

    def folder(self, config: CompareConfig) -> Path:
        """Where it is written."""
        return Path(config.output_dir, self.task, f"seed-{self.seed}", self.row.replace(" ", "_"))


def grpo_runs(config: CompareConfig) -> list[Run]:
    """List the runs of GRPO: every row on the seeds, the demo's own settings on the new ones."""
    rows = {
        f"GRPO, {name}, {scale}": [*flags, "--scale_rewards", scale]
        for name, flags in REWARDS.items()
        for scale in SCALES
    }
    runs = [
        Run(t, s, row, flags, config.steps) for t in config.tasks for s in config.seeds for row, flags in rows.items()
    ]
    own = own_row()
    return runs + [Run(t, s, own, rows[own], config.steps) for t in config.tasks for s in config.new_seeds]


def own_row() -> str:
    """Name the row of the demo's own settings."""
    (name,) = (name for name, flags in REWARDS.items() if flags[1:] == DEMO_DEFAULTS["reward_funcs"])
    return f"GRPO, {name}, {DEMO_DEFAULTS.get('scale_rewards', Config.scale_rewards)}"


def call(arguments: list[str], log: Path) -> float:
    """Run a command on one core; return the CPU seconds it took. Raises InputError if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise InputError(f"{' '.join(arguments[:3])} … failed: {log} says why")
    return usage.ru_utime + usage.ru_stime


def prepare(task: DemoTask, seed: int, config: CompareConfig) -> None:
    """Draw the hearts and train the warm start, as the demo does, and draw those on which models are compared."""
    start = Path(config.output_dir, task, f"seed-{seed}", "start").absolute()
    if not start.exists():
        part = start.with_name("start.part")
        shutil.rmtree(part, ignore_errors=True)
        code = "from pathlib import Path; from grpo.demo.demo import make_start, write_samples; "
        code += f"make_start(Path({str(part)!r}), {task!r}, {seed}); "
        code += f"write_samples({str(part / 'data')!r}, 'test', {NUM_TEST}, {seed}, {task!r})"
        call(["-c", code], start.with_name("start.log"))
        part.rename(start)


def settings_of(run: Run) -> dict:
    """Return what decides the result of a run, beside task, seed and row."""
    settings = {"careless": NUM_CARELESS, "train": NUM_TRAIN, "test": NUM_TEST, "warm_start": WARM_START_STEPS}
    names = DEMO_DEFAULTS.keys() - NOT_COMPARED if run.flags else DATA_FLAGS
    settings |= {"flags": run.flags, "demo": {name: DEMO_DEFAULTS[name] for name in sorted(names)}}
    if run.steps and not run.flags:
        settings["supervised"] = {"batch": BATCH, "learning_rate": SupervisedConfig.learning_rate}
    return settings if run.row == SAME_TIME else settings | {"steps": run.steps}


def read_records() -> dict[tuple, dict]:
    """Return the records of all runs that were ever done, by task, seed and row."""
    with RECORDING:
        lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    records = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{str(RECORDS)!r}: line {number} is damaged ({error}): remove it") from error
        records[record["task"], record["seed"], record["row"]] = record
    return records


def record_of(run: Run) -> dict | None:
    """Return the record of a run, None if it is not done; raise InputError if it was done in another way."""
    record = read_records().get((run.task, run.seed, run.row))
    if record and record["settings"] != settings_of(run):
        raise InputError(
            f"{str(RECORDS)!r}: {run.task}, seed {run.seed}, {run.row} was made with other settings: remove its line"
        )
    return record


def do(run: Run, config: CompareConfig) -> None:
    """Train a model and evaluate it, and record the figures, unless that is done."""
    if record_of(run):
        return
    folder = run.folder(config).absolute()
    start, log = folder.with_name("start"), folder.with_name(f"{folder.name}.log")
    check_settings(run, folder)
    if not (folder / "eval" / "metrics.json").exists():
        train_and_evaluate(run, start, folder, log)
    metrics = json.loads((folder / "eval" / "metrics.json").read_text())
    record = {"task": run.task, "seed": run.seed, "row": run.row, "settings": settings_of(run)}
    record |= {"date": time.strftime("%Y-%m-%d"), "steps": run.steps, "cpu_seconds": seconds_in(run, folder)}
    record |= {name: metrics[name]["value"] for name in FIGURES}
    with RECORDING, open(RECORDS, "a") as file:
        file.write(json.dumps(record) + "\n")


def train_and_evaluate(run: Run, start: Path, folder: Path, log: Path) -> None:
    """Train a model, if the run has steps, and let it answer the hearts of the test."""
    base = parse_flags(Config, [], "", DEMO_DEFAULTS)
    data = {"data_path": [str(start / "data" / "train.json")], "image_folder": str(start / "data" / "videos")}
    common = dataclasses.replace(base, **data, seed=run.seed, model_id=str(start / "warm_start"))
    if run.flags:
        model = folder / "run" / "final"
        whole = dataclasses.replace(common, output_dir=str(folder / "run"), max_steps=run.steps, eval_steps=0)
        whole = dataclasses.replace(whole, eval_on_start=False, frame_cache=str(start / "frames"))
        whole = dataclasses.replace(whole, dataloader_num_workers=0)  # one process: one core
        if not (folder / "seconds.json").exists():
            shutil.rmtree(folder / "run", ignore_errors=True)  # begun anew: its time is that of the whole
            seconds = call(["train.py", *as_flags(whole), *run.flags], log)
            (folder / "seconds.json").write_text(json.dumps({"cpu_seconds": seconds}))
    elif run.steps:
        model = folder / "model"
        if not (model / "seconds.json").exists():  # the last file of a whole one
            shutil.rmtree(model, ignore_errors=True)
            flags = ["--model_id", common.model_id, "--image_folder", common.image_folder, "--output_dir", str(model)]
            flags += ["--data_path", *common.data_path, "--steps", str(run.steps), "--seed", str(run.seed)]
            call(["-m", "grpo.demo.supervised", *flags], log)
    else:
        model = start / "warm_start"
    flags = [part for name in ["image_folder", *DATA_FLAGS] for part in (f"--{name}", str(getattr(common, name)))]
    flags += ["--model_id", str(model), "--data_path", str(start / "data" / "test.json")]
    flags += ["--frame_cache", str(start / "frames")]
    call(["-m", "grpo.evaluate", *flags, "--output_dir", str(folder / "eval")], log)


def check_settings(run: Run, folder: Path) -> None:
    """Note how a run is made, or raise InputError if what is there was made in another way."""
    settings, path = settings_of(run), folder / "run.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise InputError(f"{str(folder)!r} was made with other settings: name a new --output_dir")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))


def seconds_in(run: Run, folder: Path) -> float:
    """Return the CPU seconds that a run was trained for."""
    path = folder / ("" if run.flags else "model") / "seconds.json"
    return json.loads(path.read_text())["cpu_seconds"] if run.steps else 0.0


def all_runs(config: CompareConfig) -> list[Run]:
    """List all runs, in the order of the table."""
    places = [(task, seed) for task in config.tasks for seed in [*config.seeds, *config.new_seeds]]
    steps = {EARLY: EARLY_STEPS, SAME_TIME: 0, CONVERGED: config.supervised_steps}  # 0: `steps_in_the_time_of` says
    supervised = [Run(*place, row, [], num) for row, num in steps.items() for place in places]
    return [*(Run(*place, "before", []) for place in places), *grpo_runs(config), *supervised]


def compare(config: CompareConfig) -> None:
    """Do all runs that are not done, those of the demo's own settings first."""
    runs = all_runs(config)
    same_time = [run for run in runs if run.row == SAME_TIME]
    others = [run for run in runs if run.row == EARLY or (run.flags and run.row != own_row())]
    first = [run for run in runs if run not in same_time and run not in others]
    with ThreadPoolExecutor(config.jobs) as pool, tqdm(total=len(runs), unit="run") as bar:

        def do_all(some: list[Run]) -> None:
            for _ in pool.map(lambda run: do(run, config), some):
                bar.update()

        places = dict.fromkeys((run.task, run.seed) for run in runs if not record_of(run))
        list(pool.map(lambda place: prepare(*place, config), places))
        do_all(first)
        for run in same_time:
            run.steps = steps_in_the_time_of(*(record_of(other) for other in first if is_timed(other, run)))
        do_all(same_time)
        do_all(others)


def is_timed(run: Run, same_time: Run) -> bool:
    """Say whether a run decides how long supervised training of the same time takes."""
    return (run.task, run.seed) == (same_time.task, same_time.seed) and run.row in (own_row(), CONVERGED)


def steps_in_the_time_of(own: dict, converged: dict) -> int:
    """Return the steps of supervised training that take as long as the demo's own settings."""
    return max(1, round(own["cpu_seconds"] / (converged["cpu_seconds"] / converged["steps"])))


def table(runs: list[Run]) -> list[str]:
    """Write a table of mean and standard deviation over seeds: of each kind of run that is done, a row."""
    lines = ["| | " + " | ".join(title for title, _ in FIGURES.values()) + " |", "|---" * (len(FIGURES) + 1) + "|"]
    for row in dict.fromkeys(run.row for run in runs):
        found = [record_of(run) for run in runs if run.row == row]
        if not all(found):
            continue
        cells = []
        for name, (_, digits) in FIGURES.items():
            values = [figures[name] for figures in found]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def by_seed(runs: list[Run], config: CompareConfig) -> list[str]:
    """Write a table of the mean error by seed: the demo's own settings beside supervised training."""
    seeds = [*config.seeds, *config.new_seeds]
    lines = ["| MAE | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "|---" * (len(seeds) + 1) + "|"]
    for row in ["before", own_row(), EARLY, SAME_TIME, CONVERGED]:
        found = {run.seed: record_of(run) for run in runs if run.row == row}
        if any(found.values()):
            cells = [f"{record['mae']:.2f}" if (record := found[seed]) else "not done" for seed in seeds]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def write_results(runs: list[Run], config: CompareConfig, argv: list[str]) -> None:
    """Write reward/RESULTS.md; what was written by hand in it stays."""
    command = " ".join(["python -m grpo.demo.compare", *argv])
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}"
    records = [record for run in runs if (record := record_of(run))]
    dates = sorted({record["date"] for record in records}) or [time.strftime("%Y-%m-%d")]
    lines = [
        "# Which reward teaches best",
        "",
        f"`{command}`, {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}, on {machine}; each run on one core. Every",
        "run is a line of [`results.jsonl`](results.jsonl).",
        "",
        f"GRPO: {config.steps} steps of the demo's settings; its rows are reward, then `--scale_rewards`. Supervised:",
        f"cross-entropy on the true answers, from the same warm start: for {EARLY_STEPS} steps; for as much CPU time",
        f"as the whole run of the demo's own settings ({own_row()}) took, the time to load and decode not",
        f"counted; for {config.supervised_steps} steps, after which it knows the training answers by heart.",
        "",
        f"{NUM_TRAIN} hearts to train on, greedy answers on {NUM_TEST} others; errors in points; mean ± standard",
        "deviation over seeds.",
        "",
    ]
    if left := len(runs) - len(records):
        lines += [
            f"{left} of {len(runs)} runs are not done yet: the same command continues. Their rows have no means yet.",
            "",
        ]
    for task in config.tasks:
        own = [run for run in runs if run.task == task]
        lines += [f"## {task}: seeds {', '.join(map(str, config.seeds))}", ""]
        lines += [*table([run for run in own if run.seed in config.seeds]), ""]
        lines += [f"Mean error by seed; nothing was chosen on seeds {', '.join(map(str, config.new_seeds))}:", ""]
        lines += [*by_seed(own, config), ""]
    old = RESULTS.read_text() if RESULTS.exists() else ""
    kept = old[old.index(BY_HAND) :] if BY_HAND in old else f"{BY_HAND}\n"
    RESULTS.write_text("\n".join(lines) + "\n" + kept)


def main(argv: list[str]) -> int:
    """Compare; return 2, after one line, for what the user can fix."""
    try:
        config = parse_flags(CompareConfig, argv, "python -m grpo.demo.compare")
        if len(set(config.tasks)) < len(config.tasks):
            raise InputError("--tasks: name each once")
        if unknown := set(config.tasks) - set(DemoTask.__args__):
            raise InputError(f"--tasks {sorted(unknown)[0]!r}: take {' or '.join(DemoTask.__args__)}")
        if min(config.steps, config.supervised_steps, config.jobs) < 1 or not config.seeds:
            raise InputError("--steps, --supervised_steps and --jobs must be at least 1, and --seeds name a seed")
        if len({*config.seeds, *config.new_seeds}) < len(config.seeds) + len(config.new_seeds):
            raise InputError("--seeds and --new_seeds must be different seeds")
        compare(config)
        write_results(all_runs(config), config, argv)
    except InputError as error:
        print(f"grpo.demo.compare: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        write_results(all_runs(config), config, argv)
        print(f"interrupted: the same command continues; {RESULTS} has what is done", file=sys.stderr)
        return 130
    print(f"written to {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
