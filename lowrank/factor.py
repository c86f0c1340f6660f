"""The Nyström factorisation K ≈ F Fᵀ of a kernel matrix, and what can be asked of it.

With landmarks z, C = k(x, z) and W = k(z, z), the approximation is C W⁺ Cᵀ (Williams & Seeger, "Using the Nyström
method to speed up kernel machines", NeurIPS 2000). F = C L⁻ᵀ with L Lᵀ = W + νI keeps it below K, which is what
every error estimate rests on; why that holds in rounded arithmetic is derived at ``_SHIFT``. The shifted form is that
of Tropp, Yurtsever, Udell & Cevher, "Fixed-rank approximation of a positive-semidefinite matrix", NeurIPS 2017.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowrank import landmarks as _landmarks
from lowrank._array import (
    Array,
    Namespace,
    arithmetic,
    carries_derivative,
    device,
    from_host,
    is_half,
    is_traced,
    namespace,
    solve_triangular,
    to_host,
    widest_real,
)
from lowrank.kernels import gaussian_kernel

# Why K − F Fᵀ ≽ 0 up to roundoff. Rounding makes F Lᵀ = C + E, where E holds the errors of the kernel block and the
# backward error of the triangular solve. For a vector a put p = Cᵀa and q = Eᵀa. As [W Cᵀ; C K] ≽ 0, p = W^{1/2}h with
# ‖h‖² ≤ aᵀKa, and with L Lᵀ = W + νI
#
#     aᵀ(F Fᵀ − K)a ≤ max_h ‖L⁻¹(W^{1/2}h + q)‖² − ‖h‖² = ‖q‖²/ν,     so     λ_min(K − F Fᵀ) ≥ −‖E‖²/ν.
#
# An entry of E is at most γ (|F||L|ᵀ), γ a few eps, so that ‖E‖ ~ γ √(‖K‖‖W‖) and the right shift is proportional to
# ‖W‖: ν = c·eps·‖W‖ leaves −(γ²/c·eps²)·eps·‖K‖. Taken is the row-sum norm, between ‖W‖₂ and √m‖W‖₂; tr W, up to
# m‖W‖₂, would be needlessly large for a W near the identity. The error of W itself, and that of its Cholesky factor,
# must stay below ν, hence float64. c is the smallest number that held in measurements (float32 and float64; repeated
# points, constant columns, offsets 50 and 10⁴, tight clusters far apart, lengthscales 10⁻³ to 10³; 100 to 600 points,
# all, half, a tenth of them or means as landmarks): the lowest λ_min(K − F Fᵀ)/(eps·‖K‖) was −46 with c = 10, −21 with
# 20, −2 with 30. With all points as landmarks K − F Fᵀ is then at most 45 to 65 eps·‖K‖.
_SHIFT = 30.0

_NAMED = {
    function.__name__: function for function in (_landmarks.uniform, _landmarks.segment_means, _landmarks.rpcholesky)
}


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """A positive semidefinite matrix F Fᵀ of low rank, standing for the kernel matrix K of n points.

    Made by :func:`nystrom`. K − F Fᵀ is positive semidefinite up to roundoff.

    Parameters
    ----------
    factor : array, shape (..., n, k)
        F.
    landmarks : array, shape (..., k, d), or None
        The points z, where K was given by points.
    pivots : integer array, shape (k,), or None
        Which rows the landmarks are, where they are rows.
    trace_error : array, shape (...)
        tr(K − F Fᵀ) for every batch element, which bounds the spectral and the Frobenius norm of K − F Fᵀ. Accumulated
        in float64 where the library has it; terms that rounding left below zero count as zero.
    cholesky : array, shape (..., k, k)
        L, lower triangular: the factor of the rows x′ of any points is k(x′, z) L⁻ᵀ.
    kernel : callable or None
        k; None where K itself was given.
    """

    factor: Array
    landmarks: Array | None
    pivots: Array | None
    trace_error: Array
    cholesky: Array = field(kw_only=True)
    kernel: Callable[..., Array] | None = field(kw_only=True)

    @property
    def rank(self) -> int:
        """k, the number of columns of F."""
        return self.factor.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of F Fᵀ, (..., n, n)."""
        return (*self.factor.shape[:-1], self.factor.shape[-2])

    @property
    def dtype(self) -> Any:
        """The dtype of F."""
        return self.factor.dtype

    def __repr__(self) -> str:
        errors = to_host(self.trace_error)
        shown = "none" if errors.size == 0 else f"{errors.min():.3g}"
        if errors.size > 1:
            shown += f" to {errors.max():.3g}"
        dtype = str(self.dtype).rsplit(".", 1)[-1]
        return f"LowRank(shape={self.shape}, rank={self.rank}, dtype={dtype}, trace_error={shown})"

    def __matmul__(self, v: Array) -> Array:
        """F (Fᵀ v) for v of shape (n,) or (..., n, p), in 2 n k p products."""
        xp, columns = self._right_side(v, "v")
        with arithmetic(columns):
            product = self.factor @ (xp.matrix_transpose(self.factor) @ columns)
        return product[..., 0] if v.ndim == 1 else product

    def to_dense(self) -> Array:
        """F Fᵀ as an array, shape (..., n, n)."""
        xp = namespace(factor=self.factor)
        with arithmetic(self.factor):
            return self.factor @ xp.matrix_transpose(self.factor)

    def diagonal(self) -> Array:
        """The diagonal of F Fᵀ, shape (..., n)."""
        return namespace(factor=self.factor).sum(self.factor * self.factor, axis=-1)

    def solve(self, b: Array, /, *, ridge: float) -> Array:
        """The solution of (F Fᵀ + ridge·I) x = b.

        Parameters
        ----------
        b : array, shape (n,) or (..., n, p)
        ridge : float
            Positive; in the units of K.

        Returns
        -------
        array, shape (n,), or (..., n) where F has batch axes, or (..., n, p).

        Raises
        ------
        TypeError
            If ``b`` is not an array of the library and dtype of F.
        ValueError
            If ``b`` does not have n rows, or ``ridge`` is not positive and finite.

        Notes
        -----
        With [Q₁; Q₂] R = [F; √ridge·I] (thin QR), F (FᵀF + ridge·I)⁻¹ Fᵀ = Q₁Q₁ᵀ and so x = (b − Q₁Q₁ᵀb)/ridge. Neither
        FᵀF nor its inverse is formed, so the condition number of F does not enter: ‖error‖ ≤ c·eps·‖b‖/ridge.
        Golub & Van Loan, "Matrix Computations", 4th ed., §6.1.4 (ridge regression by QR) and §2.1.4 (Woodbury).
        """
        xp, columns = self._right_side(b, "b")
        if not (isinstance(ridge, numbers.Real) and math.isfinite(ridge) and ridge > 0):
            raise ValueError(f"ridge must be a positive finite number, not {ridge!r}; F Fᵀ alone is singular")
        *batch, n, k = self.factor.shape
        root = math.sqrt(ridge) * xp.eye(k, dtype=self.dtype, device=device(self.factor))
        with arithmetic(columns):
            stacked = xp.concat([self.factor, xp.broadcast_to(root, (*batch, k, k))], axis=-2)
            q = xp.linalg.qr(stacked, mode="reduced")[0][..., :n, :]
            solution = (columns - q @ (xp.matrix_transpose(q) @ columns)) / ridge
        return solution[..., 0] if b.ndim == 1 else solution

    def eigh(self) -> tuple[Array, Array]:
        """The eigenpairs of F Fᵀ in the range of F, from the singular values and left vectors of F.

        Returns
        -------
        eigenvalues : array, shape (..., r), r = min(n, k)
            Ascending; the other n − r eigenvalues are zero.
        eigenvectors : array, shape (..., n, r)
            Orthonormal columns.
        """
        xp = namespace(factor=self.factor)
        with arithmetic(self.factor):
            u, s, _ = xp.linalg.svd(self.factor, full_matrices=False)
        return xp.flip(s * s, axis=-1), xp.flip(u, axis=-1)

    def _right_side(self, b: Array, name: str) -> tuple[Namespace, Array]:
        """The namespace, and b as columns, after checking that F Fᵀ can be applied to them."""
        xp = namespace(**{"factor": self.factor, name: b})
        n = self.factor.shape[-2]
        columns = b[:, None] if b.ndim == 1 else b
        if b.ndim == 0 or columns.shape[-2] != n:
            raise ValueError(
                f"{name} has shape {tuple(b.shape)}; a matrix of shape {self.shape} needs ({n},) or (..., {n}, p)"
            )
        return xp, columns


def nystrom(
    x: Array,
    /,
    *,
    kernel: Callable[..., Array] | None = gaussian_kernel,
    landmarks: str | Callable[..., Array] | Sequence[int] | Array = "uniform",
    rank: int | None = None,
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
    rng : None, int or numpy.random.Generator
        Handed to the function that chooses the landmarks.

    Returns
    -------
    LowRank
        The factor, the landmarks, and tr(K − F Fᵀ).

    Raises
    ------
    TypeError
        If ``x`` is not an array of float32 or float64, carries derivatives or belongs to a traced program (the core
        is factored on the host), or ``landmarks`` or ``rank`` is of another type.
    ValueError
        If ``x`` holds NaN or infinite values, an index or the rank is out of range, shapes do not fit, or the kernel
        returns values that are not finite or not positive semidefinite.

    Notes
    -----
    Costs n·k kernel values, n·k² products and the memory of about three F. W = k(z, z) and its Cholesky factor are
    computed in float64 with the shift ν = 30·eps·‖W‖_∞, eps that of the dtype of ``x``: then K − F Fᵀ ≽ −c·eps·‖K‖·I
    for any points and landmarks, and K ≈ F Fᵀ to about 60 eps·‖K‖ if all points are landmarks.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.factor import nystrom
    >>> x = np.linspace(0.0, 1.0, 200)[:, None]
    >>> nystrom(x, rank=12, rng=0).shape
    (200, 200)
    """
    xp = _checked_points(x, kernel)
    z, pivots = _resolved(landmarks, x, kernel, rank, rng, xp)
    with arithmetic(x):
        if kernel is None:
            c = xp.take(x, pivots, axis=-1)
            w = xp.take(c, pivots, axis=-2)
            diagonal = xp.linalg.diagonal(x)
        else:
            c = _checked_block(kernel(x, z), x, z)
            wide = xp.astype(z, widest_real(z, xp))
            w = _checked_block(kernel(wide, wide), wide, wide)
            each = x[..., :, None, :]
            diagonal = _checked_block(kernel(each, each), each, each)[..., 0, 0]
        lower = from_host(_shifted_cholesky(to_host(w), eps=float(xp.finfo(x.dtype).eps)), x, xp)
        factor = _solve_right(lower, c, xp)
        trace_error = _trace_error(diagonal, factor, xp)
    return LowRank(factor, z, pivots, trace_error, cholesky=lower, kernel=kernel)


def _shifted_cholesky(w: np.ndarray, *, eps: float) -> np.ndarray:
    """L with L Lᵀ = W + νI in float64, for every matrix of a batch."""
    w = np.asarray(w, dtype=np.float64)
    norm = np.max(np.sum(np.abs(w), axis=-1, keepdims=True), axis=-2, keepdims=True)
    # The floor is for W = 0, where F is to be 0 and not 0/0; its root is far from underflow in single precision.
    shift = np.maximum(_SHIFT * eps * norm, np.finfo(np.float32).tiny)
    try:
        return np.linalg.cholesky(w + shift * np.eye(w.shape[-1]))
    except np.linalg.LinAlgError:
        lowest = float(np.linalg.eigvalsh(w).min())
        raise ValueError(
            f"the kernel is not positive semidefinite: k(z, z) of the landmarks (shape {w.shape}) has the eigenvalue "
            f"{lowest:.3g}, below what rounding explains ({-float(shift.max()):.3g})"
        ) from None


def _solve_right(lower: Array, c: Array, xp: Namespace) -> Array:
    """C L⁻ᵀ. One L for a whole batch is applied to all its rows at once."""
    shape = c.shape
    if lower.ndim == 2:
        c = xp.reshape(c, (-1, shape[-1]))
    else:
        lower = xp.broadcast_to(lower, (*shape[:-2], *lower.shape[-2:]))
    return xp.reshape(xp.matrix_transpose(solve_triangular(lower, xp.matrix_transpose(c), xp)), shape)


def _trace_error(diagonal: Array, factor: Array, xp: Namespace) -> Array:
    wide = widest_real(factor, xp)
    explained = xp.sum(factor * factor, axis=-1, dtype=wide)
    left = xp.clip(xp.astype(diagonal, wide) - explained, min=0.0)
    return xp.astype(xp.sum(left, axis=-1), factor.dtype)


def _checked_points(x: Array, kernel: Callable | None) -> Namespace:
    xp = namespace(x=x)
    if is_half(x) or xp.isdtype(x.dtype, "complex floating"):
        raise TypeError(f"x has dtype {x.dtype} (shape {tuple(x.shape)}); convert it to float32 or float64")
    if is_traced(x) or carries_derivative(x):
        raise TypeError(
            "x carries derivatives or belongs to a traced program, and the factorisation is neither differentiable "
            "nor traceable, for its core is factored on the host; detach x, or factor outside of the transformation"
        )
    if x.ndim < 2:
        raise ValueError(f"x must have at least two axes, (..., points, features), not the shape {tuple(x.shape)}")
    if kernel is None and x.shape[-1] != x.shape[-2]:
        raise ValueError(
            f"with kernel=None x is the matrix K and must be square, not of shape {tuple(x.shape)}; "
            "for points, name their kernel"
        )
    finite = xp.isfinite(x)
    if not bool(xp.all(finite)):
        bad = int(xp.sum(xp.astype(xp.logical_not(finite), xp.int32)))
        raise ValueError(f"x (shape {tuple(x.shape)}) has {bad} NaN or infinite values; remove them before factoring")
    return xp


def _resolved(
    landmarks: Any, x: Array, kernel: Callable | None, rank: int | None, rng: Any, xp: Namespace
) -> tuple[Array | None, Array | None]:
    """Landmark points and, if they are rows of x, their indices."""
    if isinstance(landmarks, str):
        if landmarks not in _NAMED:
            raise ValueError(
                f"landmarks must be one of {sorted(_NAMED)}, a callable, indices or points, not {landmarks!r}"
            )
        landmarks = _NAMED[landmarks]
    chosen = callable(landmarks)
    if rank is None and chosen:
        raise ValueError("rank, the number of landmarks, is needed where they are to be chosen")
    if rank is not None:
        _landmarks._checked_rank(rank, x)
    if chosen:
        landmarks = landmarks(x, rank=rank, kernel=kernel, rng=rng)
    if isinstance(landmarks, (list, tuple)):
        landmarks = np.asarray(landmarks)
    if not hasattr(landmarks, "ndim"):
        raise TypeError(f"landmarks must be a name, a callable, indices or points, not {type(landmarks).__name__}")
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


def _checked_indices(landmarks: Array, x: Array, xp: Namespace) -> Array:
    n = x.shape[-2]
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


def _checked_landmark_points(z: Array, x: Array, kernel: Callable | None, xp: Namespace) -> Array:
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
    if carries_derivative(z):
        raise TypeError("landmarks carries derivatives, and the factorisation is not differentiable; detach it")
    if not bool(xp.all(xp.isfinite(z))):
        raise ValueError(f"landmarks (shape {tuple(z.shape)}) has NaN or infinite values")
    return z


def _checked_block(block: Array, x: Array, z: Array) -> Array:
    xp = namespace(x=x, block=block)
    if tuple(block.shape[-2:]) != (x.shape[-2], z.shape[-2]):
        raise ValueError(
            f"the kernel returned a block of shape {tuple(block.shape)} for points of shapes {tuple(x.shape)} and "
            f"{tuple(z.shape)}"
        )
    if carries_derivative(block):
        raise TypeError("the kernel's parameters carry derivatives, and the factorisation is not differentiable")
    if not bool(xp.all(xp.isfinite(block))):
        raise ValueError(
            f"the kernel returned NaN or infinite values for finite points of shapes {tuple(x.shape)} and "
            f"{tuple(z.shape)}"
        )
    return block
