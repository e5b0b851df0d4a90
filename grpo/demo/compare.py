"""Compare rewards, and GRPO with supervised training on the answers it is rewarded by: `reward/RESULTS.md`.

    python -m grpo.demo.compare

For each of the demo's tasks and each seed: the same hearts and the same warm start; supervised training on the true
answers; and GRPO, with each reward. The demo's own settings, and supervised training, also on seeds that nothing was
chosen on. Each run is evaluated ten times on the demo's held-out hearts, and judged twice, by greedy answers to 768
hearts of their own: at its last step, and at the step that was best on the held-out ones (`best/`). Supervised training
tries three learning rates on the first seed, and takes the one whose best evaluation was best.

Runs go side by side, each on one core. What is judged is a line of `reward/results.jsonl`, with its settings, and is
not done again: the same command continues where it was interrupted, on another machine, too.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path

from tqdm import tqdm

from data.flags import parse_flags
from data.sample import InputError
from grpo.config import DEMO_DEFAULTS, Config, DemoTask
from grpo.demo import demo
from grpo.demo.compare_table import FIGURES, tables
from grpo.demo.synthetic_echo import write_samples
from reward.flags import POSITIVE, Bounds, flag

ROOT = Path(__file__).parents[2]
RECORDS, RESULTS = ROOT / "reward" / "results.jsonl", ROOT / "reward" / "RESULTS.md"
BY_HAND = "## What the tables say"  # from this heading on, the results are written by hand and kept
NUM_TEST = 768  # hearts on which models are compared: on 192 the difference of two is uncertain by half a point
EVALUATIONS = 10  # of each run, on the demo's held-out hearts
RATES = (3e-4, 1e-3, 3e-3)  # of supervised training

BEFORE, OWN = "before", "GRPO, smooth"  # the warm start; the demo's own settings
GRPO_ROWS = {
    "GRPO, original": {"reward_funcs": ["numerical_video_reward"]},
    OWN: {},
    "GRPO, smooth + 0.5 concordance": {
        "reward_funcs": [*DEMO_DEFAULTS["reward_funcs"], "concordance_reward"],
        "reward_weights": [1.0, 0.5],
    },
    "GRPO, smooth, not scaled": {"scale_rewards": "none"},
}
SUPERVISED_ROWS = {f"supervised, {rate:g}": {"learning_rate": rate} for rate in RATES}
# What decides a result: of the demo's start, and all flags but those that say where something lies.
START = ("HIDDEN_SIZE", "LAYERS", "BLOCKS", "NUM_CARELESS", "NUM_TRAIN", "NUM_HELDOUT", "WARM_START_STEPS")
START += ("SUPERVISED",)
NOT_DECISIVE = {"model_id", *(field.name for field in dataclasses.fields(Config) if field.metadata["may_change"])}
NOT_DECISIVE -= {"max_steps", "eval_steps"}


@dataclass
class CompareConfig:
    """The flags."""

    heading = "runs"
    output_dir: str = flag("output/compare", "folder for the models of all runs")
    tasks: list[str] = flag(
        ["easy", "hard"],
        "tasks of the demo",
        Bounds(lambda tasks: sorted(tasks) in (["easy"], ["hard"], ["easy", "hard"]), "name easy, hard, or both"),
    )
    seeds: list[int] = flag([0, 1, 2], "seeds on which all rows are compared", Bounds(bool, "name a seed"))
    new_seeds: list[int] = flag([10, 11, 12], "seeds for the demo's own settings and supervised training alone")
    steps: int = flag(DEMO_DEFAULTS["max_steps"], "steps of GRPO", POSITIVE)
    supervised_steps: int = flag(600, "steps of supervised training", POSITIVE)
    jobs: int = flag(os.cpu_count(), "runs side by side, each on one core", POSITIVE)


@dataclass
class Run:
    """A model that is trained."""

    task: DemoTask
    seed: int
    row: str  # of the table
    config: Config  # its flags of train.py

    @property
    def key(self) -> dict:
        """What decides its result: a part of its records."""
        flags = vars(self.config)
        settings = {name: getattr(demo, name) for name in START} | {"NUM_TEST": NUM_TEST}
        settings |= {name: flags[name] for name in sorted(flags.keys() - NOT_DECISIVE)}
        return {"task": self.task, "seed": self.seed, "row": self.row, "settings": settings}


def run_of(compare: CompareConfig, task: DemoTask, seed: int, row: str) -> Run:
    """Return a run with its flags."""
    place = Path(compare.output_dir, task, f"seed-{seed}").absolute()
    own = {"demo_task": task, "seed": seed, "output_dir": str(place), "frame_cache": str(place / "frames")}
    own |= {"dataloader_num_workers": 0, "logging_steps": 10}  # for one core that nobody watches
    of_demo = Config(**DEMO_DEFAULTS | own)
    config, grpo = demo.flags_of_warm_start(of_demo), demo.flags_of_grpo(of_demo)
    if row == BEFORE:
        return Run(task, seed, row, config)
    if row in SUPERVISED_ROWS:
        steps, how = compare.supervised_steps, SUPERVISED_ROWS[row]
        how = how | {name: getattr(grpo, name) for name in ("model_id", "data_path", "eval_data_path")}
    else:
        config, steps, how = grpo, compare.steps, GRPO_ROWS[row]
    how = how | {"output_dir": str(place / row.replace(" ", "_")), "resume_from_checkpoint": "auto"}
    how |= {"max_steps": steps, "eval_steps": max(1, steps // EVALUATIONS), "eval_on_start": False}
    return Run(task, seed, row, dataclasses.replace(config, **how))


def records_of(run: Run) -> list[dict]:
    """Return what is recorded of a run with these settings: at its last step, and at its best one."""
    lines, found, key = RECORDS.read_text().splitlines() if RECORDS.exists() else [], [], run.key
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{str(RECORDS)!r}: line {number} is damaged ({error}): remove it") from error
        if record.items() >= key.items():
            found.append(record)
    return found


def call(arguments: list[str], log: Path) -> None:
    """Run a command on one core; raise InputError if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    one_core = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        code = subprocess.call([sys.executable, *arguments], cwd=ROOT, env=one_core, stdout=file, stderr=file)
    if code:
        raise InputError(f"{' '.join(arguments[:3])} … failed: {log} says why")


def do(run: Run) -> None:
    """Train a model, let it answer the hearts of the test, and record the figures, unless that is done.

    Before the warm start it draws the hearts, also those of the test, and makes the untrained model. A warm start that
    another machine recorded is made again, since the others begin from it.
    """
    output, log = Path(run.config.output_dir), Path(f"{run.config.output_dir}.log")
    is_recorded = bool(records_of(run))
    if is_recorded and (run.row != BEFORE or (output / "final").exists()):
        return
    data = output.parent / "data"
    if run.row == BEFORE and not (data / "test.json").exists():
        demo.make_start(output.parent, run.task, run.seed)
        write_samples(data, "test", NUM_TEST, run.seed, run.task)
    call(demo.command_of(run.config), log)
    if not (output / "final").exists():  # a signal ends train.py in order
        raise InputError(f"train.py was interrupted: {log}")
    if is_recorded:
        return
    progress = json.loads((output / "final" / "progress.json").read_text())
    lines = []
    for when, step in {"last": progress["step"], "best": progress["best_step"]}.items():
        if step is None:  # the warm start is not evaluated
            continue
        model = ["--model_id", str(output / ("final" if when == "last" else "best"))]
        where = ["--data_path", str(data / "test.json"), "--output_dir", str(output / f"eval-{when}")]
        call(["-m", "grpo.evaluate", "--run", str(output), *model, *where], log)
        metrics = json.loads((output / f"eval-{when}" / "metrics.json").read_text())
        (validated,) = [one["eval/mae"] for one in progress["evaluations"] if one["step"] == step] or [None]
        record = run.key | {"date": time.strftime("%Y-%m-%d"), "when": when, "step": step, "validation_mae": validated}
        lines.append(json.dumps(record | {name: metrics[name]["value"] for name in FIGURES}) + "\n")
    with open(RECORDS, "a") as file:
        file.write("".join(lines))


def best_rate(compare: CompareConfig, task: DemoTask) -> str:
    """Return the row of supervised training whose best evaluation on the first seed was best."""
    found = [one for row in SUPERVISED_ROWS for one in records_of(run_of(compare, task, compare.seeds[0], row))]
    return min((one for one in found if one["when"] == "best"), key=itemgetter("validation_mae"))["row"]


def stages(compare: CompareConfig) -> Iterator[list[Run]]:
    """Yield the runs in turn: those of a stage go side by side, once all before them are done."""
    run, first = partial(run_of, compare), compare.seeds[0]
    everywhere = [(task, seed) for task in compare.tasks for seed in [*compare.seeds, *compare.new_seeds]]
    yield [run(*place, BEFORE) for place in everywhere]
    rates = [run(task, first, row) for task in compare.tasks for row in SUPERVISED_ROWS]
    yield rates + [run(*place, OWN) for place in everywhere]
    yield [run(task, seed, best_rate(compare, task)) for task, seed in everywhere if seed != first]
    yield [run(*place, row) for place in everywhere if place[1] in compare.seeds for row in GRPO_ROWS if row != OWN]


def compare_all(compare: CompareConfig) -> None:
    """Do all runs that are not done."""
    with ThreadPoolExecutor(compare.jobs) as pool:
        for number, runs in enumerate(stages(compare), 1):
            list(tqdm(pool.map(do, runs), f"stage {number} of 4", len(runs), unit="run"))


def write(compare: CompareConfig, argv: list[str], is_complete: bool) -> None:
    """Write reward/RESULTS.md of what is done."""
    where = product(compare.tasks, [BEFORE, *SUPERVISED_ROWS, *GRPO_ROWS], [*compare.seeds, *compare.new_seeds])
    found = [records_of(run_of(compare, task, seed, row)) for task, row, seed in where]
    command = " ".join(["python -m grpo.demo.compare", *argv])
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}"
    lines = [
        "# Which reward teaches best",
        "",
        f"`{command}`, {time.strftime('%Y-%m-%d')}, on {machine}; each run on",
        "one core. Every model that was judged is a line of [`results.jsonl`](results.jsonl).",
        "",
        f"GRPO: {compare.steps} steps of the demo's settings, with the reward of its row. Supervised: cross-entropy on",
        f"the true answers, from the same warm start, {compare.supervised_steps} steps, with the learning rate whose",
        f"best evaluation on seed {compare.seeds[0]} was best. Last: after the last step. Best: after the step with",
        f"the best of {EVALUATIONS} evaluations on {demo.NUM_HELDOUT} hearts.",
        "",
        f"{demo.NUM_TRAIN} hearts to train on, greedy answers on {NUM_TEST} others; errors in points; mean ± standard",
        "deviation over seeds.",
        "",
    ]
    if not is_complete:
        lines += [f"{sum(map(bool, found))} runs are done; the same command continues with the others.", ""]
    lines += tables([one for records in found for one in records], compare.seeds, compare.new_seeds)
    by_hand = RESULTS.read_text().partition(BY_HAND)[2] if RESULTS.exists() else ""
    RESULTS.write_text("\n".join([*lines, BY_HAND]) + (by_hand or "\n"))


def main(argv: list[str]) -> int:
    """Compare; return 2, after one line, for what the user can fix."""
    try:
        compare = parse_flags(CompareConfig, argv, "python -m grpo.demo.compare")
        if len({*compare.seeds, *compare.new_seeds}) < len(compare.seeds) + len(compare.new_seeds):
            raise InputError("--seeds and --new_seeds must be different seeds")
        compare_all(compare)
        write(compare, argv, is_complete=True)
    except InputError as error:
        print(f"grpo.demo.compare: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        write(compare, argv, is_complete=False)
        print(f"interrupted: the same command continues; {RESULTS} has what is done", file=sys.stderr)
        return 130
    print(f"written to {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
