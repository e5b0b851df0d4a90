"""The tables of the comparison, from its records: `reward/RESULTS.md`."""

import os
import platform
import statistics
import time

from grpo.demo.compare_runs import FIGURES, ROOT, Run, record_of

RESULTS = ROOT / "reward" / "RESULTS.md"
BY_HAND = "## What the tables say"  # from this heading on, the results are written by hand and kept


def table(runs: list[Run]) -> list[str]:
    """Write a table of mean and standard deviation over seeds: of each kind of run that is done, a row."""
    lines = ["| | " + " | ".join(title for title, _ in FIGURES.values()) + " |", "|---" * (len(FIGURES) + 1) + "|"]
    for row in dict.fromkeys(run.row for run in runs):
        found = [record_of(run) for run in runs if run.row == row]
        if not all(found):
            continue
        cells = []
        for name, (_, digits) in FIGURES.items():
            values = [record[name] for record in found]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def by_seed(runs: list[Run]) -> list[str]:
    """Write a table of the mean error by seed, of each kind of run that all seeds have."""
    seeds = list(dict.fromkeys(run.seed for run in runs))
    lines = ["| MAE | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "|---" * (len(seeds) + 1) + "|"]
    for row in dict.fromkeys(run.row for run in runs):
        found = {run.seed: record_of(run) for run in runs if run.row == row}
        if len(found) == len(seeds) and any(found.values()):
            cells = [f"{record['mae']:.2f}" if (record := found[seed]) else "not done" for seed in seeds]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def write_results(runs: list[Run], new_seeds: list[int], conditions: list[str], command: str) -> None:
    """Write reward/RESULTS.md: the conditions, a paragraph, and the tables; what was written by hand in it stays."""
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}"
    records = [record for run in runs if (record := record_of(run))]
    dates = sorted({record["date"] for record in records}) or [time.strftime("%Y-%m-%d")]
    lines = [
        "# Which reward teaches best",
        "",
        f"`{command}`, {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}, on {machine}; each run on one core. Every",
        "run is a line of [`results.jsonl`](results.jsonl).",
        "",
        *conditions,
        "",
    ]
    if left := len(runs) - len(records):
        lines += [
            f"{left} of {len(runs)} runs are not done yet: the same command continues. Their rows have no means yet.",
            "",
        ]
    for task in dict.fromkeys(run.task for run in runs):
        own = [run for run in runs if run.task == task]
        old = [run for run in own if run.seed not in new_seeds]
        lines += [f"## {task}: seeds {', '.join(dict.fromkeys(str(run.seed) for run in old))}", "", *table(old), ""]
        if new_seeds:
            lines += [f"Mean error by seed; nothing was chosen on seeds {', '.join(map(str, new_seeds))}:", ""]
            lines += [*by_seed(own), ""]
    text = RESULTS.read_text() if RESULTS.exists() else ""
    kept = text[text.index(BY_HAND) :] if BY_HAND in text else f"{BY_HAND}\n"
    RESULTS.write_text("\n".join(lines) + "\n" + kept)
