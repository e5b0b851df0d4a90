"""The whole program on real files: what a run writes, on one rank and on two, and what bad input gets."""

import json
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2MLP

import train
from data.epochs import Epochs
from grpo.demo.mp4 import write_mp4
from tests.conftest import FLAGS, make_tiny, run_ranks
from tests.grpo.rewards import named

TAGS = """
    reward zero_skill_reward reward_std frac_reward_zero_std
    rewards/numerical_video_reward/mean rewards/numerical_video_reward/std
    completions/mean_length completions/min_length completions/max_length completions/clipped_ratio loss entropy
    sampling/sampling_logp_difference/mean sampling/sampling_logp_difference/max grad_norm learning_rate time/rollout
    time/reward time/update time/data time/step completions/unscored run/tokens_per_second run/peak_memory_gb
    run/skipped_samples run/shortened_prompts run/bad_steps
""".split()


def flags(tiny, output, *more) -> list[str]:
    where = ["--model_id", tiny.folder / "model", "--data_path", tiny.folder / "data.json"]
    where += ["--image_folder", tiny.folder / "videos", "--output_dir", output]
    quick = ["--learning_rate", "1e-3", "--log_completions", "0"]  # pictures take longer than a step
    return [str(flag) for flag in [*where, *FLAGS, *quick, *more]]


def curves(output) -> dict[str, list[float]]:
    events = EventAccumulator(str(Path(output) / "tensorboard")).Reload()
    return {tag: [point.value for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def weights(folder) -> torch.Tensor:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def main_on_a_rank(arguments: list[str], log: str, code: int) -> None:
    with open(f"{log}.{os.environ['RANK']}", "w") as file, redirect_stdout(file), redirect_stderr(file):
        assert train.main(arguments) == code


def run_main(world_size: int, arguments: list[str], tmp_path: Path, code: int = 0) -> str:
    """Run the program on some ranks, each of which must end with `code`; return what they printed."""
    run_ranks(main_on_a_rank, world_size, arguments, str(tmp_path / "log"), code)
    return "".join((tmp_path / f"log.{rank}").read_text() for rank in range(world_size))


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Two epochs of four samples in batches of three: steps of 3, 1, 3 and 1 prompts."""
    output = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DEBUG_MODE", "true")
        environment.setenv("LOG_PATH", f"{output}.log")
        more = ["--global_batch_size", "3", "--num_train_epochs", "2", "--save_steps", "1", "--num_iterations", "2"]
        more += ["--log_completions", "4"]
        more += [*named("by_length"), "numerical_video_reward", "--reward_weights", "0.1", "1"]  # groups that differ
        assert train.main(flags(tiny, output, *more)) == 0
    return output


def test_a_run_draws_every_curve_with_a_point_per_step(run):
    found = curves(run)
    more = {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
    assert set(found) == {*TAGS, *more, "rewards/by_length/mean", "rewards/by_length/std"}
    assert all(len(points) == 4 for points in found.values())
    assert max(found["grad_norm"]) > 0
    assert max(found["sampling/sampling_logp_difference/max"]) < 1e-4
    assert max(found["clip_ratio/region_mean"]) > 0  # the second update of a batch is off its rollouts
    assert found["learning_rate"] == pytest.approx([5e-4, 1e-3, 7.5e-4, 2.5e-4])  # a step of warm-up, then a cosine


def test_a_run_shows_completions_with_prompt_truth_reward_and_advantage(run):
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("completions/text_summary")]
    assert len(texts) == 4
    assert all("What is the ejection fraction" in text and "The ejection fraction is 4" in text for text in texts)
    assert [text.count("\n") for text in texts] == [10, 4, 10, 4]  # a head of two lines, 3 completions per prompt


def test_a_run_writes_its_resolved_flags(run):
    resolved = json.loads((run / "config.json").read_text())
    assert (resolved["global_batch_size"], resolved["per_device_train_batch_size"]) == (3, 3)
    assert (resolved["gradient_accumulation_steps"], resolved["epsilon"], resolved["seed"]) == (1, 0.05, 0)


def test_debug_mode_logs_every_completion_with_its_step_and_sample(run):
    lines = [json.loads(line) for line in Path(f"{run}.log").read_text().splitlines()]
    assert len(lines) == (3 + 1 + 3 + 1) * 8
    assert {line["sample_id"] for line in lines} == {"s0", "s1", "s2", "s3"}
    assert [line["step"] for line in lines] == [1] * 24 + [2] * 8 + [3] * 24 + [4] * 8
    assert all(line["truth"] == f"The ejection fraction is {40 + int(line['sample_id'][1])}%." for line in lines)


def test_saved_models_are_ordinary_folders_and_training_changes_them(tiny, run):
    assert {path.name for path in run.iterdir()} == {
        *(
            ".lock",
            "config.json",
            "tensorboard",
            "rollouts.jsonl",
            "checkpoint-1",
            "checkpoint-2",
            "checkpoint-3",
            "checkpoint-4",
            "final",
        )
    }
    assert (run / "final" / "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(run / "final").chat_template == tiny.tokenizer.chat_template
    trained = [weights(folder) for folder in (tiny.folder / "model", run / "checkpoint-3", run / "final")]
    assert not torch.equal(trained[0], trained[1]) and not torch.equal(trained[1], trained[2])


def test_a_saved_model_can_be_trained_on_and_its_processor_goes_with_it(tiny, run, tmp_path):
    model = shutil.copytree(run / "final", tmp_path / "model")
    (model / "preprocessor_config.json").write_text("{}")
    assert train.main(flags(tiny, tmp_path / "out", "--global_batch_size", "4", "--model_id", model)) == 0
    assert not torch.equal(weights(model), weights(tmp_path / "out" / "final"))
    assert (tmp_path / "out" / "final" / "preprocessor_config.json").read_text() == "{}"


@pytest.mark.parametrize("frozen", [[], ["--freeze_vision_tower"]], ids=["all weights", "a frozen tower"])
def test_two_ranks_do_what_one_does_with_all_forms_of_samples(mixed, frozen, tmp_path):
    more = ["--global_batch_size", "4", "--num_train_epochs", "2", "--num_iterations", "2", *frozen]
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main(flags(mixed, one, *more)) == 0
    run_main(2, flags(mixed, two, *more, "--per_device_train_batch_size", "1"), tmp_path)
    found, expected = curves(two), curves(one)
    for tag in TAGS:
        if not tag.startswith("time/") and tag not in ("run/tokens_per_second", "run/peak_memory_gb"):
            assert found[tag] == pytest.approx(expected[tag], rel=1e-3, abs=1e-5), tag
    # Every step sampled with the weights of that step.
    assert max(found["sampling/sampling_logp_difference/max"]) < 1e-4
    difference = weights(two / "final") - weights(one / "final")
    assert difference.norm() / weights(one / "final").norm() < 1e-5


def test_the_last_smaller_batch_runs_on_more_ranks_than_it_has_prompts(tiny, tmp_path):
    one, three = tmp_path / "one", tmp_path / "three"
    three_prompts = ["--global_batch_size", "3", *named("by_length")]
    assert train.main(flags(tiny, one, *three_prompts)) == 0
    run_main(3, flags(tiny, three, *three_prompts), tmp_path)
    found, expected = curves(three), curves(one)
    for tag in ("reward", "loss", "entropy", "grad_norm", "completions/mean_length"):
        assert len(found[tag]) == 2  # of 3 prompts and of 1
        assert found[tag] == pytest.approx(expected[tag], rel=1e-3, abs=1e-6), tag


@pytest.fixture
def with_a_bad_video(tmp_path):
    tiny = make_tiny(tmp_path / "tiny", num_videos=(1, 1, 1, 1))
    (tiny.folder / "videos" / "2_0.mp4").write_bytes(b"no video")
    return tiny


@pytest.mark.parametrize(("world_size", "batch"), [(2, 2), (3, 3)])
def test_a_bad_video_is_skipped_and_counted_once_on_all_ranks(with_a_bad_video, tmp_path, world_size, batch):
    # The bad sample is the last one: with three ranks it fills a batch alone, and is repeated on two of them.
    seed = next(seed for seed in range(99) if Epochs([4], seed).order(0)[0][3] == 2)
    more = ["--global_batch_size", str(batch), "--seed", str(seed), "--on_bad_video", "skip"]
    printed = run_main(world_size, flags(with_a_bad_video, tmp_path / "out", *more), tmp_path)
    found = curves(tmp_path / "out")
    assert found["run/skipped_samples"] == [0, 1]
    assert len(found["reward"]) == (1 if batch == 3 else 2)  # a step of which nothing counts has no reward
    assert printed.count("left out: sample 's2'") == 1


def test_a_bad_video_stops_all_ranks_with_one_line(with_a_bad_video, tmp_path):
    arguments = flags(with_a_bad_video, tmp_path / "out", "--global_batch_size", "4")
    lines = [line for line in run_main(2, arguments, tmp_path, code=2).splitlines() if "error: " in line]
    assert (
        len(lines) == 1
        and lines[0].startswith("train.py: error: sample 's2'")
        and "2_0.mp4" in lines[0]
        and "--on_bad_video skip" in lines[0]
    )


def test_long_prompts_lose_videos_and_are_counted_on_all_ranks(tiny, tmp_path):
    _, *lengths = sorted(len(prompt.prompt_ids) for prompt in tiny.prompts)
    limits = ["--max_prompt_length", lengths[0], "--on_long_prompt", "fewer_videos", "--global_batch_size", "4"]
    printed = run_main(2, flags(tiny, tmp_path / "out", *limits), tmp_path)
    num_long = sum(length > lengths[0] for length in lengths)
    assert num_long > 0 and printed.count("its prompt is too long, and has ") == num_long
    assert curves(tmp_path / "out")["run/shortened_prompts"] == [num_long]


def test_random_videos_are_seen_over_the_epochs_and_named_in_the_log(tiny, tmp_path, capfd):
    more = ["--max_videos", "1", "--video_cap", "random", "--num_train_epochs", "3", "--global_batch_size", "4"]
    assert train.main(flags(tiny, tmp_path / "out", *more, "--frame_jitter")) == 0
    printed = capfd.readouterr().out
    assert "2 samples have more than --max_videos 1 videos" in printed and "is left out of each epoch" in printed
    lines = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert {tuple(line["media"]) for line in lines if line["sample_id"] == "s1"} == {
        ("1_0.mp4",),
        ("1_1.mp4",),
        ("1_2.mp4",),
    }


def test_32_videos_in_one_sample_train(tmp_path, capfd):
    tiny = make_tiny(tmp_path / "tiny", num_videos=(32, 7))
    all_videos = flags(tiny, tmp_path / "all", "--max_videos", "0", "--global_batch_size", "2")
    assert train.main(all_videos) == 0 and "max_videos" not in capfd.readouterr().out
    assert train.main(flags(tiny, tmp_path / "capped", "--global_batch_size", "2")) == 0
    assert capfd.readouterr().out.count("2 samples have more than --max_videos 5 videos") == 1
    for output in ("all", "capped"):
        assert curves(tmp_path / output)["grad_norm"][0] > 0


def entry(**changes) -> dict:
    turns = [{"from": "human", "value": "<video>\nEF?"}, {"from": "gpt", "value": "55%"}]
    return {"id": "a", "video": "0_0.mp4", "conversations": turns} | changes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--num_generations", "1"], ["--num_generations 1"]),
        (["--num_generation", "4"], ["--num_generation"]),
        (["--temperature", "0"], ["--temperature 0"]),
        (["--epsilon", "x"], ["--epsilon"]),
        (["--on_bad_video", "ignore"], ["--on_bad_video", "skip"]),
        (["--fps", "2"], ["--fps", "--nframes"]),
        (["--global_batch_size", "6", "--per_device_train_batch_size", "4"], ["6 is not a multiple of 4 = 1 rank x"]),
        (["--data_path", "nowhere.json"], ["nowhere.json"]),
        (["--model_id", "nowhere"], ["--model_id 'nowhere'"]),
        (["--demo"], ["--demo", "--model_id"]),
        (["--temperature", "1e-300"], ["--temperature"]),
        (["--max_steps", "9" * 400], ["--max_steps"]),
        (["--num_train_epochs", "nan"], ["--num_train_epochs"]),
        (["--output_dir", "{run}/config.json/new"], ["config.json/new", "cannot be written"]),
        ([entry(conversations=[{"from": "human", "value": "<|im_end|>?"}, {"from": "gpt", "value": "5"}])], ["'a'"]),
        (["--output_dir", "{run}"], ["--output_dir", "another run"]),
        (["--data_path", ""], ["--data_path is missing"]),
        (["--data_path", "a", "b", "--data_weights", "1"], ["--data_weights: 1 weights for 2 files"]),
        (["--data_weights", "0"], ["--data_weights 0:", "above 0"]),
        (["--data_weights", "nan"], ["--data_weights nan"]),
        (["--data_weights", "2000"], ["--data_weights 2000"]),
        (["--video_cap", "random", "--max_videos", "0"], ["--video_cap random has no effect with --max_videos 0"]),
        (["--max_videos", "-1"], ["--max_videos -1"]),
        (["--top_p", "0"], ["--top_p 0"]),
        (["--epsilon", "1.5"], ["--epsilon 1.5"]),
        (["--reward_timeout", "1e4"], ["--reward_timeout 10000"]),
        (["--resume_from_checkpoint", ""], ["--resume_from_checkpoint"]),
        (["--eval_steps", "5"], ["--eval_steps is about held-out samples", "--eval_data_path"]),
        (["--eval_on_start"], ["--eval_on_start", "--eval_data_path"]),
        (["--metric_for_best_model", "eval/r2"], ["--metric_for_best_model", "--eval_data_path"]),
        (["--eval_data_path", "nowhere.json"], ["cannot read 'nowhere.json'"]),
        (["--eval_data_path", "{held}/twice.json"], ["twice.json", "the id 'a' occurs twice"]),
        (["--eval_data_path", "{held}/words.json"], ["words.json", "contains a number"]),
        (["--eval_data_path", "{held}/words.json", "--eval_steps", "-1"], ["--eval_steps -1"]),
        (["--metric_for_best_model", "mae"], ["invalid choice: 'mae'", "eval/mae"]),
        (["--cuts", "40", "low"], ["--cuts: invalid float value: 'low'"]),
        (["--cuts", "40", "inf"], ["--cuts 40 inf"]),
        (["--cuts", "40", "40"], ["--cuts 40 40"]),
        (["--valid_range", "100", "0"], ["--valid_range 100 0", "0 100"]),
        (["--valid_range", "1"], ["--valid_range 1:"]),
        (["--valid_range", "0", "nan"], ["--valid_range 0 nan"]),
        ("{", ["data.json", "line 1"]),
        ([entry(conversations=[])], ["'a'", "conversations"]),
        ([entry(conversations=[{"from": "human", "value": "EF?"}])], ["'a'", "gpt"]),
        ([entry(conversations=[{"from": "gpt", "value": "55%"}])], ["'a'", "human"]),
        ([entry(video=["0_0.mp4", "0_0.mp4"])], ["'a'", "1 <video> tag", "2 in"]),
        ([entry(video=["gone.mp4"]), entry(id="b", video="gone2.mp4")], ["2 ", "gone.mp4", "gone2.mp4"]),
    ],
    ids=str,
)
def test_bad_input_gets_one_line_and_exit_code_2_before_training(tiny, run, tmp_path, capfd, change, words):
    if isinstance(change, list) and isinstance(change[0], str):
        words_only = entry(conversations=[{"from": "human", "value": "EF?"}, {"from": "gpt", "value": "normal"}])
        (tmp_path / "words.json").write_text(json.dumps([words_only]))
        (tmp_path / "twice.json").write_text(json.dumps([words_only, words_only]))
        places = {"{run}": str(run), "{held}": str(tmp_path)}
        for place, folder in places.items():
            change = [flag.replace(place, folder) for flag in change]
        arguments = flags(tiny, tmp_path / "out", *change)
    else:
        path = tmp_path / "data.json"
        path.write_text(change if isinstance(change, str) else json.dumps(change))
        arguments = flags(tiny, tmp_path / "out", "--data_path", path)
    assert train.main(arguments) == 2
    out, err = capfd.readouterr()
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("train.py: error: "), err
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_qwen2_5_vl_is_named(tiny, tmp_path, capfd):
    other = tmp_path / "other"
    shutil.copytree(tiny.folder / "model", other)
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert train.main(flags(tiny, tmp_path / "out", "--model_id", other)) == 2
    assert "llama" in capfd.readouterr().err


def broken_weights(path: Path, how: str) -> None:
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "junk":
        path.write_bytes(b"no weights")
    else:
        state = load_file(path)
        name = "model.layers.1.mlp.up_proj.weight"
        (name,) = [key for key in state if key.endswith("layers.1.mlp.up_proj.weight")]
        del state[name]
        save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize("how", ["gone", "cut", "junk", "one layer missing"])
def test_weights_that_cannot_be_read_or_are_not_all_there_stop_the_run(tiny, tmp_path, capfd, how):
    shutil.copytree(tiny.folder / "model", tmp_path / "model")
    broken_weights(tmp_path / "model" / "model.safetensors", how)
    assert train.main(flags(tiny, tmp_path / "out", "--model_id", tmp_path / "model")) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train.py: error: ")]
    assert "--model_id" in line and (how != "one layer missing" or "layers.1.mlp.up_proj.weight" in line)


def test_a_tokenizer_without_vision_tokens_stops_the_run(tiny, tmp_path, capfd):
    shutil.copytree(tiny.folder / "model", tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / "model" / name).read_text()
        (tmp_path / "model" / name).write_text(text.replace("<|video_pad|>", "<|other|>"))
    assert train.main(flags(tiny, tmp_path / "out", "--model_id", tmp_path / "model")) == 2
    assert "its tokenizer has no <|video_pad|>" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for %}", "chat template cannot be used: "),
        ("{% for message in messages %}hello{% endfor %}", "its chat template knows no videos"),
        (
            "{% for message in messages %}{{ message.role + message.content }}{% endfor %}",
            "chat template cannot be used: ",
        ),
    ],
    ids=["broken", "without videos", "for text alone"],
)
def test_a_chat_template_that_is_not_qwens_stops_the_run(tiny, tmp_path, capfd, template, words):
    shutil.copytree(tiny.folder / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    assert train.main(flags(tiny, tmp_path / "out", "--model_id", tmp_path / "model")) == 2
    assert words in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config.json", "num_hidden_layers", "two"),
        ("config.json", "vocab_size", 10),
        ("config.json", "vision_config", 3),
        ("generation_config.json", None, []),
        ("tokenizer_config.json", None, []),
    ],
)
def test_a_model_that_was_edited_wrongly_stops_the_run_with_one_line(tiny, tmp_path, capfd, name, key, value):
    shutil.copytree(tiny.folder / "model", tmp_path / "model")
    path = tmp_path / "model" / name
    edited = json.loads(path.read_text())
    if key:
        where = edited if key in edited else edited["text_config"]
        where[key] = value
    path.write_text(json.dumps(edited if key else value))
    assert train.main(flags(tiny, tmp_path / "out", "--model_id", tmp_path / "model")) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train.py: error: ")]
    assert "--model_id" in line


def test_an_unwritable_debug_log_stops_the_run(tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("DEBUG_MODE", "true")
    monkeypatch.setenv("LOG_PATH", str(tmp_path / "nowhere" / "log"))
    assert train.main(flags(tiny, tmp_path / "out")) == 2
    assert "nowhere/log' cannot be written" in capfd.readouterr().err


def test_several_reward_functions_add_up_with_their_weights_and_may_give_whole_numbers(tiny, tmp_path):
    more = [*named("zero_or_one", "by_length"), "numerical_video_reward", "--reward_weights", "2", "0", "-0.5"]
    assert train.main(flags(tiny, tmp_path / "out", "--global_batch_size", "4", *more)) == 0
    found = curves(tmp_path / "out")
    names = ("zero_or_one", "by_length", "numerical_video_reward")
    whole, curve, original = (found[f"rewards/{name}/mean"][0] for name in names)
    assert whole > 0 and curve > 0 and original > 0
    assert found["reward"][0] == pytest.approx(2 * whole - 0.5 * original)  # a weight of 0 makes a curve


def test_gradient_checkpointing_recomputes_every_layer(tiny, tmp_path, monkeypatch):
    calls = []
    forward = Qwen2MLP.forward
    monkeypatch.setattr(Qwen2MLP, "forward", lambda self, x: calls.append(self.training) or forward(self, x))
    counts = {}
    for choice in ("false", "true"):
        calls.clear()
        more = ["--global_batch_size", "4", "--gradient_checkpointing", choice]
        assert train.main(flags(tiny, tmp_path / choice, *more)) == 0
        counts[choice] = sum(calls)  # those of the update; sampling is not in training mode
    assert counts == {"false": 2, "true": 4}  # two layers, one pass
    assert torch.equal(weights(tmp_path / "false" / "final"), weights(tmp_path / "true" / "final"))


def test_a_video_of_other_length_and_size_trains_beside_small_ones(tmp_path):
    tiny = make_tiny(tmp_path / "tiny", num_videos=(1, 2))
    frames = torch.randint(0, 256, (9, 120, 90, 3), dtype=torch.uint8).numpy()
    write_mp4(tiny.folder / "videos" / "1_0.mp4", frames, fps=3)
    arguments = flags(tiny, tmp_path / "out", "--global_batch_size", "2")
    kept = [flag for flag in arguments if flag not in FLAGS[:6]] + ["--fps", "1", "--video_min_pixels", "3136"]
    assert train.main([*kept, "--video_max_pixels", "12544"]) == 0
