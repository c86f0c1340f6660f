"""The Gram matrix of landmarks and an approximate inverse of it, of torch tensors on a CPU by compiled kernels.

A few dozen landmarks make matrices for which a library's call takes as long as its work; here all of a matrix's steps,
which are those of ``_definite``, are one call, in one core's nearest caches.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from lowrank import _native
from lowrank._definite import approximate_steps, probes

# Landmarks: the matrices of more do not fit the nearer caches.
MOST_LANDMARKS = 128


class Task(ctypes.Structure):
    """``struct core``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("elements", "m", "d", "count", "probed")),
        *((name, ctypes.c_void_p) for name in ("z", "steps", "probes", "system", "core")),
        *((name, ctypes.c_float) for name in ("ridge", "scale", "most")),
    )


def applies(z: Tensor, ridge: float) -> bool:
    """Whether they are float32, some and not too many, and a matrix that is all ridge has an inverse."""
    known = z.dtype == torch.float32 and 0 < z.shape[-2] <= MOST_LANDMARKS and z.numel() > 0
    return known and ridge * torch.finfo(z.dtype).max >= 1 and _native.serve(z)


def gram_core(z: Tensor, ridge: float, *, upper: float, tol: float) -> tuple[Tensor, Tensor]:
    """M and P = k(z, z) + ridge·I for z (..., m, d) near the origin and ‖k(z, z)‖ ≤ upper: ‖I − MP‖ ≤ tol, or M is NaN
    where P is not as definite as the ridge makes it."""
    *batch, m, d = z.shape
    z = z.resolve_neg().contiguous()
    scale, steps, tried, most = _numbers(m, ridge, upper, tol)
    core, system = (z.new_empty(*batch, m, m) for _ in range(2))
    task = Task(elements=z.numel() // (m * d), m=m, d=d, count=len(steps), probed=len(tried))
    task.ridge, task.scale, task.most = ridge, scale, most
    for name, x in {"z": z, "steps": steps, "probes": tried, "system": system, "core": core}.items():
        setattr(task, name, x.data_ptr())
    _native.run("lowrank_core", task, 0)
    return core, system


@functools.lru_cache(maxsize=16)
def _numbers(m: int, ridge: float, upper: float, tol: float) -> tuple[float, Tensor, Tensor, float]:
    steps = approximate_steps(ridge, upper, tol)
    tried, most = probes(m, steps.tol)
    powers = [(*step, 0.0)[:3] for step in steps.powers]
    return steps.scale, torch.tensor(powers), torch.tensor(tried, dtype=torch.float32), most
