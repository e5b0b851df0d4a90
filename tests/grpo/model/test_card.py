"""Every saved model says what it is: base, flags, data, step, evaluation; and its own lines load it."""

import json
import re

import pytest
import torch
import yaml

import train
from grpo import export
from grpo.model.card import model_card
from tests.test_train import flags

LORA = "--lora_enable --lora_rank 4 --freeze_vision_tower".split()


def header(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture(scope="module", params=[[], LORA], ids=["all weights", "adapters"])
def run(request, tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("card") / "out"
    more = ["--eval_data_path", tiny.folder / "data.json", "--max_steps", "2", "--save_steps", "1"]
    more += ["--log_completions", "0", *request.param]
    assert train.main(flags(tiny, output, *more)) == 0
    return output, bool(request.param)


def test_every_saved_folder_has_a_card_with_its_step_flags_data_and_figures(tiny, run):
    output, is_adapter = run
    for name, step in (("checkpoint-1", 1), ("checkpoint-2", 2), ("best", 2), ("final", 2)):
        text = (output / name / "README.md").read_text()
        progress = json.loads((output / name / "progress.json").read_text())
        assert header(text)["base_model"] == str(tiny.folder / "model")
        assert header(text)["library_name"] == ("peft" if is_adapter else "transformers")
        assert f"Step {step} of 2" in text and "on 4 samples" in text and progress["data"][0][:16] in text
        shown = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
        assert shown == progress["flags"] and shown["nframes"] == 4
        has_figures = "| mean absolute error |" in text
        assert has_figures == (step == 2)
        if has_figures:
            assert f"| mean absolute error | {progress['evaluations'][-1]['eval/mae']:.3f} |" in text


def test_the_lines_that_load_a_model_work(run):
    output, _ = run
    (lines,) = re.findall(r"```python\n(.*?)```", (output / "final" / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(lines.replace("THIS_FOLDER", str(output / "final")), names)
    assert names["tokenizer"].chat_template and sum(p.numel() for p in names["model"].parameters()) > 0
    assert all(torch.isfinite(p).all() for p in names["model"].parameters())


def test_a_merged_model_has_a_card_of_an_ordinary_model(run, tmp_path):
    output, is_adapter = run
    if is_adapter:
        export.export(str(output / "final"), str(tmp_path / "merged"))
        text = (tmp_path / "merged" / "README.md").read_text()
        assert header(text)["library_name"] == "transformers" and "Step 2 of 2" in text and "peft" not in text


def test_names_cannot_break_the_card():
    flags = {"model_id": "a: b\n---\n`#` \u202e\x1b[31m 'x'", "supervised": False}
    progress = {"flags": flags, "step": 1, "total_steps": 2, "num_samples": 3, "data": ["0" * 64], "evaluations": []}
    text = model_card(progress, is_adapter=False)
    assert header(text)["base_model"] == flags["model_id"]
    assert text.count("\n---\n") == 1 and not set(text) & set("\u202e\x1b")
