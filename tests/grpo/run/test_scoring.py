"""Rewards of a step: several functions, of one completion and of the whole step, on any number of ranks."""

import copy
import dataclasses
import json
import os
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
import torch.distributed as dist

import train
from data.loader import load_prompt
from grpo.config import Config
from grpo.model import sharding
from grpo.model.optimizer import make_optimizer
from grpo.ranks import full_tensor, start_processes
from grpo.run.batches import resolve_batch_sizes
from grpo.run.scoring import input_errors, load_scorer
from grpo.run.survey import survey
from reward.functions import RewardFunction, call_reward_function
from tests.conftest import OPTIONS, Tiny, run_ranks
from tests.grpo.model.test_sharding import relative, rollouts_of
from tests.grpo.rewards import named
from tests.test_train import curves, flags, run_main, weights

TWO = [*named("by_length", "by_rank_of_length"), "--reward_weights", "1", "-0.5"]


def rewarded_steps(tiny: Tiny, path: str) -> None:
    """By --scale_rewards: score this rank's share of the four groups, of which the second is padding; do one update."""
    device = start_processes()
    found = {scale: rewarded_step(tiny, device, scale) for scale in ("group", "batch")}
    if dist.get_rank() == 0:
        torch.save(found, path)
    dist.destroy_process_group()


def rewarded_step(tiny: Tiny, device: torch.device, scale: str) -> dict:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    _, *functions = named("by_length", "by_rank_of_length")
    config = Config(reward_funcs=functions, reward_weights=[1.0, -0.5], temperature=0.7, max_grad_norm=1e9)
    config = dataclasses.replace(config, scale_rewards=scale, global_batch_size=4)
    config = resolve_batch_sizes(config, world_size)
    rollouts = [
        dataclasses.replace(rollout, prompt=dataclasses.replace(rollout.prompt, position=position))
        for position, rollout in enumerate(rollouts_of(tiny))
    ]
    own = rollouts[rank::world_size][::-1]  # in whatever order
    scorer = load_scorer(config, [])
    model = copy.deepcopy(tiny.model).train()
    sampling = sharding.SamplingModel(model)
    sharding.apply_fsdp(model, device)
    optimizer, _ = make_optimizer(model, config, total_steps=1)
    scored, records = train.reward_phase(own, tiny.tokenizer, scorer, config, step=1)
    models = sharding.Models(model, sampling, None)
    train.update_phase(models, optimizer, scored, tiny.suppress_tokens, config)
    gradients = [full_tensor(p.grad) for p in model.parameters()]
    groups = {group.position: (group.rewards, group.advantages) for group in records.groups}
    return {"gradients": gradients, "groups": groups}


@pytest.fixture(scope="module")
def one_rank(tiny, tmp_path_factory):
    """By --scale_rewards, in this process."""
    path = str(tmp_path_factory.mktemp("one") / "step.pt")
    rewarded_steps(tiny, path)
    return torch.load(path)


@pytest.mark.parametrize("world_size", [2, 4])  # with several prompts on a rank, and with nothing but padding on one
def test_weighted_rewards_and_those_of_the_whole_step_do_not_depend_on_the_number_of_ranks(
    tiny, one_rank, tmp_path, world_size
):
    path = str(tmp_path / "step.pt")
    run_ranks(rewarded_steps, world_size, tiny, path)
    for scale, split in torch.load(path).items():
        whole = one_rank[scale]
        assert whole["groups"].keys() == split["groups"].keys() == {0, 2, 3}
        for position, tensors in whole["groups"].items():
            for one, other in zip(tensors, split["groups"][position], strict=True):
                assert torch.allclose(one, other, rtol=0, atol=1e-6) and one.isfinite().all()
        assert max(advantages.abs().max() for _, advantages in whole["groups"].values()) > 0.1
        assert relative(split["gradients"], whole["gradients"]) < 1e-5


def test_the_step_sees_all_prompts_of_all_ranks_but_no_padding(tiny, one_rank):
    """The hand-computed value: of 9 completions, the share of those of other groups that are shorter."""
    texts = {
        position: tiny.tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
        for position, rollout in enumerate(rollouts_of(tiny))
        if position != 1
    }
    lengths = {position: [len(text) for text in group] for position, group in texts.items()}
    everyone = [length for group in lengths.values() for length in group]
    for position, group in lengths.items():
        rewards, _ = one_rank["group"]["groups"][position]
        for length, reward in zip(group, rewards.tolist(), strict=True):
            whole = sum(x < length for x in everyone) / 9 - sum(x < length for x in group) / 8
            assert reward == pytest.approx(length / 10 - 0.5 * whole, abs=1e-6)


def fail(arguments: list[str], log: str) -> None:
    with open(f"{log}.{os.environ['RANK']}", "w") as file, redirect_stdout(file), redirect_stderr(file):
        assert train.main(arguments) == 2


def test_a_whole_step_function_that_raises_ends_all_ranks_with_one_line(tiny, tmp_path):
    arguments = flags(tiny, tmp_path / "out", "--global_batch_size", "4", *named("raising_on_the_whole_step"))
    run_ranks(fail, 2, arguments, str(tmp_path / "log"))
    first, second = ((tmp_path / f"log.{rank}").read_text() for rank in (0, 1))
    (line,) = [line for line in first.splitlines() if line.startswith("train.py: error: ")]
    assert "raising_on_the_whole_step raised ValueError: no such step, for samples 's" in line
    assert "train.py: error" not in second


def test_the_news_that_a_data_worker_died_is_no_error_of_the_function_that_it_interrupts():
    def interrupted(**kwargs):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(RuntimeError, match="^DataLoader worker"), input_errors():
        call_reward_function(RewardFunction("interrupted", interrupted), {"sample_id": ["s0"]}, 1)


def test_a_run_with_weighted_rewards_is_the_same_on_two_ranks(tiny, tmp_path):
    more = ["--global_batch_size", "4", "--log_completions", "0", *TWO]
    assert train.main(flags(tiny, tmp_path / "1", *more)) == 0
    run_main(2, flags(tiny, tmp_path / "2", *more), tmp_path)
    one, two = curves(tmp_path / "1"), curves(tmp_path / "2")
    names = [f"rewards/{name}/{figure}" for name in ("by_length", "by_rank_of_length") for figure in ("mean", "std")]
    for tag in ["reward", "reward_std", "grad_norm", *names]:
        assert two[tag] == pytest.approx(one[tag], rel=1e-3, abs=1e-5), tag
        assert any(one[tag]), tag


REWARDS = """
def by_hospital(completions, assistant, hospital, completion_ids, is_stopped, step, sample_id, bonus=0.0, **kwargs):
    assert len({len(x) for x in (completions, assistant, hospital, completion_ids, is_stopped, sample_id)}) == 1
    assert all(isinstance(ids, list) and isinstance(end, bool) for ids, end in zip(completion_ids, is_stopped))
    assert step in (None, 1)
    return [len(ids) + bonus if name == "north" else None for ids, name in zip(completion_ids, hospital)]
"""


def test_a_users_function_gets_the_samples_own_keys_and_its_arguments(tiny, tmp_path):
    path, data = tmp_path / "my_rewards.py", tmp_path / "data.json"
    path.write_text(REWARDS)
    samples = json.loads((tiny.folder / "data.json").read_text())
    for sample in samples[:2]:
        sample["hospital"] = "north"
    data.write_text(json.dumps(samples))
    more = ["--global_batch_size", "4", "--data_path", data, "--reward_funcs", f"{path}:by_hospital"]
    more += ["--reward_kwargs", '{"bonus": 100}', "--max_completion_length", "4"]
    assert train.main(flags(tiny, tmp_path / "out", *more)) == 0
    found = curves(tmp_path / "out")
    assert found["completions/unscored"] == [16]  # those of two of the four samples
    assert 100 < found["reward"][0] <= 104
    lines = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert {line["reward"] is None for line in lines if line["sample_id"] in ("s2", "s3")} == {True}
    assert all(line["reward"] == 100 + line["length"] for line in lines if line["sample_id"] in ("s0", "s1"))


def test_where_one_function_has_no_say_the_others_count(tiny, tmp_path):
    more = ["--global_batch_size", "4", *named("constant", "never", "by_length"), "--reward_weights", "1", "1", "0"]
    assert train.main(flags(tiny, tmp_path / "out", *more)) == 0
    found = curves(tmp_path / "out")
    assert found["completions/unscored"] == [0] and found["reward"] == pytest.approx([0.3])
    assert found["rewards/by_length/mean"][0] > 0 and found["grad_norm"] == [0.0]  # a weight of 0 teaches nothing
    assert torch.equal(weights(tiny.folder / "model"), weights(tmp_path / "out" / "final"))


BROKEN = {
    "no such name": (["--reward_funcs", "numerical_reward"], "numerical_video_reward"),
    "no such file": (["--reward_funcs", "nowhere.py:reward"], "nowhere.py"),
    "weights": (["--reward_weights", "1", "2"], "--reward_weights 1 2: give each of 1 reward functions one"),
    "no object": (["--reward_kwargs", "[1]"], "--reward_kwargs"),
    "no such argument": (["--reward_kwargs", '{"scale": 1}'], "'scale'"),
}


@pytest.mark.parametrize(("more", "words"), BROKEN.values(), ids=BROKEN)
def test_bad_reward_flags_are_one_line_before_anything_is_written(tiny, tmp_path, capfd, more, words):
    assert train.main(flags(tiny, tmp_path / "out", *more)) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train.py: error: ")]
    assert words in line and not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_imported_is_one_line_below_its_own_traceback(tiny, tmp_path, capfd):
    (tmp_path / "mine.py").write_text("import no_such_module\n")
    assert train.main(flags(tiny, tmp_path / "out", "--reward_funcs", f"{tmp_path}/mine.py:reward")) == 2
    printed = capfd.readouterr().err.splitlines()
    assert printed[-1].startswith("train.py: error: ") and "ModuleNotFoundError" in printed[-1]
    assert any("mine.py" in line and "line 1" in line for line in printed[:-1])


def test_a_key_that_a_function_needs_or_that_is_taken_is_named(tiny, tmp_path, capfd):
    path, data = tmp_path / "my_rewards.py", tmp_path / "data.json"
    path.write_text(REWARDS)
    assert train.main(flags(tiny, tmp_path / "out", "--reward_funcs", f"{path}:by_hospital")) == 2
    assert "needs 'hospital', a key that no sample has" in capfd.readouterr().err
    samples = json.loads((tiny.folder / "data.json").read_text())
    data.write_text(json.dumps([sample | {"step": 3} for sample in samples]))
    assert train.main(flags(tiny, tmp_path / "out", "--data_path", data)) == 2
    assert "a key 'step'" in capfd.readouterr().err


@pytest.fixture(scope="module")
def rewarded_run(tiny, tmp_path_factory):
    """The file of a reward function, and the flags of a run with it that has been trained for a step."""
    folder = tmp_path_factory.mktemp("rewarded")
    path, data = folder / "my_rewards.py", folder / "data.json"
    path.write_text(REWARDS)
    samples = json.loads((tiny.folder / "data.json").read_text())
    data.write_text(json.dumps([sample | {"hospital": "north"} for sample in samples]))
    arguments = flags(tiny, folder / "out", "--data_path", data, "--reward_funcs", f"{path}:by_hospital")
    arguments += ["--global_batch_size", "4", "--save_steps", "1", "--max_steps", "1"]
    assert train.main(arguments) == 0
    return path, arguments


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--reward_weights", "2"], "--reward_weights"),
        (["--reward_funcs", "numerical_video_reward"], "--reward_funcs"),
        (["--reward_kwargs", '{"bonus": 1}'], "--reward_kwargs"),
        ([], "the file of by_hospital"),
    ],
    ids=["weights", "functions", "arguments", "the file"],
)
def test_a_run_is_not_resumed_with_another_reward(rewarded_run, capfd, more, words):
    path, arguments = rewarded_run
    path.write_text(REWARDS if more else REWARDS.replace("len(ids) + bonus", "2 * len(ids)"))
    assert train.main([*arguments, "--max_steps", "2", "--resume_from_checkpoint", "auto", *more]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train.py: error: ")]
    assert words in line


def test_the_zero_skill_line_stands_beside_the_reward_and_truths_outside_the_range_are_pointed_out(
    tiny, tmp_path, capsys
):
    more = ["--global_batch_size", "4", "--max_steps", "2", "--valid_range", "0", "41"]
    assert train.main(flags(tiny, tmp_path / "out", *more)) == 0
    printed = capsys.readouterr().out
    assert "2 truths, such as 42, are outside --valid_range 0 41" in printed
    # Truths of 40, 41, 42 and 43: always 41.5 is off by 1; always 41 is the best of the constants that were tried.
    (line,) = [line for line in printed.splitlines() if line.startswith("zero skill: ")]
    assert "always 41.5 has a mean error of 1.00" in line
    found = curves(tmp_path / "out")["zero_skill_reward"]
    assert len(found) == 2 and found[0] == found[1] == pytest.approx(
        float(line.split(" is ")[1].split(",")[0]), abs=6e-4
    )


def test_a_system_prompt_stands_before_conversations_without_one(tiny, tmp_path):
    samples = json.loads((tiny.folder / "data.json").read_text())
    samples[1]["conversations"].insert(0, {"from": "system", "value": "Their own."})
    (tmp_path / "data.json").write_text(json.dumps(samples))
    config = Config(image_folder=str(tiny.folder / "videos"), system_prompt="Think first.")
    loaded = survey([str(tmp_path / "data.json")], config).samples
    first = [sample.turns[0] for sample in loaded]
    assert first == [("system", "Their own." if n == 1 else "Think first.") for n in range(4)]
    prompt = load_prompt(loaded[0], tiny.tokenizer, 2, OPTIONS)
    text = tiny.tokenizer.decode(prompt.prompt_ids)
    assert "Think first." in text and "You are a helpful assistant" not in text


def test_an_empty_system_prompt_file_is_named(tiny, tmp_path, capfd):
    (tmp_path / "prompt.txt").write_text(" \n")
    assert train.main(flags(tiny, tmp_path / "out", "--system_prompt", tmp_path / "prompt.txt")) == 2
    assert "prompt.txt' is an empty file" in capfd.readouterr().err


def test_a_system_prompt_that_looks_like_a_file_but_is_none_is_no_prompt(tiny, tmp_path, capfd):
    assert train.main(flags(tiny, tmp_path / "out", "--system_prompt", tmp_path / "missing.txt")) == 2
    assert "there is no such file" in capfd.readouterr().err


def test_the_system_prompt_is_kept_as_text_so_that_a_run_resumes_without_its_file(tiny, tmp_path):
    (tmp_path / "prompt.txt").write_text("Think first.\n")
    arguments = flags(tiny, tmp_path / "out", "--system_prompt", tmp_path / "prompt.txt", "--global_batch_size", "4")
    assert train.main([*arguments, "--save_steps", "1", "--max_steps", "1"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["system_prompt"] == "Think first."
    again = ["--system_prompt", "Think first.", "--max_steps", "2", "--resume_from_checkpoint", "auto"]
    assert train.main([*arguments, *again]) == 0


ALONE = {
    "one prompt": (["--global_batch_size", "1", *named("by_rank_of_length")], "--global_batch_size 1"),
    "no say in evaluations": (
        ["--global_batch_size", "4", "--metric_for_best_model", "eval/reward", *named("by_rank_of_length")],
        "--metric_for_best_model eval/reward",
    ),
}


@pytest.mark.parametrize(("more", "words"), ALONE.values(), ids=ALONE)
def test_a_reward_of_the_whole_step_needs_several_prompts_and_is_none_for_evaluations(
    tiny, tmp_path, capfd, more, words
):
    held = ["--eval_data_path", tiny.folder / "data.json"]
    assert train.main(flags(tiny, tmp_path / "out", *held, *more)) == 2
    assert words in capfd.readouterr().err


def test_a_run_with_nothing_but_a_reward_of_the_whole_step_is_evaluated_without_rewards(tiny, tmp_path):
    more = ["--global_batch_size", "4", "--eval_data_path", tiny.folder / "data.json", *named("by_rank_of_length")]
    assert train.main(flags(tiny, tmp_path / "out", *more)) == 0
    found = curves(tmp_path / "out")
    assert found["eval/mae"][0] >= 0 and found["grad_norm"][0] > 0
    assert not {"eval/reward", "eval/zero_skill_reward", "zero_skill_reward"} & found.keys()


@pytest.mark.parametrize("more", [[], ["numerical_video_reward", "--reward_weights", "1", "0"]], ids=["alone", "curve"])
def test_the_best_model_is_not_chosen_by_a_reward_that_no_evaluation_has(tiny, tmp_path, capfd, more):
    more = [*named("by_rank_of_length"), *more, "--metric_for_best_model", "eval/reward"]
    more += ["--global_batch_size", "4", "--eval_data_path", tiny.folder / "data.json"]
    assert train.main(flags(tiny, tmp_path / "out", *more)) == 2
    assert "functions of the whole step have no say in evaluations" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_reward_function_that_exits_ends_the_run_with_its_name(tiny, tmp_path, capfd):
    body = "    if step:\n        raise SystemExit(0)\n    return [0.0] * len(completions)\n"
    (tmp_path / "mine.py").write_text("def leaves(completions, step, **kwargs):\n" + body)
    assert train.main(flags(tiny, tmp_path / "out", "--reward_funcs", f"{tmp_path}/mine.py:leaves")) == 2
    assert "leaves raised SystemExit" in capfd.readouterr().err


FAILING_ON_TAGS = """
def failing_on_tags(completions, **kwargs):
    return [{True: 1.0}["<think>" not in completion[0]["content"]] for completion in completions]
"""


def test_a_function_that_fails_on_constants_alone_stops_no_run_and_no_evaluation(tiny, tmp_path, capfd):
    (tmp_path / "mine.py").write_text(FAILING_ON_TAGS)
    more = ["--reward_funcs", f"{tmp_path}/mine.py:failing_on_tags", "--eval_data_path", tiny.folder / "data.json"]
    assert train.main(flags(tiny, tmp_path / "out", "--global_batch_size", "4", *more)) == 0
    found = curves(tmp_path / "out")
    assert found["eval/reward"][0] == 1.0 and not {"eval/zero_skill_reward", "zero_skill_reward"} & found.keys()
    printed = capfd.readouterr()
    assert "zero skill: answering always 41.5 has a mean error of 1.00\n" in printed.out  # and no more
    assert "Traceback" not in printed.err
