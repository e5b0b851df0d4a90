"""The tables of the comparison, from its records: `reward/RESULTS.md`."""

import statistics

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


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Write a Markdown table."""
    first, *others = [f"| {' | '.join(line)} |" for line in [head, *rows]]
    return [first, "|---" * len(head) + "|", *others, ""]


def spread(values: list[float], digits: int) -> str:
    """Write mean and standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def tables(records: list[dict], seeds: list[int], new_seeds: list[int]) -> list[str]:
    """Write the tables of each task from the records of its runs; a row appears once all its seeds are there."""
    lines = []
    for task in dict.fromkeys(record["task"] for record in records):
        rows, of_rates = {}, []  # row -> seed -> record
        for record in records:
            if record["task"] == task:
                name = record["row"] + (f", {record['when']}" if record["validation_mae"] is not None else "")
                rows.setdefault(name, {})[record["seed"]] = record
                if (record["seed"], record["when"]) == (seeds[0], "best") and record["row"].startswith("supervised"):
                    of_rates.append(f"{record['row']}: {record['validation_mae']:.2f}")
        means = [
            [name, *(spread([found[seed][figure] for seed in seeds], n) for figure, (_, n) in FIGURES.items())]
            for name, found in rows.items()
            if found.keys() >= set(seeds)
        ]
        lines += [f"## {task}: seeds {', '.join(map(str, seeds))}", ""]
        lines += table(["", *(title for title, _ in FIGURES.values())], means)
        lines += [f"Error at the best evaluation of seed {seeds[0]}: {'; '.join(of_rates)}.", ""]
        if new_seeds:
            everywhere = [*seeds, *new_seeds]
            whole = {name: found for name, found in rows.items() if found.keys() >= set(everywhere)}
            cells = [[name, *(f"{found[seed]['mae']:.2f}" for seed in everywhere)] for name, found in whole.items()]
            lines += [f"Mean error by seed; nothing was chosen on seeds {', '.join(map(str, new_seeds))}:", ""]
            lines += table(["MAE", *(f"seed {seed}" for seed in everywhere)], cells)
    return lines
