"""The process group, and the few collectives that everything uses."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from data.loader import worker_failure
from data.sample import InputError

LAUNCHER_POLL_SECONDS = 5.0
# Long, since ranks wait for the one that samples the longest completions or writes a large model. Nobody waits an hour
# for a rank that died: connections to it break, and torchrun ends the others.
COLLECTIVE_TIMEOUT = timedelta(hours=1)


def start_processes() -> torch.device:
    """Join the process group that torchrun describes, or make one of a single process; return this rank's device."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun
        threading.Thread(target=exit_with_launcher, args=(os.getppid(),), daemon=True).start()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
        # cuDNN's attention makes and keeps a plan for every prompt length. Flash attention takes its place.
        torch.backends.cuda.enable_cudnn_sdp(False)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=COLLECTIVE_TIMEOUT, **alone)
    return device


def exit_with_launcher(launcher: int) -> None:
    """End this process once its parent `launcher` (a process id) is gone: a killed torchrun cannot end its ranks."""
    while os.getppid() == launcher:
        time.sleep(LAUNCHER_POLL_SECONDS)
    with suppress(OSError):  # where it printed to may be gone too
        print(f"torchrun (process {launcher}) is gone: this rank ends", file=sys.stderr, flush=True)
    os._exit(1)


def raise_together(function, *arguments):
    """Call a function on every rank; an InputError on any rank is raised on all of them, so that none is left waiting.

    Collective. Returns the function's result.
    """
    result, own_error = None, None
    try:
        result = function(*arguments)
    except InputError as error:
        own_error = str(error)
    for error in all_gather_object(own_error):
        if error is not None:
            raise InputError(error)
    return result


def all_gather_object(value) -> list:
    """Return the values of all ranks, in their order, on every rank; collective."""
    if dist.get_world_size() == 1:
        return [value]  # without a millisecond of pickling, several times a step
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value):
    """Return rank 0's value on every rank; collective."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def any_rank(flag: bool) -> bool:
    """Return True on every rank if `flag` is True on any; collective."""
    return any(all_gather_object(bool(flag)))


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor if it is sharded; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def exit_code(run: Callable[[], None], program: str, interrupted: str = "interrupted") -> int:
    """Run a program on this rank and leave the process group; return its exit code.

    What the user can fix, an InputError on all ranks together, is one line and 2. interrupted: what Ctrl-C prints.
    """
    code = 0
    try:
        run()
    except InputError as error:
        print_rank0(f"{program}: error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print_rank0(interrupted, file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if line := worker_failure(error):  # on this rank alone
            abort_rank(f"{program}: error: rank {dist.get_rank()}: {line}")
        raise
    if dist.is_initialized():  # after any other error the ranks do not wait for each other
        dist.destroy_process_group()
    return code


def abort_rank(line: str) -> None:
    """Print a line and end this rank in the middle of a step, where the other ranks cannot be told.

    They may be waiting for it in a collective; torchrun ends them when it sees this exit code.
    """
    print(f"\n{line}", file=sys.stderr, flush=True)  # below the progress bar
    os._exit(2)


def print_rank0(*lines: str, file=None) -> None:
    """Print lines on rank 0, above the progress bar; control characters in them are escaped."""
    if int(os.environ.get("RANK", 0)) == 0:  # works before the process group exists
        for line in lines:
            tqdm.write(printable(line), file=file)


def printable(text: str) -> str:
    """Escape control characters and line breaks, so that foreign text stays within one line of a log."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
