"""Landmarks: the right rows, drawn alike on every library."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from lowrank._array import to_host
from lowrank.kernels import gaussian_kernel
from lowrank.landmarks import rpcholesky, segment_means, uniform


def points(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def is_indexable(indices, x):
    """That x can be indexed with them in its own library."""
    import array_api_compat

    library = array_api_compat.array_namespace(x)
    assert array_api_compat.array_namespace(indices) is library
    assert array_api_compat.device(indices) == array_api_compat.device(x)
    return library.take(x, indices, axis=-2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_uniform_is_distinct_rows(xp, dtype):
    x = xp.asarray(points(2, 50, 3, dtype=dtype))
    indices = uniform(x, rank=20, kernel=gaussian_kernel, rng=3)
    assert indices.ndim == 1
    host = to_host(indices)
    assert host.dtype.kind == "i"
    assert len(set(host.tolist())) == 20
    assert host.min() >= 0
    assert host.max() < 50
    np.testing.assert_array_equal(to_host(is_indexable(indices, x)), to_host(x)[:, host])


def test_every_library_and_precision_draws_the_same(xp):
    drawn = [
        to_host(uniform(xp.asarray(points(*shape, dtype=dtype)), rank=7, kernel=None, rng=11))
        for shape in ((40, 2), (3, 40, 40))
        for dtype in (np.float32, np.float64)
    ]
    for other in drawn:
        np.testing.assert_array_equal(other, np.random.default_rng(11).choice(40, size=7, replace=False))


def test_uniform_follows_its_generator():
    x = points(1000, 2)
    assert not np.array_equal(uniform(x, rank=30, rng=0), uniform(x, rank=30, rng=1))
    rng = np.random.default_rng(0)
    first, second = uniform(x, rank=30, rng=rng), uniform(x, rank=30, rng=rng)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, uniform(x, rank=30, rng=0))


def test_uniform_is_uniform():
    x, rng = points(10, 1), np.random.default_rng(0)
    counts = sum(np.bincount(uniform(x, rank=4, rng=rng), minlength=10) for _ in range(2000))
    # Drawn without replacement counts vary less than independent ones do, so the test is on the safe side.
    assert counts.sum() == 8000
    assert chisquare(counts).pvalue > 1e-3


def test_uniform_of_all_rows_is_a_permutation(xp):
    indices = uniform(xp.asarray(points(9, 2)), rank=9, rng=5)
    np.testing.assert_array_equal(np.sort(to_host(indices)), np.arange(9))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "rank"), [(12, 4), (13, 4), (15, 4), (7, 7), (7, 1), (8, 5)])
def test_segment_means(xp, n, rank, dtype):
    x = points(2, 3, n, 5, dtype=dtype)
    x_ = xp.asarray(x)
    means = xp.check(segment_means(x_, rank=rank, kernel=gaussian_kernel), like=x_, shape=(2, 3, rank, 5))
    expected = np.stack([part.mean(axis=-2) for part in np.array_split(x.astype(np.float64), rank, axis=-2)], axis=-2)
    # A mean of up to 7 terms of size 3.
    np.testing.assert_allclose(means, expected, rtol=0, atol=7 * 3 * np.finfo(dtype).eps)


@given(n=st.integers(1, 40), data=st.data())
def test_segment_means_keep_the_weighted_mean_and_the_order(n, data):
    rank = data.draw(st.integers(1, n))
    x = np.arange(n, dtype=np.float64)[:, None]
    means = segment_means(x, rank=rank, kernel=gaussian_kernel)[:, 0]
    lengths = np.asarray([len(part) for part in np.array_split(x, rank)])
    assert np.all(np.diff(means) > 0)
    np.testing.assert_allclose(lengths @ means, x.sum(), rtol=1e-14)


@pytest.mark.parametrize("function", [uniform, segment_means])
def test_refused_ranks(xp, function):
    x = xp.asarray(points(6, 2))
    for bad in (0, -1, 7):
        with pytest.raises(
            ValueError, match=rf"rank must be from 1 to the number of points, 6 .*\(6, 2\)\), not {bad}"
        ):
            function(x, rank=bad, kernel=gaussian_kernel, rng=0)
    for bad in (2.0, "3", None, True):
        with pytest.raises(TypeError, match=f"rank must be an int, not {bad!r}"):
            function(x, rank=bad, kernel=gaussian_kernel, rng=0)
    with pytest.raises(ValueError, match=r"at least two axes.*\(6,\)"):
        function(xp.asarray(points(6)), rank=2, kernel=gaussian_kernel, rng=0)
    with pytest.raises(TypeError, match="x must be an array, not list"):
        function([[1.0, 2.0]], rank=1, kernel=gaussian_kernel, rng=0)


def test_refused_generator():
    with pytest.raises(TypeError, match="rng must be None, an int or a numpy"):
        uniform(points(6, 2), rank=2, rng="seed")


def test_a_matrix_has_no_points_to_average(xp):
    with pytest.raises(ValueError, match=r"segment_means averages points.*\(6, 6\).*choose landmarks='uniform'"):
        segment_means(xp.asarray(points(6, 6)), rank=2, kernel=None)


def trace_left(k: np.ndarray, pivots: np.ndarray) -> float:
    """tr(K − K_z W⁺ K_zᵀ) in float64."""
    c, w = k[:, pivots], k[np.ix_(pivots, pivots)]
    return float(np.trace(k) - np.sum(c * (np.linalg.pinv(w, rcond=1e-13, hermitian=True) @ c.T).T))


def one_by_one(k: np.ndarray, rank: int, rng: np.random.Generator) -> list[int]:
    """Randomly pivoted Cholesky as it is defined."""
    left, pivots = k.copy(), []
    for _ in range(rank):
        d = np.clip(np.diagonal(left), 0, None)
        pivots.append(int(rng.choice(len(k), p=d / d.sum())))
        column = left[:, pivots[-1]]
        left = left - np.outer(column, column) / column[pivots[-1]]
    return pivots


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("precomputed", [False, True])
def test_rpcholesky_is_distinct_rows_of_the_library(xp, dtype, precomputed):
    x = points(300, 2, dtype=dtype)
    kernel = None if precomputed else gaussian_kernel
    given_ = xp.asarray(gaussian_kernel(x, x) if precomputed else x)
    indices = rpcholesky(given_, rank=40, kernel=kernel, rng=1)
    is_indexable(indices, given_)
    host = to_host(indices)
    assert host.dtype.kind == "i"
    assert len(set(host.tolist())) == 40
    if dtype == np.float64 and to_host(given_).dtype == np.float64:
        np.testing.assert_array_equal(host, rpcholesky(x, rank=40, kernel=gaussian_kernel, rng=1))


def test_rpcholesky_has_the_distribution_of_one_by_one_pivoting():
    x = np.asarray([0.0, 0.3, 0.5, 1.5, 4.0])[:, None]
    k = gaussian_kernel(x, x) * np.outer([1, 2, 1, 1, 0.5], [1, 2, 1, 1, 0.5])
    rng = np.random.default_rng(0)
    counts = np.zeros((5, 5))
    for _ in range(6000):
        i, j = rpcholesky(k, rank=2, kernel=None, rng=rng)
        counts[i, j] += 1
    first = np.diagonal(k) / np.trace(k)
    left = np.diagonal(k) - k**2 / np.diagonal(k)[:, None]
    expected = 6000 * first[:, None] * left / left.sum(axis=1, keepdims=True)
    off = ~np.eye(5, dtype=bool)
    assert counts.sum() == 6000 == counts[off].sum()
    assert chisquare(counts[off], expected[off] * 6000 / expected[off].sum()).pvalue > 1e-3


def test_rpcholesky_in_blocks_is_as_good_as_one_by_one():
    x = points(500, 3, seed=2)
    k = gaussian_kernel(x, x)
    rng = np.random.default_rng(0)
    blocks = [trace_left(k, rpcholesky(x, rank=60, kernel=gaussian_kernel, rng=rng)) for _ in range(25)]
    single = [trace_left(k, np.asarray(one_by_one(k, 60, rng))) for _ in range(25)]
    # Four standard errors of the difference of the means.
    assert abs(np.mean(blocks) - np.mean(single)) <= 4 * np.sqrt((np.var(blocks) + np.var(single)) / 25)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rtol", [0.3, 0.03, 0.003])
def test_rpcholesky_stops_at_the_first_pivot_that_is_enough(xp, rtol, dtype):
    x = points(400, 2, dtype=dtype)
    k = gaussian_kernel(x.astype(np.float64), x.astype(np.float64))
    pivots = to_host(rpcholesky(xp.asarray(x), rank=400, kernel=gaussian_kernel, rng=0, rtol=rtol))
    # A factor of relative error eps leaves the trace right to some eps of itself.
    slack = 100 * np.finfo(dtype).eps * np.trace(k)
    assert trace_left(k, pivots) <= rtol * np.trace(k) + slack
    assert trace_left(k, pivots[:-1]) > rtol * np.trace(k) - slack


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rpcholesky_ends_where_nothing_is_left(xp, dtype):
    factor = points(120, 7, dtype=dtype)
    k = xp.asarray(factor @ factor.T)
    assert rpcholesky(k, rank=50, kernel=None, rng=0).shape == (7,)
    repeated = xp.asarray(np.ones((60, 3), dtype=dtype))
    assert rpcholesky(repeated, rank=60, kernel=gaussian_kernel, rng=0).shape == (1,)
    assert rpcholesky(xp.asarray(np.zeros((9, 9), dtype=dtype)), rank=4, kernel=None, rng=0).shape == (1,)


def test_seventy_pivots_do_what_three_hundred_uniform_landmarks_do_not():
    rng = np.random.default_rng(0)
    # Nine tenths of the points in one place, the rest spread widely.
    x = np.concatenate([0.3 * rng.standard_normal((1800, 2)), 3 * rng.standard_normal((200, 2))])
    kernel = partial(gaussian_kernel, lengthscale=1.5)
    k = kernel(x, x)
    chosen = trace_left(k, rpcholesky(x, rank=70, kernel=kernel, rng=0))
    assert chosen < trace_left(k, uniform(x, rank=300, kernel=kernel, rng=0))


def test_what_rpcholesky_refuses(xp):
    x = xp.asarray(points(6, 2))
    choose = partial(rpcholesky, kernel=gaussian_kernel, rng=0)
    with pytest.raises(ValueError, match=r"one set of points, \(n, d\); x has shape \(2, 6, 2\)"):
        choose(xp.asarray(points(2, 6, 2)), rank=2)
    with pytest.raises(ValueError, match=r"the square matrix K, as kernel is None; x has shape \(6, 2\)"):
        rpcholesky(x, rank=2, kernel=None)
    for bad in (1.0, -0.1, float("nan"), "0.1", None):
        with pytest.raises(ValueError, match="rtol must be a number in"):
            choose(x, rank=2, rtol=bad)
    with pytest.raises(ValueError, match=r"is finite and not negative; k\(x, x\) of row 0 is -1"):
        rpcholesky(x, rank=2, kernel=lambda a, b: -gaussian_kernel(a, b))
    with pytest.raises(ValueError, match=r"k\(x, x\) of row 1 is nan"):
        rpcholesky(xp.asarray(np.diag([1.0, np.nan, 1.0])), rank=2, kernel=None)
    with pytest.raises(ValueError, match="rank must be from 1 to the number of points"):
        choose(x, rank=7)
