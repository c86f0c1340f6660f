"""The Gram matrix of landmarks, and approximate inverses, of torch tensors on a CPU by compiled kernels.

A few dozen landmarks make matrices for which a library's call takes as long as its work; here all of a matrix's steps,
which are those of ``_definite``, are one call, in one core's nearest caches.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from lowrank import _native

# Landmarks: the matrices of more do not fit the nearer caches.
MOST_LANDMARKS = 128
GRAM, INVERT = range(2)


class Task(ctypes.Structure):
    """``struct core``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("elements", "m", "d", "count", "probed")),
        *((name, ctypes.c_void_p) for name in ("z", "centre", "steps", "probes", "a", "system", "inverse", "valid")),
        *((name, ctypes.c_double) for name in ("s", "ridge")),
        *((name, ctypes.c_float) for name in ("scale", "most")),
    )


def applies(x: Tensor) -> bool:
    """Whether it is of landmarks (..., m, d), or matrices (..., m, m), of some m, and not too many, in float32."""
    return x.dtype == torch.float32 and 0 < x.shape[-2] <= MOST_LANDMARKS and x.numel() > 0 and _native.serve(x)


def gram(z: Tensor, centre: Tensor, scale: float, ridge: float) -> tuple[Tensor, Tensor]:
    """A = k(z, z) and, in float64, in which it is computed, P = A + ridge·I, for landmarks z (..., m, d) that become
    (z − centre)·scale, centre (..., 1, d)."""
    *batch, m, d = z.shape
    a, system = (z.new_empty(*batch, m, m, dtype=dtype) for dtype in (torch.float32, torch.float64))
    task = Task(elements=z.numel() // (m * d), m=m, d=d, s=scale, ridge=ridge)
    given = {"z": _native.packed(z), "centre": _native.packed(centre)}
    _native.run("lowrank_core", task, GRAM, given | {"a": a, "system": system})
    return a, system


def inverse(
    a: Tensor, ridge: float, *, scale: float, powers: np.ndarray, probes: np.ndarray, most: float
) -> tuple[Tensor, Tensor]:
    """X ≈ (A + ridge·I)⁻¹ for A (..., m, m) by the steps of ``_definite``, their powers (steps, 3), and whether what
    becomes of the rows ``probes`` by X and then A + ridge·I is off by no more than ``most``."""
    m, x, valid = a.shape[-1], a.new_empty(a.shape), a.new_empty(a.shape[:-2], dtype=torch.bool)
    task = Task(elements=a.numel() // (m * m), m=m, count=len(powers), probed=len(probes))
    task.ridge, task.scale, task.most = ridge, scale, most
    task.steps, task.probes = powers.ctypes.data, probes.ctypes.data
    _native.run("lowrank_core", task, INVERT, {"a": _native.packed(a), "inverse": x, "valid": valid})
    return x, valid
