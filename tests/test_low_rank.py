"""What a factorisation is asked: against dense matrices, SciPy and files."""

import dataclasses
import functools
import os

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from conftest import from_spectrum, gaussian_gram
from test_factor import DTYPES, HOSTILE, PIVOTS, dense, gaussian, kernel_matrix, points

from lowrank._array import to_host
from lowrank.factor import LowRank, nystrom
from lowrank.kernels import gaussian_kernel, laplacian_kernel


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


# Errors


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
