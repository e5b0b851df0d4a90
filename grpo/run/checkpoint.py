"""Save a run and bring it back, to the bit.

    checkpoint-N/           appears under its name when all of it, from all ranks, is on disk
        model.safetensors…  an ordinary Hugging Face (or PEFT) folder
        trainer_state/      what is trained, in float32, and the optimizer's state: torch's DCP
        progress.json       the step, the flags, the data's fingerprint, what was counted

Nothing else decides how a run goes on: the order of the data, sampling and dropout are functions of (seed, step), and
the learning rate is one of the step. Frozen weights come from --model_id.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from data.dataset import InputError, first_line
from grpo.config import Config
from grpo.model.load import write_model
from grpo.ranks import raise_together, say

STATE, PROGRESS = "trainer_state", "progress.json"


def checkpoints(output: Path) -> dict[int, Path]:
    """Find the whole checkpoints of a run, by step."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output.glob("checkpoint-*")}
    return {int(match[1]): path for path, match in found.items() if match and (path / STATE / ".metadata").exists()}


def trainer_state(model, optimizer) -> dict[str, Tensor]:
    """Return the trained weights and the optimizer's state, sharded as they are, under names of their own."""
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state[f"model.{name}"] = parameter.detach()
            state |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return state


def load(folder: Path | None, step: int, model, optimizer, schedule) -> None:
    """Bring weights, optimizer and schedule to where they were after `step` steps, in place; collective.

    folder: the checkpoint, of any number of ranks; None at step 0. Raises InputError, on all ranks, if it is broken.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer has not moved yet
        for _ in range(step):  # the very products of the run so far, so that the learning rates are equal to the bit
            schedule.step()
    if folder is None:
        return
    try:
        stored = dcp.FileSystemReader(folder / STATE).read_metadata().state_dict_metadata
        for name, parameter in model.named_parameters():
            for key in [key for key in stored if key.startswith(f"optimizer.{name}.")]:  # none before the first update
                size = stored[key].size
                empty = (
                    torch.zeros_like(parameter)
                    if size == parameter.shape
                    else torch.zeros(size, device=parameter.device)
                )
                optimizer.state[parameter][key.rpartition(".")[2]] = empty.detach()
        dcp.load(trainer_state(model, optimizer), checkpoint_id=folder / STATE)
    except (Exception, CheckpointException) as error:  # what is damaged fails in every way that unpickling can
        raise InputError(
            f"{str(folder)!r} cannot be read ({reason(error)}): move it away, and resume from the one before"
        ) from error


def save(config: Config, name: str, model_parts: tuple, state: dict, progress: dict, is_needed: bool) -> None:
    """Write a checkpoint, or with an empty `state` the final model, under `output_dir`; collective.

    model_parts: what `write_model` takes, used on rank 0. If the disk does not take it, what was there before is as it
    was, and all ranks raise InputError; or go on with a line, if it is not needed.
    """
    folder = Path(config.output_dir, name)
    unfinished = folder.with_name(f"{name}.unfinished")

    def begin() -> None:
        for path in folder.parent.glob("*"):  # of a run that was killed while saving or removing
            if re.fullmatch(r"(checkpoint-\d+|final)\.(unfinished|removed)", path.name):
                delete(path)
        write_model(*model_parts, unfinished)
        (unfinished / PROGRESS).write_text(json.dumps(progress, indent=2))

    def finish() -> None:
        write_through(unfinished)  # a power cut must not leave a name without its contents
        if folder.exists():  # of the same run, before it was extended
            remove(folder)
        os.rename(unfinished, folder)
        write_through(folder.parent, files=False)
        prune(folder.parent, config.save_total_limit)

    try:
        on_rank_0(begin, folder)
        if state:
            raise_together(check_shared, unfinished)
            try:
                dcp.save(state, checkpoint_id=unfinished / STATE)
            except CheckpointException as error:  # on all ranks
                raise InputError(cannot_save(folder, error)) from error
        on_rank_0(finish, folder)
    except InputError as error:
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        if is_needed:
            raise
        say(f"{error}: training goes on without it")


def on_rank_0(function: Callable[[], None], folder: Path) -> None:
    """Let rank 0 do something about `folder` while the others wait; raise InputError on all ranks if it fails."""

    def attempt() -> None:
        try:
            if dist.get_rank() == 0:
                function()
        except Exception as error:  # a full disk: OSError here, SafetensorError there, and a plain Exception elsewhere
            raise InputError(cannot_save(folder, error)) from error

    raise_together(attempt)


def check_shared(folder: Path) -> None:
    """Raise InputError if rank 0 has made a folder that this rank does not see: its shards would be elsewhere."""
    if not folder.is_dir():
        raise InputError(f"{str(folder.parent)!r} is not the same folder on all nodes: name a shared --output_dir")


def cannot_save(folder: Path, error: BaseException) -> str:
    """Say that and why, with the space that is left, since libraries word a full disk in many ways."""
    free = shutil.disk_usage(folder.parent).free / 2**30
    return f"{str(folder)!r} cannot be saved ({reason(error)}; {free:.2f} GB are free there)"


def reason(error: BaseException) -> str:
    """Say in a line what was wrong, on the first rank that failed."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {first_line(error)}"


def write_through(folder: Path, files: bool = True) -> None:
    """Wait until the disk holds a folder's entries, and its files and those of the folders below."""
    for path in [*(folder.rglob("*") if files else []), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if path.is_file():  # for folders, some network file systems cannot
                raise
        finally:
            os.close(descriptor)


def prune(output: Path, limit: int) -> None:
    """Remove the oldest checkpoints beyond `limit`; 0: none."""
    there = checkpoints(output)
    for step in sorted(there)[:-limit] if limit else []:
        with suppress(OSError):  # the next one to be saved tries again
            remove(there[step])


def remove(folder: Path) -> None:
    """Delete a folder, which first loses its name, lest half of it be taken for a checkpoint."""
    gone = folder.with_name(f"{folder.name}.removed")
    os.rename(folder, gone)
    with suppress(OSError):  # nobody looks at the rest
        delete(gone)


def delete(folder: Path) -> None:
    """Delete a folder; where it is a link to one elsewhere, the link alone."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)
