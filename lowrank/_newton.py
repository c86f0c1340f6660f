"""The iterations behind ``pinv``: scaled Newton for a ridge, growth and purification for everything else.

Both compose the steps X ← sS(R)X, R = I − sE, E = XA, that ``schedule`` chooses (Pan & Schreiber, SIAM J. Sci. Stat.
Comput. 12, 1991). For the truncated pseudoinverse they grow the eigenvalues σ² of AᴴA towards 1, until none is left
above the cutoff; purification E ← p(E) with p flat at 0 and at 1 (McWeeny, Rev. Mod. Phys. 32, 1960) then sends what
lies below to 0 and what lies above to 1. docs/pinv.md has the derivations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lowrank._accurate import accurate_product
from lowrank._array import (
    Array,
    Namespace,
    accumulate,
    add_scaled,
    add_to_diagonal,
    device,
    from_host,
    is_on_cpu,
    is_traced,
    matrix_transpose_conj,
    to_host,
)
from lowrank.schedule import PRODUCTS, Plan, Step, advance, chebyshev_step, levels, plan, remembered

# A bound u that equals λ_max lets rounding push E past the end of the interval, where the next step grows it like a
# Chebyshev polynomial outside [−1, 1]; two per cent of σ² keep it inside.
_MARGIN = 1.02
# Growth ends when what lies above √_GUARD times the cutoff has E within _GROWN of 1. The guard is where a
# spectrum's transition from 0 to 1 has the cutoff itself near ½; the rest is corrected by one scalar.
_GROWN = 0.1
_GUARD = 2.8
# Eager growth looks after two steps of order 9 whether it is done; they lower the resolved cutoff by about this.
_STRIDE = 64.0
# A relative distance d of σ from the cutoff shows as |E − ½| ≈ 0.7d, which a purification enlarges 2.46-fold: seven
# of them decide all that lies further than about one per cent from the cutoff, and finish it.
_PURIFICATIONS = 7
# The coefficients of p(e)/e, p(e) = 126e⁵ − 420e⁶ + 540e⁷ − 315e⁸ + 70e⁹: p = p' = … = p⁗ = 0 at 0, and so is 1 − p
# at 1.
_PURIFYING = (0.0, 0.0, 0.0, 0.0, 126.0, -420.0, 540.0, -315.0, 70.0)
# Numbers in a chunk of the batch: on a CPU such that its matrices stay in the cache, elsewhere for memory.
_CHUNK = {True: 3 << 16, False: 1 << 27}


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
    if _all_true(finite, xp):
        return finite, a
    return finite, xp.where(as_matrices(finite), a, xp.zeros_like(a))


def _all_true(condition: Array, xp: Namespace) -> bool:
    """Whether a condition is known to hold everywhere, so that a choice can be left out."""
    return not is_traced(condition) and bool(xp.all(condition))


def frobenius(a: Array, xp: Namespace) -> Array:
    return xp.linalg.matrix_norm(a, ord="fro")


def hermitian_part(x: Array, xp: Namespace) -> Array:
    return 0.5 * (x + matrix_transpose_conj(x, xp))


def or_nan(valid: Array, x: Array, xp: Namespace) -> Array:
    if _all_true(valid, xp):
        return x
    return xp.where(as_matrices(valid), x, xp.asarray(math.nan, dtype=x.dtype, device=device(x)))


def _identity(a: Array, xp: Namespace) -> Array:
    return xp.eye(a.shape[-1], dtype=a.dtype, device=device(a))


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


def in_chunks(solve: Callable[[Array], tuple[Array, Work]], a: Array, xp: Namespace) -> tuple[Array, Work]:
    """solve(a), a few matrices of the batch at a time where values can be looked at."""
    batch, (m, n) = a.shape[:-2], a.shape[-2:]
    size = max(1, _CHUNK[is_on_cpu(a)] // (m * n))
    if is_traced(a) or math.prod(batch) <= size:
        return solve(a)
    flat = xp.reshape(a, (-1, m, n))
    parts = [solve(flat[k : min(k + size, flat.shape[0]), ...]) for k in range(0, flat.shape[0], size)]
    x = xp.concat([x for x, _ in parts], axis=0)
    work = (xp.reshape(xp.concat(figures, axis=0), batch) for figures in zip(*(w for _, w in parts), strict=True))
    return xp.reshape(x, (*batch, *x.shape[-2:])), Work(*work)


def polynomial(
    r: Array, c: tuple[float, ...], xp: Namespace, *, factor: float = 1.0, square: Array | None = None
) -> Array:
    """factor·Σ cₖRᵏ of degree 1, 2, 4 or 8, in 0, 1, 2 or 3 products; one less where R² is given."""
    if len(c) == 2:
        return add_to_diagonal((factor * c[1]) * r, factor * c[0], xp)
    y = r @ r if square is None else square
    if len(c) == 3:
        s = accumulate((factor * c[1]) * r, y, factor * c[2])
    elif len(c) == 5:
        s = y @ add_to_diagonal(accumulate((factor * c[4]) * y, r, factor * c[3]), factor * c[2], xp)
        s = accumulate(s, r, factor * c[1])
    else:
        form = octic(c)
        right = accumulate(y @ add_scaled(y, r, form.zeta, xp), y, form.rho)
        left = accumulate(add_scaled(right, y, form.beta - form.rho, xp), r, form.gamma)
        s = add_to_diagonal(left, form.delta, xp) @ right
        s = accumulate(accumulate(s, y, form.phi), r, c[1] / c[8])
        s *= factor * c[8]
    return add_to_diagonal(s, factor * c[0], xp)


def _complement(e: Array, scale: float, xp: Namespace) -> Array:
    """I − scale·E."""
    return add_to_diagonal(-scale * e, 1.0, xp)


def _apply(step: Step, x: Array, e: Array, xp: Namespace) -> Array:
    """X ← sS(R)X with R = I − sE."""
    r = _complement(e, step.scale, xp)
    return polynomial(r, step.coefficients, xp, factor=step.scale) @ x


def _apply_accurately(step: Step, x: Array, a: Array, xp: Namespace) -> Array:
    """The same with R from split factors, and S(R)X as c₀X plus what is small, for the last step.

    Formed in working precision, E would have an error of order κ·eps, and X one of κ·eps from the left, so that AX
    were right to κ²·eps only.
    """
    x = step.scale * x
    c0, *others = step.coefficients
    r = accurate_product(x, a, xp, minus=_identity(a, xp))
    r *= -1.0
    following = polynomial(r, (0.0, *others), xp) @ x
    return accumulate(following, x, c0)


# --- Positive definite with a ridge ---------------------------------------------------------------------------------

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
    p = p + ridge * _identity(p, xp)
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
    row = _unit(row, xp)
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
    if not _all_true(pays, xp):
        rest, upper = xp.where(as_matrices(pays), rest, p), xp.where(pays, upper, whole)
        row = xp.where(as_matrices(pays), row, xp.zeros_like(row))
    square = rest @ rest
    # λ_max⁴ ≤ tr Q⁴ = ‖Q²‖².
    upper = _MARGIN * xp.minimum(upper, xp.sqrt(frobenius(square, xp)))
    return _Deflation(rest, square, row, theta, xp.maximum(upper, xp.full_like(upper, ridge)))


def _unit(v: Array, xp: Namespace) -> Array:
    length = frobenius(v, xp)
    return v / as_matrices(xp.where(length > 0, length, xp.ones_like(length)))


def _first_polynomial(step: Step, c: Array, g: Array, square: Array, xp: Namespace) -> Array:
    """S(I − cG) with G² given."""
    r = -c * g
    squared = add_to_diagonal(accumulate((c * c) * square, r, 2.0), 1.0, xp)
    return polynomial(add_to_diagonal(r, 1.0, xp), step.coefficients, xp, square=squared)


def _inverse(p: Array, start: _Deflation, chosen: Plan, xp: Namespace) -> Array:
    first, *between, last = chosen.steps
    c = first.scale / as_matrices(start.upper)
    x = _first_polynomial(first, c, start.rest, start.square, xp)
    x *= c
    # Rounding of order eps·θ along v has grown with q(Q): what q(Q) has there is taken out, not what it should have.
    row, along = start.row, start.row @ x
    mean = as_matrices(xp.sum(xp.conj(row) * along, axis=(-2, -1))) + 1 / as_matrices(start.value)
    along = along - 0.5 * mean * row
    x -= matrix_transpose_conj(xp.concat([row, along], axis=-2), xp) @ xp.concat([along, row], axis=-2)
    for step in between:
        x = _apply(step, x, x @ p, xp)
    return _apply_accurately(last, x, p, xp)


# --- Truncated pseudoinverses ---------------------------------------------------------------------------------------


class _Solved(NamedTuple):
    """A result, the figures of it that differ from element to element, and where it may be used."""

    x: Array
    steps: Array
    products: Array
    bound: Array
    accepted: Array


class _Growth(NamedTuple):
    """X and E = XA on the way, the upper end of E's spectrum, and the steps that led there."""

    x: Array
    e: Array
    high: float
    steps: tuple[Step, ...]
    products: int


def square_pinv(
    a: Array, *, rtol: float, definite: bool, hermitian: bool, xp: Namespace, full_rank: bool = False
) -> tuple[Array, Work]:
    """The truncated pseudoinverse of square matrices of entries up to about 1.

    ``definite`` matrices are positive semidefinite and start from X₀ ∝ I, all others from X₀ ∝ Aᴴ. Where values can be
    looked at, growth pauses at a few levels above the cutoff, and elements that are certified there are
    finished; with ``full_rank`` no others are, and ``valid`` says which.
    """
    eager = not is_traced(a)
    adjoint = None if definite else matrix_transpose_conj(a, xp)
    gram = a if adjoint is None else adjoint @ a
    square = gram @ gram
    largest = _largest_eigenvalue(gram, square, xp)
    # tr G³ ≤ n^¼ (tr G⁴)^¾ makes this factor times the estimate from below a bound from above.
    spread = _MARGIN * a.shape[-1] ** 0.25
    power = 1 if definite else 2
    cutoff = rtol * (largest if definite else xp.sqrt(largest))
    zero = xp.zeros_like(cutoff)
    solved = _Solved(xp.zeros_like(a), zero, zero, zero, zero > 0)
    first = functools.partial(_first_step, gram, square, as_matrices(spread * largest), adjoint, xp=xp)
    growth = _Growth(None, None, 1.0, (), -1 if definite else 1)
    for level in levels(rtol, _STRIDE ** (2 / power)) if eager else (rtol,):
        growth = _grow(growth, a, min(_GUARD * level**power / spread, 0.5), first, xp)
        if eager:
            solved = _finish_full_rank(growth, a, solved, xp)
            if level > rtol and not full_rank:
                solved = _finish_certified(growth, a, cutoff, solved, hermitian, xp)
            if bool(xp.all(solved.accepted)):
                break
    else:
        if full_rank:
            solved = _charge(solved, growth.products, xp)
        else:
            solved = _finish_at_cutoff(growth, a, rtol**power / spread, solved, hermitian, xp)
    return solved.x, Work(solved.steps, solved.products, solved.bound, cutoff, solved.accepted)


def _largest_eigenvalue(gram: Array, square: Array, xp: Namespace) -> Array:
    """An estimate of λ_max(G) from below, a few per cent off: the larger of tr G⁴/tr G³ and a Rayleigh quotient."""
    fourth = frobenius(square, xp) ** 2
    third = xp.real(xp.sum(xp.conj(gram) * square, axis=(-2, -1)))
    safe = xp.where(third > 0, third, xp.ones_like(third))
    v = from_host(normal(gram.shape[-1], 1), gram, xp)
    for _ in range(6):
        v = _unit(square @ v, xp)
    rayleigh = xp.real(xp.sum(xp.conj(v) * (gram @ v), axis=(-2, -1)))
    return xp.where(third > 0, xp.maximum(fourth / safe, rayleigh), xp.ones_like(third))


def _first_step(gram: Array, square: Array, scale: Array, adjoint: Array | None, step: Step, *, xp: Namespace) -> Array:
    """X after the first step, on E₀ = G/scale; the estimate of the scale has left its square."""
    c = step.scale / scale
    s = _first_polynomial(step, c, gram, square, xp)
    s = c * s
    return s if adjoint is None else s @ adjoint


def _grow(growth: _Growth, a: Array, target: float, first: Callable[[Step], Array], xp: Namespace) -> _Growth:
    """On until what was at ``target`` in E₀, and all above, is within _GROWN of 1."""
    for step in growth.steps:
        target = step.follow(target)
    chosen = plan(target, growth.high, _GROWN)
    x, e = growth.x, growth.e
    for step in chosen.steps:
        x = first(step) if x is None else _apply(step, x, e, xp)
        e = x @ a
    return _Growth(x, e, chosen.high, growth.steps + chosen.steps, growth.products + chosen.products)


def _choose(found: _Solved, solved: _Solved, xp: Namespace) -> _Solved:
    """What was found, for elements where it is acceptable and nothing is settled yet."""
    new = found.accepted & ~solved.accepted
    x = xp.where(as_matrices(new), found.x, solved.x)
    steps, bound = xp.where(new, found.steps, solved.steps), xp.where(new, found.bound, solved.bound)
    # Until then there was nothing but what had been charged.
    products = xp.where(new, found.products + solved.products, solved.products)
    return _Solved(x, steps, products, bound, solved.accepted | new)


def _finish_full_rank(growth: _Growth, a: Array, solved: _Solved, xp: Namespace) -> _Solved:
    """Finish elements all of whose eigenvalues of E are near 1: nothing is dropped, and Newton needs no purification.

    A step of order 3 with R = I − E from split factors is the last; where R was too large for it, it is repeated.
    """
    n, eps = a.shape[-1], float(xp.finfo(a.dtype).eps)
    eye = _identity(a, xp)
    # All but the ripple; one eigenvalue that is not near 1 shows in the fourth powers.
    r = eye - growth.e
    ripple = growth.high - 1
    full = frobenius(r, xp) <= 1.2 * ripple * math.sqrt(n) + 0.2
    if not bool(xp.any(full & ~solved.accepted)):
        return solved
    solved = _charge(solved, 1, xp)
    full = full & (frobenius(r @ r, xp) <= (1.2 * ripple) ** 2 * math.sqrt(n) + 0.05)
    if not bool(xp.any(full & ~solved.accepted)):
        return solved
    enough = (eps / 4) ** (1 / 3)
    # Full rank is proven by the residual below; until then the interval is what growth intends.
    chosen = plan(1 - 1.2 * _GROWN, 1 + 1.2 * _GROWN, enough)
    x, e = growth.x, growth.e
    for k, step in enumerate(chosen.steps):
        x = _apply(step, x, x @ a if k else e, xp)

    def body(state: tuple) -> tuple:
        x, passes, residual, running = state
        r = -accurate_product(x, a, xp, minus=eye)
        found = frobenius(r, xp)
        x = xp.where(as_matrices(running), x + r @ (x + r @ x), x)
        residual = xp.where(running, found, residual)
        return x, passes + xp.astype(running, passes.dtype), residual, running & (found > math.sqrt(n) * 2 * enough)

    zero = xp.zeros_like(solved.bound)
    x, passes, residual, _ = _repeat(body, (x, zero, zero, zero == 0), 2, a, xp)
    steps = len(growth.steps) + len(chosen.steps) + passes
    products = growth.products + chosen.products - 1 + 5 * passes
    bound = xp.full_like(zero, enough**3)
    return _choose(_Solved(x, steps, products, bound, full & (residual <= 0.1)), solved, xp)


def _repeat(body: Callable[[tuple], tuple], state: tuple, most: int, a: Array, xp: Namespace) -> tuple:
    """state ← body(state), ``most`` times, or until its last entry is False everywhere where values can be seen."""
    for _ in range(most):
        state = body(state)
        if not is_traced(a) and not bool(xp.any(state[-1])):
            break
    return state


def _finish_certified(
    growth: _Growth, a: Array, cutoff: Array, solved: _Solved, hermitian: bool, xp: Namespace
) -> _Solved:
    """Finish elements whose eigenvalues of E are near 0 or 1, if A − AXA proves that what was dropped is below the
    cutoff."""
    if _all_true(solved.accepted, xp):
        return solved
    # Every eigenvalue within the ripple of 1 contributes to E − E² as much as the ripple; one halfway contributes ¼.
    ripple = growth.high - 1
    gap = frobenius(growth.e - growth.e @ growth.e, xp) <= 1.5 * ripple * math.sqrt(a.shape[-1]) + 0.05
    solved = _charge(solved, 1, xp)
    if not bool(xp.any(gap & ~solved.accepted)):
        return solved
    gap = gap & _nothing_left(growth, a, cutoff, xp)
    if not bool(xp.any(gap & ~solved.accepted)):
        return solved
    found = _purified(growth.x, growth, a, xp.full_like(cutoff, 1.2 * _GROWN), xp)
    e = accurate_product(found.x, a, xp)
    # A(I − E)² in place of A(I − E), from which rounding of X does not vanish: it is κ·eps in E.
    left = accurate_product(a, e, xp, minus=a)
    left = left - left @ e
    # tr (MᴴM)² bounds σ_max(M)⁴.
    largest = xp.sqrt(frobenius(matrix_transpose_conj(left, xp) @ left, xp))
    certified = largest <= 0.9 * cutoff
    found = found._replace(accepted=gap & certified)
    if bool(xp.any(found.accepted & ~solved.accepted)):
        cleaned = _orthogonalised(found, a, hermitian, xp)
        solved = _choose(cleaned._replace(products=cleaned.products + 8), solved, xp)
    # What has been tried in vain is charged too.
    return _charge(solved, found.products - growth.products + 8, xp)


def _nothing_left(growth: _Growth, a: Array, cutoff: Array, xp: Namespace) -> Array:
    """Whether random rows say that no singular value above the cutoff has been left near E = 0.

    z ← z(I − AX) takes the ripple, or less, of what is near 1 out of z and leaves the rest.
    """
    rows = from_host(normal(_PROBES, a.shape[-2]), a, xp)
    z = xp.broadcast_to(rows, (*a.shape[:-2], *rows.shape))
    image = z @ a
    for _ in range(math.ceil(math.log(float(xp.finfo(a.dtype).eps)) / math.log(1.2 * _GROWN))):
        z = z - image @ growth.x
        image = z @ a
    # Many values below the cutoff are to pass, even if a few above it then do.
    return frobenius(image, xp) <= 0.5 * math.sqrt(_PROBES * a.shape[-1]) * cutoff


def _charge(solved: _Solved, products: Any, xp: Namespace) -> _Solved:
    """Products spent on elements that are not settled by them."""
    return solved._replace(products=xp.where(solved.accepted, solved.products, solved.products + products))


def _finish_at_cutoff(
    growth: _Growth, a: Array, at_cutoff: float, solved: _Solved, hermitian: bool, xp: Namespace
) -> _Solved:
    """Finish what is left, with the cutoff at E = ½."""
    for step in growth.steps:
        at_cutoff = step.follow(at_cutoff)
    level = 0.5 / at_cutoff
    ends = max(1 - level * (1 - _GROWN), level * growth.high - 1)
    found = _purified(level * growth.x, growth, a, xp.full_like(solved.bound, ends), xp)
    found = _orthogonalised(found._replace(accepted=solved.bound >= 0), a, hermitian, xp)
    return _choose(found, solved, xp)


def _purification_residual(r: Array) -> Array:
    """What purification makes of r = 1 − e."""
    return r**5 * (126 + r * (-420 + r * (540 + r * (-315 + r * 70))))


def _purified(x: Array, growth: _Growth, a: Array, ends: Array, xp: Namespace) -> _Solved:
    """X ← p(E)E⁻¹X per element until E² = E to rounding, then (3E − 2E²)X with E from split factors."""
    eps = float(xp.finfo(x.dtype).eps)
    enough = math.sqrt(eps) / 3
    norm = frobenius(a, xp)

    zero = xp.zeros_like(ends)
    passes, running = zero, zero == 0
    for _ in range(_PURIFICATIONS):
        e = x @ a
        square = e @ e
        # Below √eps/3 the accurate pass leaves 3r² ≤ eps; below κ·eps there is nothing left to gain.
        target = xp.maximum(eps * norm * frobenius(x, xp), xp.full_like(norm, enough))
        running = running & ~(frobenius(e - square, xp) <= target)
        if not is_traced(a) and not bool(xp.any(running)):
            break
        x = xp.where(as_matrices(running), polynomial(e, _PURIFYING, xp, square=square) @ x, x)
        ends = xp.where(running, _purification_residual(ends), ends)
        passes = passes + xp.astype(running, passes.dtype)
    ends = xp.abs(ends)

    def accurate(state: tuple) -> tuple:
        x, ends, passes, running = state
        e = accurate_product(x, a, xp)
        square = e @ e
        residual = frobenius(e - square, xp)
        x = xp.where(as_matrices(running), (3 * e - 2 * square) @ x, x)
        # Eigenvalues with |e(1 − e)| ≤ ρ ≤ 0.1 are within 1.2ρ of 0 or 1.
        ends = xp.where(residual <= 0.1, xp.minimum(ends, 1.2 * residual), ends)
        ends = xp.where(running, ends * ends * (3 - 2 * ends), ends)
        return x, ends, passes + xp.astype(running, passes.dtype), running & ~(residual <= enough)

    x, ends, finest, _ = _repeat(accurate, (x, ends, zero, zero == 0), 3, a, xp)
    steps = len(growth.steps) + passes + finest
    # The pass that finds nothing left to do has formed E and E².
    looked = xp.where(passes < _PURIFICATIONS, 2 + zero, zero)
    products = growth.products + 5 * passes + looked + 5 * finest
    return _Solved(x, steps, products, ends, zero == 0)


def _orthogonalised(found: _Solved, a: Array, hermitian: bool, xp: Namespace) -> _Solved:
    """Remove what X has between a null space and a range.

    Purification cannot: any X ← p(XA)X is neutral there. The orthogonal projectors onto the ranges of Aᴴ and A, from
    EᴴE and FFᴴ with E = XA and F = AX, can; the non-Hermitian parts of E and F say whether they have to.
    """
    eps = float(xp.finfo(a.dtype).eps)
    x = found.x
    e = accurate_product(x, a, xp)
    f = matrix_transpose_conj(e, xp) if hermitian else accurate_product(a, x, xp)
    products = found.products + (3 if hermitian else 6)
    # Rounding of X alone makes E this much non-Hermitian.
    unavoidable = eps * frobenius(x, xp) * frobenius(a, xp)
    defects = [frobenius(t - matrix_transpose_conj(t, xp), xp) for t in (e, f)]
    needed = xp.maximum(*defects) > unavoidable
    if not is_traced(a) and not bool(xp.any(needed & found.accepted)):
        return found._replace(products=products)
    left, spent = _projector(matrix_transpose_conj(e, xp) @ e, xp)
    right, more = (left, xp.zeros_like(spent)) if hermitian else _projector(f @ matrix_transpose_conj(f, xp), xp)
    cleaned = left @ x @ right
    e = accurate_product(cleaned, a, xp)
    square = e @ e
    cleaned = (3 * e - 2 * square) @ cleaned
    # A singular value at the cutoff itself may leave E with ½, of which projectors make nothing.
    needed = needed & (frobenius(e - square, xp) <= 0.1)
    # The Gram matrices of E and F, the projections, and the purification.
    spent = products + spent + more + (1 if hermitian else 2) + 2 + 5
    x = xp.where(as_matrices(needed), cleaned, x)
    return found._replace(
        x=x, steps=found.steps + xp.astype(needed, found.steps.dtype), products=xp.where(needed, spent, products)
    )


def _projector(g: Array, xp: Namespace) -> tuple[Array, Array]:
    """The orthogonal projector onto the range of Hermitian g with eigenvalues 0 or at least about 1, and its products.

    Most eigenvalues are 1 but for little; where a singular value near the cutoff has left X far from symmetric they are
    not, and scaled Newton brings them near 1 first.
    """
    products = xp.zeros_like(xp.real(g[..., 0, 0]))
    near = frobenius(g - g @ g, xp) <= 0.1
    if not _all_true(near, xp):
        u = _MARGIN * xp.max(xp.sum(xp.abs(g), axis=-1), axis=-1)
        grown = g / as_matrices(xp.where(u > 1, u, xp.ones_like(u)))
        # At low = 100·eps what rounding has put into the null space stays far below what purification removes.
        chosen = plan(100 * float(xp.finfo(g.dtype).eps), 1.0, _GROWN)
        for step in chosen.steps:
            grown = _apply(step, grown, grown, xp)
            products = xp.where(near, products, products + (_cost(step) - 1))
        g = xp.where(as_matrices(near), g, grown)
    for _ in range(2):
        g = polynomial(g, _PURIFYING, xp) @ g
    square = g @ g
    return 3 * square - 2 * (square @ g), products + 11


def _cost(step: Step) -> int:
    return PRODUCTS[len(step.coefficients)]
