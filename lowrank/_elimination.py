"""The inverse of A + ridge·I for Hermitian A ≽ 0 on a CPU: block elimination with Newton's iteration at its pivots.

P = A + ridge·I is halved until its blocks are small, and scaled Newton (V. Pan and R. Schreiber, SIAM J. Sci. Stat.
Comput. 12, 1991) inverts the pivot blocks. Schur complements of P have no eigenvalue below the ridge either, so that
their steps are known too; all else is six products of half the size a level, in double precision. What double precision
itself loses is mended by one step of the whole matrix. docs/pinv.md has the analysis.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from lowrank._accurate import accurate_cost
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
from lowrank._definite import apply_accurately
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
# Numbers in double precision from which on it pays there, where it takes the accurate step as well.
_FEWEST = 1 << 15
# After elimination in double precision, whose residual of κ²·eps this squares.
_LAST = Step(1.0, (1.0, 1.0))
# Conditions are rounded up to powers of it.
_CLASS = 2**0.25
# With tr P/ridge up to it, steps in single precision and one in double leave errors of (κ·eps)² in the inverse of a
# pivot. The correction squares them, elimination magnifies them by κ², and they are still below κ·eps.
_MODERATE = 2.0**15
# Beyond these what elimination in double precision leaves would show, in single precision and after a last step.
_LARGEST = {"float32": 2.0**20, "float64": 2.0**17}
# A smaller ridge in single precision, and √κ/ridge, which bounds the sums at the end, could overflow.
_LEAST_RIDGE = 1e-34


class _Problem(NamedTuple):
    """The smallest eigenvalues that P may have, on the host, the eps that its inverse is wanted to, and the precision
    that pivots are inverted in at first."""

    ridge: np.ndarray
    eps: float
    first: Any


class _Found(NamedTuple):
    """Which matrices have had all their pivots inverted, on the host; the largest bound that steps promise, and the
    largest number of them; and the products, in units of one of order 1."""

    valid: np.ndarray
    bound: float
    steps: int
    products: float


def applies(a: Array, *, ridge: float, xp: Namespace) -> bool:
    """Whether A is on a CPU, can be looked at, has a double precision to be computed in, and no κ is too large; whether
    no sum can overflow in single precision, and whether there is enough of A in double for it to pay."""
    if is_traced(a) or not writes(a) or not is_on_cpu(a) or widest_real(a, xp) == xp.float32:
        return False
    n, precision = a.shape[-1], "float32" if real_dtype(a, xp) == xp.float32 else "float64"
    if precision == "float32" and ridge < _LEAST_RIDGE:
        return False
    if precision == "float64" and (n <= _SMALLEST or math.prod(a.shape) < _FEWEST):
        return False
    mean = _mean(a, xp)
    return bool(np.all(_conditions(mean, n, ridge) <= _LARGEST[precision], where=np.isfinite(mean)))


def _mean(a: Array, xp: Namespace) -> np.ndarray:
    """The mean of the eigenvalues, on the host."""
    return np.asarray(to_host(xp.sum(xp.real(xp.linalg.diagonal(a)) / a.shape[-1], axis=-1)))


def _conditions(mean: np.ndarray, n: int, ridge: float) -> np.ndarray:
    """tr P/ridge ≥ κ."""
    with np.errstate(all="ignore"):
        return n * (mean / ridge + 1)


def inverse(a: Array, *, ridge: float, xp: Namespace) -> tuple[Array, Work]:
    """(A + ridge·I)⁻¹ for Hermitian A ≽ 0, itself Hermitian to the last bit, as ``_definite.scaled_newton`` has it.

    Where A is not as declared, the steps do not invert some pivot block. That is measured, and the result is NaN.
    """
    n = a.shape[-1]
    matrices = xp.reshape(a, (-1, n, n))
    levels = min(_MOST_LEVELS, max(0, math.ceil(math.log2(n / _SMALLEST))))
    mean = _mean(matrices, xp)
    conditions, eps = _conditions(mean, n, ridge), float(xp.finfo(a.dtype).eps)
    with np.errstate(all="ignore"):
        if real_dtype(a, xp) == xp.float32:
            x, found = _single(matrices, ridge, conditions, levels, eps, xp)
        else:
            x, found = _accurate(matrices, ridge, mean, levels, eps, xp)
        # A relative error of t in the inverses of the pivots is one of t·√κ from the left.
        bound = np.where(found.valid, found.bound * np.sqrt(conditions), 0.0)
    figures = np.broadcast_arrays(found.steps, math.ceil(found.products / n**3), bound, 0.0)
    steps, products, bound, cutoff = (
        from_host(np.reshape(v, a.shape[:-2]), a, xp, dtype=real_dtype(a, xp)) for v in figures
    )
    valid = from_host(np.reshape(found.valid, a.shape[:-2]), a, xp, dtype=xp.bool)
    return or_nan(valid, xp.reshape(x, a.shape), xp), Work(steps, products, bound, cutoff, valid)


def _single(
    a: Array, ridge: float, conditions: np.ndarray, levels: int, eps: float, xp: Namespace
) -> tuple[Array, _Found]:
    """The inverse in single precision, in which only pivots and the end are computed."""
    finite = np.isfinite(conditions)
    moderate = np.all(conditions <= _MODERATE, where=finite)
    problem = _Problem(np.full(a.shape[0], ridge), eps, a.dtype if moderate else _double(a, xp))
    x = xp.empty(a.shape, dtype=a.dtype, device=device(a))
    return x, _invert(a, ridge, x, finite, levels, problem, xp)


def _accurate(a: Array, ridge: float, mean: np.ndarray, levels: int, eps: float, xp: Namespace) -> tuple[Array, _Found]:
    """The inverse in double precision, with a step from an accurate E after elimination."""
    # The power of two below 1/tr P, by which multiplication is exact; no entry of P is larger than its trace.
    trace = a.shape[-1] * 0.5 * mean + a.shape[-1] * 0.5 * ridge
    scale = 0.5 * 2.0 ** -np.ceil(np.log2(np.where(np.isfinite(trace) & (trace > 0), trace, 1.0)))
    p = from_host(scale[:, None, None], a, xp) * a
    p = add_to_diagonal(p, from_host(ridge * scale, a, xp), xp)
    x = xp.empty(a.shape, dtype=a.dtype, device=device(a))
    problem = _Problem(ridge * scale, eps, a.dtype)
    found = _invert(p, 0.0, x, np.isfinite(mean), levels, problem, xp)
    x = apply_accurately(_LAST, x, p, xp)
    x = x + matrix_transpose_conj(x, xp)
    x *= from_host(0.5 * scale[:, None, None], a, xp)
    products = found.products + (accurate_cost(p, xp) + 1) * a.shape[-1] ** 3
    return x, found._replace(steps=found.steps + 1, products=products)


def _invert(
    a: Array, shift: float, x: Array, valid: np.ndarray, levels: int, problem: _Problem, xp: Namespace
) -> _Found:
    """Write the inverse of P = A + shift·I to X, which may be A, or its Hermitian part in single precision.

    With P = [[B, Cᴴ], [C, D]], W = CB⁻¹ and S = D − WCᴴ it is [[B⁻¹ + WᴴS⁻¹W, −WᴴS⁻¹], [−S⁻¹W, S⁻¹]]. W is corrected
    by its residual, once, which makes it the solution of equations next to WB = C (N. J. Higham, Accuracy and Stability
    of Numerical Algorithms, 2002, ch. 12); without, errors of B⁻¹ would grow by κ with every level.
    """
    single = x.dtype != _double(x, xp)
    if levels == 0:
        inverse, found = _pivot(_in_double(a, shift, xp), valid, problem, xp)
        x[...] = hermitian_part(xp.astype(inverse, x.dtype), xp) if single else inverse
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
    if single:
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
    """The dtype of double precision, real or complex as A is."""
    return xp.complex128 if xp.isdtype(a.dtype, "complex floating") else xp.float64


def _pivot(p: Array, valid: np.ndarray, problem: _Problem, xp: Namespace) -> tuple[Array, _Found]:
    """P⁻¹ by steps of order 2, the first of them a polynomial in P and the last from an E in double precision, and
    whether that E shows that they have led to κ·eps."""
    n = p.shape[-1]
    lower, upper = _interval(_mean(p, xp), to_host(frobenius(p, xp)) ** 2 / n, n, problem.ridge)
    valid = valid & np.isfinite(upper) & (upper >= problem.ridge)
    upper = np.where(valid, upper, lower)
    conditions = upper / lower
    condition = _CLASS ** max(1, math.ceil(math.log(np.max(conditions), _CLASS)))
    chosen = _steps(condition, math.sqrt(problem.eps / 32))
    scale = from_host(1 / upper[:, None, None], p, xp)
    q = xp.astype(scale * p, problem.first, copy=False)
    first, *others = chosen.steps
    inner, outer = _weights(first)
    x = add_to_diagonal(-outer * q, inner, xp)
    for step in others:
        inner, outer = _weights(step)
        x = add_product(x, stacked_product(x, q, xp), x, xp, beta=inner, alpha=-outer)
    x = scale * xp.astype(x, p.dtype, copy=False)
    e = stacked_product(x, p, xp)
    x = add_product(x, e, x, xp, beta=2.0, alpha=-1.0)
    # No eigenvalue of E is above 1 + √(eps/32): what is not inverted is below 1, and missing from the trace.
    missing = 1 - _mean(e, xp)
    valid = valid & (missing <= np.minimum(0.25 * np.sqrt(conditions * problem.eps), 0.25 / n))
    bound = max(1 - chosen.low, chosen.high - 1) ** 2
    return x, _Found(valid, bound, len(chosen.steps) + 1, (chosen.products + 2) * n**3)


def _interval(mean: np.ndarray, square: np.ndarray, n: int, ridge: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
