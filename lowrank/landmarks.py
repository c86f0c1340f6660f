"""Which points stand for all the others: the landmarks of a Nyström approximation.

Every function here has one signature, ``(x, /, *, rank, kernel, rng)``, and returns either 1-D integer indices of
rows of x or an array of points, so that a function of the user's own is as good as these. ``uniform`` is the choice of
Williams & Seeger, "Using the Nyström method to speed up kernel machines", NeurIPS 2000; ``segment_means`` that of
Xiong et al., "Nyströmformer", AAAI 2021, eq. 9.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lowrank._array import Array, Namespace, from_host, generator, namespace


def uniform(
    x: Array, /, *, rank: int, kernel: Callable | None = None, rng: int | np.random.Generator | None = None
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
        If ``x`` has fewer than two axes or ``rank`` is not in 1 … n.
    """
    xp, n = _checked(x, rank)
    return _index_array(generator(rng).choice(n, size=rank, replace=False), x, xp)


def segment_means(
    x: Array, /, *, rank: int, kernel: Callable | None, rng: int | np.random.Generator | None = None
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
    xp, n = _checked(x, rank)
    short, longer = divmod(n, rank)
    cut = longer * (short + 1)
    parts = [
        _means_of_equal_segments(part, count, xp)
        for part, count in ((x[..., :cut, :], longer), (x[..., cut:, :], rank - longer))
        if count
    ]
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=-2)


def _means_of_equal_segments(x: Array, count: int, xp: Namespace) -> Array:
    *batch, n, d = x.shape
    return xp.mean(xp.reshape(x, (*batch, count, n // count, d)), axis=-2)


def _index_array(indices: np.ndarray, like: Array, xp: Namespace) -> Array:
    """Indices from the host as an array that ``like`` can be indexed with."""
    return from_host(indices, like, xp, dtype=xp.__array_namespace_info__().default_dtypes()["indexing"])


def _checked_rank(rank: int, x: Array) -> int:
    """The rank asked of the n rows of x, if that can be had."""
    n = x.shape[-2]
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)):
        raise TypeError(f"rank must be an int, not {rank!r}")
    if not 1 <= rank <= n:
        raise ValueError(f"rank must be from 1 to the number of points, {n} (x has shape {tuple(x.shape)}), not {rank}")
    return int(rank)


def _checked(x: Array, rank: int) -> tuple[Namespace, int]:
    xp = namespace(x=x)
    if x.ndim < 2:
        raise ValueError(f"x must have at least two axes, (..., points, features), not the shape {tuple(x.shape)}")
    _checked_rank(rank, x)
    return xp, x.shape[-2]
