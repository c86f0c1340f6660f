"""Newton's textbook steps of small square matrices and their cotangents, of torch tensors on a CPU by compiled kernels.

All steps of a matrix are one call, in one core's caches, and for the way back none of them is kept.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lowrank import _native

# Rows, and numbers in all iterates of one matrix: what the nearer caches hold.
MOST_ROWS, MOST_NUMBERS = 128, 2**18
STEPS, BACK = range(2)


class Task(ctypes.Structure):
    """``struct newton``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("elements", "m", "count")),
        *((name, ctypes.c_void_p) for name in ("x", "a", "g", "out", "x_bar", "a_bar")),
    )


def applies(x: Tensor, a: Tensor, steps: int) -> bool:
    """Whether they are float32, square, and not too many numbers."""
    m = a.shape[-1]
    known = x.dtype == a.dtype == torch.float32 and x.shape == a.shape and a.shape[-2] == m and 0 < m <= MOST_ROWS
    return known and steps * m * m <= MOST_NUMBERS and a.numel() > 0 and _native.serve(x, a)


def steps(x: Tensor, a: Tensor, count: int) -> Tensor:
    """X ← 2X − XAX, so many times, for X and A (..., m, m)."""
    out = a.new_empty(a.shape)
    _run({"x": x, "a": a}, {"out": out}, STEPS, count)
    return out


def cotangents(x: Tensor, a: Tensor, g: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """X̄ and Ā for the cotangent g of what they lead to."""
    x_bar, a_bar = a.new_empty(a.shape), a.new_empty(a.shape)
    _run({"x": x, "a": a, "g": g}, {"x_bar": x_bar, "a_bar": a_bar}, BACK, count)
    return x_bar, a_bar


def _run(given: dict[str, Tensor], found: dict[str, Tensor], what: int, count: int) -> None:
    m = given["a"].shape[-1]
    task = Task(elements=given["a"].numel() // (m * m), m=m, count=count)
    arrays = {name: _native.packed(y) for name, y in given.items()} | found
    _native.run("lowrank_newton", task, what, arrays)
