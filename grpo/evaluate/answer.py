"""Answer held-out samples, on all ranks together: greedily, or with several sampled answers each.

| n | samples | N | answers per sample | K | constant answers |
"""

import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch.distributed as dist

from data.epochs import BatchItem
from data.loader import PromptDataset, checked, load_ahead
from data.sample import InputError
from grpo.evaluate.metrics import Answers
from grpo.model.load import SpecialTokens, special_tokens
from grpo.ranks import all_gather_object, print_rank0, raise_together
from grpo.rollout import SamplingParams, generate, generators
from grpo.run.preflight import is_out_of_memory
from grpo.run.records import finite_or_none
from grpo.run.scoring import Scorer, sampled_columns, score_texts
from reward.extract import extract_number


@dataclass
class Prediction:
    """The answers to one sample: a line of predictions.jsonl."""

    id: str
    truth: str
    truth_number: float | None
    answers: list[str]  # N
    numbers: list[float | None]
    rewards: list[float | None]  # None where no reward function has a say
    is_stopped: list[bool]  # False where an answer was cut at the length limit
    seconds: float  # this sample's share of the time for its batch


def answer(
    model,
    dataset: PromptDataset,
    scorer: Scorer,
    config,
    num_samples: int = 1,
    temperature: float = 0.0,
    done: Set[str] = frozenset(),
) -> Iterator[list[Prediction]]:
    """Answer the samples of a data set, and yield what all ranks have done after each round of batches; collective.

    model: unsharded; config: the flags of training or of the command; temperature: 0 for greedy answers. Batches are
    the same for any number of ranks, and sampling depends only on the seed and the place of the sample, so that the
    answers are the same, too. Samples that are `done` already, by id, are left out of their batches, and those without
    readable videos are named and left out. Raises InputError, on all ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokens = special_tokens(model, dataset.tokenizer, model.device)
    everyone, size = range(len(dataset.samples)), config.per_device_eval_batch_size
    batches = [everyone[i : i + size] for i in everyone[::size]]
    if done:
        is_done = raise_together(lambda: [sample.id in done for sample in dataset.samples])
        batches = [left for batch in batches if (left := [i for i in batch if not is_done[i]])]
    own = ([BatchItem(index, index) for index in batch] for batch in batches[rank::world_size])
    prompts = load_ahead(dataset, own, config.dataloader_num_workers)
    params, seed = SamplingParams.of(config, num_samples, temperature or 1.0), config.seed if temperature else None
    for _ in range(0, len(batches), world_size):
        batch = next(prompts, [])
        own_round = raise_together(answer_batch, model, dataset.tokenizer, tokens, batch, params, seed, scorer)
        predictions, bad_media = (list(chain(*parts)) for parts in zip(*all_gather_object(own_round), strict=True))
        print_rank0(*(f"left out of the evaluation: {line}" for line in bad_media))
        yield predictions


def answer_batch(
    model, tokenizer, tokens: SpecialTokens, batch: list, params: SamplingParams, seed: int | None, scorer: Scorer
) -> tuple[list[Prediction], list[str]]:
    """Answer the prompts of a batch together; return also a line for each sample that was left out, with the reason.

    seed: None for greedy answers.
    """
    began, batch = time.perf_counter(), checked(batch)
    bad_media = [prompt.bad_media for prompt in batch if prompt.bad_media]
    prompts = [prompt for prompt in batch if not prompt.is_padding]
    if not prompts:
        return [], bad_media
    N = params.num_generations
    # Steps of training count from 1, so that step 0 draws other numbers than they do.
    draws = generators(prompts, seed, 0, tokens.device) if seed is not None else None
    try:
        rollouts = generate(model, prompts, tokens, params, draws)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        longest = max(len(prompt.prompt_ids) for prompt in prompts)
        raise InputError(
            f"memory ran out while {len(prompts)} prompts of up to {longest} tokens were answered together: lower "
            "--per_device_eval_batch_size, --max_videos or the size of the frames"
        ) from error
    texts = [tokenizer.batch_decode(r.completion_ids, skip_special_tokens=True) for r in rollouts]  # N each
    samples = [prompt.sample for prompt in prompts for _ in range(N)]
    rewards = score_texts(scorer, samples, list(chain(*texts)), sampled_columns(rollouts)).reshape(-1, N)
    seconds = round((time.perf_counter() - began) / len(prompts), 4)
    predictions = [
        Prediction(
            id=prompt.sample.id,
            truth=prompt.sample.answer,
            truth_number=extract_number(prompt.sample.answer),
            answers=answers,
            numbers=[extract_number(text) for text in answers],
            rewards=[finite_or_none(reward) for reward in own_rewards.tolist()],
            is_stopped=rollout.is_stopped.tolist(),
            seconds=seconds,
        )
        for prompt, rollout, answers, own_rewards in zip(prompts, rollouts, texts, rewards, strict=True)
    ]
    return predictions, bad_media


def answers_of(predictions: list[Prediction], constant_rewards: np.ndarray, valid_range: list[float]) -> Answers:
    """Collect the answers of n predictions, whose truths all have a number; constant_rewards: (K, n)."""
    return Answers(
        truths=np.array([p.truth_number for p in predictions]),
        constant_rewards=np.ascontiguousarray(constant_rewards),  # the layout decides last digits
        numbers=np.array([p.numbers for p in predictions], dtype=float),  # None becomes nan
        rewards=np.array([p.rewards for p in predictions], dtype=float),
        is_stopped=np.array([p.is_stopped for p in predictions]),
        valid_range=valid_range,
    )
