"""Moore–Penrose inverses from matrix products alone.

Newton's iteration X ← X(2I − AX) (Ben-Israel & Cohen, SIAM J. Numer. Anal. 3, 1966) is run in two forms.
A matrix with a ridge is inverted by *scaled* Newton (Pan & Schreiber, SIAM J. Sci. Stat. Comput. 12, 1991),
whose K steps leave the smallest residual of all polynomials of degree 2^K and whose K is known beforehand.
Any other matrix gets the truncated pseudoinverse: scaled Newton grows E = XA from the scale of σ² until the
cutoff stands at ½, and purification E ← 3E² − 2E³ (McWeeny, Rev. Mod. Phys. 32, 1960), which is second
order at 0 and at 1, sends what lies below to 0 and what lies above to 1. Products whose rounding decides the
result are formed from split factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lowrank._accurate import accurate_product
from lowrank._array import (
    Array,
    Namespace,
    arithmetic,
    device,
    from_host,
    has_derivative,
    is_half,
    is_traced,
    matrix_transpose_conj,
    namespace,
    real_dtype,
    repeat,
    stop_gradient,
    to_host,
)

# Relative cutoffs. Growing E from (σ/σ_max)² to ½ multiplies rounding in the null space by 1/(2 rtol²), and
# that noise comes back through the next product at eps/rtol² · eps; the smallest cutoff keeps it below 1e-3.
_DEFAULT_RTOL = {"float32": 1e-5, "float64": 1e-11}
_SMALLEST_RTOL = {"float32": 1e-6, "float64": 1e-12}
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


class PinvInfo(NamedTuple):
    """What :func:`pinv_newton` did and how good the result is; arrays of the batch shape ``a.shape[:-2]``.

    Attributes
    ----------
    steps : array of int
        Newton steps and purifications spent on the element (0 for ``method="direct"``).
    products : array of int
        Matrix products spent on it, those that estimate its norm included.
    bound : array of float
        A-priori bound, in exact arithmetic, on ‖I − XA‖₂ over the singular vectors whose singular value is at
        least 1.7 times the cutoff. With ``steps=`` and no ridge nothing is known of the spectrum: 1.
    residual : array of float
        ‖E − E²‖_F of the returned X, E = XA, measured; NaN where the input was not finite.
    rank : array of int
        tr E, rounded; −1 where the result is NaN.
    cutoff : array of float
        Singular values at or below it were dropped, in the units of ``a``; 0 where none were.
    finite : array of bool
        False where the result is NaN: because the element holds NaN or Inf, or because it contradicts
        ``hermitian=True`` or ``ridge > 0`` (then ``residual`` is Inf).
    """

    steps: Array
    products: Array
    bound: Array
    residual: Array
    rank: Array
    cutoff: Array
    finite: Array


class _Work(NamedTuple):
    """Figures of one solve, real arrays of the batch shape, kept apart from the differentiable result."""

    steps: Array
    products: Array
    bound: Array
    cutoff: Array
    valid: Array


def pinv_newton(
    a: Array,
    /,
    *,
    rtol: float | None = None,
    hermitian: bool = False,
    ridge: float = 0.0,
    alpha: float | Array | None = None,
    steps: int | None = None,
    method: str = "newton",
    return_info: bool = False,
) -> Array | tuple[Array, PinvInfo]:
    r"""Moore–Penrose pseudoinverse by matrix products.

    Parameters
    ----------
    a : array, shape (..., m, n)
        Real or complex floating matrices. float16 and bfloat16 are computed in float32.
    rtol : float, optional
        Relative cutoff: singular values at or below ``rtol * sigma_max`` count as zero, as in
        :func:`numpy.linalg.pinv`. The default is 1e-11 in float64 and 1e-5 in lower precision, larger than
        NumPy's: singular values between NumPy's default and this one are dropped. σ_max is known to a few per
        cent, so the cutoff is too; ``info.cutoff`` holds the value used.
    hermitian : bool
        Declares that ``a`` equals its conjugate transpose. The result then does so to the last bit.
    ridge : float
        δ > 0 declares ``a`` Hermitian positive semidefinite (``hermitian=True`` is required) and means
        ``a + δ I`` throughout. The number of steps then follows from δ and ‖a‖_∞ alone.
    alpha : float or array of shape (...), optional
        Scale of the start X₀ = α Aᴴ, with ``steps`` only; converges for 0 < α < 2/σ_max². The default is
        1.8/(‖A‖₁‖A‖_∞).
    steps : int, optional
        Run the textbook iteration X₀ = α Aᴴ, X ← 2X − XAX exactly so often, converged or not. Without it
        the truncated pseudoinverse is computed to near working precision.
    method : {"newton", "direct"}
        ``"direct"`` computes the same truncated pseudoinverse from the library's own eigh or SVD.
    return_info : bool
        Also return a :class:`PinvInfo`, at the cost of two products.

    Returns
    -------
    x : array, shape (..., n, m)
        Of the dtype, on the device and of the library of ``a``. A batch element that holds NaN or Inf, or
        contradicts what was declared of it (``hermitian``, or ``ridge`` with an eigenvalue below −δ, or δ too
        small for the precision), is NaN; its neighbours are unaffected, bit for bit.
    info : PinvInfo
        Only with ``return_info=True``.

    Raises
    ------
    TypeError
        If ``a`` is not an array of floating dtype.
    ValueError
        If ``a`` has fewer than two axes or is not square where ``hermitian`` says so; if an option is out of
        range, or contradicts another.

    Notes
    -----
    With ``steps`` the derivative is that of the iteration itself. Otherwise it is the closed form for constant
    rank (Golub & Pereyra, SIAM J. Numer. Anal. 10, 1973), twice differentiable, under torch and JAX.

    The error is about κ·eps, κ the ratio of the largest to the smallest singular value kept. Newton's
    iteration pays in batches and on accelerators; for a single large matrix on a CPU an SVD is faster.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import pinv_newton
    >>> a = np.array([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0]])
    >>> x, info = pinv_newton(a, return_info=True)
    >>> bool(np.allclose(x, np.linalg.pinv(a))), int(info.rank)
    (True, 1)
    """
    xp = namespace(a=a)
    _check_options(a, rtol, hermitian, ridge, alpha, steps, method)
    given = a
    if is_half(a):
        a = xp.astype(a, xp.float32)
    if rtol is None:
        rtol = _DEFAULT_RTOL[_precision(a, xp)]
    elif method == "newton" and steps is None:
        _check_reachable(rtol, _precision(a, xp))

    with arithmetic(a):
        if a.shape[-1] == 0 or a.shape[-2] == 0:
            x, work = xp.matrix_transpose(a), _nothing_to_do(a, xp)
        else:
            p = a + ridge * xp.eye(a.shape[-1], dtype=a.dtype, device=device(a)) if ridge > 0 else a
            if steps is not None:
                x, work = _textbook(p, steps=steps, alpha=alpha, ridge=ridge, xp=xp)
            else:
                if method == "direct":
                    solve = partial(_direct, rtol=rtol, hermitian=hermitian, ridge=ridge, xp=xp)
                elif ridge > 0:
                    solve = partial(_scaled_newton, ridge=ridge, xp=xp)
                else:
                    solve = partial(_truncated, rtol=rtol, hermitian=hermitian, xp=xp)
                x, work = _differentiable(solve, p, full_rank=ridge > 0, xp=xp)
            a = p
        info = _certificate(stop_gradient(a), stop_gradient(x), work, xp) if return_info else None
    x = xp.astype(x, given.dtype) if is_half(given) else x
    return x if info is None else (x, info)


def _check_options(a, rtol, hermitian, ridge, alpha, steps, method) -> None:
    shape = tuple(a.shape)
    if a.ndim < 2:
        raise ValueError(f"a must have shape (..., m, n), not {shape}")
    if hermitian and shape[-1] != shape[-2]:
        raise ValueError(f"hermitian=True needs square matrices, a has shape {shape}")
    if not (isinstance(ridge, (int, float, np.number)) and math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge must be a finite number >= 0, not {ridge!r}")
    if ridge > 0 and not hermitian:
        raise ValueError(f"ridge={ridge!r} declares a positive semidefinite; pass hermitian=True as well")
    if rtol is not None and not (isinstance(rtol, (int, float, np.number)) and 0 < rtol < 1):
        raise ValueError(f"rtol must be a number between 0 and 1, not {rtol!r}")
    if rtol is not None and (steps is not None or ridge > 0):
        raise ValueError(
            f"rtol={rtol!r} has no meaning with {'steps' if steps is not None else 'ridge > 0'}; leave it out"
        )
    if method not in ("newton", "direct"):
        raise ValueError(f"method must be 'newton' or 'direct', not {method!r}")
    if steps is not None:
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 0:
            raise ValueError(f"steps must be an integer >= 0, not {steps!r}")
        if method == "direct":
            raise ValueError("steps belongs to method='newton'; leave it out for method='direct'")
    if alpha is not None:
        if steps is None:
            raise ValueError("alpha scales the start of the textbook iteration; pass steps as well")
        alpha_shape = tuple(getattr(alpha, "shape", ()))
        try:
            fits = np.broadcast_shapes(alpha_shape, shape[:-2]) == shape[:-2]
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"alpha has shape {alpha_shape}, which does not broadcast to the batch {shape[:-2]} of a")


def _check_reachable(rtol: float, precision: str) -> None:
    if rtol < _SMALLEST_RTOL[precision]:
        raise ValueError(
            f"rtol={rtol!r} is below {_SMALLEST_RTOL[precision]}, the smallest cutoff matrix products resolve "
            f"in {precision}; raise it or use method='direct'"
        )


def _precision(a: Array, xp: Namespace) -> str:
    return "float32" if real_dtype(a, xp) == xp.float32 else "float64"


def _differentiable(solve, p: Array, *, full_rank: bool, xp: Namespace) -> tuple[Array, _Work]:
    """solve(p), with the closed-form derivative attached where the library differentiates."""
    if not has_derivative(p):
        return solve(p)
    from lowrank import _gradients

    x, *work = _gradients.pseudoinverse(solve, p, full_rank=full_rank, xp=xp)
    return x, _Work(*work)


def _nothing_to_do(a: Array, xp: Namespace) -> _Work:
    zero = xp.zeros(a.shape[:-2], dtype=real_dtype(a, xp), device=device(a))
    return _Work(zero, zero, zero, zero, zero == 0)


def _matrices(scalars: Array) -> Array:
    """Scalars of the batch with two axes more, to multiply matrices."""
    return scalars[..., None, None]


def _finite(a: Array, xp: Namespace) -> tuple[Array, Array]:
    """Which elements of the batch are finite, and the batch with the others set to zero."""
    finite = xp.all(xp.isfinite(a), axis=(-2, -1))
    return finite, xp.where(_matrices(finite), a, xp.zeros_like(a))


def _norm(a: Array, xp: Namespace) -> Array:
    return xp.linalg.matrix_norm(a, ord="fro")


def _is_hermitian(a: Array, xp: Namespace) -> Array:
    """Whether a and aᴴ differ by no more than rounding could explain, √eps relative to ‖a‖_F."""
    tolerance = math.sqrt(xp.finfo(real_dtype(a, xp)).eps)
    return _norm(a - matrix_transpose_conj(a, xp), xp) <= tolerance * _norm(a, xp)


def _hermitian_part(x: Array, xp: Namespace) -> Array:
    return 0.5 * (x + matrix_transpose_conj(x, xp))


def _or_nan(valid: Array, x: Array, xp: Namespace) -> Array:
    return xp.where(_matrices(valid), x, xp.asarray(math.nan, dtype=x.dtype, device=device(x)))


def _textbook(p: Array, *, steps: int, alpha: Any, ridge: float, xp: Namespace) -> tuple[Array, _Work]:
    """X₀ = α Pᴴ, X ← 2X − XPX (Lu et al., NeurIPS 2021, eq. 9), differentiable step by step."""
    finite, p = _finite(p, xp)
    magnitude = xp.abs(p)
    one_norm = xp.max(xp.sum(magnitude, axis=-2), axis=-1)
    inf_norm = xp.max(xp.sum(magnitude, axis=-1), axis=-1)
    one_norm, inf_norm = (xp.where(one_norm > 0, v, xp.ones_like(v)) for v in (one_norm, inf_norm))
    start = matrix_transpose_conj(p, xp)
    if alpha is None:
        # In this order, since the product of the two norms may overflow where X does not.
        x = 1.8 * (start / _matrices(one_norm)) / _matrices(inf_norm)
        spread = 1.8 * xp.ones_like(one_norm)
    else:
        alpha = xp.zeros_like(one_norm) + alpha
        x = _matrices(alpha) * start
        spread = alpha * one_norm * inf_norm
    for _ in range(steps):
        x = 2 * x - ((x @ p) @ x if p.shape[-1] <= p.shape[-2] else x @ (p @ x))
    # Eigenvalues of X₀P lie in [αδ², α‖P‖₁‖P‖_∞], and each step squares their distance from 1.
    worst = xp.maximum(1 - spread * (ridge / one_norm) * (ridge / inf_norm), spread - 1)
    zero = stop_gradient(xp.zeros_like(worst))
    work = _Work(zero + steps, zero + 2 * steps, stop_gradient(worst ** (2.0**steps)), zero, finite)
    return _or_nan(finite, x, xp), work


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
    factors, count = (_matrices(_beside(t, x, xp)) for t in (plan.factors, plan.count))

    def body(k: Array, x: Array) -> Array:
        following = step(factors[k, ...], x)
        return following if plan.uniform else xp.where(count > k, following, x)

    return repeat(body, x, plan.factors.shape[0], like=x)


def _scaled_newton(p: Array, *, ridge: float, xp: Namespace) -> tuple[Array, _Work]:
    """P⁻¹ for Hermitian P ≽ ridge·I, by scaled Newton from X₀ = cI.

    With u ≥ ‖P‖_∞ and ℓ = ridge/u, c = 2/(u(1+ℓ)) puts the spectrum of E in [1−ε₀, 1+ε₀], ε₀ = (1−ℓ)/(1+ℓ),
    so the steps depend on κ = u/ridge, not κ². The first step is a polynomial in P and costs no product;
    the last uses E from split factors, without which A·δX would be of order κ²·eps.
    """
    eps = float(xp.finfo(p.dtype).eps)
    finite, p = _finite(p, xp)
    valid = finite & _is_hermitian(p, xp)
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
    c = _matrices(_beside(2 / (u * (1 + ell)), p, xp))
    eye = xp.eye(p.shape[-1], dtype=p.dtype, device=device(p))

    # The first step, from cI, needs no product.
    first = plan._replace(factors=plan.factors[:1])
    rest = plan._replace(factors=plan.factors[1:], count=plan.count - 1)
    x = _follow(first, c * eye, lambda rho, x: rho * (2 * x - c * c * p), xp)
    x = _follow(rest, x, lambda rho, x: rho * (2 * x - (x @ p) @ x), xp)
    residual = accurate_product(x, p, xp, minus=eye)
    square = plan.epsilon * plan.epsilon
    x = _matrices(_beside(2 / (2 - square), p, xp)) * (x - residual @ x)
    # An eigenvalue outside [ridge, u], or rounding κ·eps near 1, leaves E − I before the last step larger
    # than that step can mend.
    valid = valid & (_norm(residual, xp) <= 0.5)
    count = _beside(plan.count, p, xp)
    products = 2 * xp.maximum(count - 1, xp.zeros_like(count)) + 4
    work = _Work(count + 1, products, _beside(square / (2 - square), p, xp), xp.zeros_like(count), valid)
    return _or_nan(valid, _hermitian_part(x, xp), xp), work


def _unit_scale(a: Array, xp: Namespace) -> Array:
    """The power of two nearest max |a_ij|, by which division is exact; 1 for a zero matrix."""
    largest = xp.max(xp.abs(a), axis=(-2, -1))
    safe = xp.where(largest > 0, largest, xp.ones_like(largest))
    return (2.0 ** xp.round(xp.log2(safe)))[..., None, None]


def _largest_eigenvalue(gram: Array, xp: Namespace) -> tuple[Array, Array]:
    """Estimates from below and bounds from above of λ_max(G), G ≽ 0, from the traces of its powers.

    tr G^2p / tr G^p is a mean of λ^p weighted by λ^p, and (tr G^2p)^(1/2p) exceeds λ_max by n^(1/2p) at most.
    """
    scale = xp.max(xp.sum(xp.abs(gram), axis=-1), axis=-1)
    scale = xp.where(scale > 0, scale, xp.ones_like(scale))
    power, p = gram / _matrices(scale), 1
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
    g = _matrices(_beside(2 * low / (1 + low), g, xp)) * g
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


def _truncated(a: Array, *, rtol: float, hermitian: bool, xp: Namespace) -> tuple[Array, _Work]:
    """The pseudoinverse with singular values up to rtol·σ_max dropped.

    A rectangular matrix is first reduced to the square factor of its QR decomposition, A⁺ = R⁺Qᴴ.
    """
    m, n = a.shape[-2:]
    if m < n:
        x, work = _truncated(matrix_transpose_conj(a, xp), rtol=rtol, hermitian=False, xp=xp)
        return matrix_transpose_conj(x, xp), work
    finite, a = _finite(a, xp)
    valid = finite & _is_hermitian(a, xp) if hermitian else finite
    scale = _unit_scale(a, xp)
    a = a / scale
    if m > n:
        q, a = xp.linalg.qr(a)
    x, work = _truncated_square(a, rtol=rtol, xp=xp)
    x = x @ matrix_transpose_conj(q, xp) if m > n else x
    x = _hermitian_part(x, xp) if hermitian else x
    work = work._replace(cutoff=work.cutoff * scale[..., 0, 0], valid=valid)
    return _or_nan(valid, x / scale, xp), work


def _truncated_square(a: Array, *, rtol: float, xp: Namespace) -> tuple[Array, _Work]:
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
    x = _matrices(_beside(2 / (high_square * (1 + start)), a, xp)) * adjoint
    x = _follow(plan, x, lambda rho, x: rho * (2 * x - (x @ a) @ x), xp)
    level, epsilon = _beside(0.5 / plan.tracked, a, xp), _beside(plan.epsilon, a, xp)
    ends = xp.stack([1 - level * (1 - epsilon), 1 - level * (1 + epsilon)])
    x, passes, bound = _purified(_matrices(level) * x, a, xp.sqrt(upper), ends, xp)

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
    return x, _Work(count + passes + 3, products, bound, rtol * xp.sqrt(lower), passes > 0)


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
        target = xp.maximum(eps * norm * _norm(x, xp), xp.full_like(norm, math.sqrt(eps) / 3))
        residual = _norm(e - square, xp)
        x = xp.where(_matrices(running), (3 * e - 2 * square) @ x, x)
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


def _direct(p: Array, *, rtol: float, hermitian: bool, ridge: float, xp: Namespace) -> tuple[Array, _Work]:
    """The same truncated pseudoinverse from the library's own eigh or SVD."""
    finite, p = _finite(p, xp)
    if hermitian:
        values, right = xp.linalg.eigh(p)
        left_h, magnitude = matrix_transpose_conj(right, xp), xp.abs(values)
        valid = finite & _is_hermitian(p, xp)
    else:
        left, values, right_h = xp.linalg.svd(p, full_matrices=False)
        left_h, right = matrix_transpose_conj(left, xp), matrix_transpose_conj(right_h, xp)
        magnitude, valid = values, finite
    if ridge > 0:
        cutoff = xp.zeros_like(values[..., 0])
        # P ≽ ridge·I up to the rounding of the eigenvalues.
        slack = float(xp.finfo(p.dtype).eps) * p.shape[-1] * xp.max(magnitude, axis=-1)
        valid = valid & (xp.min(values, axis=-1) >= ridge - slack) & (xp.min(values, axis=-1) > 0)
    else:
        cutoff = rtol * xp.max(magnitude, axis=-1)
    kept = magnitude > cutoff[..., None]
    inverse = xp.where(kept, 1 / xp.where(kept, values, xp.ones_like(values)), xp.zeros_like(values))
    x = (right * xp.astype(inverse, p.dtype)[..., None, :]) @ left_h
    zero = xp.zeros_like(cutoff)
    work = _Work(zero, zero, zero, cutoff, valid)
    return _or_nan(valid, _hermitian_part(x, xp) if hermitian else x, xp), work


def _certificate(a: Array, x: Array, work: _Work, xp: Namespace) -> PinvInfo:
    """The measured half of PinvInfo, from E on the smaller side, which has the same trace and residual."""
    finite, _ = _finite(a, xp)
    e = x @ a if a.shape[-1] <= a.shape[-2] else a @ x
    nan, inf = (xp.full_like(work.bound, v) for v in (math.nan, math.inf))
    residual = xp.where(work.valid, _norm(e - e @ e, xp), xp.where(finite, inf, nan))
    trace = xp.where(work.valid, xp.real(xp.linalg.trace(e)), -xp.ones_like(residual))
    steps, products, rank = (xp.astype(xp.round(v), xp.int32) for v in (work.steps, work.products, trace))
    return PinvInfo(steps, products, work.bound, residual, rank, work.cutoff, work.valid)
