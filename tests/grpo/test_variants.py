"""Whole runs of the algorithm's variants, and rewards that are equal, missing, or not to be had."""

import json

import pytest
import torch

import train
from grpo.run.records import global_counts
from tests.grpo.rewards import named
from tests.test_train import curves, flags, run_main, weights

FOUR_PROMPTS = ["--global_batch_size", "4", "--log_completions", "0"]  # pictures take longer than a step


def run(tiny, output, *more, code=0) -> dict[str, list[float]]:
    assert train.main(flags(tiny, output, *FOUR_PROMPTS, *more)) == code
    return curves(output) if code == 0 else {}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_equal_rewards_in_every_group_train_nothing(tiny, tmp_path, loss_type):
    found = run(tiny, tmp_path / "out", "--loss_type", loss_type, *named("constant"))
    assert found["grad_norm"] == [0.0] and found["frac_reward_zero_std"] == [1.0]
    assert torch.equal(weights(tiny.folder / "model"), weights(tmp_path / "out" / "final"))


def test_of_several_groups_only_those_with_different_rewards_contribute(tiny, tmp_path, monkeypatch):
    seen = []
    update_phase = train.update_phase

    def spy(models, optimizer, scored, *more):
        seen.extend((one.rollout.prompt.sample.id, one.advantages) for one in scored)
        return update_phase(models, optimizer, scored, *more)

    monkeypatch.setattr(train, "update_phase", spy)
    found = run(tiny, tmp_path / "out", *named("constant_but_for_s2"))
    assert found["grad_norm"][0] > 0 and found["frac_reward_zero_std"] == [0.75]
    assert {name: bool((advantages != 0).any()) for name, advantages in seen} == {
        "s0": False,
        "s1": False,
        "s2": True,
        "s3": False,
    }


def test_groups_of_equal_rewards_do_not_dilute_and_their_update_pass_is_left_out(tiny, tmp_path, monkeypatch):
    passes, policy_logprobs = [], train.policy_logprobs

    def spy(policy, batch, *more):
        passes.append([one.rollout.prompt.sample.id for one in batch])
        return policy_logprobs(policy, batch, *more)

    monkeypatch.setattr(train, "policy_logprobs", spy)
    counts = []
    update_phase = train.update_phase

    def see_counts(models, optimizer, scored, *more):
        tokens = [int(one.rollout.completion_mask.sum()) for one in scored if one.loss_mask.any()]
        counts.append((global_counts(scored)[0], sum(tokens)))
        return update_phase(models, optimizer, scored, *more)

    monkeypatch.setattr(train, "update_phase", see_counts)
    one_by_one = ["--per_device_train_batch_size", "1", *named("constant_but_for_s2")]
    found = run(tiny, tmp_path / "out", *one_by_one)
    assert passes == [["s2"]] and found["grad_norm"][0] > 0
    assert counts[0][0] == counts[0][1]  # the denominator is that of s2's tokens
    passes.clear()
    run(tiny, tmp_path / "kl", *one_by_one, "--beta", "0.1")  # with a KL all have something to learn
    assert sorted({ids[0] for ids in passes}) == ["s0", "s1", "s2", "s3"]


def test_ranks_without_a_difference_keep_step_with_those_that_have_one(tiny, tmp_path):
    more = ["--per_device_train_batch_size", "1", *named("constant_but_for_s2")]
    one = run(tiny, tmp_path / "1", *more)
    run_main(2, flags(tiny, tmp_path / "2", *FOUR_PROMPTS, *more), tmp_path)
    two = curves(tmp_path / "2")
    for tag in ("grad_norm", "entropy", "loss", "reward"):
        assert two[tag] == pytest.approx(one[tag], rel=1e-3, abs=1e-5), tag
    assert one["grad_norm"][0] > 0


def test_completions_without_a_reward_are_left_out_and_counted(tiny, tmp_path):
    found = run(tiny, tmp_path / "out", *named("half_missing"))
    assert found["completions/unscored"] == [16]
    assert 0 < found["grad_norm"][0] < float("inf") and found["reward"][0] > 0
    assert not weights(tmp_path / "out" / "final").isnan().any()


def test_a_run_without_any_reward_trains_nothing(tiny, tmp_path):
    found = run(tiny, tmp_path / "out", *named("never"))
    assert found["grad_norm"] == [0.0] and found["completions/unscored"] == [32]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raising", ["KeyError", "'s3'"]),
        ("too_few", ["1 rewards"]),
        ("infinite", ["inf", "'s3'"]),
        ("raising_on_the_whole_step", ["ValueError", "samples 's"]),
    ],
)
def test_a_reward_function_that_fails_stops_the_run_with_its_name(tiny, tmp_path, capfd, function, words):
    run(tiny, tmp_path / "out", *named(function), code=2)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train.py: error")]
    assert all(word in line for word in [function, *words])


MASKED = {"plain": [], "masked": ["--mask_truncated_completions"]}


def test_cut_completions_are_trained_unless_they_are_masked(tiny, tmp_path):
    short = "--max_completion_length", "1", "--seed", "1"  # with which none stops so early
    plain, masked = (run(tiny, tmp_path / name, *short, *more, *named("by_length")) for name, more in MASKED.items())
    assert plain["completions/clipped_ratio"] == masked["completions/clipped_ratio"] == [1.0]
    assert plain["grad_norm"][0] > 0 and masked["grad_norm"] == [0.0]


def test_the_kl_is_zero_at_first_and_positive_afterwards(tiny, tmp_path):
    two = ["--num_train_epochs", "2", "--learning_rate", "1e-2", *named("by_length")]
    found = run(tiny, tmp_path / "out", "--beta", "0.1", *two)
    assert found["kl"][0] == 0.0 and min(found["kl"][1:]) > 0
    free = run(tiny, tmp_path / "free", *two)
    assert "kl" not in free  # there is no reference model
    assert not torch.equal(weights(tmp_path / "out" / "final"), weights(tmp_path / "free" / "final"))


def test_a_large_beta_holds_the_policy_back(tiny, tmp_path):
    kls, more = [], ["--num_train_epochs", "4", "--learning_rate", "3e-3", *named("by_length")]
    for beta in ("0.001", "10"):
        found = run(tiny, tmp_path / beta, "--beta", beta, *more)
        kls.append(found["kl"][-1])
    assert kls[1] < 0.5 * kls[0]


ADAPTERS = ["--lora_enable", "--lora_rank", "4", "--freeze_vision_tower", "--learning_rate", "1e-2"]


def test_variants_run_on_two_ranks_as_on_one(tiny, tmp_path):
    """All at once: what depends on the ranks in one of them does so here."""
    more = ["--num_train_epochs", "2", "--num_iterations", "2", "--loss_type", "grpo", "--scale_rewards", "batch"]
    more += [*ADAPTERS, "--freeze_merger", "--lora_dropout", "0", "--beta", "0.1"]
    one = run(tiny, tmp_path / "1", *more)
    run_main(2, flags(tiny, tmp_path / "2", *FOUR_PROMPTS, *more), tmp_path)
    two = curves(tmp_path / "2")
    for tag in ("reward", "loss", "kl", "entropy", "grad_norm", "clip_ratio/region_mean"):
        assert two[tag] == pytest.approx(one[tag], rel=1e-3, abs=1e-5), tag


def test_with_top_p_the_curves_show_how_far_sampling_is_from_the_policy(tiny, tmp_path):
    assert run(tiny, tmp_path / "all")["sampling/sampling_logp_difference/max"][0] < 1e-4
    found = run(tiny, tmp_path / "top_p", "--top_p", "0.5")
    assert 0.1 < found["sampling/sampling_logp_difference/mean"][0] < 1.0  # about -log of what is kept, 0.5 or more


def test_a_run_of_equal_rewards_is_pointed_out_once(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("grpo.run.tracking.ZERO_STD_STEPS", 2)
    more = "--max_steps 5 --global_batch_size 1 --max_completion_length 1 --num_generations 2".split()
    run(tiny, tmp_path / "out", *more, *named("constant"))
    assert capsys.readouterr().out.count("equal rewards") == 1


def test_prompts_and_completions_stay_aligned(tiny, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("DEBUG_MODE", "true")
    monkeypatch.setenv("LOG_PATH", str(log))
    seen = []
    update_phase = train.update_phase

    def spy(models, optimizer, scored, *more):
        seen.extend(one.rollout for one in scored)
        return update_phase(models, optimizer, scored, *more)

    monkeypatch.setattr(train, "update_phase", spy)
    run(tiny, tmp_path / "out")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    texts = [
        (rollout.prompt.sample.id, text)
        for rollout in seen
        for text in tiny.tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
    ]
    assert [(line["sample_id"], line["text"]) for line in lines] == texts
    for rollout in seen:  # 1, 3, 2 and 1 videos
        original = tiny.prompts[int(rollout.prompt.sample.id[1:])]
        assert len(rollout.prompt.sample.media) == len(rollout.prompt.grid_thw)
        assert torch.equal(rollout.prompt.patches, original.patches)


def test_adapters_alone_learn_a_reward(tiny, tmp_path):
    more = [*ADAPTERS, "--freeze_merger", "--max_steps", "12", "--num_generations", "16", *named("by_length")]
    rewards = run(tiny, tmp_path / "out", *more)["reward"]
    assert sum(rewards[-3:]) > 1.5 * sum(rewards[:3])


@pytest.mark.parametrize(
    "more", [["--freeze_merger", "--lora_dropout", "0"], ["--lora_dropout", "0.5"]], ids=["its own", "a frozen copy"]
)
def test_with_adapters_the_kl_is_that_from_the_base(tiny, tmp_path, more):
    more = [*ADAPTERS, *more, "--beta", "0.1", "--num_train_epochs", "2"]
    found = run(tiny, tmp_path / "out", *more, *named("by_length"))
    assert found["kl"][0] == pytest.approx(0.0, abs=1e-9) and min(found["kl"][1:]) > 1e-5
    assert min(found["grad_norm"]) > 0  # gradients flow after the adapters were off


def test_old_logprobs_of_several_iterations_are_without_dropout(tiny, tmp_path):
    more = [*ADAPTERS, "--freeze_merger", "--lora_dropout", "0.5", "--num_train_epochs", "2", *named("by_length")]
    once = run(tiny, tmp_path / "once", *more)["sampling/sampling_logp_difference/max"]
    twice = run(tiny, tmp_path / "twice", *more, "--num_iterations", "2")["sampling/sampling_logp_difference/max"]
    assert max(once) > 1e-3 and max(twice) < 1e-4
