"""What a run knows of its samples after reading each once."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import get_args

import pytest
import torch.distributed as dist

from data.sample import InputError
from data.video_cap import VideoCap, choice_of, varies
from grpo.config import Config
from grpo.ranks import start_processes
from grpo.run import survey as module
from grpo.run.survey import check_same_on_all_ranks, survey
from reward.functions import RewardFunction
from tests.conftest import make_tiny, run_ranks


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny") / "tiny", num_videos=(1, 3, 2, 1))


def samples_of(tiny):
    return json.loads((tiny.folder / "data.json").read_text())


def found_in(tiny, samples, **flags):
    (tiny.folder / "some.json").write_text(json.dumps(samples))
    return survey([str(tiny.folder / "some.json")], Config(image_folder=str(tiny.folder / "videos"), **flags))


def test_truths_and_keys_are_gathered_in_the_order_of_the_samples(tiny):
    samples = samples_of(tiny)
    samples[1] |= {"site": "A", "age": 60}
    samples[3] |= {"sex": "f", "site": "B"}
    samples[2]["conversations"][-1]["value"] = "It cannot be seen."
    found = found_in(tiny, samples)
    assert found.keys == ["site", "age", "sex"]
    assert found.truths[[0, 1, 3]].tolist() == [40, 41, 43] and math.isnan(found.truths[2])


def test_samples_are_as_the_model_sees_them(tiny, capsys):
    found = found_in(tiny, samples_of(tiny), max_videos=2, system_prompt="Look well.")
    assert [len(sample.media) for sample in found.samples] == [1, 2, 2, 1]
    assert all(sample.turns[0] == ("system", "Look well.") for sample in found.samples)
    assert "some.json': 1 samples have more than --max_videos 2 videos" in capsys.readouterr().out


@pytest.mark.parametrize("cap", get_args(VideoCap))
@pytest.mark.parametrize("is_training", [False, True])
def test_samples_are_capped_by_the_choice_of_their_name_unless_training_sees_others_in_each_turn(
    tiny, capsys, cap, is_training
):
    config = Config(image_folder=str(tiny.folder / "videos"), max_videos=1, video_cap=cap)
    found = survey([str(tiny.folder / "data.json")], config, is_training)
    seen = [media.name for media in found.samples[1].media]
    all_three = [f"1_{clip}.mp4" for clip in range(3)]
    assert seen == (all_three if is_training and varies(cap) else [all_three[i] for i in choice_of(cap)(3, 1)])
    assert "2 samples have more than --max_videos 1" in capsys.readouterr().out
    with pytest.raises(KeyError, match="last"):
        survey([str(tiny.folder / "data.json")], dataclasses.replace(config, video_cap="last"))


def test_the_fingerprint_is_the_digest_of_each_files_bytes_wherever_they_lie(tiny, tmp_path):
    content = json.dumps(samples_of(tiny)).encode()
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        (folder / "a.json").write_bytes(content)
        (folder / "b.jsonl").write_bytes(json.dumps(samples_of(tiny)[0] | {"id": "other"}).encode())
        config = Config(image_folder=str(tiny.folder / "videos"), max_videos=len(folder.name))
        found = survey([str(folder / "a.json"), str(folder / "b.jsonl")], config)
        assert found.fingerprint == [
            hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("a.json", "b.jsonl")
        ]


@pytest.fixture
def in_processes(monkeypatch):
    """Two processes, each of which reads two samples at a time."""
    monkeypatch.setattr(module, "PART", 2)
    monkeypatch.setattr(module, "MANY", 1)
    monkeypatch.setattr(module, "MOST_PROCESSES", 2)


def test_processes_find_what_one_finds(tiny, capsys, in_processes):
    samples = [sample | {"id": f"{i}", f"key_{i % 5}": i} for i, sample in enumerate(samples_of(tiny) * 3)]
    together = found_in(tiny, samples, max_videos=2)
    printed = capsys.readouterr().out
    alone = found_in(tiny, samples, max_videos=2, dataloader_num_workers=0)
    for name in ("keys", "fingerprint"):
        assert getattr(together, name) == getattr(alone, name)
    assert together.keys == [f"key_{i}" for i in range(5)]
    assert "3 samples have" in printed and printed == capsys.readouterr().out
    assert together.truths.tolist() == alone.truths.tolist() == [40, 41, 42, 43] * 3


@pytest.mark.parametrize("workers", [0, None])
def test_the_first_mistake_of_a_file_is_named_whoever_finds_it(tiny, in_processes, workers):
    def error_of(changes):
        samples = [sample | {"id": f"{i}"} | changes.get(i, {}) for i, sample in enumerate(samples_of(tiny) * 3)]
        with pytest.raises(InputError) as caught:
            found_in(tiny, samples, dataloader_num_workers=workers)
        return str(caught.value)

    special = [{"from": "human", "value": "<video>\n<|im_end|>"}, {"from": "gpt", "value": "5%"}]
    assert "sample '9'" in error_of({9: {"vidoe": 1}})
    assert "sample '3'" in error_of({9: {"vidoe": 1}, 3: {"vidoe": 1}})
    assert "'1' occurs twice" in error_of({8: {"id": "1"}, 9: {"vidoe": 1}})
    assert "some.json': sample '4': the user text contains the special token <|im_end|>" in error_of(
        {4: {"conversations": special}}
    )
    missing = error_of({8: {"video": "8.mp4"}, 4: {"video": "4.mp4"}, 11: {"video": "8.mp4"}})
    assert "2 file(s) missing" in missing and missing.index("4.mp4' (sample '4')") < missing.index(
        "8.mp4' (sample '8')"
    )


def survey_on_a_rank(paths: list[str], images: str, out: str, digests: str) -> None:
    start_processes()
    found = survey([paths[dist.get_rank()]], Config(image_folder=images, dataloader_num_workers=0))
    try:
        check_same_on_all_ranks(found, functions=[RewardFunction("mine", max, digest=digests[dist.get_rank()])])
        line = "same"
    except InputError as error:
        line = str(error)
    Path(f"{out}-{dist.get_rank()}").write_text(line)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("key", "digests", "line"),
    [
        (None, "aa", "same"),
        ("id", "aa", "the ranks have read different samples: "),
        ("site", "aa", "the ranks have read different samples: "),
        (None, "ab", "the ranks have read different reward functions: "),
    ],
)
def test_ranks_that_read_different_files_stop(tiny, tmp_path, key, digests, line):
    samples, paths = samples_of(tiny), [str(tmp_path / f"{name}.json") for name in "ab"]
    for path in paths:
        Path(path).write_text(json.dumps(samples))
        samples[-1] |= {key: "other"} if key else {}
    run_ranks(survey_on_a_rank, 2, paths, str(tiny.folder / "videos"), str(tmp_path / "out"), digests)
    lines = {(tmp_path / f"out-{rank}").read_text() for rank in range(2)}
    assert len(lines) == 1 and lines.pop().startswith(line)


def test_truths_outside_the_range_are_counted(tiny, capsys):
    found_in(tiny, samples_of(tiny), valid_range=[41.0, 42.0])
    (line,) = capsys.readouterr().out.splitlines()
    assert "some.json': 2 truths, such as 40, are outside --valid_range 41 42" in line
