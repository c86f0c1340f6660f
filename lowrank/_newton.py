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
from typing import NamedTuple

import numpy as np

from lowrank._accurate import accurate_product
from lowrank._array import (
    Array,
    Namespace,
    add_scaled,
    device,
    from_host,
    is_on_cpu,
    is_traced,
    matrix_transpose_conj,
    real_dtype,
    to_host,
)
from lowrank.schedule import Plan, Step, levels, plan

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
    finite = xp.all(xp.isfinite(a), axis=(-2, -1))
    return finite, xp.where(as_matrices(finite), a, xp.zeros_like(a))


def frobenius(a: Array, xp: Namespace) -> Array:
    return xp.linalg.matrix_norm(a, ord="fro")


def hermitian_part(x: Array, xp: Namespace) -> Array:
    return 0.5 * (x + matrix_transpose_conj(x, xp))


def or_nan(valid: Array, x: Array, xp: Namespace) -> Array:
    return xp.where(as_matrices(valid), x, xp.asarray(math.nan, dtype=x.dtype, device=device(x)))


def _identity(a: Array, xp: Namespace) -> Array:
    return xp.eye(a.shape[-1], dtype=a.dtype, device=device(a))


class _Octic(NamedTuple):
    """Σ cₖrᵏ, k ≤ 8, as (z + βr² + γr + δ)(z + ρr²) + φr² + c₁r + c₀ with z = r²(αr² + ζr), in three products."""

    alpha: float
    zeta: float
    beta: float
    gamma: float
    delta: float
    rho: float
    phi: float


@functools.lru_cache(maxsize=4096)
def _octic(c: tuple[float, ...]) -> _Octic:
    """The parameters of the form, from comparing coefficients (after J. Sastre, Linear Algebra Appl. 539, 2018).

    ρ solves a quadratic equation, whose discriminant is positive for all polynomials used here.
    """
    alpha = math.sqrt(c[8])
    zeta = c[7] / (2 * alpha)
    total = (c[6] - zeta * zeta) / alpha
    gamma = (c[5] - zeta * total) / alpha
    half = (total - alpha * gamma / zeta) / 2
    rho = half + math.copysign(1.0, -half) * math.sqrt(half * half + zeta * gamma + alpha * c[3] / zeta - c[4])
    delta = (c[3] - gamma * rho) / zeta
    return _Octic(alpha, zeta, total - rho, gamma, delta, rho, c[2] - delta * rho)


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


def polynomial(r: Array, c: tuple[float, ...], xp: Namespace, *, square: Array | None = None) -> Array:
    """Σ cₖRᵏ without its constant term c₀I, of degree 1, 2, 4 or 8, in 0, 1, 2 or 3 products; one less where R² is
    given."""
    if len(c) == 2:
        return c[1] * r
    y = r @ r if square is None else square
    if len(c) == 3:
        return add_scaled(c[1] * r, y, c[2], xp)
    eye = _identity(r, xp)
    if len(c) == 5:
        return add_scaled(y @ add_scaled(add_scaled(c[2] * eye, r, c[3], xp), y, c[4], xp), r, c[1], xp)
    form = _octic(c)
    right = add_scaled(y @ add_scaled(form.alpha * y, r, form.zeta, xp), y, form.rho, xp)
    left = add_scaled(add_scaled(right, y, form.beta - form.rho, xp), r, form.gamma, xp) + form.delta * eye
    return add_scaled(add_scaled(left @ right, y, form.phi, xp), r, c[1], xp)


def _apply(step: Step, x: Array, e: Array, xp: Namespace) -> Array:
    """X ← sS(R)X with R = I − sE."""
    c = step.coefficients
    s = polynomial(add_scaled(_identity(e, xp), e, -step.scale, xp), c, xp) + c[0] * _identity(e, xp)
    return (step.scale * s) @ x


def _apply_accurately(step: Step, x: Array, a: Array, xp: Namespace) -> Array:
    """The same with R from split factors, and S(R)X as c₀X plus what is small, for the last step.

    Formed in working precision, E would have an error of order κ·eps, and X one of κ·eps from the left, so that AX
    were right to κ²·eps only.
    """
    x = step.scale * x
    r = -accurate_product(x, a, xp, minus=_identity(a, xp))
    return step.coefficients[0] * x + polynomial(r, step.coefficients, xp) @ x


# --- Positive definite with a ridge ---------------------------------------------------------------------------------

# The conditions that schedules are made for; a matrix takes the next one above its own.
_CLASS = 4.0
# Vectors with which the inverse is tried out. An eigenvalue of I − XP of size 1 escapes all of them with probability
# 1e-5, and they are the same in every call.
_PROBES = 8


class _Deflation(NamedTuple):
    """P = Q + (what a vector v takes out), v of length 1, or 0 where deflation does not pay."""

    rest: Array
    square: Array
    vector: Array
    value: Array
    upper: Array


def scaled_newton(p: Array, *, ridge: float, xp: Namespace) -> tuple[Array, Work]:
    """P⁻¹ for Hermitian P ≽ ridge·I, by scaled Newton from a start that commutes with P up to rounding.

    With u ≥ ‖P‖ the spectrum of P/u is in [ridge/u, 1], so the steps follow from κ = u/ridge, not κ². One
    leading eigenvector is deflated where that lowers u: kernel matrices have one of eigenvalue near n. The first
    step is a polynomial in P; the last uses E from split factors.
    """
    eps = float(xp.finfo(p.dtype).eps)
    finite, p = finite_part(p, xp)
    # Elements that are not finite are the identity times the ridge from here on.
    p = xp.where(as_matrices(finite), p, ridge * _identity(p, xp))
    start = _deflated(p, ridge, xp)
    if is_traced(p):
        classes = xp.full_like(start.upper, 1 / (8 * eps))
        conditions = [1 / (8 * eps)]
    else:
        exact = np.maximum(to_host(start.upper).astype(np.float64) / ridge, _CLASS)
        exact = np.minimum(_CLASS ** np.ceil(np.log(exact) / math.log(_CLASS)), 1 / eps)
        classes = from_host(exact, p, xp, dtype=real_dtype(p, xp))
        conditions = np.unique(exact).tolist()
    zero = xp.zeros_like(start.upper)
    x, work = xp.zeros_like(p), Work(zero, zero, zero, zero, finite)
    for condition in conditions:
        # A change of P in its last bits moves X by κ·eps; truncation is hidden far below that, where κ is known.
        tolerance = eps / 4 if is_traced(p) else max(eps * condition / 512, eps / 4)
        chosen = plan(1 / condition, 1.0, tolerance)
        found = _inverse(p, start, chosen, xp)
        if len(conditions) == 1:
            x, here = found, zero == 0
        else:
            here = xp.abs(classes - condition) <= 0.1 * condition
            x = xp.where(as_matrices(here), found, x)
        # The first step needs neither E nor S·X, the last has E from three products.
        figures = (len(chosen.steps), chosen.products, max(1 - chosen.low, chosen.high - 1))
        count, products, bound = (
            xp.where(here, xp.full_like(zero, float(f)), old) for f, old in zip(figures, work[:3], strict=True)
        )
        work = Work(count, products, bound, zero, finite)
    x = hermitian_part(x, xp)
    probes = np.random.default_rng(0).standard_normal((p.shape[-1], _PROBES))
    probes = from_host(probes, p, xp, dtype=p.dtype)
    valid = finite & (frobenius(x @ (p @ probes) - probes, xp) <= 0.5)
    return or_nan(valid, x, xp), work._replace(valid=valid)


def _deflated(p: Array, ridge: float, xp: Namespace) -> _Deflation:
    """Take out the leading eigenvector where that pays.

    For a unit vector v, θ = vᴴPv, w = Pv − θv and Q = (I − vvᴴ)P(I − vvᴴ), the spectrum of Q on the complement of v
    is in [ridge, ‖Q‖] by interlacing. From X = vvᴴ/θ + q(Q)(I − vvᴴ) the spectrum of E is that of
    [[1, bᴴ], [b, q(Q)Q]], b = q(Q)^½ w/√θ, which differs from its diagonal blocks by ‖b‖ at the most, and
    q(Q) is at most 100/‖Q‖ after a step of order 9.
    """
    n = p.shape[-1]
    v = from_host(np.random.default_rng(0).uniform(0.5, 1.5, (n, 1)), p, xp, dtype=p.dtype)
    for _ in range(3):
        v = p @ v
        v = _unit(v, xp)
    image = p @ v
    theta = xp.real(xp.sum(xp.conj(v) * image, axis=(-2, -1)))
    w = image - as_matrices(theta) * v
    u = v * as_matrices(0.5 * theta) + w
    rest = p - (v @ matrix_transpose_conj(u, xp) + u @ matrix_transpose_conj(v, xp))
    whole = xp.max(xp.sum(xp.abs(p), axis=-1), axis=-1)
    upper = xp.minimum(xp.max(xp.sum(xp.abs(rest), axis=-1), axis=-1), frobenius(rest, xp))
    upper = xp.maximum(upper, xp.full_like(upper, ridge))
    small = 1e-3 * theta * ridge * xp.minimum(100 * ridge / upper, xp.ones_like(upper))
    pays = (upper <= 0.5 * whole) & (frobenius(w, xp) ** 2 <= small)
    rest, upper = xp.where(as_matrices(pays), rest, p), xp.where(pays, upper, whole)
    v = xp.where(as_matrices(pays), v, xp.zeros_like(v))
    square = rest @ rest
    # λ_max⁴ ≤ tr P⁴ = ‖P²‖².
    upper = _MARGIN * xp.minimum(upper, xp.sqrt(frobenius(square, xp)))
    return _Deflation(rest, square, v, theta, xp.maximum(upper, xp.full_like(upper, ridge)))


def _unit(v: Array, xp: Namespace) -> Array:
    length = frobenius(v, xp)
    return v / as_matrices(xp.where(length > 0, length, xp.ones_like(length)))


def _inverse(p: Array, start: _Deflation, chosen: Plan, xp: Namespace) -> Array:
    eye = _identity(p, xp)
    first, *between, last = chosen.steps
    c = first.scale / as_matrices(start.upper)
    r = eye - c * start.rest
    square = eye - (2 * c) * start.rest + (c * c) * start.square
    x = c * (polynomial(r, first.coefficients, xp, square=square) + first.coefficients[0] * eye)
    # Rounding of order eps·θ along v has grown with q(Q): what q(Q) has there is taken out, not what it should have.
    v, along = start.vector, x @ start.vector
    mean = as_matrices(xp.sum(xp.conj(v) * along, axis=(-2, -1))) + 1 / as_matrices(start.value)
    along = along - 0.5 * mean * v
    x = x - (v @ matrix_transpose_conj(along, xp) + along @ matrix_transpose_conj(v, xp))
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
        if not full_rank:
            solved = _finish_at_cutoff(growth, a, rtol**power / spread, solved, hermitian, xp)
    return solved.x, Work(solved.steps, solved.products, solved.bound, cutoff, solved.accepted)


def _largest_eigenvalue(gram: Array, square: Array, xp: Namespace) -> Array:
    """An estimate of λ_max(G) from below, a few per cent off: the larger of tr G⁴/tr G³ and a Rayleigh quotient."""
    fourth = frobenius(square, xp) ** 2
    third = xp.real(xp.sum(xp.conj(gram) * square, axis=(-2, -1)))
    safe = xp.where(third > 0, third, xp.ones_like(third))
    v = from_host(np.random.default_rng(0).standard_normal((gram.shape[-1], 1)), gram, xp)
    for _ in range(6):
        v = _unit(square @ v, xp)
    rayleigh = xp.real(xp.sum(xp.conj(v) * (gram @ v), axis=(-2, -1)))
    return xp.where(third > 0, xp.maximum(fourth / safe, rayleigh), xp.ones_like(third))


def _first_step(gram: Array, square: Array, scale: Array, adjoint: Array | None, step: Step, *, xp: Namespace) -> Array:
    """X after the first step, on E₀ = G/scale; the estimate of the scale has left its square."""
    eye = _identity(gram, xp)
    c = step.scale / scale
    r2 = eye - (2 * c) * gram + (c * c) * square
    s = polynomial(eye - c * gram, step.coefficients, xp, square=r2) + step.coefficients[0] * eye
    return c * s if adjoint is None else (c * s) @ adjoint


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
    steps, products, bound = (xp.where(new, f, old) for f, old in zip(found[1:4], solved[1:4], strict=True))
    return _Solved(x, steps, products, bound, solved.accepted | new)


def _finish_full_rank(growth: _Growth, a: Array, solved: _Solved, xp: Namespace) -> _Solved:
    """Finish elements all of whose eigenvalues of E are near 1: nothing is dropped, and Newton needs no purification.

    A step of order 3 with R = I − E from split factors is the last; where R was too large for it, it is repeated.
    """
    n, eps = a.shape[-1], float(xp.finfo(a.dtype).eps)
    eye = _identity(a, xp)
    full = frobenius(eye - growth.e, xp) <= 1.2 * _GROWN * math.sqrt(n)
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
    n = a.shape[-1]
    gap = frobenius(growth.e - growth.e @ growth.e, xp) <= 1.2 * _GROWN * math.sqrt(n)
    if not bool(xp.any(gap & ~solved.accepted)):
        return solved
    ends = xp.full_like(cutoff, 1.2 * _GROWN)
    found = _purified(growth.x, growth, a, ends, xp)
    e = accurate_product(found.x, a, xp)
    certified = frobenius(accurate_product(a, e, xp, minus=a), xp) <= 0.5 * cutoff
    found = found._replace(accepted=gap & certified)
    if not bool(xp.any(found.accepted & ~solved.accepted)):
        return solved
    return _choose(_orthogonalised(found, a, hermitian, xp), solved, xp)


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

    def body(state: tuple) -> tuple:
        x, ends, passes, running = state
        e = x @ a
        square = e @ e
        # Below √eps/3 the accurate pass leaves 3r² ≤ eps; below κ·eps there is nothing left to gain.
        target = xp.maximum(eps * norm * frobenius(x, xp), xp.full_like(norm, enough))
        running = running & ~(frobenius(e - square, xp) <= target)
        x = xp.where(as_matrices(running), polynomial(e, _PURIFYING, xp, square=square) @ x, x)
        ends = xp.where(running, _purification_residual(ends), ends)
        return x, ends, passes + xp.astype(running, passes.dtype), running

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

    zero = xp.zeros_like(ends)
    x, ends, passes, _ = _repeat(body, (x, ends, zero, zero == 0), _PURIFICATIONS, a, xp)
    ends = xp.abs(ends)
    x, ends, finest, _ = _repeat(accurate, (x, ends, zero, zero == 0), 3, a, xp)
    steps = len(growth.steps) + passes + finest
    products = growth.products + 1 + 5 * passes + 2 + 5 * finest
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
    products = found.products + (3 if hermitian else 6) + 3
    # Rounding of X alone makes E this much non-Hermitian.
    unavoidable = eps * frobenius(x, xp) * frobenius(a, xp)
    defects = [frobenius(t - matrix_transpose_conj(t, xp), xp) for t in (e, f)]
    needed = xp.maximum(*defects) > unavoidable
    if not is_traced(a) and not bool(xp.any(needed & found.accepted)):
        return found._replace(products=products)
    left = _projector(matrix_transpose_conj(e, xp) @ e, xp)
    right = left if hermitian else _projector(f @ matrix_transpose_conj(f, xp), xp)
    cleaned = left @ x @ right
    e = accurate_product(cleaned, a, xp)
    ex = e @ cleaned
    cleaned = 3 * ex - 2 * (e @ ex)
    spent = products + (11 if hermitian else 22) + 2 + 5
    x = xp.where(as_matrices(needed), cleaned, x)
    return found._replace(
        x=x, steps=found.steps + xp.astype(needed, found.steps.dtype), products=xp.where(needed, spent, products)
    )


def _projector(g: Array, xp: Namespace) -> Array:
    """The orthogonal projector onto the range of Hermitian g with eigenvalues 0 or a little above 1."""
    for _ in range(2):
        g = polynomial(g, _PURIFYING, xp) @ g
    square = g @ g
    return 3 * square - 2 * (square @ g)
