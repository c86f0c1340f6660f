"""The Nyström factorisation K ≈ F Fᵀ of a kernel matrix, and what can be asked of it.

With landmarks z, C = k(x, z) and W = k(z, z), the approximation is C W⁺ Cᵀ (Williams & Seeger, "Using the Nyström
method to speed up kernel machines", NeurIPS 2000). F = C L⁻ᵀ with L Lᵀ = W + νI keeps it below K, which is what
every error estimate rests on; the factor L and the shift ν are made in ``_core``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lowrank import landmarks as _landmarks
from lowrank._array import (
    Array,
    Namespace,
    arithmetic,
    has_derivative,
    is_half,
    is_traced,
    namespace,
    number,
    shown,
    stop_gradient,
    to_host,
    widest_real,
)
from lowrank._core import (
    checked_block,
    checked_finite,
    checked_symmetric,
    diagonal,
    shifted_cholesky,
    solve_right,
    trace_error,
)
from lowrank._low_rank import LowRank
from lowrank.kernels import gaussian_kernel

__all__ = ["LowRank", "nystrom"]

_NAMED = {
    function.__name__: function for function in (_landmarks.uniform, _landmarks.segment_means, _landmarks.rpcholesky)
}


def nystrom(
    x: Array,
    /,
    *,
    kernel: Callable[..., Array] | None = gaussian_kernel,
    landmarks: str | Callable[..., Array] | Sequence[int] | Array = "uniform",
    rank: int | None = None,
    rtol: float | None = None,
    rng: int | np.random.Generator | None = None,
) -> LowRank:
    """Nyström factorisation of the kernel matrix of n points: K = k(x, x) ≈ F Fᵀ, F of shape (..., n, rank).

    Parameters
    ----------
    x : array, shape (..., n, d)
        Points, float32 or float64. Leading axes are batch axes: one factorisation each.
    kernel : callable or None
        Positive semidefinite kernel: ``kernel(a, b)`` is the block of shape (..., n, m) for points (..., n, d) and
        (..., m, d), for any leading axes, in their dtype and in float64; Gaussian of lengthscale 1 by default, and
        ``functools.partial(gaussian_kernel, lengthscale=…)`` in general. None means that ``x`` *is* K, of shape
        (..., n, n), symmetric.
    landmarks : str, callable, integer indices or points
        ``"uniform"``, ``"rpcholesky"`` or ``"segment_means"``, the functions of :mod:`lowrank.landmarks`; a callable of
        the same signature; 1-D integer indices of rows of ``x``, as an array or a list; or points of shape (..., k, d),
        in the library and dtype of ``x``. Repeated landmarks do no harm.
    rank : int, optional
        How many landmarks; from 1 to n. Needed where they are to be chosen, and at most as many are taken.
    rtol : float, optional
        Take landmarks until tr(K − F Fᵀ) ≤ rtol·tr K, in [0, 1), for a function that decides how many: "rpcholesky", or
        a callable with the keyword ``rtol``. Then ``rank`` is the most, n if it is not given.
    rng : None, int or numpy.random.Generator
        Handed to the function that chooses the landmarks.

    Returns
    -------
    LowRank
        The factor, the landmarks, and tr(K − F Fᵀ).

    Raises
    ------
    TypeError
        If ``x`` is not an array of float32 or float64; if ``landmarks``, ``rank`` or ``rng`` is of another type, or
        points are not of the library and dtype of ``x``; if ``kernel`` is neither callable nor None, or returns no
        array of the library and dtype of its points; if the function that chooses landmarks does not take ``rtol``, or
        is "rpcholesky" in a traced program.
    ValueError
        If ``x`` or the landmarks hold NaN or infinite values (the first row of them is named); if an index, ``rank``,
        ``rtol`` or ``rng`` is out of range, or shapes or devices do not fit; if ``landmarks`` is an unknown name or
        empty, ``rank`` is missing where they are chosen or not their number, ``rtol`` comes with landmarks that are
        given, or they are points or means and ``kernel`` is None; or if the kernel returns a block of another shape,
        values that are not finite, a negative diagonal, or a k(z, z) that is not symmetric or not positive
        semidefinite.

    Notes
    -----
    Costs n·k kernel values, n·k² products and the memory of about three F. W = k(z, z) and its Cholesky factor are
    computed in float64 with the shift ν = 30·eps·‖W‖_∞, eps that of the dtype of ``x``: then K − F Fᵀ ≽ −c·eps·‖K‖·I
    for any points and landmarks, and K ≈ F Fᵀ to about 60 eps·‖K‖ if all points are landmarks.

    Differentiable (torch, JAX) in x, landmarks given as points, and parameters of the kernel. A choice of rows has no
    derivative: indices, chosen or given, are held fixed, and the kernel that a choosing function is handed carries
    none. A traced program (``jax.jit``, ``jax.grad``) takes landmarks that are given, "uniform" or "segment_means";
    values cannot be checked there, and a kernel that is not positive semidefinite gives NaN.

    JAX without x64 has no float64: W is then evaluated and factored in float32, with rounding errors of some eps·‖W‖,
    below the shift. In measurements with up to 800 landmarks (repeated points, offset 10⁴, lengthscales 10⁻³ to 10³)
    λ_min(K − F Fᵀ) was above −eps·‖K‖ as well; a W that rounding made indefinite would be refused, never mended.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.factor import nystrom
    >>> x = np.linspace(0.0, 1.0, 200)[:, None]
    >>> nystrom(x, rank=12, rng=0).shape
    (200, 200)
    """
    xp = _checked_points(x, kernel)
    z, pivots = _resolved(landmarks, x, kernel, rank, rtol, rng, xp)
    wide = widest_real(x, xp)
    with arithmetic(x):
        if kernel is None:
            c = xp.take(x, pivots, axis=-1)
            w = xp.astype(xp.take(c, pivots, axis=-2), wide)
        else:
            c = checked_block(kernel(x, z), x, z)
            z_wide = xp.astype(z, wide)
            w = checked_block(kernel(z_wide, z_wide), z_wide, z_wide)
        along = diagonal(x, kernel, xp)
        exact = shifted_cholesky(checked_symmetric(w, xp), eps=float(xp.finfo(x.dtype).eps), xp=xp)
        lower = xp.astype(exact, x.dtype)
        factor = solve_right(lower, c, xp)
        error = trace_error(along, factor, xp)
    return LowRank(factor, z, pivots, error, cholesky=lower, kernel=kernel)


def _checked_points(x: Array, kernel: Callable[..., Array] | None) -> Namespace:
    xp = namespace(x=x)
    _landmarks._checked_kernel(kernel)
    if is_half(x) or xp.isdtype(x.dtype, "complex floating"):
        raise TypeError(f"x has dtype {x.dtype} (shape {tuple(x.shape)}); convert it to float32 or float64")
    if x.ndim < 2:
        raise ValueError(f"x must have at least two axes, (..., points, features), not the shape {tuple(x.shape)}")
    if kernel is None and x.shape[-1] != x.shape[-2]:
        raise ValueError(
            f"with kernel=None x is the matrix K and must be square, not of shape {tuple(x.shape)}; "
            "for points, name their kernel"
        )
    checked_finite(x, "x", xp)
    return xp


def _resolved(
    landmarks: Any,
    x: Array,
    kernel: Callable[..., Array] | None,
    rank: int | None,
    rtol: float | None,
    rng: Any,
    xp: Namespace,
) -> tuple[Array | None, Array | None]:
    """Landmark points and, if they are rows of x, their indices."""
    if isinstance(landmarks, str):
        if landmarks not in _NAMED:
            raise ValueError(
                f"landmarks must be one of {sorted(_NAMED)}, a callable, indices or points, not {shown(landmarks)}"
            )
        landmarks = _NAMED[landmarks]
    chosen = callable(landmarks)
    if rank is None and rtol is None and chosen:
        raise ValueError("rank, the number of landmarks, is needed where they are to be chosen")
    if rank is not None:
        _landmarks._checked_rank(rank, x)
    stop = _checked_rtol(rtol, landmarks)
    if chosen:
        most = x.shape[-2] if rank is None else rank
        landmarks = landmarks(x, rank=most, kernel=_without_derivatives(kernel, x), rng=rng, **stop)
    landmarks = _as_array(landmarks)
    if landmarks.ndim == 1:
        pivots = _checked_indices(landmarks, x, xp)
        z = None if kernel is None else xp.take(x, pivots, axis=-2)
        count = pivots.shape[0]
    else:
        z, pivots = _checked_landmark_points(landmarks, x, kernel, xp), None
        count = z.shape[-2]
    if count > x.shape[-2]:
        raise ValueError(
            f"there are {count} landmarks for {x.shape[-2]} points (x has shape {tuple(x.shape)}); "
            "a factor of more columns than rows saves nothing, give at most as many as points"
        )
    if rank is not None and (count > rank if chosen else count != rank):
        raise ValueError(f"rank is {rank} and there are {count} landmarks; leave out rank, or make them agree")
    return z, pivots


def _as_array(landmarks: Any) -> Array:
    """Indices or points, which may be given as a list."""
    if isinstance(landmarks, (list, tuple)):
        try:
            landmarks = np.asarray(landmarks)
        except ValueError:
            raise ValueError(
                f"landmarks is a {type(landmarks).__name__} of {len(landmarks)} rows of different lengths; "
                "give indices, or points of one length"
            ) from None
    if not hasattr(landmarks, "ndim"):
        raise TypeError(f"landmarks must be a name, a callable, indices or points, not {type(landmarks).__name__}")
    return landmarks


def _checked_rtol(rtol: float | None, landmarks: Any) -> dict[str, float]:
    """rtol as a keyword for the function that chooses landmarks, if it is given and taken."""
    if rtol is None:
        return {}
    if not 0 <= number(rtol) < 1:
        raise ValueError(f"rtol must be a number in [0, 1), not {shown(rtol)}")
    if not callable(landmarks):
        raise ValueError(f"rtol ({rtol}) decides how many landmarks are chosen, and these are given; leave it out")
    try:
        taken = dict(inspect.signature(landmarks).parameters)
    except ValueError:  # builtins may have no signature
        taken = {}
    if "rtol" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        name = getattr(landmarks, "__name__", repr(landmarks))
        raise TypeError(f"{name} has no keyword rtol to stop by; choose landmarks='rpcholesky', or give rank alone")
    return {"rtol": float(rtol)}


def _without_derivatives(kernel: Callable[..., Array] | None, x: Array) -> Callable[..., Array] | None:
    """The kernel for choosing landmarks, which is no differentiable step, whatever its parameters carry."""
    if kernel is None or not has_derivative(x):
        return kernel
    return lambda a, b: stop_gradient(kernel(a, b))


def _checked_indices(landmarks: Array, x: Array, xp: Namespace) -> Array:
    n = x.shape[-2]
    if is_traced(landmarks):
        return landmarks
    indices = to_host(landmarks)
    if indices.size == 0:
        raise ValueError("landmarks is empty; at least one is needed")
    if indices.dtype.kind not in "iu":
        raise TypeError(
            f"landmarks of shape {indices.shape} are indices and must be integers, not {indices.dtype}; "
            "points have the shape (..., k, d)"
        )
    if indices.min() < 0 or indices.max() >= n:
        raise ValueError(
            f"landmarks holds indices from {indices.min()} to {indices.max()}; x (shape {tuple(x.shape)}) has "
            f"the rows 0 to {n - 1}"
        )
    return _landmarks._index_array(indices, x, xp)


def _checked_landmark_points(z: Array, x: Array, kernel: Callable[..., Array] | None, xp: Namespace) -> Array:
    if kernel is None:
        raise ValueError(
            f"landmarks are points (shape {tuple(z.shape)}), and with kernel=None x is the matrix K itself; "
            "give indices"
        )
    namespace(x=x, landmarks=z)
    if z.ndim < 2 or z.shape[-1] != x.shape[-1] or z.shape[-2] == 0:
        raise ValueError(
            f"landmarks have shape {tuple(z.shape)}; for x of shape {tuple(x.shape)} (..., k, {x.shape[-1]})"
        )
    checked_finite(z, "landmarks", xp)
    return z
