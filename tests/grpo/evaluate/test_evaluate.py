"""python -m grpo.evaluate: the same answers and figures on any number of ranks, after any interruption; bad input."""

import io
import json
import os
import resource
import shutil
import signal
import statistics
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

import train
from data.sample import InputError
from grpo.evaluate import __main__ as command
from grpo.export import load_merged
from grpo.model.load import load_model
from grpo.ranks import start_processes
from reward.numerical import numerical_video_reward
from tests.conftest import FLAGS, make_tiny, new_store, run_ranks
from tests.grpo.rewards import named
from tests.kill_and_resume import read_evaluations
from tests.test_train import flags

LENGTH = ["--max_completion_length", "4"]
LORA = "--lora_enable --lora_rank 4 --freeze_vision_tower".split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Eleven samples, so that batches of two are unequal among two or three ranks; one truth has no number."""
    tiny = make_tiny(tmp_path_factory.mktemp("tiny") / "tiny", num_videos=(1, 2) * 5 + (1,))
    samples = json.loads((tiny.folder / "data.json").read_text())
    samples[4]["conversations"][-1]["value"] = "It cannot be seen."
    (tiny.folder / "heldout.json").write_text(json.dumps(samples))
    with torch.no_grad():  # so that some greedy answers have a number
        tiny.model.lm_head.weight[tiny.tokenizer.convert_tokens_to_ids(list("0123456789"))] *= 2
    tiny.model.save_pretrained(tiny.folder / "model")
    return tiny


def trained(tiny, output: Path, *more) -> Path:
    held = ["--eval_data_path", tiny.folder / "heldout.json", "--per_device_eval_batch_size", "2"]
    assert train.main(flags(tiny, output, *LENGTH, *held, "--max_steps", "2", "--log_completions", "0", *more)) == 0
    return output


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    return trained(tiny, tmp_path_factory.mktemp("run") / "out")


def by_hand(tiny, output: Path, *more) -> list[str]:
    where = ["--model_id", tiny.folder / "model", "--data_path", tiny.folder / "heldout.json", "--output_dir", output]
    where += ["--image_folder", tiny.folder / "videos", "--per_device_eval_batch_size", "2"]
    return [str(flag) for flag in [*where, *FLAGS, *LENGTH, *more]]


def predictions(output: Path) -> list[dict]:
    """The lines, without what the clock decides."""
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def metrics(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def answered(tiny, tmp_path_factory):
    """The folder of an evaluation."""
    output = tmp_path_factory.mktemp("answered") / "out"
    assert command.main(by_hand(tiny, output)) == 0
    return output


SAMPLED = ["--num_samples", "4", "--temperature", "1.0"]


@pytest.fixture(scope="module")
def sampled(tiny, tmp_path_factory):
    """The folder of an evaluation of several answers, and what it printed."""
    output = tmp_path_factory.mktemp("sampled") / "out"
    with redirect_stdout(io.StringIO()) as printed:
        assert command.main(by_hand(tiny, output, *SAMPLED)) == 0
    return output, printed.getvalue()


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """A run with adapters."""
    return trained(tiny, tmp_path_factory.mktemp("adapters") / "out", *LORA)


def refuse(*arguments) -> None:
    raise AssertionError("rank 0 alone reads the weights")


def on_a_rank(several: list[list[str]], ports: list[int], log: str) -> None:
    """Evaluate more than once, each time in a new process group."""
    if os.environ["RANK"] != "0":
        command.load_model = command.load_merged = refuse
    with open(f"{log}.{os.environ['RANK']}", "w") as file, redirect_stdout(file), redirect_stderr(file):
        for arguments, port in zip(several, ports, strict=True):
            os.environ["MASTER_PORT"] = str(port)
            assert command.main(arguments) == 0


def test_a_run_is_evaluated_with_its_own_settings_to_the_last_digit(run, capsys):
    assert command.main(["--run", str(run)]) == 0
    found, (in_training,) = metrics(run / "eval"), read_evaluations(run / "final")
    assert in_training.pop("step") == 2
    figures = {name.removeprefix("eval/"): value for name, value in in_training.items()}
    assert {name: found[name]["value"] for name in figures} == figures
    assert found["n"]["value"] == 10 and found["samples_without_true_number"] == 1 and found["samples"] == 11
    assert found["settings"]["nframes"] == 4 and found["answers"] == "greedy"
    printed = capsys.readouterr().out
    assert f"mae{figures['mae']:>31.3f}" in printed and "1 samples not in the figures" in printed


def test_a_prediction_holds_the_answer_and_what_was_read_from_it(answered):
    lines = predictions(answered)
    assert [line["id"] for line in lines] == [f"s{i}" for i in range(11)]
    for i, line in enumerate(lines):
        assert line["truth_number"] == (None if i == 4 else 40 + i)
        (answer,), (reward,) = line["answers"], line["rewards"]
        messages = [[{"role": "assistant", "content": text}] for text in (answer, line["truth"])]
        assert numerical_video_reward(messages[:1], messages[1]) == [reward]
    assert any(line["numbers"] != [None] for line in lines)
    stored = (answered / "predictions.jsonl").read_text().splitlines()
    assert all(json.loads(line)["seconds"] > 0 for line in stored)


def test_the_number_of_ranks_changes_nothing(tiny, answered, sampled, tmp_path):
    ways = {"greedy": ([], answered), "sampled": (SAMPLED, sampled[0])}
    for ranks in (2, 3):
        several = [by_hand(tiny, tmp_path / way / f"{ranks}", *more) for way, (more, _) in ways.items()]
        run_ranks(on_a_rank, ranks, several, [new_store() for _ in ways], str(tmp_path / "log"))
    for way, (_, whole) in ways.items():
        one = predictions(whole)
        assert len(one) == 11 and len(one[0]["answers"]) == (4 if way == "sampled" else 1)
        for ranks in ("2", "3"):
            found = tmp_path / way / ranks
            assert predictions(found) == one
            assert (found / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()


def load_on_a_rank(ways: list[list[str]], output: str) -> None:
    """Load several models in the precision of a GPU."""
    device = start_processes()
    command.compute_dtype = lambda device: torch.bfloat16
    if os.environ["RANK"] != "0":
        command.load_model = command.load_merged = refuse
    models = [command.load_for_sampling(command.parse(arguments), device) for arguments in ways]
    assert not any(model.training for model in models)
    torch.save([weights_and_buffers(model) for model in models], f"{output}.{os.environ['RANK']}")
    with pytest.raises(InputError, match="its weights cannot be read"):  # on both ranks
        command.load_for_sampling(command.parse([*ways[0], "--model_id", "/nowhere"]), device)
    dist.destroy_process_group()


def weights_and_buffers(model) -> dict:
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def test_every_rank_gets_the_model_that_rank_0_has_read(tiny, adapters, tmp_path):
    untied = load_model(tiny.folder / "model")
    untied.config.tie_word_embeddings = untied.config.text_config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(2 * untied.lm_head.weight.detach())
    untied.save_pretrained(tmp_path / "untied")
    more = [], ["--model_id", tmp_path / "untied"], ["--adapter", adapters / "final"]
    run_ranks(load_on_a_rank, 2, [by_hand(tiny, tmp_path / "out", *way) for way in more], str(tmp_path / "loaded"))
    expected = [load_model(path, torch.bfloat16) for path in (tiny.folder / "model", tmp_path / "untied")]
    expected.append(load_merged(adapters / "final", tiny.folder / "model", torch.bfloat16))
    for rank in "01":
        found = torch.load(tmp_path / f"loaded.{rank}", weights_only=False)
        for model, contents in zip(expected, found, strict=True):
            torch.testing.assert_close(contents, weights_and_buffers(model), rtol=0, atol=0)
        assert ["lm_head.weight" in contents for contents in found] == [False, True, False]


def interrupt(arguments: list[str], calls: str) -> None:
    os.environ |= {"INTERRUPT": "1", "WATCHED": calls}
    assert command.main(arguments) == 128 + signal.SIGINT


def test_an_interrupted_evaluation_continues_and_answers_nothing_twice(tiny, tmp_path, monkeypatch, capsys):
    whole, output, watched = tmp_path / "whole", tmp_path / "out", named("watched")
    monkeypatch.setenv("WATCHED", str(tmp_path / "calls"))
    assert command.main(by_hand(tiny, whole, *watched)) == 0
    run_ranks(interrupt, 1, by_hand(tiny, output, *watched), str(tmp_path / "calls"))
    assert predictions(output) == predictions(whole)[:4]
    path = output / "predictions.jsonl"
    path.write_text(path.read_text() + '{"id": "s4", "tru')  # killed while it wrote
    (tmp_path / "calls").unlink()
    assert command.main(by_hand(tiny, output, *watched)) == 0
    assert (tmp_path / "calls").read_text().splitlines()[:4] == ["s4 s5", "s6 s7", "s8 s9", "s10"]
    assert "4 of 11 samples are answered already" in capsys.readouterr().out
    assert predictions(output) == predictions(whole) and metrics(output) == metrics(whole)
    kept = path.read_bytes()
    assert command.main(by_hand(tiny, output, *watched, "--cuts", "44", "--valid_range", "0", "45")) == 0
    assert path.read_bytes() == kept and "auc_44" in metrics(output)  # other figures of the same answers


def test_several_answers_give_single_median_and_best(sampled):
    output, printed = sampled
    found = metrics(output)
    assert found["answers"] == "single"
    assert found["best_of_4"]["reward"]["value"] >= found["reward"]["value"]
    assert found["best_of_4"]["parse_rate"]["value"] >= found["parse_rate"]["value"] > 0
    lines = [line for line in predictions(output) if line["truth_number"] is not None]
    every = [number for line in lines for number in line["numbers"]]
    assert found["parse_rate"]["value"] == pytest.approx(sum(n is not None for n in every) / 40)
    constant = statistics.median(line["truth_number"] for line in lines)
    errors = {"single": [], "median": [], "best": []}
    for line in lines:
        truth, valid = line["truth_number"], [n for n in line["numbers"] if n is not None and 0 <= n <= 100]
        errors["single"].append(statistics.mean(abs(n - truth) for n in valid + [constant] * (4 - len(valid))))
        errors["median"].append(abs(statistics.median(valid or [constant]) - truth))
        errors["best"].append(min(abs(n - truth) for n in valid or [constant]))
    maes = [found["mae"], found["median_of_4"]["mae"], found["best_of_4"]["mae"]]
    assert [mae["value"] for mae in maes] == pytest.approx([statistics.mean(e) for e in errors.values()])
    assert "median of 4" in printed


def test_adapters_are_evaluated_on_their_base(tiny, adapters, tmp_path):
    output = adapters
    assert command.main(["--run", str(output)]) == 0
    by_run = metrics(output / "eval")
    assert by_run["adapter"] == str(output / "final") and by_run["model_id"] == str(tiny.folder / "model")
    in_training = read_evaluations(output / "final")[0]
    assert by_run["mae"]["value"] == pytest.approx(in_training["eval/mae"], rel=1e-6)
    assert command.main(by_hand(tiny, tmp_path / "hand", "--adapter", output / "final")) == 0
    assert predictions(tmp_path / "hand") == predictions(output / "eval")
    model = ["--run", str(output), "--model_id", str(tiny.folder / "model"), "--output_dir", str(tmp_path / "base")]
    assert command.main(model) == 0  # a model that is named is taken as it is
    assert metrics(tmp_path / "base")["adapter"] == ""


def test_pictures_are_drawn_whatever_the_answers_are(tiny, tmp_path):
    assert command.main(by_hand(tiny, tmp_path / "out", "--cuts", "45")) == 0
    names = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert names == {"scatter", "bland_altman", "errors", "roc"}
    for path in (tmp_path / "out").glob("*.png"):
        image = Image.open(path)
        assert image.width >= 500 and len(image.convert("L").getcolors()) > 10
    assert command.main(by_hand(tiny, tmp_path / "none", "--valid_range", "900", "999")) == 0  # no answer is valid
    assert metrics(tmp_path / "none")["mae"]["value"] == metrics(tmp_path / "none")["zero_skill_mae"]["value"]


def test_unreadable_videos_are_left_out_and_counted(tiny, tmp_path, capsys):
    videos = shutil.copytree(tiny.folder / "videos", tmp_path / "videos")
    (videos / "3_0.mp4").write_bytes(b"no video")
    more = ["--image_folder", str(videos)]
    assert command.main(by_hand(tiny, tmp_path / "stop", *more)) == 2
    assert command.main(by_hand(tiny, tmp_path / "out", *more, "--on_bad_video", "skip")) == 0
    assert metrics(tmp_path / "out")["samples_left_out"] == 1
    assert [line["id"] for line in predictions(tmp_path / "out")] == [f"s{i}" for i in range(11) if i != 3]
    printed = capsys.readouterr().out
    assert "left out of the evaluation: sample 's3'" in printed and "1 samples left out, for their videos" in printed


def damaged(tiny, tmp_path: Path, name: str) -> list[str]:
    """Flags with a mistake."""
    if name == "no number in any truth":
        samples = json.loads((tiny.folder / "heldout.json").read_text())
        for sample in samples:
            sample["conversations"][-1]["value"] = "normal"
        (tmp_path / "data.json").write_text(json.dumps(samples))
        return ["--data_path", tmp_path / "data.json"]
    if name == "an id twice":
        samples = json.loads((tiny.folder / "heldout.json").read_text())
        (tmp_path / "data.json").write_text(json.dumps(samples + samples[:1]))
        return ["--data_path", tmp_path / "data.json"]
    if name == "adapters as a model":
        shutil.copytree(tiny.folder / "model", tmp_path / "adapters")
        (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    if name == "no adapter":
        return ["--adapter", tiny.folder / "model"]
    return {
        "a cut that is no number": ["--cuts", "40", "low"],
        "no such run": ["--run", tmp_path / "nowhere"],
        "no model": ["--model_id", tmp_path / "nowhere"],
        "equal answers": ["--num_samples", "4"],
        "a small temperature": ["--temperature", "0.001"],
        "an unknown flag": ["--cut", "40"],
        "a turned range": ["--valid_range", "100", "0"],
        "adapters as a model": ["--model_id", tmp_path / "adapters"],
    }[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no number in any truth", "no answer in it contains a number"),
        ("an id twice", "the id 's0' occurs twice"),
        ("no adapter", "is no adapter folder"),
        ("a cut that is no number", "--cuts: invalid float value: 'low'"),
        ("no such run", "is no folder of a run"),
        ("no model", "its config, tokenizer or chat template cannot be used"),
        ("equal answers", "greedy answers are all equal"),
        ("a small temperature", "--temperature 0.001"),
        ("an unknown flag", "did you mean --cuts?"),
        ("a turned range", "--valid_range 100 0"),
        ("adapters as a model", "or evaluate them as --adapter"),
    ],
)
def test_bad_input_gets_one_line_and_nothing_is_written(tiny, tmp_path, capfd, name, words):
    arguments = by_hand(tiny, tmp_path / "out", *damaged(tiny, tmp_path, name))
    assert command.main(arguments) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("grpo.evaluate: error: ") and words in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["--model_id", "--data_path", "--output_dir"])
def test_a_missing_flag_is_named(tiny, tmp_path, capfd, missing):
    arguments = by_hand(tiny, tmp_path / "out")
    place = arguments.index(missing)
    del arguments[place : place + 2]
    assert command.main(arguments) == 2
    assert f"{missing} is missing: name it, or a run that has it with --run" in capfd.readouterr().err


def test_an_adapter_of_another_model_gets_one_line(tiny, adapters, tmp_path, capfd):
    adapter = shutil.copytree(adapters / "final", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    capfd.readouterr()
    assert command.main(by_hand(tiny, tmp_path / "out", "--adapter", adapter)) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "does not fit the model" in line


def test_a_run_whose_base_is_gone_names_the_adapters_and_their_base(adapters, tmp_path, capfd):
    run = shutil.copytree(adapters, tmp_path / "run")
    path = run / "final" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/gone/base"}))
    capfd.readouterr()
    assert command.main(["--run", str(run)]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert f"--adapter {str(run / 'final')!r}: its base model '/gone/base' is not found" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--nframes", "2"], "nframes 2 was 4"),
        (["--max_videos", "1"], "max_videos 1 was 5"),
        (["--num_samples", "2", "--temperature", "1"], "temperature 1.0 was 0.0, num_samples 2 was 1"),
        (["--system_prompt", "Look well."], "system_prompt 'Look well.' was ''"),
        ("other data", "samples ['"),
        ("other model", "weights '"),
        ("no settings", "settings.json beside it cannot be read"),
        ("a damaged line", "line 2 (remove it to go on without it) cannot be read"),
    ],
)
def test_predictions_of_something_else_are_left_as_they_are(tiny, tmp_path, run, answered, capfd, change, words):
    output = shutil.copytree(answered, tmp_path / "out")
    if change == "other data":
        change = ["--data_path", tiny.folder / "data.json"]
    elif change == "other model":
        change = ["--model_id", run / "final"]
    elif change == "no settings":
        change = []
        (output / "settings.json").unlink()
    elif change == "a damaged line":
        change = []
        lines = (output / "predictions.jsonl").read_text().splitlines(keepends=True)
        (output / "predictions.jsonl").write_text("".join([lines[0], '{"id": 3}\n', *lines[2:]]))
    before = {path.name: path.read_bytes() for path in output.glob("[!.]*")}
    capfd.readouterr()
    assert command.main(by_hand(tiny, output, *change)) == 2
    (line,) = [line for line in capfd.readouterr().err.strip().splitlines() if "error" in line]
    assert words in line and "new --output_dir" in line
    assert {path.name: path.read_bytes() for path in output.glob("[!.]*")} == before


def test_a_run_without_what_is_evaluated_is_told_so(tiny, tmp_path, capfd):
    output = tmp_path / "out"
    assert train.main(flags(tiny, output, "--max_steps", "1")) == 0
    assert command.main(["--run", str(output)]) == 2
    assert "--data_path is missing: name it, or a run that has it" in capfd.readouterr().err
    shutil.rmtree(output / "final")
    assert command.main(["--run", str(output), "--data_path", str(tiny.folder / "data.json")]) == 2
    assert "has no final/ yet: name a checkpoint-N" in capfd.readouterr().err
    (output / "config.json").write_text("[]")
    assert command.main(["--run", str(output)]) == 2
    assert "config.json cannot be read" in capfd.readouterr().err


def test_flags_beside_a_run_count_more_than_its_own(tiny, run, tmp_path):
    more = ["--data_path", str(tiny.folder / "data.json"), "--max_videos", "1", "--output_dir", str(tmp_path / "out")]
    assert command.main(["--run", str(run), *more]) == 0
    found = metrics(tmp_path / "out")
    assert found["samples_without_true_number"] == 0 and found["settings"]["max_videos"] == 1
    assert found["settings"]["nframes"] == 4  # of the run


def test_reward_functions_beside_a_run_come_without_the_weights_of_its_own(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    own = {"reward_funcs": ["numerical_video_reward", "format_reward"], "reward_weights": [1.0, 0.5]}
    own |= {"reward_kwargs": '{"error_scale": 8}'}
    (tmp_path / "final").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(config | own))

    def rewards_of(*more):
        parsed = command.parse(["--run", str(tmp_path), *more])
        return {name: getattr(parsed, name) for name in own}

    assert rewards_of() == own
    for name in ("numerical_video_reward", "smooth_numerical_reward"):  # the first is the default
        assert rewards_of("--reward_funcs", name) == {"reward_funcs": [name], "reward_weights": [], "reward_kwargs": ""}


def run_in_little_memory(arguments: list[str], log: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, -1))
    with open(log, "w") as file, redirect_stdout(file), redirect_stderr(file):
        assert command.main(arguments) == 2


def test_memory_that_runs_out_is_a_line_with_the_flag_that_helps(tiny, tmp_path):
    """Half a terabyte of keys and values."""
    huge = by_hand(tiny, tmp_path / "out", "--max_completion_length", "1000000000")
    run_ranks(run_in_little_memory, 1, huge, str(tmp_path / "log"))
    printed = (tmp_path / "log").read_text()
    (line,) = [line for line in printed.splitlines() if "error:" in line]
    assert "while 2 prompts of up to" in line and "--per_device_eval_batch_size" in line and "Traceback" not in printed


def test_truths_out_of_range_are_pointed_out(tiny, tmp_path, capsys):
    assert command.main(by_hand(tiny, tmp_path / "out", "--valid_range", "0", "45")) == 0
    printed = capsys.readouterr().out
    assert "5 truths, such as 46, are outside --valid_range 0 45" in printed
