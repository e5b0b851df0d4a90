"""What a run knows of its samples after reading each once."""

import hashlib
import json
import math

import pytest

from grpo.config import Config
from grpo.run.survey import ListDigest, check_truths, survey
from tests.conftest import make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny") / "tiny", num_videos=(1, 3, 2, 1))


@pytest.mark.parametrize("items", [[], [1], [{"b": 1, "a": "é"}, [None, True], "x", 0.1]], ids=str)
def test_the_digest_of_items_is_that_of_their_list(items):
    """Checkpoints hold this one."""
    digest = ListDigest()
    for number, item in enumerate(items):
        part = json.dumps(items[:number], sort_keys=True)
        assert digest.hexdigest() == hashlib.sha256(part.encode()).hexdigest()
        digest.add(item)
    assert digest.hexdigest() == hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()


def samples_of(tiny):
    return json.loads((tiny.folder / "data.json").read_text())


def found_in(tiny, samples, **flags):
    (tiny.folder / "some.json").write_text(json.dumps(samples))
    messages = []
    config = Config(image_folder=str(tiny.folder / "videos"), **flags)
    return survey([str(tiny.folder / "some.json")], config, messages), messages


def test_truths_and_keys_are_gathered_in_the_order_of_the_samples(tiny):
    samples = samples_of(tiny)
    samples[1] |= {"site": "A", "age": 60}
    samples[3] |= {"sex": "f", "site": "B"}
    samples[2]["conversations"][-1]["value"] = "It cannot be seen."
    found, _ = found_in(tiny, samples)
    assert found.keys == ["site", "age", "sex"]
    assert found.truths[[0, 1, 3]].tolist() == [40, 41, 43] and math.isnan(found.truths[2])


def test_samples_are_as_the_model_sees_them(tiny):
    found, (message,) = found_in(tiny, samples_of(tiny), max_videos=2, system_prompt="Look well.")
    assert [len(sample.media) for sample in found.samples] == [1, 2, 2, 1]
    assert all(sample.turns[0] == ("system", "Look well.") for sample in found.samples)
    assert "some.json': 1 samples have more than --max_videos 2 videos" in message


def test_the_fingerprint_is_of_what_is_seen_and_not_of_the_own_data(tiny):
    first, _ = found_in(tiny, samples_of(tiny))
    samples = samples_of(tiny)
    samples[0]["site"] = "A"
    with_key, _ = found_in(tiny, samples)
    assert with_key.fingerprint == first.fingerprint and with_key.own_data != first.own_data
    for flags in ({"max_videos": 1}, {"system_prompt": "Look well."}):
        assert found_in(tiny, samples, **flags)[0].fingerprint != first.fingerprint
    samples[0]["conversations"][-1]["value"] = "The ejection fraction is 41%."
    assert found_in(tiny, samples)[0].fingerprint != first.fingerprint


def test_truths_outside_the_range_are_counted(tiny):
    found, messages = found_in(tiny, samples_of(tiny))
    check_truths(found, "--data_path", ["x"], [41.0, 42.0], messages)
    assert len(messages) == 1 and "'x': 2 truths, such as 40, are outside --valid_range 41 42" in messages[0]
