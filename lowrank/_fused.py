"""The choice between the plain path and a fused GPU kernel, and the way to the kernel.

On a GPU the plain path of ``_definite.scaled_newton`` is a few dozen launches, each of which reads and writes the whole
batch; the kernel is one launch, of one program per matrix. What it computes is in ``_fused_kernels``, which needs torch
and Triton and is imported here, when it is wanted; CuPy arrays reach it through DLPack.
"""

from __future__ import annotations

import math

import array_api_compat as compat

from lowrank._array import Array, Namespace
from lowrank._newton import Work

# A tile of 128² and its operands are what the registers of one program hold.
_LARGEST = 128
# A matrix occupies one multiprocessor of many: with fewer matrices than this nearly all of the GPU would be idle.
_FEWEST = 8


def applies(a: Array, *, ridge: float, xp: Namespace) -> bool:
    """Whether :func:`scaled_newton` takes a: real float32 matrices of order 1 to 128, a handful or more of them, with a
    ridge, as a torch or CuPy array on a CUDA device, and torch and Triton are installed."""
    if not (compat.is_torch_array(a) and a.device.type == "cuda") and not compat.is_cupy_array(a):
        return False
    *batch, m, n = a.shape
    if not (ridge > 0 and a.dtype == xp.float32 and m == n and 1 <= n <= _LARGEST and math.prod(batch) >= _FEWEST):
        return False
    try:
        from lowrank import _fused_kernels  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def scaled_newton(a: Array, *, ridge: float, xp: Namespace) -> tuple[Array, Work]:
    """(A + ridge·I)⁻¹ for symmetric A ≽ 0 by the kernel, with the contract of ``_definite.scaled_newton``.

    No eigenvector is deflated, and every matrix takes its own number of steps, of order 2. There is no derivative.
    """
    from lowrank import _fused_kernels

    if compat.is_torch_array(a):
        x, figures = _fused_kernels.scaled_newton(a, ridge)
    else:
        import torch

        x, figures = (xp.from_dlpack(t) for t in _fused_kernels.scaled_newton(torch.from_dlpack(a), ridge))
    steps, products, bound, valid = (figures[..., k] for k in range(4))
    return x, Work(steps, products, bound, xp.zeros_like(bound), valid > 0)
