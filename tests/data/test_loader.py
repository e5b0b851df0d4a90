"""The order of the data, the part of each rank, and samples that cannot be read."""

import dataclasses
import multiprocessing
import os
import signal
from collections import Counter

import pytest
import torch

from data.dataset import load_samples
from data.epochs import BatchItem, Epochs, rank_batches
from data.loader import PromptDataset, PromptOptions, load_ahead, worker_failure
from data.media.augment import Augmentation
from data.sample import InputError, Media, Sample
from tests.conftest import OPTIONS, make_tiny


def all_items(num_samples, batch, steps, world_size, seed=0):
    """Per step the items of all ranks."""
    ranks = [
        list(rank_batches(Epochs([num_samples], seed), batch, steps, rank=rank, world_size=world_size))
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
        for step, items in enumerate(rank_batches(Epochs([num_samples], 0), 8, 2, rank=rank, world_size=world_size)):
            assert len(items) == -(-num_samples // world_size), (rank, step)
    for step in all_items(num_samples, 8, 2, world_size):
        assert sorted(item.index for item in step if not item.is_padding) == list(range(num_samples))


def test_the_order_is_a_function_of_seed_and_epoch():
    assert order_of(Epochs([50], 1), 2) == order_of(Epochs([50], 1), 2)
    assert len({tuple(Epochs([50], seed).order(epoch)[0].tolist()) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_the_order_of_an_epoch_is_pinned_for_other_seeds_and_epochs():
    """A run that is resumed with another version of this file takes the samples that are left."""
    assert [order_of(Epochs([6], seed), epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (3, 2))] == [
        [2, 5, 3, 0, 1, 4],
        [1, 5, 2, 0, 3, 4],
        [4, 1, 0, 3, 2, 5],
        [0, 4, 5, 2, 1, 3],
    ]
    weighted = Epochs([3, 4], 3, [2.0, 0.5])  # 6 + 2 of an epoch
    assert [[one.tolist() for one in weighted.order(epoch)] for epoch in (0, 1)] == [
        [[2, 2, 0, 1, 1, 0, 4, 5], [0, 1, 0, 1, 0, 1, 0, 0]],
        [[2, 3, 2, 1, 6, 0, 0, 1], [3, 0, 2, 3, 0, 3, 2, 2]],
    ]


def order_of(epochs, epoch):
    return epochs.order(epoch)[0].tolist()


def test_without_weights_an_epoch_of_several_files_is_that_of_one():
    for epoch in range(3):
        assert order_of(Epochs([3, 7, 5], 1), epoch) == order_of(Epochs([15], 1), epoch)


def test_weights_say_how_often_an_epoch_sees_the_samples_of_a_file():
    epochs = Epochs([8, 6, 40], 3, [2.0, 1.0, 0.25])
    assert epochs.shares == [16, 6, 10] and len(epochs) == 32
    with pytest.raises(ValueError):
        len(Epochs([8, 6, 40], 3, [2.0, 1.0]))  # a weight is missing
    seen = Counter()
    for epoch in range(4):
        order = order_of(epochs, epoch)
        counts = Counter(order)
        assert len(order) == 32 and all(counts[i] == 2 for i in range(8)) and all(counts[i] == 1 for i in range(8, 14))
        assert sum(counts[i] for i in range(14, 54)) == 10
        assert order != sorted(order) and order == order_of(epochs, epoch)
        seen += counts
    assert all(seen[i] == 1 for i in range(14, 54))  # all of the last file, within four epochs
    assert order_of(epochs, 0) != order_of(epochs, 4) != order_of(dataclasses.replace(epochs, seed=4), 4)


@pytest.mark.parametrize(("weight", "epochs", "times"), [(1.5, 2, 3), (0.3, 10, 3), (2.5, 4, 10), (0.001, 10, 1)])
def test_parts_of_a_file_add_up_over_epochs(weight, epochs, times):
    plan = Epochs([4, 10], 0, [1.0, weight])
    seen = Counter(i for epoch in range(epochs) for i in order_of(plan, epoch) if i >= 4)
    assert set(seen) == set(range(4, 14)) and set(seen.values()) == {times}


@pytest.mark.parametrize("weight", [0.25, 0.75, 1.0])
def test_an_epoch_takes_no_sample_twice_unless_its_weight_is_above_1(weight):
    plan = Epochs([10, 4], 0, [weight, 1.0])
    for epoch in range(12):
        order = order_of(plan, epoch)
        assert len(order) == len(set(order)) == round(10 * weight) + 4


@pytest.mark.parametrize("weight", [0.25, 1.0, 2.0])
def test_a_samples_turns_count_up_so_that_it_shows_other_videos_each_time(weight):
    plan, turns, videos = Epochs([4, 4], 0, [1.0, weight]), [], []
    sample = Sample("s", tuple(Media("video", f"{i}.mp4") for i in range(8)), (("user", "<video>" * 8),), "1")
    for (item,) in rank_batches(plan, 1, 16 * len(plan), rank=0, world_size=1):
        if item.index == 5:
            turns.append(item.turn)
            videos.append({media.name for media in Augmentation(0, max_videos=2).choose(sample, item.turn).media})
    assert sorted(turns) == list(range(int(16 * weight)))
    if weight <= 1:
        assert all(len(set.union(*videos[i : i + 4])) == 8 for i in range(len(videos) - 3))


@pytest.fixture
def broken(tmp_path):
    """A dataset whose sample s1 has an unreadable second video."""
    tiny = make_tiny(tmp_path / "broken", num_videos=(1, 2, 1))
    (tiny.folder / "videos" / "1_1.mp4").write_bytes(b"no video")
    return tiny, load_samples([str(tiny.folder / "data.json")], str(tiny.folder / "videos"))


def test_a_bad_video_stops_the_run_with_its_path(broken):
    tiny, samples = broken
    item = PromptDataset(samples, tiny.tokenizer, 2, PromptOptions(OPTIONS, "error"))[BatchItem(0, 1)]
    assert isinstance(item, InputError)
    assert "'s1'" in str(item) and "1_1.mp4" in str(item) and "\n" not in str(item)


def test_a_bad_video_is_left_out_and_its_place_filled_with_padding(broken):
    tiny, samples = broken
    dataset = PromptDataset(samples, tiny.tokenizer, 2, PromptOptions(OPTIONS, "skip"))
    prompt = dataset[BatchItem(5, 1)]
    assert (prompt.sample.id, prompt.position, prompt.is_padding) == ("s2", 5, True)
    assert "1_1.mp4" in prompt.bad_media
    good = dataset[BatchItem(0, 0)]
    assert (good.sample.id, good.is_padding, good.bad_media) == ("s0", False, "")


def test_when_no_sample_can_be_read_the_run_stops(broken):
    tiny, samples = broken
    for path in (tiny.folder / "videos").iterdir():
        path.write_bytes(b"no video")
    item = PromptDataset(samples, tiny.tokenizer, 2, PromptOptions(OPTIONS, "skip"))[BatchItem(0, 1)]
    assert isinstance(item, InputError) and "no sample can be used" in str(item)


def test_a_question_with_special_tokens_stops_the_run_with_the_sample(tiny):
    sample = dataclasses.replace(tiny.prompts[0].sample, turns=(("user", "<video>\n<|image_pad|>"),))
    item = PromptDataset([sample], tiny.tokenizer, 2, PromptOptions(OPTIONS, "error"))[BatchItem(0, 0)]
    assert isinstance(item, InputError) and "'s0'" in str(item) and "<|image_pad|>" in str(item)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_hand_over_the_prompts_of_each_step_in_order(tiny, num_workers):
    samples = [prompt.sample for prompt in tiny.prompts]
    dataset = PromptDataset(samples, tiny.tokenizer, 2, PromptOptions(OPTIONS, "error"))
    slots = list(rank_batches(Epochs([4], 0), 3, 5, rank=0, world_size=1))
    batches = list(load_ahead(dataset, iter(slots), num_workers))
    assert [[p.sample.id for p in batch] for batch in batches] == [[f"s{s.index}" for s in step] for step in slots]
    for batch in batches:
        for prompt in batch:
            original = tiny.prompts[int(prompt.sample.id[1:])]
            assert prompt.patches.dtype == torch.uint8
            for name in ("prompt_ids", "position_ids", "patches", "grid_thw", "second_per_grid_ts"):
                tensor = getattr(prompt, name)
                assert torch.equal(tensor, getattr(original, name)) and not tensor.is_shared(), name


def test_news_of_a_dead_worker_is_found_in_any_error_that_code_made_of_it():
    """PyTorch raises it in the middle of whatever the main thread does."""
    news = "DataLoader worker (pid 7) is killed by signal: Killed. "
    for wrap in (lambda e: e, lambda e: SystemError(f"returned a result: {e}"), chained):
        line = worker_failure(wrap(RuntimeError(news)))
        assert line.startswith("DataLoader worker (pid 7) is killed by signal: Killed. If memory ran out")
    assert worker_failure(RuntimeError("DataLoader is fine")) is None and worker_failure(ValueError()) is None


class DeadlyTokenizer:
    """Ends the process that encodes the text of sample s1, as a decoder may that crashes."""

    def __init__(self, tokenizer, question: str):
        self.tokenizer, self.question = tokenizer, question

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, *args, **kwargs):
        if self.question in str(texts):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.tokenizer(texts, *args, **kwargs)


def test_the_line_about_a_dead_worker_names_the_sample_that_it_was_decoding(tiny):
    samples = [dataclasses.replace(prompt.sample, id=f"s{i}\n") for i, prompt in enumerate(tiny.prompts)]
    samples[1] = dataclasses.replace(samples[1], turns=(("user", "<video>" * 3 + "deadly"),))
    dataset = PromptDataset(samples, DeadlyTokenizer(tiny.tokenizer, "deadly"), 2, PromptOptions(OPTIONS))
    batches = load_ahead(dataset, iter([[BatchItem(0, 0)], [BatchItem(0, 2)], [BatchItem(0, 1)]]), 1)
    with pytest.raises(RuntimeError) as news:
        list(batches)
    line = worker_failure(news.value)
    assert r". It was decoding sample 's1\n'. If memory ran out" in line and line.count("sample") == 1
    idle = multiprocessing.get_context("fork").Process(target=dataset.__getitem__, args=(BatchItem(0, 0),))
    idle.start()
    idle.join()
    for form in (f"(pid {idle.pid}) is killed by signal: Killed.", f"(pid(s) {idle.pid}, {idle.pid}) exited"):
        assert "decoding" not in worker_failure(RuntimeError(f"DataLoader worker {form}"))


def chained(error: Exception) -> Exception:
    try:
        try:
            raise error
        except RuntimeError as first:
            raise ValueError("something else") from first
    except ValueError as second:
        return second


def end_while_workers_wait(dataset) -> None:
    prompts = load_ahead(dataset, iter([[BatchItem(0, 0)]]), 3)  # two of the workers never get a batch
    next(prompts)
    raise KeyboardInterrupt  # with the iterator still alive in this frame


def test_a_process_that_fails_does_not_wait_for_workers_without_work(tiny):
    samples = [prompt.sample for prompt in tiny.prompts]
    dataset = PromptDataset(samples, tiny.tokenizer, 2, PromptOptions(OPTIONS))
    process = multiprocessing.get_context("forkserver").Process(target=end_while_workers_wait, args=(dataset,))
    process.start()
    process.join(30)
    is_over = not process.is_alive()
    process.kill()
    assert is_over


def test_an_epoch_has_its_own_videos_and_frames_whoever_loads_them(tiny):
    samples = [prompt.sample for prompt in tiny.prompts]
    options = PromptOptions(OPTIONS, augmentation=Augmentation(seed=3, max_videos=2, frame_jitter=True))
    dataset, again = (PromptDataset(samples, tiny.tokenizer, 2, options) for _ in range(2))
    epochs = [dataset[BatchItem(0, 1, turn=epoch)] for epoch in range(4)]  # of 3 videos
    assert {media.name for prompt in epochs for media in prompt.sample.media} == {"1_0.mp4", "1_1.mp4", "1_2.mp4"}
    assert all(len(prompt.grid_thw) == prompt.sample.turns[0][1].count("<video>") == 2 for prompt in epochs)
    for epoch in (3, 1):
        same = again[BatchItem(7, 1, turn=epoch)]
        assert same.sample == epochs[epoch].sample and torch.equal(same.patches, epochs[epoch].patches)
    moved = PromptDataset(samples, tiny.tokenizer, 2, PromptOptions(OPTIONS, augmentation=Augmentation(3, 0, True)))
    pixels = [moved[BatchItem(0, 1, turn=epoch)].patches.numpy().tobytes() for epoch in range(6)]
    assert len(set(pixels)) > 3  # the clips are short: some draws move them by the same whole frames


def test_without_weights_a_samples_turn_is_the_epoch():
    steps = list(rank_batches(Epochs([5], 0), 2, 7, rank=1, world_size=2))
    assert [{item.turn for item in step} for step in steps] == [{0}, {0}, {0}, {1}, {1}, {1}, {2}]
    assert list(rank_batches(Epochs([5], 0), 2, 7, rank=1, world_size=2, start_step=4)) == steps[4:]


def test_a_long_prompt_stops_is_left_out_or_loses_its_last_videos(tiny):
    samples = [prompt.sample for prompt in tiny.prompts]  # of 1, 3, 2 and 1 videos
    lengths = [len(prompt.prompt_ids) for prompt in tiny.prompts]

    def load(index, most, on_long):
        options = PromptOptions(OPTIONS, "error", most, on_long)
        return PromptDataset(samples, tiny.tokenizer, 2, options)[BatchItem(5, index)]

    for on_long in ("error", "skip", "fewer_videos"):
        whole = load(1, lengths[1], on_long)
        assert torch.equal(whole.prompt_ids, tiny.prompts[1].prompt_ids) and not whole.shortened
    error = load(1, lengths[1] - 1, "error")
    assert isinstance(error, InputError) and f"'s1': its prompt has {lengths[1]} tokens, more than" in str(error)
    other = load(1, lengths[1] - 1, "skip")
    assert other.sample.id == "s2" and other.is_padding and "'s1': its prompt has" in other.bad_media
    shorter = load(1, lengths[1] - 1, "fewer_videos")
    assert len(shorter.grid_thw) == 2 and len(shorter.prompt_ids) < lengths[1] and not shorter.is_padding
    assert [media.name for media in shorter.sample.media] == ["1_0.mp4", "1_1.mp4"]
    assert shorter.shortened == "sample 's1': its prompt is too long, and has 1 videos fewer"
    assert len(load(1, lengths[1] - 20, "fewer_videos").grid_thw) < 2
    assert "its prompt has" in str(load(1, 5, "fewer_videos"))  # the text alone is longer
    assert "no sample can be used" in str(load(1, 5, "skip"))
