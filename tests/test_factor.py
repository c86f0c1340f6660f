"""The Nyström factor: exact where it should be, below K on any points, the same on every library."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from conftest import from_spectrum, gaussian_gram
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from lowrank._array import to_host
from lowrank.factor import LowRank, nystrom
from lowrank.kernels import gaussian_kernel, laplacian_kernel, matern32_kernel, squared_distances
from lowrank.landmarks import segment_means

# Most tests have 20 points and 5 landmarks, for JAX compiles every operation anew for every shape.
DTYPES = [np.float32, np.float64]
PIVOTS = [3, 17, 8, 0, 12]
seeds = st.integers(0, 2**32 - 1)


def points(*shape, seed=0, scale=1.0, dtype=np.float64):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def gaussian(lengthscale):
    return functools.partial(gaussian_kernel, lengthscale=lengthscale)


def dense(result):
    factor = to_host(result.factor).astype(np.float64)
    return factor @ np.swapaxes(factor, -1, -2)


def exact_nystrom(k, pivots):
    """C W⁺ Cᵀ in float64."""
    c = k[:, pivots]
    return c @ np.linalg.pinv(k[np.ix_(pivots, pivots)], rcond=1e-13, hermitian=True) @ c.T


# Exactness


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("landmarks", ["indices", "points"])
def test_exact_when_all_points_are_landmarks(xp, landmarks, dtype):
    x = points(2, 20, 2, dtype=dtype)
    x_ = xp.asarray(x)
    result = nystrom(x_, kernel=gaussian(1.5), landmarks=x_ if landmarks == "points" else np.arange(20))
    xp.check(result.factor, like=x_, shape=(2, 20, 20))
    eps = np.finfo(dtype).eps
    for approximation, k in zip(dense(result), gaussian_gram(x, 1.5), strict=True):
        # The shift is 30 eps·‖W‖ in the row-sum norm, and the triangular solve adds some 20 eps.
        assert np.linalg.norm(approximation - k, 2) <= 60 * eps * np.linalg.norm(k, np.inf)
    # The trace counts the shift once for each of the 20 dimensions.
    error = xp.check(result.trace_error, like=x_, shape=(2,))
    assert np.all(error <= 20 * 60 * eps * 20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_nystrom_approximation(xp, dtype):
    x, pivots = points(20, 2, dtype=dtype), PIVOTS
    k = gaussian_gram(x, 0.8)
    x_ = xp.asarray(x)
    result = nystrom(x_, kernel=gaussian(0.8), landmarks=pivots)
    expected, eps = exact_nystrom(k, pivots), float(np.finfo(dtype).eps)
    # The landmarks are well apart: W has a condition number below 100, which the error is proportional to.
    assert np.linalg.cond(k[np.ix_(pivots, pivots)]) < 100
    np.testing.assert_allclose(dense(result), expected, rtol=0, atol=100 * 30 * eps)
    error = float(xp.check(result.trace_error, like=x_, shape=()))
    assert error == pytest.approx(np.trace(k - expected), rel=100 * 30 * eps)
    np.testing.assert_array_equal(to_host(result.pivots), pivots)
    np.testing.assert_array_equal(xp.check(result.landmarks, like=x_, shape=(5, 2)), x[pivots])


def test_a_matrix_of_that_rank_is_reproduced(xp):
    basis, _ = from_spectrum(np.asarray([3.0, 2.0, 1.0, 0.5]), 20, 20)
    k = basis @ basis.T  # rank 4, any 4 independent columns determine it
    k_ = xp.asarray(k)
    result = nystrom(k_, kernel=None, rank=5, rng=0)
    assert result.landmarks is None
    assert result.kernel is None
    # W is singular: the pseudoinverse's gain ‖C W⁺‖ of about 10 meets the shift of 30 eps·‖W‖.
    np.testing.assert_allclose(dense(result), k, rtol=0, atol=10**2 * 30 * np.finfo(np.float64).eps * 9)
    by_points = nystrom(xp.asarray(points(20, 2)), rank=5, rng=0)
    np.testing.assert_array_equal(to_host(result.pivots), to_host(by_points.pivots))


def test_a_zero_matrix_has_a_zero_factor(xp):
    for dtype in DTYPES:
        k = xp.asarray(np.zeros((20, 20), dtype=dtype))
        result = nystrom(k, kernel=None, rank=5, rng=0)
        np.testing.assert_array_equal(xp.check(result.factor, like=k, shape=(20, 5)), 0)
        assert float(result.trace_error) == 0


def test_repeated_landmarks_do_no_harm(xp):
    x = points(20, 2)
    result = nystrom(xp.asarray(x), landmarks=[4, 4, 9, 13, 9])
    assert result.rank == 5
    once = exact_nystrom(gaussian_gram(x), [4, 9, 13])
    np.testing.assert_allclose(dense(result), once, rtol=0, atol=100 * 30 * np.finfo(np.float64).eps)


def test_the_trace_counts_no_gains():
    # Not positive semidefinite: the second diagonal entry is overshot by a half, which must not hide the third.
    k = np.asarray([[1.0, 1.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert float(nystrom(k, kernel=None, landmarks=[0]).trace_error) == pytest.approx(1.0, abs=1e-13)


def test_the_core_is_evaluated_in_double_precision(xp):
    seen = []

    def kernel(a, b):
        seen.append((a.dtype, tuple(a.shape[-2:]), tuple(b.shape[-2:])))
        return gaussian_kernel(a, b)

    x = xp.asarray(points(20, 2, dtype=np.float32))
    nystrom(x, kernel=kernel, landmarks=PIVOTS)
    double = xp.asarray(np.zeros(1)).dtype
    assert seen == [(x.dtype, (20, 2), (5, 2)), (double, (5, 2), (5, 2)), (x.dtype, (1, 2), (1, 2))]


def test_more_landmarks_never_worsen_the_error():
    x = points(60, 2)
    errors = [float(nystrom(x, landmarks=list(range(k))).trace_error) for k in (1, 5, 20, 40, 60)]
    assert np.all(np.diff(errors) < 0)


# The promise: 0 ≼ K − F Fᵀ up to roundoff

HOSTILE = {
    "plain": lambda r: r.standard_normal((80, 3)),
    "duplicates": lambda r: np.repeat(r.standard_normal((8, 3)), 10, axis=0),
    "constant columns": lambda r: np.concatenate([r.standard_normal((80, 1)), np.full((80, 2), 3.7)], axis=1),
    "offset 50": lambda r: 50 + r.standard_normal((80, 3)),
    "offset 1e4": lambda r: 1e4 + r.standard_normal((80, 3)),
    "clusters": lambda r: (100 * r.standard_normal((5, 3)))[np.arange(80) % 5] + 0.01 * r.standard_normal((80, 3)),
    "far clusters": lambda r: (1e4 * r.standard_normal((5, 3)))[np.arange(80) % 5] + 1e-3 * r.standard_normal((80, 3)),
    "clusters of 30 features": lambda r: (
        (3 * r.standard_normal((5, 30)))[np.arange(80) % 5] + 1e-3 * r.standard_normal((80, 30))
    ),
    "one point": lambda r: np.full((80, 3), 7.3),
    "line": lambda r: np.linspace(0, 1, 80)[:, None],
    "random line": lambda r: 1e4 + 30 * r.standard_normal((80, 1)),
}
PROFILES = {
    gaussian_kernel: lambda r: np.exp(-(r**2) / 2),
    matern32_kernel: lambda r: (1 + np.sqrt(3) * r) * np.exp(-np.sqrt(3) * r),
    laplacian_kernel: lambda r: np.exp(-r),
}


def kernel_matrix(x, kernel, lengthscale):
    x = x.astype(np.float64)
    return PROFILES[kernel](np.sqrt(np.sum(((x[:, None] - x[None]) / lengthscale) ** 2, axis=-1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", list(PROFILES))
@pytest.mark.parametrize("data", list(HOSTILE))
def test_the_residual_is_positive_semidefinite_on_hostile_data(data, kernel, dtype):
    x = HOSTILE[data](np.random.default_rng(0)).astype(dtype)
    eps, random = float(np.finfo(dtype).eps), np.random.default_rng(1).choice(80, size=30, replace=False)
    for lengthscale in (1e-3, 0.1, 1.0, 3.0, 30.0, 1e3):
        k = kernel_matrix(x, kernel, lengthscale)
        norm = np.linalg.norm(k, 2)
        for landmarks in (np.arange(80), random, np.repeat(random[:10], 3), segment_means(x, rank=20, kernel=kernel)):
            result = nystrom(x, kernel=functools.partial(kernel, lengthscale=lengthscale), landmarks=landmarks)
            residual = k - dense(result)
            # Measured: −2 in float64, where eigvalsh itself is no better, and −0.01 in float32. The promise is −1e-12
            # and −1e-6.
            assert np.linalg.eigvalsh(residual)[0] >= -5 * eps * norm
            assert float(result.trace_error) == pytest.approx(np.trace(residual), rel=1e-6, abs=10 * eps * 80)
            if len(landmarks) == 80:
                assert np.linalg.norm(residual, 2) <= 80 * eps * norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("data", ["duplicates", "offset 1e4", "far clusters", "one point", "line"])
def test_the_promise_on_every_library(xp, data, dtype):
    x = HOSTILE[data](np.random.default_rng(0))[::4].astype(dtype)
    eps = float(np.finfo(dtype).eps)
    for lengthscale in (1e-3, 1.0, 1e3):
        k = kernel_matrix(x, gaussian_kernel, lengthscale)
        for landmarks in (np.arange(20), PIVOTS):
            result = nystrom(xp.asarray(x), kernel=gaussian(lengthscale), landmarks=landmarks)
            assert np.linalg.eigvalsh(k - dense(result))[0] >= -5 * eps * np.linalg.norm(k, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [200, 600, 2000])
def test_the_shift_outweighs_the_triangular_solve(n, dtype):
    # One point repeated is where the errors of the solve add up most. All rows f of F are alike, and so
    # λ_min(K − F Fᵀ) = (1 − ‖f‖²) n for K = 11ᵀ. With a shift a third as large it was −45 eps·‖K‖ at n = 600.
    x = np.full((n, 2), 7.3, dtype=dtype)
    result = nystrom(x, landmarks=x)
    f = result.factor[0].astype(np.float64)
    assert 1 - f @ f >= -5 * np.finfo(dtype).eps
    assert 1 - f @ f <= 80 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_of_many_magnitudes(dtype):
    rng = np.random.default_rng(0)
    scale = 10.0 ** rng.uniform(-3, 3, size=60)
    k = (scale[:, None] * gaussian_gram(rng.standard_normal((60, 2))) * scale).astype(dtype)
    result = nystrom(k, kernel=None, rank=30, rng=0)
    residual = k.astype(np.float64) - dense(result)
    # K itself was rounded: half an eps of each entry is up to half an eps of the norm of |K|.
    assert np.linalg.eigvalsh((residual + residual.T) / 2)[0] >= -5 * np.finfo(dtype).eps * np.linalg.norm(np.abs(k), 2)


# Symmetries


@given(seed=seeds)
def test_permutation_equivariance(seed):
    x, z = points(30, 2, seed=seed, scale=30.0), points(6, 2, seed=seed + 1, scale=30.0)
    p = np.random.default_rng(seed).permutation(30)
    kernel = gaussian(20.0)
    permuted, result = nystrom(x[p], kernel=kernel, landmarks=z), nystrom(x, kernel=kernel, landmarks=z)
    np.testing.assert_allclose(permuted.factor, result.factor[p], rtol=0, atol=1e-12)
    assert float(permuted.trace_error) == pytest.approx(float(result.trace_error), rel=1e-12)


@pytest.mark.parametrize("landmarks", ["uniform", "segment_means"])
def test_batch_is_loop(xp, landmarks):
    x = points(2, 20, 2)
    x[1] *= 30
    x_ = xp.asarray(x)
    batch = nystrom(x_, landmarks=landmarks, rank=5, rng=4)
    assert batch.shape == (2, 20, 20)
    factor = xp.check(batch.factor, like=x_, shape=(2, 20, 5))
    error = xp.check(batch.trace_error, like=x_, shape=(2,))
    for i in range(2):
        one = nystrom(xp.asarray(x[i]), landmarks=landmarks, rank=5, rng=4)
        # Columns late in F are differences divided by the square root of a small pivot: compare F Fᵀ.
        np.testing.assert_allclose(factor[i] @ factor[i].T, dense(one), rtol=0, atol=1e-11)
        assert error[i] == pytest.approx(float(one.trace_error), rel=1e-10)


def test_two_leading_axes():
    x = points(2, 3, 20, 2)
    batch = nystrom(x, rank=5, rng=4)
    assert batch.shape == (2, 3, 20, 20)
    assert batch.trace_error.shape == (2, 3)
    np.testing.assert_allclose(dense(batch)[1, 2], dense(nystrom(x[1, 2], rank=5, rng=4)), rtol=0, atol=1e-11)


def test_batch_elements_are_independent_bit_for_bit(xp):
    x = points(2, 20, 2, dtype=np.float32)
    before = nystrom(xp.asarray(x), rank=5, rng=0)
    x[1] *= 1e3
    x_ = xp.asarray(x)
    after = nystrom(x_, rank=5, rng=0)
    got, expected = xp.check(after.factor, like=x_, shape=(2, 20, 5)), to_host(before.factor)
    np.testing.assert_array_equal(got[0], expected[0])
    assert not np.array_equal(got[1], expected[1])


def test_shared_points_serve_a_batch_and_batched_points_one_set(xp):
    x, z = points(2, 20, 2), points(5, 2, seed=1)
    shared = nystrom(xp.asarray(x), landmarks=xp.asarray(z))
    batched = nystrom(xp.asarray(x[0]), landmarks=xp.asarray(np.stack([z, 2 * z])))
    assert shared.shape == (2, 20, 20)
    assert batched.shape == (2, 20, 20)
    assert shared.pivots is None
    for i in range(2):
        one = nystrom(xp.asarray(x[i]), landmarks=xp.asarray(z))
        np.testing.assert_allclose(dense(shared)[i], dense(one), rtol=0, atol=1e-12)
    for i in range(2):
        one = nystrom(xp.asarray(x[0]), landmarks=xp.asarray((i + 1) * z))
        np.testing.assert_allclose(dense(batched)[i], dense(one), rtol=0, atol=1e-12)


def test_inputs_are_not_written(xp):
    x, z = xp.asarray(points(20, 2)), xp.asarray(points(5, 2, seed=1))
    copies = to_host(x).copy(), to_host(z).copy()
    result = nystrom(x, landmarks=z)
    factor = to_host(result.factor).copy()
    b = xp.asarray(points(20))
    result.solve(b, ridge=0.1)
    result.eigh()
    result @ b
    np.testing.assert_array_equal(to_host(x), copies[0])
    np.testing.assert_array_equal(to_host(z), copies[1])
    np.testing.assert_array_equal(to_host(result.factor), factor)
    np.testing.assert_array_equal(to_host(b), points(20))


# Landmarks


def test_landmarks_of_every_kind(xp):
    x = xp.asarray(points(20, 2))
    reference = nystrom(x, landmarks=PIVOTS)
    same = [
        nystrom(x, landmarks=tuple(PIVOTS), rank=5),
        nystrom(x, landmarks=np.asarray(PIVOTS)),
        nystrom(x, landmarks=np.asarray(PIVOTS, dtype=np.uint8)),
        nystrom(x, landmarks=xp.asarray(np.asarray(PIVOTS))),
        nystrom(x, landmarks=lambda x, /, *, rank, kernel, rng: PIVOTS, rank=5),
        nystrom(x, landmarks=lambda x, /, *, rank, kernel, rng: PIVOTS, rank=9),
        nystrom(x, landmarks=xp.asarray(points(20, 2)[PIVOTS])),
    ]
    for other in same:
        np.testing.assert_array_equal(to_host(other.factor), to_host(reference.factor))
    by_name, by_function = (nystrom(x, landmarks=which, rank=5) for which in ("segment_means", segment_means))
    np.testing.assert_array_equal(to_host(by_name.factor), to_host(by_function.factor))


def test_a_function_of_ones_own_is_told_what_it_needs(xp):
    told = {}

    def first(x, /, *, rank, kernel, rng):
        told.update(x=x, rank=rank, kernel=kernel, rng=rng)
        return x[..., :rank, :]

    x, kernel = xp.asarray(points(2, 20, 2)), gaussian(2.0)
    result = nystrom(x, kernel=kernel, landmarks=first, rank=5, rng=17)
    assert told["x"] is x
    assert (told["rank"], told["rng"]) == (5, 17)
    np.testing.assert_array_equal(to_host(told["kernel"](x, x)), to_host(kernel(x, x)))
    xp.check(result.landmarks, like=x, shape=(2, 5, 2))


def test_what_the_features_of_new_points_need_is_kept(xp):
    x = points(20, 2)
    result = nystrom(xp.asarray(x), kernel=gaussian(0.7), landmarks=PIVOTS)
    cross = to_host(result.kernel(xp.asarray(x), result.landmarks))
    lower = to_host(result.cholesky)
    np.testing.assert_array_equal(lower, np.tril(lower))
    np.testing.assert_allclose(np.linalg.solve(lower, cross.T).T, to_host(result.factor), rtol=0, atol=1e-10)


# LowRank


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def low_rank(request, xp):
    x = xp.asarray(points(2, 20, 2, dtype=request.param))
    return xp, nystrom(x, rank=5, rng=0)


def test_attributes(low_rank):
    _, result = low_rank
    assert (result.rank, result.shape) == (5, (2, 20, 20))
    assert result.dtype == result.factor.dtype
    with pytest.raises(AttributeError, match="cannot assign"):
        result.factor = None


def test_dense_diagonal_and_products(low_rank):
    xp, result = low_rank
    expected, like = dense(result), result.factor
    tolerance = {"rtol": 0, "atol": 50 * np.finfo(to_host(like).dtype).eps}  # sums of 5 and 20 terms of size 1
    np.testing.assert_allclose(xp.check(result.to_dense(), like=like, shape=(2, 20, 20)), expected, **tolerance)
    diagonal = xp.check(result.diagonal(), like=like, shape=(2, 20))
    np.testing.assert_allclose(diagonal, np.diagonal(expected, axis1=-2, axis2=-1), **tolerance)
    for shape, out in (
        ((20,), (2, 20)),
        ((20, 3), (2, 20, 3)),
        ((2, 20, 1), (2, 20, 1)),
        ((4, 1, 20, 3), (4, 2, 20, 3)),
    ):
        v = points(*shape, dtype=to_host(like).dtype)
        got = xp.check(result @ xp.asarray(v), like=like, shape=out)
        np.testing.assert_allclose(got, expected @ v, **tolerance)


@pytest.mark.parametrize("ridge", [1e-2, 1, 100.0])
def test_solve(low_rank, ridge):
    xp, result = low_rank
    like, eps = result.factor, np.finfo(to_host(result.factor).dtype).eps
    u, s, _ = np.linalg.svd(to_host(like).astype(np.float64), full_matrices=False)
    for shape, out in (((20,), (2, 20)), ((20, 3), (2, 20, 3)), ((2, 20, 1), (2, 20, 1))):
        b = points(*shape, dtype=to_host(like).dtype)
        got = xp.check(result.solve(xp.asarray(b), ridge=ridge), like=like, shape=out)
        columns = b.astype(np.float64)[:, None] if b.ndim == 1 else b.astype(np.float64)
        inside = np.swapaxes(u, -1, -2) @ columns  # in the range of F, and the rest of b outside of it
        expected = u @ (inside / (s**2 + ridge)[..., None]) + (columns - u @ inside) / ridge
        expected = expected[..., 0] if b.ndim == 1 else expected
        np.testing.assert_allclose(got, expected, rtol=0, atol=20 * eps * np.linalg.norm(b) / ridge)


def test_solve_does_not_square_the_condition_number():
    # Singular values from 1 to 1e-6: FᵀF + ridge·I would lose all digits of the small ones in double precision.
    factor, _ = from_spectrum(np.geomspace(1, 1e-6, 8), 40, 8)
    lower = np.eye(8)
    result = LowRank(factor, None, np.arange(8), np.asarray(0.0), cholesky=lower, kernel=None)
    ridge = 1e-12
    u, s, _ = np.linalg.svd(factor, full_matrices=False)
    x = u @ points(8)
    b = u @ ((s**2 + ridge) * (u.T @ x))
    error = result.solve(b, ridge=ridge) - x
    assert np.linalg.norm(error) <= 20 * np.finfo(np.float64).eps * np.linalg.norm(b) / ridge


def test_a_preconditioner_is_a_solution_that_waits(low_rank):
    xp, result = low_rank
    dtype = to_host(result.factor).dtype
    inverse = result.preconditioner(ridge=0.3)
    for shape in ((20,), (20, 3), (2, 20, 1)):
        b = xp.asarray(points(*shape, dtype=dtype))
        np.testing.assert_array_equal(to_host(inverse(b)), to_host(result.solve(b, ridge=0.3)))
    with pytest.raises(ValueError, match=r"v has shape \(11,\)"):
        inverse(xp.asarray(np.ones(11, dtype=dtype)))


@pytest.mark.parametrize("ridge", [1e-2, 1, 100.0])
def test_logdet(low_rank, ridge):
    xp, result = low_rank
    like, eps = result.factor, float(np.finfo(to_host(result.factor).dtype).eps)
    expected = np.linalg.slogdet(dense(result) + ridge * np.eye(20))[1]
    got = xp.check(result.logdet(ridge=ridge), like=like, shape=(2,))
    # Computed in double and rounded; the sum of 20 logarithms of size 5 cancels where they have both signs.
    np.testing.assert_allclose(got, expected, rtol=eps, atol=20 * 5 * 10 * np.finfo(np.float64).eps)


def test_logdet_keeps_the_small_singular_values():
    # Through FᵀF the last factor, 1e-20 + 1e-22, would drown in eps·1.
    s = np.asarray([1.0, 1e-5, 1e-10])
    factor, _ = from_spectrum(s, 30, 3)
    result = LowRank(factor, None, np.arange(3), np.asarray(0.0), cholesky=np.eye(3), kernel=None)
    ridge = 1e-22
    expected = 27 * np.log(ridge) + np.sum(np.log(s**2 + ridge))
    # A singular value is off by some eps·σ₁, the last one by 10·1e10·eps of itself, its logarithm by that.
    assert float(result.logdet(ridge=ridge)) == pytest.approx(expected, rel=0, abs=2 * 10 * 1e10 * 2.2e-16)


def test_the_ridge_may_be_an_array(low_rank):
    xp, result = low_rank
    b = xp.asarray(points(20, dtype=to_host(result.factor).dtype))
    ridge = xp.asarray(np.asarray(0.25))  # a power of two: the same in every precision
    np.testing.assert_array_equal(to_host(result.solve(b, ridge=ridge)), to_host(result.solve(b, ridge=0.25)))
    np.testing.assert_array_equal(to_host(result.logdet(ridge=ridge)), to_host(result.logdet(ridge=0.25)))


def test_features_are_the_rows_of_the_factor(xp):
    x, z = points(20, 2), points(5, 2, seed=1)
    for dtype in DTYPES:
        x_ = xp.asarray(x.astype(dtype))
        result = nystrom(x_, kernel=gaussian(0.7), landmarks=xp.asarray(z.astype(dtype)))
        rows = xp.check(result.features(x_), like=x_, shape=(20, 5))
        np.testing.assert_array_equal(rows, to_host(result.factor))
    new = points(2, 7, 2, seed=3)
    rows = xp.check(result.features(xp.asarray(new)), like=x_, shape=(2, 7, 5))
    k = gaussian_gram(np.concatenate([new[0], z]), 0.7)
    expected = k[:7, 7:] @ np.linalg.inv(k[7:, 7:]) @ k[7:, :7]
    assert np.linalg.cond(k[7:, 7:]) < 100
    np.testing.assert_allclose(rows[0] @ rows[0].T, expected, rtol=0, atol=100 * 30 * np.finfo(np.float64).eps)


def test_features_of_a_batch_and_of_a_matrix(xp):
    x = points(2, 20, 2)
    batch = nystrom(xp.asarray(x), landmarks=PIVOTS)
    rows = xp.check(batch.features(xp.asarray(x[0, :4])), like=xp.asarray(x), shape=(2, 4, 5))
    np.testing.assert_allclose(rows[0], to_host(batch.factor)[0, :4], rtol=0, atol=1e-13)
    k = gaussian_gram(x[0])
    by_matrix = nystrom(xp.asarray(k), kernel=None, landmarks=PIVOTS)
    rows = by_matrix.features(xp.asarray(k[3:9, PIVOTS]))
    np.testing.assert_allclose(to_host(rows), to_host(by_matrix.factor)[3:9], rtol=0, atol=1e-13)
    for result in (by_matrix, by_matrix.truncate(rank=2)):
        with pytest.raises(ValueError, match=r"\(6, 2\); kernel values with the 5 landmarks .* \(\.\.\., m, 5\)"):
            result.features(xp.asarray(points(6, 2)))


def test_refused_features(xp):
    result = nystrom(xp.asarray(points(20, 2)), landmarks=PIVOTS)
    with pytest.raises(ValueError, match=r"x_new has shape \(6, 3\); points have the shape \(\.\.\., m, 2\)"):
        result.features(xp.asarray(points(6, 3)))
    bad = points(6, 2)
    bad[4, 0] = np.nan
    with pytest.raises(ValueError, match=r"x_new \(shape \(6, 2\)\) has NaN .* row 4"):
        result.features(xp.asarray(bad))
    with pytest.raises(TypeError, match="x_new has dtype"):
        result.features(xp.asarray(points(6, 2, dtype=np.float32)))


def test_truncation_is_the_best_and_its_error_exact(low_rank):
    xp, result = low_rank
    like, eps = result.factor, float(np.finfo(to_host(result.factor).dtype).eps)
    s = np.linalg.svd(to_host(like).astype(np.float64), compute_uv=False)
    for rank in (1, 3, 5, 9):
        short = result.truncate(rank=rank)
        r = min(rank, 5)
        factor = xp.check(short.factor, like=like, shape=(2, 20, r)).astype(np.float64)
        assert short.rank == r
        discarded = np.sum(s[:, r:] ** 2, axis=-1)
        got = xp.check(short.trace_error, like=like, shape=(2,))
        np.testing.assert_allclose(got, to_host(result.trace_error) + discarded, rtol=20 * eps)
        for approximation, whole, sigma in zip(factor @ np.swapaxes(factor, -1, -2), dense(result), s, strict=True):
            error = np.linalg.norm(approximation - whole, 2)
            assert error == pytest.approx(sigma[r] ** 2 if r < 5 else 0, rel=0, abs=10 * eps * sigma[0] ** 2)
        gram = np.swapaxes(factor, -1, -2) @ factor
        np.testing.assert_allclose(gram, np.eye(r) * s[:, None, :r] ** 2, rtol=0, atol=10 * eps * s.max() ** 2)


def test_features_of_a_truncated_factor(xp):
    x = xp.asarray(points(20, 2))
    whole = nystrom(x, kernel=gaussian(2.0), landmarks=PIVOTS)
    twice = whole.truncate(rank=4).truncate(rank=2)
    rows = xp.check(twice.features(x), like=x, shape=(20, 2))
    np.testing.assert_allclose(rows, to_host(twice.factor), rtol=0, atol=1e-12)
    once = dense(whole.truncate(rank=2))
    np.testing.assert_allclose(dense(twice), once, rtol=0, atol=1e-12)
    new = xp.asarray(points(7, 2, seed=9))
    rotation = to_host(twice.rotation)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(2), rtol=0, atol=1e-14)
    np.testing.assert_allclose(to_host(twice.features(new)), to_host(whole.features(new)) @ rotation, atol=1e-13)


def test_truncation_by_tolerance(xp):
    s = np.asarray([1.0, 0.1, 0.01, 0.001])
    factors = np.stack([from_spectrum(s, 20, 4)[0], from_spectrum(s[:1].repeat(4), 20, 4)[0]])
    eye = xp.asarray(np.broadcast_to(np.eye(4), (2, 4, 4)).copy())
    both = LowRank(xp.asarray(factors), None, None, xp.asarray(np.zeros(2)), cholesky=eye, kernel=None)
    first = LowRank(both.factor[0, ...], None, None, xp.asarray(np.zeros(())), cholesky=eye[0, ...], kernel=None)
    # The squares are 1, 1e-2, 1e-4, 1e-6.
    for rtol, rank in ((0.5, 1), (0.01, 1), (0.009, 2), (1e-3, 2), (0.9e-4, 3), (1e-6, 3), (0.9e-6, 4), (0, 4)):
        assert first.truncate(rtol=rtol).rank == rank
        assert first.truncate(rtol=rtol, rank=2).rank == min(rank, 2)
    assert both.truncate(rtol=0.5).rank == 2  # for the worst element of the batch
    zero = LowRank(0 * both.factor, None, None, xp.asarray(np.zeros(2)), cholesky=eye, kernel=None)
    assert zero.truncate(rtol=0.1).rank == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("data", ["plain", "duplicates", "far clusters", "one point", "line"])
def test_the_promise_survives_truncation(data, dtype):
    x = HOSTILE[data](np.random.default_rng(0)).astype(dtype)
    k = kernel_matrix(x, gaussian_kernel, 1.0)
    result = nystrom(x, rank=40, rng=0)
    for rank in (1, 5, 20, 40):
        residual = k - dense(result.truncate(rank=rank))
        assert np.linalg.eigvalsh(residual)[0] >= -5 * np.finfo(dtype).eps * np.linalg.norm(k, 2)


def test_refused_truncations(low_rank):
    _, result = low_rank
    with pytest.raises(ValueError, match="needs rank, rtol or both"):
        result.truncate()
    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        result.truncate(rank=0)
    with pytest.raises(TypeError, match="rank must be an int"):
        result.truncate(rank=2.0)
    for rtol in (-0.1, 1.0, np.nan, "1"):
        with pytest.raises(ValueError, match="rtol must be a number"):
            result.truncate(rtol=rtol)


def test_scipy_solves_with_it(xp):
    for dtype in DTYPES:
        result = nystrom(xp.asarray(points(20, 2, dtype=dtype)), landmarks=PIVOTS)
        operator, matrix = result.aslinearoperator(), dense(result)
        assert isinstance(operator, scipy.sparse.linalg.LinearOperator)
        assert (operator.shape, operator.dtype) == ((20, 20), np.dtype(dtype))
        for v in (points(20, dtype=dtype), points(20, 1, dtype=dtype), points(20, 3, dtype=dtype)):
            for product in (operator @ v, operator.T @ v, operator.H @ v):
                assert isinstance(product, np.ndarray)
                np.testing.assert_allclose(product, matrix @ v, rtol=0, atol=100 * np.finfo(dtype).eps)
    values = scipy.sparse.linalg.eigsh(operator, k=2, which="LA", return_eigenvectors=False, rng=0)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix)[-2:], rtol=1e-10)
    ridged = operator + 0.5 * scipy.sparse.linalg.aslinearoperator(np.eye(20))
    b = points(20)
    x, failed = scipy.sparse.linalg.cg(ridged, b, rtol=1e-10)
    assert failed == 0
    # The condition number is below 20/0.5.
    np.testing.assert_allclose(x, to_host(result.solve(xp.asarray(b), ridge=0.5)), rtol=0, atol=40 * 1e-10 * 20)
    with pytest.raises(ValueError, match=r"a batch of shape \(2, 20, 20\)"):
        nystrom(xp.asarray(points(2, 20, 2)), rank=3, rng=0).aslinearoperator()


def test_eigh(low_rank):
    xp, result = low_rank
    like, matrix = result.factor, dense(result)
    eps = np.finfo(to_host(like).dtype).eps
    w, v = result.eigh()
    w, v = xp.check(w, like=like, shape=(2, 5)), xp.check(v, like=like, shape=(2, 20, 5))
    assert np.all(np.diff(w, axis=-1) >= 0)
    np.testing.assert_allclose(w, np.linalg.eigvalsh(matrix)[:, -5:], rtol=0, atol=50 * eps * w.max())
    np.testing.assert_allclose(np.swapaxes(v, -1, -2) @ v, np.broadcast_to(np.eye(5), (2, 5, 5)), rtol=0, atol=50 * eps)
    np.testing.assert_allclose(matrix @ v, v * w[:, None, :], rtol=0, atol=50 * eps * w.max())


def test_eigenvalues_keep_the_accuracy_of_the_factor():
    # Through FᵀF the eigenvalue 1e-20 would drown in eps·1.
    factor, _ = from_spectrum(np.asarray([1.0, 1e-10]), 10, 2)
    result = LowRank(factor, None, np.arange(2), np.asarray(0.0), cholesky=np.eye(2), kernel=None)
    np.testing.assert_allclose(result.eigh()[0], [1e-20, 1.0], rtol=1e-4)  # 1e10·eps in the singular value


def test_more_landmarks_than_points_are_refused(xp):
    x = xp.asarray(points(3, 2))
    for landmarks in (xp.asarray(points(7, 2, seed=1)), [0, 1, 2, 0]):
        with pytest.raises(ValueError, match=r"landmarks for 3 points \(x has shape \(3, 2\)\)"):
            nystrom(x, landmarks=landmarks)


def test_it_says_what_it_is(xp):
    x = xp.asarray(points(2, 20, 2, dtype=np.float32))
    one, batch = nystrom(x[0, ...], rank=5, rng=0), nystrom(x, rank=5, rng=0)
    # The Gaussian has a diagonal of ones: tr K is 20.
    errors = to_host(batch.trace_error)
    assert repr(one) == (
        f"LowRank(shape=(20, 20), rank=5, dtype=float32, trace_error={errors[0]:.3g} ({errors[0] / 0.2:.3g} % of tr K))"
    )
    low, high = errors.min(), errors.max()
    shown = f"{low:.3g} to {high:.3g} ({low / 0.2:.3g} to {high / 0.2:.3g} % of tr K)"
    assert repr(batch) == f"LowRank(shape=(2, 20, 20), rank=5, dtype=float32, trace_error={shown})"
    none = dataclasses.replace(batch, factor=batch.factor[:0, ...], trace_error=batch.trace_error[:0])
    assert repr(none) == "LowRank(shape=(0, 20, 20), rank=5, dtype=float32, trace_error=none)"


def test_autocast_does_not_reach_inside():
    x = torch.asarray(points(20, 2, dtype=np.float32))
    outside = nystrom(x, rank=5, rng=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nystrom(x, rank=5, rng=0)
        products = inside @ x, inside.to_dense(), inside.solve(x, ridge=0.1)
    torch.testing.assert_close(inside.factor, outside.factor, rtol=0, atol=0)
    for got, expected in zip(products, (outside @ x, outside.to_dense(), outside.solve(x, ridge=0.1)), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


# Files


def same(a, b):
    for name in ("factor", "landmarks", "pivots", "trace_error", "cholesky", "rotation"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert to_host(one).dtype == to_host(other).dtype
            np.testing.assert_array_equal(to_host(one), to_host(other))


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_and_loaded(xp, dtype, tmp_path):
    x = xp.asarray(points(20, 2, dtype=dtype))
    path, kernel = tmp_path / "factor.safetensors", gaussian(1.3)
    by_points = xp.asarray(points(4, 2, seed=1, dtype=dtype))
    batch = nystrom(xp.asarray(points(2, 20, 2, dtype=dtype)), kernel=kernel, rank=3, rng=0)
    whole = nystrom(x, kernel=kernel, landmarks=PIVOTS)
    for result in (whole, whole.truncate(rank=2), nystrom(x, kernel=kernel, landmarks=by_points), batch):
        result.save(path)
        back = LowRank.load(path, kernel=kernel)
        assert isinstance(back.factor, np.ndarray)
        assert back.kernel is kernel
        same(back, result)
        there = LowRank.load(path, kernel=kernel, like=x)
        xp.check(there.factor, like=x, shape=tuple(result.factor.shape))
        same(there, result)
        # Another memory layout is another order of sums; the condition number of L is below 100.
        rows, tolerance = to_host(there.features(x)), 100 * float(np.finfo(dtype).eps)
        np.testing.assert_allclose(rows, to_host(result.features(x)), rtol=0, atol=tolerance)
        if result.pivots is not None:
            assert there.pivots.dtype == result.pivots.dtype
    k = xp.asarray(gaussian_gram(points(20, 2)).astype(dtype))
    result = nystrom(k, kernel=None, landmarks=PIVOTS)
    result.save(path)
    same(LowRank.load(path, kernel=None), result)
    assert os.listdir(tmp_path) == ["factor.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "factor.safetensors"
    old, new = (nystrom(points(20, 2), rank=rank, rng=0) for rank in (3, 5))
    old.save(path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        new.save(path)
    assert os.listdir(tmp_path) == ["factor.safetensors"]
    assert LowRank.load(path, kernel=gaussian_kernel).rank == 3
    monkeypatch.undo()
    new.save(path)
    assert LowRank.load(path, kernel=gaussian_kernel).rank == 5


def test_refused_files(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "factor.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        LowRank.load(path, kernel=gaussian_kernel)
    x = points(20, 2)
    nystrom(x, rank=5, rng=0).save(path)
    with pytest.raises(ValueError, match="made from points, with a kernel: name it"):
        LowRank.load(path, kernel=None)
    for wrong in (gaussian(1.1), laplacian_kernel):
        with pytest.raises(ValueError, match="the kernel is not the one that the factor was made with"):
            LowRank.load(path, kernel=wrong)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated or damaged"):
        LowRank.load(path, kernel=gaussian_kernel)
    nystrom(gaussian_gram(x), kernel=None, rank=5, rng=0).save(path)
    with pytest.raises(ValueError, match="made from K itself: give kernel=None"):
        LowRank.load(path, kernel=gaussian_kernel)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its SHA-256"):
        LowRank.load(path, kernel=None)
    save_file({"weight": np.ones(3)}, path)
    with pytest.raises(ValueError, match=r"something else; it holds \['weight'\]"):
        LowRank.load(path, kernel=None)


# Derivatives, with the rows that are landmarks held fixed


def dense_evidence(k, y, ridge, xp):
    """log N(y; 0, K + ridge·I) without the constant, by dense factors."""
    lower = xp.linalg.cholesky(k + ridge * xp.eye(k.shape[0], dtype=k.dtype))
    half = xp.linalg.solve(lower, y)
    return -0.5 * half @ half - xp.sum(xp.log(xp.diagonal(lower)))


def evidence(result, y, ridge):
    return -0.5 * (y @ result.solve(y, ridge=ridge)) - 0.5 * result.logdet(ridge=ridge)


def test_torch_derivatives_are_those_of_the_dense_formula():
    x, z, y = (torch.asarray(a) for a in (points(12, 2), points(4, 2, seed=1), points(12, seed=2)))
    ell, ridge = torch.asarray([0.8, 1.2], dtype=torch.float64), torch.asarray(0.3, dtype=torch.float64)
    inputs = [a.clone().requires_grad_() for a in (x, z, ell, ridge)]

    def ours(x, z, ell, ridge):
        return evidence(nystrom(x, kernel=gaussian(ell), landmarks=z), y, ridge)

    def by_hand(x, z, ell, ridge):
        def k(a, b):
            return torch.exp(-0.5 * torch.sum(((a[:, None] - b[None]) / ell) ** 2, dim=-1))

        return dense_evidence(k(x, z) @ torch.linalg.inv(k(z, z)) @ k(z, x), y, ridge, torch)

    got, expected = ours(*inputs), by_hand(*inputs)
    # W has a condition number below 10 and K + ridge·I below 40; derivatives are of size 10.
    assert got.item() == pytest.approx(expected.item(), rel=1e-11)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)


@pytest.mark.parametrize("by", ["indices", "uniform", "segment_means", "matrix"])
def test_torch_derivatives_of_everything(by):
    x = torch.asarray(points(10, 2)).requires_grad_()
    ell = torch.asarray(0.9, dtype=torch.float64, requires_grad=True)
    new = torch.asarray(points(3, 2, seed=5))

    def everything(x, ell):
        if by == "matrix":
            k = gaussian_kernel(x, x, lengthscale=ell)
            result, rows = nystrom(k, kernel=None, landmarks=[1, 8, 4]), k[:3, [1, 8, 4]]
        else:
            choice = {"landmarks": [1, 8, 4]} if by == "indices" else {"landmarks": by, "rank": 3, "rng": 0}
            result, rows = nystrom(x, kernel=gaussian(ell), **choice), new
        short = result.truncate(rank=2)
        return (
            result.to_dense(),
            result.diagonal(),
            result.trace_error,
            result.features(rows),
            short.to_dense(),
            short.trace_error,
            result.logdet(ridge=0.1),
            result.solve(x, ridge=0.1),
        )

    assert torch.autograd.gradcheck(everything, (x, ell))


def test_single_precision_trains_as_double_does():
    x, y = points(30, 2), points(30, seed=2)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        x_, y_ = torch.asarray(x).to(dtype), torch.asarray(y).to(dtype)
        ell = torch.asarray(0.8, dtype=dtype, requires_grad=True)
        evidence(nystrom(x_, kernel=gaussian(ell), landmarks=PIVOTS), y_, 0.5).backward()
        gradients.append(ell.grad.item())
    # Condition numbers below 100 (of W) and 60 (of K + ridge·I), in eps of single precision.
    assert gradients[0] == pytest.approx(gradients[1], rel=6000 * 1.2e-7)


def test_the_evidence_finds_the_lengthscale():
    rng = np.random.default_rng(0)
    x = rng.uniform(-4, 4, size=(150, 1))
    y = np.linalg.cholesky(gaussian_gram(x, 0.7) + 1e-2 * np.eye(150)) @ rng.standard_normal(150)
    x_, y_ = torch.asarray(x), torch.asarray(y)
    log_ell = torch.zeros((), dtype=torch.float64).add(np.log(3.0)).requires_grad_()
    log_ridge = torch.zeros((), dtype=torch.float64).requires_grad_()
    z = torch.linspace(-4, 4, 40, dtype=torch.float64)[:, None]
    optimiser = torch.optim.LBFGS([log_ell, log_ridge], max_iter=40, line_search_fn="strong_wolfe")

    def step():
        optimiser.zero_grad()
        loss = -evidence(nystrom(x_, kernel=gaussian(log_ell.exp()), landmarks=z), y_, log_ridge.exp())
        loss.backward()
        return loss

    optimiser.step(step)
    assert step().item() < 0.5 * 150  # far below that of the start, 3 and 1
    assert 0.5 < log_ell.exp().item() < 1.0
    assert 0.5e-2 < log_ridge.exp().item() < 2e-2


def test_choosing_landmarks_does_not_see_derivatives():
    seen = []

    def choose(x, /, *, rank, kernel, rng):
        seen.append(kernel(x, x).requires_grad)
        return [1, 8, 4]

    x = torch.asarray(points(10, 2)).requires_grad_()
    ell = torch.ones((), dtype=torch.float64, requires_grad=True)
    chosen = nystrom(x, kernel=gaussian(ell), landmarks=choose, rank=3)
    given = nystrom(x, kernel=gaussian(ell), landmarks=[1, 8, 4])
    assert seen == [False]
    gradients = [torch.autograd.grad(result.logdet(ridge=0.1), (x, ell)) for result in (chosen, given)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert gradients[0][1].abs().item() > 0.1


def test_jax_derivatives_are_torch_derivatives():
    x, z, y = points(12, 2), points(4, 2, seed=1), points(12, seed=2)

    def ours(x, z, ell, ridge, y):
        return evidence(nystrom(x, kernel=gaussian(ell), landmarks=z), y, ridge)

    arguments = (x, z, np.asarray([0.8, 1.2]), np.asarray(0.3))
    compiled = jax.jit(ours)
    inputs = [torch.asarray(a).requires_grad_() for a in arguments]
    expected = ours(*inputs, torch.asarray(y))
    here = [jnp.asarray(a) for a in arguments]
    assert float(compiled(*here, jnp.asarray(y))) == pytest.approx(expected.item(), rel=1e-11)
    assert float(ours(*here, jnp.asarray(y))) == pytest.approx(expected.item(), rel=1e-11)
    got = jax.grad(compiled, argnums=(0, 1, 2, 3))(*here, jnp.asarray(y))
    for a, b in zip(got, torch.autograd.grad(expected, inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    check_grads(lambda *a: compiled(*a, jnp.asarray(y)), tuple(here), order=1)


def test_jax_programs():
    x = jnp.asarray(points(12, 2))

    @jax.jit
    def rows(x, pivots):
        by_index, drawn = nystrom(x, landmarks=pivots), nystrom(x, rank=3, rng=0)
        assert "trace_error=traced" in repr(drawn)
        return by_index.features(x), drawn.truncate(rank=2).to_dense()

    pivots = jnp.asarray([3, 7, 0])
    got, dense_rows = rows(x, pivots)
    np.testing.assert_allclose(got, nystrom(x, landmarks=pivots).factor, atol=1e-12)
    np.testing.assert_allclose(dense_rows, nystrom(x, rank=3, rng=0).truncate(rank=2).to_dense(), atol=1e-12)
    # Values are not known there: what is refused elsewhere is NaN.
    bad = jax.jit(lambda x: nystrom(x, kernel=squared_distances, landmarks=[1, 2, 3]).logdet(ridge=0.1))(x)
    assert np.isnan(float(bad))
    with pytest.raises(TypeError, match="rank found by rtol"):
        jax.jit(lambda x: nystrom(x, rank=3, rng=0).truncate(rtol=0.1).factor)(x)


def test_jax_without_double_precision():
    # A process of its own, for the setting is the process's.
    program = """
import functools, warnings
warnings.simplefilter("error")
import jax, numpy as np
from lowrank.factor import nystrom
from lowrank.kernels import gaussian_kernel
rng = np.random.default_rng(0)
for x in (rng.standard_normal((80, 2)), np.full((80, 2), 7.3), 1e4 + rng.standard_normal((80, 2))):
    x = x.astype(np.float32)
    for ell in (1e-3, 1.0, 1e3):
        k = np.exp(-0.5 * np.sum((x[:, None].astype(float) - x[None]) ** 2, axis=-1) / ell**2)
        for landmarks in (np.arange(80), np.arange(0, 80, 3)):
            kernel = functools.partial(gaussian_kernel, lengthscale=ell)
            result = nystrom(jax.numpy.asarray(x), kernel=kernel, landmarks=landmarks)
            f = np.asarray(result.factor).astype(float)
            print(np.linalg.eigvalsh(k - f @ f.T)[0] / np.linalg.norm(k, 2), result.logdet(ridge=0.1).dtype)
"""
    environment = {**os.environ, "JAX_ENABLE_X64": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 18
    for lowest, dtype in lines:
        assert float(lowest) >= -5 * np.finfo(np.float32).eps
        assert dtype == "float32"


def test_functions_of_torch_transform():
    x, y = torch.asarray(points(10, 2)), torch.asarray(points(10, seed=2))

    def loss(ell):
        return evidence(nystrom(x, kernel=gaussian(ell), landmarks=[1, 8, 4]), y, 0.5)

    ell = torch.asarray(0.9, dtype=torch.float64)
    eager = ell.clone().requires_grad_()
    expected = torch.autograd.grad(loss(eager), eager)[0]
    torch.testing.assert_close(torch.func.grad(loss)(ell), expected, rtol=1e-10, atol=0)


# How many landmarks: rtol


@pytest.mark.parametrize("dtype", DTYPES)
def test_rtol_is_the_error_asked_for(xp, dtype):
    x = xp.asarray(points(60, 2, dtype=dtype))
    ranks = []
    for rtol in (0.3, 0.03):
        result = nystrom(x, kernel=gaussian(1.5), landmarks="rpcholesky", rtol=rtol, rng=0)
        ranks.append(result.rank)
        # The shift adds some eps·n to the error that stopped the choice.
        assert float(result.trace_error) <= rtol * 60 * (1 + 1e-3)
        before = nystrom(x, kernel=gaussian(1.5), landmarks=to_host(result.pivots)[:-1].tolist())
        assert float(before.trace_error) > rtol * 60 * (1 - 1e-3)
    assert 1 < ranks[0] < ranks[1] < 60
    assert nystrom(x, landmarks="rpcholesky", rank=3, rtol=0.03, rng=0).rank == 3


def test_pivots_are_chosen_while_derivatives_are_carried():
    x = torch.asarray(points(30, 2)).requires_grad_()
    ell = torch.asarray(1.5, dtype=torch.float64, requires_grad=True)
    result = nystrom(x, kernel=gaussian(ell), landmarks="rpcholesky", rank=6, rng=0)
    given_ = nystrom(x, kernel=gaussian(ell), landmarks=result.pivots)
    got, expected = (torch.autograd.grad(r.logdet(ridge=0.1), (x, ell)) for r in (result, given_))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_one_point_repeated_has_rank_one(xp):
    x = xp.asarray(np.full((20, 2), 7.3))
    result = nystrom(x, landmarks="rpcholesky", rank=5, rng=0)
    assert result.rank == 1
    # The shift is 30 eps of the one landmark's W = 1, for each of 20 rows.
    assert float(result.trace_error) <= 20 * 35 * np.finfo(np.float64).eps


def test_rtol_is_for_functions_that_take_it(xp):
    x, told = xp.asarray(points(20, 2)), {}

    def stops(x, /, *, rank, kernel, rng, rtol=0.0):
        told.update(rank=rank, rtol=rtol)
        return PIVOTS

    assert nystrom(x, landmarks=stops, rtol=0.1).rank == 5
    assert told == {"rank": 20, "rtol": 0.1}
    nystrom(x, landmarks=stops, rank=7, rtol=0.1)
    assert told == {"rank": 7, "rtol": 0.1}
    nystrom(x, landmarks=stops, rank=7)
    assert told == {"rank": 7, "rtol": 0.0}
    assert nystrom(x, landmarks=lambda x, /, **_: [1, 2], rtol=0.1).rank == 2
    for landmarks, name in (("uniform", "uniform"), (segment_means, "segment_means")):
        with pytest.raises(TypeError, match=f"{name} has no keyword rtol to stop by; choose landmarks='rpcholesky'"):
            nystrom(x, landmarks=landmarks, rank=3, rtol=0.1)
    for given_ in (PIVOTS, xp.asarray(points(5, 2))):
        with pytest.raises(ValueError, match=r"rtol \(0\.1\) decides how many landmarks are chosen"):
            nystrom(x, landmarks=given_, rtol=0.1)
    for rtol in (-0.1, 1.0, np.nan, "1"):
        with pytest.raises(ValueError, match="rtol must be a number in"):
            nystrom(x, landmarks=stops, rtol=rtol)


# Errors


def test_refused_points(xp):
    good = points(6, 2)
    for bad in (np.nan, np.inf, -np.inf):
        x = good.copy()
        x[3, 1] = bad
        x[5, 0] = bad
        with pytest.raises(ValueError, match=r"x \(shape \(6, 2\)\) has NaN or infinite values in 2 rows, .* row 3;"):
            nystrom(xp.asarray(x), rank=2)
        with pytest.raises(ValueError, match=r"landmarks \(shape \(6, 2\)\) has NaN or infinite values in 2 rows"):
            nystrom(xp.asarray(good), landmarks=xp.asarray(x))
        with pytest.raises(ValueError, match=r"the first of them row \(1, 3\);"):
            nystrom(xp.asarray(np.stack([good, x])), rank=2)
    with pytest.raises(ValueError, match=r"at least two axes.*\(6,\)"):
        nystrom(xp.asarray(points(6)), rank=2)
    with pytest.raises(TypeError, match=r"x has dtype .*int32.*floating dtype"):
        nystrom(xp.asarray(np.ones((6, 2), dtype=np.int32)), rank=2)
    with pytest.raises(TypeError, match=r"complex128.*convert it to float32 or float64"):
        nystrom(xp.asarray(np.ones((6, 2), dtype=complex)), rank=2)
    with pytest.raises(ValueError, match=r"K and must be square, not of shape \(6, 2\)"):
        nystrom(xp.asarray(good), kernel=None, rank=2)
    with pytest.raises(TypeError, match="x must be an array, not list"):
        nystrom([[1.0]], rank=1)


def test_refused_half_precision():
    with pytest.raises(TypeError, match=r"float16.*convert it to float32"):
        nystrom(np.ones((4, 2), dtype=np.float16), rank=2)


def test_refused_ranks(xp):
    x = xp.asarray(points(6, 2))
    with pytest.raises(ValueError, match="rank must be from 1 to the number of points, 6"):
        nystrom(x, rank=7)
    with pytest.raises(ValueError, match="rank must be from 1 to the number of points, 6"):
        nystrom(x, landmarks=[0] * 7, rank=7)
    with pytest.raises(TypeError, match="rank must be an int"):
        nystrom(x, rank=2.0)
    with pytest.raises(ValueError, match="rank, the number of landmarks, is needed"):
        nystrom(x)
    with pytest.raises(ValueError, match="rank is 3 and there are 2 landmarks"):
        nystrom(x, landmarks=[0, 1], rank=3)
    with pytest.raises(ValueError, match="rank is 3 and there are 2 landmarks"):
        nystrom(x, landmarks=xp.asarray(points(2, 2)), rank=3)
    with pytest.raises(ValueError, match="rank is 1 and there are 2 landmarks"):
        nystrom(x, landmarks=lambda x, /, **_: [0, 1], rank=1)


def test_refused_landmarks(xp):
    x = xp.asarray(points(6, 2))
    with pytest.raises(ValueError, match=r"one of \['rpcholesky', 'segment_means', 'uniform'\].*not 'kmeans'"):
        nystrom(x, landmarks="kmeans", rank=2)
    for bad in ([0, 6], [-1, 2]):
        with pytest.raises(ValueError, match=rf"indices from {min(bad)} to {max(bad)}.*the rows 0 to 5"):
            nystrom(x, landmarks=bad)
    with pytest.raises(ValueError, match="landmarks is empty"):
        nystrom(x, landmarks=[])
    for bad in ([0.0, 1.0], [True, False]):
        with pytest.raises(TypeError, match=r"landmarks of shape \(2,\) are indices and must be integers"):
            nystrom(x, landmarks=xp.asarray(np.asarray(bad)))
    with pytest.raises(TypeError, match="must be a name, a callable, indices or points, not NoneType"):
        nystrom(x, landmarks=None)
    with pytest.raises(ValueError, match=r"landmarks have shape \(3, 5\); for x of shape \(6, 2\)"):
        nystrom(x, landmarks=xp.asarray(points(3, 5)))
    with pytest.raises(ValueError, match=r"landmarks have shape \(0, 2\)"):
        nystrom(x, landmarks=xp.asarray(points(0, 2)))
    with pytest.raises(TypeError, match=r"float64 and landmarks has dtype .*float32"):
        nystrom(x, landmarks=xp.asarray(points(3, 2, dtype=np.float32)))
    with pytest.raises(TypeError, match="rng must be None"):
        nystrom(x, rank=2, rng="seed")


def test_refused_landmarks_of_a_matrix(xp):
    k = xp.asarray(gaussian_gram(points(6, 2)))
    with pytest.raises(ValueError, match=r"landmarks are points \(shape \(2, 6\)\), and with kernel=None"):
        nystrom(k, kernel=None, landmarks=xp.asarray(points(2, 6)))
    with pytest.raises(ValueError, match="segment_means averages points"):
        nystrom(k, kernel=None, landmarks="segment_means", rank=2)


def test_refused_mixtures():
    with pytest.raises(TypeError, match="bring both to one library"):
        nystrom(points(6, 2), landmarks=torch.asarray(points(2, 2)))


def test_refused_kernels(xp):
    x = xp.asarray(points(20, 2))
    # Squares of the Gaussian's distances have a zero diagonal and negative eigenvalues.
    with pytest.raises(ValueError, match=r"the kernel is not positive semidefinite.*\(5, 5\).*eigenvalue -"):
        nystrom(x, kernel=squared_distances, rank=5)
    with pytest.raises(ValueError, match=r"no negative diagonal, and k\(x, x\) of row 0 is -1"):
        nystrom(x, kernel=lambda a, b: -gaussian_kernel(a, b), rank=5)
    with pytest.raises(ValueError, match="returned NaN or infinite values"):
        nystrom(x, kernel=lambda a, b: gaussian_kernel(a, b) * float("nan"), rank=5)
    with pytest.raises(
        ValueError,
        match=r"returned a block of shape \(5, 20\) for points of shapes \(20, 2\) and \(5, 2\); .* \(20, 5\)",
    ):
        nystrom(x, kernel=lambda a, b: gaussian_kernel(b, a), landmarks=PIVOTS)
    with pytest.raises(ValueError, match=r"shape \(1, 1\) for points of shapes \(20, 1, 2\) .* \(20, 1, 1\)"):
        nystrom(x, kernel=lambda a, b: gaussian_kernel(a, b) if a.ndim == 2 else gaussian_kernel(a, b)[0, ...], rank=5)
    with pytest.raises(ValueError, match=r"not symmetric: for the landmarks . and . it is .* one way and .* the other"):
        nystrom(x, kernel=lambda a, b: gaussian_kernel(a, b) * (5 + a[..., :1]), rank=5)
    sloped = gaussian_gram(points(20, 2)) + 1e-3 * np.triu(np.ones((20, 20)))
    with pytest.raises(ValueError, match="the kernel is not symmetric"):
        nystrom(xp.asarray(sloped), kernel=None, landmarks=PIVOTS)
    negative = gaussian_gram(points(20, 2))
    negative[13, 13] = -0.5
    with pytest.raises(ValueError, match=r"k\(x, x\) of row 13 is -0.5"):
        nystrom(xp.asarray(negative), kernel=None, landmarks=PIVOTS)

    def infinite_across(a, b):
        k = gaussian_kernel(a, b)
        return k if k.shape[-1] == k.shape[-2] else k + float("inf")

    with pytest.raises(ValueError, match=r"returned NaN or infinite values for finite points of shapes \(20, 2\)"):
        nystrom(x, kernel=infinite_across, rank=5)


def test_refused_right_sides(low_rank):
    xp, result = low_rank
    dtype = to_host(result.factor).dtype
    good = xp.asarray(np.ones(20, dtype=dtype))
    for shape in ((11,), (11, 2), (2, 11, 2), ()):
        bad = xp.asarray(np.ones(shape, dtype=dtype))
        with pytest.raises(ValueError, match=r"v has shape .* needs \(20,\) or \(\.\.\., 20, p\)"):
            result @ bad
        with pytest.raises(ValueError, match=r"b has shape .* needs \(20,\) or \(\.\.\., 20, p\)"):
            result.solve(bad, ridge=1.0)
    for ridge in (0.0, -1.0, np.inf, np.nan, "1", xp.asarray(np.asarray(0.0)), xp.asarray(np.ones(2))):
        for ask in (functools.partial(result.solve, good), result.logdet, result.preconditioner):
            with pytest.raises(ValueError, match="ridge must be a positive finite number"):
                ask(ridge=ridge)
    with pytest.raises(ValueError, match="F Fᵀ, of size 20 and rank 5, is singular"):
        result.solve(good, ridge=0)
    if dtype == np.float32:
        with pytest.raises(ValueError, match="not 1e-50: F Fᵀ"):
            result.solve(good, ridge=1e-50)
    repeated = nystrom(result.landmarks[0, ...], landmarks=[0, 1, 1, 0])
    with pytest.raises(ValueError, match="F Fᵀ, of size 5 and rank 2, is singular"):
        repeated.logdet(ridge=0.0)
    with pytest.raises(TypeError, match="factor has dtype"):
        result @ xp.asarray(np.ones(20, dtype=np.float32 if dtype == np.float64 else np.float64))
    with pytest.raises(TypeError, match="v must be an array"):
        result @ [1.0] * 20
