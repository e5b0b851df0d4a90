"""Supervised training, with which GRPO is compared: its loss is Hugging Face's own, and it learns its answers."""

import copy
import shutil

import torch

from grpo.demo.supervised import SupervisedConfig, fit, main, supervised_loss
from tests.grpo.test_packed import hf_twin, pixels_of, relative


def answers_of(tiny):
    return [torch.tensor(tiny.tokenizer.encode(p.sample.answer) + [tiny.tokenizer.eos_token_id]) for p in tiny.prompts]


def test_the_loss_is_the_mean_over_all_answer_tokens_of_hugging_faces_model(tiny):
    model, twin, answers = copy.deepcopy(tiny.model), hf_twin(tiny.model), answers_of(tiny)
    answers[1] = answers[1][:3]  # of unequal lengths
    loss = supervised_loss(model, tiny.prompts, answers)
    loss.backward()
    total = 0.0
    for prompt, answer in zip(tiny.prompts, answers, strict=True):
        own = prompt.position_ids.max() + 1 + torch.arange(len(answer))
        out = twin(
            input_ids=torch.cat([prompt.prompt_ids, answer])[None],
            labels=torch.cat([torch.full_like(prompt.prompt_ids, -100), answer])[None],  # -100: not in the loss
            position_ids=torch.cat([prompt.position_ids, own.expand(3, -1)], dim=1)[:, None],
            use_cache=False,
            **pixels_of(prompt),
        )
        total = total + out.loss * len(answer)
    total = total / sum(map(len, answers))
    total.backward()
    assert abs(loss - total) < 1e-6
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert relative(ours.grad, theirs.grad) < 1e-4, name


def test_it_learns_its_answers_and_the_same_seed_gives_the_same_weights(tiny):
    losses, weights = [], []
    for _ in range(2):
        model = copy.deepcopy(tiny.model)
        before = supervised_loss(model, tiny.prompts, answers_of(tiny)).item()
        fit(model, tiny.prompts * 2, tiny.tokenizer, SupervisedConfig(steps=25, seed=3))
        losses.append((before, supervised_loss(model, tiny.prompts, answers_of(tiny)).item()))
        weights.append([parameter.detach() for parameter in model.parameters()])
    assert losses[0][1] < 0.5 * losses[0][0]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_broken_video_is_one_line(tiny, tmp_path, capsys):
    shutil.copytree(tiny.folder / "videos", tmp_path / "videos")
    shutil.copy(tiny.folder / "data.json", tmp_path)
    (tmp_path / "videos" / "0_0.mp4").write_bytes(b"no video")
    flags = ["--model_id", str(tiny.folder / "model"), "--data_path", str(tmp_path / "data.json")]
    assert main([*flags, "--output_dir", str(tmp_path / "out")]) == 2  # the videos lie beside the file
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("grpo.demo.supervised: error: ") and "0_0.mp4" in line and not (tmp_path / "out").exists()
