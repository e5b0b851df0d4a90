"""TensorBoard's page: which evaluation is the best, the layout, and a disk that is full for a while."""

import json
import re
import resource
import signal
from contextlib import redirect_stderr, redirect_stdout
from typing import get_args

import pytest
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from grpo.config import BestModelMetric, Config
from grpo.ranks import start_processes
from grpo.run.resume import ResumeState
from grpo.run.tracking import GOODNESS, Tracker, charts
from tests.conftest import run_ranks
from tests.test_train import curves, flags


@pytest.mark.parametrize("metric", get_args(BestModelMetric))
def test_each_figure_knows_which_way_is_better(metric):
    errors = ("eval/mae", "eval/median_error", "eval/rmse", "eval/bias")
    assert (GOODNESS[metric](1.0) > GOODNESS[metric](2.0)) == (metric in errors)


def test_of_a_bias_only_the_size_counts():
    goodness = GOODNESS["eval/bias"]
    assert goodness(-1.0) > goodness(2.0) and goodness(1.0) > goodness(-2.0) > goodness(-3.0)


def test_where_the_metric_is_undefined_a_line_says_that_no_model_is_the_best(tiny, tmp_path, capsys):
    (tmp_path / "one.json").write_text(json.dumps(json.loads((tiny.folder / "data.json").read_text())[:1]))
    held = ["--eval_data_path", tmp_path / "one.json", "--eval_steps", "1", "--max_steps", "2"]
    assert train.main(flags(tiny, tmp_path / "out", *held, "--metric_for_best_model", "eval/pearson")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "eval/pearson is undefined" in line]
    assert [line[:7] for line in lines] == ["step 1:", "step 2:"] and "--metric_for_best_model" in lines[0]
    assert not (tmp_path / "out" / "best").exists()


@pytest.mark.parametrize("kind", [[], ["--supervised"]], ids=["GRPO", "supervised"])
def test_the_layout_names_curves_that_a_run_draws(tiny, tmp_path, kind):
    data = tiny.folder / "data.json"
    assert train.main(flags(tiny, tmp_path / "out", "--eval_data_path", data, "--max_steps", "1", *kind)) == 0
    drawn = curves(tmp_path / "out")
    undefined = {"eval/sd_ratio", "eval/ccc", "eval/r2"}  # where all truths or answers are equal
    for titles in charts(bool(kind)).values():
        for title, (_, patterns) in titles.items():
            shown = [tag for tag in drawn for pattern in patterns if re.match(pattern, tag)]
            assert shown or undefined & {pattern.strip("^$") for pattern in patterns}, title
            assert kind or len({*shown, *undefined}) >= len(patterns), title
    assert ("loss" in charts(bool(kind))["overview"]) == bool(kind)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_what_cannot_move_is_not_drawn(tiny, tmp_path):
    for iterations in (1, 2):
        output = tmp_path / str(iterations)
        more = ["--num_iterations", str(iterations), "--max_steps", "1"]
        assert train.main(flags(tiny, output, *more)) == 0
        assert any(tag.startswith("clip_ratio/") for tag in curves(output)) == (iterations > 1)


def write_curve(output: str, log: str) -> None:
    with open(log, "w") as file, redirect_stdout(file), redirect_stderr(file):
        write_nine_steps(output)


def write_nine_steps(output: str) -> None:
    start_processes()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    tracker = Tracker(Config(output_dir=output), 9, ResumeState({}), None)
    for step in range(1, 10):
        limit = 1000 if 4 <= step <= 6 else -1  # no file may grow beyond so many bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        tracker.write(lambda writer, step=step: writer.add_scalar("loss", step, step), step)
    tracker.close()
    dist.destroy_process_group()


def test_a_full_disk_leaves_a_gap_in_the_curves_and_a_line(tmp_path):
    run_ranks(write_curve, 1, str(tmp_path), str(tmp_path / "log"))
    assert curves(tmp_path)["loss"] == [1, 2, 3, 7, 8, 9]
    printed = (tmp_path / "log").read_text()
    (line,) = [line for line in printed.splitlines() if "cannot be written" in line]
    assert line.startswith("step 4: curves and completions cannot be written") and "Traceback" not in printed
