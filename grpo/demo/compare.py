"""Compare rewards, and GRPO with supervised training on the answers it is rewarded by: `reward/RESULTS.md`.

    python -m grpo.demo.compare

For each of the demo's tasks and each seed: the same hearts and the same warm start; supervised training on the true
answers; and GRPO, with each reward. The demo's own settings, and supervised training, also on seeds that nothing was
chosen on. Each run is evaluated ten times on the demo's held-out hearts, and judged twice, by greedy answers to 768
hearts of their own: at its last step, and at the step that was best on the held-out ones (`best/`). Supervised training
tries three learning rates on the first seed, and takes the one whose best evaluation was best.

Runs go side by side, each on one core. What is judged is a line of `reward/results.jsonl`, with all that decides it,
and is not done again: the same command continues where it was interrupted, on another machine, too.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tqdm import tqdm

from data.flags import parse_flags
from data.sample import InputError
from grpo.config import DEMO_DEFAULTS, Config, DemoTask, parse_config
from grpo.demo import demo
from grpo.demo.compare_table import FIGURES, tables, write_results
from grpo.demo.synthetic_echo import write_samples
from reward.flags import POSITIVE, Bounds, flag

ROOT = Path(__file__).parents[2]
RECORDS, RESULTS = ROOT / "reward" / "results.jsonl", ROOT / "reward" / "RESULTS.md"
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
# Flags that decide nothing, or say where something lies.
NOT_DECISIVE = {"model_id", *(field.name for field in dataclasses.fields(Config) if field.metadata["may_change"])}
NOT_DECISIVE -= {"max_steps", "eval_steps"}


def are_tasks(tasks: list[str]) -> bool:
    """Say whether these are tasks of the demo, each named once."""
    return len(set(tasks)) == len(tasks) and set(tasks) <= set(DemoTask.__args__)


@dataclass
class CompareConfig:
    """The flags."""

    heading = "runs"
    output_dir: str = flag("output/compare", "folder for the models of all runs")
    tasks: list[str] = flag(["easy", "hard"], "tasks of the demo", Bounds(are_tasks, "name easy, hard, or both"))
    seeds: list[int] = flag([0, 1, 2], "seeds on which all rows are compared", Bounds(bool, "name a seed"))
    new_seeds: list[int] = flag([10, 11, 12], "seeds for the demo's own settings and supervised training alone")
    steps: int = flag(DEMO_DEFAULTS["max_steps"], "steps of GRPO", POSITIVE)
    supervised_steps: int = flag(600, "steps of supervised training", POSITIVE)
    jobs: int = flag(os.cpu_count(), "runs side by side, each on one core", POSITIVE)


@cache
def demo_config() -> Config:
    """Return the flags of the demo, for one core that nobody watches."""
    return parse_config("--demo --dataloader_num_workers 0 --logging_steps 10".split())


@dataclass(frozen=True)
class Run:
    """A model that is trained."""

    task: DemoTask
    seed: int
    row: str  # of the table

    def flags(self, compare: CompareConfig) -> Config:
        """Return its flags of train.py."""
        place = Path(compare.output_dir, self.task, f"seed-{self.seed}").absolute()
        own = {"demo_task": self.task, "seed": self.seed, "output_dir": str(place)}
        config = dataclasses.replace(demo_config(), frame_cache=str(place / "frames"), **own)
        warm_start, grpo = demo.flags_of_warm_start(config), demo.flags_of_grpo(config)
        if self.row == BEFORE:
            return warm_start
        how = {"output_dir": str(place / self.row.replace(" ", "_")), "resume_from_checkpoint": "auto"}
        if self.row in SUPERVISED_ROWS:
            config, steps, own = warm_start, compare.supervised_steps, SUPERVISED_ROWS[self.row]
            how |= {name: getattr(grpo, name) for name in ("model_id", "data_path", "eval_data_path")}
        else:
            config, steps, own = grpo, compare.steps, GRPO_ROWS[self.row]
        how |= {"max_steps": steps, "eval_steps": max(1, steps // EVALUATIONS), "eval_on_start": False}
        return dataclasses.replace(config, **how, **own)

    def settings(self, compare: CompareConfig) -> dict:
        """Return what decides its result, beside task and seed."""
        flags = vars(self.flags(compare))
        start = {name: getattr(demo, name) for name in ("NUM_CARELESS", "NUM_TRAIN", "WARM_START_STEPS", "SUPERVISED")}
        return start | {name: flags[name] for name in sorted(flags.keys() - NOT_DECISIVE)}


def records_of(run: Run, compare: CompareConfig) -> list[dict]:
    """Return what is recorded of a run with these settings: at its last step, and at its best one."""
    lines, found = RECORDS.read_text().splitlines() if RECORDS.exists() else [], []
    wanted = {"task": run.task, "seed": run.seed, "row": run.row, "settings": run.settings(compare)}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{str(RECORDS)!r}: line {number} is damaged ({error}): remove it") from error
        if all(record.get(name) == value for name, value in wanted.items()):
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


def prepare(run: Run, compare: CompareConfig) -> None:
    """Draw the hearts of a task and seed, those on which models are compared, too, and make its untrained model."""
    folder = Path(run.flags(compare).output_dir).parent
    if not (folder / "data" / "test.json").exists():
        demo.make_start(folder, run.task, run.seed)
        write_samples(folder / "data", "test", NUM_TEST, run.seed, run.task)


def do(run: Run, compare: CompareConfig) -> None:
    """Train a model, let it answer the hearts of the test, and record the figures, unless that is done."""
    if records_of(run, compare):
        return
    config = run.flags(compare)
    output, log = Path(config.output_dir), Path(f"{config.output_dir}.log")
    call(demo.command_of(config), log)
    if not (output / "final").exists():  # a signal ends train.py in order
        raise InputError(f"train.py was interrupted: {log}")
    progress = json.loads((output / "final" / "progress.json").read_text())
    record = {"task": run.task, "seed": run.seed, "row": run.row, "settings": run.settings(compare)}
    record["date"], lines = time.strftime("%Y-%m-%d"), []
    for when, step in {"last": progress["step"], "best": progress["best_step"]}.items():
        if step is None:  # the warm start is not evaluated
            continue
        model = ["--model_id", str(output / ("final" if when == "last" else "best"))]
        data = ["--data_path", str(output.parent / "data" / "test.json"), "--output_dir", str(output / f"eval-{when}")]
        call(["-m", "grpo.evaluate", "--run", str(output), *model, *data], log)
        metrics = json.loads((output / f"eval-{when}" / "metrics.json").read_text())
        (validated,) = [one["eval/mae"] for one in progress["evaluations"] if one["step"] == step] or [None]
        figures = {name: metrics[name]["value"] for name in FIGURES}
        lines.append(json.dumps(record | {"when": when, "step": step, "validation_mae": validated} | figures) + "\n")
    with open(RECORDS, "a") as file:
        file.write("".join(lines))


def best_rate(task: DemoTask, compare: CompareConfig) -> str:
    """Return the row of supervised training whose best evaluation on the first seed was best."""

    def validation_mae(row: str) -> float:
        (best,) = [one for one in records_of(Run(task, compare.seeds[0], row), compare) if one["when"] == "best"]
        return best["validation_mae"]

    return min(SUPERVISED_ROWS, key=validation_mae)


def stages(compare: CompareConfig) -> Iterator[list[Run]]:
    """Yield the runs in turn: those of a stage go side by side, once all before them are done."""
    everywhere = [(task, seed) for task in compare.tasks for seed in [*compare.seeds, *compare.new_seeds]]
    yield [Run(*place, BEFORE) for place in everywhere]
    rates = [Run(task, compare.seeds[0], row) for task in compare.tasks for row in SUPERVISED_ROWS]
    yield [*rates, *(Run(*place, OWN) for place in everywhere)]
    rows = {task: best_rate(task, compare) for task in compare.tasks}
    yield [Run(task, seed, rows[task]) for task, seed in everywhere if seed != compare.seeds[0]]
    yield [Run(*place, row) for place in everywhere if place[1] in compare.seeds for row in GRPO_ROWS if row != OWN]


def compare_all(compare: CompareConfig) -> None:
    """Do all runs that are not done."""
    with ThreadPoolExecutor(compare.jobs) as pool, tqdm(unit="run", total=num_runs(compare)) as bar:
        for number, runs in enumerate(stages(compare)):
            if number == 0:
                list(pool.map(lambda run: prepare(run, compare), [run for run in runs if not records_of(run, compare)]))
            for _ in pool.map(lambda run: do(run, compare), runs):
                bar.update()


def num_runs(compare: CompareConfig) -> int:
    """Count the runs of all stages."""
    seeds, places = len(compare.seeds), len(compare.seeds) + len(compare.new_seeds)
    return len(compare.tasks) * (3 * places + len(RATES) - 1 + seeds * (len(GRPO_ROWS) - 1))


def write(compare: CompareConfig, argv: list[str]) -> None:
    """Write reward/RESULTS.md of what is done."""
    rows = [BEFORE, *SUPERVISED_ROWS, *GRPO_ROWS]
    runs = [Run(task, seed, row) for task in compare.tasks for row in rows for seed in compare.seeds]
    runs += [Run(task, seed, row) for task in compare.tasks for row in rows for seed in compare.new_seeds]
    found = [records_of(run, compare) for run in runs]
    left = num_runs(compare) - sum(map(bool, found))
    conditions = [
        f"GRPO: {compare.steps} steps of the demo's settings, with the reward of its row. Supervised: cross-entropy on",
        f"the true answers, from the same warm start, {compare.supervised_steps} steps, with the learning rate whose",
        f"best evaluation on seed {compare.seeds[0]} was best. Last: after the last step. Best: after the step with",
        f"the best of {EVALUATIONS} evaluations on {demo.NUM_HELDOUT} hearts.",
        "",
        f"{demo.NUM_TRAIN} hearts to train on, greedy answers on {NUM_TEST} others; errors in points; mean ± standard",
        "deviation over seeds.",
    ]
    if left:
        conditions += ["", f"{left} of {num_runs(compare)} runs are not done yet: the same command continues."]
    text = tables([one for records in found for one in records], compare.seeds, compare.new_seeds)
    write_results(RESULTS, " ".join(["python -m grpo.demo.compare", *argv]), conditions, text)


def main(argv: list[str]) -> int:
    """Compare; return 2, after one line, for what the user can fix."""
    try:
        compare = parse_flags(CompareConfig, argv, "python -m grpo.demo.compare")
        if len({*compare.seeds, *compare.new_seeds}) < len(compare.seeds) + len(compare.new_seeds):
            raise InputError("--seeds and --new_seeds must be different seeds")
        compare_all(compare)
        write(compare, argv)
    except InputError as error:
        print(f"grpo.demo.compare: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        write(compare, argv)
        print(f"interrupted: the same command continues; {RESULTS} has what is done", file=sys.stderr)
        return 130
    print(f"written to {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
