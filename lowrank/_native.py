"""The compiled kernels for torch tensors on a CPU: whether there are any, and how they are run.

They are built where there is a C compiler when the package is installed, GCC 12 or Clang; without them torch's own
operations compute the same. What lies between them passes through memory once for each operation, and not for the
kernels, whose small products reach the speed of large ones as well. They run on the threads that torch has: threads
beside them would wait for theirs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

NAME = "lowrank._native_kernels"


@functools.cache
def is_built() -> bool:
    """Whether there was a compiler."""
    return importlib.util.find_spec(NAME) is not None


@functools.cache
def kernels() -> ctypes.CDLL:
    spec = importlib.util.find_spec(NAME)
    if spec is None or spec.origin is None:
        raise ImportError(f"{NAME} was not built when this package was installed")
    return ctypes.CDLL(spec.origin)


@functools.cache
def lanes() -> int:
    """How many floats this processor's vectors hold."""
    return int(kernels().lowrank_lanes())


@functools.cache
def team() -> Callable[..., None] | None:
    """What runs a function on the threads of torch: GNU's OpenMP, as torch was linked with it."""
    return getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)


def serve(*arrays: Tensor) -> bool:
    """Whether there are kernels for torch's threads, the arrays are torch's own on a CPU, and nobody watches what torch
    does, to count or to record it: whoever does would miss what is computed here."""
    if not is_built() or _get_current_dispatch_mode() is not None:
        return False
    on_cpu = all(x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter) for x in arrays)
    return on_cpu and (team() is not None or torch.get_num_threads() == 1)


def packed(x: Tensor) -> Tensor:
    """x with its numbers in a row in memory, as they are."""
    return x.resolve_neg().contiguous()


def run(name: str, task: ctypes.Structure, what: int, arrays: dict[str, Tensor] | None = None) -> None:
    """The function of that name of the kernels, on the threads of torch, the task pointing to ``arrays`` too."""
    for field, x in (arrays or {}).items():
        setattr(task, field, x.data_ptr())
    threads = torch.get_num_threads()
    together = team() if threads > 1 else None
    if getattr(kernels(), name)(ctypes.byref(task), what, lanes(), ctypes.c_long(threads), together):
        raise MemoryError(f"no memory for what {name} makes of {_sizes(task)}")


def _sizes(task: ctypes.Structure) -> str:
    return ", ".join(f"{name}={getattr(task, name)}" for name, kind, *_ in task._fields_ if kind is ctypes.c_int64)
