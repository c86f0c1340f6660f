"""Which points stand for all the others: the landmarks of a Nyström approximation.

Every function here has one signature, ``(x, /, *, rank, kernel, rng)``, and returns either 1-D integer indices of
rows of x or an array of points, so that a function of the user's own is as good as these. ``uniform`` is the choice of
Williams & Seeger, "Using the Nyström method to speed up kernel machines", NeurIPS 2000; ``segment_means`` that of
Xiong et al., "Nyströmformer", AAAI 2021, eq. 9; ``rpcholesky`` is randomly pivoted Cholesky in blocks with rejection
(Epperly, Tropp & Webber, arXiv 2410.03969, 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lowrank import _segments
from lowrank._array import (
    Array,
    Namespace,
    add_product,
    arithmetic,
    block_namespace,
    from_host,
    generator,
    is_half,
    is_integer,
    is_traced,
    namespace,
    number,
    shown,
    solve_triangular,
    stop_gradient,
    to_host,
    widest_real,
)

# Candidates of the first block of rpcholesky, and of the largest. Small blocks waste the speed of products, large ones
# are mostly rejected where the spectrum decays; a block grows and shrinks with what is accepted of it.
_FIRST_BLOCK, _LARGEST_BLOCK = 16, 256
# What is left of the diagonal counts as nothing below this many eps of what was there: F carries a relative error of
# about one eps, and a pivot made of rounding errors would add rounding errors.
_NOTHING = 32.0


def uniform(
    x: Array, /, *, rank: int, kernel: Callable[..., Array] | None = None, rng: int | np.random.Generator | None = None
) -> Array:
    """Distinct rows of x, every set of them as likely as any other.

    Parameters
    ----------
    x : array, shape (..., n, d) or, if ``kernel`` is None, the matrix K itself, shape (..., n, n)
    rank : int
        How many, from 1 to n.
    kernel : callable or None
        Not evaluated: the choice does not depend on it.
    rng : None, int or numpy.random.Generator
        Where the numbers come from; they are drawn on the host, so that every library draws the same.

    Returns
    -------
    integer array, shape (rank,)
        Indices in the order drawn, in the library and on the device of ``x``; shared by all batch elements.

    Raises
    ------
    TypeError
        If ``rank`` is not an int, ``x`` not an array of floating dtype, or ``rng`` none of the above.
    ValueError
        If ``x`` has fewer than two axes, ``rank`` is not in 1 … n, or ``rng`` is negative.
    """
    xp, n = _checked(x, rank)
    return _index_array(generator(rng).choice(n, size=rank, replace=False), x, xp)


def segment_means(
    x: Array, /, *, rank: int, kernel: Callable[..., Array] | None, rng: int | np.random.Generator | None = None
) -> Array:
    """Means of consecutive rows of x, cut into ``rank`` segments whose lengths differ by one at most.

    Parameters
    ----------
    x : array, shape (..., n, d)
        Points in an order in which neighbours are alike: the tokens of an image or of a text, samples of a signal.
    rank : int
        How many segments, from 1 to n. The first n mod rank of them have one row more than the others.
    kernel : callable
        Not evaluated.
    rng : None, int or numpy.random.Generator
        Not used: there is no chance in it.

    Returns
    -------
    array, shape (..., rank, d)
        Points, of the dtype and on the device of ``x``.

    Raises
    ------
    TypeError
        If ``rank`` is not an int, or ``x`` not an array of floating dtype.
    ValueError
        If ``x`` has fewer than two axes, ``rank`` is not in 1 … n, or ``kernel`` is None, which means that ``x``
        is the matrix K itself and has no points to average.
    """
    if kernel is None:
        raise ValueError(
            f"segment_means averages points, and with kernel=None x (shape {tuple(x.shape)}) is the matrix K itself; "
            "choose landmarks='uniform' or indices, or give the points and their kernel"
        )
    xp, _ = _checked(x, rank)
    return _segments.segment_means(x, rank, xp)


def rpcholesky(
    x: Array,
    /,
    *,
    rank: int,
    kernel: Callable[..., Array] | None,
    rng: int | np.random.Generator | None = None,
    rtol: float = 0.0,
) -> Array:
    """Rows of x drawn one after another in proportion to what is left of the diagonal, tr(K − FFᵀ).

    Near the best rank-k approximation in expectation, where uniform choice may miss a small cluster (Chen, Epperly,
    Tropp & Webber, Comm. Pure Appl. Math. 78, 2025). On a flat spectrum every choice is as good as any other.

    Parameters
    ----------
    x : array, shape (n, d) or, if ``kernel`` is None, the matrix K itself, shape (n, n)
        float32 or float64.
    rank : int
        The most landmarks, from 1 to n. There are fewer where the rest of K is zero up to rounding.
    kernel : callable or None
        Positive semidefinite: ``kernel(a, b)`` is the block of shape (..., n, m); evaluated rank·n times, and in
        float64 between candidates.
    rng : None, int or numpy.random.Generator
        Where the numbers come from; they are drawn on the host, so that every library chooses the same landmarks in
        float64.
    rtol : float
        Stop when tr(K − FFᵀ) ≤ rtol·tr K; from 0 to 1, 0 by default.

    Returns
    -------
    integer array, shape (k,), k ≤ rank
        Distinct indices in the order drawn, one at least.

    Raises
    ------
    TypeError
        If ``rank`` is not an int, ``x`` not an array of float32 or float64 (it may carry derivatives, but not belong to
        a traced program), ``rng`` none of the above, or ``kernel`` neither callable nor None, or one that returns no
        array of the library and dtype of its points.
    ValueError
        If ``x`` has not two axes, or is not square where it is K, ``rank`` is not in 1 … n, ``rtol`` not in [0, 1),
        ``rng`` is negative, or the kernel returns a block of another shape, or a diagonal that is negative or not
        finite anywhere.

    Notes
    -----
    n·k² + O(n·b·k) operations in products, n·k kernel values, and the memory of F and two blocks. A block of b
    candidates is drawn from the diagonal as it is, and each of them is accepted with the probability that its pivot has
    when its turn comes, so that the accepted ones have the distribution of one-by-one pivoting.
    """
    xp, n = _checked(x, rank)
    _checked_kernel(kernel)
    if x.ndim != 2 or (kernel is None and x.shape[-1] != n):
        what = "the square matrix K, as kernel is None" if kernel is None else "one set of points, (n, d)"
        raise ValueError(f"rpcholesky takes {what}; x has shape {tuple(x.shape)}")
    if not 0 <= number(rtol) < 1:
        raise ValueError(f"rtol must be a number in [0, 1), not {shown(rtol)}")
    if is_half(x) or xp.isdtype(x.dtype, "complex floating") or is_traced(x):
        raise TypeError(f"x must be an array of float32 or float64 outside of a traced program, not {x.dtype}")
    rng = generator(rng)
    x = stop_gradient(x)
    with arithmetic(x):
        given = _checked_diagonal(_diagonal(x, kernel, xp), xp)
        negligible = _NOTHING * float(xp.finfo(x.dtype).eps) * given
        left = given
        target = float(rtol) * float(xp.sum(given))
        pivots, block = np.empty(0, dtype=np.int64), min(_FIRST_BLOCK, rank)
        factor: list[Array] = []
        while pivots.size < rank and float(xp.sum(left)) > target:
            candidates = _drawn(left, block, rng, xp)
            index = _index_array(candidates, x, xp)
            known = [xp.take(columns, index, axis=0) for columns in factor]
            among = _residual_among(xp.take(x, index, axis=0), index, kernel, known, xp)
            accepted, lower = _accept(among, rng, to_host(xp.take(negligible, index)), rank - pivots.size)
            block = _next_block(block, accepted.size, rank)
            if accepted.size == 0:
                continue
            chosen = candidates[accepted]
            columns = _new_columns(x, chosen, lower, kernel, factor, [to_host(old)[accepted] for old in known], xp)
            if target > 0:
                # The first of them that is enough is the last.
                explained = np.cumsum(to_host(_squared_norms(columns, 0, left.dtype, xp)))
                enough = min(int(np.sum(float(xp.sum(left)) - explained > target)) + 1, chosen.size)
                chosen, columns = chosen[:enough], columns[:, :enough]
            left = left - _squared_norms(columns, 1, left.dtype, xp)
            left = xp.where(left > negligible, left, xp.zeros_like(left))
            pivots = np.concatenate([pivots, chosen])
            factor.append(columns)
    # Of K = 0 any row is a factor.
    return _index_array(pivots if pivots.size else np.zeros(1, dtype=np.int64), x, xp)


def _diagonal(x: Array, kernel: Callable[..., Array] | None, xp: Namespace) -> Array:
    """The diagonal of K, in float64 where there is float64."""
    if kernel is None:
        diagonal = xp.linalg.diagonal(x)
    else:
        each = x[:, None, :]
        diagonal = _block(kernel, each, each)[:, 0, 0]
    return xp.astype(diagonal, widest_real(x, xp))


def _block(kernel: Callable[..., Array], x: Array, z: Array) -> Array:
    """k(x, z), after checking that it is a block of one number for each pair."""
    block = kernel(x, z)
    block_namespace(block, x, z)
    return block


def _checked_diagonal(diagonal: Array, xp: Namespace) -> Array:
    wrong = to_host(~(xp.isfinite(diagonal) & (diagonal >= 0)))
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(
            f"the diagonal of a positive semidefinite kernel is finite and not negative; k(x, x) of row {first} is "
            f"{float(diagonal[first])}"
        )
    return diagonal


def _drawn(left: Array, block: int, rng: np.random.Generator, xp: Namespace) -> np.ndarray:
    """Rows drawn independently, in proportion to what is left of the diagonal."""
    total = xp.cumulative_sum(left)
    points = from_host(rng.random(block), left, xp) * total[-1]
    return np.minimum(to_host(xp.searchsorted(total, points, side="right")), left.shape[0] - 1)


def _residual_among(
    points: Array, index: Array, kernel: Callable[..., Array] | None, known: list[Array], xp: Namespace
) -> np.ndarray:
    """The block of K − FFᵀ between candidates, of which ``known`` has the rows of F, in float64 on the host."""
    if kernel is None:
        among = xp.take(points, index, axis=1)
    else:
        points = xp.astype(points, widest_real(points, xp))
        among = _block(kernel, points, points)
    among = to_host(among).astype(np.float64)
    for rows in known:
        part = to_host(rows).astype(np.float64)
        among -= part @ part.T
    return among


def _accept(
    among: np.ndarray, rng: np.random.Generator, negligible: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which candidates are accepted, one after another, and the Cholesky factor of the block between them."""
    among = among.copy()
    drawn_at = rng.random(among.shape[0]) * np.diagonal(among)
    accepted: list[int] = []
    for k in range(among.shape[0]):
        if len(accepted) < most and among[k, k] > max(drawn_at[k], negligible[k]):
            column = among[k:, k] / np.sqrt(among[k, k])
            among[k + 1 :, k + 1 :] -= np.outer(column[1:], column[1:])
            among[k:, k] = column
            accepted.append(k)
    index = np.asarray(accepted, dtype=np.int64)
    return index, np.tril(among[np.ix_(index, index)])


def _next_block(block: int, accepted: int, rank: int) -> int:
    """Twice as many candidates where most were accepted, half where most were not."""
    if 4 * accepted >= 3 * block:
        return min(2 * block, _LARGEST_BLOCK, rank)
    return max(block // 2, 1) if 4 * accepted <= block else block


def _new_columns(
    x: Array,
    chosen: np.ndarray,
    lower: np.ndarray,
    kernel: Callable[..., Array] | None,
    factor: list[Array],
    known: list[np.ndarray],
    xp: Namespace,
) -> Array:
    """(k(x, z) − F F_zᵀ)L⁻ᵀ, the columns that the landmarks z add to F, whose blocks are in ``factor``."""
    index = _index_array(chosen, x, xp)
    columns = xp.take(x, index, axis=1) if kernel is None else _block(kernel, x, xp.take(x, index, axis=0))
    for i, (old, rows) in enumerate(zip(factor, known, strict=True)):
        # What the kernel returned may belong to its author; the first difference is ours.
        columns = add_product(columns, old, from_host(rows.T, x, xp), xp, alpha=-1.0, out=columns if i > 0 else None)
    solved = solve_triangular(from_host(lower, x, xp), xp.matrix_transpose(columns), xp)
    return xp.matrix_transpose(solved)


def _squared_norms(columns: Array, axis: int, dtype: Any, xp: Namespace) -> Array:
    """Σ F² along an axis, without an array of the squares."""
    norms = xp.astype(xp.linalg.vector_norm(columns, axis=axis), dtype)
    return norms * norms


def _index_array(indices: np.ndarray, like: Array, xp: Namespace) -> Array:
    """Indices from the host as an array that ``like`` can be indexed with."""
    return from_host(indices, like, xp, dtype=xp.__array_namespace_info__().default_dtypes()["indexing"])


def _checked_rank(rank: int, x: Array) -> int:
    """The rank asked of the n rows of x, if that can be had."""
    n = x.shape[-2]
    if not is_integer(rank):
        raise TypeError(f"rank must be an int, not {shown(rank)}")
    if not 1 <= rank <= n:
        raise ValueError(
            f"rank must be from 1 to the number of points, {n} (x has shape {tuple(x.shape)}), not {shown(int(rank))}"
        )
    return int(rank)


def _checked_kernel(kernel: Any) -> None:
    if kernel is not None and not callable(kernel):
        raise TypeError(f"kernel must be a function of two sets of points, or None, not {shown(kernel)}")


def _checked(x: Array, rank: int) -> tuple[Namespace, int]:
    xp = namespace(x=x)
    if x.ndim < 2:
        raise ValueError(f"x must have at least two axes, (..., points, features), not the shape {tuple(x.shape)}")
    _checked_rank(rank, x)
    return xp, x.shape[-2]
