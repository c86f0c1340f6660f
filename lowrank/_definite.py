"""The inverse of A + ridge·I for Hermitian A ≽ 0, by scaled Newton.

Newton with the steps of ``_schedule`` (Pan & Schreiber, SIAM J. Sci. Stat. Comput. 12, 1991), after one leading
eigenvector is deflated where that pays: for Gram matrices of nearby points λ₁ ≫ λ₂, and κ = λ₁/ridge is what steps are
spent on. What rounding left is polished and measured at the end. docs/pinv.md has the derivations.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from lowrank._accurate import accurate_cost, accurate_product
from lowrank._array import (
    Array,
    Namespace,
    add_product,
    add_to_diagonal,
    device,
    from_host,
    is_traced,
    is_transformed,
    matrix_transpose_conj,
    real_dtype,
    stacked_product,
    to_host,
)
from lowrank._newton import (
    MARGIN,
    Work,
    all_true,
    apply,
    as_matrices,
    first_polynomial,
    frobenius,
    normal,
    or_nan,
    polynomial,
    unit,
)
from lowrank._schedule import _LARGEST, _SMALLEST, Plan, Step, advance, chebyshev_step, plan, remembered

# The conditions that schedules are made for; a chunk takes the next one above its own.
_CLASS = 2**0.25
# What deflation may do to the interval after the first step, relative to its lower end.
_SLACK = 0.03
# Vectors with which the inverse is tried out, and what they may be off. An eigenvalue of I − XP of size 1 is
# missed with probability 1e-5; the vectors are the same in every call.
_PROBES, _TRIED = 8, 0.5


class _Deflation(NamedTuple):
    """P = Q + (what a vector takes out), Q², the vector as a row of length 1, or 0 where deflation does not pay, its
    Rayleigh quotient, and a bound on ‖Q‖."""

    rest: Array
    square: Array
    row: Array
    value: Array
    upper: Array


def scaled_newton(
    a: Array, *, ridge: float, upper: float | None = None, tol: float | None = None, xp: Namespace
) -> tuple[Array, Work]:
    """(A + ridge·I)⁻¹ for Hermitian A ≽ 0, by scaled Newton from a start that commutes with A up to rounding.

    With u ≥ ‖P‖, P = A + ridge·I, the spectrum of P/u is in [ridge/u, 1], so the steps follow from κ = u/ridge, not κ².
    One leading eigenvector is deflated where that lowers u: kernel matrices have one of eigenvalue near n. The
    first step is a polynomial in P; the last uses an accurate E. Matrices that are solved together take the steps of
    the worst of them; with ``upper`` ≥ ‖A‖ the steps are known beforehand.
    """
    if tol is not None:
        return _approximation(a, ridge=ridge, upper=upper, tol=tol, xp=xp)
    eps = float(xp.finfo(a.dtype).eps)
    largest = xp.max(xp.abs(a), axis=(-2, -1))
    finite = xp.isfinite(largest)
    # The power of two below 1/‖P‖, by which multiplication is exact.
    scale = 2.0 ** -xp.ceil(xp.log2(xp.where(finite, a.shape[-1] * largest, xp.zeros_like(largest)) + ridge))
    p = add_to_diagonal(as_matrices(scale) * a, ridge * scale, xp)
    start = _deflated(p, ridge * scale, xp)
    chosen = definite_plan(*_needed(p, start, ridge * scale, None if upper is None else 1 + upper / ridge, eps, xp))
    x = _inverse(p, start, chosen, xp)
    # Tried before it is made Hermitian: an error of X of κ·eps from the left then becomes one of κ²·eps in XP.
    valid = finite & _inverts(x, p, xp)
    x = x + matrix_transpose_conj(x, xp)
    x *= as_matrices(0.5 * scale)
    figures = len(chosen.steps), chosen.products + accurate_cost(p, xp), max(1 - chosen.low, chosen.high - 1)
    steps, products, bound = (xp.full_like(scale, float(v)) for v in figures)
    return or_nan(valid, x, xp), Work(steps, products, bound, xp.zeros_like(bound), valid)


def _approximation(a: Array, *, ridge: float, upper: Any, tol: float, xp: Namespace) -> tuple[Array, Work]:
    """X with ‖I − XP‖ ≤ tol, for ‖A‖ ≤ upper: the steps alone, which follow from the numbers given.

    They are of orders 2 and 3, all whose sums are in the passes of products: for matrices of a few dozen rows another
    pass takes half the time of a product, and the call for it all of that. Nor is X made Hermitian: rounding leaves
    errors of κ·eps in XP, but of κ²·eps in PX.
    """
    batch, (chosen, scale, powers, tol) = a.shape[:-2], approximate_steps(ridge, upper, tol)
    if _is_compiled(a):
        from lowrank import _native_core

        x, valid = _native_core.inverse(a, ridge, scale=scale, **_numbers(powers, a.shape[-1], tol))
    else:
        p = xp.reshape(a, (-1, *a.shape[-2:]))  # for sums in the pass of a product
        p = add_to_diagonal(scale * p, scale * ridge, xp)
        (c0, *others), *rest = powers
        x = add_to_diagonal(_sum_of_powers(p, others, xp), c0, xp)
        for c0, *others in rest:
            x = add_product(x, _sum_of_powers(stacked_product(x, p, xp), others, xp), x, xp, beta=c0)
        valid = xp.reshape(_inverts(x, p, xp, tol), batch)
        x = xp.reshape(scale * x, (*batch, *x.shape[-2:]))
    if ridge * float(xp.finfo(a.dtype).max) < 1:
        valid = xp.zeros_like(valid)  # what X may hold overflows
    # The first takes neither E nor S·X; P is tried with one. Nothing is cut off.
    figures = len(chosen.steps), chosen.products - 2 + 1, max(1 - chosen.low, chosen.high - 1), 0
    about = {"dtype": real_dtype(a, xp), "device": device(a)}
    steps, products, bound, cutoff = (xp.full(batch, float(v), **about) for v in figures)
    return or_nan(valid, x, xp), Work(steps, products, bound, cutoff, valid)


def _is_compiled(a: Array) -> bool:
    """Whether there are kernels for these matrices."""
    if not compat.is_torch_array(a) or is_traced(a) or is_transformed(a):
        return False
    from lowrank import _native_core

    return _native_core.applies(a)


@remembered
@remembered
def _numbers(powers: tuple[tuple[float, ...], ...], n: int, tol: float) -> dict[str, Any]:
    """Of the steps, and of what the inverse is tried with, as kernels want them."""
    tried, most = probes(n, tol)
    padded = np.asarray([(*power, 0.0)[:3] for power in powers], dtype=np.float32)
    return {"powers": padded, "probes": tried.astype(np.float32), "most": most}


class ApproximateSteps(NamedTuple):
    """For X ≈ (A + ridge·I)⁻¹: a scale of P = A + ridge·I, c of X = c₀I + c₁P + c₂P² and then, with E = XP, of
    X ← c₀X + (c₁E + c₂E²)X, and the ‖I − XP‖ that they leave; to be scaled at the end."""

    chosen: Plan
    scale: float
    powers: tuple[tuple[float, ...], ...]
    tol: float


@remembered
def approximate_steps(ridge: float, upper: float, tol: float) -> ApproximateSteps:
    """For ‖A‖ ≤ upper."""
    # What is beyond these numbers is beyond any arithmetic, and has no logarithm; and one step is the least.
    condition, tol = min(1 + upper / ridge, _LARGEST), min(max(tol, _SMALLEST), 0.1)
    chosen, (first, *rest) = _approximate_plan(_CLASS ** max(1, math.ceil(math.log(condition, _CLASS))), tol)
    # A power of two, by which multiplication is exact, that brings P to the size of I. (upper + ridge may overflow.)
    scale = 2.0 ** min(1 - math.frexp(max(upper, ridge))[1], 1000)
    start = 1 / (scale * (upper + ridge))  # a multiple of I, in powers of P alone
    first = tuple(start ** (k + 1) * c for k, c in enumerate(first))
    return ApproximateSteps(chosen, scale, (first, *rest), tol)


@remembered
def _approximate_plan(condition: float, tolerance: float) -> tuple[Plan, tuple[tuple[float, ...], ...]]:
    """Steps of orders 2 and 3, and of each c with Σ cₖEᵏ = sS(I − sE)."""
    chosen = plan(1 / condition, 1.0, tolerance, 3)
    return chosen, tuple(map(_powers, chosen.steps))


def _powers(step: Step) -> tuple[float, ...]:
    s, (c0, c1, *c2) = step.scale, step.coefficients
    if not c2:
        return s * (c0 + c1), -s * s * c1
    return s * (c0 + c1 + c2[0]), -s * s * (c1 + 2 * c2[0]), s**3 * c2[0]


def _sum_of_powers(e: Array, c: list[float], xp: Namespace) -> Array:
    """c₁E + c₂E², or c₁E where that is all, of c without c₀."""
    return c[0] * e if len(c) == 1 else add_product(e, e, e, xp, beta=c[0], alpha=c[1])


def _inverts(x: Array, p: Array, xp: Namespace, tol: float = 0.0) -> Array:
    """Whether XP is nearly I, but for ``tol``, tried with a few vectors; False for NaN."""
    host, most = probes(p.shape[-1], tol)
    rows = from_host(host, p, xp)
    rows = xp.broadcast_to(rows, (*p.shape[:-2], *rows.shape))
    return frobenius(add_product(rows, rows @ x, p, xp, beta=-1.0), xp) <= most


def probes(n: int, tol: float) -> tuple[np.ndarray, float]:
    """Rows to try an inverse with, and what they may be off in all."""
    return normal(_PROBES, n), _TRIED + 1.5 * tol * math.sqrt(_PROBES * n)  # their length, and half as much


def _needed(
    p: Array, start: _Deflation, ridge: Array, condition: float | None, eps: float, xp: Namespace
) -> tuple[float, float]:
    """The condition that the steps are for, and the ‖I − XP‖ they are to reach.

    A change of P in its last bits moves X by κ·eps, and truncation is to hide below that. What κ is at least: the
    smallest eigenvalue is no larger than the mean of all but the largest.
    """
    if condition is not None:
        return _CLASS ** math.ceil(math.log(min(condition, 1 / eps), _CLASS)), eps / 4
    if is_traced(ridge):
        return 1 / (8 * eps), eps / 4
    others = xp.linalg.trace(p) - start.value
    figures = (start.upper, start.value, xp.real(others) / max(1, p.shape[-1] - 1), ridge)
    upper, value, mean, ridge = (to_host(v).astype(np.float64) for v in figures)
    # No mean is above the largest eigenvalue, but where there are negative ones.
    most, least = upper / ridge, np.maximum(value / np.maximum(mean, ridge), 1.0)
    known = np.isfinite(most) & np.isfinite(least)
    measured = min(np.max(most, initial=_CLASS, where=known), 1 / eps)
    hidden = eps / 128 * np.min(least, initial=1 / eps, where=known)
    return _CLASS ** math.ceil(math.log(measured, _CLASS)), max(_CLASS ** math.floor(math.log(hidden, _CLASS)), eps / 4)


@remembered
def definite_plan(condition: float, tolerance: float) -> Plan:
    """A step of order 9, whose polynomial needs neither E nor S·X, and the rest; the last E is not counted."""
    first = chebyshev_step(9, 1 / condition, 1.0)
    low, high = advance(first, 1 / condition, 1.0)
    rest = plan(low * (1 - _SLACK), high + low * _SLACK, tolerance)
    return rest._replace(steps=(first, *rest.steps), products=3 + rest.products - 1)


def _deflated(p: Array, ridge: Array, xp: Namespace) -> _Deflation:
    """Take out the leading eigenvector where that pays.

    For a unit vector v, θ = vᴴPv, w = Pv − θv and Q = (I − vvᴴ)P(I − vvᴴ), the spectrum of Q on the complement of v
    is in [ridge, ‖Q‖] by interlacing. From X = vvᴴ/θ + q(Q)(I − vvᴴ) the spectrum of E is that of
    [[1, bᴴ], [b, q(Q)Q]], b = q(Q)^½ w/√θ, which differs from its diagonal blocks by ‖b‖ at the most.
    """
    eps = float(xp.finfo(p.dtype).eps)
    # P times a column is the adjoint of a row times P, which libraries multiply faster.
    row = xp.sum(p, axis=-2, keepdims=True)
    for _ in range(3):
        row = row @ p
    row = unit(row, xp)
    for _ in range(4):
        row = row @ p
    row = unit(row, xp)
    image = row @ p
    theta = xp.real(xp.sum(xp.conj(row) * image, axis=(-2, -1)))
    w = image - as_matrices(theta) * row
    # ‖P‖² = θ² + 2‖w‖² + ‖Q‖² in Frobenius norms.
    aside = frobenius(w, xp) ** 2
    whole = frobenius(p, xp) ** 2
    rest = xp.abs(whole - theta**2 - 2 * aside) + 8 * eps * whole
    # With q ≤ 162/u, ‖b‖ is below _SLACK times what the first step makes of the smallest eigenvalue, 12·ridge/u or ½.
    allowed = 1e-6 * theta * xp.sqrt(rest) * xp.minimum(500 * ridge**2 / rest, xp.ones_like(rest))
    pays = (4 * rest <= theta**2) & (aside <= allowed)
    if not all_true(pays, xp):
        row = xp.where(as_matrices(pays), row, xp.zeros_like(row))
    half = as_matrices(0.5 * theta) * row + w
    pair = xp.concat([row, half], axis=-2), xp.concat([half, row], axis=-2)
    rest = add_product(p, matrix_transpose_conj(pair[0], xp), pair[1], xp, alpha=-1.0)
    square = rest @ rest
    upper = MARGIN * _largest_eigenvalue(rest, square, eps, xp)
    return _Deflation(rest, square, row, theta, xp.maximum(upper, ridge))


def _largest_eigenvalue(q: Array, square: Array, eps: float, xp: Namespace) -> Array:
    """A bound from tr Q² and tr Q⁴, exact where all eigenvalues are of one size, and where one is by far the largest.

    Of n numbers λ² of mean μ and variance s² none is above μ + s√(n − 1) (H. Wolkowicz and G. P. H. Styan, Linear
    Algebra Appl. 29, 1980).
    """
    n = q.shape[-1]
    mean = frobenius(q, xp) ** 2 / n
    fourth = frobenius(square, xp) ** 2 / n
    variance = xp.abs(fourth - mean**2) + 8 * eps * fourth
    return xp.sqrt(mean + xp.sqrt((n - 1) * variance))


def _inverse(p: Array, start: _Deflation, chosen: Plan, xp: Namespace) -> Array:
    first, *between, last = chosen.steps
    c = first.scale / as_matrices(start.upper)
    x = first_polynomial(first, c, start.rest, start.square, xp)
    x *= c
    # Rounding of order eps·θ along v has grown with q(Q): what q(Q) has there is taken out, not what it should have.
    row, along = start.row, start.row @ x
    mean = as_matrices(xp.sum(xp.conj(row) * along, axis=(-2, -1))) + 1 / as_matrices(start.value)
    along = along - 0.5 * mean * row
    left, right = xp.concat([row, along], axis=-2), xp.concat([along, row], axis=-2)
    x = add_product(x, matrix_transpose_conj(left, xp), right, xp, alpha=-1.0)
    for step in between:
        x = apply(step, x, x @ p, xp)
    return apply_accurately(last, x, p, xp)


def apply_accurately(step: Step, x: Array, a: Array, xp: Namespace) -> Array:
    """X ← sS(R)X with R from an accurate E, and S(R)X as c₀X plus what is small, for the last step.

    Formed in working precision, E would have an error of order κ·eps, and X one of κ·eps from the left, so that AX
    were right to κ²·eps only.
    """
    x = step.scale * x
    c0, *others = step.coefficients
    minus_r = accurate_product(x, a, xp, minus=1.0)
    signed = (c if k % 2 else -c for k, c in enumerate(others))
    return add_product(x, polynomial(minus_r, (0.0, *signed), xp), x, xp, beta=c0)
