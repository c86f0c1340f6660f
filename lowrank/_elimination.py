"""The inverse of A + ridge·I for Hermitian A ≽ 0 on a CPU, by block elimination: nothing but products.

P = A + ridge·I is halved until its blocks are small. Those are inverted by rank-one updates, a row at a time of all
matrices at once; all else is products of half the size a level. Both are in double precision. What double precision
itself loses is mended by a Newton step of the whole matrix. docs/pinv.md has the analysis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lowrank._accurate import accurate_cost
from lowrank._array import (
    Array,
    Namespace,
    add_product,
    add_to_diagonal,
    device,
    elementwise_product_subtracted,
    is_on_cpu,
    is_traced,
    matrix_transpose_conj,
    real_dtype,
    stacked_product,
    to_host,
    unwrapped,
    writes,
)
from lowrank._definite import apply_accurately
from lowrank._newton import Work, or_nan
from lowrank._schedule import Step

# What gives the rows and columns in two slices of P, scaled, in double precision; blocks of the diagonal in memory of
# their own.
Part = Callable[[slice, slice], Array]

# Blocks of this order and below are not divided, and nothing more often than this: a smaller product takes no less time
# than the call for it, and a fifth level has a few per cent of the products left to save.
_SMALLEST, _MOST_LEVELS = 16, 4
# Numbers in a chunk of the batch: calls for small blocks cost more than what they no longer find in the cache.
CHUNK = 1 << 20
# Multiplications in a product of all matrices, below which an inverse that need not be exact takes less time otherwise.
_FEWEST = 1 << 23
# After elimination in double precision, whose residual of κ²·eps/10 this squares.
_LAST = Step(1.0, (1.0, 1.0))
# Above these tr P/ridge ≥ κ that residual would show: in single precision, and after the last step.
_LARGEST = {"float32": 2.0**24, "float64": 2.0**20}
# No pivot is below the smallest eigenvalue of P. One that is, by as much as this, shows that A is not as declared.
_SLACK = 8.0


def applies(a: Array, *, ridge: float, tol: float | None = None, xp: Namespace) -> bool:
    """Whether A is on a CPU, can be looked at and written beside, and no κ is too large; and whether it is faster than
    what stops at ``tol``."""
    if is_traced(a) or not writes(a) or not is_on_cpu(a):
        return False
    n, largest = a.shape[-1], _LARGEST["float32" if real_dtype(a, xp) == xp.float32 else "float64"]
    if tol is not None and math.prod(a.shape) * n < _FEWEST:
        return False
    mean = to_host(xp.sum(xp.real(xp.linalg.diagonal(a)) / n, axis=-1))
    with np.errstate(all="ignore"):
        return bool(np.all(n * (mean / ridge + 1) <= largest, where=np.isfinite(mean)))


def inverse(a: Array, *, ridge: float, xp: Namespace) -> tuple[Array, Work]:
    """(A + ridge·I)⁻¹ for Hermitian A ≽ 0, itself Hermitian to the last bit, as ``_definite.scaled_newton`` has it.

    Where A is not as declared, some pivot is not positive, and the result is NaN.
    """
    n = a.shape[-1]
    matrices = xp.reshape(a, (-1, n, n))
    single = real_dtype(a, xp) == xp.float32
    wide = xp.complex128 if xp.isdtype(a.dtype, "complex floating") else xp.float64
    levels = min(_MOST_LEVELS, max(0, math.ceil(math.log2(n / _SMALLEST))))
    # The power of two next to 1/tr P at its largest, by which multiplication is exact: no entry of P is above 1.
    scale = 2.0 ** min(-math.frexp(ridge)[1] - math.log2(_LARGEST["float32"]), 1000.0)

    def part(rows: slice, columns: slice) -> Array:
        values = xp.astype(matrices[:, rows, columns], wide)
        values *= scale
        return add_to_diagonal(values, ridge * scale, xp) if rows == columns else values

    x, pivots = (_rounded if single else _polished)(part, scale, matrices, levels, xp)
    valid = xp.all((pivots > 0.5) & (pivots <= _SLACK / (ridge * scale)), axis=0)
    valid = xp.reshape(valid, a.shape[:-2])
    products = _products(n, levels) + (0 if single else (accurate_cost(a, xp) + 1) * n**3)
    zero = xp.zeros(a.shape[:-2], dtype=real_dtype(a, xp), device=device(a))
    work = Work(zero + (0.0 if single else 1.0), zero + float(math.ceil(products / n**3)), zero, zero, valid)
    return or_nan(valid, xp.reshape(x, a.shape), xp), work


def _rounded(part: Part, scale: float, a: Array, levels: int, xp: Namespace) -> tuple[Array, Array]:
    """The inverse in single precision, to which nothing is rounded before the last of what cancels."""
    n, h = a.shape[-1], a.shape[-1] // 2
    if levels == 0:
        y, pivots = _swept(part(slice(0, n), slice(0, n)), xp)
        x = xp.empty(a.shape, dtype=a.dtype, device=device(a))
        diagonal = [(x, y)]
    else:
        left, w, right, pivots = _divided(part, n, levels, a.dtype, xp)
        left, below = _joined(left, w, right, xp)
        x = xp.empty(a.shape, dtype=a.dtype, device=device(a))
        diagonal = [(x[:, :h, :h], left), (x[:, h:, h:], right)]
        xp.multiply(below, -scale, out=x[:, h:, :h])
        xp.multiply(matrix_transpose_conj(below, xp), -scale, out=x[:, :h, h:])
    for block, y in diagonal:
        y *= -0.5 * scale
        xp.add(y, matrix_transpose_conj(y, xp), out=block)
    return x, pivots


def _polished(part: Part, scale: float, a: Array, levels: int, xp: Namespace) -> tuple[Array, Array]:
    """The inverse in double precision, with a step from an accurate E after elimination."""
    n = a.shape[-1]
    p = part(slice(0, n), slice(0, n))
    x, pivots = _negative_inverse(xp.asarray(p, copy=True), levels, xp)
    x = apply_accurately(_LAST, xp.negative(x, out=x), p, xp)
    x = x + matrix_transpose_conj(x, xp)
    x *= 0.5 * scale
    return x, pivots


def _negative_inverse(p: Array, levels: int, xp: Namespace) -> tuple[Array, Array]:
    """−P⁻¹, in the memory of P, and the reciprocals of the pivots, of shape (n, batch)."""
    if levels == 0:
        return _swept(p, xp)
    n, h = p.shape[-1], p.shape[-1] // 2
    left, w, right, pivots = _divided(
        lambda i, j: xp.asarray(p[:, i, j], copy=True) if i == j else p[:, i, j], n, levels, p.dtype, xp
    )
    left, below = _joined(left, w, right, xp)
    p[:, :h, :h] = left
    p[:, h:, :h] = below
    p[:, :h, h:] = matrix_transpose_conj(below, xp)
    p[:, h:, h:] = right
    return p, pivots


def _divided(part: Part, n: int, levels: int, dtype: Any, xp: Namespace) -> tuple[Array, Array, Array, Array]:
    """L = −B⁻¹, W = CL and R = −S⁻¹, S = D + WCᴴ, of P = [[B, Cᴴ], [C, D]] of order n, and the reciprocals of pivots.

    What is returned of ``dtype`` is so as soon as nothing is left that cancels: memory that a library gives back to
    the system at the end of every call costs as much as the products.
    """
    first, second = slice(0, n // 2), slice(n // 2, n)
    left, upper = _negative_inverse(part(first, first), levels - 1, xp)
    c = part(second, first)
    w = stacked_product(c, left, xp)
    left = xp.astype(left, dtype, copy=False)
    s = part(second, second)
    s = add_product(s, w, matrix_transpose_conj(c, xp), xp, out=s)
    del c
    w = xp.astype(w, dtype, copy=False)
    right, lower = _negative_inverse(s, levels - 1, xp)
    del s
    return left, w, xp.astype(right, dtype, copy=False), xp.concat([upper, lower])


def _joined(left: Array, w: Array, right: Array, xp: Namespace) -> tuple[Array, Array]:
    """The blocks of [[L + WᴴRW, WᴴR], [RW, R]] = −P⁻¹ that have to be computed, the first in the memory of L."""
    below = stacked_product(right, w, xp)
    return add_product(left, matrix_transpose_conj(w, xp), below, xp, out=left), below


def _swept(p: Array, xp: Namespace) -> tuple[Array, Array]:
    """−P⁻¹, in the memory of P, and the reciprocals of the pivots d, by the sweep operator (J. H. Goodnight, Amer.
    Statist. 33, 1979), with the matrices of the batch along the last axis.

    Row k, with 1 taken from its pivot, is w, and P ← P − wᴴw/d turns row and column k into w/d and the pivot into
    2 − 1/d; all pivots are 1 at the most.
    """
    n = p.shape[-1]
    q = xp.empty((n, n, p.shape[0]), dtype=p.dtype, device=device(p))
    q[...] = xp.permute_dims(p, (1, 2, 0))
    complex_ = xp.isdtype(p.dtype, "complex floating")
    units = xp.eye(n, dtype=p.dtype, device=device(p))[:, :, None]
    w, swept = xp.empty_like(q[0]), xp.empty_like(q)
    column = w[:, None]
    library, subtract = unwrapped(xp), elementwise_product_subtracted(q)
    for row, pivot, unit, out in zip(list(q), list(xp.real(_pivots(q, xp))), list(units), list(swept), strict=True):
        library.subtract(row, unit, out=w)
        library.divide(w, pivot, out=out)
        subtract(xp.conj(column) if complex_ else column, out)
    reciprocals = 1 - xp.real(_pivots(swept, xp))
    p[...] = add_to_diagonal(xp.permute_dims(q, (2, 0, 1)), -2.0, xp)
    return p, reciprocals


def _pivots(q: Array, xp: Namespace) -> Array:
    """The diagonals of matrices along the last axis, a view of shape (n, batch)."""
    return xp.permute_dims(xp.linalg.diagonal(xp.permute_dims(q, (2, 0, 1))), (1, 0))


def _products(n: int, levels: int) -> float:
    """Multiplications per matrix."""
    if levels == 0:
        return n**3
    return _products(n // 2, levels - 1) + _products(n - n // 2, levels - 1) + 4 * (n / 2) ** 3
