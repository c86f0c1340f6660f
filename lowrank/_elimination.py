"""The inverse of A + ridge·I for Hermitian A ≽ 0 on a CPU, by block elimination: nothing but products.

P = A + ridge·I is halved until its blocks are small. Those are inverted by rank-one updates, a row at a time of all
matrices at once; all else is products of half the size a level. Both are in double precision. What double precision
itself loses is mended by a Newton step of the whole matrix. docs/pinv.md has the analysis.
"""

from __future__ import annotations

import math
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

# Blocks of this order and below are not divided, and nothing more often than this: a smaller product takes no less time
# than the call for it, and a fifth level has a few per cent of the products left to save.
_SMALLEST, _MOST_LEVELS = 16, 4
# Numbers in a chunk of the batch: calls for small blocks cost more than what they no longer find in the cache.
CHUNK = 1 << 20
# Multiplications in a product of all matrices, below which an inverse that need not be exact takes less time otherwise.
_FEWEST = 1 << 24
# After elimination in double precision, whose residual of κ²·eps/10 this squares.
_LAST = Step(1.0, (1.0, 1.0))
# Above these tr P/ridge ≥ κ that residual would show: in single precision, and after the last step.
_LARGEST = {"float32": 2.0**24, "float64": 2.0**20}
# No pivot is below the smallest eigenvalue of P. One that is, by as much as this, shows that A is not as declared.
_SLACK = 8.0


def applies(a: Array, *, ridge: float, tol: float | None = None, xp: Namespace) -> bool:
    """Whether A is on a CPU, can be looked at and written beside, 1/ridge does not overflow, and no κ is too large; and
    whether it is faster than what stops at ``tol``."""
    if is_traced(a) or (tol is not None and math.prod(a.shape) * a.shape[-1] < _FEWEST):
        return False
    if not writes(a) or not is_on_cpu(a) or ridge < float(xp.finfo(a.dtype).smallest_normal):
        return False
    n, largest = a.shape[-1], _LARGEST["float32" if real_dtype(a, xp) == xp.float32 else "float64"]
    mean = to_host(xp.sum(xp.real(xp.linalg.diagonal(a)) / n, axis=-1))
    with np.errstate(all="ignore"):
        return bool(np.all(n * (mean / ridge + 1) <= largest, where=np.isfinite(mean)))


def inverse(a: Array, *, ridge: float, xp: Namespace) -> tuple[Array, Work]:
    """(A + ridge·I)⁻¹ for Hermitian A ≽ 0, itself Hermitian to the last bit, as ``_definite.scaled_newton`` has it.

    Where A is not as declared, some pivot is not positive, and the result is NaN.
    """
    n = a.shape[-1]
    single = real_dtype(a, xp) == xp.float32
    levels = min(_MOST_LEVELS, max(0, math.ceil(math.log2(n / _SMALLEST))))
    # What is above has an inverse of zeros in single precision, and squares that overflow in double.
    ridge = min(ridge, 2.0**400) if single else ridge
    # The power of two next to 1/tr P at its largest, by which multiplication is exact: no entry of scale·P is above 1.
    scale = 2.0 ** min(-math.frexp(ridge)[1] - math.log2(_LARGEST["float32"]), 1000.0)
    x, reciprocals = (_rounded if single else _polished)(xp.reshape(a, (-1, n, n)), ridge, scale, levels, xp)
    valid = xp.all((reciprocals > 0.5) & (reciprocals <= _SLACK / (ridge * scale)), axis=0)
    valid = xp.reshape(valid, a.shape[:-2])
    products = _products(n, levels) + (0 if single else (accurate_cost(a, xp) + 1) * n**3)
    zero = xp.zeros(a.shape[:-2], dtype=real_dtype(a, xp), device=device(a))
    work = Work(zero + (0.0 if single else 1.0), zero + float(math.ceil(products / n**3)), zero, zero, valid)
    return or_nan(valid, xp.reshape(x, a.shape), xp), work


def _rounded(a: Array, ridge: float, scale: float, levels: int, xp: Namespace) -> tuple[Array, Array]:
    """The inverse in single precision, to which nothing is rounded before the last of what cancels."""
    elimination, h = _Elimination(a, ridge, scale, xp), a.shape[-1] // 2
    if levels == 0:
        half = elimination.negative_inverse(a, levels, elimination.dtype)
        half *= -0.5
        return xp.astype(half + matrix_transpose_conj(half, xp), a.dtype), elimination.reciprocals()
    left, w, right = (xp.astype(v, a.dtype, copy=False) for v in elimination.divided(a, levels, a.dtype))
    right *= -0.5
    below = stacked_product(right, w, xp)
    left = add_product(left, matrix_transpose_conj(w, xp), below, xp, beta=-0.5, out=left)
    x = xp.empty(a.shape, dtype=a.dtype, device=device(a))
    for block, half in ((x[:, :h, :h], left), (x[:, h:, h:], right)):
        xp.add(half, matrix_transpose_conj(half, xp), out=block)
    xp.multiply(below, 2.0, out=x[:, h:, :h])
    xp.multiply(matrix_transpose_conj(below, xp), 2.0, out=x[:, :h, h:])
    return x, elimination.reciprocals()


def _polished(a: Array, ridge: float, scale: float, levels: int, xp: Namespace) -> tuple[Array, Array]:
    """The inverse in double precision, with a step from an accurate E after elimination."""
    p = add_to_diagonal(a * scale, ridge * scale, xp)
    elimination = _Elimination(p, 0.0, 1.0, xp)
    x = elimination.negative_inverse(p, levels, elimination.dtype)
    x = apply_accurately(_LAST, xp.negative(x, out=x), p, xp)
    x = x + matrix_transpose_conj(x, xp)
    x *= 0.5 * scale
    return x, elimination.reciprocals()


class _Elimination:
    """Block elimination of P = A + ridge·I in double precision, for the matrices of one batch."""

    def __init__(self, a: Array, ridge: float, scale: float, xp: Namespace) -> None:
        self.dtype = xp.complex128 if xp.isdtype(a.dtype, "complex floating") else xp.float64
        self._ridge, self._scale, self._xp = ridge, scale, xp
        self._sweeps: dict[int, _Sweeps] = {}
        self._reciprocals: list[Array] = []

    def negative_inverse(self, a: Array, levels: int, dtype: Any) -> Array:
        """−P⁻¹, rounded to ``dtype``."""
        xp, n, h = self._xp, a.shape[-1], a.shape[-1] // 2
        x = xp.empty(a.shape, dtype=dtype, device=device(a))
        if levels == 0:
            if n not in self._sweeps:
                memory = xp.empty((2 * n + 1, n, a.shape[0]), dtype=self.dtype, device=device(a))
                self._sweeps[n] = _Sweeps(memory, self._scale, xp)
            self._reciprocals.append(self._sweeps[n](a, self._ridge, x))
            return x
        left, w, right = self.divided(a, levels, self.dtype)
        below = stacked_product(right, w, xp)
        x[:, :h, :h] = add_product(left, matrix_transpose_conj(w, xp), below, xp, out=left)
        x[:, h:, :h] = below
        x[:, :h, h:] = matrix_transpose_conj(below, xp)
        x[:, h:, h:] = right
        return x

    def divided(self, a: Array, levels: int, dtype: Any) -> tuple[Array, Array, Array]:
        """L = −B⁻¹, W = CL and R = −S⁻¹, S = D + WCᴴ, of P = [[B, Cᴴ], [C, D]], R rounded to ``dtype``.

        C and Cᴴ are both read from A: a product with the adjoint of its second factor takes twice the time.
        """
        xp, h = self._xp, a.shape[-1] // 2
        left = self.negative_inverse(a[:, :h, :h], levels - 1, self.dtype)
        w = stacked_product(xp.astype(a[:, h:, :h], self.dtype, copy=False), left, xp)
        s = xp.astype(a[:, h:, h:], self.dtype)
        s = add_product(s, w, xp.astype(a[:, :h, h:], self.dtype, copy=False), xp, out=s)
        return left, w, self.negative_inverse(s, levels - 1, dtype)

    def reciprocals(self) -> Array:
        """1/d for the pivots d of scale·P, of shape (n, batch)."""
        return self._xp.concat(self._reciprocals)


class _Sweeps:
    """Inverses of small matrices by the sweep operator (J. H. Goodnight, Amer. Statist. 33, 1979), with the matrices of
    the batch along the last axis, in memory of shape (2n + 1, n, batch) that is the same in every call.

    Row k, with u = 1/scale taken from its pivot d, is w, and P ← P − wᴴw/d turns row and column k into u·w/d and the
    pivot into 2u − u²/d; all pivots are u at the most. After all rows that is 2u·I − u²P⁻¹.
    """

    def __init__(self, memory: Array, scale: float, xp: Namespace) -> None:
        n, self._scale, self._xp = memory.shape[1], scale, xp
        self._p, swept, self._w = memory[:n, ...], memory[n : 2 * n, ...], memory[2 * n, ...]
        self._subtract = elementwise_product_subtracted(self._p)
        self._diagonal, self._swept_diagonal = _diagonal(self._p, xp), _diagonal(swept, xp)
        units = xp.eye(n, dtype=memory.dtype, device=device(memory))[:, :, None] / scale
        self._rows = list(zip(list(self._p), list(xp.real(self._diagonal)), list(units), list(swept), strict=True))

    def __call__(self, a: Array, ridge: float, out: Array) -> Array:
        """Write −P⁻¹, P = A + ridge·I, to ``out`` and return u/d for all pivots, of shape (n, batch)."""
        xp, p, w = self._xp, self._p, self._w
        p[...] = xp.permute_dims(a, (1, 2, 0))
        self._diagonal += ridge
        column, conjugate, library = w[:, None], xp.isdtype(p.dtype, "complex floating"), unwrapped(xp)
        for row, pivot, unit, swept in self._rows:
            library.subtract(row, unit, out=w)
            library.divide(w, pivot, out=swept)
            self._subtract(xp.conj(column) if conjugate else column, swept)
        self._diagonal -= 2 / self._scale
        xp.multiply(xp.permute_dims(p, (2, 0, 1)), self._scale**2, out=out)
        return 1 - xp.real(self._swept_diagonal)


def _diagonal(q: Array, xp: Namespace) -> Array:
    """The diagonals of matrices along the last axis, a view of shape (n, batch) of what is in one piece."""
    n = q.shape[0]
    return xp.reshape(q, (n * n, q.shape[-1]))[:: n + 1, ...]


def _products(n: int, levels: int) -> float:
    """Multiplications per matrix."""
    if levels == 0:
        return n**3
    return _products(n // 2, levels - 1) + _products(n - n // 2, levels - 1) + 4 * (n / 2) ** 3
