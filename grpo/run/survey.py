"""Read every sample once before a run: check it, and keep what the run must know of all of them.

| n | samples |
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
from torch.utils.data import Dataset

from data.check.report import outside_line
from data.dataset import Samples, add_id
from data.loader import cores_per_rank, load_ahead
from data.prompt import encode_answer
from data.sample import InputError, Sample, with_system_prompt
from data.video_cap import cap_videos, choice_of, varies
from grpo.ranks import all_gather_object, print_rank0
from reward.extract import extract_number
from reward.functions import RewardFunction

PART = 1000  # samples that a process reads at a time
MOST_PROCESSES = 16
MANY = 20_000  # samples for which it pays to start processes: to see whether files are there takes a network disk long


@dataclass
class Survey:
    """What is known of the samples of some files."""

    samples: Samples  # as the model sees them: capped, and with the system prompt
    truths: np.ndarray  # (n,) the numbers in their answers, nan where there is none
    keys: list[str]  # of the samples' own data
    fingerprint: list[str]  # SHA-256 of the bytes of each file


@dataclass
class Facts(Dataset):
    """What a run must know of each sample, or what is wrong with it."""

    samples: Samples
    config: object
    tokenizer: object | None  # to count the tokens of the answers, which are then checked as texts to train on

    def __getitem__(self, index: int) -> tuple[str, float | None, list[str], list[str], bool, int] | InputError:
        """Return id, truth, own keys, missing files, whether it is capped, and the length of the answer."""
        try:
            sample = self.samples[index]
            length = len(encode_answer(sample.answer, self.tokenizer)) if self.tokenizer else 0
        except InputError as error:
            return error
        except ValueError as error:
            return InputError(f"sample {sample.id!r}: {error}")
        capped = cap_videos(sample, self.config.max_videos, self.config.max_images)
        is_cut = len(capped.media) < len(sample.media)
        return sample.id, extract_number(sample.answer), list(sample.extra), sample.missing(), is_cut, length


def survey(paths: list[str], config, is_training: bool = False, tokenizer=None) -> Survey:
    """Read and check all samples of some files; raise InputError, also if there is no true number to evaluate.

    Prints lines: if videos are left out, if truths are outside the range, and, where the true answers are trained on
    (tokenizer), if some are longer than sampled ones may be. Of many samples, each core of this rank reads a part.
    """
    choose, samples, names = choice_of(config.video_cap), Samples(paths, config.image_folder), repr(" ".join(paths))
    parts = (range(first, min(first + PART, len(samples))) for first in range(0, len(samples), PART))
    is_large = len(samples) >= MANY and config.dataloader_num_workers != 0
    workers = min(cores_per_rank(), MOST_PROCESSES) * is_large
    ids, truths, keys, missing, num_cut, lengths = {}, [], {}, {}, 0, []
    for facts in chain.from_iterable(load_ahead(Facts(samples, config, tokenizer), parts, workers)):
        if isinstance(facts, InputError):
            raise facts
        sample_id, truth, own_keys, gone, is_cut, length = facts
        add_id(ids, sample_id, samples.where(len(ids))[0].path)
        truths.append(truth)
        keys |= dict.fromkeys(own_keys)
        for path in gone:
            missing.setdefault(path, sample_id)
        num_cut += is_cut
        lengths.append(length)
    samples.refuse_missing(missing)
    is_varied = is_training and varies(config.video_cap)  # training sees other videos of a sample in each turn

    def as_seen(sample: Sample) -> Sample:
        capped = cap_videos(sample, 0 if is_varied else config.max_videos, config.max_images, choose)
        return with_system_prompt(capped, config.system_prompt)

    samples.prepare = as_seen
    if num_cut:
        each = " of each epoch" if is_varied else ""
        print_rank0(
            f"{names}: {num_cut} samples have more than --max_videos {config.max_videos} videos or "
            f"--max_images {config.max_images} images: the rest is left out{each}"
        )
    if num_long := sum(length > config.max_completion_length for length in lengths):
        print_rank0(
            f"{names}: {num_long} answers are longer than --max_completion_length {config.max_completion_length} "
            f"tokens (up to {max(lengths)}): they are trained whole, but evaluations cannot reach their ends"
        )
    truths = np.array(truths, dtype=float)
    if not is_training and np.isnan(truths).all():
        raise InputError(f"{names}: no answer in it contains a number: there is nothing to evaluate")
    if line := outside_line(truths, config.valid_range):
        print_rank0(f"{names}: {line}")
    return Survey(samples, truths, list(keys), [file.digest for file in samples.files])


def check_same_on_all_ranks(*found: Survey, functions: list[RewardFunction]) -> None:
    """Raise InputError, on all ranks, if they have read different files, such as from disks of their own. Collective.

    They would train on different samples or rewards under one name, or wait for each other forever.
    """
    samples, files = [one.fingerprint for one in found], [one.digest for one in functions]
    for what, digests in {"samples": samples, "reward functions": files}.items():
        if any(others != digests for others in all_gather_object(digests)):
            raise InputError(f"the ranks have read different {what}: give all machines the same files, and start again")
