"""The comparison of rewards: its runs, that it continues, and the table that it writes."""

import dataclasses
import json
import shutil

import pytest

import train
from data.sample import InputError
from grpo.demo import compare
from grpo.demo.compare import (
    BEFORE,
    BY_HAND,
    OWN,
    CompareConfig,
    Run,
    call,
    compare_all,
    do,
    records_of,
    run_of,
    write,
)
from grpo.demo.compare_table import FIGURES
from grpo.evaluate import __main__ as evaluate

RATE = next(iter(compare.SUPERVISED_ROWS))


@pytest.fixture
def config(tmp_path, monkeypatch) -> CompareConfig:
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(compare, "RECORDS", tmp_path / "results.jsonl")
    return CompareConfig(output_dir=str(tmp_path / "compare"), tasks=["easy"], seeds=[0, 1], new_seeds=[10], steps=1)


@pytest.fixture
def small(monkeypatch) -> None:
    """Few hearts and steps, and a small model; train.py and grpo.evaluate in this process."""
    sizes = {"NUM_CARELESS": 8, "NUM_TRAIN": 8, "NUM_HELDOUT": 4, "WARM_START_STEPS": 2, "HIDDEN_SIZE": 64, "LAYERS": 2}
    for name, size in sizes.items():
        monkeypatch.setattr(compare.demo, name, size)
    monkeypatch.setattr(compare, "NUM_TEST", 4)

    def call_here(arguments, log):
        program, *flags = arguments
        assert (train.main(flags) if program == "train.py" else evaluate.main(flags[1:])) == 0

    monkeypatch.setattr(compare, "call", call_here)


def lines() -> list[dict]:
    return [json.loads(line) for line in compare.RECORDS.read_text().splitlines()]


def test_runs_are_trained_judged_at_their_last_and_best_step_recorded_and_not_done_twice(config, small, tmp_path):
    config.supervised_steps = 2
    runs = [run_of(config, "easy", 0, row) for row in (BEFORE, RATE, "GRPO, smooth + 0.5 concordance")]
    for run in runs:
        assert records_of(run) == []
        do(run)
        do(run)
    found = lines()
    assert [(one["row"], one["when"], one["step"]) for one in found if one["when"] == "last"] == [
        (BEFORE, "last", 2),
        (RATE, "last", 2),
        ("GRPO, smooth + 0.5 concordance", "last", 1),
    ]
    assert [one["row"] for one in found if one["when"] == "best"] == [run.row for run in runs[1:]]
    folder = tmp_path / "compare" / "easy" / "seed-0"
    for one in found:
        output = folder / ("warm_start" if one["row"] == BEFORE else one["row"].replace(" ", "_"))
        metrics = json.loads((output / f"eval-{one['when']}" / "metrics.json").read_text())
        assert all(one[name] == metrics[name]["value"] for name in FIGURES) and metrics["samples"] == 4
        progress = json.loads((output / "final" / "progress.json").read_text())
        if one["when"] == "best":
            assert one["validation_mae"] == min(e["eval/mae"] for e in progress["evaluations"])
    resolved = json.loads((folder / "GRPO,_smooth_+_0.5_concordance" / "config.json").read_text())
    assert resolved["reward_funcs"] == ["smooth_numerical_reward", "concordance_reward"]
    assert resolved["reward_weights"] == [1.0, 0.5] and resolved["temperature"] == 1.0  # the demo's
    supervised = json.loads((folder / RATE.replace(" ", "_") / "config.json").read_text())
    assert supervised["supervised"] and supervised["learning_rate"] == compare.RATES[0]
    assert supervised["model_id"] == resolved["model_id"] == str(folder / "warm_start" / "final")
    config.supervised_steps = 3  # another run, which is not done
    left = [records_of(run_of(config, "easy", 0, run.row)) == [] for run in runs]
    assert left == [False, True, False]


def test_on_another_machine_the_warm_start_is_made_again_and_not_recorded_twice(config, small, tmp_path):
    warm_start, other = run_of(config, "easy", 0, BEFORE), run_of(config, "easy", 0, OWN)
    do(warm_start)
    found = lines()
    shutil.rmtree(config.output_dir)
    for run in (warm_start, other):
        do(run)
    assert lines()[: len(found)] == found and {one["row"] for one in lines()[len(found) :]} == {OWN}


@pytest.fixture
def done(config, monkeypatch) -> list[Run]:
    """The runs in the order in which they are done, none of them in earnest; the second rate is the best."""
    order = []

    def record(run: Run) -> None:
        order.append(run)
        rate = list(compare.SUPERVISED_ROWS).index(run.row) if run.row in compare.SUPERVISED_ROWS else 0
        figures = {name: len(order) + 0.25 for name in FIGURES}
        one = run.key | {"step": 1, "validation_mae": None if run.row == BEFORE else abs(rate - 1.0)} | figures
        with open(compare.RECORDS, "a") as file:
            for when in ("last",) if run.row == BEFORE else ("last", "best"):
                file.write(json.dumps(one | {"when": when}) + "\n")

    monkeypatch.setattr(compare, "do", record)
    compare_all(dataclasses.replace(config, jobs=1))
    return order


def test_rates_are_tried_on_the_first_seed_and_new_seeds_have_the_demos_own_settings_alone(config, done):
    assert [(run.seed, run.row) for run in done[:3]] == [(seed, BEFORE) for seed in (0, 1, 10)]
    trained = done[3:]
    assert [(run.seed, run.row) for run in trained[:3]] == [(0, row) for row in compare.SUPERVISED_ROWS]
    assert [(run.seed, run.row) for run in trained[3:6]] == [(seed, OWN) for seed in (0, 1, 10)]
    chosen = list(compare.SUPERVISED_ROWS)[1]
    assert [(run.seed, run.row) for run in trained[6:8]] == [(1, chosen), (10, chosen)]
    others = [row for row in compare.GRPO_ROWS if row != OWN]
    assert [(run.seed, run.row) for run in trained[8:]] == [(seed, row) for seed in (0, 1) for row in others]
    assert len(done) == 17


def test_the_table_has_no_empty_cell_and_keeps_what_was_written_by_hand(config, done):
    compare.RESULTS.write_text(f"old\n\n{BY_HAND}\n\n- this\n")
    write(config, ["--steps", "1"], is_complete=True)
    text = compare.RESULTS.read_text()
    assert text.endswith(f"{BY_HAND}\n\n- this\n") and "old" not in text
    assert "`python -m grpo.demo.compare --steps 1`" in text and "continues" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [cell.strip() for line in rows for cell in line.strip("|").split("|")]
    assert sum(cell == "" for cell in cells) == 1  # above the rows' names
    trained = 1 + len(compare.GRPO_ROWS)  # supervised, and GRPO
    assert len(rows) == 1 + (1 + 2 * trained) + 1 + (1 + 2 * 2)
    numbers = [n + 0.25 for n, run in enumerate(done, 1) if run.row == OWN]
    assert f"| {OWN}, last | {sum(numbers[:2]) / 2:.2f} ± 0.71 |" in text  # of two neighbours: 1 / sqrt(2)
    assert "| " + " | ".join([f"{OWN}, best", *(f"{n:.2f}" for n in numbers)]) + " |" in rows
    assert "supervised, 0.0003: 1.00; supervised, 0.001: 0.00; supervised, 0.003: 1.00." in text
    # A row that is not whole is not there.
    kept = [line for line in lines() if (line["row"], line["seed"]) != (OWN, 1)]
    compare.RECORDS.write_text("".join(json.dumps(line) + "\n" for line in kept))
    write(config, [], is_complete=False)
    text = compare.RESULTS.read_text()
    assert "16 runs are done; the same command continues with the others." in text and f"| {OWN}, last" not in text
    with open(compare.RECORDS, "a") as file:
        file.write('{"task": "ea')  # as a full disk leaves it
    with pytest.raises(InputError, match=f"results.jsonl': line {len(kept) + 1} is damaged .*: remove it"):
        records_of(done[0])


@pytest.mark.parametrize("name", ["HIDDEN_SIZE", "LAYERS", "BLOCKS", "NUM_CARELESS", "NUM_TRAIN", "WARM_START_STEPS"])
def test_what_another_model_or_start_has_reached_is_not_taken_for_done(config, done, monkeypatch, name):
    run = run_of(config, "easy", 0, BEFORE)
    assert records_of(run)
    monkeypatch.setattr(compare.demo, name, getattr(compare.demo, name) + 1)
    assert not records_of(run)


def test_an_interrupted_run_does_not_count_as_trained(config, monkeypatch):
    """A signal ends train.py in order, with exit code 0."""
    monkeypatch.setattr(compare, "call", lambda arguments, log: None)
    with pytest.raises(InputError, match="train.py was interrupted: .*log"):
        do(run_of(config, "easy", 0, OWN))
    assert not compare.RECORDS.exists()


def test_a_run_that_fails_names_its_log(tmp_path):
    with pytest.raises(InputError, match="-c .* … failed: .*log says why"):
        call(["-c", "import sys; sys.exit('no such flag')"], tmp_path / "log")
    assert (tmp_path / "log").read_text() == "no such flag\n"


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
