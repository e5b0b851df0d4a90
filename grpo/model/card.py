"""The README.md of a saved model: what it is, how it was trained, how good it is, how to load it."""

import json

FIGURES = {
    "eval/reward": "mean reward",
    "eval/mae": "mean absolute error",
    "eval/rmse": "root mean squared error",
    "eval/r2": "R²",
    "eval/ccc": "concordance (CCC)",
    "eval/bias": "bias",
    "eval/parse_rate": "share with a number",
    "eval/zero_skill_mae": "mean absolute error of the best constant answer",
}
CARD = """---
base_model: {base}
library_name: {library}
pipeline_tag: video-text-to-text
tags: [{tag}, qwen2_5_vl]
---

# Qwen2.5-VL trained with {method}

Step {step} of {total_steps}, from `{base_as_code}`, on {num_samples} samples (SHA-256 of their
files: {digests}){form}.
{evaluation}
## How to load it

```python
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

{loading}
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

Text after a video continues at the largest position of the video on any axis, plus 1, as in Qwen's own training code,
vLLM and SGLang. transformers 5.3 and later place it elsewhere: pass `position_ids` to `generate` there.

## Flags

```json
{flags}
```
"""
LOAD = 'model = Qwen2_5_VLForConditionalGeneration.from_pretrained("THIS_FOLDER")'
LOAD_ADAPTER = """from peft import PeftModel

base = Qwen2_5_VLForConditionalGeneration.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, "THIS_FOLDER")"""


def model_card(progress: dict, is_adapter: bool) -> str:
    """Return the card as Markdown with Hugging Face's YAML header.

    progress: the contents of a saved model's progress.json. is_adapter: the folder holds adapters only.
    """
    base, evaluation = progress["flags"]["model_id"], ""
    if progress["evaluations"]:
        last = progress["evaluations"][-1]
        rows = "".join(f"| {label} | {last[name]:.3f} |\n" for name, label in FIGURES.items() if name in last)
        evaluation = f"\n## Held-out samples, after step {last['step']}\n\n| greedy answers | |\n|---|---|\n{rows}"
    is_supervised = progress["flags"]["supervised"]
    shown = {
        "tag": "sft" if is_supervised else "grpo",
        "method": "supervised fine-tuning" if is_supervised else "GRPO",
        "flags": json.dumps(progress["flags"], indent=2),
        "base": json.dumps(base),  # JSON is YAML
        "base_as_code": "".join(c for c in base if c.isprintable() and c != "`"),
        "library": "peft" if is_adapter else "transformers",
        "form": ", as adapters (LoRA)" if is_adapter else "",
        "evaluation": evaluation,
        "digests": ", ".join(f"`{digest[:16]}`" for digest in progress["data"]),
        "loading": LOAD_ADAPTER.format(base=base) if is_adapter else LOAD,
    }
    return CARD.format_map(progress | shown)
