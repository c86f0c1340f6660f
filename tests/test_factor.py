"""The Nyström factor: exact where it should be, below K on any points, the same on every library."""

import functools

import numpy as np
import pytest
import torch
from conftest import from_spectrum, gaussian_gram
from hypothesis import given
from hypothesis import strategies as st

from lowrank._array import to_host
from lowrank.factor import nystrom
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
