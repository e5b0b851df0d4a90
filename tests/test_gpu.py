"""What only a GPU can show: graphs, bfloat16 kernels, NCCL, that a run trains there, and what a step of it costs.

    pytest -n 0 -s tests/test_gpu.py

takes some minutes on one H100 or H200, and prints the benchmark's tables. Skipped where there is no GPU; tests marked
`on_hardware` need a real one, the others also run on a pretended one.
"""

import copy
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import train
from data.media.patches import normalise
from grpo.attention import causal, matmul_float32, varlen_attention
from grpo.benchmark.__main__ import IDS, random_prompt
from grpo.benchmark.__main__ import Options as BenchmarkOptions
from grpo.decoding import DECODERS, Decoder
from grpo.evaluate import __main__ as evaluation
from grpo.logprobs import ChosenLogprobs, completion_logprobs
from grpo.model.layers import use_our_layers
from grpo.model.load import SpecialTokens
from grpo.model.random_model import SIZES, random_model
from grpo.ranks import start_processes
from grpo.rollout import SamplingParams, generate
from tests.conftest import ROOT
from tests.grpo.evaluate.test_evaluate import metrics
from tests.grpo.run.test_resume import stopped_after
from tests.grpo.test_packed import hf_twin, relative
from tests.grpo.test_rollout import hf_greedy
from tests.kill_and_resume import evaluating, read_evaluations
from tests.test_train import curves, flags, run_main, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
on_hardware = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a real GPU")
CUDA = torch.device("cuda", 0)
SUPPRESSED = [1, 2, 3, 4]
NUM_KEYS, HEAD_SIZES = 300, [80, 128]  # more keys than a block of the kernel; heads of the tower and of Qwen's layers
NUM_QUERIES = {"square": NUM_KEYS, "lower right": 77}
WINDOWS = [64, 16, 64, 4, 16, 64]
# Rounding to bfloat16 changes a number by at most 2^-8 of it. Probabilities, their gradients, the output and the
# gradients are each rounded once; a wrong mask or head would be off by about 1.
BFLOAT16_TOLERANCE = 4 * 2**-8
RUN = "--max_steps 3 --global_batch_size 2 --learning_rate 1e-3".split()
LORA = "--lora_enable --lora_rank 4".split()


def sample(model, prompts, C, generators=None):
    tokens = SpecialTokens(torch.tensor([-1], device=CUDA), torch.tensor(SUPPRESSED, device=CUDA))  # no end
    return generate(model, prompts, tokens, SamplingParams(4, C), generators)


def in_bfloat16(model):
    """Round the weights, but not the rotary frequencies, as for sampling."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


@pytest.fixture(scope="module")
def model():
    with torch.device(CUDA):
        model = random_model(*SIZES["cpu"], IDS)
    return in_bfloat16(use_our_layers(model)).eval()


@pytest.fixture(scope="module")
def prompts():
    return [random_prompt(BenchmarkOptions(num_videos=n)).to(CUDA) for n in (2, 5)]


@pytest.fixture
def started():
    """What a run does first of all, which also chooses the kernels of attention."""
    torch.backends.cuda.enable_cudnn_sdp(True)  # as torch itself has it
    yield start_processes()
    dist.destroy_process_group()


@pytest.fixture
def without_tf32(monkeypatch):
    """Hugging Face embeds patches by a convolution, in which cuDNN rounds float32 to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def random_heads(head_size: int, num_queries: int, num_heads: int, num_key_heads: int) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output, in bfloat16 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    query, key = (1, num_heads, num_queries, head_size), (1, num_key_heads, NUM_KEYS, head_size)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in (query, key, key, query)]


def exact_attention(query, key, value) -> torch.Tensor:
    """Causal attention, in which the queries are those of the last tokens, spelled out."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    is_later = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(key.shape[2] - query.shape[2] + 1)
    scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    return scores.masked_fill(is_later, -torch.inf).softmax(dim=3) @ value


def assert_equal_gradients(ours, exact, heads: list[torch.Tensor]) -> None:
    """Compare `ours`, in bfloat16 on the GPU, with `exact`, in float32 on the CPU: the outputs and all gradients."""
    *inputs, gradient = heads
    found, expected = [], []
    for attend, results, place in ((ours, found, (CUDA, torch.bfloat16)), (exact, expected, ("cpu", torch.float32))):
        own = [x.detach().to(*place).requires_grad_() for x in inputs]
        out = attend(*own)
        out.backward(gradient.to(*place).view_as(out))
        results += [out.flatten(), *(x.grad for x in own)]
    for a, b in zip(found, expected, strict=True):
        assert relative(a.detach().float().cpu(), b.detach()) < BFLOAT16_TOLERANCE


def test_a_run_computes_attention_without_cudnn(started):
    assert started.type == "cuda" and not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("num_queries", NUM_QUERIES.values(), ids=NUM_QUERIES)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_gradients_of_bfloat16_attention_are_those_of_float32(started, head_size, num_queries):
    assert_equal_gradients(causal, exact_attention, random_heads(head_size, num_queries, 8, 2))


def attend_in_windows(query, key, value) -> torch.Tensor:
    starts = torch.tensor([0, *WINDOWS], device=query.device).cumsum(0).int()
    query, key, value = (x[:, :, : sum(WINDOWS)] for x in (query, key, value))
    return varlen_attention(None, query, key, value, None, cu_seq_lens_q=starts)[0]


def attend_in_each_window(query, key, value) -> torch.Tensor:
    pieces = zip(*(x[:, :, : sum(WINDOWS)].split(WINDOWS, dim=2) for x in (query, key, value)), strict=True)
    outs = [torch.softmax(q @ k.transpose(2, 3) / q.shape[3] ** 0.5, dim=3) @ v for q, k, v in pieces]
    return torch.cat(outs, dim=2).transpose(1, 2)


def test_gradients_of_windows_of_unequal_length_are_those_of_float32(started):
    heads = random_heads(80, NUM_KEYS, 4, 4)
    heads[-1] = heads[-1][:, :, : sum(WINDOWS)].contiguous()
    assert_equal_gradients(attend_in_windows, attend_in_each_window, heads)


def operators_of(out: torch.Tensor) -> set[str]:
    """Name the operators that computed a tensor from those that need gradients."""
    names, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [before for before, _ in node.next_functions if before is not None]
    return names


@on_hardware
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_attention_is_computed_by_the_flash_kernel(started, head_size):
    attentions = [(causal, num_queries, 2) for num_queries in NUM_QUERIES.values()] + [(attend_in_windows, NUM_KEYS, 8)]
    for attend, num_queries, num_key_heads in attentions:
        *inputs, _ = random_heads(head_size, num_queries, 8, num_key_heads)
        names = operators_of(attend(*(x.to(CUDA).requires_grad_() for x in inputs)))
        found = {name for name in names if "Attention" in name or "Softmax" in name}
        assert found == {"ScaledDotProductFlashAttentionBackward0"}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)], ids=str)
def test_windows_of_unequal_length_in_the_tower_equal_hugging_faces(tiny, dtype, tolerance):
    """140 x 140 pixels: windows of 16, 4 and 1 tokens. Hugging Face's own layers, in float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2 * 10 * 10 + 8 * 12, 1176, generator=generator)
    grid, results = torch.tensor([[2, 10, 10], [1, 8, 12]]), []
    ours = copy.deepcopy(tiny.model).to(CUDA)
    for model in (in_bfloat16(ours) if dtype == torch.bfloat16 else ours, hf_twin(tiny.model)):
        found = model.model.get_video_features(pixels.to(model.device), grid.to(model.device)).pooler_output
        features = torch.cat(found)
        features.float().square().sum().backward()
        gradients = [parameter.grad.flatten() for parameter in model.model.visual.parameters()]
        results.append([x.detach().float().cpu() for x in (features, torch.cat(gradients))])
    for found, expected in zip(*results, strict=True):
        assert relative(found, expected) < tolerance


def test_graph_and_eager_decoding_give_the_same_tokens(model, prompts, monkeypatch):
    graph = sample(model, prompts, 24)
    DECODERS.clear()
    monkeypatch.setattr(Decoder, "capture", lambda self: None)
    eager = sample(model, prompts, 24)
    DECODERS.clear()
    for a, b in zip(graph, eager, strict=True):
        assert torch.equal(a.completion_ids, b.completion_ids)
        assert torch.allclose(a.logprobs, b.logprobs, atol=1e-3)


def test_a_graph_reads_the_weights_that_are_there_now(model, prompts):
    before = sample(model, prompts, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = sample(model, prompts, 8)
    DECODERS.clear()
    fresh = sample(model, prompts, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(1.5)
    assert not torch.equal(before[0].logprobs, after[0].logprobs)
    assert all(torch.equal(a.completion_ids, b.completion_ids) for a, b in zip(after, fresh, strict=True))


def test_sampled_and_trained_log_probabilities_agree_in_bfloat16(model, prompts):
    generators = [torch.Generator(CUDA).manual_seed(n) for n in range(2)]
    rollouts = sample(model, prompts, 24, generators)
    ids, masks = [r.completion_ids for r in rollouts], [r.completion_mask for r in rollouts]
    with torch.no_grad():
        trained = completion_logprobs(model, prompts, ids, masks, 1.0, torch.tensor(SUPPRESSED, device=CUDA))
    for rollout, (logprobs, *_) in zip(rollouts, trained, strict=True):
        assert (rollout.logprobs - logprobs).abs().mean() < 0.02


def test_the_packed_pass_equals_hugging_faces_in_float32(tiny, without_tf32):
    """Float32 kernels against Hugging Face's own layers, gradients included."""
    model = copy.deepcopy(tiny.model).to(CUDA)
    twin, prompt = hf_twin(model), tiny.prompts[1].to(CUDA)
    ids = torch.randint(5, 200, (3, 6), device=CUDA)
    suppressed = tiny.suppress_tokens.to(CUDA)
    ((logprobs, *_),) = completion_logprobs(model, [prompt], [ids], [torch.ones_like(ids).bool()], 1.0, suppressed)
    P = len(prompt.prompt_ids)
    for g in range(3):
        logits = twin(
            input_ids=torch.cat([prompt.prompt_ids, ids[g]])[None],
            position_ids=torch.cat([prompt.position_ids, prompt.completion_positions(6)], dim=1)[:, None],
            pixel_values_videos=normalise(prompt.patches),
            video_grid_thw=prompt.grid_thw,
            use_cache=False,
        ).logits[0, P - 1 : -1]
        expected = torch.log_softmax(logits.index_fill(1, suppressed, -torch.inf), dim=1)
        expected = expected.gather(1, ids[g][:, None])[:, 0]
        assert torch.allclose(logprobs[g], expected, atol=1e-3)
        expected.sum().backward()
    logprobs.sum().backward()
    gradients = [torch.cat([p.grad.flatten() for p in each.parameters()]) for each in (model, twin)]
    assert relative(*gradients) < 1e-3


def test_greedy_tokens_in_float32_are_those_of_hugging_faces_generate(tiny, without_tf32):
    model = copy.deepcopy(tiny.model).to(CUDA)
    twin, prompts = hf_twin(model), [prompt.to(CUDA) for prompt in tiny.prompts[:2]]
    for prompt, rollout in zip(prompts, sample(model, prompts, 8), strict=True):
        expected = hf_greedy(twin, prompt, 8, SUPPRESSED, min_new_tokens=8)
        assert rollout.completion_ids[0].tolist() == expected


def test_greedy_tokens_in_bfloat16_are_hugging_faces_most_probable_ones_but_for_rounding(tiny):
    """Given the tokens before; where two are as good as equal, either may be chosen."""
    model = in_bfloat16(copy.deepcopy(tiny.model).to(CUDA))
    twin, prompts = hf_twin(model), [prompt.to(CUDA) for prompt in tiny.prompts[:2]]
    for prompt, rollout in zip(prompts, sample(model, prompts, 8), strict=True):
        ids = rollout.completion_ids[0]
        with torch.no_grad():
            logits = twin(
                input_ids=torch.cat([prompt.prompt_ids, ids])[None],
                position_ids=torch.cat([prompt.position_ids, prompt.completion_positions(8)], dim=1)[:, None],
                pixel_values_videos=normalise(prompt.patches),
                video_grid_thw=prompt.grid_thw,
                use_cache=False,
            ).logits[0, len(prompt.prompt_ids) - 1 : -1]
        logits = logits.float().index_fill(1, torch.tensor(SUPPRESSED, device=CUDA), -torch.inf)
        assert (logits.amax(dim=1) - logits.gather(1, ids[:, None])[:, 0]).max() < 0.1


def test_products_of_bfloat16_come_in_float32():
    a, b = torch.randn(2, 3, 64, 128, device=CUDA).bfloat16()
    exact = a.double() @ b.double().transpose(1, 2)
    assert torch.allclose(matmul_float32(a, b.transpose(1, 2)).double(), exact, atol=1e-3)


@pytest.mark.parametrize("keep", [True, False])
def test_the_gradient_of_bfloat16_log_probabilities_is_that_of_float32(keep):
    hidden, lm_head = (torch.randn(n, 128, device=CUDA).bfloat16().requires_grad_() for n in (64, 500))
    ids, suppressed = torch.randint(5, 500, (64,), device=CUDA), torch.tensor(SUPPRESSED, device=CUDA)
    ChosenLogprobs.apply(hidden, ids, lm_head, 0.7, suppressed, keep)[0].square().sum().backward()
    other = [x.detach().float().requires_grad_() for x in (hidden, lm_head)]
    logits = F.linear(*other).div(0.7).index_fill(1, suppressed, -torch.inf)
    logits.log_softmax(dim=1).gather(1, ids[:, None]).square().sum().backward()
    for x, y in zip((hidden, lm_head), other, strict=True):
        assert (x.grad.float() - y.grad).norm() / y.grad.norm() < 0.02


@pytest.mark.parametrize("more", [[], ["--freeze_vision_tower"], LORA], ids=" ".join)
def test_a_run_on_a_gpu_samples_from_what_it_trains(tiny, tmp_path, more):
    assert train.main(flags(tiny, tmp_path / "out", *RUN, *more)) == 0
    found = curves(tmp_path / "out")
    assert max(found["sampling/sampling_logp_difference/mean"]) < 0.1
    assert max(found["grad_norm"]) > 0


@pytest.mark.parametrize("more", [[], [*LORA, "--freeze_vision_tower", "--freeze_merger"]], ids=" ".join)
def test_the_kl_term_compares_with_the_initial_policy(tiny, tmp_path, more):
    """A sharded copy of its own or, where only adapters are trained, the policy without them."""
    assert train.main(flags(tiny, tmp_path / "out", *RUN, "--beta", "0.1", *more)) == 0
    kl = curves(tmp_path / "out")["kl"]
    assert kl[0] < 1e-3 < kl[-1]  # half the square of a difference, which rounding makes 0.02 at most


def test_a_run_that_was_killed_ends_as_the_uninterrupted_one(tiny, tmp_path):
    """The step after the checkpoint samples the same; kernels that add up in any order may change its last bits."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = [*RUN, "--beta", "0.1", "--save_steps", "1", *evaluating(tiny.folder)]
    assert train.main(flags(tiny, whole, *more)) == 0
    arguments = flags(tiny, stopped_after(2, whole, killed), *more, "--resume_from_checkpoint", "auto")
    assert train.main(arguments) == 0
    assert (killed / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()
    assert [each["step"] for each in read_evaluations(killed / "final")] == [0, 2, 3]
    assert curves(killed)["grad_norm"] == pytest.approx(curves(whole)["grad_norm"], rel=0.01)
    # Saved in bfloat16, in which the last bit of a weight is more than a step: those that it tips over count in full.
    folders = whole / "checkpoint-2", whole / "final", killed / "final"
    before, after, found = (weights(folder).float() for folder in folders)
    assert (found - after).norm() < 0.3 * (after - before).norm()


def test_an_evaluation_gives_the_figures_of_the_one_in_training(tiny, tmp_path):
    held = ["--eval_data_path", tiny.folder / "data.json"]
    assert train.main(flags(tiny, tmp_path / "out", *RUN, *held)) == 0
    assert evaluation.main(["--run", str(tmp_path / "out")]) == 0
    (in_training,) = read_evaluations(tmp_path / "out" / "final")
    figures = {name.removeprefix("eval/"): value for name, value in in_training.items() if name != "step"}
    found = metrics(tmp_path / "out" / "eval")
    assert {name: found[name]["value"] for name in figures} == pytest.approx(figures, nan_ok=True)


@on_hardware
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_nccl_ranks_do_what_one_does(tiny, tmp_path):
    """True answers leave nothing to chance; after that, sampled ones."""
    supervised = [*RUN, "--supervised"]
    assert train.main(flags(tiny, tmp_path / "one", *supervised)) == 0
    run_main(2, flags(tiny, tmp_path / "two", *supervised), tmp_path)
    one, two = curves(tmp_path / "one"), curves(tmp_path / "two")
    assert two["loss"] == pytest.approx(one["loss"], rel=0.01)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.02)
    run_main(2, flags(tiny, tmp_path / "sampled", *RUN), tmp_path)
    found = curves(tmp_path / "sampled")
    assert max(found["sampling/sampling_logp_difference/mean"]) < 0.1 and max(found["grad_norm"]) > 0


@on_hardware
@pytest.mark.parametrize("num_videos", [5, 30])
def test_the_benchmark_of_the_3b_model_prints_a_table(num_videos, capsys):
    DECODERS.clear()
    torch.cuda.empty_cache()
    command = ["-m", "grpo.benchmark", "--size", "3b", "--num_videos", str(num_videos)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\n\npython {' '.join(command)}, on {torch.cuda.get_device_name()} with torch {torch.__version__}:\n")
        print(done.stdout)
