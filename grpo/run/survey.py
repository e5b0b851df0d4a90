"""Read every sample once before a run: check it, and keep what the run must know of all of them.

| n | samples |
"""

import hashlib
import json
import math
import os
from array import array
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from torch.utils.data import Dataset

from data.check.report import outside_line
from data.dataset import Ids, Samples, add_missing
from data.loader import cores_per_rank, load_ahead
from data.media.fetch import shown
from data.prompt import check_text
from data.sample import InputError, Media, Sample, with_system_prompt
from data.video_cap import cap_videos, even, first
from grpo.ranks import all_gather_object
from reward.extract import extract_number
from reward.functions import RewardFunction

ENCODER = json.JSONEncoder(sort_keys=True)
PART = 1000  # samples that a process reads at a time
MANY = 20_000  # samples for which it pays to start processes
MOST_PROCESSES = 16


@dataclass
class Survey:
    """What is known of the samples of some files."""

    samples: Samples  # as the model sees them: capped, and with the system prompt
    truths: np.ndarray  # (n,) the numbers in their answers, nan where there is none
    keys: list[str]  # of the samples' own data
    fingerprint: str  # digest of their texts, and the names and options of their videos and images, without folders
    own_data: str  # digest of the samples' own data, which reward functions are given


class ListDigest:
    """The SHA-256 of a list as JSON, of which some items are given at a time."""

    def __init__(self) -> None:
        self.hash, self.before = hashlib.sha256(b"["), ""

    def add(self, items: str) -> None:
        """Add items as they stand in the list's JSON, with ", " between them; none: ""."""
        if items:
            self.hash.update((self.before + items).encode())
            self.before = ", "

    def hexdigest(self) -> str:
        """Return the digest of the whole list."""
        whole = self.hash.copy()
        whole.update(b"]")
        return whole.hexdigest()


def name_of(media: Media) -> str | list:
    """Return what a video or image is known by, wherever it lies: of an ordinary video its name."""
    if media.kind == "video" and isinstance(media.path, str) and not media.options:
        return base_name(media.path)
    return [media.kind, [base_name(path) for path in media.files], media.options]


def base_name(path: str) -> str:
    """Return the last part of a path or address."""
    return os.path.basename(shown(path).rstrip("/"))


def as_seen(sample: Sample, config, is_training: bool) -> Sample:
    """Cap the videos and images of a sample, and put the system prompt before its conversation.

    Where each epoch of the training samples sees other videos, they keep all; held-out samples then have those of the
    even choice.
    """
    choose = first if config.video_cap == "first" else even
    max_videos = 0 if is_training and config.video_cap == "random" else config.max_videos
    return with_system_prompt(cap_videos(sample, max_videos, config.max_images, choose), config.system_prompt)


def is_over(sample: Sample, kind: str, most: int) -> bool:
    """Say whether a sample has more videos, or images, than are kept."""
    return 0 < most < sum(media.kind == kind for media in sample.media)


@dataclass
class Part:
    """What is known of some samples that follow each other."""

    ids: list[str] = field(default_factory=list)
    truths: list[float] = field(default_factory=list)
    keys: dict[str, None] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # path -> id
    num_cut: int = 0  # samples with more videos or images than are kept
    texts: str = ""  # for the digests
    own_data: str = ""
    error: InputError | None = None  # in the sample that follows


class Parts(Dataset):
    """The samples in parts, each of which one process reads."""

    def __init__(self, samples: Samples, config):
        self.samples, self.config = samples, config

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / PART)

    def __getitem__(self, number: int) -> Part:
        part, texts, own_data, config = Part(), [], [], self.config
        for index in range(len(self.samples))[number * PART : (number + 1) * PART]:
            try:
                whole = self.samples.as_written(index)
                sample = self.samples.prepare(whole)
                check_text(sample.turns)
            except InputError as error:
                part.error = error
                break
            except ValueError as error:
                number, _ = self.samples.place_of(index)
                part.error = InputError(f"{self.samples.files[number].path!r}: sample {sample.id!r}: {error}")
                break
            truth = extract_number(sample.answer)
            part.ids.append(sample.id)
            part.truths.append(math.nan if truth is None else truth)
            part.keys |= dict.fromkeys(sample.extra)
            part.num_cut += is_over(whole, "video", config.max_videos) or is_over(whole, "image", config.max_images)
            add_missing(part.missing, whole)
            texts.append(
                ENCODER.encode([sample.id, sample.turns, sample.answer, [name_of(media) for media in sample.media]])
            )
            own_data.append(ENCODER.encode(sample.extra))
        part.texts, part.own_data = ", ".join(texts), ", ".join(own_data)
        return part


def survey(paths: list[str], config, messages: list[str], is_training: bool = False) -> Survey:
    """Read and check all samples of some files; raise InputError. Adds a line to `messages` if videos are left out.

    Of many samples, each core that this rank has reads a part.
    """
    samples = Samples(paths, config.image_folder, partial(as_seen, config=config, is_training=is_training))
    parts, processes = Parts(samples, config), 0
    if len(samples) >= MANY and config.dataloader_num_workers != 0:
        processes = min(cores_per_rank(), MOST_PROCESSES)
    truths, keys, missing, ids, num_cut = array("d"), {}, {}, Ids(), 0
    texts, own_data = ListDigest(), ListDigest()
    for (part,) in load_ahead(parts, ([number] for number in range(len(parts))), processes):
        for sample_id in part.ids:
            number, _ = samples.place_of(len(ids))
            ids.add(sample_id, paths[number])
        if part.error:
            raise part.error
        truths.extend(part.truths)
        keys |= part.keys
        for path, sample_id in part.missing.items():
            missing.setdefault(path, sample_id)
        num_cut += part.num_cut
        texts.add(part.texts)
        own_data.add(part.own_data)
    samples.refuse_missing(missing)
    if num_cut:
        each = " of each epoch" if is_training and config.video_cap == "random" else ""
        messages.append(
            f"{' '.join(paths)!r}: {num_cut} samples have more than --max_videos {config.max_videos} videos or "
            f"--max_images {config.max_images} images: the rest is left out{each}"
        )
    return Survey(samples, np.array(truths), list(keys), texts.hexdigest(), own_data.hexdigest())


def check_same_on_all_ranks(*found: Survey, functions: list[RewardFunction]) -> None:
    """Raise InputError, on all ranks, if they have read different files, such as from disks of their own. Collective.

    They would train on different samples or rewards under one name, or wait for each other forever.
    """
    samples, files = [(one.fingerprint, one.own_data) for one in found], [one.digest for one in functions]
    for what, digests in {"samples": samples, "reward functions": files}.items():
        if any(others != digests for others in all_gather_object(digests)):
            raise InputError(f"the ranks have read different {what}: give all machines the same files, and start again")


def check_truths(found: Survey, flag: str, paths: list[str], valid_range: list[float], messages: list[str]) -> None:
    """Raise InputError if no truth has a number; add a line to `messages` if some are outside the range."""
    if np.isnan(found.truths).all():
        raise InputError(f"{flag} {' '.join(paths)!r}: no answer in it contains a number")
    note_truths_outside(found, paths, valid_range, messages)


def note_truths_outside(found: Survey, paths: list[str], valid_range: list[float], messages: list[str]) -> None:
    """Add a line to `messages` if truths are outside the range."""
    if line := outside_line(found.truths, valid_range):
        messages.append(f"{' '.join(paths)!r}: {line}")
