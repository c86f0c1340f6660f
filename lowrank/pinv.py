"""Moore–Penrose inverses from matrix products: ``pinv_newton``.

With ``steps`` it is the textbook iteration X ← X(2I − AX) (Ben-Israel & Cohen, SIAM J. Numer. Anal. 3, 1966). Without,
a positive semidefinite matrix with a ridge is inverted by scaled Newton, in ``_definite``, or, on a CPU, by block
elimination, in ``_elimination``; any other gets the truncated pseudoinverse by growth and purification, in
``_truncated``, or from its Gram matrix, in ``_tall``. Here are the options, the textbook iteration, the library's own
factorisations, the derivative's place and the certificate.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import array_api_compat as compat

from lowrank import _elimination, _fused
from lowrank._array import (
    Array,
    Namespace,
    arithmetic,
    broadcast_shapes,
    carries_derivative,
    check_flag,
    device,
    equal,
    fix_sizes,
    identity,
    is_followed,
    is_half,
    is_integer,
    is_traced,
    is_transformed,
    matrix_transpose_conj,
    namespace,
    number,
    real_dtype,
    shown,
    stop_gradient,
)
from lowrank._definite import scaled_newton
from lowrank._newton import (
    Work,
    as_matrices,
    chunks,
    finite_part,
    frobenius,
    hermitian_part,
    in_chunks,
    or_nan,
    textbook_steps,
)
from lowrank._tall import tall_pinv
from lowrank._truncated import square_pinv

# Relative cutoffs. Growing E from (σ/σ_max)² to ½ multiplies rounding in the null space by 1/(2 rtol²), and
# that noise comes back through the next product at eps/rtol² · eps; the smallest cutoff keeps it below 1e-3.
_DEFAULT_RTOL = {"float32": 1e-5, "float64": 1e-11}
_SMALLEST_RTOL = {"float32": 1e-6, "float64": 1e-12}


class PinvInfo(NamedTuple):
    """What :func:`pinv_newton` did and how good the result is; arrays of the batch shape ``a.shape[:-2]``.

    Parameters
    ----------
    steps : array of int
        Newton steps and purifications spent on the element: 0 for ``method="direct"``, and, with ``ridge`` on a CPU,
        for elimination in single precision.
    products : array of int
        Matrix products spent on it, those that estimate its norm included; those of its blocks by their share, rounded
        up.
    bound : array of float
        Bound, in exact arithmetic, on ‖I − XA‖₂ over the singular vectors whose singular value is at least 1.7 times
        the cutoff, from the schedule and from what was measured on the way. With ``steps=`` and no ridge nothing is
        known of the spectrum: 1.
    residual : array of float
        ‖E − E²‖_F of the returned X, E = XA, measured: of order κ·eps, and κ²·eps for ``hermitian=True``, whose
        result is made Hermitian. NaN where the input was not finite. About ¼ or more where a singular value is so
        near the cutoff that products cannot decide on it.
    rank : array of int
        tr E, rounded; −1 where the result is NaN.
    cutoff : array of float
        Singular values at or below it were dropped, in the units of ``a``: ``rtol``, or the smallest value the
        precision allows, times σ_max. 0 where none are dropped (``ridge``, ``steps``).
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


@overload
def pinv_newton(
    a: Array, /, *, rtol: float | None = ..., hermitian: bool = ..., ridge: float = ..., upper: float | None = ...,
    tol: float | None = ..., alpha: float | Array | None = ..., steps: int | None = ..., method: str = ...,
    return_info: Literal[False] = ...,
) -> Array: ...  # fmt: skip
@overload
def pinv_newton(
    a: Array, /, *, rtol: float | None = ..., hermitian: bool = ..., ridge: float = ..., upper: float | None = ...,
    tol: float | None = ..., alpha: float | Array | None = ..., steps: int | None = ..., method: str = ...,
    return_info: Literal[True],
) -> tuple[Array, PinvInfo]: ...  # fmt: skip
def pinv_newton(
    a: Array,
    /,
    *,
    rtol: float | None = None,
    hermitian: bool = False,
    ridge: float = 0.0,
    upper: float | None = None,
    tol: float | None = None,
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
        Relative cutoff in [0, 1): singular values at or below ``rtol * sigma_max`` count as zero, as in
        :func:`numpy.linalg.pinv`. The default is 1e-11 in float64 and 1e-5 in lower precision, larger than NumPy's,
        max(m, n)·eps: singular values between the two are dropped here and kept there. Values below 1e-12 and 1e-6 are
        out of reach of products in these precisions and are raised to them. σ_max is known to a few per cent, so the
        cutoff is too; ``info.cutoff`` holds the value used.
    hermitian : bool
        Declares that ``a`` equals its conjugate transpose, up to √eps of its largest entry; the Hermitian part is
        what is inverted. The result equals its own conjugate transpose to the last bit, but with ``tol`` or ``steps``.
    ridge : float
        δ > 0 declares ``a`` Hermitian positive semidefinite (``hermitian=True`` is required) and means
        ``a + δ I`` throughout. Steps then follow from δ and a bound on ‖a‖. NumPy and torch arrays on a CPU need none:
        they are inverted by block elimination, which is products as well.
    upper : float, optional
        With ``ridge``: declares that no eigenvalue of ``a`` is above it. Steps then follow from κ = (upper + δ)/δ
        without a look at ``a``, also in a traced program, where they are else those of the largest κ that the
        precision allows. For a kernel matrix n·max k(x, x) will do.
    tol : float, optional
        With ``ridge`` and ``upper``: stop where ‖I − X(a + δ I)‖₂ ≤ ``tol``, up to rounding of κ·eps, and polish
        nothing, nor make the result Hermitian, unless that takes longer: for a preconditioner, or an inverse that is
        corrected where it is used. In (0, 1); by default the working precision.
    alpha : float or array of shape (...), optional
        Scale of the start X₀ = α Aᴴ, with ``steps`` only; converges for 0 < α < 2/σ_max². The default is
        1.8/(‖A‖₁‖A‖_∞).
    steps : int, optional
        Run the textbook iteration X₀ = α Aᴴ, X ← 2X − XAX exactly so often, converged or not. Without it
        the truncated pseudoinverse is computed to near working precision.
    method : {"newton", "direct"}
        ``"direct"`` computes the same truncated pseudoinverse from the library's own eigh or SVD: the better choice
        for one large matrix without a ridge on a CPU.
    return_info : bool
        Also return a :class:`PinvInfo`, at the cost of two products.

    Returns
    -------
    x : array, shape (..., n, m)
        Of the dtype, on the device and of the library of ``a``. A batch element that holds NaN or Inf, or
        contradicts what was declared of it (``hermitian``, or, without ``steps``, ``ridge`` with an eigenvalue below
        −δ or δ too small for the precision), is NaN; its neighbours are unaffected, bit for bit.
    info : PinvInfo
        Only with ``return_info=True``.

    Raises
    ------
    TypeError
        If ``a`` is not an array of floating dtype, ``alpha`` is neither a number nor a real floating array of its
        library, or ``hermitian`` or ``return_info`` is neither True nor False.
    ValueError
        If ``a`` has fewer than two axes or is not square where ``hermitian`` says so; if an option is out of
        range, or contradicts another.

    Warns
    -----
    RuntimeWarning
        If ``a`` carries derivatives (torch) and a singular value lies at the cutoff: the rank is undecided.

    Notes
    -----
    With ``steps`` the derivative is that of the iteration itself. Otherwise it is the closed form for constant
    rank (Golub & Pereyra, SIAM J. Numer. Anal. 10, 1973), twice differentiable, under torch and JAX.

    The error is about κ·eps, κ the ratio of the largest to the smallest singular value kept. Called eagerly, the
    iteration ends where every matrix is certified, so that well-conditioned ones take few products; under ``jax.jit``,
    ``torch.compile`` and ``vmap`` the schedule is static and follows from ``rtol`` or ``ridge``, n and the dtype.
    Tall and wide matrices cost little more than their Gram matrix. It pays in batches and on accelerators.

    See Also
    --------
    newton_schedule : the steps, and what they promise, from a scalar recursion.

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
    _check_options(a, rtol, hermitian, ridge, steps, method, return_info)
    _check_schedule(ridge, upper, tol, steps, method)
    alpha = _checked_alpha(alpha, a, steps, xp)
    # Of whatever kind the numbers are.
    ridge, rtol, upper, tol = float(ridge), *(None if v is None else float(v) for v in (rtol, upper, tol))
    given = a
    if is_half(a):
        a = xp.astype(a, xp.float32)
    if rtol is None:
        rtol = _DEFAULT_RTOL[_precision(a, xp)]
    elif method == "newton":
        rtol = max(rtol, _SMALLEST_RTOL[_precision(a, xp)])

    with arithmetic(a):
        if 0 in a.shape:
            x, work = xp.matrix_transpose(a), _nothing_to_do(a, xp)
        else:
            if hermitian:
                declared, a = _checked_hermitian(a, given.dtype, xp)
            if steps is not None:
                x, work = _textbook(a, steps=steps, alpha=alpha, ridge=ridge, xp=xp)
            else:
                if method == "newton":
                    fix_sizes(a)
                if method == "direct":
                    solve = partial(_direct, rtol=rtol, hermitian=hermitian, ridge=ridge, xp=xp)
                elif ridge > 0:
                    solve = partial(_with_ridge, ridge=ridge, upper=upper, tol=tol, xp=xp)
                else:
                    solve = partial(_truncated, rtol=rtol, hermitian=hermitian, xp=xp)
                x, work = _differentiable(solve, a, full_rank=ridge > 0, xp=xp)
                if ridge == 0 and carries_derivative(a) and not is_traced(a):
                    _warn_unless_idempotent(stop_gradient(a), stop_gradient(x), xp)
            if hermitian and declared is not None:
                valid = work.valid & declared
                x, work = or_nan(valid, x, xp), work._replace(valid=valid)
        info = _certificate(stop_gradient(a), stop_gradient(x), work, ridge, xp) if return_info else None
    x = xp.astype(x, given.dtype) if is_half(given) else x
    return x if info is None else (x, info)


def _check_options(
    a: Array,
    rtol: float | None,
    hermitian: bool,
    ridge: float,
    steps: int | None,
    method: str,
    return_info: bool,
) -> None:
    shape = tuple(a.shape)
    for name, flag in (("hermitian", hermitian), ("return_info", return_info)):
        check_flag(name, flag)
    if a.ndim < 2:
        raise ValueError(f"a must have shape (..., m, n), not {shape}")
    if hermitian and shape[-1] != shape[-2]:
        raise ValueError(f"hermitian=True needs square matrices, a has shape {shape}")
    if not 0 <= number(ridge) < math.inf:
        raise ValueError(f"ridge must be a finite number >= 0, not {shown(ridge)}")
    if ridge > 0 and not hermitian:
        raise ValueError(f"ridge={ridge!r} declares a positive semidefinite; pass hermitian=True as well")
    if rtol is not None and not 0 <= number(rtol) < 1:
        raise ValueError(f"rtol must be a number in [0, 1), not {shown(rtol)}")
    if rtol is not None and (steps is not None or ridge > 0):
        raise ValueError(
            f"rtol={rtol!r} has no meaning with {'steps' if steps is not None else 'ridge > 0'}; leave it out"
        )
    if not isinstance(method, str) or method not in ("newton", "direct"):
        raise ValueError(f"method must be 'newton' or 'direct', not {shown(method)}")
    if steps is not None:
        if not is_integer(steps) or steps < 0:
            raise ValueError(f"steps must be an integer >= 0, not {shown(steps)}")
        if method == "direct":
            raise ValueError(f"steps belongs to method='newton' (steps={steps}); leave it out for method='direct'")


def _checked_alpha(alpha: Any, a: Array, steps: int | None, xp: Namespace) -> Any:
    """α as a float, or as an array of the real dtype that a is computed in."""
    if alpha is None:
        return None
    if steps is None:
        raise ValueError(f"alpha={shown(alpha)} scales the start of the textbook iteration; pass steps as well")
    if isinstance(alpha, numbers.Real):
        if not math.isfinite(number(alpha)):
            raise ValueError(f"alpha must be finite, not {shown(alpha)}")
        return float(alpha)
    if namespace(alpha=alpha) is not xp:
        raise TypeError(f"alpha is a {type(alpha).__module__} array and a is not; bring both to one library")
    if xp.isdtype(alpha.dtype, "complex floating"):
        raise TypeError(f"alpha has dtype {alpha.dtype}; a real one is needed")
    shape, batch = tuple(alpha.shape), tuple(a.shape[:-2])
    try:
        fits = broadcast_shapes(shape, batch) == batch
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"alpha has shape {shape}, which does not broadcast to the batch {batch} of a")
    return xp.astype(alpha, xp.float32 if is_half(a) else real_dtype(a, xp), copy=False)


def _check_schedule(ridge: float, upper: float | None, tol: float | None, steps: int | None, method: str) -> None:
    for name, value, most in (("upper", upper, math.inf), ("tol", tol, 1.0)):
        if value is None:
            continue
        if not 0 < number(value) < most:
            raise ValueError(f"{name} must be a number above 0 and below {most}, not {shown(value)}")
        if ridge == 0 or steps is not None or method != "newton":
            raise ValueError(
                f"{name}={value!r} belongs to method='newton' with ridge > 0 and without steps; leave it out"
            )
    if tol is not None and upper is None:
        raise ValueError(f"tol={tol!r} needs upper, a bound on the eigenvalues of a, from which the steps follow")


def _precision(a: Array, xp: Namespace) -> str:
    return "float32" if real_dtype(a, xp) == xp.float32 else "float64"


def _checked_hermitian(a: Array, given_dtype: Any, xp: Namespace) -> tuple[Array | None, Array]:
    """Whether a and aᴴ differ by no more than rounding could explain, √eps of the dtype given in the largest entry,
    or None where they do not at all, and the Hermitian part of a.

    (A Frobenius norm would overflow or vanish at scales where the entries do not.)
    """
    if not (is_traced(a) or carries_derivative(a)) and equal(a, matrix_transpose_conj(a, xp), xp):
        return None, a
    tolerance = math.sqrt(float(xp.finfo(given_dtype).eps))
    gaps = [xp.max(_magnitude(part - matrix_transpose_conj(part, xp), xp), axis=(-2, -1)) for part in chunks(a, xp)]
    gap = gaps[0] if len(gaps) == 1 else xp.reshape(xp.concat(gaps), a.shape[:-2])
    return gap <= tolerance * xp.max(xp.abs(a), axis=(-2, -1)), hermitian_part(a, xp)


def _magnitude(difference: Array, xp: Namespace) -> Array:
    """What has the maximum of |A − Aᴴ|: where A is real A − Aᵀ itself, which holds each number with both signs."""
    return xp.abs(difference) if xp.isdtype(difference.dtype, "complex floating") else difference


def _differentiable(
    solve: Callable[[Array], tuple[Array, Work]], p: Array, *, full_rank: bool, xp: Namespace
) -> tuple[Array, Work]:
    """solve(p), with the closed-form derivative attached where one may be asked for."""
    if not is_followed(p):
        return solve(p)
    from lowrank import _gradients

    x, *work = _gradients.pseudoinverse(solve, p, full_rank=full_rank, xp=xp)
    return x, Work(*work)


def _warn_unless_idempotent(a: Array, x: Array, xp: Namespace) -> None:
    """The derivative is that of constant rank, which E = E² certifies."""
    e = x @ a if a.shape[-1] <= a.shape[-2] else a @ x
    if bool(xp.any(frobenius(e - e @ e, xp) > 0.1)):
        warnings.warn(
            "a singular value lies at the cutoff of pinv_newton, so that the rank is undecided and the derivative is "
            "wrong there; choose another rtol, or steps= to differentiate the iteration",
            RuntimeWarning,
            stacklevel=3,
        )


def _nothing_to_do(a: Array, xp: Namespace) -> Work:
    zero = xp.zeros(a.shape[:-2], dtype=real_dtype(a, xp), device=device(a))
    return Work(zero, zero, zero, zero, zero == 0)


def _textbook(p: Array, *, steps: int, alpha: Any, ridge: float, xp: Namespace) -> tuple[Array, Work]:
    """X₀ = α Pᴴ, X ← 2X − XPX (Lu et al., NeurIPS 2021, eq. 9), differentiable as such."""
    finite, p = finite_part(p, xp)
    p = p + ridge * identity(p, xp) if ridge > 0 else p
    magnitude = xp.abs(p)
    one_norm = xp.max(xp.sum(magnitude, axis=-2), axis=-1)
    inf_norm = xp.max(xp.sum(magnitude, axis=-1), axis=-1)
    one_norm, inf_norm = (xp.where(one_norm > 0, v, xp.ones_like(v)) for v in (one_norm, inf_norm))
    start = matrix_transpose_conj(p, xp)
    if alpha is None:
        # In this order, since the product of the two norms may overflow where X does not.
        x = 1.8 * (start / as_matrices(one_norm)) / as_matrices(inf_norm)
        spread = 1.8 * xp.ones_like(one_norm)
    else:
        alpha = xp.zeros_like(one_norm) + alpha
        x = as_matrices(alpha) * start
        spread = alpha * one_norm * inf_norm
    if compat.is_torch_array(x) and not (is_traced(x) or is_transformed(x)):
        from lowrank import _gradients

        x = _gradients.textbook_steps(x, p, steps)
    else:
        x = textbook_steps(x, p, steps, xp)
    # Eigenvalues of X₀P lie in [αδ², α‖P‖₁‖P‖_∞], and each step squares their distance from 1.
    worst = xp.maximum(1 - spread * (ridge / one_norm) * (ridge / inf_norm), spread - 1)
    zero = stop_gradient(xp.zeros_like(worst))
    work = Work(zero + steps, zero + 2 * steps, stop_gradient(worst ** (2.0**steps)), zero, finite)
    return or_nan(finite, x, xp), work


def _with_ridge(a: Array, *, ridge: float, upper: float | None, tol: float | None, xp: Namespace) -> tuple[Array, Work]:
    """(A + ridge·I)⁻¹ by the fused kernel or by elimination where they apply, else by the plain path."""
    if _fused.applies(a, ridge=ridge, xp=xp):
        return _fused.scaled_newton(a, ridge=ridge, xp=xp)
    if _elimination.applies(a, ridge=ridge, tol=tol, xp=xp):
        solve = partial(_elimination.inverse, ridge=ridge, xp=xp)
        return in_chunks(solve, a, xp, numbers=_elimination.CHUNK)
    return in_chunks(partial(scaled_newton, ridge=ridge, upper=upper, tol=tol, xp=xp), a, xp)


def _truncated(a: Array, *, rtol: float, hermitian: bool, xp: Namespace) -> tuple[Array, Work]:
    """The pseudoinverse with singular values up to rtol·σ_max dropped, of matrices of any shape and scale."""
    m, n = a.shape[-2:]
    if m < n:
        x, work = _truncated(matrix_transpose_conj(a, xp), rtol=rtol, hermitian=False, xp=xp)
        return matrix_transpose_conj(x, xp), work
    finite = xp.all(xp.isfinite(a), axis=(-2, -1))
    largest = xp.max(xp.abs(a), axis=(-2, -1))
    # The power of two nearest the largest entry, by which division is exact.
    scale = 2.0 ** xp.round(xp.log2(xp.where(finite & (largest > 0), largest, xp.ones_like(largest))))
    scale = as_matrices(scale)
    if m > n:
        x, work = tall_pinv(a, scale=scale, finite=finite, rtol=rtol, xp=xp)
    else:
        a = xp.where(as_matrices(finite), a / scale, xp.zeros_like(a))
        square = partial(square_pinv, rtol=rtol, definite=False, hermitian=hermitian, xp=xp)
        x, work = in_chunks(square, a, xp)
        x = hermitian_part(x, xp) if hermitian else x
    work = work._replace(cutoff=work.cutoff * scale[..., 0, 0], valid=finite)
    return or_nan(finite, x / scale, xp), work


def _direct(p: Array, *, rtol: float, hermitian: bool, ridge: float, xp: Namespace) -> tuple[Array, Work]:
    """The same truncated pseudoinverse from the library's own eigh or SVD."""
    valid, p = finite_part(p, xp)
    p = p + ridge * identity(p, xp) if ridge > 0 else p
    if hermitian:
        values, right = xp.linalg.eigh(p)
        left_h, magnitude = matrix_transpose_conj(right, xp), xp.abs(values)
    else:
        left, values, right_h = xp.linalg.svd(p, full_matrices=False)
        left_h, right = matrix_transpose_conj(left, xp), matrix_transpose_conj(right_h, xp)
        magnitude = values
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
    # Three arrays: torch's compiler loses track of an output that is returned twice.
    steps, products, bound = (xp.zeros_like(cutoff) for _ in range(3))
    work = Work(steps, products, bound, cutoff, valid)
    return or_nan(valid, hermitian_part(x, xp) if hermitian else x, xp), work


def _certificate(a: Array, x: Array, work: Work, ridge: float, xp: Namespace) -> PinvInfo:
    """The measured half of PinvInfo, from E on the smaller side, which has the same trace and residual."""
    finite, _ = finite_part(a, xp)
    e = x @ a if a.shape[-1] <= a.shape[-2] else a @ x
    e = e + ridge * x if ridge > 0 else e
    nan, inf = (xp.full_like(work.bound, v) for v in (math.nan, math.inf))
    residual = xp.where(work.valid, frobenius(e - e @ e, xp), xp.where(finite, inf, nan))
    trace = xp.where(work.valid, xp.real(xp.linalg.trace(e)), -xp.ones_like(residual))
    steps, products, rank = (xp.astype(xp.round(v), xp.int32) for v in (work.steps, work.products, trace))
    return PinvInfo(steps, products, work.bound, residual, rank, work.cutoff, work.valid)
