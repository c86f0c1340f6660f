"""The pseudoinverse of square matrices with singular values up to a cutoff dropped, by growth and purification.

Growth composes the steps of ``_schedule`` (Pan & Schreiber, SIAM J. Sci. Stat. Comput. 12, 1991) and sends the
eigenvalues σ² of AᴴA towards 1, until none is left above the cutoff; purification E ← p(E) with p flat at 0 and at 1
(McWeeny, Rev. Mod. Phys. 32, 1960) then sends what lies below to 0 and what lies above to 1. docs/pinv.md has the
derivations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from lowrank._accurate import accurate_cost, accurate_product
from lowrank._array import Array, Namespace, from_host, is_traced, matrix_transpose_conj
from lowrank._newton import (
    MARGIN,
    Work,
    all_true,
    apply,
    as_matrices,
    first_polynomial,
    frobenius,
    identity,
    normal,
    polynomial,
    unit,
)
from lowrank._schedule import PRODUCTS, Step, levels, plan

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
# Random rows that look for what growth has left above the cutoff.
_PROBES = 8


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
    spread = MARGIN * a.shape[-1] ** 0.25
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
        v = unit(square @ v, xp)
    rayleigh = xp.real(xp.sum(xp.conj(v) * (gram @ v), axis=(-2, -1)))
    return xp.where(third > 0, xp.maximum(fourth / safe, rayleigh), xp.ones_like(third))


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

    A step of order 3 with R = I − E from split factors is the last; where R was too large for it, it is repeated.
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
    products = growth.products + chosen.products - 1 + (2 + accurate_cost(a, xp)) * passes
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
    if all_true(solved.accepted, xp):
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
    spent = 2 * accurate_cost(a, xp) + 2
    if bool(xp.any(found.accepted & ~solved.accepted)):
        cleaned = _orthogonalised(found, a, hermitian, xp)
        solved = _choose(cleaned._replace(products=cleaned.products + spent), solved, xp)
    # What has been tried in vain is charged too.
    return _charge(solved, found.products - growth.products + spent, xp)


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
    products = growth.products + 5 * passes + looked + (2 + accurate_cost(a, xp)) * finest
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
    products = found.products + accurate_cost(a, xp) * (1 if hermitian else 2)
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
    spent = products + spent + more + (1 if hermitian else 2) + 4 + accurate_cost(a, xp)
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
    if not all_true(near, xp):
        u = MARGIN * xp.max(xp.sum(xp.abs(g), axis=-1), axis=-1)
        grown = g / as_matrices(xp.where(u > 1, u, xp.ones_like(u)))
        # At low = 100·eps what rounding has put into the null space stays far below what purification removes.
        chosen = plan(100 * float(xp.finfo(g.dtype).eps), 1.0, _GROWN)
        for step in chosen.steps:
            grown = apply(step, grown, grown, xp)
            products = xp.where(near, products, products + (_cost(step) - 1))
        g = xp.where(as_matrices(near), g, grown)
    for _ in range(2):
        g = polynomial(g, _PURIFYING, xp) @ g
    square = g @ g
    return 3 * square - 2 * (square @ g), products + 11


def _cost(step: Step) -> int:
    return PRODUCTS[len(step.coefficients)]
