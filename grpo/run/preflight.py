"""Try the largest step before a run, to see whether it fits into memory; else it would fail hours later."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter

import torch
import torch.distributed as dist

from data.epochs import BatchItem
from data.loader import LongPrompt, Prompt, PromptDataset, checked, fit_prompt
from data.prompt import encode_answer
from data.sample import BadMedia, InputError
from grpo.model.optimizer import init_optimizer_state
from grpo.ranks import abort_rank, all_gather_object, raise_together
from grpo.rollout import Rollout, SamplingParams, ScoredRollout, generate, true_answers
from grpo.run.tracking import peak_memory_gb

NUM_THREADS = 16  # that open videos, which is mostly waiting for disks
# The wordings of PyTorch on GPU and CPU, and of cuBLAS.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether an error of PyTorch means that memory ran out."""
    return any(words in str(error) for words in OUT_OF_MEMORY)


def length_of(dataset: PromptDataset, index: int, has_answer: bool) -> int:
    """Count the prompt tokens of a sample as the first epoch sees it; 0 if it cannot be read or is too long.

    has_answer: count those of the true answer, too.
    """
    try:
        sample, length = fit_prompt(dataset.sample(BatchItem(0, index)), dataset.tokenizer, dataset.options)
        return length + (len(encode_answer(sample.answer, dataset.tokenizer)) if has_answer else 0)
    except (BadMedia, FileNotFoundError, LongPrompt, ValueError, InputError):
        return 0  # reported when the sample is trained on


def longest_prompt(dataset: PromptDataset, has_answer: bool) -> tuple[int, int]:
    """Return the length of the longest prompt and the index of its sample; the ranks share the work. Collective.

    has_answer: of the longest prompt and true answer together.
    """
    own = range(dist.get_rank(), len(dataset.samples), dist.get_world_size())
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        lengths = list(pool.map(lambda i: length_of(dataset, i, has_answer), own))
    return max(all_gather_object(max(zip(lengths, own, strict=True), default=(0, 0))))


def with_trial_advantages(rollouts: list[Rollout]) -> list[ScoredRollout]:
    """Give rollouts made-up advantages, with every token trained."""
    advantages = torch.linspace(-1, 1, len(rollouts[0].logprobs), device=rollouts[0].logprobs.device)
    return [ScoredRollout(rollout, advantages, rollout.completion_mask) for rollout in rollouts]


def trial_step(run, prompt: Prompt, rollout_phase: Callable, update_phase: Callable) -> None:
    """Do a step with copies of a prompt, full length and made-up advantages, and answer as many as an evaluation.

    A learning rate of 0 leaves the weights as they are; the optimizer must not have stepped yet.
    """
    models, config, tokens, optimizer = run.models, run.config, run.tokens.without_eos(), run.optimizer
    learning_rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    init_optimizer_state(optimizer)
    model, num_trained = models.sampling.sync(models.policy), config.per_device_train_batch_size
    if config.supervised:
        rollouts = true_answers([prompt] * num_trained, tokens)
    else:
        num_sampled = max(config.per_device_generation_batch_size, num_trained)
        rollouts = rollout_phase(model, [prompt] * num_sampled, tokens, config, step=0)
    scored = with_trial_advantages(rollouts[:num_trained])
    update_phase(models, optimizer, scored, tokens.suppress_tokens, config)
    if run.heldout:
        together = [prompt] * config.per_device_eval_batch_size
        generate(model, together, tokens, SamplingParams.of(config, 1, temperature=1.0))
    for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
        group["lr"] = learning_rate
    optimizer.zero_grad()
    optimizer.state.clear()


def memory_preflight(run, rollout_phase: Callable, update_phase: Callable) -> str:
    """Try a step on copies of the longest prompt, change nothing, and return a line about its peak memory.

    run: a `grpo.run.start.Run` whose optimizer has no state yet. Out of memory, it raises InputError; with several
    ranks it ends this rank.
    """
    config = run.config
    candidates = [(*longest_prompt(one, config.supervised), one) for one in (run.dataset, run.heldout) if one]
    _, index, dataset = max(candidates, key=itemgetter(0))
    (prompt,) = raise_together(checked, [dataset[BatchItem(0, index)]])
    sample = prompt.sample  # another one, if its videos are broken and --on_bad_video is skip
    together = "" if config.supervised else f", {config.per_device_generation_batch_size} sampled together"
    sampled = f"{config.num_generations} completions of {config.max_completion_length} tokens"
    what = (
        f"sample {sample.id!r} with {len(sample.media)} videos or images ({len(prompt.prompt_ids):,} prompt tokens, "
        f"{'its true answer' if config.supervised else sampled}, "
        f"{config.per_device_train_batch_size} such prompts at a time{together})"
    )
    try:
        trial_step(run, prompt, rollout_phase, update_phase)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        of_sampling = "--num_generations, --max_completion_length, --per_device_generation_batch_size, "
        line = (
            f"out of memory in a trial step on {what}: lower --max_videos, --nframes or --fps, the video size, "
            f"{'' if config.supervised else of_sampling}--per_device_train_batch_size or "
            "--per_device_eval_batch_size, add --gradient_checkpointing true or --lora_enable, or take more GPUs"
        )
        if dist.get_world_size() == 1:
            raise InputError(line) from error
        abort_rank(f"train.py: error: rank {dist.get_rank()}: {line}")  # the other ranks may have enough memory
    peaks = all_gather_object(peak_memory_gb())
    by_rank = ", ".join(f"{peak:.1f}" for peak in peaks)
    return f"memory: about {max(peaks):.1f} GB in a trial step on {what}; by rank: {by_rank}"
