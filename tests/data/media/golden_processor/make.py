"""Make the files of this folder with Qwen2.5-VL's own processor, as it was when the model was published.

    python3 -m venv old && old/bin/pip install torch==2.13.0 transformers==4.51.3 pillow==13.0.0 numpy==2.4.6
    old/bin/python tests/data/media/golden_processor/make.py

Its positions are those that the model was trained with (data/README.md), and its processor needs no torchvision. None
of our code runs here. `tokenizer.json` is a small tokenizer with Qwen's special tokens, `data.json` has a sample of
each form, and `golden.npz` what the model is given for it.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2TokenizerFast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

HERE = Path(__file__).parent
QUESTION = "What is the ejection fraction in these videos?"
IMAGES = {"a.png": (56, 84), "b.png": (60, 75), "c.png": (40, 130)}  # height, width; the last two are resized
CLIPS = {"clip_1": (4, 56, 84), "clip_2": (6, 56, 56)}  # frames, height, width, as the model is given them

# Of clip_1 a step of the grid lasts 2 s, 4 positions: more than its grid is wide, so text goes on behind its time.
CLIP_1 = {"video": "clip_1", "fps": 1, "resized_width": 84, "resized_height": 56}
CLIP_2 = {"video": [f"clip_2/{k}.png" for k in range(6)], "fps": 5, "resized_width": 56, "resized_height": 56}

# Of each form: what stands in the JSON, the turns of the prompt, and the media by kind, a video with its fps.
FORMS = {
    "a folder of frames": ({"video": CLIP_1}, [("user", "<video>\n" + QUESTION)]),
    "a list of frames": ({"video": CLIP_2}, [("user", "<video>\n" + QUESTION)]),
    "two videos": ({"video": [CLIP_1, CLIP_2]}, [("user", "<video>\n<video>\n" + QUESTION)]),
    "an image": ({"image": "a.png"}, [("user", "<image>\n" + QUESTION)]),
    "three images, two resized": (
        {"image": ["a.png", "b.png", "c.png"]},
        [("user", "<image>\n<image>\n<image>\n" + QUESTION)],
    ),
    "image, video, image": (
        {"video": CLIP_1, "image": ["c.png", "a.png"]},
        [("user", "<image>\n<video>\n<image>\n" + QUESTION)],
    ),
    "videos and images, mixed": (
        {"video": [CLIP_2, CLIP_1], "image": ["b.png", "a.png"]},
        [("user", "<image>See <video><image>and <video>. " + QUESTION)],
    ),
    "text only": ({}, [("user", QUESTION)]),
    "several turns": (
        {"video": CLIP_1, "image": "a.png"},
        [
            ("system", "You read echocardiograms."),
            ("user", "<image>\nWhat is this?"),
            ("assistant", "An ECG."),
            ("user", "<video>\n" + QUESTION),
        ],
    ),
}
TOKENS = {
    "<video>": "<|vision_start|><|video_pad|><|vision_end|>",
    "<image>": "<|vision_start|><|image_pad|><|vision_end|>",
}


def picture(height: int, width: int, seed: int, levels: int = 256) -> np.ndarray:
    """Draw soft waves, (height, width, 3) uint8; few levels make small files."""
    rng, y, x = np.random.default_rng(seed), np.arange(height)[:, None, None], np.arange(width)[None, :, None]
    fx, fy, phase = rng.uniform(0.02, 0.2, 3), rng.uniform(0.02, 0.2, 3), rng.uniform(0, 6, 3)
    waves = (127.5 + 120 * np.sin(fx * x + fy * y + phase)).astype(np.uint8)
    return waves // (256 // levels) * (256 // levels)


def rendered(turns: list[tuple[str, str]]) -> str:
    """Write a prompt in the model's chat format; one newline behind a tag belongs to the tag."""
    if turns[0][0] != "system":
        turns = [("system", "You are a helpful assistant."), *turns]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    for tag, tokens in TOKENS.items():
        text = text.replace(tag + "\n", tokens).replace(tag, tokens)
    return text + "<|im_start|>assistant\n"


def main() -> None:
    """Write everything."""
    for number, (name, size) in enumerate(IMAGES.items()):
        Image.fromarray(picture(*size, seed=number)).save(HERE / name)
    for number, (name, (frames, *size)) in enumerate(CLIPS.items()):
        (HERE / name).mkdir(exist_ok=True)
        for k in range(frames):
            Image.fromarray(picture(*size, 100 * (number + 1) + k, levels=16)).save(HERE / name / f"{k}.png")
    tokenizer = Qwen2TokenizerFast(
        tokenizer_file=str(HERE / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    images = Qwen2VLImageProcessor(min_pixels=4 * 28 * 28, max_pixels=16384 * 28 * 28)  # as the model's own settings
    processor = Qwen2_5_VLProcessor(images, tokenizer)
    video_id, image_id, start_id = tokenizer.convert_tokens_to_ids(
        ["<|video_pad|>", "<|image_pad|>", "<|vision_start|>"]
    )
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    config = SimpleNamespace(
        vision_config=vision, image_token_id=image_id, video_token_id=video_id, vision_start_token_id=start_id
    )
    samples, golden = [], {}
    for form, (media, turns) in FORMS.items():
        listed = {kind: one if isinstance(one, list) else [one] for kind, one in media.items()}
        videos, fps = [], []
        for video in listed.get("video", []):
            paths = video["video"]
            paths = [f"{paths}/{k}.png" for k in range(CLIPS[paths][0])] if isinstance(paths, str) else paths
            # As lists of arrays: the processor of this version takes a 4-D array for a batch of images.
            videos.append([np.array(Image.open(HERE / path)) for path in paths])
            fps.append(float(video["fps"]))
        pictures = [Image.open(HERE / name) for name in listed.get("image", [])]
        given = processor(
            text=[rendered(turns)],
            images=pictures or None,
            videos=videos or None,
            videos_kwargs={"fps": fps} if fps else {},
            return_tensors="pt",
        )
        seconds = torch.tensor(given["second_per_grid_ts"]) if videos else None
        positions, _ = Qwen2_5_VLForConditionalGeneration.get_rope_index(
            SimpleNamespace(config=config),
            given["input_ids"],
            given.get("image_grid_thw"),
            given.get("video_grid_thw"),
            seconds,
            given["attention_mask"],
        )
        golden |= {
            f"{form}/{name}": given[name].numpy() for name in given if name.startswith(("pixel", "image", "video"))
        }
        golden[f"{form}/prompt_ids"] = given["input_ids"][0].numpy()
        golden[f"{form}/position_ids"] = positions[:, 0].numpy()
        golden[f"{form}/second_per_grid_ts"] = seconds.numpy() if videos else np.zeros(0)
        conversations = [{"from": role, "value": text} for role, text in [*turns, ("assistant", "55%")]]
        samples.append({"id": form, **media, "conversations": conversations})
    (HERE / "data.json").write_text(json.dumps(samples, indent=1) + "\n")
    np.savez_compressed(HERE / "golden.npz", **golden)


if __name__ == "__main__":
    main()
