"""The order of the data, the part of each rank, and samples that cannot be read."""

import dataclasses
import multiprocessing

import pytest
import torch

from data.dataset import InputError, load_samples
from data.loader import BatchItem, PromptDataset, epoch_order, prompt_batches, rank_batches, worker_failure
from tests.conftest import OPTIONS, make_tiny


def all_items(num_samples, batch, steps, world_size, seed=0):
    """Per step the items of all ranks."""
    ranks = [
        list(rank_batches(num_samples, batch, steps, seed, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    return [[item for rank in step for item in rank] for step in zip(*ranks, strict=True)]


def test_an_epoch_visits_every_sample_once_the_smaller_last_batch_included():
    steps = all_items(10, 4, 6, world_size=2)
    assert [sum(not item.is_padding for item in step) for step in steps] == [4, 4, 2, 4, 4, 2]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(item.index for step in epoch for item in step if not item.is_padding) == list(range(10))
    orders = [[item.index for step in epoch for item in step] for epoch in (steps[:3], steps[3:])]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_samples_and_places_of_a_step_do_not_depend_on_the_ranks(world_size):
    one = all_items(10, 4, 3, world_size=1)
    many = all_items(10, 4, 3, world_size)
    for a, b in zip(one, many, strict=True):
        assert sorted((s.position, s.index) for s in a) == sorted((s.position, s.index) for s in b if not s.is_padding)


@pytest.mark.parametrize(("num_samples", "world_size"), [(5, 4), (1, 4), (7, 3), (3, 8)])
def test_ranks_always_have_equally_many_items_and_extra_ones_are_padding(num_samples, world_size):
    for rank in range(world_size):
        for step, items in enumerate(rank_batches(num_samples, 8, 2, 0, rank=rank, world_size=world_size)):
            assert len(items) == -(-num_samples // world_size), (rank, step)
    for step in all_items(num_samples, 8, 2, world_size):
        assert sorted(item.index for item in step if not item.is_padding) == list(range(num_samples))


def test_the_order_is_a_function_of_seed_and_epoch():
    assert epoch_order(50, 1, 2) == epoch_order(50, 1, 2)
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


@pytest.fixture
def broken(tmp_path):
    """A dataset whose sample s1 has an unreadable second video."""
    tiny = make_tiny(tmp_path / "broken", num_videos=(1, 2, 1))
    (tiny.folder / "videos" / "1_1.mp4").write_bytes(b"no video")
    return tiny, load_samples(str(tiny.folder / "data.json"), str(tiny.folder / "videos"))


def test_a_bad_video_stops_the_run_with_its_path(broken):
    tiny, samples = broken
    item = PromptDataset(samples, tiny.tokenizer, 2, OPTIONS, "error")[BatchItem(0, 1)]
    assert isinstance(item, InputError)
    assert "'s1'" in str(item) and "1_1.mp4" in str(item) and "\n" not in str(item)


def test_a_bad_video_is_left_out_and_its_place_filled_with_padding(broken):
    tiny, samples = broken
    dataset = PromptDataset(samples, tiny.tokenizer, 2, OPTIONS, "skip")
    prompt = dataset[BatchItem(5, 1)]
    assert (prompt.sample.id, prompt.position, prompt.is_padding) == ("s2", 5, True)
    assert "1_1.mp4" in prompt.bad_media
    good = dataset[BatchItem(0, 0)]
    assert (good.sample.id, good.is_padding, good.bad_media) == ("s0", False, "")


def test_when_no_sample_can_be_read_the_run_stops(broken):
    tiny, samples = broken
    for path in (tiny.folder / "videos").iterdir():
        path.write_bytes(b"no video")
    item = PromptDataset(samples, tiny.tokenizer, 2, OPTIONS, "skip")[BatchItem(0, 1)]
    assert isinstance(item, InputError) and "no sample has readable videos" in str(item)


def test_a_question_with_special_tokens_stops_the_run_with_the_sample(tiny):
    sample = dataclasses.replace(tiny.prompts[0].sample, turns=(("user", "<video>\n<|image_pad|>"),))
    item = PromptDataset([sample], tiny.tokenizer, 2, OPTIONS, "error")[BatchItem(0, 0)]
    assert isinstance(item, InputError) and "'s0'" in str(item) and "<|image_pad|>" in str(item)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_hand_over_the_prompts_of_each_step_in_order(tiny, num_workers):
    samples = [prompt.sample for prompt in tiny.prompts]
    dataset = PromptDataset(samples, tiny.tokenizer, 2, OPTIONS, "error")
    slots = list(rank_batches(4, 3, 5, 0, rank=0, world_size=1))
    batches = list(prompt_batches(dataset, iter(slots), num_workers))
    assert [[p.sample.id for p in batch] for batch in batches] == [[f"s{s.index}" for s in step] for step in slots]
    for batch in batches:
        for prompt in batch:
            original = tiny.prompts[int(prompt.sample.id[1:])]
            for name in ("prompt_ids", "position_ids", "pixel_values", "grid_thw", "second_per_grid_ts"):
                assert torch.equal(getattr(prompt, name), getattr(original, name)), name


def test_news_of_a_dead_worker_is_found_in_any_error_that_code_made_of_it():
    """PyTorch raises it in the middle of whatever the main thread does."""
    news = "DataLoader worker (pid 7) is killed by signal: Killed. "
    for wrap in (lambda e: e, lambda e: SystemError(f"returned a result: {e}"), chained):
        line = worker_failure(wrap(RuntimeError(news)))
        assert line.startswith("DataLoader worker (pid 7) is killed by signal: Killed. If memory ran out")
    assert worker_failure(RuntimeError("DataLoader is fine")) is None and worker_failure(ValueError()) is None


def chained(error: Exception) -> Exception:
    try:
        try:
            raise error
        except RuntimeError as first:
            raise ValueError("something else") from first
    except ValueError as second:
        return second


def end_while_workers_wait(dataset) -> None:
    prompts = prompt_batches(dataset, iter([[BatchItem(0, 0)]]), 3)  # two of the workers never get a batch
    next(prompts)
    raise KeyboardInterrupt  # with the iterator still alive in this frame


def test_a_process_that_fails_does_not_wait_for_workers_without_work(tiny):
    dataset = PromptDataset([prompt.sample for prompt in tiny.prompts], tiny.tokenizer, 2, OPTIONS, "error")
    process = multiprocessing.get_context("forkserver").Process(target=end_while_workers_wait, args=(dataset,))
    process.start()
    process.join(30)
    is_over = not process.is_alive()
    process.kill()
    assert is_over
