"""The inverse of A + ridge·I for Hermitian A ≽ 0, by scaled Newton.

Newton with the steps of ``_schedule``, after one leading eigenvector is deflated where that pays. docs/pinv.md has the
derivations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from lowrank._accurate import accurate_product
from lowrank._array import Array, Namespace, accumulate, from_host, is_traced, matrix_transpose_conj, to_host
from lowrank._newton import (
    MARGIN,
    Work,
    all_true,
    apply,
    as_matrices,
    finite_part,
    first_polynomial,
    frobenius,
    hermitian_part,
    identity,
    normal,
    or_nan,
    polynomial,
    unit,
)
from lowrank._schedule import Plan, Step, advance, chebyshev_step, plan, remembered

# The conditions that schedules are made for; a matrix takes the next one above its own.
_CLASS = 4.0
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


def scaled_newton(a: Array, *, ridge: float, xp: Namespace) -> tuple[Array, Work]:
    """(A + ridge·I)⁻¹ for Hermitian A ≽ 0, by scaled Newton from a start that commutes with A up to rounding.

    With u ≥ ‖P‖, P = A + ridge·I, the spectrum of P/u is in [ridge/u, 1], so the steps follow from κ = u/ridge, not κ².
    One leading eigenvector is deflated where that lowers u: kernel matrices have one of eigenvalue near n. The
    first step is a polynomial in P; the last uses E from split factors.
    """
    eps = float(xp.finfo(a.dtype).eps)
    finite, p = finite_part(a, xp)
    p = p + ridge * identity(p, xp)
    start = _deflated(p, ridge, xp)
    zero = xp.zeros_like(start.upper)
    if is_traced(p):
        chosen = definite_plan(1 / (8 * eps), eps / 4)
        x, work = _inverse(p, start, chosen, xp), Work(zero, zero, zero, zero, finite)
        work = _with_figures(work, chosen, zero == 0, xp)
    else:
        x, work = None, Work(zero, zero, zero, zero, finite)
        conditions = np.maximum(to_host(start.upper).astype(np.float64) / ridge, _CLASS)
        conditions = np.minimum(_CLASS ** np.ceil(np.log(conditions) / math.log(_CLASS)), 1 / eps)
        for condition in np.unique(conditions):
            # A change of P in its last bits moves X by κ·eps; truncation is hidden far below that.
            chosen = definite_plan(float(condition), max(eps * float(condition) / 512, eps / 4))
            here = from_host(conditions == condition, p, xp, dtype=xp.bool)
            found = _inverse(p, start, chosen, xp)
            x = found if x is None else xp.where(as_matrices(here), found, x)
            work = _with_figures(work, chosen, here, xp)
    probes = from_host(normal(_PROBES, p.shape[-1]), p, xp)
    probes = xp.broadcast_to(probes, (*p.shape[:-2], *probes.shape))
    # Tried before it is made Hermitian: an error of X of κ·eps from the left then becomes one of κ²·eps in XP.
    valid = finite & (frobenius((probes @ x) @ p - probes, xp) <= _TRIED)
    return or_nan(valid, hermitian_part(x, xp), xp), work._replace(valid=valid)


@remembered
def definite_plan(condition: float, tolerance: float) -> Plan:
    """A step of order 9, whose polynomial needs neither E nor S·X, and the rest from split factors for the last E."""
    first = chebyshev_step(9, 1 / condition, 1.0)
    low, high = advance(first, 1 / condition, 1.0)
    rest = plan(low * (1 - _SLACK), high + low * _SLACK, tolerance)
    return rest._replace(steps=(first, *rest.steps), products=3 + rest.products + 2)


def _with_figures(work: Work, chosen: Plan, here: Array, xp: Namespace) -> Work:
    """The figures of elements that took the chosen steps."""
    figures = (len(chosen.steps), chosen.products, max(1 - chosen.low, chosen.high - 1))
    count, products, bound = (
        xp.where(here, xp.full_like(old, float(new)), old) for new, old in zip(figures, work[:3], strict=True)
    )
    return work._replace(steps=count, products=products, bound=bound)


def _deflated(p: Array, ridge: float, xp: Namespace) -> _Deflation:
    """Take out the leading eigenvector where that pays.

    For a unit vector v, θ = vᴴPv, w = Pv − θv and Q = (I − vvᴴ)P(I − vvᴴ), the spectrum of Q on the complement of v
    is in [ridge, ‖Q‖] by interlacing. From X = vvᴴ/θ + q(Q)(I − vvᴴ) the spectrum of E is that of
    [[1, bᴴ], [b, q(Q)Q]], b = q(Q)^½ w/√θ, which differs from its diagonal blocks by ‖b‖ at the most.
    """
    whole = xp.max(xp.sum(xp.abs(p), axis=-2), axis=-1)
    # P times a column is the adjoint of a row times P, which libraries multiply faster.
    row = xp.sum(p, axis=-2, keepdims=True)
    for _ in range(7):
        # Scaled so that nothing overflows; the length comes at the end.
        row = row @ p
        row /= as_matrices(whole)
    row = unit(row, xp)
    image = row @ p
    theta = xp.real(xp.sum(xp.conj(row) * image, axis=(-2, -1)))
    w = image - as_matrices(theta) * row
    half = as_matrices(0.5 * theta) * row + w
    pair = matrix_transpose_conj(xp.concat([row, half], axis=-2), xp) @ xp.concat([half, row], axis=-2)
    rest = p - pair
    upper = xp.minimum(xp.max(xp.sum(xp.abs(rest), axis=-2), axis=-1), frobenius(rest, xp))
    upper = xp.maximum(upper, xp.full_like(upper, ridge))
    # With q ≤ 162/u, ‖b‖ is below _SLACK times what the first step makes of the smallest eigenvalue, 12·ridge/u or ½.
    square = xp.minimum(500 * (ridge / upper) ** 2, xp.ones_like(upper))
    pays = (upper <= 0.5 * whole) & (frobenius(w, xp) ** 2 <= 1e-6 * theta * upper * square)
    if not all_true(pays, xp):
        rest, upper = xp.where(as_matrices(pays), rest, p), xp.where(pays, upper, whole)
        row = xp.where(as_matrices(pays), row, xp.zeros_like(row))
    square = rest @ rest
    # λ_max⁴ ≤ tr Q⁴ = ‖Q²‖².
    upper = MARGIN * xp.minimum(upper, xp.sqrt(frobenius(square, xp)))
    return _Deflation(rest, square, row, theta, xp.maximum(upper, xp.full_like(upper, ridge)))


def _inverse(p: Array, start: _Deflation, chosen: Plan, xp: Namespace) -> Array:
    first, *between, last = chosen.steps
    c = first.scale / as_matrices(start.upper)
    x = first_polynomial(first, c, start.rest, start.square, xp)
    x *= c
    # Rounding of order eps·θ along v has grown with q(Q): what q(Q) has there is taken out, not what it should have.
    row, along = start.row, start.row @ x
    mean = as_matrices(xp.sum(xp.conj(row) * along, axis=(-2, -1))) + 1 / as_matrices(start.value)
    along = along - 0.5 * mean * row
    x -= matrix_transpose_conj(xp.concat([row, along], axis=-2), xp) @ xp.concat([along, row], axis=-2)
    for step in between:
        x = apply(step, x, x @ p, xp)
    return _apply_accurately(last, x, p, xp)


def _apply_accurately(step: Step, x: Array, a: Array, xp: Namespace) -> Array:
    """The same with R from split factors, and S(R)X as c₀X plus what is small, for the last step.

    Formed in working precision, E would have an error of order κ·eps, and X one of κ·eps from the left, so that AX
    were right to κ²·eps only.
    """
    x = step.scale * x
    c0, *others = step.coefficients
    r = accurate_product(x, a, xp, minus=identity(a, xp))
    r *= -1.0
    following = polynomial(r, (0.0, *others), xp) @ x
    return accumulate(following, x, c0)
