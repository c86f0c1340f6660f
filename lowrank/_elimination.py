"""The inverse of A + ridge·I for Hermitian A ≽ 0 in single precision: block elimination with Newton at its pivots.

P = A + ridge·I is halved until its blocks are small, and scaled Newton (V. Pan and R. Schreiber, SIAM J. Sci. Stat.
Comput. 12, 1991) inverts the pivot blocks. Schur complements of P have no eigenvalue below the ridge either, so that
their steps are known too; all else is six products of half the size a level, in double precision. An error of κ·eps of
single precision then costs a few products of the whole matrix instead of twenty. docs/pinv.md has the analysis.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from lowrank._array import (
    Array,
    Namespace,
    add_product,
    add_to_diagonal,
    device,
    from_host,
    is_on_cpu,
    is_traced,
    matrix_transpose_conj,
    real_dtype,
    stacked_product,
    to_host,
    widest_real,
    writes,
)
from lowrank._newton import Work, frobenius, hermitian_part, or_nan
from lowrank._schedule import Plan, Step, advance, chebyshev_step, remembered

# Blocks of this order and below are not divided, and nothing more often than this: a smaller product takes no less time
# than the call for it, and a fifth level has a few per cent of the products left to save.
_SMALLEST, _MOST_LEVELS = 16, 4
# The products of a level, of half the order: W = CB⁻¹, its residual and correction, the Schur complement, S⁻¹W and
# WᴴS⁻¹W.
_PRODUCTS = 6
# Numbers in a chunk of the batch: calls for small blocks cost more than what they no longer find in the cache.
CHUNK = 1 << 20
# Conditions are rounded up to powers of it.
_CLASS = 2**0.25
# With κ up to the first, steps in single precision and one in double leave errors of (κ·eps)² in the inverse of a
# pivot; with κ up to the second, double precision alone leaves κ²·eps in that of a block. The correction squares them,
# elimination magnifies them by κ², and they are still below κ·eps of single precision.
_MODERATE, _LARGEST = 2.0**15, 2.0**20


class _Problem(NamedTuple):
    """P ≽ ridge·I, the precision that its inverse is wanted in, and the one that pivots are inverted in at first."""

    ridge: float
    eps: float
    dtype: Any
    first: Any


class _Found(NamedTuple):
    """Which matrices have had all their pivots inverted, on the host; the largest bound that steps promise, and the
    largest number of them; and the products, in units of one of order 1."""

    valid: np.ndarray
    bound: float
    steps: int
    products: float


def applies(a: Array, *, ridge: float, xp: Namespace) -> bool:
    """Whether A is on a CPU, can be looked at, is in single precision where there is double, and κ not too large."""
    if is_traced(a) or not writes(a) or not is_on_cpu(a):
        return False
    if real_dtype(a, xp) != xp.float32 or widest_real(a, xp) == xp.float32:
        return False
    conditions = _conditions(to_host(_trace(a, xp)), a.shape[-1], ridge)
    return bool(np.all(conditions <= _LARGEST, where=np.isfinite(conditions)))


def _trace(a: Array, xp: Namespace) -> Array:
    return xp.real(xp.linalg.trace(a))


def _conditions(trace: np.ndarray, n: int, ridge: float) -> np.ndarray:
    """tr P/ridge ≥ κ."""
    with np.errstate(all="ignore"):
        return trace / ridge + n


def inverse(a: Array, *, ridge: float, xp: Namespace) -> tuple[Array, Work]:
    """(A + ridge·I)⁻¹ for Hermitian A ≽ 0, itself Hermitian to the last bit, as ``_definite.scaled_newton`` has it.

    Where A is not as declared, the steps do not invert some pivot block. That is measured, and the result is NaN.
    """
    with np.errstate(all="ignore"):
        return _inverse(a, ridge, xp)


def _inverse(a: Array, ridge: float, xp: Namespace) -> tuple[Array, Work]:
    n = a.shape[-1]
    single = xp.reshape(a, (-1, n, n))
    conditions = _conditions(to_host(_trace(single, xp)), n, ridge)
    finite = np.isfinite(conditions)
    first = a.dtype if np.all(conditions <= _MODERATE, where=finite) else _double(a, xp)
    problem = _Problem(ridge, float(xp.finfo(a.dtype).eps), a.dtype, first)
    levels = min(_MOST_LEVELS, max(0, math.ceil(math.log2(n / _SMALLEST))))
    x = xp.empty(single.shape, dtype=a.dtype, device=device(a))
    found = _invert(single, ridge, x, finite, levels, problem, xp)
    # A relative error of t in the inverses of the pivots is one of t·√κ from the left.
    bound = np.where(found.valid, found.bound * np.sqrt(conditions), 0.0)
    figures = np.broadcast_arrays(found.steps, math.ceil(found.products / n**3), bound, 0.0)
    steps, products, bound, cutoff = (
        from_host(np.reshape(v, a.shape[:-2]), a, xp, dtype=real_dtype(a, xp)) for v in figures
    )
    valid = from_host(np.reshape(found.valid, a.shape[:-2]), a, xp, dtype=xp.bool)
    return or_nan(valid, xp.reshape(x, a.shape), xp), Work(steps, products, bound, cutoff, valid)


def _invert(
    a: Array, shift: float, x: Array, valid: np.ndarray, levels: int, problem: _Problem, xp: Namespace
) -> _Found:
    """Write the inverse of P = A + shift·I to X, which may be A, and its Hermitian part where X is the result.

    With P = [[B, Cᴴ], [C, D]], W = CB⁻¹ and S = D − WCᴴ it is [[B⁻¹ + WᴴS⁻¹W, −WᴴS⁻¹], [−S⁻¹W, S⁻¹]]. W is corrected
    by its residual, once, which makes it the solution of equations next to WB = C (N. J. Higham, Accuracy and Stability
    of Numerical Algorithms, 2002, ch. 12); without, errors of B⁻¹ would grow by κ with every level.
    """
    final = x.dtype == problem.dtype
    if levels == 0:
        inverse, found = _pivot(_in_double(a, shift, xp), valid, problem, xp)
        x[...] = hermitian_part(xp.astype(inverse, x.dtype), xp) if final else inverse
        return found
    h = a.shape[-1] // 2
    b, c = _in_double(a[:, :h, :h], shift, xp), _in_double(a[:, h:, :h], 0.0, xp)
    left = xp.empty_like(b)
    first = _invert(b, 0.0, left, valid, levels - 1, problem, xp)
    w = stacked_product(c, left, xp)
    w = add_product(w, add_product(c, w, b, xp, alpha=-1.0), left, xp, out=w)
    right = _in_double(a[:, h:, h:], shift, xp)
    right = add_product(right, w, matrix_transpose_conj(c, xp), xp, alpha=-1.0, out=right)
    second = _invert(right, 0.0, right, first.valid, levels - 1, problem, xp)
    # Nothing cancels from here on, so that rounding to the precision of X may come before.
    left, right, w = (xp.astype(v, x.dtype, copy=False) for v in (left, right, w))
    below = stacked_product(right, w, xp)
    left = add_product(left, matrix_transpose_conj(w, xp), below, xp, out=left)
    below *= -1.0
    if final:
        left, right = hermitian_part(left, xp), hermitian_part(right, xp)
    x[:, :h, :h] = left
    x[:, h:, :h] = below
    x[:, :h, h:] = matrix_transpose_conj(below, xp)
    x[:, h:, h:] = right
    products = first.products + second.products + _PRODUCTS * (a.shape[-1] / 2) ** 3
    return _Found(second.valid, max(first.bound, second.bound), max(first.steps, second.steps), products)


def _in_double(a: Array, shift: float, xp: Namespace) -> Array:
    """A + shift·I in double precision, in memory of its own."""
    p = xp.astype(a, _double(a, xp))
    return add_to_diagonal(p, shift, xp) if shift else p


def _double(a: Array, xp: Namespace) -> Any:
    return xp.complex128 if xp.isdtype(a.dtype, "complex floating") else xp.float64


def _pivot(p: Array, valid: np.ndarray, problem: _Problem, xp: Namespace) -> tuple[Array, _Found]:
    """P⁻¹ by steps of order 2, the first of them a polynomial in P and the last from an E in double precision, and
    whether that E shows that they have led to κ·eps."""
    n = p.shape[-1]
    mean, square = to_host(_trace(p, xp)) / n, to_host(frobenius(p, xp)) ** 2 / n
    lower, upper = _interval(mean, square, n, problem.ridge)
    valid = valid & np.isfinite(upper) & (upper >= problem.ridge)
    upper = np.where(valid, upper, lower)
    conditions = upper / lower
    condition = _CLASS ** max(1, math.ceil(math.log(np.max(conditions), _CLASS)))
    chosen = _steps(condition, math.sqrt(problem.eps / 32))
    q = xp.astype(p, problem.first, copy=False)
    first, *others = chosen.steps
    inner, outer = _weights(first)
    x = add_to_diagonal(from_host((-outer / upper**2)[:, None, None], q, xp) * q, from_host(inner / upper, q, xp), xp)
    for step in others:
        inner, outer = _weights(step)
        x = add_product(x, stacked_product(x, q, xp), x, xp, beta=inner, alpha=-outer)
    x = xp.astype(x, p.dtype, copy=False)
    e = stacked_product(x, p, xp)
    x = add_product(x, e, x, xp, beta=2.0, alpha=-1.0)
    # No eigenvalue of E is above 1 + √(eps/32): what is not inverted is below 1, and missing from the trace.
    missing = n - to_host(_trace(e, xp))
    valid = valid & (missing <= np.minimum(n / 4 * np.sqrt(conditions * problem.eps), 0.25))
    bound = max(1 - chosen.low, chosen.high - 1) ** 2
    return x, _Found(valid, bound, len(chosen.steps) + 1, (chosen.products + 2) * n**3)


def _interval(mean: np.ndarray, square: np.ndarray, n: int, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Bounds on n eigenvalues ≥ ridge from their mean and that of their squares: none is further from the mean than
    √(n − 1) standard deviations (H. Wolkowicz and G. P. H. Styan, Linear Algebra Appl. 29, 1980)."""
    # The difference is right to eps·mean², its root to 1e-8·mean.
    reach = np.sqrt((n - 1) * np.maximum(square - mean**2, 0.0)) + 1e-6 * mean
    return np.fmax(mean - reach, ridge), mean + reach


def _weights(step: Step) -> tuple[float, float]:
    """β and α of a step of order 2, X ← βX − αEX."""
    c0, c1 = step.coefficients
    return step.scale * (c0 + c1), step.scale**2 * c1


@remembered
def _steps(condition: float, tolerance: float) -> Plan:
    """Steps of order 2 from spectra in [1/condition, 1]; the first takes no product."""
    steps: list[Step] = []
    low, high = 1 / condition, 1.0
    while not steps or max(1 - low, high - 1) > tolerance:
        steps.append(chebyshev_step(2, low, high))
        low, high = advance(steps[-1], low, high)
    return Plan(tuple(steps), low, high, 2 * len(steps) - 2)
