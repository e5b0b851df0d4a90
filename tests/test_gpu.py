"""What only a GPU can show: graphs, bfloat16 kernels, and that a run trains there. Skipped where there is none."""

import copy

import pytest
import torch
import torch.nn.functional as F

import train
from data.media.patches import normalise
from grpo.attention import matmul_float32
from grpo.benchmark.__main__ import IDS, random_prompt
from grpo.benchmark.__main__ import Options as BenchmarkOptions
from grpo.decoding import DECODERS, Decoder
from grpo.logprobs import ChosenLogprobs, completion_logprobs
from grpo.model.layers import use_our_layers
from grpo.model.load import SpecialTokens
from grpo.model.random_model import SIZES, random_model
from grpo.rollout import SamplingParams, generate
from tests.grpo.test_packed import hf_twin
from tests.test_train import curves, flags

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")
SUPPRESSED = [1, 2, 3, 4]


def sample(model, prompts, C, generators=None):
    tokens = SpecialTokens(torch.tensor([-1], device=CUDA), torch.tensor(SUPPRESSED, device=CUDA))  # no end
    return generate(model, prompts, tokens, SamplingParams(4, C), generators)


@pytest.fixture(scope="module")
def model():
    with torch.device(CUDA):
        model = random_model(*SIZES["cpu"], IDS)
    return use_our_layers(model).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def prompts():
    return [random_prompt(BenchmarkOptions(num_videos=n)).to(CUDA) for n in (2, 5)]


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


def test_the_packed_pass_equals_hugging_faces_in_float32(tiny):
    """Deterministic float32 kernels against Hugging Face's own, gradients included."""
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
        assert torch.allclose(logprobs[g], expected.gather(1, ids[g][:, None])[:, 0], atol=1e-3)


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


@pytest.mark.parametrize("more", [[], ["--freeze_vision_tower"], ["--lora_enable", "--lora_rank", "4"]])
def test_a_run_on_a_gpu_samples_from_what_it_trains(tiny, tmp_path, more):
    run = ["--max_steps", "4", "--global_batch_size", "2", "--learning_rate", "1e-3", *more]
    assert train.main(flags(tiny, tmp_path / "out", *run)) == 0
    found = curves(tmp_path / "out")
    assert max(found["sampling/sampling_logp_difference/mean"]) < 0.1
    assert max(found["grad_norm"]) > 0
