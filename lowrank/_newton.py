"""The two iterations behind ``pinv``: scaled Newton, and growth with purification.

Scaled Newton (Pan & Schreiber, SIAM J. Sci. Stat. Comput. 12, 1991) leaves after K steps the smallest residual of all
polynomials of degree 2^K, and its K is known beforehand. For the truncated pseudoinverse it grows E = XA from the
scale of σ² until the cutoff stands at ½; purification E ← 3E² − 2E³ (McWeeny, Rev. Mod. Phys. 32, 1960), second order
at 0 and at 1, then sends what lies below to 0 and what lies above to 1. docs/pinv.md has the derivations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lowrank._accurate import accurate_product
from lowrank._array import (
    Array,
    Namespace,
    device,
    from_host,
    is_traced,
    matrix_transpose_conj,
    real_dtype,
    repeat,
    to_host,
)

# Any bound u that equals σ_max lets rounding push E past the end of the interval, where the next scaled
# step grows it like a Chebyshev polynomial outside [−1, 1]; one per cent keeps it inside.
_MARGIN = 1.01
# Scaled steps fold large eigenvalues of E down to this at the least, far above rounding; folded to
# rounding level they could change sign and never come back. It costs half a step.
_FLOOR = 0.01
# Growth ends when what lies above √_GUARD times the cutoff has E within _GROWN of 1. The guard is where a
# spectrum's transition from 0 to 1 has the cutoff itself near ½; the rest is corrected by one scalar.
_GROWN = 0.1
_GUARD = 2.8
# A relative distance d of σ from the cutoff shows as |E − ½| ≈ 0.7d, which purification enlarges 1.5-fold a
# pass: 16 passes decide all that lies further than about one per cent from the cutoff.
_PURIFICATIONS = 16
# From _GROWN, 3r² five times over is below eps in float64.
_IDEMPOTENT = 5
# λ_max of the Gram matrix G from tr G^2p and tr G^p, p = 2^(_SQUARINGS − 1).
_SQUARINGS = 3


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


class _Schedule(NamedTuple):
    """Scaled Newton on spectra in [low, 2 − low]: factors (K, ...), and where it ends, (...)."""

    factors: Array
    count: Array
    epsilon: Array
    tracked: Array
    uniform: bool


def _schedule(
    low: Array, tolerance: Any, floor: float, xp: Namespace, *, longest: int, tracked: Array | None = None
) -> _Schedule:
    """Factors ρ_k = 2/(2 − ε_k²), ε_{k+1} = ε_k²/(2 − ε_k²), until ε ≤ tolerance, per element.

    With m = max(low, floor) in place of low the large eigenvalues stay above the floor while those
    below it still grow 4/(1 + 2 floor)-fold a step. Written in low = 1 − ε, which keeps its digits
    when it is tiny; ``tracked`` is one eigenvalue followed through the same steps.
    """

    def advance(low: Array, epsilon: Array, tracked: Array, count: Array) -> tuple[Array, tuple]:
        run = epsilon > tolerance
        m = xp.maximum(low, xp.full_like(low, floor))
        s = m * (2 - m)
        rho = 2 / (1 + s)
        grown = rho * low * (2 - low)
        shrunk = xp.where(low >= floor, epsilon * epsilon / (1 + s), 1 - grown)
        followed = rho * tracked * (2 - tracked)
        return rho, (
            xp.where(run, grown, low),
            xp.where(run, shrunk, epsilon),
            xp.where(run, followed, tracked),
            count + xp.where(run, xp.ones_like(count), xp.zeros_like(count)),
        )

    state = low, 1 - low, low if tracked is None else tracked, xp.zeros_like(low)
    if is_traced(low):
        slot = xp.reshape(xp.arange(longest, device=device(low)), (longest,) + (1,) * low.ndim)

        def body(k: Array, carry: tuple) -> tuple:
            factors, state = carry
            rho, state = advance(*state)
            return xp.where(slot == k, rho, factors), state

        empty = xp.ones((longest, *low.shape), dtype=low.dtype, device=device(low))
        factors, state = repeat(body, (empty, state), longest, like=low)
    else:
        factors = np.empty((0, *low.shape))
        while len(factors) < longest and np.any(state[1] > tolerance):
            rho, state = advance(*state)
            factors = np.concat([factors, rho[None]])
    _, epsilon, tracked, count = state
    uniform = not is_traced(low) and bool(np.all(count == len(factors)))
    return _Schedule(factors, count, epsilon, tracked, uniform)


def _longest(low: float, tolerance: float) -> int:
    """Steps from any spectrum in [low, 2 − low] to ε ≤ tolerance: log₂(acosh(1/tol)/acosh(1/ε₀)), and two per cent
    for the floor, which takes as much off the fourfold growth."""
    return math.ceil(1.02 * math.log2(math.acosh(1 / tolerance) / math.sqrt(2 * low))) + 1


def _readable(values: Array, xp: Namespace) -> tuple[Array, Namespace]:
    """Scalars of the batch where a schedule can be made of them: on the host in fp64, unless traced."""
    return (values, xp) if is_traced(values) else (np.asarray(to_host(values), dtype=np.float64), np)


def _beside(values: Array, a: Array, xp: Namespace) -> Array:
    """Scalars of the batch, wherever a schedule left them, beside the matrices and in their real dtype."""
    return values if is_traced(values) else from_host(np.asarray(values), a, xp, dtype=real_dtype(a, xp))


def _follow(plan: _Schedule, x: Array, step: Callable[[Array, Array], Array], xp: Namespace) -> Array:
    """x ← step(ρ_k, x) through the schedule, each element frozen when its own steps are done."""
    factors, count = (as_matrices(_beside(t, x, xp)) for t in (plan.factors, plan.count))

    def body(k: Array, x: Array) -> Array:
        following = step(factors[k, ...], x)
        return following if plan.uniform else xp.where(count > k, following, x)

    return repeat(body, x, plan.factors.shape[0], like=x)


def scaled_newton(p: Array, *, ridge: float, xp: Namespace) -> tuple[Array, Work]:
    """P⁻¹ for Hermitian P ≽ ridge·I, by scaled Newton from X₀ = cI.

    With u ≥ ‖P‖_∞ and ℓ = ridge/u, c = 2/(u(1+ℓ)) puts the spectrum of E in [1−ε₀, 1+ε₀], ε₀ = (1−ℓ)/(1+ℓ),
    so the steps depend on κ = u/ridge, not κ². The first step is a polynomial in P and costs no product;
    the last uses E from split factors, without which A·δX would be of order κ²·eps.
    """
    eps = float(xp.finfo(p.dtype).eps)
    finite, p = finite_part(p, xp)
    upper = _MARGIN * xp.max(xp.sum(xp.abs(p), axis=-1), axis=-1)
    # At least the ridge, for elements that are not finite and were set to zero.
    u, host = _readable(xp.maximum(upper, xp.full_like(upper, ridge)), xp)
    ell = ridge / u
    # A change of P in its last bits moves X by κ·eps; truncation is hidden far below that.
    tolerance = host.maximum(eps / (512 * ell), host.full_like(ell, eps / 4))
    # The last step squares ε, so the steps before it stop at the square root.
    plan = _schedule(
        2 * ell / (1 + ell), host.sqrt(2 * tolerance), math.sqrt(eps), host, longest=_longest(eps, math.sqrt(eps))
    )
    c = as_matrices(_beside(2 / (u * (1 + ell)), p, xp))
    eye = xp.eye(p.shape[-1], dtype=p.dtype, device=device(p))

    # The first step, from cI, needs no product.
    first = plan._replace(factors=plan.factors[:1])
    rest = plan._replace(factors=plan.factors[1:], count=plan.count - 1)
    x = _follow(first, c * eye, lambda rho, x: rho * (2 * x - c * c * p), xp)
    x = _follow(rest, x, lambda rho, x: rho * (2 * x - (x @ p) @ x), xp)
    residual = accurate_product(x, p, xp, minus=eye)
    square = plan.epsilon * plan.epsilon
    x = as_matrices(_beside(2 / (2 - square), p, xp)) * (x - residual @ x)
    # An eigenvalue outside [ridge, u], or rounding κ·eps near 1, leaves E − I before the last step larger
    # than that step can mend.
    valid = finite & (frobenius(residual, xp) <= 0.5)
    count = _beside(plan.count, p, xp)
    products = 2 * xp.maximum(count - 1, xp.zeros_like(count)) + 4
    work = Work(count + 1, products, _beside(square / (2 - square), p, xp), xp.zeros_like(count), valid)
    return or_nan(valid, hermitian_part(x, xp), xp), work


def _unit_scale(a: Array, xp: Namespace) -> Array:
    """The power of two nearest max |a_ij|, by which division is exact; 1 for a zero matrix."""
    largest = xp.max(xp.abs(a), axis=(-2, -1))
    safe = xp.where(largest > 0, largest, xp.ones_like(largest))
    return as_matrices(2.0 ** xp.round(xp.log2(safe)))


def _largest_eigenvalue(gram: Array, xp: Namespace) -> tuple[Array, Array]:
    """Estimates from below and bounds from above of λ_max(G), G ≽ 0, from the traces of its powers.

    tr G^2p / tr G^p is a mean of λ^p weighted by λ^p, and (tr G^2p)^(1/2p) exceeds λ_max by n^(1/2p) at most.
    """
    scale = xp.max(xp.sum(xp.abs(gram), axis=-1), axis=-1)
    scale = xp.where(scale > 0, scale, xp.ones_like(scale))
    power, p = gram / as_matrices(scale), 1
    for _ in range(_SQUARINGS):
        half = power
        power, p = power @ power, 2 * p
    trace, half_trace = (xp.real(xp.linalg.trace(t)) for t in (power, half))
    positive = trace > 0
    trace, half_trace = (xp.where(positive, t, xp.ones_like(t)) for t in (trace, half_trace))
    lower = (trace / half_trace) ** (2 / p)
    upper = xp.minimum(trace ** (1 / p), xp.ones_like(trace))
    return scale * lower, scale * upper


def _projector(g: Array, xp: Namespace) -> tuple[Array, Array]:
    """The orthogonal projector onto the range of Hermitian g with eigenvalues 0 or at least 1, and its products.

    Scaled Newton G ← ρ(2G − G²) brings the eigenvalues near 1, purification there and to 0; the result is
    idempotent to eps, however g is scaled along its range.
    """
    upper = _MARGIN * xp.max(xp.sum(xp.abs(g), axis=-1), axis=-1)
    u, host = _readable(upper, xp)
    low = 1 / host.maximum(u, host.ones_like(u))
    longest = _longest(math.sqrt(float(xp.finfo(g.dtype).eps)), _GROWN)
    plan = _schedule(2 * low / (1 + low), _GROWN, _FLOOR, host, longest=longest)
    g = as_matrices(_beside(2 * low / (1 + low), g, xp)) * g
    g = _follow(plan, g, lambda rho, g: rho * (2 * g - g @ g), xp)

    def purify(_: Array, g: Array) -> Array:
        square = g @ g
        return 3 * square - 2 * (square @ g)

    g = repeat(purify, g, _IDEMPOTENT, like=g)
    return g, _beside(plan.count, g, xp) + 2 * _IDEMPOTENT


def _accurately_purified(x: Array, a: Array, xp: Namespace) -> Array:
    """X ← (3E − 2E²)X with E from split factors: five products, and rounding of order eps·‖X‖ only."""
    e = accurate_product(x, a, xp)
    ex = e @ x
    return 3 * ex - 2 * (e @ ex)


def truncated(a: Array, *, rtol: float, hermitian: bool, xp: Namespace) -> tuple[Array, Work]:
    """The pseudoinverse with singular values up to rtol·σ_max dropped.

    A rectangular matrix is first reduced to the square factor of its QR decomposition, A⁺ = R⁺Qᴴ.
    """
    m, n = a.shape[-2:]
    if m < n:
        x, work = truncated(matrix_transpose_conj(a, xp), rtol=rtol, hermitian=False, xp=xp)
        return matrix_transpose_conj(x, xp), work
    finite, a = finite_part(a, xp)
    scale = _unit_scale(a, xp)
    a = a / scale
    if m > n:
        q, a = xp.linalg.qr(a)
    x, work = _truncated_square(a, rtol=rtol, xp=xp)
    x = x @ matrix_transpose_conj(q, xp) if m > n else x
    x = hermitian_part(x, xp) if hermitian else x
    work = work._replace(cutoff=work.cutoff * scale[..., 0, 0], valid=finite)
    return or_nan(finite, x / scale, xp), work


def _truncated_square(a: Array, *, rtol: float, xp: Namespace) -> tuple[Array, Work]:
    """Growth, purification and projection of square matrices of entries up to about 1.

    Growth doubles rounding in the null spaces at every step. Purification X ← (3E − 2E²)X removes it except
    from two blocks, which map between a null space and a range: any polynomial iteration is neutral
    there. The orthogonal projectors onto the ranges of Aᴴ and A, from EᴴE and FFᴴ with E = XA and F = AX,
    remove those.
    """
    adjoint = matrix_transpose_conj(a, xp)
    lower, upper = _largest_eigenvalue(adjoint @ a, xp)
    (low_square, host), (high_square, _) = _readable(lower, xp), _readable(upper, xp)
    high_square = _MARGIN**2 * high_square
    at_cutoff = rtol**2 * low_square / high_square
    start = _GUARD * at_cutoff
    narrowest = _GUARD * (rtol / _MARGIN) ** 2 * a.shape[-1] ** (-1 / 2**_SQUARINGS)
    plan = _schedule(
        2 * start / (1 + start),
        _GROWN,
        _FLOOR,
        host,
        longest=_longest(narrowest, _GROWN),
        tracked=2 * at_cutoff / (1 + start),
    )
    x = as_matrices(_beside(2 / (high_square * (1 + start)), a, xp)) * adjoint
    x = _follow(plan, x, lambda rho, x: rho * (2 * x - (x @ a) @ x), xp)
    level, epsilon = _beside(0.5 / plan.tracked, a, xp), _beside(plan.epsilon, a, xp)
    ends = xp.stack([1 - level * (1 - epsilon), 1 - level * (1 + epsilon)])
    x, passes, bound = _purified(as_matrices(level) * x, a, xp.sqrt(upper), ends, xp)

    for _ in range(2):
        x = _accurately_purified(x, a, xp)
    e, f = accurate_product(x, a, xp), accurate_product(a, x, xp)
    left, left_products = _projector(matrix_transpose_conj(e, xp) @ e, xp)
    right, right_products = _projector(f @ matrix_transpose_conj(f, xp), xp)
    x = _accurately_purified(left @ x @ right, a, xp)
    for _ in range(3):
        bound = _purification(bound)

    count = _beside(plan.count, a, xp)
    products = 2 * count + 3 * passes + left_products + right_products + (1 + _SQUARINGS + 3 * 5 + 6 + 4)
    return x, Work(count + passes + 3, products, bound, rtol * xp.sqrt(lower), passes > 0)


def _purification(r: Array) -> Array:
    """What purification makes of r = 1 − e: 1 − (3e² − 2e³)."""
    return r * r * (3 - 2 * r)


def _purified(x: Array, a: Array, norm: Array, ends: Array, xp: Namespace) -> tuple[Array, Array, Array]:
    """X ← (3E − 2E²)X per element until ‖E − E²‖ is at rounding level.

    Returns X, the passes each element took, and the bound on |1 − e| that follows from the ends of the
    interval of 1 − e that it started from.
    """
    eps = float(xp.finfo(x.dtype).eps)

    def body(_: Array, state: tuple) -> tuple:
        x, ends, passes, running = state
        e = x @ a
        square = e @ e
        # Below √eps/3 the pass now made leaves 3r² ≤ eps; below κ·eps there is nothing left to gain.
        target = xp.maximum(eps * norm * frobenius(x, xp), xp.full_like(norm, math.sqrt(eps) / 3))
        residual = frobenius(e - square, xp)
        x = xp.where(as_matrices(running), (3 * e - 2 * square) @ x, x)
        ends = xp.where(running, _purification(ends), ends)
        return x, ends, passes + xp.astype(running, passes.dtype), running & ~(residual <= target)

    passes = xp.zeros_like(norm)
    x, ends, passes, _ = repeat(
        body,
        (x, ends, passes, passes == 0),
        _PURIFICATIONS,
        like=x,
        done=lambda state: not bool(xp.any(state[-1])),
    )
    return x, passes, xp.max(xp.abs(ends), axis=0)
