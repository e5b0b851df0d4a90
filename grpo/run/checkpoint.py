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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
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
from grpo.ranks import any_rank, print_rank0, raise_together

STATE, PROGRESS = "trainer_state", "progress.json"
INDEX = f"{STATE}/.metadata"  # written last: a folder that has it is a whole checkpoint


def checkpoints(output: Path) -> dict[int, Path]:
    """Find the complete checkpoints of a run, by step."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output.glob("checkpoint-*")}
    return {int(match[1]): path for path, match in found.items() if match and (path / INDEX).exists()}


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
    with warnings.catch_warnings(action="ignore"):  # PyTorch warns that the optimizer has not stepped yet
        for _ in range(step):  # replay the scheduler, so that the learning rate is equal to the bit
            schedule.step()
    if folder is None:
        return
    with explained(folder, "read", ": move it away, and resume from the one before"):
        stored = dcp.FileSystemReader(folder / STATE).read_metadata().state_dict_metadata
        for name, parameter in model.named_parameters():
            for key in [key for key in stored if key.startswith(f"optimizer.{name}.")]:  # none before the first update
                size = stored[key].size
                like = parameter.detach() if size == parameter.shape else torch.empty(size, device=parameter.device)
                optimizer.state[parameter][key.rpartition(".")[2]] = torch.zeros_like(like)
        dcp.load(trainer_state(model, optimizer), checkpoint_id=folder / STATE)


def save(config: Config, name: str, files: ModelFiles, state: dict, progress: dict, is_needed: bool) -> bool:
    """Write a checkpoint, or with an empty `state` the final or best model, under `output_dir`; collective.

    files: written by rank 0. If writing fails, earlier folders stay as they are, and all ranks raise InputError or, if
    the checkpoint is not needed, print a line and return False.
    """
    folder = Path(config.output_dir, name)
    unfinished, saving = folder.with_name(f"{name}.unfinished"), explained(folder, "saved")
    try:
        raise_together(saving(write_model), unfinished, files, progress)
        if state:
            if any_rank(not unfinished.is_dir()):
                raise InputError(f"{config.output_dir!r} is another folder on some nodes: name a shared --output_dir")
            raise_together(saving(partial(dcp.save, checkpoint_id=unfinished / STATE)), state)
        raise_together(saving(publish), unfinished, folder, config.save_total_limit)
    except InputError as error:
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        if is_needed:
            raise
        print_rank0(f"{error}: training continues without it")
        return False
    return True


@contextmanager
def explained(folder: Path, what: str, mend: str = "") -> Iterator[None]:
    """Raise InputError about `folder` for anything that fails in here; what: is being done to it."""
    try:
        yield
    # A damaged file or a full disk can fail in any way: OSError, SafetensorError, plain Exception.
    except (Exception, CheckpointException) as error:
        if worker_failure(error):  # PyTorch raises it wherever the main thread is
            raise
        first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        free = f"{shutil.disk_usage(folder.parent).free / 2**30:.2f} GB are free there"
        why = f"{type(first).__name__}: {first_line(first)}; {free}"
        raise InputError(f"{str(folder)!r} cannot be {what} ({why}){mend}") from error


def tidy(output: Path) -> None:
    """Delete what was being saved or removed, also by a run that was killed meanwhile."""
    for path in output.glob("*"):
        if re.fullmatch(r"(final|best)\.removed", path.name) and not path.with_suffix("").exists():
            os.rename(path, path.with_suffix(""))  # killed before the new one had the name
        elif re.fullmatch(r"(checkpoint-\d+|final|best)\.(unfinished|removed)", path.name):
            path.unlink() if path.is_symlink() else shutil.rmtree(path)


def write_model(unfinished: Path, files: ModelFiles, progress: dict) -> None:
    """Write, on rank 0, the model and how far it was trained."""
    if dist.get_rank() != 0:
        return
    tidy(unfinished.parent)
    files.write(unfinished)
    (unfinished / PROGRESS).write_text(json.dumps(progress, indent=2))
    (unfinished / "README.md").write_text(model_card(progress, is_adapter=isinstance(files.model, Adapter)))


def publish(unfinished: Path, folder: Path, save_total_limit: int) -> None:
    """Give, on rank 0, a complete folder its name, and remove the oldest checkpoints beyond the limit (0: none)."""
    if dist.get_rank() != 0:
        return
    fsync([*unfinished.rglob("*"), unfinished])  # a power cut must not leave a name without its contents
    if folder.exists():  # of the same run: the best model so far, or the final one before the run was extended
        os.rename(folder, f"{folder}.removed")
    os.rename(unfinished, folder)
    fsync([folder.parent])
    there = checkpoints(folder.parent)
    with suppress(OSError):  # what remains does no harm, and the next save tries again
        for step in sorted(there)[:-save_total_limit] if save_total_limit else []:
            os.rename(there[step], f"{there[step]}.removed")  # a half-deleted one is never taken for a checkpoint
        tidy(folder.parent)


def fsync(paths: list[Path]) -> None:
    """Flush files and folders to disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if path.is_file():  # some network file systems cannot flush folders
                raise
        finally:
            os.close(descriptor)
