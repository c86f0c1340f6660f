"""The pseudoinverse of square matrices with singular values up to a cutoff dropped, by growth and purification.

Growth composes the steps of ``_schedule`` (Pan & Schreiber, SIAM J. Sci. Stat. Comput. 12, 1991) and sends the
eigenvalues σ² of AᴴA towards 1, until none is left above the cutoff; purification E ← p(E) with p flat at 0 and at 1
(McWeeny, Rev. Mod. Phys. 32, 1960) then sends what lies below to 0 and what lies above to 1. docs/pinv.md has the
derivations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from lowrank._accurate import accurate_cost, accurate_product
from lowrank._array import Array, Namespace, from_host, identity, is_traced, matrix_transpose_conj
from lowrank._newton import (
    MARGIN,
    Work,
    all_true,
    apply,
    as_matrices,
    first_polynomial,
    frobenius,
    normal,
    polynomial,
    unit,
)
from lowrank._schedule import Step, levels, plan

# Growth ends when what lies above √_GUARD times the cutoff has E within _GROWN of 1. The guard is where a
# spectrum's transition from 0 to 1 has the cutoff itself near ½; the rest is corrected by one scalar, which leaves the
# upper end of E below 1.22 for all n and rtol. (Purification leads e to 1 from up to 1.247.)
_GROWN = 0.1
_GUARD = 2.5
# What growth is to bring to 1 in one step at least: nearer to 1, a step is too flat to tell the cutoff from it.
_HIGHEST = 0.85
# A cutoff σ² above this fraction of σ_max² needs no growth: brought to ½ it leaves the upper end of E below 1.2.
_NO_GROWTH = 0.45
# Eager growth looks after two steps of order 9 whether it is done; they lower the resolved cutoff by about this.
_STRIDE = 64.0
# A relative distance d of σ from the cutoff shows as |E − ½| ≥ 0.57d, which a purification enlarges 2.46-fold: seven
# of them decide all that lies further than about one per cent from the cutoff, and finish it.
_PURIFICATIONS = 7
# The coefficients of p(e)/e, p(e) = 126e⁵ − 420e⁶ + 540e⁷ − 315e⁸ + 70e⁹: p = p' = … = p⁗ = 0 at 0, and so is 1 − p
# at 1.
_PURIFYING = (0.0, 0.0, 0.0, 0.0, 126.0, -420.0, 540.0, -315.0, 70.0)
# Random rows that look for the largest eigenvalue, and for what growth has left above the cutoff.
_PROBES = 8
# σ_max to one per cent takes G¹⁶, from G².
_SQUARINGS = 3


class _Solved(NamedTuple):
    """A result, the figures of it that differ from element to element, and where it may be used."""

    x: Array
    steps: Array
    products: Array
    bound: Array
    accepted: Array


class _Purified(NamedTuple):
    """X, E = XA and E² on the way to E² = E, how far E is from 1 on the range, and the purifications so far."""

    x: Array
    e: Array
    square: Array
    ends: Array
    passes: Array


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
    spread = MARGIN * a.shape[-1] ** 0.25
    power = 1 if definite else 2
    cutoff = rtol * (largest if definite else xp.sqrt(largest))
    zero = xp.zeros_like(cutoff)
    solved = _Solved(xp.zeros_like(a), zero, zero, zero, zero > 0)
    first = functools.partial(_first_step, gram, square, as_matrices(spread * largest), adjoint, xp=xp)
    pauses: Iterable[float] = levels(rtol, _STRIDE ** (2 / power)) if eager else (rtol,)
    growth = _Growth(None, None, 1.0, (), -1 if definite else 1)
    if rtol**power >= _NO_GROWTH:
        start, scale = identity(a, xp) if definite else adjoint, as_matrices(spread * largest)
        pauses, growth = (), _Growth(start / scale, gram / scale, 1 / spread, (), 1 if definite else 2)
    for level in pauses:
        growth = _grow(growth, a, min(_GUARD * level**power / spread, _HIGHEST), first, xp)
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
            # How much larger the cutoff is than growth was planned for.
            excess = _refined(largest, gram, square, xp) / largest
            growth = growth._replace(products=growth.products + _SQUARINGS)
            cutoff = xp.where(solved.accepted, cutoff, cutoff * excess ** (1 / power))
            solved = _finish_at_cutoff(growth, a, rtol**power / spread * excess, solved, hermitian, xp)
    return solved.x, Work(solved.steps, solved.products, solved.bound, cutoff, solved.accepted)


def _largest_eigenvalue(gram: Array, square: Array, xp: Namespace) -> Array:
    """An estimate of λ_max(G) from below, a few per cent off: the larger of tr G⁴/tr G³ and a Rayleigh quotient."""
    fourth = frobenius(square, xp) ** 2
    third = xp.real(xp.sum(xp.conj(gram) * square, axis=(-2, -1)))
    safe = xp.where(third > 0, third, xp.ones_like(third))
    return xp.where(third > 0, xp.maximum(fourth / safe, _rayleigh(gram, square, xp)), xp.ones_like(third))


def _refined(largest: Array, gram: Array, square: Array, xp: Namespace) -> Array:
    """The estimate, from below within about one per cent of σ_max: a Rayleigh quotient after products with G¹⁶.

    Random rows have a part of at least 1/(60n) in an eigenvector, at odds of a million to one, and 96 powers of G leave
    the mean of the eigenvalues, weighted by 192nd powers, no more than (ln 60n − 2)/192 below the largest.
    """
    power = square / as_matrices(largest**2)
    for _ in range(_SQUARINGS):
        power = power @ power
    return xp.maximum(largest, _rayleigh(gram, power, xp))


def _rayleigh(gram: Array, power: Array, xp: Namespace) -> Array:
    """A Rayleigh quotient of G in a few random rows, after products with a power of it."""
    v = from_host(normal(_PROBES, gram.shape[-1]), gram, xp)
    for _ in range(6):
        v = unit(v @ power, xp)
    return xp.real(xp.sum(xp.conj(v) * (v @ gram), axis=(-2, -1)))


def _first_step(gram: Array, square: Array, scale: Array, adjoint: Array | None, step: Step, *, xp: Namespace) -> Array:
    """X after the first step, on E₀ = G/scale; the estimate of the scale has left its square."""
    c = step.scale / scale
    s = first_polynomial(step, c, gram, square, xp)
    s = c * s
    return s if adjoint is None else s @ adjoint


def _grow(growth: _Growth, a: Array, target: float, first: Callable[[Step], Array], xp: Namespace) -> _Growth:
    """On until what was at ``target`` in E₀, and all above, is within _GROWN of 1."""
    for step in growth.steps:
        target = step.follow(target)
    chosen = plan(target, growth.high, _GROWN)
    x, e = growth.x, growth.e
    for step in chosen.steps:
        x = first(step) if x is None else apply(step, x, e, xp)
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

    A step of order 3 with R = I − E from an accurate E is the last; where R was too large for it, it is repeated.
    """
    n, eps = a.shape[-1], float(xp.finfo(a.dtype).eps)
    eye = identity(a, xp)
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
        x = apply(step, x, x @ a if k else e, xp)

    def body(state: tuple[Array, ...]) -> tuple[Array, ...]:
        x, passes, residual, running = state
        r = -accurate_product(x, a, xp, minus=1.0)
        found = frobenius(r, xp)
        x = xp.where(as_matrices(running), x + r @ (x + r @ x), x)
        residual = xp.where(running, found, residual)
        return x, passes + xp.astype(running, passes.dtype), residual, running & (found > math.sqrt(n) * 2 * enough)

    zero = xp.zeros_like(solved.bound)
    x, passes, residual, _ = _repeat(body, (x, zero, zero, zero == 0), 2, a, xp)
    steps = len(growth.steps) + len(chosen.steps) + passes
    products = growth.products + chosen.products - 1 + (2 + accurate_cost(a, xp)) * passes
    bound = xp.full_like(zero, enough**3)
    return _choose(_Solved(x, steps, products, bound, full & (residual <= 0.1)), solved, xp)


def _repeat(
    body: Callable[[tuple[Array, ...]], tuple[Array, ...]], state: tuple[Array, ...], most: int, a: Array, xp: Namespace
) -> tuple[Array, ...]:
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
    cutoff. What is cheap is looked at first."""
    if all_true(solved.accepted, xp):
        return solved
    square = growth.e @ growth.e
    solved = _charge(solved, 1, xp)
    # Every eigenvalue within the ripple of 1 contributes to E − E² as much as the ripple; one halfway contributes ¼.
    allowed = 1.1 * (growth.high - 1) * math.sqrt(a.shape[-1]) + 0.05
    gap = ~solved.accepted & (frobenius(growth.e - square, xp) <= allowed)
    if not bool(xp.any(gap)):
        return solved
    gap = gap & _nothing_left(growth.x, a, cutoff, xp)
    if not bool(xp.any(gap)):
        return solved
    zero = xp.zeros_like(cutoff)
    pure = _Purified(growth.x, growth.e, square, xp.full_like(cutoff, 1.2 * _GROWN), zero)
    pure = _purify(pure, a, gap, 1, xp)
    # The ripple is gone, so that nothing halfway can hide in it.
    gap = gap & (frobenius(pure.e - pure.square, xp) <= 0.05)
    if not bool(xp.any(gap)):
        return _charge(solved, 5 * pure.passes, xp)
    pure = _purify(pure, a, gap, 1, xp)
    found, e, _ = _polished(pure, a, gap, len(growth.steps), xp)
    # A(I − E)² in place of A(I − E), from which rounding of X does not vanish: it is κ·eps in E.
    left = a - a @ e
    left = left - left @ e
    # tr (MᴴM)² bounds σ_max(M)⁴.
    largest = xp.sqrt(frobenius(matrix_transpose_conj(left, xp) @ left, xp))
    certified = gap & (largest <= 0.9 * cutoff)
    # What has been tried in vain is charged too.
    solved = _charge(solved, 5 * pure.passes + xp.where(gap, found.products + 3, zero), xp)
    if not bool(xp.any(certified)):
        return solved
    found = found._replace(products=zero + growth.products, accepted=certified)
    return _choose(_orthogonalised(found, e, certified, a, hermitian, xp), solved, xp)


def _nothing_left(x: Array, a: Array, cutoff: Array, xp: Namespace) -> Array:
    """Whether random rows say that no singular value above the cutoff has been left near E = 0.

    z ← z(I − AX) takes the ripple, or less, of what is near 1 out of z and leaves the rest.
    """
    rows = from_host(normal(_PROBES, a.shape[-2]), a, xp)
    z = xp.broadcast_to(rows, (*a.shape[:-2], *rows.shape))
    image = z @ a
    for _ in range(math.ceil(math.log(float(xp.finfo(a.dtype).eps)) / math.log(1.2 * _GROWN))):
        z = z - image @ x
        image = z @ a
    # Many values below the cutoff are to pass, even if a few above it then do.
    return frobenius(image, xp) <= 0.5 * math.sqrt(_PROBES * a.shape[-1]) * cutoff


def _charge(solved: _Solved, products: Any, xp: Namespace) -> _Solved:
    """Products spent on elements that are not settled by them."""
    return solved._replace(products=xp.where(solved.accepted, solved.products, solved.products + products))


def _finish_at_cutoff(
    growth: _Growth, a: Array, at_cutoff: Array, solved: _Solved, hermitian: bool, xp: Namespace
) -> _Solved:
    """Finish what is left, with the cutoff at E = ½; at ``at_cutoff`` it was in E₀."""
    for step in growth.steps:
        at_cutoff = step.follow(at_cutoff)
    level = 0.5 / at_cutoff
    ends = xp.maximum(1 - level * (1 - _GROWN), level * growth.high - 1)
    x, e = as_matrices(level) * growth.x, as_matrices(level) * growth.e
    pure = _Purified(x, e, e @ e, ends, xp.zeros_like(ends))
    pure = _purify(pure, a, ~solved.accepted, _PURIFICATIONS, xp)
    found, e, decided = _polished(pure, a, ~solved.accepted, len(growth.steps), xp)
    found = found._replace(products=growth.products + 1 + 5 * pure.passes + found.products)
    return _choose(_orthogonalised(found, e, decided, a, hermitian, xp), solved, xp)


def _purification_residual(r: Array) -> Array:
    """What purification makes of r = 1 − e."""
    return r**5 * (126 + r * (-420 + r * (540 + r * (-315 + r * 70))))


def _purify(pure: _Purified, a: Array, running: Array, most: int, xp: Namespace) -> _Purified:
    """X ← p(E)E⁻¹X, up to ``most`` times, until E² = E but for what ``_polished`` removes, in elements ``running``."""
    x, e, square, ends, passes = pure
    eps = float(xp.finfo(a.dtype).eps)
    norm = frobenius(a, xp)
    for _ in range(most):
        # Below √eps/3 the accurate step leaves 3r² ≤ eps; below κ·eps there is nothing left to gain.
        enough = xp.maximum(eps * norm * frobenius(x, xp), xp.full_like(norm, math.sqrt(eps) / 3))
        running = running & ~(frobenius(e - square, xp) <= enough)
        if not is_traced(a) and not bool(xp.any(running)):
            break
        x = xp.where(as_matrices(running), polynomial(e, _PURIFYING, xp, square=square) @ x, x)
        e = x @ a
        square = e @ e
        ends = xp.where(running, _purification_residual(ends), ends)
        passes = passes + xp.astype(running, passes.dtype)
    return _Purified(x, e, square, xp.abs(ends), passes)


def _polished(pure: _Purified, a: Array, running: Array, steps: int, xp: Namespace) -> tuple[_Solved, Array, Array]:
    """(3E − 2E²)X with an accurate E, once or until it is enough, in elements ``running``; its E; and whether
    that is near E².

    Enough is a residual of eps and not of κ·eps, which rounding of X adds: what the step leaves is κ times as large
    in AX, what rounding adds is not.
    """
    eps = float(xp.finfo(a.dtype).eps)

    def body(state: tuple[Array, ...]) -> tuple[Array, ...]:
        x, e, ends, undecided, left, passes, running = state
        fresh = accurate_product(x, a, xp)
        square = fresh @ fresh
        found = frobenius(fresh - square, xp)
        s = 3 * fresh - 2 * square
        x, e = (xp.where(as_matrices(running), s @ t, u) for t, u in ((x, x), (fresh, e)))
        # Eigenvalues with |e(1 − e)| ≤ ρ ≤ 0.1 are within 1.2ρ of 0 or 1; the step leaves 3r² of r.
        nearer = xp.where(found <= 0.1, xp.minimum(ends, 1.2 * found), ends)
        ends = xp.where(running, nearer * nearer * (3 - 2 * nearer), ends)
        undecided = xp.where(running, found > 0.1, undecided)
        left = xp.where(running, 3 * xp.minimum(left, 1.2 * found) ** 2, left)
        return x, e, ends, undecided, left, passes + xp.astype(running, passes.dtype), running & (left > eps)

    zero = xp.zeros_like(pure.ends)
    state = (pure.x, pure.e, pure.ends, zero > 0, zero + 1, zero, running)
    x, e, ends, undecided, _, passes, _ = _repeat(body, state, 3, a, xp)
    return _Solved(x, steps + pure.passes + passes, (3 + accurate_cost(a, xp)) * passes, ends, zero == 0), e, ~undecided


def _orthogonalised(found: _Solved, e: Array, where: Array, a: Array, hermitian: bool, xp: Namespace) -> _Solved:
    """Remove what X has between a null space and a range.

    Purification cannot: any X ← p(XA)X is neutral there. The orthogonal projectors onto the ranges of Aᴴ and A, from
    EᴴE and FFᴴ with E = XA and F = AX, can. (A singular value at the cutoff itself may leave E with ½, of which
    projectors make nothing.)
    """
    if not is_traced(a) and not bool(xp.any(where)):
        return found
    left, spent = _projector(matrix_transpose_conj(e, xp) @ e, xp)
    right = left
    if not hermitian:
        f = accurate_product(a, found.x, xp)
        right, more = _projector(f @ matrix_transpose_conj(f, xp), xp)
        spent = spent + more + 1 + accurate_cost(a, xp)
    x = xp.where(as_matrices(where), left @ found.x @ right, found.x)
    return found._replace(x=x, products=found.products + spent + 3)


def _projector(g: Array, xp: Namespace) -> tuple[Array, Array]:
    """The orthogonal projector onto the range of Hermitian g with eigenvalues 0 or at least about 1, and its products.

    Most eigenvalues are 1 but for little; where singular values near the cutoff have left X far from symmetric they are
    not, and scaled Newton brings them near 1 first.
    """
    square = g @ g
    products = 2 + xp.zeros_like(xp.real(g[..., 0, 0]))
    near = frobenius(g - square, xp) <= 0.1
    if not all_true(near, xp):
        u = xp.maximum(MARGIN * xp.max(xp.sum(xp.abs(g), axis=-1), axis=-1), xp.ones_like(products))
        # Down to 100·eps what rounding has put into the null space stays far below what purification removes.
        for low, far in ((1 / 16, ~near & (u <= 16)), (100 * float(xp.finfo(g.dtype).eps), ~near & (u > 16))):
            if not is_traced(g) and not bool(xp.any(far)):
                continue
            chosen = plan(low, 1.0, _GROWN)
            grown = g / as_matrices(u)
            for step in chosen.steps:
                grown = apply(step, grown, grown, xp)
            g = xp.where(as_matrices(far), grown, g)
            products = products + (chosen.products - len(chosen.steps)) * xp.astype(far, products.dtype)
        square = g @ g
    for _ in range(2):
        # McWeeny's step, the last, leaves 3r².
        running = frobenius(g - square, xp) > math.sqrt(float(xp.finfo(g.dtype).eps)) / 3
        if not is_traced(g) and not bool(xp.any(running)):
            break
        g = xp.where(as_matrices(running), polynomial(g, _PURIFYING, xp, square=square) @ g, g)
        square = g @ g
        products = products + 4 * xp.astype(running, products.dtype)
    return 3 * square - 2 * (square @ g), products
