"""The comparison of rewards: its runs, that it continues, and the table that it writes."""

import json
import os
import shutil
import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from data.sample import InputError
from grpo.demo import compare, compare_runs, compare_table
from grpo.demo.compare import OWN, CompareConfig, all_runs, grpo_runs, write
from grpo.demo.compare_runs import FIGURES, Run, call, do, record_of, settings_of
from grpo.demo.synthetic_echo import write_samples
from tests.conftest import children_of, make_tiny


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_table, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(compare_runs, "RECORDS", tmp_path / "results.jsonl")
    return CompareConfig(output_dir=str(tmp_path / "compare"), tasks=["easy"], seeds=[0, 1], new_seeds=[10], steps=1)


@pytest.fixture
def start(tmp_path, config):
    """What the demo leaves for a seed, with a tiny model and few samples in the place of its own."""
    tiny = make_tiny(tmp_path / "tiny", num_videos=(1,))
    folder = tmp_path / "compare" / "easy" / "seed-0" / "start"
    shutil.copytree(tiny.folder / "model", folder / "warm_start")
    for name in ("train", "test"):
        write_samples(folder / "data", name, 9, seed=0)
    return folder


def test_all_rewards_meet_all_scales_and_new_seeds_only_the_demos_settings(config):
    runs = grpo_runs(config)
    first = [run for run in runs if run.seed == 0]
    assert len(first) == 9 and len({run.row for run in first}) == 9 and len(runs) == 19
    assert [run.row for run in runs if run.seed == 10] == [OWN]
    assert OWN in {run.row for run in first}


def test_runs_are_trained_evaluated_recorded_and_not_done_twice(config, start):
    (run,) = [run for run in grpo_runs(config) if (run.seed, run.row) == (0, "GRPO, smooth + 0.5 concordance, none")]
    supervised = Run("easy", 0, compare.CONVERGED, [], steps=2)
    before, evaluation = Run("easy", 0, "before", []), run.folder(config.output_dir) / "eval"
    assert compare_runs.train(before, start, *[start.parent] * 2) == (start / "warm_start", 0.0)
    for some in (run, supervised, before):
        assert record_of(some) is None
        if some is not run:  # as if it had been interrupted after its evaluation, which is not done twice
            shutil.copytree(evaluation, some.folder(config.output_dir) / "eval")
        do(some, config.output_dir)
        metrics = json.loads((evaluation / "metrics.json").read_text())
        record = record_of(some)
        assert all(record[name] == metrics[name]["value"] for name in FIGURES) and record["mae"] >= 0
    resolved = json.loads((run.folder(config.output_dir) / "run" / "config.json").read_text())
    assert resolved["reward_funcs"] == ["smooth_numerical_reward", "concordance_reward"]
    assert resolved["reward_weights"] == [1.0, 0.5] and resolved["scale_rewards"] == "none"
    assert resolved["max_steps"] == 1 and resolved["temperature"] == 1.0  # the demo's
    assert record_of(run)["cpu_seconds"] > 1 and record_of(supervised)["cpu_seconds"] > 0.01
    shutil.rmtree(start.parent)  # as on another machine
    for some in (run, supervised):
        do(some, config.output_dir)
    assert not start.parent.exists() and len(compare_runs.RECORDS.read_text().splitlines()) == 3
    supervised.steps = 3
    with pytest.raises(InputError, match="results.jsonl.*: easy, seed 0, supervised, converged was made with"):
        do(supervised, config.output_dir)


def test_the_demos_own_rows_come_first_and_supervised_training_gets_their_time(config, monkeypatch):
    """The order of the runs, with none of them done in earnest."""
    order, prepared = [], []

    def done(run, output_dir):
        record = {"task": run.task, "seed": run.seed, "row": run.row, "settings": settings_of(run)}
        record |= {"steps": run.steps, "cpu_seconds": 200.0 if run.flags else 100.0}
        with open(compare_runs.RECORDS, "a") as file:
            file.write(json.dumps(record) + "\n")
        order.append(run)

    monkeypatch.setattr(compare, "do", done)
    monkeypatch.setattr(compare, "prepare", lambda *place: prepared.append(place))
    compare.compare(replace(config, jobs=1))
    assert prepared == [("easy", seed, config.output_dir) for seed in (0, 1, 10)]
    assert [run.row for run in order[:3]] == ["before", OWN, compare.CONVERGED]
    assert {run.seed for run in order[:3]} == {0} and len(order) == len(all_runs(config)) == 31
    same_time = [(run.seed, run.steps) for run in order if run.row == compare.SAME_TIME]
    assert same_time == [(0, 1200), (1, 1200), (10, 1200)]
    assert all(record_of(run) for run in all_runs(config))


def test_an_interrupted_run_does_not_count_as_trained(config, start):
    """A signal ends train.py in order, with exit code 0."""
    (run,) = [run for run in grpo_runs(replace(config, steps=1000)) if (run.seed, run.row) == (0, OWN)]
    folder = run.folder(config.output_dir)

    def interrupt():
        while not (folder / "run" / "rollouts.jsonl").exists():
            time.sleep(0.1)
        os.kill(children_of(os.getpid())[-1], signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(interrupt)
        with pytest.raises(InputError, match="train.py --.* … was interrupted: .*log"):
            do(run, config.output_dir)
        waiting.result()
    assert (folder / "run" / "config.json").exists()
    assert not (folder / "seconds.json").exists() and record_of(run) is None


def test_a_run_that_fails_names_its_log(tmp_path):
    with pytest.raises(InputError, match="-c .* … failed: .*log says why"):
        call(["-c", "import sys; sys.exit('no such flag')"], tmp_path / "log")
    assert (tmp_path / "log").read_text() == "no such flag\n"


def test_the_table_has_mean_and_spread_over_seeds_and_keeps_what_was_written_by_hand(config, tmp_path):
    compare_table.RESULTS.write_text(f"old\n\n{compare_table.BY_HAND}\n\n- this\n")
    runs = all_runs(config)
    for number, run in enumerate(runs):
        seconds = 200.0 if run.row == OWN else 100.0
        done = replace(run, steps=1200) if run.row == compare.SAME_TIME else run  # 600 steps took half of the time
        record = {"task": run.task, "seed": run.seed, "row": run.row, "settings": settings_of(done)}
        record |= {"date": "2026-01-02", "steps": done.steps, "cpu_seconds": seconds}
        record |= {name: number + 0.25 for name in FIGURES}
        with open(compare_runs.RECORDS, "a") as file:
            file.write(json.dumps(record) + "\n")
    write(config, ["--steps", "1"])
    text = compare_table.RESULTS.read_text()
    assert text.endswith(f"{compare_table.BY_HAND}\n\n- this\n") and "old" not in text
    assert "`python -m grpo.demo.compare --steps 1`, 2026-01-02, on" in text and "not done yet" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    both = [i for i, run in enumerate(runs) if run.row == OWN and run.seed < 2]
    mean, spread = statistics.mean(i + 0.25 for i in both), statistics.stdev(both)
    assert any(line.startswith(f"| {OWN} | {mean:.2f} ± {spread:.2f} | ") for line in rows)
    cells = [cell.strip() for line in rows for cell in line.strip("|").split("|")]
    assert sum(cell == "" for cell in cells) == 1 and len(rows) == 1 + 1 + 9 + 3 + 1 + 5  # empty: above the rows' names
    new = [i for i, run in enumerate(runs) if run.row == OWN]
    assert "| " + " | ".join([OWN, *(f"{i + 0.25:.2f}" for i in new)]) + " |" in rows
    # Of a row that is not whole there are no means.
    lines = compare_runs.RECORDS.read_text().splitlines(keepends=True)
    compare_runs.RECORDS.write_text("".join(line for line in lines if OWN not in line or '"seed": 1,' not in line))
    write(config, [])
    text = compare_table.RESULTS.read_text()
    assert "2 of 31 runs are not done yet" in text  # the time of GRPO is that of supervised training, too
    cells = [f"{new[0] + 0.25:.2f}", "not done", f"{new[2] + 0.25:.2f}"]
    assert [line for line in text.splitlines() if f"| {OWN} |" in line] == ["| " + " | ".join([OWN, *cells]) + " |"]
    with open(compare_runs.RECORDS, "a") as file:
        file.write('{"task": "ea')  # as a full disk leaves it
    with pytest.raises(InputError, match="results.jsonl': line 31 is damaged .*: remove it"):
        record_of(runs[0])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tasks", "harder"], "--tasks harder: name easy"),
        (["--tasks", "easy", "easy"], "--tasks"),
        (["--steps", "0"], "--steps"),
        (["--new_seeds", "0"], "--new_seeds"),
    ],
)
def test_bad_flags_are_one_line(flags, words, capsys):
    assert compare.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("grpo.demo.compare: error: ") and words in line
