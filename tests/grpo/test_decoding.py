"""Decoding has a pass of its own over the weights of Hugging Face's layers: the same states, in half the operators."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from grpo.decoding import DECODERS, Decoder, layer_weights, prefill
from grpo.model.load import SpecialTokens, load_model
from grpo.rollout import TOKENS_PER_QUESTION, SamplingParams, generate
from tests.grpo.test_packed import hf_twin, pixels_of
from tests.test_train import curves, flags, weights

VIEWS = {
    "view",
    "transpose",
    "expand",
    "unsqueeze",
    "split",
    "split_with_sizes",
    "select",
    "slice",
    "t",
    "_unsafe_view",
}
VIEWS |= {"permute", "detach", "unfold", "squeeze", "as_strided", "alias"}


class Kernels(TorchDispatchMode):
    """Counts the operators that would be kernels on a GPU, where views are none and `rms_norm` is one, not six."""

    number = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name().removeprefix("aten::").split(".")[0]
        self.number += -4 if name == "rsqrt" else name not in VIEWS
        return operator(*args, **(kwargs or {}))


def kernels_of_a_step(model, num_layers: int) -> int:
    decoder = Decoder(model, 2, 4, 20, 8)
    decoder.layers = decoder.layers[:num_layers]
    with torch.no_grad(), Kernels() as kernels:
        decoder.decode()
    return kernels.number


def test_a_layer_of_a_decoding_step_has_at_most_26_kernels(tiny):
    assert 20 < kernels_of_a_step(tiny.model, 2) - kernels_of_a_step(tiny.model, 1) <= 26


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("num_prompts, G", [(1, 1), (1, 16), (4, 1), (4, 16)])
def test_the_states_of_each_token_are_those_of_hugging_faces_layers(tiny, is_tied, num_prompts, G):
    model = copy.deepcopy(tiny.model)
    if not is_tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    prompts, C = tiny.prompts[:num_prompts], 5
    ids = torch.randint(5, 200, (num_prompts, G, C), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(model, num_prompts, G, max(len(prompt.prompt_ids) for prompt in prompts), C)
    twin, states = hf_twin(model), []
    with torch.no_grad():
        prefill(model, prompts, decoder.cache)
        starts = torch.cat([prompt.completion_positions(1)[0] for prompt in prompts]).repeat_interleave(G)
        for t in range(C):
            states.append(decoder.step(ids[:, :, t].flatten(), starts + t).clone())
        states = torch.stack(states, dim=1).view(num_prompts, G, C, -1)
        for prompt, own_ids, own_states in zip(prompts, ids, states, strict=True):
            for g in {0, G - 1}:
                hidden = twin.model(
                    input_ids=torch.cat([prompt.prompt_ids, own_ids[g]])[None],
                    position_ids=torch.cat([prompt.position_ids, prompt.completion_positions(C)], dim=1)[:, None],
                    use_cache=False,
                    **pixels_of(prompt),
                ).last_hidden_state[0, -C:]
                assert torch.allclose(own_states[g], hidden, atol=1e-4)
                logits = hidden @ model.lm_head.weight.T
                assert torch.allclose(own_states[g] @ model.lm_head.weight.T, logits, atol=1e-3)


def test_who_writes_a_layers_weights_writes_what_decoding_reads_and_models_are_saved_as_before(tiny, tmp_path):
    model = copy.deepcopy(tiny.model)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    layer = model.model.language_model.layers[0]
    joined = layer_weights(layer)
    with torch.no_grad():
        layer.self_attn.k_proj.weight.fill_(2.0)
        layer.self_attn.v_proj.bias.fill_(3.0)
        layer.mlp.up_proj.weight.fill_(4.0)
    query, key, value = joined.query_key_value.split([64, 32, 32])
    assert torch.equal(query, expected["model.language_model.layers.0.self_attn.q_proj.weight"])
    assert (key == 2).all() and (value != 2).all()
    assert (joined.query_key_value_bias[-32:] == 3).all() and (joined.query_key_value_bias[:-32] != 3).all()
    gate, up = joined.gate_up.chunk(2)
    assert (up == 4).all() and (gate != 4).all()
    again = layer_weights(layer)  # for another decoder: the same memory
    assert [a.data_ptr() for a in again] == [b.data_ptr() for b in joined]
    model.save_pretrained(tmp_path / "saved")
    for name, parameter in load_model(str(tmp_path / "saved")).named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])


def test_how_often_the_host_asks_for_the_end_changes_nothing(tiny, monkeypatch):
    tokens, groups = SpecialTokens(torch.arange(0, 300, 4), tiny.suppress_tokens), []
    for tokens_per_question in (1, 5):
        monkeypatch.setitem(TOKENS_PER_QUESTION, "cpu", tokens_per_question)
        draws = [torch.Generator().manual_seed(n) for n in range(4)]
        groups.append(generate(tiny.model, tiny.prompts, tokens, SamplingParams(3, 40), draws))
    lengths = [rollout.completion_ids.shape[1] for rollout in groups[0]]
    assert max(lengths) % 5 and max(lengths) < 40  # so that further tokens were sampled, and dropped
    for one, other in zip(*groups, strict=True):
        for name in ("completion_ids", "completion_mask", "logprobs", "is_stopped"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_a_run_samples_the_same_however_many_prompts_at_a_time(tiny, tmp_path):
    more = ["--global_batch_size", "4", "--max_steps", "3", "--learning_rate", "1e-3"]
    assert train.main(flags(tiny, tmp_path / "together", *more)) == 0
    assert DECODERS[8, 6].room[0] == 4
    one_by_one = ["--per_device_generation_batch_size", "1"]
    assert train.main(flags(tiny, tmp_path / "one", *more, *one_by_one)) == 0
    assert DECODERS[8, 6].room[0] == 1
    assert torch.allclose(weights(tmp_path / "together" / "final"), weights(tmp_path / "one" / "final"), atol=1e-5)
    found, expected = curves(tmp_path / "one"), curves(tmp_path / "together")
    assert found["completions/mean_length"] == expected["completions/mean_length"]
    assert found["reward"] == expected["reward"]
