"""The small matrix in the middle of a Nyström factor: W = k(z, z), its Cholesky factor L, and C L⁻ᵀ.

Everything here is differentiable where the library differentiates, and may be traced. What keeps the factor below the
kernel matrix in rounded arithmetic is derived at ``SHIFT``. The shifted form is that of Tropp, Yurtsever, Udell &
Cevher, "Fixed-rank approximation of a positive-semidefinite matrix", NeurIPS 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lowrank._array import (
    Array,
    Namespace,
    arithmetic,
    block_namespace,
    broadcast_shapes,
    cholesky,
    device,
    is_traced,
    solve_triangular,
    stop_gradient,
    to_host,
    widest_real,
)

# Why K − F Fᵀ ≽ 0 up to roundoff. Rounding makes F Lᵀ = C + E, where E holds the errors of the kernel block and the
# backward error of the triangular solve. For a vector a put p = Cᵀa and q = Eᵀa. As [W Cᵀ; C K] ≽ 0, p = W^{1/2}h with
# ‖h‖² ≤ aᵀKa, and with L Lᵀ = W + νI
#
#     aᵀ(F Fᵀ − K)a ≤ max_h ‖L⁻¹(W^{1/2}h + q)‖² − ‖h‖² = ‖q‖²/ν,     so     λ_min(K − F Fᵀ) ≥ −‖E‖²/ν.
#
# An entry of E is at most γ (|F||L|ᵀ), γ a few eps, so that ‖E‖ ~ γ √(‖K‖‖W‖) and the right shift is proportional to
# ‖W‖: ν = c·eps·‖W‖ leaves −(γ²/c·eps²)·eps·‖K‖. Taken is the row-sum norm, between ‖W‖₂ and √m‖W‖₂; tr W, up to
# m‖W‖₂, would be needlessly large for a W near the identity. The error of W itself, and that of its Cholesky factor,
# must stay below ν, hence float64. c is the smallest number that held in measurements (float32 and float64; repeated
# points, constant columns, offsets 50 and 10⁴, tight clusters far apart, lengthscales 10⁻³ to 10³; 100 to 600 points,
# all, half, a tenth of them or means as landmarks): the lowest λ_min(K − F Fᵀ)/(eps·‖K‖) was −46 with c = 10, −21 with
# 20, −2 with 30. With all points as landmarks K − F Fᵀ is then at most 45 to 65 eps·‖K‖.
#
# In the same way the negative eigenvalues of K − F Fᵀ add up to at most ‖E‖_F²/ν, and ‖E‖_F² ≤ γ²‖F‖_F²‖L‖_F²
# ≤ γ² tr K·m‖W‖: (γ²/c·eps²)·m·eps·tr K, which with γ ≤ 5 eps is below m·eps·tr K, the ``roundoff`` of a certificate.
SHIFT = 30.0

# A kernel is the one that L was made from if it gives L Lᵀ up to this many eps·‖W‖: the shift, and what rounding L to
# the precision of the points adds.
_SAME_KERNEL = 100.0


def shifted_cholesky(w: Array, *, eps: float, xp: Namespace) -> Array:
    """L with L Lᵀ = W + νI, in the precision of W, for every matrix of a batch; ν counts as a constant.

    Raises ``ValueError`` where W is not positive semidefinite; in a traced program L is then NaN.
    """
    norm = xp.max(xp.sum(xp.abs(stop_gradient(w)), axis=-1, keepdims=True), axis=-2, keepdims=True)
    # The floor is for W = 0, where F is to be 0 and not 0/0; its root is far from underflow in single precision.
    shift = xp.clip(SHIFT * eps * norm, min=float(np.finfo(np.float32).tiny))
    lower = cholesky(w + shift * xp.eye(w.shape[-1], dtype=w.dtype, device=device(w)), xp)
    if not is_traced(lower) and not bool(xp.all(xp.isfinite(lower))):
        lowest = float(np.linalg.eigvalsh(to_host(w)).min())
        raise ValueError(
            f"the kernel is not positive semidefinite: k(z, z) of the landmarks (shape {tuple(w.shape)}) has the "
            f"eigenvalue {lowest:.3g}, below what rounding explains ({-float(np.max(to_host(shift))):.3g})"
        )
    return lower


def solve_right(lower: Array, c: Array, xp: Namespace) -> Array:
    """C L⁻ᵀ. One L for a whole batch is applied to all its rows at once."""
    shape = (*broadcast_shapes(tuple(c.shape[:-2]), tuple(lower.shape[:-2])), *c.shape[-2:])
    if lower.ndim == 2:
        c = xp.reshape(c, (-1, shape[-1]))
    else:
        c, lower = xp.broadcast_to(c, shape), xp.broadcast_to(lower, (*shape[:-2], *lower.shape[-2:]))
    return xp.reshape(xp.matrix_transpose(solve_triangular(lower, xp.matrix_transpose(c), xp)), shape)


def diagonal(x: Array, kernel: Callable[..., Array] | None, xp: Namespace) -> Array:
    """The diagonal of K, shape (..., n), after checking that it can be one."""
    if kernel is None:
        along = xp.linalg.diagonal(x)
    else:
        each = x[..., :, None, :]
        along = checked_block(kernel(each, each), each, each)[..., 0, 0]
    if not is_traced(along) and bool(xp.any(along < 0)):
        row = first(to_host(along < 0))
        raise ValueError(
            f"a positive semidefinite kernel has no negative diagonal, and k(x, x) of row {row} is "
            f"{float(to_host(along)[row]):.3g}"
        )
    return along


def trace_error(along: Array, factor: Array, xp: Namespace) -> Array:
    """tr(K − F Fᵀ) from the diagonal of K, accumulated in double; terms below zero are rounding and count as zero."""
    wide = widest_real(factor, xp)
    explained = xp.sum(factor * factor, axis=-1, dtype=wide)
    left = xp.clip(xp.astype(along, wide) - explained, min=0.0)
    return xp.astype(xp.sum(left, axis=-1), factor.dtype)


def checked_block(block: Array, x: Array, z: Array) -> Array:
    """k(x, z), after checking that it is a block of finite values, one for each pair."""
    xp = block_namespace(block, x, z)
    if not is_traced(block) and not bool(xp.all(xp.isfinite(block))):
        raise ValueError(
            f"the kernel returned NaN or infinite values for finite points of shapes {tuple(x.shape)} and "
            f"{tuple(z.shape)}"
        )
    return block


def checked_symmetric(w: Array, xp: Namespace) -> Array:
    """W = k(z, z), after checking that it is symmetric.

    The two orders of a pair may differ by rounding, a few eps or a few hundred for kernels of many features; half of
    the digits tell that from a kernel that is not symmetric.
    """
    scale = xp.max(xp.abs(w), axis=(-1, -2), keepdims=True)
    gap = xp.abs(w - xp.matrix_transpose(w))
    if not is_traced(w) and bool(xp.any(gap > math.sqrt(float(xp.finfo(w.dtype).eps)) * scale)):
        values, gaps = to_host(w), to_host(gap / xp.where(scale > 0, scale, xp.ones_like(scale)))
        *batch, i, j = (int(index) for index in np.unravel_index(int(np.argmax(gaps)), gaps.shape))
        raise ValueError(
            f"the kernel is not symmetric: for the landmarks {i} and {j} it is {float(values[(*batch, i, j)]):.6g} one "
            f"way and {float(values[(*batch, j, i)]):.6g} the other"
        )
    return w


def check_same_kernel(kernel: Callable[..., Array], z: Array, lower: Array, xp: Namespace) -> None:
    """Raise ``ValueError`` if k(z, z) is not L Lᵀ up to the shift and the rounding of L."""
    wide = widest_real(z, xp)
    z_wide, exact = xp.astype(z, wide), xp.astype(lower, wide)
    with arithmetic(z_wide):
        w = checked_block(kernel(z_wide, z_wide), z_wide, z_wide)
        off = to_host(xp.max(xp.abs(exact @ xp.matrix_transpose(exact) - w), axis=(-1, -2)))
        norm = to_host(xp.max(xp.sum(xp.abs(w), axis=-1), axis=-1))
    if np.any(off > _SAME_KERNEL * float(xp.finfo(lower.dtype).eps) * norm + np.finfo(np.float32).tiny):
        raise ValueError(
            "the kernel is not the one that the factor was made with: k(z, z) of its landmarks is off by "
            f"{off.max():.3g}"
        )


def checked_finite(x: Array, name: str, xp: Namespace) -> None:
    """Raise ``ValueError`` naming the first row that has NaN or infinite values; nothing is known of a traced array."""
    if is_traced(x):
        return
    rows = xp.all(xp.isfinite(x), axis=-1)
    if not bool(xp.all(rows)):
        bad = to_host(xp.logical_not(rows))
        raise ValueError(
            f"{name} (shape {tuple(x.shape)}) has NaN or infinite values in {int(bad.sum())} rows, the first of them "
            f"row {first(bad)}; remove or replace them"
        )


def first(where: np.ndarray) -> Any:
    """The index of the first True: a number, or a tuple where there are batch axes."""
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(where)), where.shape))
    return index[0] if len(index) == 1 else index
