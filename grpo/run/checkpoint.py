"""Save a run and restore it, to the bit.

    checkpoint-N/           gets its name once everything, from all ranks, is on disk
        model.safetensors…  an ordinary Hugging Face (or PEFT) folder, with a model card in README.md
        trainer_state/      trained weights in float32 and the optimizer's state: torch.distributed.checkpoint (DCP)
        progress.json       the step, the flags, the data's fingerprint, counts

Nothing else decides how a run continues: the order of the data, sampling and dropout are functions of (seed, step), the
learning rate is one of the step, and frozen weights come from --model_id.
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

from data.loader import worker_failure
from data.sample import InputError, first_line
from grpo.config import Config
from grpo.model.card import model_card
from grpo.model.load import ModelFiles
from grpo.model.lora import Adapter
from grpo.ranks import print_rank0, raise_together

STATE, PROGRESS = "trainer_state", "progress.json"


def checkpoints(output: Path) -> dict[int, Path]:
    """Find the complete checkpoints of a run, by step."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output.glob("checkpoint-*")}
    return {int(match[1]): path for path, match in found.items() if match and (path / STATE / ".metadata").exists()}


def trainer_state(model, optimizer) -> dict[str, Tensor]:
    """Return the trained weights and the optimizer's state, still sharded, by name."""
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state[f"model.{name}"] = parameter.detach()
            state |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return state


def load(folder: Path | None, step: int, model, optimizer, schedule) -> None:
    """Restore weights, optimizer and schedule as they were after `step` steps, in place; collective.

    folder: the checkpoint, of any number of ranks; None at step 0. Raises InputError, on all ranks, if it is broken.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that the optimizer has not stepped yet
        for _ in range(step):  # replay the scheduler, so that the learning rate is equal to the bit
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
    except (Exception, CheckpointException) as error:  # a damaged file can fail in any way that unpickling can
        raise InputError(
            f"{str(folder)!r} cannot be read ({reason(error)}): move it away, and resume from the one before"
        ) from error


def save(config: Config, name: str, files: ModelFiles, state: dict, progress: dict, is_needed: bool) -> bool:
    """Write a checkpoint, or with an empty `state` the final or best model, under `output_dir`; collective.

    files: written by rank 0. If writing fails, earlier folders stay as they are, and all ranks raise InputError or, if
    the checkpoint is not needed, print a line and return False.
    """
    folder = Path(config.output_dir, name)
    unfinished = folder.with_name(f"{name}.unfinished")

    def begin() -> None:
        """Clear away what a killed run has left, and write what rank 0 alone writes."""
        for path in folder.parent.glob("*"):  # left by a run that was killed while saving or removing
            if re.fullmatch(r"(final|best)\.removed", path.name) and not path.with_suffix("").exists():
                os.rename(path, path.with_suffix(""))  # killed before the new one had the name
            elif re.fullmatch(r"(checkpoint-\d+|final|best)\.(unfinished|removed)", path.name):
                delete(path)
        files.write(unfinished)
        (unfinished / PROGRESS).write_text(json.dumps(progress, indent=2))
        (unfinished / "README.md").write_text(model_card(progress, is_adapter=isinstance(files.model, Adapter)))

    def finish() -> None:
        """Give the folder its name, now that it is complete."""
        fsync_tree(unfinished)  # a power cut must not leave a name without its contents
        gone = folder.with_name(f"{name}.removed")
        if folder.exists():  # of the same run: the best model so far, or the final one before the run was extended
            os.rename(folder, gone)
        os.rename(unfinished, folder)
        fsync_tree(folder.parent, files=False)
        with suppress(OSError):  # what remains does no harm
            delete(gone)
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
        print_rank0(f"{error}: training continues without it")
        return False
    return True


def on_rank_0(function: Callable[[], None], folder: Path) -> None:
    """Call `function` on rank 0 while the others wait; raise InputError about `folder` on all ranks if it fails."""

    def attempt() -> None:
        try:
            if dist.get_rank() == 0:
                function()
        except Exception as error:  # for a full disk, libraries raise OSError, SafetensorError and plain Exception
            if worker_failure(error):  # PyTorch raises it wherever the main thread is
                raise
            raise InputError(cannot_save(folder, error)) from error

    raise_together(attempt)


def check_shared(folder: Path) -> None:
    """Raise InputError if this rank does not see the folder that rank 0 has made."""
    if not folder.is_dir():
        raise InputError(f"{str(folder.parent)!r} is not the same folder on all nodes: name a shared --output_dir")


def cannot_save(folder: Path, error: BaseException) -> str:
    """Return a line that says why, with the free space, since libraries word a full disk in many ways."""
    free = shutil.disk_usage(folder.parent).free / 2**30
    return f"{str(folder)!r} cannot be saved ({reason(error)}; {free:.2f} GB are free there)"


def reason(error: BaseException) -> str:
    """Return what went wrong on the first rank that failed, in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {first_line(error)}"


def fsync_tree(folder: Path, files: bool = True) -> None:
    """Flush a folder to disk, by default with all files and folders below it."""
    for path in [*(folder.rglob("*") if files else []), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if path.is_file():  # some network file systems cannot flush folders
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
    """Delete a folder, renamed first, so that a half-deleted one is never taken for a checkpoint."""
    gone = folder.with_name(f"{folder.name}.removed")
    os.rename(folder, gone)
    with suppress(OSError):  # what remains does no harm
        delete(gone)


def delete(folder: Path) -> None:
    """Delete a folder; if it is a symbolic link, only the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)
