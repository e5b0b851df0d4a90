"""Sampling: against Hugging Face's own generate, against the trainer's log-probabilities, and where completions end."""

import copy
import weakref

import pytest
import torch
import torch.distributed as dist

from data.media.patches import normalise
from grpo.config import Config
from grpo.decoding import DECODERS, Decoder, prefill
from grpo.logprobs import completion_logprobs, encode_media
from grpo.loss import clipped_loss, clipped_tokens, importance_ratios, weighted_sum
from grpo.model.load import SpecialTokens
from grpo.ranks import start_processes
from grpo.rollout import SamplingParams, ScoredRollout, filter_top_k_top_p, generate, rollouts_to_train
from tests.conftest import run_ranks
from tests.grpo.test_packed import hf_twin


def sample(tiny, prompts, G=4, C=12, temperature=0.7, eos_token_ids=None, seed=0, model=None):
    generators = None if seed is None else [torch.Generator().manual_seed(seed + n) for n in range(len(prompts))]
    tokens = SpecialTokens(torch.tensor(eos_token_ids), tiny.suppress_tokens) if eos_token_ids else tiny.tokens
    return generate(model or tiny.model, prompts, tokens, SamplingParams(G, C, temperature), generators)


OFTEN = list(range(0, 300, 6))  # end-of-sequence ids that end some completions early and leave others running


def hf_greedy(twin, prompt, C, suppress_tokens, **more) -> list[int]:
    """The tokens that Hugging Face's `generate` finds most probable, one after the other."""
    ids = prompt.prompt_ids[None]
    out = twin.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=prompt.position_ids[:, None],
        pixel_values_videos=normalise(prompt.patches),
        video_grid_thw=prompt.grid_thw,
        max_new_tokens=C,
        do_sample=False,
        suppress_tokens=suppress_tokens,
        **more,
    )
    return out[0, ids.shape[1] :].tolist()


def test_greedy_completions_equal_those_of_hugging_faces_generate(tiny):
    twin, suppressed = hf_twin(tiny.model), tiny.suppress_tokens.tolist()
    for prompt, rollout in zip(tiny.prompts, sample(tiny, tiny.prompts, G=1, seed=None), strict=True):
        ours = rollout.completion_ids[0][rollout.completion_mask[0]].tolist()
        assert ours == hf_greedy(twin, prompt, 12, suppressed)


def test_logprobs_recorded_while_sampling_agree_with_the_update(tiny):
    rollouts = sample(tiny, tiny.prompts, G=2, eos_token_ids=OFTEN)
    assert len({rollout.completion_ids.shape[1] for rollout in rollouts}) > 1  # groups of unequal lengths
    ids, masks = [r.completion_ids for r in rollouts], [r.completion_mask for r in rollouts]
    results = completion_logprobs(tiny.model, tiny.prompts, ids, masks, 0.7, tiny.suppress_tokens)
    for rollout, (logprobs, *_) in zip(rollouts, results, strict=True):
        assert (rollout.logprobs - logprobs).abs().max() < 1e-4
        assert (rollout.logprobs[rollout.completion_mask] < 0).all()


def test_on_the_first_update_the_ratio_is_one_and_the_gradient_that_of_reinforce(tiny):
    (rollout,) = sample(tiny, tiny.prompts[:1])
    advantages = torch.tensor([1.0, -0.5, 2.0, 0.25])
    gradients = []
    for objective in ("grpo", "reinforce"):
        model = copy.deepcopy(tiny.model)
        ((logprobs, *_),) = completion_logprobs(
            model, tiny.prompts[:1], [rollout.completion_ids], [rollout.completion_mask], 0.7, tiny.suppress_tokens
        )
        if objective == "grpo":
            mask = rollout.completion_mask
            ratio = importance_ratios(logprobs, logprobs.detach(), mask, "token")
            assert torch.equal(ratio, torch.ones_like(ratio))
            loss = clipped_loss(ratio, advantages, 0.05, 0.1)
            low, high = clipped_tokens(ratio, advantages, 0.05, 0.1)
            assert not low.any() and not high.any()
            loss = weighted_sum(loss, mask, torch.ones(4))
        else:
            loss = -(logprobs * advantages[:, None]).sum()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
    assert gradients[0].norm() > 0.1


@pytest.mark.parametrize("seed", [0, 1])
def test_a_completion_ends_with_its_first_stop_token_or_at_the_limit(tiny, seed):
    (rollout,) = sample(tiny, tiny.prompts[:1], G=32, eos_token_ids=OFTEN, seed=seed)
    assert 0 < rollout.is_stopped.sum() < 32
    assert (rollout.completion_ids[~rollout.completion_mask] == OFTEN[0]).all()  # what was drawn behind the end is gone
    for ids, mask, stopped in zip(rollout.completion_ids, rollout.completion_mask, rollout.is_stopped, strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [True] * length + [False] * (len(mask) - length)  # no holes
        found = [t for t, token in enumerate(ids[:length].tolist()) if token in OFTEN]
        assert found == ([length - 1] if stopped else [])  # the end-of-sequence token is trained, and is the last one
        assert stopped or length == 12


def test_suppressed_tokens_are_never_sampled_even_where_the_model_wants_them(tiny):
    model = copy.deepcopy(tiny.model)
    with torch.no_grad():  # tied to the output layer: a huge row makes the model love or hate it
        model.lm_head.weight[tiny.suppress_tokens] *= 50
    (rollout,) = sample(tiny, tiny.prompts[:1], G=16, model=model, temperature=2.0)
    assert not torch.isin(rollout.completion_ids, tiny.suppress_tokens).any()
    nothing_suppressed = SpecialTokens(tiny.tokens.eos_token_ids, torch.tensor([], dtype=torch.long))
    (rollout,) = generate(model, tiny.prompts[:1], nothing_suppressed, SamplingParams(16, 12, 2.0))
    assert torch.isin(rollout.completion_ids, tiny.suppress_tokens).any()


def test_what_is_sampled_depends_on_the_generator_alone_not_on_the_company(tiny):
    together = sample(tiny, tiny.prompts)
    for n, rollout in enumerate(together):
        (alone,) = sample(tiny, [tiny.prompts[n]], seed=n)
        assert torch.equal(alone.completion_ids, rollout.completion_ids)
        assert torch.allclose(alone.logprobs, rollout.logprobs, atol=1e-5)
    assert not torch.equal(sample(tiny, tiny.prompts[:1], seed=5)[0].completion_ids, together[0].completion_ids)


def test_sampled_tokens_follow_the_distribution(tiny):
    (rollout,) = sample(tiny, tiny.prompts[:1], G=2000, C=1, temperature=0.5)
    first, counts = rollout.completion_ids[:, 0].unique(return_counts=True)
    for token, count in zip(first.tolist(), counts.tolist(), strict=True):
        probability = rollout.logprobs[rollout.completion_ids[:, 0] == token][0, 0].exp().item()
        assert abs(count / 2000 - probability) < 0.05  # five standard deviations


def test_a_decoder_serves_many_rollouts_and_remembers_nothing_of_them(tiny):
    first = sample(tiny, tiny.prompts[:2], C=7)
    sample(tiny, tiny.prompts[2:], C=7, seed=5)  # shorter or longer ones in between
    encoded = [encode_media(tiny.model, prompt) for prompt in tiny.prompts[:2]]
    encoded[1].vision_states.fill_(torch.nan)  # from there it reaches the cache
    sample(tiny, encoded, C=7)
    decoder = DECODERS[4, 7]
    again = sample(tiny, tiny.prompts[:2], C=7)
    assert DECODERS[4, 7] is decoder
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.completion_ids, b.completion_ids) and torch.equal(a.logprobs, b.logprobs)


def test_there_is_one_decoder_for_training_and_one_for_evaluations(tiny, monkeypatch):
    alive, init = weakref.WeakSet(), Decoder.__init__

    def spy(self, model, B, G, P, C):
        assert (G, C) not in {(one.cache.completion_keys.shape[4:6]) for one in alive}  # freed before the next is made
        init(self, model, B, G, P, C)
        alive.add(self)

    DECODERS.clear()
    monkeypatch.setattr(Decoder, "__init__", spy)
    for G in (4, 1):
        for prompts in (tiny.prompts[:1], tiny.prompts[:2], tiny.prompts[:1]):
            sample(tiny, prompts, G=G, C=7)
    assert len(alive) == 2


def test_room_that_stays_empty_changes_nothing(tiny):
    (exact,) = sample(tiny, tiny.prompts[:1], C=6, eos_token_ids=[-1])
    P = len(tiny.prompts[0].prompt_ids)
    logits = []
    with torch.no_grad():
        for B, room in ((1, P), (3, P + 100)):  # as on a GPU, where a graph serves batches of many sizes
            decoder = Decoder(tiny.model, B, 4, room, 6)
            prefill(tiny.model, tiny.prompts[:1], decoder.cache)
            for t in range(5):
                position = tiny.prompts[0].position_ids.max() + 1 + t
                hidden = decoder.step(exact.completion_ids[:, t], position.expand(4))
            logits.append(hidden @ tiny.model.lm_head.weight.T)
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    chosen = torch.log_softmax((logits[1] / 0.7).index_fill(1, tiny.suppress_tokens, -torch.inf), dim=1)
    assert torch.allclose(chosen.gather(1, exact.completion_ids[:, 5:])[:, 0], exact.logprobs[:, 5], atol=1e-5)


def kept(groups: str, batch_size: int) -> str:
    """Which of some groups pass through the update, in their order; those in capitals have something to train."""
    scored = [ScoredRollout(letter, torch.zeros(2), torch.tensor([[letter.isupper()], [False]])) for letter in groups]
    return "".join(one.rollout for one in rollouts_to_train(scored, batch_size))


# Groups of the two ranks, groups per pass, and what each rank keeps: the most passes that a rank needs, on both.
KEPT = [
    (["aBcD", ""], 2, ["BD", ""]),  # as on one rank
    (["abc", ""], 2, ["", ""]),
    (["ABC", ""], 2, ["ABC", ""]),  # two passes, the second of one group
    (["abc", "def"], 1, ["", ""]),
    (["aBcdE", "fghij"], 1, ["BE", "fg"]),
    (["ABCde", "fGhij"], 2, ["ABC", "Gfh"]),  # two passes, 2 + 1 groups
    (["ABCDE", "fghij"], 2, ["ABCDE", "fghij"]),  # three passes, 2 + 2 + 1
    (["ABCDe", "fGHIj"], 4, ["ABCD", "GHI"]),  # one pass
]


def keep() -> None:
    start_processes()
    for groups, batch_size, expected in KEPT:
        assert kept(groups[dist.get_rank()], batch_size) == expected[dist.get_rank()], (groups, batch_size)
    dist.destroy_process_group()


def test_ranks_keep_what_they_train_and_as_much_more_as_the_other_ranks_have_passes():
    run_ranks(keep, 2)


def test_sampling_flags_are_read_in_one_place_with_the_callers_group_and_temperature():
    config = Config(max_completion_length=7, num_generations=8, temperature=0.7, top_p=0.5, top_k=3)
    assert SamplingParams.of(config, 4, 0.9) == SamplingParams(4, 7, 0.9, 0.5, 3)


def test_top_k_and_top_p_by_hand():
    logprobs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    assert torch.equal(filter_top_k_top_p(logprobs, 1.0, 0), logprobs)
    two = torch.tensor([[0.625, 0.375, 0, 0], [0, 0, 0.375, 0.625]])
    assert torch.allclose(filter_top_k_top_p(logprobs, 1.0, 2).exp(), two)
    assert torch.allclose(filter_top_k_top_p(logprobs, 0.6, 0).exp(), two)  # 0.5 is too little, 0.8 the least that does
    one = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0]])
    assert torch.allclose(filter_top_k_top_p(logprobs, 0.4, 0).exp(), one)  # at least one
    assert torch.allclose(
        filter_top_k_top_p(logprobs, 0.6, 3).exp(), two
    )  # 0.5 / 0.95 of what top-k keeps is below 0.6
