"""Find out before a run whether its largest step fits into memory, not hours later when that sample comes up."""

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from data.dataset import InputError, Sample
from data.loader import PromptDataset, Slot, checked
from data.prompt import encode_prompt
from data.video import BadVideo, video_grid
from grpo.config import Config
from grpo.model.load import SpecialTokens
from grpo.model.optimizer import make_states
from grpo.ranks import end_alone, of_all_ranks, raise_together
from grpo.run.tracking import Totals, peak_memory_gb

NUM_THREADS = 16  # that open videos; opening waits for disks
# PyTorch's words for it, on GPU and CPU, the driver's among them, and cuBLAS's.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def prompt_length(dataset: PromptDataset, sample: Sample) -> int:
    """Count the prompt tokens of a sample, from the headers of its videos; 0 if one cannot be read."""
    try:
        grids = torch.tensor([video_grid(path, dataset.options) for path in sample.videos])
        seconds = torch.ones(len(grids))
        return len(encode_prompt(sample.turns, dataset.tokenizer, grids, seconds, dataset.tokens_per_second)[0])
    except (BadVideo, FileNotFoundError, ValueError):
        return 0  # reported when its turn comes


def longest_prompt(dataset: PromptDataset) -> tuple[int, int]:
    """Return the length of the longest prompt and the index of its sample; the ranks share the work. Collective."""
    own = range(dist.get_rank(), len(dataset.samples), dist.get_world_size())
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        lengths = pool.map(lambda i: prompt_length(dataset, dataset.samples[i]), own)
        longest = max(zip(lengths, own, strict=True), default=(0, 0))
    return max(of_all_ranks(longest))


def memory_preflight(
    dataset: PromptDataset, tokens: SpecialTokens, optimizer, config: Config, models: tuple, phases: tuple
) -> str:
    """Run one step on the longest prompt with completions of full length, change nothing; return a line about it.

    models: what `make_trainable` returns; phases: `rollout_phase` and `update_phase` of `train.py`. The optimizer must
    not have stepped yet. Where memory does not suffice, raises InputError; one rank of several ends with its line.
    """
    (model, whole, reference), (rollout_phase, update_phase) = models, phases
    _, index = longest_prompt(dataset)
    (prompt,) = raise_together(checked, [dataset[Slot(0, index, True)]])
    sample = prompt.sample  # another one, if its videos are broken and --on_bad_video is skip
    G, C, world_size = config.num_generations, config.max_completion_length, dist.get_world_size()
    endless = SpecialTokens(torch.full_like(tokens.stop_ids, -1), tokens.banned_ids)  # nothing ends a completion
    rates = [group["lr"] for group in optimizer.param_groups]
    what = (
        f"sample {sample.id!r} with {len(sample.videos)} videos ({len(prompt.prompt_ids):,} prompt tokens, {G} "
        f"completions of {C} tokens, {config.per_device_train_batch_size} such prompts at a time)"
    )
    try:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        make_states(optimizer)
        prompts = [prompt] * config.per_device_train_batch_size
        rollouts = rollout_phase(whole.refresh(model), prompts, endless, config, step=0)
        for one in rollouts:
            one.train_mask = one.completion_mask
            one.advantages = torch.linspace(-1, 1, G, device=tokens.device)
        num_completions = len(rollouts) * G * world_size
        totals = Totals(num_completions * C, num_completions, 1.0)
        update_phase(model, reference, optimizer, rollouts, totals, tokens.banned_ids, config)
    except RuntimeError as error:
        if not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        line = (
            f"out of memory in a trial step on {what}: lower --max_videos, --nframes or --fps, the video size, "
            "--num_generations, --max_completion_length or --per_device_train_batch_size, add "
            "--gradient_checkpointing true or --lora_enable, or take more GPUs"
        )
        if world_size == 1:
            raise InputError(line) from error
        end_alone(f"train.py: error: rank {dist.get_rank()}: {line}")  # others may have had enough
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()
    optimizer.state.clear()  # the steps of rate 0 have left the weights as they were
    peaks = of_all_ranks(peak_memory_gb())
    by_rank = ", ".join(f"{peak:.1f}" for peak in peaks)
    return f"memory: about {max(peaks):.1f} GB in a trial step on {what}; by rank: {by_rank}"
