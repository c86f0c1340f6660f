"""Landmarks: the right rows, drawn alike on every library."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from lowrank._array import to_host
from lowrank.kernels import gaussian_kernel
from lowrank.landmarks import segment_means, uniform


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
