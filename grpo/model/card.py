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


def model_card(progress: dict, is_adapter: bool) -> str:
    """Return the card as Markdown with Hugging Face's YAML header.

    progress: the contents of a saved model's progress.json. is_adapter: the folder holds adapters only.
    """
    flags, step = progress["flags"], progress["step"]
    base = flags["model_id"]
    header = {
        "base_model": base,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "video-text-to-text",
        "tags": ["grpo", "qwen2_5_vl"],
    }
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in header.items()), "---", ""]  # JSON is YAML
    lines += [
        "# Qwen2.5-VL trained with GRPO",
        "",
        f"Step {step} of {progress['total_steps']}, from `{code(base)}`, on {progress['num_samples']} samples "
        f"(SHA-256 of their files: {', '.join(f'`{digest[:16]}`' for digest in progress['data'])})"
        + (", as adapters (LoRA)." if is_adapter else "."),
        "",
    ]
    lines += evaluation_table(progress.get("evaluations", []))
    lines += ["## How to load it", "", "```python", *loading(base, is_adapter), "```", ""]
    lines += [
        "Text after a video continues at the largest position of the video on any axis, plus 1, as in Qwen's own",
        "training code, vLLM and SGLang. transformers 5.3 and later place it elsewhere: pass `position_ids` to",
        "`generate` there.",
        "",
        "## Flags",
        "",
        "```json",
        json.dumps(flags, indent=2),
        "```",
    ]
    return "\n".join(lines) + "\n"


def evaluation_table(evaluations: list[dict]) -> list[str]:
    """Return the figures of the last evaluation before a model was saved; nothing if there was none."""
    if not evaluations:
        return []
    last = evaluations[-1]
    lines = [f"## Held-out samples, after step {last['step']}", "", "| greedy answers | |", "|---|---|"]
    lines += [f"| {label} | {last[name]:.3f} |" for name, label in FIGURES.items() if name in last]
    return [*lines, ""]


def loading(base: str, is_adapter: bool) -> list[str]:
    """Return lines of Python that load the folder."""
    lines = ["from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration", ""]
    if is_adapter:
        return [
            "from peft import PeftModel",
            *lines,
            f"base = Qwen2_5_VLForConditionalGeneration.from_pretrained({base!r})",
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        ]
    return [
        *lines,
        'model = Qwen2_5_VLForConditionalGeneration.from_pretrained("THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
    ]


def code(text: str) -> str:
    """Keep a name within its backticks."""
    return "".join(c for c in text if c.isprintable() and c != "`")
