"""What an evaluation leaves: metrics.json, pictures, and a table on the screen."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.sample import InputError, Sample, writing
from grpo.evaluate.answer import Prediction, answers_of
from grpo.evaluate.metrics import NUM_RESAMPLES, best_answers, figures, median_answers
from grpo.evaluate.pictures import pictures
from grpo.run.scoring import Scorer, score_texts
from reward.zero_skill import constant_rewards


def report(config, settings: dict, samples: Sequence[Sample], done: dict[str, Prediction], scorer: Scorer) -> None:
    """Write metrics.json and the pictures, and print the table. Raise InputError.

    config: the flags of the command; done: the predictions, by id.
    """
    answered = [sample for sample in samples if sample.id in done]
    used = [sample for sample in answered if done[sample.id].truth_number is not None]
    if not used:
        raise InputError(
            f"--data_path {' '.join(config.data_path)!r}: no sample with a number in its truth could be answered"
        )
    predictions = [done[sample.id] for sample in used]
    truths = np.array([prediction.truth_number for prediction in predictions])
    constants = constant_rewards(scorer.functions, used, truths, scorer.keys)
    answers = answers_of(predictions, constants, config.valid_range)
    ways = {"greedy" if not config.temperature else "single": answers}
    if config.num_samples > 1:
        medians = median_answers(answers)  # (n, 1)
        texts = ["" if np.isnan(number) else f"{number:g}%" for number in medians[:, 0]]
        rewards = score_texts(scorer, used, texts)[:, None]
        is_stopped = answers.is_stopped.all(axis=1, keepdims=True)
        of_median = replace(answers, numbers=medians, rewards=rewards, is_stopped=is_stopped)
        ways[f"median of {config.num_samples}"] = of_median
        ways[f"best of {config.num_samples}"] = best_answers(answers)
    found = {way: figures(given, config.cuts, NUM_RESAMPLES) for way, given in ways.items()}
    main, *others = found
    left_out, without_number = len(samples) - len(answered), len(answered) - len(used)
    metrics = {
        "model_id": config.model_id,
        "adapter": config.adapter,
        "data_path": config.data_path,
        "settings": settings,
        "samples": len(samples),
        "samples_left_out": left_out,
        "samples_without_true_number": without_number,
        "answers": main,
        **found[main],
        **{way.replace(" ", "_"): found[way] for way in others},
    }
    title, output = ", ".join(Path(path).name for path in config.data_path), Path(config.output_dir)
    with writing("output_dir", config.output_dir):  # all of it is made of predictions.jsonl, by the same command again
        unfinished = output / "metrics.json.unfinished"  # a full disk leaves the figures that are there
        unfinished.write_text(json.dumps(metrics, indent=2) + "\n")
        os.replace(unfinished, output / "metrics.json")
        for name, figure in pictures(answers, found[main], config.cuts, title).items():
            figure.savefig(output / f"{name}.png")
    print("\n" + table(found))
    if left_out:
        print(f"{left_out} samples left out, for their videos")
    if without_number:
        print(f"{without_number} samples not in the figures, since their truth has no number")
    print(f"written to {output}")


def table(found: dict[str, dict]) -> str:
    """Write the figures, named as in metrics.json, with the 95 % intervals; a column for each way of answering."""
    lines = [f"{'':20}" + "".join(f"{way:>14}{'95 % interval':>20}" for way in found)]
    for name in next(iter(found.values())):
        lines.append(f"{name:20}")
        for figure in (figures_of_way[name] for figures_of_way in found.values()):
            low, high = figure["low"], figure["high"]
            interval = "" if low is None or low == high else f"{number(low)} to {number(high)}"
            lines[-1] += f"{number(figure['value']):>14}{interval:>20}"
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Write a figure with up to three decimals."""
    return "undefined" if value is None else f"{value:.0f}" if value == int(value) else f"{value:.3f}"
