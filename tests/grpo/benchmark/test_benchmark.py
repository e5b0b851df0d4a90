"""The benchmark runs the trainer's own phases, and measures the baseline in turn with them."""

import json
import os
import time
from contextlib import redirect_stderr

import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

import grpo.benchmark.__main__ as benchmark
from grpo.benchmark.repeated_rows import repeated_rollout, repeated_update
from grpo.logprobs import completion_logprobs
from grpo.model.load import special_tokens
from tests.conftest import run_ranks
from tests.grpo.test_packed import hf_twin

FLAGS = "--size tiny --num_videos 2 --frames 4 --resolution 56 --num_generations 4 --completion_length 5 --runs 1"


def bench(path: str) -> None:
    """Run it, with a copy and a product that take no time for the machine's limits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "COPIED_BYTES", 2**20)
        patch.setattr(benchmark, "MATRIX_SIDE", {"cpu": 64})
        assert benchmark.main([*FLAGS.split(), "--json", path]) == 0


def check_figures(path, ranks: int) -> None:
    figures = json.loads(path.read_text())
    assert figures["ranks"] == ranks and figures["options"]["num_videos"] == 2
    assert figures["decode_seconds"] == pytest.approx(figures["rollout_seconds"] - figures["prefill_seconds"])
    for one in (figures, figures["baseline"]):
        assert all(one[name] > 0 for name in benchmark.FIGURES)
        assert one["step_seconds"] == pytest.approx(one["rollout_seconds"] + one["update_seconds"])
    lines = benchmark.table(figures).splitlines()
    assert [line.split()[0] for line in lines[1:7]] == ["prefill", "decode", "rollout", "update", "step", "peak"]


def test_figures_of_both_ways_are_written_and_no_pass_lacks_the_optimizers_states(tmp_path, monkeypatch):
    has_states, update_phase = [], benchmark.update_phase

    def spy(models, optimizer, *rest):
        has_states.append(len(optimizer.state) > 0)
        return update_phase(models, optimizer, *rest)

    monkeypatch.setattr(benchmark, "update_phase", spy)
    bench(str(tmp_path / "figures.json"))
    check_figures(tmp_path / "figures.json", ranks=1)
    assert has_states == [True, True]


def test_figures_of_two_ranks_are_written(tmp_path):
    run_ranks(bench, 2, str(tmp_path / "figures.json"))
    check_figures(tmp_path / "figures.json", ranks=2)


def out_of_memory(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def test_where_repeated_rows_do_not_fit_ours_are_measured_nevertheless(tmp_path, monkeypatch):
    update = benchmark.repeated_update

    def update_that_does_not_fit(model, *arguments):
        model.model.language_model.layers[1].mlp.register_forward_hook(out_of_memory)  # amid a pass
        update(model, *arguments)

    monkeypatch.setattr(benchmark, "repeated_update", update_that_does_not_fit)
    bench(str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["baseline"] is None and all(figures[name] > 0 for name in benchmark.FIGURES)
    assert figures["baseline_out_of_memory"] and benchmark.table(figures).count("out of memory") == 4


def bench_on_a_rank_short_of_memory(path: str) -> None:
    benchmark.repeated_update = out_of_memory if os.environ["RANK"] == "1" else lambda *arguments: time.sleep(60)
    with open(f"{path}.{os.environ['RANK']}", "w") as file, redirect_stderr(file):
        bench(path)


def test_a_rank_short_of_memory_alone_says_so_and_ends_while_the_others_wait_for_it(tmp_path):
    with pytest.raises(ProcessExitedException) as raised:
        run_ranks(bench_on_a_rank_short_of_memory, 2, str(tmp_path / "figures"))
    assert (raised.value.error_index, raised.value.exit_code) == (1, 2)
    line = (tmp_path / "figures.1").read_text()
    assert "rank 1: out of memory" in line and "--baseline False" in line and line.strip().count("\n") == 0


def test_what_does_not_fit_at_all_is_refused_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "update_phase", out_of_memory)
    assert benchmark.main(FLAGS.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m grpo.benchmark: error: out of memory")


def test_repeated_rows_are_the_same_work(tiny):
    """Given the same completions, the baseline's gradient is that of the packed pass."""
    suppressed = special_tokens(tiny.model, tiny.tokenizer, "cpu").suppress_tokens
    prompt, twin = tiny.prompts[1], hf_twin(tiny.model)
    ids = repeated_rollout(twin, prompt, 3, 5, suppressed)
    assert ids.shape == (3, 5) and len(set(map(tuple, ids.tolist()))) > 1
    advantages = torch.tensor([1.0, -0.5, 0.25])
    stay = torch.optim.SGD(twin.parameters(), lr=0.0)
    repeated_update(twin, stay, prompt, ids, advantages, suppressed)
    ((logprobs, *_),) = completion_logprobs(tiny.model, [prompt], [ids], [torch.ones_like(ids).bool()], 1.0, suppressed)
    ours = torch.autograd.grad(-(logprobs * advantages[:, None]).mean(), list(tiny.model.parameters()))
    norm = torch.cat([g.flatten() for g in ours]).norm()
    for g, p in zip(ours, twin.parameters(), strict=True):
        assert torch.allclose(p.grad * max(1.0, norm.item()), g, atol=1e-4 * norm.item())


def test_sizes_are_those_that_the_help_names():
    text = benchmark.Options.__dataclass_fields__["size"].metadata["help"]
    with torch.device("meta"):
        sizes = [benchmark.random_model(*size, benchmark.IDS) for size in benchmark.SIZES.values()]
    found = [sum(p.numel() for p in model.parameters()) / 1e6 for model in sizes]
    assert text == "the model: 1, 29, 3,755 or 8,292 million parameters"
    assert [f"{number:,.0f}" for number in found] == ["1", "29", "3,755", "8,292"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--num_videos 0", "--num_videos 0: must be above 0"),
        ("--frames 5", "--frames 5: must be even"),
        ("--num_video 3", "unknown flag '--num_video'"),
        ("--runs x", "invalid int value"),
        ("--json nowhere/figures.json", "--json 'nowhere/figures.json' cannot be written"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(flags, words, capsys):
    assert benchmark.main(flags.split()) == 2
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") == 1
