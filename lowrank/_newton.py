"""What the iterations behind ``pinv`` are made of: steps X ← sS(R)X, the polynomials S in few products, and chunks.

The steps are those that ``_schedule`` chooses, of orders 2, 3, 5 and 9; that of order 9 takes the few products of
J. Sastre, "Efficient evaluation of matrix polynomials", Linear Algebra Appl. 539, 2018. ``_definite`` composes them
for a ridge, ``_truncated`` for everything else. docs/pinv.md has the derivations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lowrank._array import (
    Array,
    Namespace,
    accumulate,
    add_product,
    add_scaled,
    add_to_diagonal,
    device,
    is_on_cpu,
    is_traced,
    matrix_transpose_conj,
)
from lowrank._schedule import Step, remembered

# A bound u that equals λ_max lets rounding push E past the end of the interval, where the next step grows it like a
# Chebyshev polynomial outside [−1, 1]; two per cent of σ² keep it inside.
MARGIN = 1.02
# Numbers in a chunk of the batch: on a CPU such that its matrices stay in the cache, elsewhere for memory.
_CHUNK = {True: 7 << 15, False: 1 << 27}


class Work(NamedTuple):
    """Figures of one solve, real arrays of the batch shape, kept apart from the differentiable result."""

    steps: Array
    products: Array
    bound: Array
    cutoff: Array
    valid: Array


def as_matrices(scalars: Array) -> Array:
    """Scalars of the batch with two axes more, to multiply matrices."""
    return scalars[..., None, None]


def finite_part(a: Array, xp: Namespace) -> tuple[Array, Array]:
    """Which elements of the batch are finite, and the batch with the others set to zero."""
    # NaN and Inf make their way through a maximum, one of no entries at all apart.
    empty = 0 in a.shape[-2:]
    finite = xp.all(xp.isfinite(a), axis=(-2, -1)) if empty else xp.isfinite(xp.max(xp.abs(a), axis=(-2, -1)))
    if all_true(finite, xp):
        return finite, a
    return finite, xp.where(as_matrices(finite), a, xp.zeros_like(a))


def all_true(condition: Array, xp: Namespace) -> bool:
    """Whether a condition is known to hold everywhere, so that a choice can be left out."""
    return not is_traced(condition) and bool(xp.all(condition))


def frobenius(a: Array, xp: Namespace) -> Array:
    return xp.linalg.matrix_norm(a, ord="fro")


def unit(v: Array, xp: Namespace) -> Array:
    length = frobenius(v, xp)
    return v / as_matrices(xp.where(length > 0, length, xp.ones_like(length)))


def hermitian_part(x: Array, xp: Namespace) -> Array:
    return 0.5 * (x + matrix_transpose_conj(x, xp))


def or_nan(valid: Array, x: Array, xp: Namespace) -> Array:
    if all_true(valid, xp):
        return x
    return xp.where(as_matrices(valid), x, xp.asarray(math.nan, dtype=x.dtype, device=device(x)))


@remembered
def normal(*shape: int) -> np.ndarray:
    """Normal random numbers, the same in every call."""
    return np.random.default_rng(0).standard_normal(shape)


class _Octic(NamedTuple):
    """Σ cₖrᵏ, k ≤ 8, c₈ = 1, in three products: (z + βr² + γr + δ)(z + ρr²) + φr² + c₁r + c₀ with z = r²(r² + ζr)."""

    zeta: float
    beta: float
    gamma: float
    delta: float
    rho: float
    phi: float


@remembered
def octic(c: tuple[float, ...]) -> _Octic:
    """The parameters of the form for c/c₈, from comparing coefficients (J. Sastre, Linear Algebra Appl. 539, 2018).

    ρ solves a quadratic equation, whose discriminant is positive for all polynomials used here.
    """
    c = tuple(value / c[8] for value in c)
    zeta = c[7] / 2
    total = c[6] - zeta * zeta
    gamma = c[5] - zeta * total
    half = (total - gamma / zeta) / 2
    rho = half + math.copysign(1.0, -half) * math.sqrt(half * half + zeta * gamma + c[3] / zeta - c[4])
    delta = (c[3] - gamma * rho) / zeta
    return _Octic(zeta, total - rho, gamma, delta, rho, c[2] - delta * rho)


def chunks(a: Array, xp: Namespace, *, numbers: int | None = None) -> list[Array]:
    """The matrices of the batch, a few at a time where values can be looked at, of so many numbers or as many as suit
    the device; one axis of batch where there are several chunks."""
    batch, (m, n) = math.prod(a.shape[:-2]), a.shape[-2:]
    parts = math.ceil(batch * m * n / (numbers or _CHUNK[is_on_cpu(a)]))
    if is_traced(a) or parts <= 1 or batch <= 1:
        return [a]
    size = math.ceil(batch / parts)
    flat = xp.reshape(a, (-1, m, n))
    return [flat[k : min(k + size, batch), ...] for k in range(0, batch, size)]


def in_chunks(
    solve: Callable[[Array], tuple[Array, Work]], a: Array, xp: Namespace, *, numbers: int | None = None
) -> tuple[Array, Work]:
    """solve(a), chunk by chunk."""
    parts = chunks(a, xp, numbers=numbers)
    if len(parts) == 1:
        return solve(a)
    solved = [solve(part) for part in parts]
    batch = a.shape[:-2]
    x = xp.concat([x for x, _ in solved], axis=0)
    work = (xp.reshape(xp.concat(figures, axis=0), batch) for figures in zip(*(w for _, w in solved), strict=True))
    return xp.reshape(x, (*batch, *x.shape[-2:])), Work(*work)


def polynomial(
    r: Array, c: tuple[float, ...], xp: Namespace, *, factor: float = 1.0, square: Array | None = None
) -> Array:
    """factor·Σ cₖRᵏ of degree 1, 2, 4 or 8, in 0, 1, 2 or 3 products; one less where R² is given."""
    if len(c) == 2:
        s = (factor * c[1]) * r
        return add_to_diagonal(s, factor * c[0], xp) if c[0] else s
    y = r @ r if square is None else square
    if len(c) == 3:
        s = accumulate((factor * c[1]) * r, y, factor * c[2])
    elif len(c) == 5:
        s = add_to_diagonal(accumulate((factor * c[4]) * y, r, factor * c[3]), factor * c[2], xp)
        s = add_product(r, y, s, xp, beta=factor * c[1])
    else:
        form = octic(c)
        right = add_product(y, y, add_scaled(y, r, form.zeta, xp), xp, beta=form.rho)
        left = accumulate(add_scaled(right, y, form.beta - form.rho, xp), r, form.gamma)
        outer = factor * c[8]
        s = add_product(y, add_to_diagonal(left, form.delta, xp), right, xp, beta=form.phi * outer, alpha=outer)
        s = accumulate(s, r, factor * c[1])
    return add_to_diagonal(s, factor * c[0], xp) if c[0] else s


def _complement(e: Array, scale: float, xp: Namespace) -> Array:
    """I − scale·E."""
    return add_to_diagonal(-scale * e, 1.0, xp)


def textbook_steps(x: Array, a: Array, steps: int, xp: Namespace) -> Array:
    """X ← 2X − XAX, ``steps`` times, of X (..., n, m) and A (..., m, n), products on the smaller side."""
    shape = x.shape
    # One axis of batch, for the sum to be in the product's own pass.
    x, a = (xp.reshape(y, (-1, *y.shape[-2:])) for y in (x, a))
    for _ in range(steps):
        factors = (x @ a, x) if a.shape[-1] <= a.shape[-2] else (x, a @ x)
        x = add_product(x, *factors, xp, beta=2.0, alpha=-1.0)
    return xp.reshape(x, shape)


def apply(step: Step, x: Array, e: Array, xp: Namespace) -> Array:
    """X ← sS(R)X with R = I − sE."""
    return apply_residual(step, x, _complement(e, step.scale, xp), xp)


def apply_residual(step: Step, x: Array, r: Array, xp: Namespace) -> Array:
    """X ← sS(R)X."""
    c0, *others = step.coefficients
    s = polynomial(r, (0.0, *others), xp, factor=step.scale)
    return add_product(x, s, x, xp, beta=step.scale * c0)


def first_polynomial(step: Step, c: Array, g: Array, square: Array, xp: Namespace) -> Array:
    """S(I − cG) with G² given."""
    r = -c * g
    squared = add_to_diagonal(accumulate((c * c) * square, r, 2.0), 1.0, xp)
    return polynomial(add_to_diagonal(r, 1.0, xp), step.coefficients, xp, square=squared)
