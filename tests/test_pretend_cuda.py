"""The CUDA path, rehearsed on a pretended GPU: runs and commands, host waits, and that the device finds mistakes."""

import json
import os
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

import grpo.benchmark.__main__ as benchmark
import train
from grpo.attention import matmul_float32
from grpo.config import parse_config
from grpo.evaluate import __main__ as evaluation
from grpo.ranks import start_processes
from grpo.run.preflight import with_trial_advantages
from grpo.run.start import start
from tests.conftest import FLAGS as EVALUATION_FLAGS
from tests.conftest import run_ranks
from tests.grpo.benchmark.test_benchmark import FLAGS as BENCHMARK_FLAGS
from tests.grpo.evaluate.test_evaluate import metrics
from tests.kill_and_resume import evaluating, read_evaluations
from tests.pretend_cuda import pretended
from tests.test_train import curves, flags

RUN = "--global_batch_size 4 --dataloader_num_workers 0 --save_steps 1".split()
AUTO = "--resume_from_checkpoint auto --memory_preflight false".split()
LORA = "--lora_enable --lora_rank 4 --lora_dropout 0.1".split()
FROZEN = "--freeze_vision_tower --freeze_merger".split()
KL = "--num_iterations 2 --beta 0.1".split()


def rehearse(arguments: list[str]) -> None:
    """Run the program on this rank's GPU."""
    with pretended(int(os.environ.get("LOCAL_RANK", 0))):
        assert train.main(arguments) == 0


def run_of(num_ranks: int, arguments: list[str], output) -> dict[str, list[float]]:
    """Run the program on some ranks and return its curves, of which every point must be sound."""
    if num_ranks == 1:
        rehearse(arguments)
    else:
        run_ranks(rehearse, num_ranks, arguments)
    found = curves(output)
    assert min(found["grad_norm"]) > 0 and not any(found["run/bad_steps"])
    # In bfloat16 sampling and update round on their own.
    assert max(found.get("sampling/sampling_logp_difference/mean", [0])) < 0.02
    return found


def test_two_ranks_with_a_kl_term_evaluate_and_resume(mixed, tmp_path):
    """All weights are trained; some samples are text only. One rank resumes in `test_gpu_rehearsed.py`."""
    output = tmp_path / "out"
    run = [*flags(mixed, output, *RUN, *KL), *evaluating(mixed.folder)]
    run_of(2, [*run, "--max_steps", "1"], output)
    found = run_of(2, [*run, "--max_steps", "2", *AUTO], output)
    assert found["kl"][0] < found["kl"][1] and len(found["loss"]) == 2
    assert [each["step"] for each in read_evaluations(output / "final")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("num_ranks", "more"),
    [(1, ["--supervised"]), (1, [*KL, *LORA, *FROZEN]), (2, [*LORA, *FROZEN, "--vision_lora"])],
    ids=["true answers", "adapters and a KL term", "adapters of both towers"],
)
def test_a_run_of_two_steps(mixed, tmp_path, num_ranks, more):
    output = tmp_path / "out"
    found = run_of(num_ranks, flags(mixed, output, *RUN, *more, "--max_steps", "2"), output)
    assert len(found["loss"]) == 2 and ("kl" in found) == ("--beta" in more)


def test_evaluate_answers_as_on_a_gpu(mixed, tmp_path):
    where = ["--model_id", mixed.folder / "model", "--data_path", mixed.folder / "data.json", *EVALUATION_FLAGS]
    where += ["--image_folder", mixed.folder / "videos", "--output_dir", tmp_path / "out"]
    with pretended():
        assert evaluation.main([*map(str, where), "--num_samples", "2", "--temperature", "1"]) == 0
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 7
    assert metrics(tmp_path / "out")


def test_the_benchmark_measures(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "COPIED_BYTES", 2**20)
    monkeypatch.setattr(benchmark, "MATRIX_SIDE", {"cuda": 64})
    with pretended():
        assert benchmark.main([*BENCHMARK_FLAGS.split(), "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["precision"] == "torch.bfloat16" and figures["baseline"]["update_seconds"] > 0


def waits_of_a_step(tiny, output, length: int) -> tuple[Counter, Counter]:
    """Where the host waits in a rollout and an update that follow others; completions of full length."""
    arguments = flags(tiny, output, *RUN, "--max_completion_length", length, "--memory_preflight", "false")
    with pretended() as gpu:
        run = start(parse_config(arguments), start_processes(), train.rollout_phase, train.update_phase)
        (*_, prompts), tokens, config = run.batches(), run.tokens.without_eos(), run.config
        model = run.models.sampling.sync(run.models.policy)
        for step in (1, 2):
            gpu.waits.clear()
            rollouts = train.rollout_phase(model, prompts, tokens, config, step)
            in_rollout = gpu.waits.copy()
            gpu.waits.clear()
            scored = with_trial_advantages(rollouts)
            train.update_phase(run.models, run.optimizer, scored, tokens.suppress_tokens, config)
        return in_rollout, gpu.waits.copy()


def test_the_host_waits_as_often_for_many_tokens_as_for_few(tiny, tmp_path):
    """But for one question in eight tokens: whether all completions have ended. Four prompts pass together."""
    short, long = (waits_of_a_step(tiny, tmp_path / str(length), length) for length in (8, 40))
    questions = long[0] - short[0]
    assert questions.total() == 40 // 8 - 1 and {what for what, _ in questions} == {"_local_scalar_dense"}
    assert short[0].total() <= 30
    assert short[1] == long[1] and short[1].total() <= 50


def refused(mistake, graph=None) -> str:
    """What the device says of a mistake, made in a capture if there is a graph."""
    with pytest.raises(RuntimeError) as error, torch.cuda.graph(graph) if graph else nullcontext():
        mistake(torch.ones(4, 4, device="cuda"))
    return str(error.value)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda x: torch.where(torch.ones(4, 4).bool(), x, 0.0), "tensors on cuda:0 and the CPU"),
        (lambda x: x.index_fill_(1, torch.tensor([1]), 0.0), "tensors on cuda:0 and the CPU"),
        (lambda x: torch.zeros(()).add_(x[0, 0]), "tensors on cuda:0 and the CPU"),
        (lambda x: x @ x.bfloat16(), "same dtype"),
        (lambda x: matmul_float32(x.bfloat16(), x), "a product of"),
        (lambda x: F.scaled_dot_product_attention(x, x, x.bfloat16()), "same dtype"),
    ],
)
def test_what_cuda_has_no_kernel_for_is_refused(mistake, message):
    with pretended():
        assert message in refused(mistake)


def test_a_collective_with_a_tensor_on_the_cpu_is_refused():
    with pretended():
        start_processes()
        assert "tensors on cuda:0" in refused(lambda x: dist.all_gather_into_tensor(x, torch.ones(4, 4)))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: x[x > 0], "a boolean index"),
        (lambda x: x.cpu(), "a copy to the CPU"),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0], device="cuda"), "a copy to the GPU"),
        (lambda x: x.repeat_interleave(torch.ones(4, device="cuda").long(), dim=0), "repeat_interleave"),
        (lambda x: F.dropout(x, 0.5), "random numbers"),
        (lambda x: torch.rand_like(x), "random numbers"),
    ],
)
def test_what_cannot_be_captured_is_refused_in_a_capture_only(mistake, message):
    with pretended():
        mistake(torch.ones(4, 4, device="cuda"))
        assert f"in a capture: {message}" in refused(mistake, torch.cuda.CUDAGraph())


def test_a_graph_reads_its_memory_and_not_what_took_its_place():
    with pretended():
        weight, x = torch.nn.Parameter(torch.full((2,), 3.0, device="cuda")), torch.ones(2, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            product = weight * x
        x.fill_(2.0)
        graph.replay()
        assert product.tolist() == [6, 6]
        weight.data = weight.data + 1  # new memory
        with pytest.raises(RuntimeError, match="freed"):
            graph.replay()


def reduce_on_one_rank() -> None:
    rank = int(os.environ["RANK"])
    with pretended(rank, timeout=2):
        start_processes()
        if rank == 0:
            dist.all_reduce(torch.ones(1, device="cuda"))
        dist.barrier()


def test_a_collective_on_one_rank_only_fails():
    with pytest.raises((ProcessRaisedException, ProcessExitedException)):
        run_ranks(reduce_on_one_rank, 2)


def test_there_is_no_gpu_afterwards():
    before = torch.cuda.is_available, torch.Generator, dist.all_reduce
    with pretended():
        assert torch.ones(1, device="cuda").device == torch.device("cuda", 0)
    assert before == (torch.cuda.is_available, torch.Generator, dist.all_reduce)
    assert not torch.cuda.is_available() and not torch.accelerator.is_available()
