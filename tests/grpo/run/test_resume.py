"""A run that is stopped, killed or extended goes on as if nothing had been: the same completions, losses, weights."""

import json
import os
import resource
import shutil
import signal
import time
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import train
from data.epochs import Epochs, rank_batches
from grpo.config import Config
from grpo.model.load import ModelFiles
from grpo.ranks import start_processes
from grpo.run.checkpoint import checkpoints, save
from tests.conftest import children_of, make_tiny, run_ranks
from tests.kill_and_resume import (
    evaluating,
    in_two_files,
    kill_and_resume,
    read_evaluations,
    result,
    rewarded,
    run_flags,
    start,
    wait,
)
from tests.test_train import weights

AUTO = ["--resume_from_checkpoint", "auto"]
STEPS = ["--max_steps", "6", "--save_steps", "1"]
FEW_SAVES = ["--max_steps", "6", "--save_steps", "2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Five samples: in batches of two, checkpoints lie within an epoch and at its end."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "tiny", num_videos=(1, 2, 1, 1, 1))


def stopped_after(step: int, whole: Path, output: Path, ranks: int = 1) -> Path:
    """What a run leaves that was killed after `step` steps, with curves that reach further than its checkpoint."""
    output.mkdir()
    for name in ("config.json", "tensorboard", "rollouts.jsonl", f"checkpoint-{step}"):
        copy = shutil.copytree if (whole / name).is_dir() else shutil.copy
        copy(whole / name, output / name)
    return output


def run(ranks: int, arguments: list[str], log: Path) -> str:
    """Run the program in new processes; return what it printed."""
    assert wait(start(ranks, arguments, log)) == [0] * ranks, log.read_text()
    return log.read_text()


def scored(log: Path, after: int = 0) -> list[str]:
    """The completions after a step, with their rewards, as the reward function has logged them."""
    lines = Path(f"{log}.rewards").read_text().splitlines()
    return sorted(line for line in lines if json.loads(line)["step"] > after)


LORA = "--lora_enable --lora_rank 4 --lora_dropout 0.3 --beta 0.1 --vision_lr 1e-4".split()


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(tiny, tmp_path):
    """Adapters with dropout and a KL, on two ranks; tests below compare runs of all weights, on one."""
    whole, output, logs = tmp_path / "whole", tmp_path / "resumed", (tmp_path / "1", tmp_path / "2")
    run(2, run_flags(tiny.folder, whole, *FEW_SAVES, *LORA), logs[0])
    stopped_after(2, whole, output)  # of 3 steps in an epoch
    printed = run(2, run_flags(tiny.folder, output, *FEW_SAVES, *AUTO, *LORA), logs[1])
    assert "checkpoint-2: 2 of 6 steps are done" in printed
    assert "33%|" in printed and " 0%|" not in printed  # the bar begins where the run does
    assert scored(logs[1]) == scored(logs[0], after=2) != []
    resumed, expected = result(output), result(whole)
    assert resumed.weights == expected.weights
    assert resumed.curves == expected.curves  # each step once, though events of later steps lay there
    assert resumed.rollouts == expected.rollouts != b""
    assert [step for step, _ in resumed.curves["loss"]] == [1, 2, 3, 4, 5, 6]
    assert max(value for _, value in resumed.curves["grad_norm"]) > 0


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run of six steps with a checkpoint at each."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert train.main(run_flags(tiny.folder, output, *STEPS)) == 0
    return output


def test_slots_from_a_later_step_on_are_those_of_the_whole_run():
    whole = list(rank_batches(Epochs([5], 0), 2, 8, rank=0, world_size=1))
    assert all(
        list(rank_batches(Epochs([5], 0), 2, 8, rank=0, world_size=1, start_step=first)) == whole[first:]
        for first in range(9)
    )


def test_another_number_of_ranks_goes_on_with_the_same_run(tiny, whole, tmp_path, capfd):
    """On two ranks after step 2, and on one again after step 4."""
    two = stopped_after(2, whole, tmp_path / "two")
    printed = run(2, run_flags(tiny.folder, two, *FEW_SAVES, *AUTO), tmp_path / "log")
    assert "saved by 1 ranks, now 2" in printed
    one = stopped_after(4, two, tmp_path / "one")
    assert train.main(run_flags(tiny.folder, one, *FEW_SAVES, *AUTO)) == 0
    assert "saved by 2 ranks, now 1" in capfd.readouterr().out
    for output in (two, one):
        difference = weights(output / "final") - weights(whole / "final")
        assert difference.norm() / weights(whole / "final").norm() < 1e-5


def test_a_checkpoint_of_another_folder_is_resumed_by_its_path(tiny, whole, tmp_path):
    more = ["--resume_from_checkpoint", str(whole / "checkpoint-4")]
    assert train.main(run_flags(tiny.folder, tmp_path / "out", *STEPS, *more)) == 0
    ours = result(tmp_path / "out")
    assert ours.weights == result(whole).weights and [step for step, _ in ours.curves["loss"]] == [5, 6]


def test_a_moved_data_folder_and_flags_of_no_consequence_may_change(tiny, whole, tmp_path):
    moved = shutil.copytree(tiny.folder, tmp_path / "moved")
    more = "--logging_steps 2 --dataloader_num_workers 0 --save_total_limit 1 --max_bad_steps 3".split()
    arguments = run_flags(moved, stopped_after(4, whole, tmp_path / "out"), *STEPS, *AUTO, *more)
    arguments[1] = str(tiny.folder / "model")
    assert train.main(arguments) == 0
    assert result(tmp_path / "out").weights == result(whole).weights


def change_data(folder: Path, how: str) -> None:
    samples = json.loads((folder / "data.json").read_text())
    if how == "one more":
        samples.append(samples[0] | {"id": "new"})
    elif how == "another answer":
        samples[1]["conversations"][1]["value"] = "The ejection fraction is 12%."
    (folder / "data.json").write_text(json.dumps(samples))


@pytest.mark.parametrize(
    ("more", "data", "words"),
    [
        (["--seed", "1"], "", ["--seed 1 was 0"]),
        (["--beta", "0.5", "--num_generations", "2"], "", ["--beta 0.5 was 0.0", "--num_generations 2 was 4"]),
        (["--lora_enable"], "", ["--lora_enable True was False"]),
        (["--global_batch_size", "1"], "", ["--global_batch_size 1 was 2"]),
        (["--max_steps", "2"], "", ["step 3", "--max_steps"]),
        ([], "one more", ["--data_path", "other samples (5, now 6)"]),
        ([], "another answer", ["--data_path", "other samples (5, now 5)"]),
        (["--resume_from_checkpoint", "none"], "", ["another run", "--resume_from_checkpoint auto"]),
        (["--resume_from_checkpoint", "nowhere"], "", ["another run"]),
        (
            ["--output_dir", "{new}", "--resume_from_checkpoint", "nowhere"],
            "",
            ["'nowhere' is not a complete checkpoint", "auto"],
        ),
        (["--output_dir", "{new}", "--resume_from_checkpoint", "{whole}/final"], "", ["final", "checkpoint-N"]),
        (["--resume_from_checkpoint", "{out}/checkpoint-2"], "", ["went further", "auto"]),
    ],
    ids=str,
)
def test_another_run_is_not_resumed(tiny, whole, tmp_path, capfd, more, data, words):
    folder = shutil.copytree(tiny.folder, tmp_path / "tiny")
    change_data(folder, data)
    output = stopped_after(3, whole, tmp_path / "out")
    shutil.copytree(whole / "checkpoint-2", output / "checkpoint-2")
    more = [text.format(new=tmp_path / "new", out=output, whole=whole) for text in more]
    arguments = run_flags(folder, output, *STEPS, *AUTO, *more)
    arguments[1] = str(tiny.folder / "model")
    assert train.main(arguments) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("train.py: error: ") and all(word in line for word in words), line


def test_files_with_weights_are_trained_on_as_often_as_they_say_and_resumed_as_they_were(tiny, tmp_path, capfd):
    """Files of 3 and 2 samples; an epoch of 3 + 3 prompts is 3 steps."""
    folder = shutil.copytree(tiny.folder, tmp_path / "tiny")
    two, whole, output = in_two_files(folder), tmp_path / "whole", tmp_path / "out"
    assert train.main(run_flags(folder, whole, *two, *FEW_SAVES)) == 0
    begun = run_flags(folder, stopped_after(2, whole, output), *two, *FEW_SAVES, *AUTO)
    assert train.main(begun) == 0
    assert result(output) == result(whole)
    logged = [json.loads(line) for line in (output / "rollouts.jsonl").read_text().splitlines()]
    for steps in ((1, 2, 3), (4, 5, 6)):
        seen = Counter(line["sample_id"] for line in logged if line["step"] in steps)
        assert sum(seen.values()) == 6 * 4 and [seen[f"s{i}"] for i in range(3)] == [4, 4, 4]  # completions
        assert sorted(seen[f"s{i}"] for i in (3, 4)) == [4, 8]
    capfd.readouterr()
    samples = json.loads((folder / "a.json").read_text())
    for change, words in (
        (["--data_weights", "1", "2"], "--data_weights [1.0, 2.0] was [1.0, 1.5] in"),
        (["--data_path", *reversed(two[1:3])], "had other samples (5, now 5)"),
        (["--data_path", two[1], "--data_weights", "1"], "--data_weights [1.0] was [1.0, 1.5], --data_path"),
        ("a sample moves to the other file", "had other samples (5, now 5)"),
    ):
        if isinstance(change, str):
            (folder / "a.json").write_text(json.dumps(samples[:2]))
            (folder / "b.jsonl").write_text("\n".join([json.dumps(samples[2]), (folder / "b.jsonl").read_text()]))
            change = []
        assert train.main([*begun, "--max_steps", "8", *change]) == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert line.startswith("train.py: error: ") and words in line


def test_auto_begins_a_run_where_there_is_none_and_knows_a_complete_one(tiny, whole, tmp_path, capfd):
    assert train.main(run_flags(tiny.folder, tmp_path / "out", *STEPS, *AUTO)) == 0
    assert result(tmp_path / "out") == result(whole)
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "out").rglob("[!.]*"))
    assert train.main(run_flags(tiny.folder, tmp_path / "out", *STEPS, *AUTO)) == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "out").rglob("[!.]*")) == before
    assert "is complete: 6 steps" in capfd.readouterr().out


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tiny, whole, tmp_path):
    output = stopped_after(1, whole, tmp_path / "out")
    shutil.rmtree(output / "checkpoint-1")
    (output / "checkpoint-2.unfinished").mkdir()
    assert train.main(run_flags(tiny.folder, output, *STEPS, *AUTO)) == 0
    assert result(output) == result(whole)
    assert not (output / "checkpoint-2.unfinished").exists()


def test_more_steps_extend_a_complete_run_at_the_learning_rate_of_the_longer_one(tiny, whole, tmp_path, capfd):
    output = shutil.copytree(whole, tmp_path / "out")
    longer = ["--max_steps", "9", "--save_steps", "3"]
    assert train.main(run_flags(tiny.folder, output, *longer, *AUTO)) == 0
    assert "of 6 steps so far: the learning rate goes on as in a run of 9" in capfd.readouterr().out
    assert train.main(run_flags(tiny.folder, tmp_path / "nine", *longer)) == 0
    rates = result(output).curves["learning_rate"]
    assert rates[6:] == result(tmp_path / "nine").curves["learning_rate"][6:] and len(rates) == 9
    assert json.loads((output / "final" / "progress.json").read_text())["step"] == 9


def test_the_newest_checkpoints_are_kept_and_half_ones_never_count(tiny, whole, tmp_path):
    output = stopped_after(1, whole, tmp_path / "out")
    shutil.copytree(whole / "checkpoint-5", output / "checkpoint-5.unfinished")  # killed while it was saved
    shutil.copytree(whole / "checkpoint-4", output / "checkpoint-4.removed")  # killed while it was removed
    (shutil.copytree(whole / "checkpoint-3", output / "checkpoint-3") / "trainer_state" / ".metadata").unlink()
    assert set(checkpoints(output)) == {1}
    assert train.main(run_flags(tiny.folder, output, *STEPS, *AUTO, "--save_total_limit", "3")) == 0
    assert {path.name for path in output.iterdir()} == {
        *(".lock", "config.json", "tensorboard", "rollouts.jsonl", "final"),
        *("checkpoint-4", "checkpoint-5", "checkpoint-6"),
    }
    assert result(output).weights == result(whole).weights


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_checkpoint_that_cannot_be_read_is_named(tiny, whole, tmp_path, capfd, name):
    output = stopped_after(2, whole, tmp_path / "out")
    path = output / "checkpoint-2" / "trainer_state" / name
    path.write_bytes(path.read_bytes()[:100])
    assert train.main(run_flags(tiny.folder, output, *STEPS, *AUTO)) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train.py: error: ")]
    assert "checkpoint-2' cannot be read" in line and "resume from the one before" in line


@pytest.mark.parametrize("name", ["checkpoint-3", "final"])
def test_a_folder_without_its_progress_is_to_be_moved_away(tiny, whole, tmp_path, capfd, name):
    output = stopped_after(3, whole, tmp_path / "out")
    shutil.copytree(whole / "final", output / "final")
    (output / name / "progress.json").write_text("")
    assert train.main(run_flags(tiny.folder, output, "--max_steps", "7", *AUTO)) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert f"{name}' is not a complete checkpoint" in line and "move it away" in line


def test_a_branch_that_was_killed_before_its_first_checkpoint_never_begins_from_nothing(tiny, whole, tmp_path, capfd):
    branch = ["--resume_from_checkpoint", str(whole / "checkpoint-4")]
    arguments = run_flags(tiny.folder, tmp_path / "out", *STEPS)
    assert train.main([*arguments, *branch]) == 0
    for name in ("checkpoint-5", "checkpoint-6"):
        shutil.rmtree(tmp_path / "out" / name)
    assert train.main([*arguments, *branch]) == 2  # it has come to its end
    assert "holds another run" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "out" / "final")
    assert train.main([*arguments, *AUTO]) == 2
    assert f"give {' '.join(branch)}" in capfd.readouterr().err
    assert train.main([*arguments, *branch]) == 0
    assert result(tmp_path / "out").weights == result(whole).weights
    assert train.main([*arguments, *branch]) == 2  # now it has its own
    (tmp_path / "out" / "config.json").unlink()
    assert train.main(arguments) == 2  # checkpoints are never written over
    assert capfd.readouterr().err.count("holds another run") == 2


def test_a_run_whose_own_checkpoints_are_all_gone_begins_anew(tiny, whole, tmp_path):
    output = stopped_after(1, whole, tmp_path / "out")
    flags = json.loads((output / "config.json").read_text())
    flags["resume_from_checkpoint"] = str(output / "checkpoint-1")
    (output / "config.json").write_text(json.dumps(flags))
    shutil.rmtree(output / "checkpoint-1")
    assert train.main(run_flags(tiny.folder, output, *STEPS, *AUTO)) == 0
    assert result(output) == result(whole)


def test_checkpoints_may_be_links_to_another_disk_and_completions_show_once_per_step(tiny, whole, tmp_path):
    output = stopped_after(4, whole, tmp_path / "out")
    (output / "checkpoint-4").rename(tmp_path / "elsewhere")
    (output / "checkpoint-4").symlink_to(tmp_path / "elsewhere")
    assert train.main(run_flags(tiny.folder, output, *STEPS, *AUTO, "--save_total_limit", "1")) == 0
    expected = {".lock", "config.json", "tensorboard", "rollouts.jsonl", "checkpoint-6", "final"}
    assert {path.name for path in output.iterdir()} == expected
    assert checkpoints(tmp_path) == {} and (tmp_path / "elsewhere" / "trainer_state").exists()
    assert result(output) == result(whole)
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    assert [event.step for event in events.Tensors("completions/text_summary")] == [1, 2, 3, 4, 5, 6]


def main_on_a_full_disk(arguments: list[str], log: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, -1))  # bytes of any file: enough for the samples alone
    with open(log, "w") as file, redirect_stderr(file):
        assert train.main(arguments) == 2


def test_a_disk_that_is_full_from_the_beginning_is_named_and_nothing_is_lost(tiny, whole, tmp_path):
    output = stopped_after(4, whole, tmp_path / "out")
    flags = (output / "config.json").read_text()
    arguments = run_flags(tiny.folder, output, *STEPS, *AUTO)
    run_ranks(main_on_a_full_disk, 1, [*arguments, "--dataloader_num_workers", "0"], str(tmp_path / "log"))
    (line,) = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("train.py: error: ")]
    assert "--output_dir" in line and "File too large" in line
    assert (output / "config.json").read_text() == flags
    assert train.main(arguments) == 0
    assert result(output) == result(whole)


def steps_of(log: Path) -> list[int]:
    path = Path(f"{log}.rewards")
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(log: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while step not in steps_of(log):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def nine_steps_on_two_ranks(tiny, tmp_path_factory):
    """A run without checkpoints, and its log."""
    folder = tmp_path_factory.mktemp("nine")
    run(2, run_flags(tiny.folder, folder / "whole", "--max_steps", "9"), folder / "log")
    return folder / "whole", folder / "log"


@pytest.mark.parametrize(
    ("number", "step", "reached"),
    [(signal.SIGINT, 1, "group"), (signal.SIGUSR1, 4, "one")],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_signal_stops_all_ranks_after_the_step_and_no_step_is_lost(
    tiny, nine_steps_on_two_ranks, tmp_path, number, step, reached
):
    (whole, whole_log), output, log = nine_steps_on_two_ranks, tmp_path / "out", tmp_path / "log"
    processes = start(2, run_flags(tiny.folder, output, "--max_steps", "9"), log)
    wait_for_step(log, step)
    for process in processes if reached == "group" else processes[-1:]:
        for pid in [process.pid, *children_of(process.pid)] if reached == "group" else [process.pid]:
            os.kill(pid, number)  # with its workers
    assert wait(processes) == [0] * 2
    done = max(checkpoints(output))
    assert done < 9 and f"stopped after step {done}" in log.read_text()
    assert max(steps_of(log)) == done  # the last step that was begun
    run(2, run_flags(tiny.folder, output, "--max_steps", "9", *AUTO), log)
    assert scored(log) == scored(whole_log)  # each step once
    assert result(output) == result(whole)


def test_a_second_signal_ends_the_program_at_once(tiny, tmp_path):
    more = "--max_steps 9 --save_steps 1 --num_generations 64 --max_completion_length 64".split()  # long steps
    (process,) = start(1, run_flags(tiny.folder, tmp_path / "out", *more), tmp_path / "log")
    wait_for_step(tmp_path / "log", 2)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert wait([process], 5) == [128 + signal.SIGINT]
    assert set(checkpoints(tmp_path / "out")) == {1}


def test_a_run_of_which_a_rank_is_killed_ends_as_one_of_which_none_was(tmp_path):
    """With this seed the second rank alone is killed; `python tests/kill_and_resume.py` kills as often as one likes."""
    tiny = make_tiny(tmp_path / "tiny", num_videos=(1, 2, 1))
    more = ["--max_steps", "6", *evaluating(tiny.folder), *rewarded()]
    assert kill_and_resume(tiny.folder, 2, 1, signal.SIGKILL, 11, more)


@pytest.fixture(scope="module")
def evaluated(tiny, tmp_path_factory):
    """The run of `whole` with evaluations."""
    output = tmp_path_factory.mktemp("evaluated") / "out"
    assert train.main(run_flags(tiny.folder, output, *STEPS, *evaluating(tiny.folder))) == 0
    return output


def best_by_hand(evaluations: list[dict], metric: str = "eval/mae") -> int:
    """The step of the lowest value, the earliest of equal ones; an evaluation before the first step does not count."""
    return min((e for e in evaluations if e["step"] > 0), key=lambda e: (e[metric], e["step"]))["step"]


def test_a_resumed_run_evaluates_at_the_same_steps_and_keeps_the_same_best_model(tiny, tmp_path):
    """Resumed after step 2 of 6, where it was evaluated, and after step 4, where a signal came before that."""
    flags = [*STEPS, "--learning_rate", "1e-2", *evaluating(tiny.folder)]
    whole = tmp_path / "whole"
    assert train.main(run_flags(tiny.folder, whole, *flags)) == 0
    expected, evaluations = result(whole), read_evaluations(whole / "final")
    assert [evaluation["step"] for evaluation in evaluations] == [0, 2, 4, 6]
    assert [step for step, _ in expected.curves["eval/reward"]] == [0, 2, 4, 6]
    assert json.loads((whole / "best" / "progress.json").read_text())["step"] == best_by_hand(evaluations)
    assert json.loads((whole / "final" / "progress.json").read_text())["best_step"] == best_by_hand(evaluations)
    for step in (2, 4):
        output = stopped_after(step, whole, tmp_path / f"{step}")
        shutil.copytree(whole / "best", output / "best")
        if step == 4:  # a signal came before the evaluation
            path = output / "checkpoint-4" / "progress.json"
            progress = json.loads(path.read_text())
            progress["evaluations"], progress["best_step"] = progress["evaluations"][:2], 2
            path.write_text(json.dumps(progress))
            SummaryWriter(str(output / "tensorboard"), purge_step=4).close()
        assert train.main(run_flags(tiny.folder, output, *flags, *AUTO)) == 0
        assert read_evaluations(output / "final") == evaluations
        found = result(output)
        assert found.weights == expected.weights and found.best == expected.best
        names = [name for name in expected.curves if name.startswith("eval/")]
        assert names and all(found.curves[name] == expected.curves[name] for name in names)


def test_evaluation_changes_nothing_in_training(tiny, whole, evaluated, tmp_path):
    found, expected = result(evaluated), result(whole)
    assert found.weights == expected.weights and found.rollouts == expected.rollouts
    assert {name: found.curves[name] for name in expected.curves} == expected.curves
    output = shutil.copytree(evaluated, tmp_path / "out")
    for folder in [*checkpoints(output).values(), output / "final"]:
        shutil.rmtree(folder)  # as if it had been killed before its first checkpoint
    assert train.main(run_flags(tiny.folder, output, *STEPS, *evaluating(tiny.folder), *AUTO)) == 0
    assert result(output) == found  # the evaluation before the first step is there once


def test_a_run_that_is_killed_while_it_saves_the_best_model_has_the_old_or_the_new_one(tiny, evaluated, tmp_path):
    """Killed just before the folder gets its name, and again just after the old one was renamed."""
    output = stopped_after(1, evaluated, tmp_path / "out")
    shutil.copytree(evaluated / "best", output / "best.unfinished")
    shutil.copytree(evaluated / "best", output / "best.removed")
    (output / "best.unfinished" / "model.safetensors").write_bytes(b"half")
    assert train.main(run_flags(tiny.folder, output, *STEPS, *evaluating(tiny.folder), *AUTO)) == 0
    assert result(output).best == result(evaluated).best
    assert not list(output.glob("best.*"))


def test_other_held_out_samples_are_refused_and_none_are_fine(tiny, evaluated, tmp_path, capfd):
    flags = [*STEPS, *evaluating(tiny.folder)]
    samples = json.loads((tiny.folder / "data.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(samples[1:]))
    output = stopped_after(2, evaluated, tmp_path / "out")
    assert train.main(run_flags(tiny.folder, output, *flags, *AUTO, "--eval_data_path", tmp_path / "other.json")) == 2
    assert (
        "--eval_data_path" in (printed := capfd.readouterr().err) and "had other samples (none is fine, too)" in printed
    )
    assert train.main(run_flags(tiny.folder, output, *STEPS, *AUTO)) == 0
    assert [e["step"] for e in read_evaluations(output / "final")] == [0, 2]


def test_the_best_model_is_that_of_the_metric(tiny, tmp_path):
    metric = "eval/reward"
    flags = [*STEPS, *evaluating(tiny.folder), "--metric_for_best_model", metric, "--learning_rate", "1e-2"]
    assert train.main(run_flags(tiny.folder, tmp_path / "out", *flags)) == 0
    evaluations = read_evaluations(tmp_path / "out" / "final")[1:]
    best = max(evaluations, key=lambda e: (e[metric], -e["step"]))["step"]
    assert json.loads((tmp_path / "out" / "best" / "progress.json").read_text())["step"] == best
    stored = load_file(tmp_path / "out" / "best" / "model.safetensors")
    at_that_step = load_file(tmp_path / "out" / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(stored[name], at_that_step[name]) for name in at_that_step)


def test_a_broken_held_out_video_costs_no_step(tiny, whole, tmp_path, capfd):
    """The evaluation at the end fails, after all the training; with the video mended the same command goes on."""
    sample = json.loads((tiny.folder / "data.json").read_text())[0]
    (tmp_path / "heldout.json").write_text(json.dumps([sample | {"video": [str(tmp_path / "a.mp4")]}]))
    (tmp_path / "a.mp4").write_bytes(b"no video")
    flags = ["--max_steps", "6", "--eval_data_path", str(tmp_path / "heldout.json"), *AUTO]
    assert train.main(run_flags(tiny.folder, tmp_path / "out", *flags)) == 2
    assert "a.mp4" in capfd.readouterr().err and set(checkpoints(tmp_path / "out")) == {6}
    shutil.copy(tiny.folder / "videos" / "0_0.mp4", tmp_path / "a.mp4")
    assert train.main(run_flags(tiny.folder, tmp_path / "out", *flags)) == 0
    assert [e["step"] for e in read_evaluations(tmp_path / "out" / "final")] == [6]
    assert result(tmp_path / "out").weights == result(whole).weights


def test_a_branch_gets_a_best_model_of_its_own(tiny, evaluated, tmp_path):
    branch = [*evaluating(tiny.folder), "--resume_from_checkpoint", str(evaluated / "checkpoint-4")]
    assert train.main(run_flags(tiny.folder, tmp_path / "branch", *STEPS, *branch)) == 0
    progress = json.loads((tmp_path / "branch" / "best" / "progress.json").read_text())
    assert progress["step"] == progress["best_step"] == 6


def test_a_best_model_that_was_renamed_when_the_run_was_killed_gets_its_name_back(tiny, tmp_path):
    config = Config(output_dir=str(tmp_path))
    (tmp_path / "best.removed").mkdir()
    (tmp_path / "best.removed" / "model").write_text("old")
    (tmp_path / "best.unfinished").mkdir()
    run_ranks(save_final, 1, config)
    assert (tmp_path / "best" / "model").read_text() == "old" and not (tmp_path / "best.unfinished").exists()


class Nothing:
    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()


def save_final(config: Config) -> None:
    start_processes()
    progress = {
        "flags": {"model_id": "m"},
        "step": 1,
        "total_steps": 1,
        "num_samples": 1,
        "data": [],
        "evaluations": [],
    }
    tokenizer = Nothing()
    tokenizer.save_pretrained = lambda folder: None
    assert save(config, "final", ModelFiles(Nothing(), tokenizer, []), {}, progress, True)


def test_a_signal_breaks_an_evaluation_off_and_it_is_done_on_resume(tiny, tmp_path):
    """The signal comes while the step-0 evaluation of many samples runs."""
    samples = json.loads((tiny.folder / "data.json").read_text())
    many = [sample | {"id": f"{sample['id']}-{i}"} for i in range(200) for sample in samples]
    (tmp_path / "many.json").write_text(json.dumps(many))
    flags = ["--max_steps", "1", "--eval_data_path", str(tmp_path / "many.json"), "--eval_on_start", *AUTO]
    flags += ["--per_device_eval_batch_size", "2"]
    ranks = start(1, run_flags(tiny.folder, tmp_path / "out", *flags), tmp_path / "log")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("tensorboard/*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    os.kill(ranks[0].pid, signal.SIGTERM)
    began = time.monotonic()
    assert wait(ranks) == [0] and time.monotonic() - began < 15
    assert "stopped after step 0" in (tmp_path / "log").read_text()
    assert "step 0: held-out" not in (tmp_path / "log").read_text()
    assert not list((tmp_path / "out").glob("checkpoint-*"))
