"""The process group, and the few collectives that everything uses."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from data.dataset import InputError


def start_processes() -> torch.device:
    """Join the process group that torchrun describes, or make one of a single process; return this rank's device."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
        # It plans anew for every length of a prompt, and keeps the plans. Flash takes its place.
        torch.backends.cuda.enable_cudnn_sdp(False)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    # Ranks wait long for one with the most to sample, or that writes a large model; not for one that died: connections
    # to it break, and torchrun ends the others.
    timeout = timedelta(hours=1)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    return device


def raise_together(function, *arguments):
    """Call a function on every rank; where it raises InputError on any, raise it on all, so that none waits."""
    result, own = None, None
    try:
        result = function(*arguments)
    except InputError as error:
        own = str(error)
    for line in of_all_ranks(own):
        if line is not None:
            raise InputError(line)
    return result


def of_all_ranks(value) -> list:
    """Return the value that each rank has given, on all ranks; collective."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(value):
    """Return rank 0's value on all ranks; collective."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def any_rank(flag: bool) -> bool:
    """Return True on all ranks if `flag` is on any; collective."""
    flags = torch.tensor([int(flag)])
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def end_alone(line: str) -> None:
    """End this rank amid a step, with a line: the others may wait for its part of it, and no word reaches them."""
    print(line, file=sys.stderr, flush=True)
    os._exit(2)  # upon which torchrun ends them


def whole_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor that is sharded, as in `grpo/model/sharding.py`; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def say(*lines: str, file=None) -> None:
    """Let rank 0 print lines, not behind the progress bar; nothing in a line can break it."""
    if int(os.environ.get("RANK", 0)) == 0:  # also before the ranks know each other
        for line in lines:
            tqdm.write(printable(line), file=file)


def printable(text: str) -> str:
    """Keep foreign text within its line of a log: control characters, line breaks and the like become visible."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
