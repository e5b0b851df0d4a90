"""Resized frames and their patches, against PIL and HF's image processor."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.media.patches import normalise, patchify, resize, unpatchify


def random_frames(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_patches_equal_those_of_hf_frame_by_frame():
    frames = random_frames(4, 3, 56, 84)
    processor = Qwen2VLImageProcessorPil(do_resize=False)
    images = [frame.permute(1, 2, 0).numpy() for frame in frames]
    hf = processor(images, return_tensors="pt")["pixel_values"].view(4, 4 * 6, 3, 2, 14, 14)  # frame twice over time
    expected = torch.cat(
        [torch.stack([first[:, :, 0], second[:, :, 1]], dim=2) for first, second in [(hf[0], hf[1]), (hf[2], hf[3])]]
    )  # (2·4·6, 3, 2, 14, 14)

    patches, grid_thw = patchify(frames)

    assert grid_thw == (2, 4, 6)
    torch.testing.assert_close(normalise(patches), expected.reshape(48, 1176), atol=1e-6, rtol=0)


def test_each_channel_is_normalised_with_its_own_mean_and_standard_deviation():
    frames = torch.full((2, 3, 28, 28), 7, dtype=torch.uint8)
    frames[1, :, 3, 20] = torch.tensor([0, 128, 255])  # in the second patch, at its row 3 and column 6
    patches, _ = patchify(frames)
    assert patches.dtype == torch.uint8 and patches.shape == (4, 1176)
    of_a_pixel = normalise(patches).view(4, 3, 2, 14, 14)[1, :, 1, 3, 6]
    # (0 - 0.48145466) / 0.26862954, (128 / 255 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711
    assert of_a_pixel.tolist() == pytest.approx([-1.792263, 0.168897, 2.145897], abs=1e-6)


def pil_resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    resized = [np.array(image.resize((width, height), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "size, tolerance",
    # enlarged noise is the worst case for the two roundings, in which PIL and torch differ by 2 at one pixel in 10,000
    [((56, 84), 1), ((84, 56), 1), ((28, 28), 1), ((112, 140), 2), ((168, 56), 2)],
)
def test_resize_is_bicubic_and_antialiased_as_in_pil(size, tolerance):
    frames = random_frames(9, 3, 100, 120)
    resized = resize(frames, *size)
    difference = (resized.int() - pil_resize(frames, *size).int()).float()
    assert resized.dtype == torch.uint8
    assert difference.abs().max() <= tolerance
    assert (difference.abs() > 1).float().mean() < 1e-3
    assert difference.mean().abs() < 0.01  # rounded, not truncated


def test_an_enlarged_picture_equals_that_of_pil_within_one_level():
    x, y = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    picture = (127 + 60 * torch.sin(x / 3) + 60 * torch.cos(y / 5)).byte().expand(2, 3, 60, 80)
    assert (resize(picture, 112, 140).int() - pil_resize(picture, 112, 140).int()).abs().max() <= 1


def test_a_video_of_the_right_size_keeps_its_pixels():
    frames = random_frames(2, 3, 56, 56)
    assert torch.equal(resize(frames, 56, 56), frames)


def test_frames_come_back_from_their_patches():
    """What a contact sheet shows is what the model sees: to the level."""
    frames = torch.randint(0, 256, (6, 3, 56, 84), dtype=torch.uint8)
    assert torch.equal(unpatchify(*patchify(frames)), frames)
