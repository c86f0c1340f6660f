"""Kernel matrices of more points than memory holds, or than one machine does: Dask arrays chunked by rows.

With the landmarks z and the core L, the factor F = k(x, z) L⁻ᵀ of :mod:`lowrank.factor` is computed row by row: a chunk
of F needs a chunk of x and k·(d + k) numbers, and whatever is small in the end, FᵀF for one, is a sum over chunks.
That is all this room rests on; what a task computes of its chunk is in ``_chunk``. Tasks are pure functions, which is
why any scheduler gives one result and a lost worker changes nothing. Chunks may be of any array library that Dask can
hold (NumPy, CuPy); what has the size of the landmarks lives on the host, as NumPy arrays.

Landmarks are drawn by randomly pivoted Cholesky in the block form with rejection of Epperly, Tropp & Webber,
"Embrace rejection: kernel matrix approximation by accelerated randomly pivoted Cholesky", arXiv 2410.03969, 2024;
there one machine holds the factor, here none does. The ridge fit is the subset of regressors of Rasmussen & Williams,
"Gaussian Processes for Machine Learning", 2006, §8.3.1, in features in which its penalty is ‖β‖².
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import array_api_compat.numpy as host
import dask
import dask.array as da
import numpy as np

from lowrank import _chunk
from lowrank import landmarks as _landmarks
from lowrank._array import (
    Array,
    arithmetic,
    from_host,
    generator,
    is_half,
    namespace,
    number,
    shown,
    to_host,
    widest_real,
)
from lowrank._core import SHIFT, checked_block, checked_symmetric, shifted_cholesky, solve_right
from lowrank.factor import _as_array, _checked_indices, _checked_landmark_points
from lowrank.kernels import gaussian_kernel

# How many sums a task of the tree adds up: few enough that the adding starts while chunks are being read.
_FAN_IN = 8

# Proposals per round of RPCholesky. A round reads every chunk, and proposals cost the host b² kernel values, so b is
# large; but the accepted ones spoil each other's odds, and a round of b lowers the trace by a factor of about b at
# most. The upper limit keeps the host's b × b matrix below 32 MiB.
_LEAST_PROPOSALS, _MOST_PROPOSALS = 64, 2048


@dataclass(frozen=True, eq=False, repr=False)
class ChunkedLowRank:
    """A positive semidefinite matrix F Fᵀ of low rank, standing for the kernel matrix of the rows of a Dask array.

    Made by :func:`nystrom`. What has n rows is lazy; the rest is on the host.

    Parameters
    ----------
    factor : dask array, shape (n, k)
        F, with the row chunks of x, computed from them anew wherever it is used.
    landmarks : numpy array, shape (k, d)
        The points z, in the dtype of x.
    pivots : numpy integer array, shape (k,), or None
        Which rows the landmarks are, where they are rows.
    trace_error : dask array, shape ()
        tr(K − F Fᵀ), a sum over chunks: ``dask.compute(result.trace_error, …)`` together with what else is wanted of
        the factor reads each chunk once. Accumulated in float64; terms that rounding left below zero count as zero.
    cholesky : numpy array, shape (k, k)
        L in float64, lower triangular.
    kernel : callable
        k.
    """

    factor: da.Array
    landmarks: np.ndarray
    pivots: np.ndarray | None
    trace_error: da.Array
    cholesky: np.ndarray = field(kw_only=True)
    kernel: Callable[..., Array] = field(kw_only=True)

    @property
    def rank(self) -> int:
        """k, the number of columns of F."""
        return self.factor.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of F Fᵀ, (n, n)."""
        return (self.factor.shape[0], self.factor.shape[0])

    @property
    def dtype(self) -> Any:
        """The dtype of F."""
        return self.factor.dtype

    def __repr__(self) -> str:
        chunks = self.factor.numblocks[0]
        return f"ChunkedLowRank(shape={self.shape}, rank={self.rank}, dtype={self.dtype}, chunks={chunks})"

    def features(self, x_new: Array, /) -> Array:
        """k(x_new, z) L⁻ᵀ, the rows that x_new would have in F.

        Parameters
        ----------
        x_new : dask array chunked by rows, or array, shape (n_new, d)
            Of the dtype of x.

        Returns
        -------
        dask array (lazy) or array, shape (n_new, k)
            Of the dtype of ``x_new``, and on its device.

        Raises
        ------
        TypeError
            If ``x_new`` is not an array, or not of the dtype of the landmarks.
        ValueError
            If it does not have two axes and their features, or is a Dask array of no rows, of unknown chunk sizes or
            chunked along the features. While chunks are being computed: if one holds NaN or infinite values, naming its
            first such row by its number.
        """
        core = _chunk.Core(self.landmarks, self.cholesky, self.kernel)
        return _by_rows(_chunk.feature_rows, x_new, core, name="x_new", columns=self.rank)


@dataclass(frozen=True, eq=False, repr=False)
class RidgeFit:
    """A ridge regression in the features of landmarks, and how well it fits. Made by :func:`ridge`; on the host.

    Parameters
    ----------
    coefficients : numpy array, shape (k,) or (k, t)
        β in float64: the prediction is k(x, z) L⁻ᵀ β.
    landmarks : numpy array, shape (k, d)
        The points z, in the dtype of x.
    pivots : numpy integer array, shape (k,), or None
        Which rows the landmarks are, where they are rows.
    trace_error : float
        tr(K − F Fᵀ) for the rows fitted, from the same pass.
    residual : numpy array, shape () or (t,)
        ‖y − Fβ‖₂ over the rows fitted, in the units of y, from the sums of the same pass: right to 1e-7·‖y‖₂.
    cholesky : numpy array, shape (k, k)
        L in float64, lower triangular.
    kernel : callable
        k.
    """

    coefficients: np.ndarray
    landmarks: np.ndarray
    pivots: np.ndarray | None
    trace_error: float
    residual: np.ndarray
    cholesky: np.ndarray = field(kw_only=True)
    kernel: Callable[..., Array] = field(kw_only=True)

    def __repr__(self) -> str:
        worst = float(np.max(self.residual))
        return f"RidgeFit(rank={len(self.landmarks)}, residual={worst:.3g}, trace_error={self.trace_error:.3g})"

    def predict(self, x_new: Array, /) -> Array:
        """The fitted function k(x_new, z) L⁻ᵀ β.

        Parameters
        ----------
        x_new : dask array chunked by rows, or array, shape (n_new, d)
            Of the dtype of x.

        Returns
        -------
        dask array (lazy) or array, shape (n_new,) or (n_new, t)
            Of the dtype of ``x_new`` and on its device, with its row chunks; computed in float64.

        Raises
        ------
        TypeError, ValueError
            As :meth:`ChunkedLowRank.features`.
        """
        core = _chunk.Core(self.landmarks, self.cholesky, self.kernel)
        columns = None if self.coefficients.ndim == 1 else self.coefficients.shape[1]
        return _by_rows(
            _chunk.predicted_rows, x_new, core, name="x_new", columns=columns, coefficients=self.coefficients
        )


def nystrom(
    x: da.Array,
    /,
    *,
    kernel: Callable[..., Array] = gaussian_kernel,
    landmarks: str | Callable[..., Array] | Sequence[int] | Array = "uniform",
    rank: int | None = None,
    rng: int | np.random.Generator | None = None,
) -> ChunkedLowRank:
    """Nyström factorisation of the kernel matrix of n points in row chunks: K = k(x, x) ≈ F Fᵀ, F lazy.

    Parameters
    ----------
    x : dask array, shape (n, d)
        Points, float32 or float64, with known row chunks and one chunk of features.
    kernel : callable
        Positive semidefinite kernel, ``kernel(a, b)`` the block of shape (..., n, m) for points (..., n, d) and
        (..., m, d) of the chunks' array library, in their dtype and in float64. On many machines it is pickled.
    landmarks : str, callable, integer indices or points
        ``"uniform"``, or ``"rpcholesky"`` for :func:`rpcholesky`; a callable with the signature of the latter, for a
        tolerance ``functools.partial(rpcholesky, rtol=…)``; 1-D integer indices of rows of ``x``; or points of shape
        (k, d), in the dtype and the array library of the chunks.
    rank : int, optional
        How many landmarks; needed where they are to be chosen, and at most as many are taken.
    rng : None, int or numpy.random.Generator
        Handed to the function that chooses the landmarks; ``"uniform"`` draws what it draws for any array.

    Returns
    -------
    ChunkedLowRank
        The lazy factor, the landmarks, and tr(K − F Fᵀ), lazy as well.

    Raises
    ------
    TypeError
        If ``x`` is not a Dask array of float32 or float64, an argument is of another type, or the kernel returns no
        array of the library and dtype of its points.
    ValueError
        If ``x`` does not have two axes and one row, chunk sizes are unknown, ``x`` is chunked along the features, an
        index, the rank or ``rng`` is out of range, shapes do not fit, ``landmarks`` is an unknown name or empty,
        ``rank`` is missing where they are chosen or not their number, ``kernel`` is None, or the kernel returns a block
        of another shape, values that are not finite, a negative diagonal, or a k(z, z) that is not symmetric or not
        positive semidefinite. While chunks are being computed: if one holds NaN or infinite values, naming its first
        such row by its number in ``x``.

    Notes
    -----
    Landmarks that are points cost no reading of ``x`` at all before the factor is computed; those that are rows are
    read from the chunks they lie in. The core is that of :func:`lowrank.nystrom`, in float64 on the host, and so is
    what it promises. A chunk of F has rank/d times the columns of a chunk of x: choose rows per chunk accordingly.

    Examples
    --------
    >>> import dask.array as da
    >>> from lowrank.dask import nystrom
    >>> x = da.linspace(0.0, 1.0, 200, chunks=50)[:, None]
    >>> k = nystrom(x, rank=12, rng=0)
    >>> k
    ChunkedLowRank(shape=(200, 200), rank=12, dtype=float64, chunks=4)
    >>> bool(k.trace_error.compute() < 1e-9)
    True
    """
    _checked(x, "x")
    _check_kernel(kernel)
    core, pivots = _core(x, kernel, landmarks, rank, rng)
    factor = _by_rows(_chunk.feature_rows, x, core, name="x", columns=len(core.landmarks))
    left = da.map_blocks(_chunk.unexplained, x, factor, kernel=kernel, drop_axis=1, dtype=np.float64, meta=x._meta)
    trace_error = left.sum(dtype=np.float64).astype(x.dtype)
    return ChunkedLowRank(
        factor, core.landmarks, pivots, trace_error=trace_error, cholesky=core.cholesky, kernel=kernel
    )


def ridge(
    x: da.Array,
    y: da.Array,
    /,
    *,
    kernel: Callable[..., Array] = gaussian_kernel,
    landmarks: str | Callable[..., Array] | Sequence[int] | Array = "uniform",
    rank: int | None = None,
    ridge: float,
    rng: int | np.random.Generator | None = None,
) -> RidgeFit:
    """Ridge regression in the features of landmarks, min_β ‖y − Fβ‖² + ridge·‖β‖² with F = k(x, z) L⁻ᵀ, in one pass.

    Parameters
    ----------
    x : dask array, shape (n, d)
        Points, float32 or float64, with known row chunks and one chunk of features.
    y : dask array, shape (n,) or (n, t)
        Targets, of the dtype and the array library of ``x``; other row chunks are brought to those of ``x``.
    kernel, landmarks, rank, rng
        As for :func:`nystrom`.
    ridge : float
        Not negative; in the units of K, and that of kernel ridge regression with F Fᵀ for K. Zero is least squares.

    Returns
    -------
    RidgeFit
        The coefficients, ``predict``, the residual, and the trace error of the landmarks.

    Raises
    ------
    TypeError
        As :func:`nystrom`, and if ``y`` is not a Dask array of the dtype and library of ``x``.
    ValueError
        As :func:`nystrom`, and if ``y`` does not have n rows or is of unknown chunk sizes, or ``ridge`` is no finite
        number, or negative; if a row of ``y`` holds NaN or infinite values, naming the first one; if FᵀF + ridge·I is
        singular in float64, naming the rank of F.

    Notes
    -----
    Every chunk is read once, and reduced to [F y]ᵀ[F y] in float64, (rank + t)² numbers; these are added up in a tree.
    A task holds 2²¹ entries of k(x, z) at a time, whatever the size of its chunk. The result does not depend on the
    scheduler, and on the chunks only through the order of the sums. One pass means normal equations: ‖error of β‖ is
    about eps·(λ_max(FᵀF) + ridge)/(λ_min(FᵀF) + ridge)·‖β‖ with the eps of float64.

    ``distributed`` starts workers with MALLOC_TRIM_THRESHOLD_=65536, which makes glibc map and clear every temporary
    array anew: fits were measured 2 to 5 times faster on a cluster made after ``dask.config.set`` of
    ``distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_`` to ``"268435456"`` and of ``…MALLOC_MMAP_THRESHOLD_``
    to ``"33554432"``.

    Examples
    --------
    >>> import dask.array as da
    >>> from lowrank.dask import ridge
    >>> x = da.linspace(0.0, 6.0, 200, chunks=50)[:, None]
    >>> fit = ridge(x, da.sin(x[:, 0]), rank=15, ridge=1e-6, rng=0)
    >>> bool(abs(fit.predict(x) - da.sin(x[:, 0])).max().compute() < 1e-3)
    True
    """
    _checked(x, "x")
    y = _checked_targets(y, x)
    _check_kernel(kernel)
    ridge = _checked_ridge(ridge)
    core, pivots = _core(x, kernel, landmarks, rank, rng)
    shared = dask.delayed(core, traverse=False)
    parts = [
        dask.delayed(_chunk.sums)(rows, targets, start, shared)
        for (start, rows), targets in zip(_chunks(x), _blocks(y), strict=True)
    ]
    total = dask.compute(_tree(parts))[0]
    _chunk.raise_bad(total.bad_x, "x")
    _chunk.raise_bad(total.bad_y, "y")
    k = len(core.landmarks)
    gram, moments, squares = total.products[:k, :k], total.products[:k, k:], np.diagonal(total.products)[k:]
    coefficients = _ridge_solution(gram, moments, ridge)
    fitted = np.sum(coefficients * (2 * moments - gram @ coefficients), axis=0)
    residual = np.sqrt(np.maximum(squares - fitted, 0.0))
    if y.ndim == 1:
        coefficients, residual = coefficients[:, 0], residual[0]
    return RidgeFit(
        coefficients,
        core.landmarks,
        pivots,
        trace_error=total.trace,
        residual=residual,
        cholesky=core.cholesky,
        kernel=kernel,
    )


def rpcholesky(
    x: da.Array,
    /,
    *,
    rank: int,
    kernel: Callable[..., Array],
    rng: int | np.random.Generator | None = None,
    rtol: float = 0.0,
) -> np.ndarray:
    """Randomly pivoted Cholesky: rows drawn in proportion to what is left of the kernel's diagonal.

    Parameters
    ----------
    x : dask array, shape (n, d)
        Points, float32 or float64, with known row chunks and one chunk of features.
    rank : int
        How many rows at most, from 1 to n.
    kernel : callable
        As for :func:`nystrom`.
    rng : None, int or numpy.random.Generator
        Where the numbers come from; they are drawn on the client, so that the scheduler does not matter, and the chunks
        matter only where rounding decides.
    rtol : float
        Stop at the first pivot with which tr(K − F Fᵀ) ≤ rtol·tr K; from 0 to below 1.

    Returns
    -------
    numpy integer array, shape (≤ rank,)
        Distinct rows in the order drawn. Fewer than ``rank`` if ``rtol`` is reached, or if what is left of every
        diagonal entry is rounding, below 30·eps·k(x, x): duplicates of one point have rank 1.

    Raises
    ------
    TypeError
        If ``x`` is not a Dask array of float32 or float64, an argument is of another type, or the kernel returns no
        array of the library and dtype of its points.
    ValueError
        If ``x`` does not have two axes and one row, chunk sizes are unknown, ``x`` is chunked along the features,
        ``rank``, ``rtol`` or ``rng`` is out of range, a row holds NaN or infinite values, naming the first one,
        ``kernel`` is None, or the kernel returns a block of another shape, values that are not finite or a negative
        diagonal.

    Notes
    -----
    A round goes through x: with the k pivots so far, every chunk computes its rows of F and from them what is left of
    its diagonal, which stays where it is, n numbers in all. The sums over chunks say from which chunk each of b
    proposals is to come, and the chunk is read again and draws it. The client takes these b·(d + 2) numbers, and
    accepts a proposal with the probability left/proposed, which makes the pivots those of the one-by-one algorithm; the
    accepted ones go out as at most b·(d + k) numbers. b is twice the rank, from 64 to 2048; two to four rounds are
    usual. F is computed anew in every round and never kept: the memory is that of a few blocks of k(x, z) per thread.
    """
    _checked(x, "x")
    _check_kernel(kernel)
    rank = _landmarks._checked_rank(rank, x)
    if isinstance(rtol, bool) or not 0 <= number(rtol) < 1:
        raise ValueError(f"rtol must be a number from 0 to below 1, not {shown(rtol)}")
    rtol = float(rtol)
    random = generator(rng)
    count = min(max(2 * rank, _LEAST_PROPOSALS), _MOST_PROPOSALS)
    chunks = list(_chunks(x))
    starts = np.asarray([start for start, _ in chunks])
    core = _chunk.Core(np.zeros((0, x.shape[1]), dtype=x.dtype), np.zeros((0, 0)), kernel)
    pivots, trace, fresh = np.zeros(0, dtype=np.intp), None, 0
    sent: list[Any] = []
    while True:
        left = dask.persist(
            *[dask.delayed(_chunk.residual)(rows, start, sent, kernel, fresh) for start, rows in chunks], traverse=False
        )
        found = dask.compute(*[dask.delayed(_chunk.summary)(part) for part in left])
        _chunk.raise_bad(min(part.bad for part in found), "x")
        totals = np.asarray([part.total for part in found])
        if trace is None:
            trace = float(totals.sum())
            if trace == 0:
                return np.zeros(1, dtype=np.intp)  # K = 0, of which any row is a factor
        # What the trace was before each of the last round's pivots, and is now: the columns of F are nested.
        columns = np.sum([part.columns for part in found], axis=0)
        history = totals.sum() + np.append(np.cumsum(columns[::-1])[::-1], 0.0)
        enough = np.flatnonzero(history <= rtol * trace)
        if enough.size:
            return pivots[: max(1, len(pivots) - fresh + int(enough[0]))]
        if len(pivots) == rank:
            return pivots
        rows, points, proposed = _proposals(left, chunks, starts, totals, count, random)
        accepted, core = _accepted(points, proposed, core, rank, random, x)
        fresh = len(accepted)
        if fresh == 0:
            return pivots
        pivots = np.append(pivots, rows[accepted])
        if len(pivots) == rank and rtol == 0:
            return pivots
        block = _chunk.Block(core.landmarks[-fresh:], core.cholesky[-fresh:])
        sent = [*sent, *dask.persist(dask.delayed(block, traverse=False))]


_NAMED = ("rpcholesky", "uniform")


# What the client does with what is small


def _core(
    x: da.Array, kernel: Callable[..., Array], landmarks: Any, rank: int | None, rng: Any
) -> tuple[_chunk.Core, np.ndarray | None]:
    """The landmarks and the Cholesky factor of their kernel, as lowrank.factor has them."""
    points, pivots = _resolved(landmarks, x, kernel, rank, rng)
    meta = x._meta
    xp = namespace(x=meta)
    wide = from_host(points, meta, xp, dtype=widest_real(meta, xp))
    with arithmetic(wide):
        w = to_host(checked_symmetric(checked_block(kernel(wide, wide), wide, wide), xp)).astype(np.float64)
    return _chunk.Core(points, shifted_cholesky(w, eps=float(xp.finfo(meta.dtype).eps), xp=host), kernel), pivots


def _resolved(
    landmarks: Any, x: da.Array, kernel: Callable[..., Array], rank: int | None, rng: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """Landmark points and, if they are rows of x, their indices."""
    if isinstance(landmarks, str) and landmarks not in _NAMED:
        raise ValueError(
            f"landmarks must be one of {list(_NAMED)}, a callable, indices or points, not {shown(landmarks)}"
        )
    chosen = isinstance(landmarks, str) or callable(landmarks)
    if rank is None and chosen:
        raise ValueError("rank, the number of landmarks, is needed where they are to be chosen")
    if rank is not None:
        _landmarks._checked_rank(rank, x)
    if isinstance(landmarks, str) and landmarks == "uniform":
        landmarks = generator(rng).choice(x.shape[0], size=rank, replace=False)
    elif chosen:
        choose: Callable[..., Array] = rpcholesky if isinstance(landmarks, str) else landmarks
        landmarks = choose(x, rank=rank, kernel=kernel, rng=rng)
    landmarks = _as_array(landmarks)
    if isinstance(landmarks, da.Array):
        landmarks = landmarks.compute()
    count = landmarks.shape[0] if landmarks.ndim else 0
    if count > x.shape[0]:
        raise ValueError(f"there are {count} landmarks for {x.shape[0]} points (x has shape {x.shape}); give fewer")
    if rank is not None and (count > rank if chosen else count != rank):
        raise ValueError(f"rank is {rank} and there are {count} landmarks; leave out rank, or make them agree")
    if landmarks.ndim == 1:
        pivots = _checked_indices(landmarks, x, host)
        return _rows(x, pivots), pivots
    # The shape and the array library of x, and no memory.
    meta = x._meta
    xp = namespace(x=meta)
    like = xp.broadcast_to(xp.zeros((1, 1), dtype=meta.dtype), x.shape)
    return to_host(_checked_landmark_points(landmarks, like, kernel, xp)), None


def _rows(x: da.Array, indices: np.ndarray) -> np.ndarray:
    """Some rows of x, on the host; only the chunks that hold them are read."""
    chunks = list(_chunks(x))
    starts = np.asarray([start for start, _ in chunks])
    owner = np.searchsorted(starts, indices, side="right") - 1
    owners = np.unique(owner)
    found = dask.compute(*[dask.delayed(_chunk.rows_at)(chunks[i][1], indices[owner == i] - starts[i]) for i in owners])
    rows = np.empty((len(indices), x.shape[1]), dtype=x.dtype)
    for i, part in zip(owners, found, strict=True):
        rows[owner == i] = part
    bad = indices[~np.all(np.isfinite(rows), axis=1)]
    _chunk.raise_bad(float("inf") if bad.size == 0 else int(bad.min()), "x")
    return rows


def _proposals(
    left: Sequence[Any],
    chunks: list[tuple[int, Any]],
    starts: np.ndarray,
    totals: np.ndarray,
    count: int,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows drawn in proportion to what is left of the diagonal, these points, and what was left of them."""
    running = np.cumsum(totals)
    targets = np.minimum(random.random(count) * running[-1], np.nextafter(running[-1], 0.0))
    owner = np.searchsorted(running, targets, side="right")
    targets = targets - (running - totals)[owner]
    owners = np.unique(owner)
    found = dask.compute(*[dask.delayed(_chunk.drawn)(left[i], chunks[i][1], targets[owner == i]) for i in owners])
    order = np.argsort(np.concatenate([np.flatnonzero(owner == i) for i in owners]))
    rows, points, proposed = (np.concatenate(parts)[order] for parts in zip(*found, strict=True))
    return rows + starts[owner], points, proposed


def _accepted(
    points: np.ndarray, proposed: np.ndarray, core: _chunk.Core, rank: int, random: np.random.Generator, x: da.Array
) -> tuple[np.ndarray, _chunk.Core]:
    """Which proposals the one-by-one algorithm would have drawn, and the core with them, all in float64.

    Given the proposals so far, one is accepted with the probability (left of it now)/(left of it when proposed).
    """
    meta = x._meta
    xp = namespace(x=meta)
    wide = widest_real(meta, xp)
    p, z = (from_host(values, meta, xp, dtype=wide) for values in (points, core.landmarks))
    with arithmetic(p):
        block = np.asarray(to_host(checked_block(core.kernel(p, p), p, p)), dtype=np.float64)
        f = np.zeros((len(points), 0))
        if len(core.landmarks):
            c = checked_block(core.kernel(p, z), p, z)
            f = np.asarray(to_host(solve_right(from_host(core.cholesky, p, xp), c, xp)), dtype=np.float64)
    floor = SHIFT * float(xp.finfo(meta.dtype).eps) * np.diagonal(block)
    left = np.diagonal(block) - np.sum(f * f, axis=1)
    new = np.zeros((len(points), min(len(points), rank - len(core.landmarks))))
    accepted: list[int] = []
    for j, chance in enumerate(random.random(len(points))):
        m = len(accepted)
        if m == new.shape[1]:
            break
        if left[j] <= floor[j] or chance * proposed[j] >= left[j]:
            continue
        column = block[:, j] - f @ f[j] - new[:, :m] @ new[j, :m]
        new[:, m] = column / math.sqrt(left[j])
        new[j, m] = math.sqrt(left[j])
        left = left - new[:, m] ** 2
        accepted.append(j)
    k, m = len(core.landmarks), len(accepted)
    lower = np.zeros((k + m, k + m))
    lower[:k, :k] = core.cholesky
    lower[k:, :k] = f[accepted]
    lower[k:, k:] = np.tril(new[accepted, :m])
    return np.asarray(accepted, dtype=np.intp), _chunk.Core(
        np.concatenate([core.landmarks, points[accepted]]), lower, core.kernel
    )


def _ridge_solution(gram: np.ndarray, moments: np.ndarray, ridge: float) -> np.ndarray:
    """(FᵀF + ridge·I)⁻¹ Fᵀy, by the eigenvalues of FᵀF, which say its rank as well."""
    values, vectors = np.linalg.eigh(gram)
    # The sums over many rows and the eigenvalues are both right to some k·eps·λ_max.
    floor = len(values) * float(np.finfo(np.float64).eps) * float(values[-1])
    if values[0] + ridge <= floor:
        raise ValueError(
            f"FᵀF + ridge·I is singular: F has {len(values)} columns, the rank {int(np.sum(values > floor))} in "
            f"float64, and ridge is {ridge}; make it larger than {floor:.3g}, or take fewer landmarks"
        )
    return vectors @ ((vectors.T @ moments) / (values + ridge)[:, None])


# How Dask arrays are taken apart and put together


def _by_rows(
    function: Callable[..., Array], x: Array, core: _chunk.Core, /, *, name: str, columns: int | None, **arguments: Any
) -> Array:
    """function(rows, core, start=…) lazily for every chunk of a Dask array, at once for another array."""
    if isinstance(x, da.Array):
        _checked(x, name)
    _checked_features(x, core, name)
    if not isinstance(x, da.Array):
        return function(x, core, start=0, name=name, **arguments)
    shape: dict[str, Any] = {"drop_axis": 1} if columns is None else {"chunks": (x.chunks[0], (columns,))}
    shared = dask.delayed(core, traverse=False)
    arguments |= {"function": function, "core": shared, "called": name}
    return da.map_blocks(_located, x, **arguments, **shape, dtype=x.dtype, meta=x._meta)


def _located(
    x: Array,
    *,
    function: Callable[..., Array],
    core: _chunk.Core,
    called: str,
    block_info: Any = None,
    **arguments: Any,
) -> Array:
    return function(x, core, start=block_info[0]["array-location"][0][0], name=called, **arguments)


def _chunks(x: da.Array) -> Iterator[tuple[int, Any]]:
    """The number of the first row and the delayed rows of every chunk."""
    starts = np.cumsum([0, *x.chunks[0][:-1]]).tolist()
    return zip(starts, _blocks(x), strict=True)


def _blocks(x: da.Array) -> list[Any]:
    """The delayed chunks. Their graph is not optimised, so that what two arrays have in common is computed once."""
    return x.to_delayed(optimize_graph=False).ravel().tolist()


def _tree(parts: list[Any]) -> Any:
    while len(parts) > 1:
        parts = [dask.delayed(_chunk.added)(parts[i : i + _FAN_IN]) for i in range(0, len(parts), _FAN_IN)]
    return parts[0]


def _checked(x: Any, name: str) -> None:
    if not isinstance(x, da.Array):
        raise TypeError(
            f"{name} must be a Dask array, not {type(x).__name__}; wrap it by dask.array.from_array, or use the "
            "functions for arrays in memory"
        )
    if x.ndim != 2:
        raise ValueError(f"{name} must have two axes, (points, features), not the shape {x.shape}")
    _checked_sizes(x, name)
    if x.numblocks[1] != 1:
        raise ValueError(
            f"{name} has {x.numblocks[1]} chunks along its second axis (shape {x.shape}) and must have one; "
            f"rechunk it by {name}.rechunk({{1: -1}})"
        )
    if x.shape[0] == 0:
        raise ValueError(f"{name} has no rows (shape {x.shape})")
    xp = namespace(**{name: x._meta})
    if is_half(x._meta) or xp.isdtype(x.dtype, "complex floating"):
        raise TypeError(f"{name} has dtype {x.dtype} (shape {x.shape}); convert it to float32 or float64")


def _checked_sizes(x: da.Array, name: str) -> None:
    if any(math.isnan(size) for axis in x.chunks for size in axis):
        raise ValueError(
            f"{name} has chunks of unknown size (shape {x.shape}); compute them by {name}.compute_chunk_sizes()"
        )


def _checked_targets(y: Any, x: da.Array) -> da.Array:
    """y in the row chunks of x."""
    if not isinstance(y, da.Array):
        raise TypeError(
            f"y must be a Dask array, not {type(y).__name__}; wrap it by "
            "dask.array.from_array(y, chunks=(x.chunks[0], …))"
        )
    _checked_sizes(y, "y")
    if y.ndim not in (1, 2) or y.shape[0] != x.shape[0]:
        raise ValueError(f"y has shape {y.shape}; for x of shape {x.shape} it must be ({x.shape[0]},) or (…, t)")
    namespace(x=x._meta, y=y._meta)
    return y.rechunk((x.chunks[0],) if y.ndim == 1 else (x.chunks[0], -1))


def _checked_features(x: Array, core: _chunk.Core, name: str) -> None:
    """That k(x, z) makes sense."""
    if not isinstance(x, da.Array):
        namespace(**{name: x})
    if x.ndim != 2 or x.shape[1] != core.landmarks.shape[1]:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; the landmarks need (n_new, {core.landmarks.shape[1]})")
    if str(x.dtype).rsplit(".", 1)[-1] != str(core.landmarks.dtype):
        raise TypeError(f"{name} has dtype {x.dtype} and the landmarks have {core.landmarks.dtype}; convert {name}")


def _check_kernel(kernel: Any) -> None:
    if kernel is None:
        raise ValueError("kernel is None, and a Dask array holds points here, not the matrix K; name their kernel")
    _landmarks._checked_kernel(kernel)


def _checked_ridge(ridge: Any) -> float:
    if isinstance(ridge, bool) or not 0 <= number(ridge) < math.inf:
        raise ValueError(f"ridge must be a finite number, not negative, not {shown(ridge)}")
    return float(ridge)
