"""``nystrom`` on NumPy alone: the factor by its formula, what is promised of it, and every refusal."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from lowrank import gaussian_kernel, laplacian_kernel, nystrom

X = np.random.default_rng(0).standard_normal((60, 2))
K = gaussian_kernel(X, X)


def errors(k, matrix=K):
    rest = matrix - k.factor @ k.factor.mT
    np.testing.assert_allclose(k.trace_error, np.trace(rest, axis1=-2, axis2=-1), rtol=1e-8, atol=1e-11)
    return np.linalg.eigvalsh(rest)


@pytest.mark.parametrize("landmarks", ["uniform", "segment_means", "rpcholesky"])
def test_named_landmarks(landmarks):
    k = nystrom(X, landmarks=landmarks, rank=20, rng=0)
    assert k.factor.shape == (60, 20)
    assert k.landmarks.shape == (20, 2)
    assert k.rank == 20
    assert k.kernel is gaussian_kernel
    values = errors(k)
    assert values.min() > -1e-13
    assert (k.pivots is None) == (landmarks == "segment_means")
    if k.pivots is not None:
        np.testing.assert_array_equal(k.landmarks, X[k.pivots])
        # Rows of K that were chosen are there, but for the shift.
        np.testing.assert_allclose((k.factor @ k.factor.T)[k.pivots], K[k.pivots], rtol=0, atol=1e-11)


def test_formula():
    index = [3, 14, 15, 9, 2]
    c, w = K[:, index], K[np.ix_(index, index)]
    expected = c @ np.linalg.inv(w) @ c.T
    given = [index, tuple(index), np.array(index), np.array(index, dtype=np.uint8), X[index]]
    for landmarks in given:
        k = nystrom(X, landmarks=landmarks)
        np.testing.assert_allclose(k.factor @ k.factor.T, expected, rtol=0, atol=1e-10)
        assert errors(k).min() > -1e-13
    assert nystrom(X, landmarks=X[index], rank=5).pivots is None
    assert nystrom(X, landmarks=index).pivots.tolist() == index


def test_given_matrix_and_other_kernels():
    k = nystrom(K, kernel=None, landmarks=[1, 2, 3])
    assert k.landmarks is None
    np.testing.assert_allclose(k.factor, nystrom(X, landmarks=[1, 2, 3]).factor, rtol=0, atol=1e-12)
    both = nystrom(np.stack([K, K @ K]), kernel=None, landmarks=[1, 2, 3]).factor
    np.testing.assert_allclose(both[0], k.factor, rtol=0, atol=1e-12)
    np.testing.assert_allclose(both[1], nystrom(K @ K, kernel=None, landmarks=[1, 2, 3]).factor, rtol=0, atol=1e-12)
    kernel = partial(laplacian_kernel, lengthscale=0.5)
    assert errors(nystrom(X, kernel=kernel, rank=30, rng=1), kernel(X, X)).min() > -1e-13


def test_rank_that_an_error_asks_for():
    k = nystrom(X, landmarks="rpcholesky", rtol=1e-2, rng=0)
    assert k.trace_error <= 1e-2 * 60
    fewer = nystrom(X, landmarks="rpcholesky", rtol=1e-2, rank=k.rank - 1, rng=0)
    assert fewer.rank == k.rank - 1
    assert fewer.trace_error > 1e-2 * 60
    assert nystrom(X, landmarks="rpcholesky", rtol=0, rank=7, rng=0).rank == 7


def test_landmarks_of_ones_own():
    def first(x, /, *, rank, kernel, rng):
        assert kernel is gaussian_kernel
        assert rng == 5
        return np.arange(rank)

    def stopped(x, /, *, rank, kernel, rng, **options):
        assert rank == 60
        assert options == {"rtol": 0.5}
        return np.arange(4)

    assert nystrom(X, landmarks=first, rank=6, rng=5).pivots.tolist() == list(range(6))
    assert nystrom(X, landmarks=stopped, rtol=0.5).rank == 4
    assert nystrom(X, landmarks=lambda x, **_: x[:3], rank=4).rank == 3
    with pytest.raises(ValueError, match="rank is 2 and there are 3 landmarks"):
        nystrom(X, landmarks=lambda x, **_: x[:3], rank=2)


def test_batches_and_single_precision():
    batch = np.stack([X, 2 * X]).astype(np.float32)
    k = nystrom(batch, landmarks=[1, 5, 7])
    assert k.factor.shape == (2, 60, 3)
    assert k.factor.dtype == np.float32
    for one, factor in zip(batch, k.factor, strict=True):
        np.testing.assert_allclose(factor, nystrom(one, landmarks=[1, 5, 7]).factor, rtol=0, atol=1e-5)
    np.testing.assert_allclose(nystrom(batch, landmarks=batch[:, [1, 5, 7]]).factor, k.factor, rtol=0, atol=1e-5)
    repeated = np.repeat(X[:5], 12, axis=0).astype(np.float32) + 100
    k = nystrom(repeated, landmarks=list(range(60)))
    rest = gaussian_kernel(repeated, repeated).astype(float) - k.factor.astype(float) @ k.factor.T.astype(float)
    # 0 ≼ K − FFᵀ to a few eps‖K‖, and all points as landmarks leave 60 eps‖K‖ a point.
    assert np.linalg.eigvalsh(rest).min() > -100 * 1.2e-7
    assert k.trace_error < 60 * 60 * 1.2e-7 * 12


def test_what_the_factor_is_for():
    k = nystrom(X, rank=60, rng=0)
    y = np.sin(X[:, 0])
    exact = np.linalg.solve(K + 0.1 * np.eye(60), y)
    np.testing.assert_allclose(k.solve(y, ridge=0.1), exact, rtol=0, atol=1e-9)
    np.testing.assert_allclose(k @ y, K @ y, rtol=0, atol=1e-10)
    np.testing.assert_allclose(k.logdet(ridge=0.1), np.linalg.slogdet(K + 0.1 * np.eye(60))[1], rtol=1e-9)
    np.testing.assert_allclose(k.features(X), k.factor, rtol=0, atol=1e-8)
    np.testing.assert_allclose(k.diagonal(), np.ones(60), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (X, {}, ValueError, "rank, the number of landmarks, is needed"),
        (X.astype(np.float16), {"rank": 2}, TypeError, "convert it to float32 or float64"),
        (X + 0j, {"rank": 2}, TypeError, "convert it to float32 or float64"),
        (X[:, 0], {"rank": 2}, ValueError, "x must have at least two axes"),
        (X, {"kernel": None, "rank": 2}, ValueError, "must be square, not of shape"),
        (np.ones((2, 3, 4)), {"kernel": None, "rank": 2}, ValueError, "must be square, not of shape"),
        (np.where(np.arange(60)[:, None] == 7, np.nan, X), {"rank": 2}, ValueError, "7"),
        (X, {"landmarks": "kmeans", "rank": 2}, ValueError, "landmarks must be one of"),
        (X, {"landmarks": 3}, TypeError, "landmarks must be a name, a callable, indices or points, not int"),
        (X, {"rank": 0}, ValueError, "rank"),
        (X, {"rank": 61}, ValueError, "rank"),
        (X, {"rank": 2.0}, TypeError, "rank"),
        (X, {"rank": 3, "landmarks": [1, 2]}, ValueError, "rank is 3 and there are 2 landmarks"),
        (X, {"landmarks": []}, ValueError, "landmarks is empty"),
        (X, {"landmarks": [0.5]}, TypeError, "are indices and must be integers"),
        (X, {"landmarks": [60]}, ValueError, "indices from 60 to 60"),
        (X, {"landmarks": [-1]}, ValueError, "indices from -1 to -1"),
        (X, {"landmarks": list(range(60)) * 2}, ValueError, "there are 120 landmarks for 60 points"),
        (X, {"landmarks": np.zeros((2, 3))}, ValueError, r"landmarks have shape \(2, 3\)"),
        (X, {"landmarks": np.zeros((0, 2))}, ValueError, r"landmarks have shape \(0, 2\)"),
        (X, {"landmarks": np.full((1, 2), np.inf)}, ValueError, "landmarks"),
        (K, {"landmarks": np.zeros((2, 60)), "kernel": None}, ValueError, "landmarks are points"),
        (X, {"landmarks": "rpcholesky", "rtol": 1.0}, ValueError, r"rtol must be a number in \[0, 1\), not 1.0"),
        (X, {"landmarks": lambda x, **_: [0], "rtol": 1.0}, ValueError, r"rtol must be a number in \[0, 1\), not 1.0"),
        (X, {"landmarks": "rpcholesky", "rtol": -0.1}, ValueError, r"rtol must be a number in \[0, 1\), not -0.1"),
        (X, {"landmarks": "rpcholesky", "rtol": "x"}, ValueError, r"rtol must be a number in \[0, 1\), not 'x'"),
        (X, {"landmarks": [1], "rtol": 0.1}, ValueError, "and these are given; leave it out"),
        (X, {"landmarks": "uniform", "rtol": 0.1}, TypeError, "uniform has no keyword rtol"),
        (X, {"rank": 3, "kernel": lambda a, b: -gaussian_kernel(a, b)}, ValueError, "diagonal|semidefinite"),
        (X, {"rank": 3, "kernel": lambda a, b: gaussian_kernel(a, b)[..., :1]}, ValueError, "shape"),
    ],
)
def test_refusals(x, options, error, message):
    with pytest.raises(error, match=message):
        nystrom(x, **options)
