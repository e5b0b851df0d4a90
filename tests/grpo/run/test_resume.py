"""A run that is stopped, killed or extended goes on as if nothing had been: the same completions, losses, weights."""

import json
import math
import resource
import shutil
import signal
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import train
from data.epochs import Epochs, rank_batches
from grpo.config import Config
from grpo.model.load import ModelFiles
from grpo.ranks import start_processes
from grpo.run.checkpoint import checkpoints, save
from tests.conftest import make_tiny, run_ranks
from tests.kill_and_resume import evaluating, in_two_files, read_evaluations, result, run_flags
from tests.test_train import run_main, weights

AUTO = ["--resume_from_checkpoint", "auto"]
STEPS = "--max_steps 4 --save_steps 1 --learning_rate 3e-3".split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Five samples: in batches of two, the third checkpoint lies at the end of an epoch, the others within one."""
    tiny = make_tiny(tmp_path_factory.mktemp("tiny") / "tiny", num_videos=(1, 2, 1, 1, 1))
    with torch.no_grad():  # so that greedy answers have numbers
        tiny.model.lm_head.weight[tiny.tokenizer.convert_tokens_to_ids(list("0123456789"))] *= 2
    tiny.model.save_pretrained(tiny.folder / "model")
    return tiny


def stopped_after(step: int, whole: Path, output: Path) -> Path:
    """What a run leaves that was killed after `step` steps, with curves that reach further than its checkpoint."""
    output.mkdir()
    for name in ("config.json", "tensorboard", "rollouts.jsonl", f"checkpoint-{step}"):
        copy = shutil.copytree if (whole / name).is_dir() else shutil.copy
        copy(whole / name, output / name)
    return output


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run of four steps with a checkpoint at each."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert train.main(run_flags(tiny.folder, output, *STEPS, "--log_completions", "1")) == 0
    return output


def test_slots_from_a_later_step_on_are_those_of_the_whole_run():
    whole = list(rank_batches(Epochs([5], 0), 2, 8, rank=0, world_size=1))
    assert all(
        list(rank_batches(Epochs([5], 0), 2, 8, rank=0, world_size=1, start_step=first)) == whole[first:]
        for first in range(9)
    )


def test_another_number_of_ranks_goes_on_with_the_same_run(tiny, whole, tmp_path, capfd):
    """On two ranks after step 2, and on one again after step 3."""
    two = stopped_after(2, whole, tmp_path / "two")
    printed = run_main(2, run_flags(tiny.folder, two, *STEPS, *AUTO), tmp_path)
    assert "saved by 1 ranks, now 2" in printed
    one = stopped_after(3, two, tmp_path / "one")
    assert train.main(run_flags(tiny.folder, one, *STEPS, *AUTO)) == 0
    assert "saved by 2 ranks, now 1" in capfd.readouterr().out
    for output in (two, one):
        difference = weights(output / "final") - weights(whole / "final")
        assert difference.norm() / weights(whole / "final").norm() < 1e-5


def test_a_moved_data_folder_and_flags_of_no_consequence_may_change(tiny, whole, tmp_path):
    moved = shutil.copytree(tiny.folder, tmp_path / "moved")
    more = "--logging_steps 2 --dataloader_num_workers 0 --save_total_limit 1 --max_bad_steps 3".split()
    arguments = run_flags(moved, stopped_after(3, whole, tmp_path / "out"), *STEPS, *AUTO, *more)
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
    two += ["--max_steps", "6", "--save_steps", "4"]
    assert train.main(run_flags(folder, whole, *two)) == 0
    begun = run_flags(folder, stopped_after(4, whole, output), *two, *AUTO)
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
    arguments = run_flags(tiny.folder, tmp_path / "out", *STEPS, *AUTO, "--max_steps", "1")
    assert train.main(arguments) == 0
    assert_is_the_first_step(tmp_path / "out", whole)
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "out").rglob("[!.]*"))
    assert train.main(arguments) == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "out").rglob("[!.]*")) == before
    assert "is complete: 1 steps" in capfd.readouterr().out


def assert_is_the_first_step(output: Path, whole: Path) -> None:
    first, expected = result(output), result(whole)
    assert expected.rollouts.startswith(first.rollouts) and first.rollouts.count(b"\n") == 2 * 4
    assert first.curves["grad_norm"] == expected.curves["grad_norm"][:1] != [(1, 0.0)]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tiny, whole, tmp_path):
    output = stopped_after(1, whole, tmp_path / "out")
    shutil.rmtree(output / "checkpoint-1")
    (output / "checkpoint-2.unfinished").mkdir()
    assert train.main(run_flags(tiny.folder, output, *STEPS, *AUTO)) == 0
    assert result(output) == result(whole)
    assert not (output / "checkpoint-2.unfinished").exists()


def test_a_run_whose_own_checkpoints_are_all_gone_begins_anew(tiny, whole, tmp_path):
    output = stopped_after(1, whole, tmp_path / "out")
    flags = json.loads((output / "config.json").read_text())
    flags["resume_from_checkpoint"] = str(output / "checkpoint-1")
    (output / "config.json").write_text(json.dumps(flags))
    shutil.rmtree(output / "checkpoint-1")
    assert train.main(run_flags(tiny.folder, output, *STEPS, *AUTO, "--max_steps", "1")) == 0
    assert_is_the_first_step(output, whole)


def test_more_steps_extend_a_complete_run_at_the_learning_rate_of_the_longer_one(tiny, whole, tmp_path, capfd):
    """Of six steps the first is the warm-up; the others follow half a cosine."""
    output = shutil.copytree(whole, tmp_path / "out")
    assert train.main(run_flags(tiny.folder, output, *STEPS, *AUTO, "--max_steps", "6")) == 0
    assert "of 4 steps so far: the learning rate goes on as in a run of 6" in capfd.readouterr().out
    rates = [rate for _, rate in result(output).curves["learning_rate"]]
    cosine = [3e-3 * (1 + math.cos(math.pi * step / 5)) / 2 for step in (3, 4)]
    assert len(rates) == 6 and rates[4:] == pytest.approx(cosine)
    assert json.loads((output / "final" / "progress.json").read_text())["step"] == 6


def test_the_newest_checkpoints_are_kept_and_half_ones_never_count(tiny, whole, tmp_path):
    output = stopped_after(1, whole, tmp_path / "out")
    shutil.copytree(whole / "checkpoint-4", output / "checkpoint-4.unfinished")  # killed while it was saved
    shutil.copytree(whole / "checkpoint-3", output / "checkpoint-3.removed")  # killed while it was removed
    (shutil.copytree(whole / "checkpoint-2", output / "checkpoint-2") / "trainer_state" / ".metadata").unlink()
    assert set(checkpoints(output)) == {1}
    assert train.main(run_flags(tiny.folder, output, *STEPS, *AUTO, "--save_total_limit", "2")) == 0
    assert {path.name for path in output.iterdir()} == {
        *(".lock", "config.json", "tensorboard", "rollouts.jsonl", "final"),
        *("checkpoint-3", "checkpoint-4"),
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
    assert train.main(run_flags(tiny.folder, output, *STEPS, *AUTO, "--max_steps", "7")) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert f"{name}' is not a complete checkpoint" in line and "move it away" in line


def test_a_branch_that_was_killed_before_its_first_checkpoint_never_begins_from_nothing(tiny, whole, tmp_path, capfd):
    branch = ["--resume_from_checkpoint", str(whole / "checkpoint-3")]
    arguments = run_flags(tiny.folder, tmp_path / "out", *STEPS)
    assert train.main([*arguments, *branch]) == 0
    assert [step for step, _ in result(tmp_path / "out").curves["loss"]] == [4]
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
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


def test_a_checkpoint_may_be_a_link_to_another_disk_and_each_step_shows_once(tiny, whole, tmp_path, capfd):
    """Resumed after step 2, by a run of which completions and curves of later steps lie there."""
    output = stopped_after(2, whole, tmp_path / "out")
    (output / "checkpoint-2").rename(tmp_path / "elsewhere")
    (output / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    more = ["--save_total_limit", "1", "--log_completions", "1"]
    assert train.main(run_flags(tiny.folder, output, *STEPS, *AUTO, *more)) == 0
    expected = {".lock", "config.json", "tensorboard", "rollouts.jsonl", "checkpoint-4", "final"}
    assert {path.name for path in output.iterdir()} == expected
    assert checkpoints(tmp_path) == {} and (tmp_path / "elsewhere" / "trainer_state").exists()
    assert result(output) == result(whole)
    assert [step for step, _ in result(output).curves["loss"]] == [1, 2, 3, 4]
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    assert [event.step for event in events.Tensors("completions/text_summary")] == [1, 2, 3, 4]
    printed, bar = capfd.readouterr()
    assert "checkpoint-2: 2 of 4 steps are done" in printed
    assert "50%|" in bar and " 0%|" not in bar  # it begins where the run does


def main_on_a_full_disk(arguments: list[str], log: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, -1))  # bytes of any file: enough for the samples alone
    with open(log, "w") as file, redirect_stderr(file):
        assert train.main(arguments) == 2


def test_a_disk_that_is_full_from_the_beginning_is_named_and_nothing_is_lost(tiny, whole, tmp_path):
    output = stopped_after(3, whole, tmp_path / "out")
    flags = (output / "config.json").read_text()
    arguments = run_flags(tiny.folder, output, *STEPS, *AUTO)
    run_ranks(main_on_a_full_disk, 1, [*arguments, "--dataloader_num_workers", "0"], str(tmp_path / "log"))
    (line,) = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("train.py: error: ")]
    assert "--output_dir" in line and "File too large" in line
    assert (output / "config.json").read_text() == flags
    assert train.main(arguments) == 0
    assert result(output) == result(whole)


@pytest.fixture(scope="module")
def evaluated(tiny, tmp_path_factory):
    """The run of `whole` with evaluations."""
    output = tmp_path_factory.mktemp("evaluated") / "out"
    assert train.main(run_flags(tiny.folder, output, *STEPS, *evaluating(tiny.folder))) == 0
    return output


def best_by_hand(evaluations: list[dict], metric: str = "eval/mae") -> int:
    """The step of the lowest value, the earliest of equal ones; an evaluation before the first step does not count."""
    return min((e for e in evaluations if e["step"] > 0), key=lambda e: (e[metric], e["step"]))["step"]


def test_the_best_model_is_that_of_the_lowest_error_and_of_equal_ones_the_first(evaluated):
    evaluations = read_evaluations(evaluated / "final")
    assert [evaluation["step"] for evaluation in evaluations] == [0, 2, 4]
    assert [step for step, _ in result(evaluated).curves["eval/reward"]] == [0, 2, 4]
    assert best_by_hand(evaluations) == 2
    assert json.loads((evaluated / "best" / "progress.json").read_text())["step"] == 2
    assert json.loads((evaluated / "final" / "progress.json").read_text())["best_step"] == 2
    assert weights(evaluated / "best").equal(weights(evaluated / "checkpoint-2"))


def test_the_best_model_is_that_of_the_metric(tiny, evaluated, tmp_path):
    metric = ["--metric_for_best_model", "eval/reward", "--save_steps", "0"]
    assert train.main(run_flags(tiny.folder, tmp_path / "out", *STEPS, *evaluating(tiny.folder), *metric)) == 0
    two, four = read_evaluations(tmp_path / "out" / "final")[1:]
    assert two["eval/reward"] < four["eval/reward"] and two["eval/mae"] == four["eval/mae"]
    assert json.loads((tmp_path / "out" / "best" / "progress.json").read_text())["step"] == 4
    assert result(tmp_path / "out").best == result(evaluated).weights


@pytest.mark.parametrize("is_evaluated", [True, False], ids=["killed later", "a signal came before the evaluation"])
def test_a_resumed_run_evaluates_at_the_same_steps_and_keeps_the_same_best_model(
    tiny, evaluated, tmp_path, is_evaluated
):
    """Resumed after step 2, where it was evaluated, or was not yet; best/ was being saved when it was killed."""
    output = stopped_after(2, evaluated, tmp_path / "out")
    if is_evaluated:
        shutil.copytree(evaluated / "best", output / "best")
    else:
        path = output / "checkpoint-2" / "progress.json"
        progress = json.loads(path.read_text())
        progress["evaluations"], progress["best_step"] = progress["evaluations"][:1], None
        path.write_text(json.dumps(progress))
        SummaryWriter(str(output / "tensorboard"), purge_step=2).close()
    shutil.copytree(evaluated / "best", output / "best.removed")
    shutil.copytree(evaluated / "best", output / "best.unfinished")
    (output / "best.unfinished" / "model.safetensors").write_bytes(b"half")
    assert train.main(run_flags(tiny.folder, output, *STEPS, *evaluating(tiny.folder), *AUTO)) == 0
    assert read_evaluations(output / "final") == read_evaluations(evaluated / "final")
    found, expected = result(output), result(evaluated)
    assert found.weights == expected.weights and found.best == expected.best
    names = [name for name in expected.curves if name.startswith("eval/")]
    assert names and all(found.curves[name] == expected.curves[name] for name in names)
    assert not list(output.glob("best.*"))


def test_evaluation_changes_nothing_in_training(whole, evaluated):
    found, expected = result(evaluated), result(whole)
    assert found.weights == expected.weights and found.rollouts == expected.rollouts
    assert {name: found.curves[name] for name in expected.curves} == expected.curves


def test_a_run_that_begins_anew_shows_the_evaluation_before_its_first_step_once(tiny, evaluated, tmp_path):
    output = shutil.copytree(evaluated, tmp_path / "out")
    for folder in [*checkpoints(output).values(), output / "final"]:
        shutil.rmtree(folder)  # as if it had been killed before its first checkpoint
    more = [*evaluating(tiny.folder), *AUTO, "--max_steps", "1"]
    assert train.main(run_flags(tiny.folder, output, *STEPS, *more)) == 0
    assert [evaluation["step"] for evaluation in read_evaluations(output / "final")] == [0, 1]
    rewards = result(output).curves["eval/reward"]
    assert [step for step, _ in rewards] == [0, 1]
    assert rewards[0] == result(evaluated).curves["eval/reward"][0]


def test_other_held_out_samples_are_refused_and_none_are_fine(tiny, evaluated, tmp_path, capfd):
    flags = [*STEPS, *evaluating(tiny.folder)]
    samples = json.loads((tiny.folder / "data.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(samples[1:]))
    output = stopped_after(3, evaluated, tmp_path / "out")
    assert train.main(run_flags(tiny.folder, output, *flags, *AUTO, "--eval_data_path", tmp_path / "other.json")) == 2
    assert (
        "--eval_data_path" in (printed := capfd.readouterr().err) and "had other samples (none is fine, too)" in printed
    )
    assert train.main(run_flags(tiny.folder, output, *STEPS, *AUTO)) == 0
    assert [e["step"] for e in read_evaluations(output / "final")] == [0, 2]


def test_a_broken_held_out_video_costs_no_step(tiny, whole, tmp_path, capfd):
    """The evaluation at the end fails, after all the training; with the video mended the same command goes on."""
    output, sample = stopped_after(3, whole, tmp_path / "out"), json.loads((tiny.folder / "data.json").read_text())[0]
    (tmp_path / "heldout.json").write_text(json.dumps([sample | {"video": [str(tmp_path / "a.mp4")]}]))
    (tmp_path / "a.mp4").write_bytes(b"no video")
    arguments = run_flags(tiny.folder, output, *STEPS, *AUTO, "--save_steps", "0")
    arguments += ["--eval_data_path", str(tmp_path / "heldout.json")]
    assert train.main(arguments) == 2
    assert "a.mp4" in capfd.readouterr().err and set(checkpoints(output)) == {3, 4}
    shutil.copy(tiny.folder / "videos" / "0_0.mp4", tmp_path / "a.mp4")
    assert train.main(arguments) == 0
    assert [e["step"] for e in read_evaluations(output / "final")] == [4]
    assert result(output).weights == result(whole).weights


def test_a_branch_gets_a_best_model_of_its_own(tiny, evaluated, tmp_path):
    branch = [*evaluating(tiny.folder), "--resume_from_checkpoint", str(evaluated / "checkpoint-3")]
    assert train.main(run_flags(tiny.folder, tmp_path / "branch", *STEPS, *branch)) == 0
    progress = json.loads((tmp_path / "branch" / "best" / "progress.json").read_text())
    assert progress["step"] == progress["best_step"] == 4


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
        "flags": {"model_id": "m", "supervised": False},
        "step": 1,
        "total_steps": 1,
        "num_samples": 1,
        "data": [],
        "evaluations": [],
    }
    tokenizer = Nothing()
    tokenizer.save_pretrained = lambda folder: None
    assert save(config, "final", ModelFiles(Nothing(), tokenizer, []), {}, progress, True)
