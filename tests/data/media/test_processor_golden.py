"""What the model is given for each form of a sample, against files that Qwen2.5-VL's own processor made."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from data.dataset import load_samples
from data.loader import load_prompt
from data.media.frames import VideoOptions
from data.media.load import MediaOptions
from data.media.patches import CLIP_STD, normalise
from grpo.demo.tiny_tokenizer import CHAT_TEMPLATE

FOLDER = Path(__file__).parent / "golden_processor"  # made by the script in it
SAMPLES = {sample.id: sample for sample in load_samples([str(FOLDER / "data.json")], str(FOLDER))}
RESIZED = {"b.png", "c.png"}  # the others have sides that are multiples of 28


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
    pieces = normalise(ours.patches).split(ours.grid_thw.prod(dim=1).tolist()) if sample.media else []
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
        start = 0
        for i in places[kind]:
            one = theirs[pixels][start : start + len(pieces[i])]
            start += len(one)
            if Path(sample.media[i].files[0]).name not in RESIZED:
                assert torch.equal(pieces[i], one)
                continue
            # By PIL there, on uint8 by torch here: see `resize`. In levels of 256; a patch is (3, 2 * 14 * 14).
            levels = ((pieces[i] - one).view(-1, 3, 392) * torch.tensor(CLIP_STD).view(3, 1) * 255).abs()
            assert levels.max() < 2.01 and levels.mean() < 0.12
        assert start == len(theirs[pixels])
