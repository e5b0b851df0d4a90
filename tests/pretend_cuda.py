"""A CUDA device that is not there: tensors that say `cuda:0` and compute on the CPU, for tests without a GPU.

    with pretended() as gpu:
        train.main(flags)       # runs what stands behind `device.type == "cuda"`
    gpu.waits                   # where the host had to wait for the GPU, and how often

A `Pretend` wraps a CPU tensor, and `PretendCuda` sees every operator on it, those of the backward pass and of FSDP
included. It refuses what CUDA refuses: tensors of two devices, products that CUDA has no kernel for, and in a capture
whatever makes the host wait, and random numbers. A CUDA graph is a tape: a replay runs the same operators on the same
memory with the same Python numbers, so that one which reads freed memory is found here, too. Ranks talk through gloo in
place of NCCL, and give up after `COLLECTIVE_SECONDS`.

What it cannot know: kernels, their speed and their rounding; streams and races between them; memory and its limits;
NCCL; on which device a generator draws; that a capture computes nothing (here its operators also run). It leans on
private parts of the torch that is pinned, and with another one its tests are skipped.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.conftest import ROOT

PINNED = next(line for line in (ROOT / "requirements.txt").read_text().split() if line.startswith("torch=="))
if torch.__version__.partition("+")[0] != PINNED.removeprefix("torch==") or torch.cuda.is_available():
    pytest.skip(f"the pretended GPU is for {PINNED}, and for machines without one", allow_module_level=True)

COLLECTIVE_SECONDS = 60
# Operators whose results the host waits for.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"copy_", "_to_copy"}


class Hooks(torch._C._acc.PrivateUse1Hooks):
    """For C++ the device is a foreign one, since a build for CPUs has no CUDA; outside of `pretended` there is none."""

    def is_available(self) -> bool:
        return torch.cuda.is_available()

    def has_primary_context(self, index: int) -> bool:
        return True


_setup_privateuseone_for_python_backend("pretend", torch.cuda, Hooks())


class Pretend(Tensor):
    """A tensor on the GPU that is not there; `values` is the CPU tensor behind it."""

    @staticmethod
    def __new__(cls, values: Tensor):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        return Tensor._make_wrapper_subclass(cls, values.size(), **layout, device="pretend:0")

    def __init__(self, values: Tensor):
        self.values = values

    device = property(lambda self: PretendCuda.current.device)
    is_cuda = property(lambda self: True)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        Tensor.data.__set__(self, new)
        self.values = new.values

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def untyped_storage(self):
        return self.values.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict) -> Tensor:
        new = Pretend(self.values.clone())
        memo[id(self)] = new = torch.nn.Parameter(new, self.requires_grad) if hasattr(self, "_is_param") else new
        return new

    def __repr__(self, **_) -> str:
        return f"Pretend({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendCuda.current.__torch_dispatch__(func, types, args, kwargs)


class Generator(torch.Generator):
    """A generator that says it is the GPU's."""

    def __new__(cls, device=None):
        return super().__new__(cls)

    device = property(lambda self: PretendCuda.current.device)


def mapped(function, kind, tree):
    """Apply a function to everything of a kind in nested lists, tuples and dictionaries."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, dict):
        return {name: mapped(function, kind, value) for name, value in tree.items()}
    return type(tree)(mapped(function, kind, part) for part in tree) if type(tree) in (list, tuple) else tree


def tensors_in(tree) -> list[Tensor]:
    found = []
    mapped(found.append, Tensor, tree)
    return found


class Graph:
    """A CUDA graph: the operators of a capture, and the memory that they allocated."""

    def __init__(self):
        self.tape = []  # (operator, arguments, results)

    def record(self, func, args: tuple, kwargs: dict, results: list[Tensor]) -> None:
        own = {id(tensor) for *_, before in self.tape for tensor in before}
        # A graph keeps alive what it allocates, not what it was given.
        arguments = mapped(lambda x: x if id(x) in own else weakref.ref(x), Tensor, (args, kwargs))
        self.tape.append((func, arguments, results))

    def replay(self) -> None:
        for func, arguments, results in self.tape:
            args, kwargs = mapped(still_there, weakref.ref, arguments)
            for old, new in zip(results, tensors_in(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


def still_there(reference: weakref.ref) -> Tensor:
    tensor = reference()
    if tensor is None:
        raise RuntimeError("the graph reads memory that was freed")
    return tensor


class WithIndex(TorchFunctionMode):
    """Gives `cuda` its index, for which C++ would ask CUDA."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.device:
            args, kwargs = mapped(self.with_index, (torch.device, str), (args, kwargs))
        return func(*args, **kwargs or {})

    @staticmethod
    def with_index(x: torch.device | str) -> torch.device | str:
        return PretendCuda.current.device if x in ("cuda", torch.device("cuda")) else x


class PretendCuda(TorchDispatchMode):
    """While it is active there is a GPU; `pretended` enters it."""

    current = None

    def __init__(self, rank: int):
        super().__init__()
        self.device, self.graph = torch.device("cuda", rank), None
        self.waits = Counter()  # (what, file and line) -> times

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = tensors_in((args, kwargs))
        if any(isinstance(x, DTensor) for x in tensors):
            return NotImplemented  # its own dispatch comes first, and calls this one for the shards
        on_gpu = [x for x in tensors if isinstance(x, Pretend)]
        on_cpu = [x for x in tensors if not isinstance(x, Pretend)]
        wanted = kwargs.get("device")
        to_gpu = bool(on_gpu) if wanted is None else torch.device(wanted).type in ("cuda", "pretend")
        if not on_gpu and not to_gpu:
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        self.refuse(func, name, on_gpu, on_cpu, args)
        if what := self.wait_of(name, on_gpu, on_cpu, to_gpu, args, kwargs):
            self.waits[what, place()] += 1
        if self.graph is not None and (what or torch.Tag.nondeterministic_seeded in func.tags):
            raise RuntimeError(f"in a capture: {what or 'random numbers'} ({name}, {place()})")

        if wanted is not None:
            kwargs["device"] = "cpu"
        args, kwargs = mapped(lambda x: x.values, Pretend, (args, kwargs))
        run = product if name in ("mm", "bmm") and len(args) == 3 else func
        out = run(*args, **kwargs)
        if self.graph is not None:
            self.graph.record(run, args, kwargs, tensors_in(out))
        known = {id(x.values): x for x in on_gpu} | {id(x): x for x in on_cpu}

        def result(x: Tensor) -> Tensor:
            if id(x) in known:  # it was computed in place
                return known[id(x)]
            return Pretend(x) if to_gpu else x

        return mapped(result, Tensor, out)

    def refuse(self, func, name: str, on_gpu: list, on_cpu: list, args: tuple) -> None:
        """Raise RuntimeError for what CUDA refuses."""
        written = args[0] if name.endswith("_") and args else None
        # A single number on the CPU may take part in element-wise operators, unless it is to be written.
        others = [x for x in on_cpu if x.ndim or x is written or torch.Tag.pointwise not in func.tags]
        if on_gpu and others and name not in COPIES | INDEXING:
            raise RuntimeError(
                f"{name}: tensors on {self.device} and the CPU {[tuple(x.shape) for x in others]}, {place()}"
            )

    def wait_of(self, name: str, on_gpu: list, on_cpu: list, to_gpu: bool, args: tuple, kwargs: dict) -> str:
        """Say why the host waits for this operator; nothing if it does not."""
        if name in WAITS:
            return name
        if name in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool for index in indices):
                return "a boolean index"
            return "an index on the CPU" if any(not isinstance(index, Pretend) for index in indices) else ""
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            return "repeat_interleave without output_size"
        if name in COPIES:
            if not to_gpu or (name == "copy_" and not isinstance(args[0], Pretend)):
                return "a copy to the CPU"
            is_asynchronous = kwargs.get("non_blocking") or args[2:3] == (True,)
            return "a copy to the GPU" if on_cpu and not is_asynchronous else ""
        return ""

    def synchronize(self, *_) -> None:
        self.waits["synchronize", place()] += 1

    @contextmanager
    def capture(self, graph: Graph, **_) -> Iterator[None]:
        self.graph = graph
        try:
            yield
        finally:
            self.graph = None


def product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Multiply matrices into another dtype, for which the CPU has no kernel."""
    if not a.dtype == b.dtype == torch.bfloat16 or out_dtype != torch.float32:
        raise RuntimeError(f"a product of {a.dtype} and {b.dtype} in {out_dtype}")
    return a.float() @ b.float()


def place() -> str:
    """Name the line of the project that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT)) and file != __file__:
            return f"{file.removeprefix(str(ROOT))[1:]}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"


def without_average(collective):
    """Average by a sum and a division, since gloo has no average."""

    def call(tensor: Tensor, *args, op=dist.ReduceOp.SUM, **kwargs):
        if op != dist.ReduceOp.AVG:
            return collective(tensor, *args, op=op, **kwargs)
        collective(tensor, *args, op=dist.ReduceOp.SUM, **kwargs | {"async_op": False})
        tensor.div_(dist.get_world_size(kwargs.get("group")))
        return None

    return call


@contextmanager
def pretended(rank: int = 0, timeout: float = COLLECTIVE_SECONDS) -> Iterator[PretendCuda]:
    """Be the process of GPU `rank` of eight, and leave its process group; timeout: of collectives, in seconds."""
    gpu = PretendCuda.current = PretendCuda(rank)
    start_gloo, timeout = dist.init_process_group, timedelta(seconds=timeout)
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132, major=9, minor=0)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 8,
            "current_device": lambda: rank,
            "set_device": lambda device: None,
            "get_device_name": lambda *_: properties.name,
            "get_device_capability": lambda *_: (properties.major, properties.minor),
            "get_device_properties": lambda *_: properties,
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda: None,
            "max_memory_allocated": lambda *_: 2**30,
            "synchronize": gpu.synchronize,
            "Event": MagicMock,
            "Stream": MagicMock,
            "current_stream": MagicMock(),
            "stream": nullcontext,
            "CUDAGraph": Graph,
            "graph": gpu.capture,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(DTensor, "device", property(lambda self: self._local_tensor.device))
        patch.setattr(
            dist, "init_process_group", lambda backend, **more: start_gloo("gloo", **more | {"timeout": timeout})
        )
        for collective in (dist.all_reduce, dist.reduce_scatter_tensor):
            patch.setattr(dist, collective.__name__, without_average(collective))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) begins on the CPU, and copies
        try:
            with gpu, WithIndex():
                yield gpu
        finally:
            if dist.is_initialized():  # the run has failed
                dist.destroy_process_group()
            torch._C._set_only_lift_cpu_tensors(False)
