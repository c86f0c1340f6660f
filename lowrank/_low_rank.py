"""What a Nyström factorisation is asked once it is made: products, solutions, determinants, features, errors, a file.

Everything about F Fᵀ comes from F by an orthogonal decomposition, QR or SVD, so that the condition number of F is never
squared (Golub & Van Loan, "Matrix Computations", 4th ed., §6.1.4; each method names its formula). ``factor`` makes
these objects, ``_certificate`` and ``_saved`` do what is asked of errors and files.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank import _saved
from lowrank._array import (
    Array,
    Namespace,
    arithmetic,
    broadcast_shapes,
    device,
    from_host,
    is_integer,
    is_traced,
    namespace,
    number,
    shown,
    stop_gradient,
    to_host,
    widest_real,
)
from lowrank._certificate import Certificate, certify
from lowrank._core import check_same_kernel, checked_block, checked_finite, solve_right
from lowrank.landmarks import _checked_kernel, _index_array

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

# What a file holds, and how it says so.
_ARRAYS = ("factor", "landmarks", "pivots", "trace_error", "cholesky", "rotation")
_FORMAT = "LowRank 1"

# Eigenvalues of F Fᵀ below so many eps·‖F Fᵀ‖, or n, say nothing: L was shifted by 30 eps·‖W‖.
_ROUNDING = 100


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
    rotation : array, shape (..., k, r), or None
        V, orthonormal columns, where the factor was truncated: F is then k(x, z) L⁻ᵀ V, of shape (..., n, r).
    """

    factor: Array
    landmarks: Array | None
    pivots: Array | None
    trace_error: Array
    cholesky: Array = field(kw_only=True)
    kernel: Callable[..., Array] | None = field(kw_only=True)
    rotation: Array | None = field(default=None, kw_only=True)

    @property
    def rank(self) -> int:
        """The number of columns of F."""
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
        dtype = str(self.dtype).rsplit(".", 1)[-1]
        return f"LowRank(shape={self.shape}, rank={self.rank}, dtype={dtype}, trace_error={self._shown_error()})"

    def _shown_error(self) -> str:
        if is_traced(self.trace_error):
            return "traced"
        errors = to_host(self.trace_error)
        if errors.size == 0:
            return "none"
        xp = namespace(factor=self.factor)
        whole = errors + to_host(xp.sum(self.factor * self.factor, axis=(-1, -2)))
        share = 100 * errors / np.where(whole > 0, whole, 1)
        if errors.size == 1:
            return f"{errors.item():.3g} ({share.item():.3g} % of tr K)"
        return f"{errors.min():.3g} to {errors.max():.3g} ({share.min():.3g} to {share.max():.3g} % of tr K)"

    def __matmul__(self, v: Array) -> Array:
        """F (Fᵀ v) for v of shape (n,) or (..., n, p), in 2 n k p products.

        Raises
        ------
        TypeError
            If ``v`` is not an array of the library and dtype of F.
        ValueError
            If ``v`` does not have n rows or leading axes that broadcast with those of F, or is on another device.
        """
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

    def solve(self, b: Array, /, *, ridge: float | Array) -> Array:
        """The solution of (F Fᵀ + ridge·I) x = b.

        Parameters
        ----------
        b : array, shape (n,) or (..., n, p)
        ridge : float or array of shape ()
            Positive; in the units of K. As an array of the library of F it may carry derivatives.

        Returns
        -------
        array, shape (n,), or (..., n) where F has batch axes, or (..., n, p).

        Raises
        ------
        TypeError
            If ``b`` is not an array of the library and dtype of F, or ``ridge`` an array but not of a real floating
            dtype.
        ValueError
            If ``b`` does not have n rows or leading axes that broadcast with those of F, or is on another device, or
            ``ridge`` is not positive and finite, or of another library.

        Notes
        -----
        See :meth:`preconditioner`, which does the same for many right-hand sides, one after another.
        """
        self._right_side(b, "b")
        return self.preconditioner(ridge=ridge)(b)

    def preconditioner(self, *, ridge: float | Array) -> Callable[[Array], Array]:
        """The function v ↦ (F Fᵀ + ridge·I)⁻¹ v, for v of shape (n,) or (..., n, p).

        Parameters
        ----------
        ridge : float or array of shape ()
            As for :meth:`solve`.

        Returns
        -------
        callable
            It holds an array of the size of F, and takes 4 n k p operations.

        Raises
        ------
        TypeError, ValueError
            As :meth:`solve`, the function for its argument.

        Notes
        -----
        With [Q₁; Q₂] R = [F; √ridge·I] (thin QR), F (FᵀF + ridge·I)⁻¹ Fᵀ = Q₁Q₁ᵀ and so x = (b − Q₁Q₁ᵀb)/ridge. Neither
        FᵀF nor its inverse is formed, so the condition number of F does not enter: ‖error‖ ≤ c·eps·‖b‖/ridge.
        Golub & Van Loan, "Matrix Computations", 4th ed., §6.1.4 (ridge regression by QR) and §2.1.4 (Woodbury).
        """
        xp, mu = self._checked_ridge(ridge)
        with arithmetic(self.factor):
            q = self._ridge_qr(self.factor, mu, xp)[0][..., : self.factor.shape[-2], :]
        mu = xp.astype(mu, self.dtype)

        def apply(v: Array, /) -> Array:
            _, columns = self._right_side(v, "v")
            with arithmetic(columns):
                solution = (columns - q @ (xp.matrix_transpose(q) @ columns)) / mu
            return solution[..., 0] if v.ndim == 1 else solution

        return apply

    def logdet(self, *, ridge: float | Array) -> Array:
        """log det(F Fᵀ + ridge·I), for the evidence of a Gaussian process among others.

        Parameters
        ----------
        ridge : float or array of shape ()
            As for :meth:`solve`.

        Returns
        -------
        array, shape (...)
            Computed in float64 where the library has it.

        Raises
        ------
        TypeError
            If ``ridge`` is an array but not of a real floating dtype.
        ValueError
            If ``ridge`` is not positive and finite, or of another library.

        Notes
        -----
        With the R of :meth:`preconditioner` RᵀR = FᵀF + ridge·I, and Sylvester's determinant identity gives
        (n − k)·log ridge + 2 Σ log|R_ii|. No R_ii is below √ridge.
        """
        xp, mu = self._checked_ridge(ridge)
        n, k = self.factor.shape[-2:]
        with arithmetic(self.factor):
            r = self._ridge_qr(xp.astype(self.factor, mu.dtype), mu, xp)[1]
            logs = xp.sum(xp.log(xp.abs(xp.linalg.diagonal(r))), axis=-1)
            return xp.astype((n - k) * xp.log(mu) + 2 * logs, self.dtype)

    def features(self, x_new: Array, /) -> Array:
        """The rows of F for any points: k(x_new, z) L⁻ᵀ. Their products stand for the kernel between the points.

        Parameters
        ----------
        x_new : array, shape (..., m, d)
            Points, in the library and dtype of F; or, where K itself was factored, their kernel values with the
            landmarks, the block k(x_new, z) of shape (..., m, k).

        Returns
        -------
        array, shape (..., m, rank)
            For the points that were factored, F up to rounding.

        Raises
        ------
        TypeError
            If ``x_new`` or what the kernel returns is not an array of the library and dtype of F.
        ValueError
            If its last axis is not that of the landmarks, or its leading axes do not broadcast with those of F, if it
            holds NaN or infinite values or is on another device, or if the kernel's values are not finite, or not one
            for each pair.
        """
        xp = namespace(factor=self.factor, x_new=x_new)
        z, k = self.landmarks, self.cholesky.shape[-1]
        needed = k if z is None else z.shape[-1]
        if x_new.ndim < 2 or x_new.shape[-1] != needed:
            what = f"kernel values with the {k} landmarks" if z is None else "points"
            raise ValueError(f"x_new has shape {tuple(x_new.shape)}; {what} have the shape (..., m, {needed})")
        self._check_batch(x_new, "x_new")
        checked_finite(x_new, "x_new", xp)
        with arithmetic(x_new):
            c = x_new if z is None or self.kernel is None else checked_block(self.kernel(x_new, z), x_new, z)
            rows = solve_right(self.cholesky, c, xp)
            return rows if self.rotation is None else rows @ self.rotation

    def truncate(self, *, rank: int | None = None, rtol: float | None = None) -> LowRank:
        """The best approximation of F Fᵀ of lower rank, with orthogonal columns and the same features of new points.

        Parameters
        ----------
        rank : int, optional
            The most columns to keep.
        rtol : float, optional
            Keep as few columns as discard at most rtol·tr F Fᵀ, in every batch element; in [0, 1). At least one of the
            two is needed; with both the smaller rank counts.

        Returns
        -------
        LowRank
            Of at least one column. Its ``trace_error`` is larger by what was discarded, Σ σ_i² over the singular values
            of F beyond the rank (Eckart & Young, Psychometrika 1, 1936).

        Raises
        ------
        TypeError
            If ``rank`` is not an int, or F belongs to a traced program and its rank was to be found by ``rtol``.
        ValueError
            If neither is given, ``rank`` is below 1, or ``rtol`` not in [0, 1).
        """
        if rank is None and rtol is None:
            raise ValueError("truncate needs rank, rtol or both")
        if rank is not None and not is_integer(rank):
            raise TypeError(f"rank must be an int, not {shown(rank)}")
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be at least 1, not {shown(int(rank))}")
        if rtol is not None:
            _check_rtol(rtol, self.factor)
        xp = namespace(factor=self.factor)
        wide = widest_real(self.factor, xp)
        with arithmetic(self.factor):
            u, s, vt = xp.linalg.svd(xp.astype(self.factor, wide), full_matrices=False)
            r = s.shape[-1] if rank is None else min(int(rank), s.shape[-1])
            if rtol is not None:
                r = min(r, _kept(s * s, float(rtol)))
            error = xp.astype(self.trace_error, wide) + xp.sum(s[..., r:] ** 2, axis=-1)
            rotation = xp.astype(xp.matrix_transpose(vt[..., :r, :]), self.dtype)
            return dataclasses.replace(
                self,
                factor=xp.astype(u[..., :, :r] * s[..., None, :r], self.dtype),
                trace_error=xp.astype(error, self.dtype),
                rotation=rotation if self.rotation is None else self.rotation @ rotation,
            )

    def certificate(
        self, x: Array, /, *, rng: int | np.random.Generator | None = None, columns: int = 30
    ) -> Certificate:
        """How far F Fᵀ is from K, and how many steps a solver needs: see :class:`lowrank.Certificate`.

        Parameters
        ----------
        x : array, shape (n, d)
            The points that were factored; a factorisation does not keep them. K itself, (n, n), if there is no kernel.
        rng : None, int or numpy.random.Generator
            Which columns are drawn.
        columns : int
            How many, at least 20; the width of the Frobenius interval goes down with its root.

        Returns
        -------
        Certificate

        Raises
        ------
        TypeError
            If ``x`` is not an array of the library and dtype of F, or belongs to a traced program, ``columns`` is not
            an int, or ``rng`` none of the above.
        ValueError
            If ``x`` does not have the shape or the values of what was factored, or is on another device, F has batch
            axes, ``columns`` is below 20, or ``rng`` is negative.

        Notes
        -----
        Costs ``columns``·n kernel values, computed in float64 where there is float64, and n·k·(k + columns) products,
        in blocks of bounded memory. No derivatives.

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank.factor import nystrom
        >>> x = np.linspace(0.0, 9.0, 200)[:, None]
        >>> found = nystrom(x, rank=8, rng=0).certificate(x, rng=0)
        >>> lower, upper = found.frobenius
        >>> found.spectral[0] <= found.spectral[1] == found.trace and lower <= upper <= found.trace
        True
        >>> found.cg_bound(ridge=0.1, tol=1e-8) < 200
        True
        """
        return certify(x, self.kernel, self.factor, width=self.cholesky.shape[-1], columns=columns, rng=rng)

    def aslinearoperator(self) -> LinearOperator:
        """F Fᵀ for SciPy's iterative solvers: takes and gives NumPy arrays, multiplies where F is.

        Returns
        -------
        scipy.sparse.linalg.LinearOperator
            Symmetric, of shape (n, n) and the dtype of F.

        Raises
        ------
        TypeError
            If F belongs to a traced program.
        ValueError
            If F has batch axes.
        """
        from scipy.sparse.linalg import LinearOperator

        if self.factor.ndim != 2:
            raise ValueError(
                f"a LinearOperator is one matrix, and this is a batch of shape {self.shape}; take one of it"
            )
        self._check_values("a LinearOperator takes and gives NumPy arrays")
        xp = namespace(factor=self.factor)
        dtype = to_host(self.factor[:0, :0]).dtype

        def product(v: np.ndarray) -> np.ndarray:
            return to_host(self @ from_host(np.asarray(v, dtype=dtype), self.factor, xp))

        return LinearOperator(
            shape=self.shape, dtype=dtype, matvec=product, rmatvec=product, matmat=product, rmatmat=product
        )

    def save(self, path: str | os.PathLike[str], /) -> None:
        """Write everything but the kernel, which is a function, to a safetensors file.

        Parameters
        ----------
        path : path
            A file that is there is replaced, as by ``numpy.save``, and only once the new one is whole: a writer that is
            interrupted leaves the old one.

        Raises
        ------
        TypeError
            If ``path`` is neither a str nor a path, or F belongs to a traced program.
        IsADirectoryError
            If ``path`` is a folder.
        FileNotFoundError
            If the folder that the file is to be in does not exist.
        OSError
            If the system does not let it be written, as with too long a name.
        ImportError
            If the package ``safetensors`` is not installed.
        """
        self._check_values("a file holds numbers")
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        held = {name: to_host(a) for name, a in arrays.items() if a is not None}
        _saved.write(path, held, {"format": _FORMAT, "by_kernel": self.kernel is not None})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], /, *, kernel: Callable[..., Array] | None, like: Array | None = None
    ) -> LowRank:
        """A factorisation that :meth:`save` wrote.

        Parameters
        ----------
        path : path
        kernel : callable or None
            The kernel that it was made with, None if K itself was factored. It is tried on the landmarks.
        like : array, optional
            An array of the library and on the device wanted; NumPy arrays without it, whatever was saved. The dtypes
            are those saved.

        Returns
        -------
        LowRank

        Raises
        ------
        TypeError
            If ``path`` is neither a str nor a path, ``like`` is not an array of floating dtype, or ``kernel`` is
            neither callable nor None, or returns no array of the library and dtype of its points.
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is not a whole file of a factorisation, or ``kernel`` is not the one that it was made with.
        ImportError
            If the package ``safetensors`` is not installed.
        """
        _checked_kernel(kernel)
        if like is not None:
            namespace(like=like)
        held, description = _saved.read(path)
        if description.get("format") != _FORMAT:
            raise ValueError(f"{path} holds {shown(description)}, not a factorisation of the format {_FORMAT!r}")
        needed = {"factor", "trace_error", "cholesky", "landmarks" if description.get("by_kernel") else "pivots"}
        if "by_kernel" not in description or not needed <= held.keys():
            raise ValueError(f"{path} is no whole factorisation: it holds {sorted(held)} and {shown(description)}")
        if description["by_kernel"] != (kernel is not None):
            needs = "points, with a kernel: name it" if description["by_kernel"] else "K itself: give kernel=None"
            raise ValueError(f"{path} was made from {needs}")
        where = held["factor"] if like is None else like
        xp = namespace(like=where)
        arrays = {name: from_host(a, where, xp, dtype=getattr(xp, str(a.dtype))) for name, a in held.items()}
        pivots = held.get("pivots")
        if pivots is not None:
            arrays["pivots"] = _index_array(pivots, where, xp)
        if kernel is not None:
            check_same_kernel(kernel, arrays["landmarks"], arrays["cholesky"], xp)
        return cls(**{name: arrays.get(name) for name in _ARRAYS}, kernel=kernel)

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

    def _ridge_qr(self, factor: Array, mu: Array, xp: Namespace) -> tuple[Array, Array]:
        """Q and R of [F; √μ·I], in the precision of ``factor``."""
        *batch, _, k = factor.shape
        root = xp.astype(xp.sqrt(mu), factor.dtype) * xp.eye(k, dtype=factor.dtype, device=device(factor))
        return xp.linalg.qr(xp.concat([factor, xp.broadcast_to(root, (*batch, k, k))], axis=-2), mode="reduced")

    def _checked_ridge(self, ridge: Any) -> tuple[Namespace, Array]:
        """The namespace, and the ridge as an array of shape (), in double where there is double."""
        xp = namespace(factor=self.factor)
        wide = widest_real(self.factor, xp)
        if isinstance(ridge, numbers.Real):
            mu = xp.asarray(number(ridge), dtype=wide, device=device(self.factor))
        elif hasattr(ridge, "shape") and tuple(ridge.shape) == () and namespace(ridge=ridge) is xp:
            if xp.isdtype(ridge.dtype, "complex floating"):
                raise TypeError(f"ridge has dtype {ridge.dtype}, and must be real")
            mu = xp.astype(ridge, wide)
        else:
            raise ValueError(f"ridge must be a positive finite number or an array of shape (), not {shown(ridge)}")
        # In the precision of F, where a tiny one may be zero.
        if not is_traced(mu) and not (
            math.isfinite(value := float(stop_gradient(xp.astype(mu, self.dtype)))) and value > 0
        ):
            rank = f" and rank {self._meaningful_rank(xp)}" if self.factor.size and not is_traced(self.factor) else ""
            raise ValueError(
                f"ridge must be a positive finite number, not {shown(ridge)}: F Fᵀ, of size {self.shape[-1]}{rank}, is "
                "singular or near it without one"
            )
        return xp, mu

    def _meaningful_rank(self, xp: Namespace) -> int:
        """The eigenvalues of F Fᵀ above rounding, of the batch element that has the fewest."""
        squares = to_host(xp.linalg.svdvals(self.factor)) ** 2
        eps = float(xp.finfo(self.dtype).eps)
        return int(np.min(np.sum(squares > eps * max(_ROUNDING, self.shape[-1]) * squares[..., :1], axis=-1)))

    def _right_side(self, b: Array, name: str) -> tuple[Namespace, Array]:
        """The namespace, and b as columns, after checking that F Fᵀ can be applied to them."""
        xp = namespace(**{"factor": self.factor, name: b})
        n = self.factor.shape[-2]
        columns = b[:, None] if b.ndim == 1 else b
        if b.ndim == 0 or columns.shape[-2] != n:
            raise ValueError(
                f"{name} has shape {tuple(b.shape)}; a matrix of shape {self.shape} needs ({n},) or (..., {n}, p)"
            )
        self._check_batch(columns, name)
        return xp, columns

    def _check_batch(self, x: Array, name: str) -> None:
        try:
            broadcast_shapes(tuple(x.shape[:-2]), tuple(self.factor.shape[:-2]))
        except ValueError:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, whose leading axes do not broadcast with those of F, "
                f"{tuple(self.factor.shape)}"
            ) from None

    def _check_values(self, why: str) -> None:
        if is_traced(self.factor):
            raise TypeError(f"{why}, and F (shape {tuple(self.factor.shape)}) belongs to a traced program; go outside")


def _check_rtol(rtol: Any, factor: Array) -> None:
    if not 0 <= number(rtol) < 1:
        raise ValueError(f"rtol must be a number in [0, 1), not {shown(rtol)}")
    if is_traced(factor):
        raise TypeError("a rank found by rtol depends on values, which a traced program does not have; give rank")


def _kept(squares: Array, rtol: float) -> int:
    """How many of the descending σ² leave at most rtol of their sum, in the worst batch element."""
    held = to_host(squares)
    beyond = np.cumsum(held[..., ::-1], axis=-1)[..., ::-1]  # discarded if this column and those after it are
    needed = np.sum(beyond > rtol * np.sum(held, axis=-1, keepdims=True), axis=-1)
    return max(1, int(np.max(needed, initial=1)))
