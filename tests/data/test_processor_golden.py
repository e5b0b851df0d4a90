"""What the model is given for each form of a sample, against files that Qwen2.5-VL's own processor made."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from data.dataset import load_samples
from data.frames import VideoOptions
from data.loader import load_prompt
from data.media import MediaOptions
from grpo.demo.tiny_tokenizer import CHAT_TEMPLATE

FOLDER = Path(__file__).parent / "golden_processor"  # made by the script in it
SAMPLES = {sample.id: sample for sample in load_samples([str(FOLDER / "data.json")], str(FOLDER))}
RESIZED = {"images that are resized", "videos and images, mixed"}


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(
        tokenizer_file=str(FOLDER / "tokenizer.json"), eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


@pytest.mark.parametrize("form", SAMPLES)
def test_the_model_is_given_what_qwens_own_processor_gives_it(tokenizer, form):
    theirs = {
        name.removeprefix(f"{form}/"): torch.from_numpy(values)
        for name, values in np.load(FOLDER / "golden.npz").items()
        if name.startswith(f"{form}/")
    }
    sample = SAMPLES[form]
    ours = load_prompt(sample, tokenizer, tokens_per_second=2, options=MediaOptions(VideoOptions()))
    assert ours.prompt_ids.tolist() == theirs["prompt_ids"].tolist()
    assert ours.position_ids.tolist() == theirs["position_ids"].tolist()
    places = {kind: [i for i, media in enumerate(sample.media) if media.kind == kind] for kind in ("video", "image")}
    patches = ours.pixel_values.split(ours.grid_thw.prod(dim=1).tolist()) if sample.media else []
    seconds = ours.second_per_grid_ts[places["video"]]
    assert torch.allclose(seconds, theirs["second_per_grid_ts"].float(), rtol=1e-6, atol=0)
    for kind, grid, pixels in (
        ("video", "video_grid_thw", "pixel_values_videos"),
        ("image", "image_grid_thw", "pixel_values"),
    ):
        assert (grid in theirs) == bool(places[kind])
        if not places[kind]:
            continue
        assert ours.grid_thw[places[kind]].tolist() == theirs[grid].tolist()
        levels = (torch.cat([patches[i] for i in places[kind]]) - theirs[pixels]).abs() * 0.27 * 255  # of 256
        if kind == "image" and form in RESIZED:  # by PIL there, on uint8 by torch here: see `resize`
            assert levels.max() < 2.5 and levels.mean() < 0.5
        else:
            assert levels.max() < 1e-4
