"""The trial step before a run: it takes the largest sample, leaves no trace, and says what does not fit."""

import json
import os
import resource
import time

import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

import train
from data.loader import PromptDataset, PromptOptions
from data.sample import InputError, Media
from grpo.ranks import start_processes
from grpo.run.preflight import longest_prompt
from tests.conftest import OPTIONS, run_ranks
from tests.test_train import curves, flags, main_on_a_rank, run_main, weights


class Changed(list):
    """Samples of which the second one's file has changed since it was first read."""

    def __getitem__(self, index):
        if index == 1:
            raise InputError("changed")
        return super().__getitem__(index)


def find_longest(dataset: PromptDataset, path: str) -> None:
    start_processes()
    length, index = longest_prompt(dataset, has_answer=False)
    with open(path, "w") as file:
        json.dump([length, dataset.samples[index].id], file)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 5])  # fewer and more than samples
def test_the_longest_prompt_is_found_without_decoding_and_broken_videos_do_not_matter(tiny, tmp_path, world_size):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"junk")
    samples = [prompt.sample for prompt in tiny.prompts]
    samples[0] = type(samples[0])("broken", (Media("video", str(broken)),) * 9, samples[0].turns, samples[0].answer)
    dataset = PromptDataset(samples, tiny.tokenizer, 2, PromptOptions(OPTIONS, "skip"))
    run_ranks(find_longest, world_size, dataset, str(tmp_path / "found"))
    lengths = [len(prompt.prompt_ids) for prompt in tiny.prompts]
    assert lengths[1] == max(lengths)
    assert json.loads((tmp_path / "found").read_text()) == [lengths[1], "s1"]
    dataset.samples = Changed(samples)  # one rank alone meets the change: it says so where all ranks take part
    run_ranks(find_longest, world_size, dataset, str(tmp_path / "found"))
    assert json.loads((tmp_path / "found").read_text())[0] == max(lengths[2:])


@pytest.mark.parametrize(
    "more", [[], ["--lora_enable", "--lora_rank", "2", "--beta", "0.1"]], ids=["whole", "adapters"]
)
def test_the_trial_step_names_the_sample_and_leaves_no_trace(tiny, tmp_path, capsys, monkeypatch, more):
    more = ["--max_steps", "3", "--global_batch_size", "4", "--per_device_train_batch_size", "2", *more]
    more += ["--weight_decay", "0.1", "--per_device_generation_batch_size", "3"]
    more += ["--max_completion_length", "40", "--temperature", "1.5"]  # some would end early
    assert train.main(flags(tiny, tmp_path / "without", *more)) == 0
    capsys.readouterr()
    sampled, rollout_phase = [], train.rollout_phase
    monkeypatch.setattr(train, "rollout_phase", lambda *a, **k: sampled.append(rollout_phase(*a, **k)) or sampled[-1])
    has_states, trained, update_phase = [], [], train.update_phase

    def spy(models, optimizer, scored, *rest):
        has_states.append(len(optimizer.state) > 0)
        trained.append(len(scored))
        return update_phase(models, optimizer, scored, *rest)

    monkeypatch.setattr(train, "update_phase", spy)
    assert train.main(flags(tiny, tmp_path / "with", *more, "--memory_preflight", "true")) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("memory:"))
    assert "sample 's1' with 3 videos" in line
    assert "8 completions of 40 tokens, 2 such prompts at a time, 3 sampled together" in line
    assert [len(rollouts) for rollouts in sampled] == [3, 4, 4, 4] and trained == [2, 4, 4, 4]
    assert all(one.completion_mask.all() and one.completion_mask.shape == (8, 40) for one in sampled[0])
    assert has_states == [True, False, True, True]  # they take memory in every backward pass but that of step 1
    found, expected = curves(tmp_path / "with"), curves(tmp_path / "without")
    for name in ("reward", "grad_norm", "loss", "learning_rate"):
        assert found[name] == expected[name]
    if "--lora_enable" not in more:
        assert torch.equal(weights(tmp_path / "with" / "final"), weights(tmp_path / "without" / "final"))


def test_the_trial_step_runs_on_two_ranks(tiny, tmp_path):
    more = ["--max_steps", "1", "--global_batch_size", "2", "--memory_preflight", "true"]
    printed = run_main(2, flags(tiny, tmp_path / "out", *more), tmp_path)
    (line,) = (line for line in printed.splitlines() if line.startswith("memory:"))
    assert len(line.split("by rank: ")[1].split(", ")) == 2


def run_in_little_memory(arguments: list[str], log: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (64 * 2**30, 64 * 2**30))
    main_on_a_rank(arguments, log, 2)


def test_what_does_not_fit_is_named_in_one_line_before_training(tiny, tmp_path):
    huge = ["--max_completion_length", "100000000", "--memory_preflight", "true"]
    run_ranks(run_in_little_memory, 1, flags(tiny, tmp_path / "out", *huge), str(tmp_path / "log"))
    (line,) = (line for line in (tmp_path / "log.0").read_text().splitlines() if "train.py: error" in line)
    words = ["out of memory", "sample 's1' with 3 videos", "--max_videos", "--max_completion_length", "--lora_enable"]
    assert all(word in line for word in words)
    assert not (tmp_path / "out" / "final").exists()


def run_out_of_memory_on_rank_1(arguments: list[str], log: str) -> None:
    def update_phase(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    train.update_phase = update_phase if os.environ["RANK"] == "1" else lambda *arguments: time.sleep(60)
    main_on_a_rank(arguments, log, 2)


def test_a_rank_that_runs_out_of_memory_alone_says_so_and_ends_while_the_others_wait_for_it(tiny, tmp_path):
    more = ["--global_batch_size", "2", "--memory_preflight", "true"]
    with pytest.raises(ProcessExitedException) as raised:
        run_ranks(run_out_of_memory_on_rank_1, 2, flags(tiny, tmp_path / "out", *more), str(tmp_path / "log"))
    assert (raised.value.error_index, raised.value.exit_code) == (1, 2)
    (line,) = (line for line in (tmp_path / "log.1").read_text().splitlines() if "train.py: error" in line)
    assert "rank 1: out of memory" in line and "sample 's1' with 3 videos" in line
