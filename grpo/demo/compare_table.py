"""The tables of the comparison, from its records: `reward/RESULTS.md`."""

import os
import platform
import statistics
import time

from grpo.demo.compare_runs import FIGURES, ROOT, Run, record_of

RESULTS = ROOT / "reward" / "RESULTS.md"
BY_HAND = "## What the tables say"  # from this heading on, the results are written by hand and kept


def table(head: list[str], rows: dict[str, list[str]]) -> list[str]:
    """Write a Markdown table."""
    lines = [head, *([row, *cells] for row, cells in rows.items())]
    first, *others = [f"| {' | '.join(line)} |" for line in lines]
    return [first, "|---" * len(head) + "|", *others]


def means(runs: list[Run]) -> dict[str, list[str]]:
    """Return mean and standard deviation over seeds of every figure, for each row whose runs are all done."""
    rows = {}
    for row in dict.fromkeys(run.row for run in runs):
        found = [record_of(run) for run in runs if run.row == row]
        if not all(found):
            continue
        rows[row] = []
        for name, (_, digits) in FIGURES.items():
            values = [record[name] for record in found]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            rows[row].append(f"{statistics.mean(values):.{digits}f}{spread}")
    return rows


def by_seed(runs: list[Run], seeds: list[int]) -> dict[str, list[str]]:
    """Return the mean error by seed, for each row that all seeds have."""
    rows = {}
    for row in dict.fromkeys(run.row for run in runs):
        found = [record_of(run) for run in runs if run.row == row]
        if len(found) == len(seeds) and any(found):
            rows[row] = [f"{record['mae']:.2f}" if record else "not done" for record in found]
    return rows


def write_results(runs: list[Run], new_seeds: list[int], conditions: list[str], command: str) -> None:
    """Write reward/RESULTS.md: the conditions, a paragraph, and the tables; what was written by hand in it stays."""
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}"
    records = [record for run in runs if (record := record_of(run))]
    dates = sorted({record["date"] for record in records}) or [time.strftime("%Y-%m-%d")]
    days = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    lines = ["# Which reward teaches best", "", f"`{command}`, {days}, on {machine}; each run on one core. Every"]
    lines += ["run is a line of [`results.jsonl`](results.jsonl).", "", *conditions, ""]
    if left := len(runs) - len(records):
        not_done = f"{left} of {len(runs)} runs are not done yet: the same command continues."
        lines += [f"{not_done} Their rows have no means yet.", ""]
    for task in dict.fromkeys(run.task for run in runs):
        own = [run for run in runs if run.task == task]
        old = [run for run in own if run.seed not in new_seeds]
        lines += [f"## {task}: seeds {', '.join(dict.fromkeys(str(run.seed) for run in old))}", ""]
        lines += [*table(["", *(title for title, _ in FIGURES.values())], means(old)), ""]
        if new_seeds:
            seeds = list(dict.fromkeys(run.seed for run in own))
            lines += [f"Mean error by seed; nothing was chosen on seeds {', '.join(map(str, new_seeds))}:", ""]
            lines += [*table(["MAE", *(f"seed {seed}" for seed in seeds)], by_seed(own, seeds)), ""]
    text = RESULTS.read_text() if RESULTS.exists() else ""
    kept = text[text.index(BY_HAND) :] if BY_HAND in text else f"{BY_HAND}\n"
    RESULTS.write_text("\n".join(lines) + "\n" + kept)
