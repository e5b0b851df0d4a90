"""Supervised training: its loss is Hugging Face's own cross-entropy, and its run is like any other's."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from data.prompt import encode_answer
from grpo.config import Config
from grpo.evaluate import __main__ as evaluate
from grpo.export import export
from grpo.model.optimizer import component_of, freeze, make_optimizer
from grpo.model.sharding import Models, SamplingModel, apply_fsdp
from grpo.ranks import start_processes
from tests.grpo.test_packed import hf_twin, pixels_of, relative
from tests.kill_and_resume import result
from tests.test_train import curves, flags, run_main, weights

SUPERVISED = ["--supervised", "--global_batch_size", "4"]
CURVES = """
    loss token_accuracy entropy grad_norm learning_rate time/update time/data time/step run/tokens_per_second
    run/peak_memory_gb run/skipped_samples run/shortened_prompts run/bad_steps
""".split()


@pytest.fixture
def device():
    yield start_processes()
    torch.distributed.destroy_process_group()


def labelled_rows(tiny) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    """Ids, attention mask, labels (B, longest) and positions (3, B, longest) of padded rows `[prompt | answer]`."""
    rows = []
    for prompt in tiny.prompts:
        answer = torch.tensor(tiny.tokenizer.encode(prompt.sample.answer) + [tiny.tokenizer.eos_token_id])
        ids = torch.cat([prompt.prompt_ids, answer])
        labels = torch.cat([torch.full_like(prompt.prompt_ids, -100), answer])  # -100: not in the loss
        own = prompt.position_ids.max() + 1 + torch.arange(len(answer))
        rows.append((ids, labels, torch.cat([prompt.position_ids, own.expand(3, -1)], dim=1)))
    longest = max(len(ids) for ids, *_ in rows)

    def stacked(column: int, fill: int, dim: int) -> torch.Tensor:
        pieces = [F.pad(row[column], (0, longest - row[column].shape[-1]), value=fill) for row in rows]
        return torch.stack(pieces, dim=dim)

    mask = torch.stack([torch.arange(longest) < len(ids) for ids, *_ in rows]).long()
    return stacked(0, 0, 0), mask, stacked(1, -100, 0), stacked(2, 0, 1)


def update(model, tiny, config: Config) -> dict[str, float]:
    """Do a step of supervised training on all samples; the gradients stay."""
    optimizer, _ = make_optimizer(model, config, total_steps=1)
    scored, records = train.supervised_phase(tiny.prompts, tiny.tokens)
    assert records.groups == []
    models = Models(model, SamplingModel(model), None)
    return train.update_phase(models, optimizer, scored, tiny.suppress_tokens, config) | {"n": records.num_tokens}


@pytest.mark.parametrize("frozen", [{}, {"freeze_vision_tower": True}], ids=["all weights", "a frozen tower"])
@pytest.mark.parametrize("data", ["tiny", "mixed"])
def test_loss_and_gradient_are_those_of_hugging_faces_cross_entropy(request, device, data, frozen):
    """On padded rows, with `labels`, at a temperature of 1; the prompts have videos, images or text only."""
    tiny = request.getfixturevalue(data)
    model = copy.deepcopy(tiny.model)
    config = Config(supervised=True, per_device_train_batch_size=2, max_grad_norm=1e9, temperature=0.3, **frozen)
    freeze(model, config)
    apply_fsdp(model, device)
    losses = [update(model, tiny, dataclasses.replace(config, learning_rate=1e-2))["loss"] for _ in range(3)]
    assert losses[2] < 0.7 * losses[0]  # some tokens are right now

    twin = hf_twin(model)
    twin.zero_grad()
    ids, mask, labels, positions = labelled_rows(tiny)
    pixels = [pixels_of(prompt) for prompt in tiny.prompts]
    pixels = {name: torch.cat([own[name] for own in pixels if name in own]) for name in set().union(*pixels)}
    out = twin(input_ids=ids, attention_mask=mask, labels=labels, position_ids=positions, use_cache=False, **pixels)
    out.loss.backward()
    num_tokens = int((labels != -100).sum())
    num_right = int((out.logits[:, :-1].argmax(dim=2) == labels[:, 1:]).sum())

    metrics = update(model, tiny, config)
    assert metrics["n"] == num_tokens and 0 < num_right < num_tokens
    assert metrics["loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(num_right / num_tokens, rel=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if frozen and component_of(name) == "vision tower":
            assert ours.grad is None
        else:
            assert relative(ours.grad, theirs.grad) < 1e-5, name


def evaluating(tiny, *more) -> list[str]:
    return [*SUPERVISED, "--eval_data_path", tiny.folder / "data.json", *more]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Six steps with an evaluation in the middle and at the end."""
    output = tmp_path_factory.mktemp("supervised") / "out"
    more = "--max_steps 6 --eval_steps 3 --save_steps 3 --learning_rate 1e-2 --max_completion_length 12".split()
    assert train.main(flags(tiny, output, *evaluating(tiny, *more, "--log_completions", "1"))) == 0
    return output


def test_a_run_draws_what_there_is_learns_its_answers_and_is_evaluated(run):
    found = curves(run)
    drawn = {name for name in found if not name.startswith("eval/")}
    assert drawn == {*CURVES, "time/eval"} and all(len(found[name]) == 6 for name in CURVES)
    assert found["loss"][-1] < 0.6 * found["loss"][0] and found["token_accuracy"][-1] > found["token_accuracy"][0]
    assert len(found["eval/mae"]) == 2 and not list(run.glob("rollouts*"))
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert len(events.Images("eval/scatter")) == 2 and len(events.Images("contact_sheet")) == 6
    card = (run / "final" / "README.md").read_text()
    assert "trained with supervised fine-tuning" in card and "tags: [sft, " in card
    assert (run / "best" / "model.safetensors").exists()


def stopped_after_3(whole: Path, output: Path) -> Path:
    """What a run leaves that was killed after its third step, with curves that reach further than its checkpoint."""
    shutil.copytree(whole, output)
    for name in ("checkpoint-6", "final"):
        shutil.rmtree(output / name)
    return output


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(tiny, run, tmp_path):
    output = stopped_after_3(run, tmp_path / "out")
    resolved = json.loads((run / "config.json").read_text())
    more = ["--max_steps", "6", "--eval_steps", "3", "--save_steps", "3", "--learning_rate", "1e-2"]
    more += ["--max_completion_length", "12", "--resume_from_checkpoint", "auto"]
    assert resolved["supervised"] and train.main(flags(tiny, output, *evaluating(tiny, *more))) == 0
    assert result(output) == result(run)


def test_two_ranks_train_adapters_as_one_does_with_all_forms_of_samples(mixed, tmp_path):
    """`test_sharding.py` does so with all weights, also on four."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = [*SUPERVISED, "--num_train_epochs", "2", *"--lora_enable --lora_rank 4 --lora_dropout 0".split()]
    assert train.main(flags(mixed, one, *more)) == 0
    run_main(2, flags(mixed, two, *more, "--per_device_train_batch_size", "1"), tmp_path)
    found, expected = curves(two), curves(one)
    for name in CURVES:
        if not name.startswith(("time/", "run/tokens", "run/peak")):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_the_pipeline_with_adapters_supervised_export_grpo_and_an_evaluation_of_each(tiny, run, tmp_path, capfd):
    adapters, merged, grpo, lora = (tmp_path / name for name in ("adapters", "merged", "grpo", "lora"))
    assert train.main(flags(tiny, adapters, *SUPERVISED, "--lora_enable", "--lora_rank", "4")) == 0
    assert train.main(flags(tiny, grpo, "--model_id", adapters / "final")) == 2
    assert f"python -m grpo.export --adapter {adapters / 'final'} --output" in capfd.readouterr().err
    export(str(adapters / "final"), str(merged))
    assert train.main(flags(tiny, grpo, "--global_batch_size", "4", "--model_id", merged)) == 0
    assert len(curves(grpo)["reward"]) == 1
    assert train.main(flags(tiny, lora, "--global_batch_size", "4", "--model_id", run / "best", "--lora_enable")) == 0
    for folder in (adapters, run):  # the second one has held-out samples of its own
        where = ["--data_path", str(tiny.folder / "data.json")]
        assert evaluate.main(["--run", str(folder), *where, "--output_dir", str(tmp_path / "eval" / folder.name)]) == 0
    found = json.loads((tmp_path / "eval" / run.name / "metrics.json").read_text())
    assert found["mae"]["value"] == pytest.approx(curves(run)["eval/mae"][-1], rel=1e-6)


@pytest.mark.parametrize(
    "flag",
    [
        *("--num_generations 4", "--beta 0.1", "--epsilon 0.2", "--num_iterations 2", "--loss_type grpo"),
        *("--reward_weights 2", "--temperature 1", "--top_k 5", "--mask_truncated_completions"),
    ],
)
def test_a_flag_that_has_no_effect_is_refused(tiny, tmp_path, capfd, flag):
    assert train.main(flags(tiny, tmp_path / "out", *SUPERVISED, *flag.split())) == 2
    name = flag.split()[0]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"train.py: error: {name} ") and line.endswith("leave out one of them")
    assert "--supervised" in line


def test_a_checkpoint_of_the_other_kind_is_not_resumed(tiny, run, tmp_path, capfd):
    output = stopped_after_3(run, tmp_path / "out")
    assert train.main(flags(tiny, output, "--global_batch_size", "4", "--resume_from_checkpoint", "auto")) == 2
    assert "--supervised False was True" in capfd.readouterr().err


def test_long_answers_are_trained_whole_and_named_at_the_start(tiny, tmp_path, capfd):
    """FLAGS of the tests have 6 tokens; the answers have more."""
    lengths = [len(encode_answer(prompt.sample.answer, tiny.tokenizer)) for prompt in tiny.prompts]
    assert min(lengths) > 6
    assert train.main(flags(tiny, tmp_path / "out", *SUPERVISED)) == 0
    expected = (
        f"4 answers are longer than --max_completion_length 6 tokens (up to {max(lengths)}): they are trained whole"
    )
    assert expected in capfd.readouterr().out
    found = curves(tmp_path / "out")
    assert found["run/tokens_per_second"][0] * found["time/step"][0] == pytest.approx(sum(lengths), rel=1e-3)


def test_special_tokens_in_an_answer_are_refused_with_the_sample(tiny, tmp_path, capfd):
    samples = json.loads((tiny.folder / "data.json").read_text())
    samples[2]["conversations"][1]["value"] = "55%<|im_end|>"
    (tmp_path / "data.json").write_text(json.dumps(samples))
    arguments = flags(tiny, tmp_path / "out", *SUPERVISED, "--data_path", tmp_path / "data.json")
    assert train.main(arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "sample 's2'" in line and "<|im_end|>" in line and not (tmp_path / "out").exists()


def test_the_trial_step_takes_the_sample_whose_prompt_and_answer_are_the_longest_together(tiny, tmp_path, capfd):
    samples = json.loads((tiny.folder / "data.json").read_text())
    samples[0]["conversations"][1]["value"] = "The ejection fraction is 55%." * 40  # its prompt is the shortest
    (tmp_path / "data.json").write_text(json.dumps(samples))
    more = ["--data_path", tmp_path / "data.json", "--memory_preflight", "true"]
    assert train.main(flags(tiny, tmp_path / "out", *evaluating(tiny, *more))) == 0
    printed = capfd.readouterr().out
    assert "in a trial step on sample 's0' with 1 videos" in printed and "its true answer" in printed
    assert train.main(flags(tiny, tmp_path / "other", *SUPERVISED, *more[:2])) == 0
    assert (weights(tmp_path / "out" / "final") == weights(tmp_path / "other" / "final")).all()
