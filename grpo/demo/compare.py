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

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tqdm import tqdm

from data.flags import parse_flags
from data.sample import InputError
from grpo.config import DEMO_DEFAULTS, Config, DemoTask
from grpo.demo.compare_runs import BEFORE, NUM_TEST, Run, do, prepare, record_of
from grpo.demo.compare_table import RESULTS, write_results
from grpo.demo.demo import NUM_TRAIN
from grpo.loss import ScaleRewards
from reward.flags import POSITIVE, Bounds, flag

REWARDS = {
    "original": ["numerical_video_reward"],
    "smooth": ["smooth_numerical_reward"],
    "smooth + 0.5 concordance": ["smooth_numerical_reward", "concordance_reward", "--reward_weights", "1", "0.5"],
}
GRPO_ROWS = {
    f"GRPO, {name}, {scale}": ["--reward_funcs", *flags, "--scale_rewards", scale]
    for name, flags in REWARDS.items()
    for scale in ScaleRewards.__args__
}
SCALE = DEMO_DEFAULTS.get("scale_rewards", Config.scale_rewards)
DEMOS_FLAGS = ["--reward_funcs", *DEMO_DEFAULTS["reward_funcs"], "--scale_rewards", SCALE]
(OWN,) = (row for row, flags in GRPO_ROWS.items() if flags == DEMOS_FLAGS)  # the row of the demo's own settings
EARLY, SAME_TIME, CONVERGED = "supervised, stopped early", "supervised, same time", "supervised, converged"
EARLY_STEPS = 100  # of supervised training that stops before it knows the training answers by heart


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
    supervised_steps: int = flag(600, "steps of supervised training until it has converged", POSITIVE)
    jobs: int = flag(os.cpu_count(), "runs side by side, each on one core", POSITIVE)


def grpo_runs(config: CompareConfig) -> list[Run]:
    """List the runs of GRPO: every row on the seeds, the demo's own settings on the new ones."""
    kinds = [(s, row) for s in config.seeds for row in GRPO_ROWS] + [(s, OWN) for s in config.new_seeds]
    return [Run(task, seed, row, GRPO_ROWS[row], config.steps) for task in config.tasks for seed, row in kinds]


def all_runs(config: CompareConfig) -> list[Run]:
    """List all runs, in the order of the table."""
    places = [(task, seed) for task in config.tasks for seed in [*config.seeds, *config.new_seeds]]
    before = [Run(*place, BEFORE, []) for place in places]
    early = [Run(*place, EARLY, [], EARLY_STEPS) for place in places]
    converged = [Run(*place, CONVERGED, [], config.supervised_steps) for place in places]
    grpo = grpo_runs(config)
    own = {(run.task, run.seed): run for run in grpo if run.row == OWN}
    same_time = [
        Run(*place, SAME_TIME, [], steps_in_the_time_of(record_of(own[place]), record_of(run)))
        for place, run in zip(places, converged, strict=True)
    ]
    return [*before, *grpo, *early, *same_time, *converged]


def steps_in_the_time_of(own: dict | None, converged: dict | None) -> int | None:
    """Return the steps of supervised training that take as long as the demo's own settings; None if not known yet."""
    if own is None or converged is None:
        return None
    return max(1, round(own["cpu_seconds"] / (converged["cpu_seconds"] / converged["steps"])))


def compare(config: CompareConfig) -> None:
    """Do all runs that are not done, those of the demo's own settings first."""
    runs, first = all_runs(config), (BEFORE, OWN, CONVERGED)
    with ThreadPoolExecutor(config.jobs) as pool, tqdm(total=len(runs), unit="run") as bar:

        def do_all(some: list[Run]) -> None:
            for _ in pool.map(lambda run: do(run, config.output_dir), some):
                bar.update()

        places = dict.fromkeys((run.task, run.seed) for run in runs if not record_of(run))
        list(pool.map(lambda place: prepare(*place, config.output_dir), places))
        # By place: supervised training is timed beside the GRPO whose time it gets. No machine is always equally fast.
        do_all(sorted((run for run in runs if run.row in first), key=lambda run: (run.task, run.seed)))
        do_all(sorted((run for run in all_runs(config) if run.row not in first), key=lambda run: run.row))


def write(config: CompareConfig, argv: list[str]) -> None:
    """Write reward/RESULTS.md of what is done."""
    conditions = [
        f"GRPO: {config.steps} steps of the demo's settings; its rows are reward, then `--scale_rewards`. Supervised:",
        f"cross-entropy on the true answers, from the same warm start: for {EARLY_STEPS} steps; for as much CPU time",
        f"as the demo's own settings ({OWN}) took, whose time to load and decode counts, too; for",
        f"{config.supervised_steps} steps, after which it knows the training answers by heart.",
        "",
        f"{NUM_TRAIN} hearts to train on, greedy answers on {NUM_TEST} others; errors in points; mean ± standard",
        "deviation over seeds.",
    ]
    write_results(all_runs(config), config.new_seeds, conditions, " ".join(["python -m grpo.demo.compare", *argv]))


def main(argv: list[str]) -> int:
    """Compare; return 2, after one line, for what the user can fix."""
    try:
        config = parse_flags(CompareConfig, argv, "python -m grpo.demo.compare")
        if len({*config.seeds, *config.new_seeds}) < len(config.seeds) + len(config.new_seeds):
            raise InputError("--seeds and --new_seeds must be different seeds")
        compare(config)
        write(config, argv)
    except InputError as error:
        print(f"grpo.demo.compare: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        write(config, argv)
        print(f"interrupted: the same command continues; {RESULTS} has what is done", file=sys.stderr)
        return 130
    print(f"written to {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
