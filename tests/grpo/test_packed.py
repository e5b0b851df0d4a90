"""The packed pass equals G separate rows through Hugging Face's own model, vision tower and gradients included."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import grpo.attention
import grpo.logprobs
from data.media.patches import normalise
from grpo.attention import varlen_attention
from grpo.decoding import SharedPrefixKVCache
from grpo.logprobs import completion_logprobs, media_features, sampling_logprobs
from grpo.model.layers import use_hugging_faces_layers
from grpo.rollout import SamplingParams, generate
from tests.conftest import make_tiny

T = 0.7


def completions_for(prompts, G, C, vocabulary, suppress_tokens):
    """Random completions of unequal lengths; everything behind a completion's end is noise that must not matter."""
    generator = torch.Generator().manual_seed(3)
    allowed = [i for i in range(vocabulary) if i not in suppress_tokens.tolist()]
    ids, masks = [], []
    for n in range(len(prompts)):
        draw = torch.randint(len(allowed), (G, C + n), generator=generator)
        lengths = torch.randint(1, C + n + 1, (G,), generator=generator)
        lengths[0] = C + n
        ids.append(torch.tensor(allowed)[draw])
        masks.append(torch.arange(C + n) < lengths[:, None])
    return ids, masks


def pixels_of(prompt) -> dict:
    """The inputs of Hugging Face's model, which takes videos and images apart."""
    inputs = {}
    pieces = normalise(prompt.patches).split(prompt.grid_thw.prod(dim=1).tolist())
    for kind, pixels, grid in (
        ("video", "pixel_values_videos", "video_grid_thw"),
        ("image", "pixel_values", "image_grid_thw"),
    ):
        chosen = [n for n, media in enumerate(prompt.sample.media) if media.kind == kind]
        if chosen:
            inputs |= {pixels: torch.cat([pieces[n] for n in chosen]), grid: prompt.grid_thw[chosen]}
    return inputs


def separate_rows(model, prompt, ids, mask, suppress_tokens):
    """Log-probabilities from G rows `[prompt | completion]`, each with its own copy of the videos: plain HF."""
    rows = []
    for completion, row_mask in zip(ids, mask, strict=True):
        completion = completion[: int(row_mask.sum())]
        P = len(prompt.prompt_ids)
        # Generation goes on behind the largest position of the prompt.
        own = prompt.position_ids.max() + 1 + torch.arange(len(completion))
        out = model(
            input_ids=torch.cat([prompt.prompt_ids, completion])[None],
            position_ids=torch.cat([prompt.position_ids, own.expand(3, -1)], dim=1)[:, None],
            use_cache=False,
            **pixels_of(prompt),
        ).logits[0, P - 1 : -1]
        logprobs = torch.log_softmax((out / T).index_fill(1, suppress_tokens, -torch.inf), dim=1)
        rows.append(logprobs.gather(1, completion[:, None])[:, 0])
    return rows


def hf_twin(model):
    """The same weights with Hugging Face's own layers."""
    twin = copy.deepcopy(model)
    use_hugging_faces_layers(twin)
    return twin


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("together", [False, True], ids=["one prompt a row", "all prompts in one row"])
@pytest.mark.parametrize("data", ["tiny", "mixed"])
def test_packed_logprobs_and_gradients_equal_separate_rows(request, data, together):
    tiny = request.getfixturevalue(data)
    ids, masks = completions_for(tiny.prompts, 3, 5, len(tiny.tokenizer), tiny.suppress_tokens)
    model, twin = copy.deepcopy(tiny.model), hf_twin(tiny.model)
    batches = [range(len(ids))] if together else [[n] for n in range(len(ids))]
    packed = []
    for batch in batches:
        packed += completion_logprobs(
            model,
            [tiny.prompts[n] for n in batch],
            [ids[n] for n in batch],
            [masks[n] for n in batch],
            T,
            tiny.suppress_tokens,
        )
    weights = [torch.randn(mask.shape, generator=torch.Generator().manual_seed(n)) for n, mask in enumerate(masks)]
    sum((logprobs * w).sum() for (logprobs, *_), w in zip(packed, weights, strict=True)).backward()
    loss = 0.0
    for prompt, i, mask, w, (logprobs, *_) in zip(tiny.prompts, ids, masks, weights, packed, strict=True):
        rows = separate_rows(twin, prompt, i, mask, tiny.suppress_tokens)
        for g, row in enumerate(rows):
            assert (logprobs[g, : len(row)] - row).abs().max() < 1e-5
            assert (logprobs[g, len(row) :] == 0).all()
            loss = loss + (row * w[g, : len(row)]).sum()
    loss.backward()
    names = [name for name, _ in model.named_parameters()]
    assert any("visual" in name for name in names)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert relative(ours.grad, theirs.grad) < 1e-4, name


def test_packed_logprobs_equal_separate_rows_in_float64(tiny):
    ids, masks = completions_for(tiny.prompts[1:2], 3, 5, len(tiny.tokenizer), tiny.suppress_tokens)
    model = copy.deepcopy(tiny.model).double()
    # The log-probabilities are float32 by design, so compare the hidden states' effect in float32 but tightly.
    ((logprobs, *_),) = completion_logprobs(model, tiny.prompts[1:2], ids, masks, T, tiny.suppress_tokens)
    rows = separate_rows(hf_twin(model), tiny.prompts[1], ids[0], masks[0], tiny.suppress_tokens)
    for g, row in enumerate(rows):
        assert (logprobs[g, : len(row)] - row).abs().max() < 2e-6


def test_changing_one_completion_leaves_the_others_bit_identical(tiny):
    ids, masks = completions_for(tiny.prompts[1:3], 3, 5, len(tiny.tokenizer), tiny.suppress_tokens)
    before = completion_logprobs(tiny.model, tiny.prompts[1:3], ids, masks, T, tiny.suppress_tokens)
    changed = [ids[0].clone(), ids[1]]
    changed[0][1] = (changed[0][1] + 1) % 200
    after = completion_logprobs(tiny.model, tiny.prompts[1:3], changed, masks, T, tiny.suppress_tokens)
    assert torch.equal(before[0][0][[0, 2]], after[0][0][[0, 2]])
    assert torch.equal(before[1][0], after[1][0])
    assert not torch.equal(before[0][0][1], after[0][0][1])


def test_what_stands_behind_a_completions_end_changes_nothing(tiny):
    ids, masks = completions_for(tiny.prompts[:1], 3, 5, len(tiny.tokenizer), tiny.suppress_tokens)
    before = completion_logprobs(tiny.model, tiny.prompts[:1], ids, masks, T, tiny.suppress_tokens)
    noise = [torch.where(masks[0], ids[0], 7)]
    after = completion_logprobs(tiny.model, tiny.prompts[:1], noise, masks, T, tiny.suppress_tokens)
    assert torch.equal(before[0][0], after[0][0])


def test_neighbours_of_equal_lengths_are_computed_together_and_equal_each_alone(tiny, monkeypatch):
    other = replace(tiny.prompts[0], patches=255 - tiny.prompts[0].patches)
    prompts = [tiny.prompts[0], other, tiny.prompts[1], tiny.prompts[0]]
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 200, (3, 5), generator=generator) for _ in prompts]
    masks = [torch.arange(5) < torch.tensor([[5], [1 + n], [3]]) for n in range(4)]
    calls, attend = [], grpo.attention.group_attention
    monkeypatch.setattr(grpo.attention, "group_attention", lambda *x: calls.append(len(x[0])) or attend(*x))
    gradients, results = [], []
    for batches in ([[0, 1, 2, 3]], [[0], [1], [2], [3]]):
        calls.clear()
        model, found = copy.deepcopy(tiny.model), []
        for batch in batches:
            given = ([one[n] for n in batch] for one in (prompts, ids, masks))
            found += completion_logprobs(model, *given, T, tiny.suppress_tokens)
        sum((n + 1) * logprobs.sum() for n, (logprobs, *_) in enumerate(found)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        results.append(torch.cat([logprobs.flatten() for logprobs, *_ in found]))
        assert calls == ([2, 1, 1] if len(batches) == 1 else [1, 1, 1, 1]) * 2  # in each of two layers
    assert torch.allclose(*results, atol=1e-5) and relative(*gradients) < 1e-5


def test_the_videos_and_their_order_reach_the_logprobs(tiny):
    prompt = tiny.prompts[1]  # three videos, of 4, 8 and 12 frames but 4 each are read: equal grids
    ids, masks = completions_for([prompt], 2, 4, len(tiny.tokenizer), tiny.suppress_tokens)
    swapped = copy.copy(prompt)
    first, second, third = prompt.patches.chunk(3)
    swapped.patches = torch.cat([second, first, third])
    ((one, *_),) = completion_logprobs(tiny.model, [prompt], ids, masks, T, tiny.suppress_tokens)
    ((other, *_),) = completion_logprobs(tiny.model, [swapped], ids, masks, T, tiny.suppress_tokens)
    assert (one - other).abs().max() > 1e-3


def test_logits_in_chunks_equal_logits_at_once(tiny, monkeypatch):
    ids, masks = completions_for(tiny.prompts[:2], 3, 5, len(tiny.tokenizer), tiny.suppress_tokens)
    gradients, calls, compute = [], [], grpo.logprobs.sampling_logprobs
    monkeypatch.setattr("grpo.logprobs.sampling_logprobs", lambda *x: calls.append(len(x[0])) or compute(*x))
    for tokens_per_chunk in (1024, 4):
        calls.clear()
        monkeypatch.setattr("grpo.logprobs.TOKENS_PER_CHUNK", tokens_per_chunk)
        model = copy.deepcopy(tiny.model)
        results = completion_logprobs(model, tiny.prompts[:2], ids, masks, T, tiny.suppress_tokens)
        num_chunks = len(calls)
        sum(chosen.sum() for chosen, *_ in results).backward()
        assert max(calls) <= tokens_per_chunk and len(calls) == 2 * num_chunks - 1  # all but the last are recomputed
        gradients.append(model.lm_head.weight.grad)
    assert relative(gradients[0], gradients[1]) < 1e-6


def test_log_probabilities_sum_to_one_over_the_tokens_that_are_not_suppressed():
    hidden, lm_head = torch.randn(3, 8), torch.randn(11, 8)
    logprobs = sampling_logprobs(hidden, lm_head, 0.5, torch.tensor([2, 7]))
    assert torch.isinf(logprobs[:, [2, 7]]).all()
    assert torch.allclose(logprobs.exp().sum(dim=1), torch.ones(3))
    by_hand = torch.log_softmax((hidden @ lm_head.T / 0.5)[:, [0, 1, 3]], dim=1)
    assert torch.allclose((logprobs[:, [0]] - logprobs[:, [3]]), by_hand[:, [0]] - by_hand[:, [2]], atol=1e-5)


def test_logprobs_and_entropy_of_bfloat16_hidden_states_agree_with_float64():
    torch.manual_seed(0)
    hidden, lm_head = torch.randn(8, 256).bfloat16(), (0.3 * torch.randn(5000, 256)).bfloat16()
    logprobs = sampling_logprobs(hidden, lm_head, 0.7, torch.tensor([3]))
    logits = (hidden.double() @ lm_head.double().T / 0.7).index_fill(1, torch.tensor([3]), -torch.inf)
    exact = torch.log_softmax(logits, dim=1)
    kept = torch.arange(5000) != 3
    assert logits[:, kept].abs().max() > 20  # in bfloat16 such logits are off by 0.06
    assert (logprobs - exact)[:, kept].abs().max() < 1e-3
    entropy, exact_entropy = (-(x.exp() * x)[:, kept].sum(dim=1) for x in (logprobs, exact))
    assert (entropy - exact_entropy).abs().max() < 1e-3


def test_entropy_is_that_of_the_sampling_distribution(tiny):
    ids, masks = completions_for(tiny.prompts[:1], 2, 3, len(tiny.tokenizer), tiny.suppress_tokens)
    ((_, entropy, _),) = completion_logprobs(tiny.model, tiny.prompts[:1], ids, masks, 1e6, tiny.suppress_tokens)
    allowed = len(tiny.tokenizer) - len(tiny.suppress_tokens)  # so hot that all allowed tokens are equally probable
    assert torch.allclose(entropy[masks[0]], torch.tensor(float(allowed)).log(), atol=1e-4)
    assert (entropy[~masks[0]] == 0).all()


def test_decoding_keeps_its_precision_with_bfloat16_and_large_keys():
    torch.manual_seed(0)
    P, G, D = 200, 3, 64
    key, value = torch.randn(2, 1, 1, P, D).bfloat16().unbind(0)
    key = key + 12  # Qwen2.5's keys have large biases
    text = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, hidden_size=2 * D, num_attention_heads=2)
    model = SimpleNamespace(config=SimpleNamespace(text_config=text), dtype=torch.bfloat16, device="cpu")
    cache = SharedPrefixKVCache(model, 1, G, P + 7, 4)
    cache.begin([P])
    cache.prefill(torch.randn(1, 2, P, D).bfloat16(), key, value, layer=0)
    query, own_key, own_value = (
        torch.randn(G, heads, D).bfloat16() + shift for heads, shift in ((2, 1), (1, 12), (1, 0))
    )
    cache.unmask_next()
    out = cache.decode(query, own_key, own_value, layer=0).double()
    keys = torch.cat([key.expand(G, -1, -1, -1), own_key[:, :, None]], dim=2).double()
    values = torch.cat([value.expand(G, -1, -1, -1), own_value[:, :, None]], dim=2).double()
    exact = torch.softmax(query[:, :, None].double() @ keys.transpose(2, 3) / D**0.5, dim=3) @ values
    assert relative(out, exact.flatten(1)) < 0.01


@pytest.mark.parametrize("lengths", [[4, 16, 4, 1, 16], [6, 6, 6], [9]])
def test_segments_attention_equals_attention_within_each_segment(lengths):
    query, key, value = torch.randn(3, 1, 2, sum(lengths), 8).unbind(0)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    out, _ = varlen_attention(None, query, key, value, None, cu_seq_lens_q=starts)
    pieces = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    expected = [torch.softmax(q @ k.transpose(2, 3) / 8**0.5, dim=3) @ v for q, k, v in pieces]
    assert torch.allclose(out, torch.cat(expected, dim=2).transpose(1, 2), atol=1e-6)


def test_vision_features_equal_hf_when_windows_differ_in_size(tmp_path):
    tiny = make_tiny(tmp_path / "big", num_videos=(2,), size=56)
    pixels, grid = torch.randn(2 * 10 * 10 + 8 * 12, 1176), torch.tensor([[2, 10, 10], [1, 8, 12]])
    with torch.no_grad():  # 140 x 140 pixels: windows of 16, 4, 4 and 1 tokens
        ours = tiny.model.model.get_video_features(pixels, grid).pooler_output
        theirs = hf_twin(tiny.model).model.get_video_features(pixels, grid).pooler_output
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_the_last_layer_works_for_the_tokens_alone_that_predict(tiny):
    """Of a prompt it needs the last token's state; the layer before it needs all, for the keys and values."""
    prompts, G, C = tiny.prompts[:2], 3, 5
    ids, mask = completions_for(prompts, G, C, len(tiny.tokenizer), tiny.suppress_tokens)
    seen = []
    layers = tiny.model.model.language_model.layers[-2:]
    hooks = [layer.mlp.register_forward_hook(lambda _, inputs, out: seen.append(out.shape[1])) for layer in layers]
    completion_logprobs(tiny.model, prompts, ids, mask, 1.0, tiny.suppress_tokens)
    generate(tiny.model, prompts, tiny.tokens, SamplingParams(G, 1))
    for hook in hooks:
        hook.remove()
    in_prompts = sum(len(prompt.prompt_ids) for prompt in prompts)
    in_completions = sum(row.numel() for row in ids)
    assert seen == [in_prompts + in_completions, 2 + in_completions, in_prompts, 2]


@pytest.mark.parametrize("patches_per_pass, num_passes", [(1, 4), (450, 2)])
def test_videos_encoded_some_at_a_time_equal_videos_encoded_at_once(tiny, monkeypatch, patches_per_pass, num_passes):
    prompts = [
        replace(prompt, patches=torch.randint(256, (S, 1176), dtype=torch.uint8), grid_thw=torch.tensor(grids))
        for prompt, S, grids in zip(
            tiny.prompts[:2], (200 + 96, 96 + 64), ([[2, 10, 10], [1, 8, 12]], [[1, 8, 12], [4, 4, 4]]), strict=True
        )
    ]
    with torch.no_grad():
        at_once = media_features(tiny.model, prompts)
        monkeypatch.setitem(grpo.logprobs.PATCHES_PER_PASS, "cpu", patches_per_pass)
        encode, passes = tiny.model.model.get_video_features, []
        monkeypatch.setattr(tiny.model.model, "get_video_features", lambda *x: passes.append(x) or encode(*x))
        in_passes = media_features(tiny.model, prompts)
    assert [len(states) for states in in_passes] == [50, 24, 24, 16] and len(passes) == num_passes
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(in_passes, at_once, strict=True))
