"""The comparison of rewards: its runs, that it continues, and the table that it writes."""

import json
import shutil
import statistics

import pytest

from grpo.demo import compare
from grpo.demo.compare import CompareConfig, Run, call, figures_of, grpo_runs, own_row, seconds_of, write_results
from grpo.demo.synthetic_echo import write_samples
from tests.conftest import make_tiny


@pytest.fixture
def config(tmp_path):
    return CompareConfig(output_dir=str(tmp_path / "compare"), tasks=["easy"], seeds=[0, 1], new_seeds=[10], steps=1)


@pytest.fixture
def start(tmp_path, config):
    """What the demo leaves for a seed, with a tiny model and few samples in the place of its own."""
    tiny = make_tiny(tmp_path / "tiny", num_videos=(1,))
    folder = tmp_path / "compare" / "easy" / "seed-0" / "start"
    shutil.copytree(tiny.folder / "model", folder / "warm_start")
    for name in ("train", "heldout"):
        write_samples(folder / "data", name, 9, seed=0)
    return folder


def test_all_rewards_meet_all_scales_and_new_seeds_only_the_demos_settings(config):
    runs = grpo_runs(config)
    first = [run for run in runs if run.seed == 0]
    assert len(first) == 9 and len({run.row for run in first}) == 9 and len(runs) == 19
    assert [run.row for run in runs if run.seed == 10] == [own_row()]
    assert own_row() in {run.row for run in first}


def test_runs_are_trained_evaluated_and_not_done_twice(config, start):
    (run,) = [run for run in grpo_runs(config) if (run.seed, run.row) == (0, "GRPO, smooth + 0.5 concordance, none")]
    supervised = Run("easy", 0, "supervised, converged", [], steps=2)
    for some in (run, supervised, Run("easy", 0, "before", [])):
        compare.train_and_evaluate(some, config)
        assert figures_of(some, config)["mae"] >= 0
    resolved = json.loads((run.folder(config) / "config.json").read_text())
    assert resolved["reward_funcs"] == ["smooth_numerical_reward", "concordance_reward"]
    assert resolved["reward_weights"] == [1.0, 0.5] and resolved["scale_rewards"] == "none"
    assert resolved["max_steps"] == 1 and resolved["temperature"] == 1.0  # the demo's
    assert seconds_of(run, config) > 1 and seconds_of(supervised, config) > 0.01
    written = {path: path.stat().st_mtime_ns for path in start.parent.rglob("*") if path.is_file()}
    for some in (run, supervised):
        compare.train_and_evaluate(some, config)
    assert written == {path: path.stat().st_mtime_ns for path in start.parent.rglob("*") if path.is_file()}


def test_a_run_that_fails_names_its_log(tmp_path, capsys):
    with pytest.raises(compare.InputError, match="train.py --demo --no_such_flag … failed: .*log says why"):
        call(["train.py", "--demo", "--no_such_flag"], tmp_path / "log")
    assert "unknown flag '--no_such_flag'" in (tmp_path / "log").read_text()


def test_the_table_has_mean_and_spread_over_seeds_and_keeps_what_was_written_by_hand(config, tmp_path, monkeypatch):
    results = tmp_path / "RESULTS.md"
    monkeypatch.setattr(compare, "RESULTS", results)
    results.write_text("old\n\n## What did not work\n\n- this\n")
    runs = grpo_runs(config)
    for row in ("before", *compare.SUPERVISED):
        runs += [Run("easy", seed, row, []) for seed in (0, 1, 10)]
    for number, run in enumerate(runs):
        folder = run.folder(config) / "eval"
        folder.mkdir(parents=True)
        values = {name: {"value": number + 0.25} for name in compare.FIGURES}
        (folder / "metrics.json").write_text(json.dumps(values))
    write_results(runs, config, ["--steps", "1"])
    text = results.read_text()
    assert text.endswith("## What did not work\n\n- this\n") and "old" not in text
    assert "`python -m grpo.demo.compare --steps 1`" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    both = [i for i, run in enumerate(runs) if run.row == own_row() and run.seed < 2]
    mean, spread = statistics.mean(i + 0.25 for i in both), statistics.stdev(both)
    assert any(line.startswith(f"| {own_row()} | {mean:.2f} ± {spread:.2f} | ") for line in rows)
    cells = [cell.strip() for line in rows for cell in line.strip("|").split("|")]
    assert sum(cell == "" for cell in cells) == 1  # above the names of the rows
    new = [i for i, run in enumerate(runs) if run.row == own_row()]
    assert "| " + " | ".join([own_row(), *(f"{i + 0.25:.2f}" for i in new)]) + " |" in rows


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tasks", "harder"], "--tasks 'harder'"),
        (["--steps", "0"], "--steps"),
        (["--new_seeds", "0"], "--new_seeds"),
    ],
)
def test_bad_flags_are_one_line(flags, words, capsys):
    assert compare.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("grpo.demo.compare: error: ") and words in line
