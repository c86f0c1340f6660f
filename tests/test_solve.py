"""Kernel ridge regression: the exact solution, in few steps that are known to suffice, without the matrix."""

import functools
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import from_spectrum, gaussian_gram
from sklearn.kernel_ridge import KernelRidge as DenseKernelRidge

from lowrank import solve
from lowrank._array import to_host
from lowrank.factor import LowRank, nystrom
from lowrank.kernels import gaussian_kernel, laplacian_kernel, matern32_kernel
from lowrank.solve import kernel_ridge

DTYPES = [np.float32, np.float64]
TOL = {np.float32: 1e-4, np.float64: 1e-8}


def problem(n=40, d=2, *, seed=0, noise=0.1, dtype=np.float64, columns=None):
    """Points of a square and noisy values of a smooth function."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (n, d))
    shape = (n,) if columns is None else (n, columns)
    smooth = np.sin(3 * x[:, 0]) * np.cos(2 * x[:, -1])
    y = (smooth if columns is None else smooth[:, None]) + noise * rng.standard_normal(shape)
    return x.astype(dtype), y.astype(dtype)


def gaussian(lengthscale):
    return functools.partial(gaussian_kernel, lengthscale=lengthscale)


def true_residual(fit, k, y):
    """‖y − (K + ridge·I) α‖/‖y‖ in float64, of the coefficients as they are."""
    alpha = to_host(fit.coefficients).astype(np.float64)
    return np.linalg.norm(y - (k @ alpha + fit.ridge * alpha), axis=0) / np.linalg.norm(y.astype(np.float64), axis=0)


# The solution


@pytest.mark.parametrize(("dtype", "columns"), [(np.float32, None), (np.float64, 3)])
def test_is_the_exact_solution(xp, dtype, columns):
    x, y = problem(dtype=dtype, columns=columns)
    x_, y_ = xp.asarray(x), xp.asarray(y)
    ridge = 1e-2
    fit = kernel_ridge(x_, y_, kernel=gaussian(0.5), ridge=ridge, rank=12, landmarks="uniform", rng=0)
    alpha = xp.check(fit.coefficients, like=x_, shape=y.shape)
    k = gaussian_gram(x, 0.5)
    exact = np.linalg.solve(k + ridge * np.eye(len(x)), y.astype(np.float64))
    # ‖α − A⁻¹y‖ ≤ ‖A⁻¹‖‖r‖ and ‖r‖ ≤ tol·‖y‖.
    assert np.all(np.linalg.norm(alpha - exact, axis=0) <= TOL[dtype] * np.linalg.norm(y, axis=0) / ridge)
    steps = to_host(fit.iterations)
    assert steps.shape == y.shape[1:]
    assert np.all((steps >= 2) & (steps <= fit.bound))
    # With 12 of 40 landmarks, the low-rank solution is another one.
    cheap = to_host(fit.low_rank.solve(y_, ridge=ridge))
    assert np.min(np.linalg.norm(cheap - exact, axis=0) / np.linalg.norm(exact, axis=0)) > 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_reported_is_the_true_one(xp, dtype):
    x, y = problem(dtype=dtype, columns=2)
    x_ = xp.asarray(x)
    fit = kernel_ridge(x_, xp.asarray(y), kernel=gaussian(0.5), ridge=1e-3, rank=12, landmarks="uniform", rng=0)
    reported = xp.check(fit.residual, like=x_, shape=(2,))
    true = true_residual(fit, gaussian_gram(x, 0.5), y)
    assert np.all(true <= TOL[dtype])
    # 40 products of size |α| up to 1/ridge, each good to a few eps of float64; reported in the dtype of x.
    np.testing.assert_allclose(reported, true, rtol=1e-6, atol=1e3 * 40 * 10 * 2.0**-52)


def test_ridge_means_what_alpha_means_in_scikit_learn():
    x, y = problem(300, 3)
    other = DenseKernelRidge(alpha=0.05, kernel="rbf", gamma=1 / (2 * 0.8**2)).fit(x, y)
    fit = kernel_ridge(x, y, kernel=gaussian(0.8), ridge=0.05, rank=60, landmarks="uniform", rng=0, tol=1e-10)
    new = problem(50, 3, seed=1)[0]
    # ‖k(x′, x)‖‖δα‖ with ‖δα‖ ≤ tol·‖y‖/ridge.
    np.testing.assert_allclose(fit.predict(new), other.predict(new), rtol=0, atol=np.sqrt(300) * 1e-10 * 10 / 0.05)


def test_prediction(xp, monkeypatch):
    monkeypatch.setattr(solve, "_TILE", 16)
    dtype = np.float32
    x, y = problem(dtype=dtype, columns=2)
    x_ = xp.asarray(x)
    for values in (y, y[:, 0]):
        fit = kernel_ridge(x_, xp.asarray(values), kernel=gaussian(0.5), ridge=0.1, rank=12, landmarks="uniform")
        new = problem(23, seed=1, dtype=dtype)[0]
        got = xp.check(fit.predict(xp.asarray(new)), like=x_, shape=(23, *values.shape[1:]))
        alpha = to_host(fit.coefficients).astype(np.float64)
        block = np.exp(-0.5 * np.sum((new[:, None].astype(float) - x[None]) ** 2, axis=-1) / 0.25)
        # 40 values of a few roundings each, weighted with α.
        atol = 10 * np.finfo(dtype).eps * np.abs(alpha).sum(axis=0).max()
        np.testing.assert_allclose(got, block @ alpha, rtol=0, atol=atol)
        xp.check(fit.predict(xp.asarray(new[:0])), like=x_, shape=(0, *values.shape[1:]))


def test_any_kernel_will_do():
    x, y = problem(200)
    for kernel in (laplacian_kernel, matern32_kernel, lambda a, b: (1 + a @ np.swapaxes(b, -1, -2)) ** 3):
        fit = kernel_ridge(x, y, kernel=kernel, ridge=0.1, rank=40, landmarks="uniform", rng=0)
        assert true_residual(fit, kernel(x, x), y) <= 1e-8


# Several right sides


def test_columns_are_independent_bit_for_bit(xp):
    x, y = problem(dtype=np.float32, columns=3)
    # A ridge with which rounding in float32 is not in the way of the tolerance, whatever the order of sums.
    options = {"kernel": gaussian(0.5), "ridge": 1e-2, "rank": 12, "landmarks": "uniform", "rng": 0}
    before = kernel_ridge(xp.asarray(x), xp.asarray(y), **options)
    y[:, 1] = np.random.default_rng(5).standard_normal(40)
    y[:, 2] = 0
    after = kernel_ridge(xp.asarray(x), xp.asarray(y), **options)
    np.testing.assert_array_equal(to_host(after.coefficients)[:, 0], to_host(before.coefficients)[:, 0])
    assert not np.array_equal(to_host(after.coefficients)[:, 1], to_host(before.coefficients)[:, 1])


def test_each_column_stops_on_its_own():
    x, noise = problem(300, noise=1.0, columns=3)
    # An eigenvector of K that P knows, nothing at all, and noise.
    eigenvector = np.linalg.eigh(gaussian_gram(x, 0.3))[1][:, -1]
    y = np.stack([eigenvector, np.zeros(300), noise[:, 0]], axis=1)
    fit = kernel_ridge(x, y, kernel=gaussian(0.3), ridge=1e-3, rank=60, landmarks="uniform", rng=0)
    first, nothing, last = fit.iterations
    assert nothing == 0
    assert 0 < first < last
    np.testing.assert_array_equal(fit.coefficients[:, 1], 0)
    assert fit.residual[1] == 0
    assert fit.ratio == last / fit.bound


def test_no_columns_at_all(xp):
    x, _ = problem()
    x_ = xp.asarray(x)
    fit = kernel_ridge(x_, xp.asarray(np.zeros((40, 0))), ridge=1.0, rank=5, landmarks="uniform")
    xp.check(fit.coefficients, like=x_, shape=(40, 0))
    assert fit.ratio == 0


def test_the_scale_of_y_is_of_no_consequence():
    x, y = problem(100)
    options = {"kernel": gaussian(0.5), "ridge": 1e-3, "rank": 20, "landmarks": "uniform", "rng": 0}
    fit = kernel_ridge(x, y, **options)
    for power in (-600, 600):
        scaled = kernel_ridge(x, y * 2.0**power, **options)
        np.testing.assert_array_equal(scaled.coefficients, fit.coefficients * 2.0**power)
        assert scaled.residual == fit.residual


# Steps and their bound


def test_the_spectrum_that_the_bound_rests_on():
    x, _ = problem(150)
    k, ridge = gaussian_gram(x, 0.3), 1e-3
    low_rank = nystrom(x, kernel=gaussian(0.3), rank=40, rng=0)
    inverse = solve._preconditioner(low_rank, ridge)(np.eye(150))
    eigenvalues = np.linalg.eigvals(inverse @ (k + ridge * np.eye(150))).real
    # P⁻¹ is good to eps‖v‖/ridge, which A multiplies by its norm.
    rounding = 50 * 2.0**-52 * np.linalg.norm(k, 2) / ridge
    assert eigenvalues.min() >= 1 - rounding
    assert eigenvalues.max() <= 1 + float(low_rank.trace_error) / ridge + rounding
    assert eigenvalues.max() > 10  # so that the bound says something


@pytest.mark.parametrize("excess", [1e-12, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("largest", [1.0, 1e6])
def test_the_bound_is_chebyshevs(excess, largest):
    steps = solve._iteration_bound(excess, largest, 1e-8)
    kappa, target = 1 + excess, np.sqrt(1 + largest) / 1e-8

    def chebyshev(k):
        return np.cosh(k * np.arccosh(1 + 2 / excess))

    assert chebyshev(steps) >= target * (1 - 1e-6)
    assert steps == 1 or chebyshev(steps - 1) < target
    assert steps <= np.ceil(np.sqrt(kappa) / 2 * np.log(2 * target))


def test_a_kernel_that_is_zero_needs_one_step():
    x, y = problem()
    fit = kernel_ridge(x, y, kernel=lambda a, b: 0 * gaussian_kernel(a, b), ridge=0.5, rank=5, landmarks="uniform")
    assert (int(fit.iterations), fit.bound) == (1, 1)
    np.testing.assert_allclose(fit.coefficients, 2 * y, rtol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [gaussian_kernel, matern32_kernel, laplacian_kernel])
def test_steps_stay_below_the_bound(kernel, dtype):
    ratios = []
    for seed, (rank, lengthscale, relative) in enumerate(
        [(20, 1.0, 1e-2), (20, 0.3, 1e-4), (100, 0.3, 1e-4), (100, 1.0, 1e-5), (20, 3.0, 1e-5), (300, 0.5, 1e-4)]
    ):
        x, y = problem(300, seed=seed, dtype=dtype, columns=2)
        block = functools.partial(kernel, lengthscale=lengthscale)
        fit = kernel_ridge(x, y, kernel=block, ridge=relative * 300, rank=rank, landmarks="uniform", rng=seed)
        assert np.all(true_residual(fit, block(x.astype(float), x.astype(float)), y) <= TOL[dtype] * (1 + 1e-6))
        ratios.append(fit.ratio)
    assert max(ratios) <= 1
    # Not so far above that it says nothing, where the landmarks explain nearly all.
    assert max(ratios) >= 0.15


def test_a_better_factor_takes_fewer_steps():
    x, y = problem(400)
    fits = [
        kernel_ridge(x, y, kernel=gaussian(0.3), ridge=4e-4, rank=rank, landmarks="uniform", rng=0)
        for rank in (10, 60, 200)
    ]
    assert np.all(np.diff([int(fit.iterations) for fit in fits]) < 0)
    assert np.all(np.diff([fit.bound for fit in fits]) < 0)


def test_the_landmarks_by_default_follow_the_points():
    x, y = problem(400)
    x[:40] *= 10  # sparse surroundings, which uniform landmarks miss
    options = {"kernel": gaussian(0.5), "ridge": 4e-4, "rank": 100, "rng": 0}
    adaptive, uniform = kernel_ridge(x, y, **options), kernel_ridge(x, y, **options, landmarks="uniform")
    assert adaptive.bound < uniform.bound / 10
    assert adaptive.iterations < uniform.iterations


def test_preconditioner_does_not_square_the_condition_number(monkeypatch):
    monkeypatch.setattr(solve, "_ROWS_AT_A_TIME", 16)
    factor, _ = from_spectrum(np.geomspace(1, 1e-6, 8), 40, 8)
    low_rank = LowRank(factor, None, np.arange(8), np.asarray(0.0), cholesky=np.eye(8), kernel=None)
    ridge = 1e-12
    u, s, _ = np.linalg.svd(factor, full_matrices=False)
    x = u @ np.random.default_rng(0).standard_normal((8, 2))
    b = u @ ((s**2 + ridge)[:, None] * (u.T @ x))
    error = solve._preconditioner(low_rank, ridge)(b) - x
    # Each row of Q₁ = F R⁻¹ is good to eps·κ(R), κ(R) = 1e6, and ‖b‖/ridge is the size of what cancels; from FᵀF it
    # would be eps·κ(R)² = 2e-4.
    assert np.linalg.norm(error) <= 20 * 2.0**-52 * 1e6 * np.linalg.norm(b) / ridge


# Single precision


def test_single_precision_reaches_a_true_residual_of_1e_4():
    x, y = problem(1500, noise=0.2, dtype=np.float32)
    ridge = 2e-6 * 1500  # the exact coefficients, rounded to float32, have the residual 4e-5
    fit = kernel_ridge(x, y, kernel=gaussian(0.5), ridge=ridge, rank=120, landmarks="uniform", rng=0)
    assert fit.coefficients.dtype == np.float32
    exact = gaussian_gram(x, 0.5)
    assert true_residual(fit, exact, y) <= 1e-4
    # It takes the true residual: the entries of K in float32, solved with no rounding at all, are not good enough.
    k = gaussian_kernel(x, x, lengthscale=0.5).astype(np.float64) + ridge * np.eye(1500)
    alpha = np.linalg.solve(k, y.astype(np.float64))
    assert np.linalg.norm(y - exact @ alpha - ridge * alpha) > 1e-4 * np.linalg.norm(y)


def test_single_precision_says_where_it_ends():
    # Noise has coefficients of the size 1/ridge, and float32 cannot hold them well enough.
    x, y = problem(300, noise=1.0, dtype=np.float32)
    options = {"kernel": gaussian(0.5), "ridge": 1e-3, "rank": 60, "landmarks": "uniform", "rng": 0, "tol": 1e-6}
    with pytest.warns(RuntimeWarning, match=r"1 of 1 columns of y did not reach the relative residual 1e-06") as caught:
        fit = kernel_ridge(x, y, **options)
    assert caught[0].filename == __file__
    assert true_residual(fit, gaussian_gram(x, 0.5), y) == pytest.approx(float(fit.residual), rel=1e-3)
    assert fit.ratio < 1  # it saw that rounding allowed no more, and stopped
    assert kernel_ridge(x.astype(float), y.astype(float), **options).residual <= 1e-6


def test_jax_without_double_precision():
    import jax

    with jax.enable_x64(False):
        x, y = (jax.numpy.asarray(a) for a in problem(dtype=np.float32))
        fit = kernel_ridge(x, y, kernel=gaussian(0.5), ridge=1.0, rank=12, landmarks="uniform", rng=0)
        assert fit.coefficients.dtype == jax.numpy.float32
        with pytest.raises(ValueError, match=r"ridge=0\.001 is out of the reach of rounding"):
            kernel_ridge(x, y, kernel=gaussian(0.5), ridge=1e-3, rank=12, landmarks="uniform", rng=0)
    assert true_residual(fit, gaussian_gram(to_host(x), 0.5), to_host(y)) <= 1.1e-4


def test_autocast_does_not_reach_inside():
    x, y = (torch.asarray(a) for a in problem(dtype=np.float32))
    options = {"kernel": gaussian(0.5), "ridge": 1e-2, "rank": 12, "landmarks": "uniform", "rng": 0}
    outside = kernel_ridge(x, y, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = kernel_ridge(x, y, **options)
        predicted = inside.predict(x)
    torch.testing.assert_close(inside.coefficients, outside.coefficients, rtol=0, atol=0)
    torch.testing.assert_close(predicted, outside.predict(x), rtol=0, atol=0)


# Memory


def test_tiles_change_nothing(xp, monkeypatch):
    x, y = problem(columns=2)
    x_, y_ = xp.asarray(x), xp.asarray(y)
    monkeypatch.setattr(solve, "_TILE", 17)
    namespace = solve.namespace(x=x_)
    k = gaussian_gram(x)
    for product in (
        solve._symmetric_product(x_, y_, gaussian_kernel, namespace),
        solve._product(x_, x_, y_, gaussian_kernel, namespace),
    ):
        # Sums of 40 terms of size 1.
        np.testing.assert_allclose(xp.check(product, like=x_, shape=(40, 2)), k @ y, rtol=0, atol=40 * 10 * 2.0**-52)


def test_only_half_of_the_matrix_is_evaluated(monkeypatch):
    monkeypatch.setattr(solve, "_TILE", 10)
    x, y = problem(100)
    entries = []

    def kernel(a, b):
        entries.append(a.shape[0] * b.shape[0])
        return gaussian_kernel(a, b)

    solve._symmetric_product(x, y[:, None], kernel, solve.namespace(x=x))
    assert sum(entries) == 100 * 110 / 2
    assert max(entries) == 100


def test_memory_of_the_prediction_is_bounded():
    x, y = problem(4000)
    fit = kernel_ridge(x, y, kernel=gaussian(0.5), ridge=1.0, rank=20, landmarks="uniform", rng=0)
    tracemalloc.start()
    fit.predict(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Six tiles of 512² in float64; the matrix would be 128 MB.
    assert peak < 6 * 512**2 * 8 < 4000**2 * 8 / 10


TWENTY_THOUSAND = """
import functools, resource
import numpy as np, scipy.linalg
from lowrank import gaussian_kernel, kernel_ridge

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
n, rng = 20_000, np.random.default_rng(0)
x = rng.uniform(-1, 1, (n, 2))
y = np.sin(4 * x[:, 0]) * np.cos(3 * x[:, 1]) + 0.1 * rng.standard_normal(n)
kernel = functools.partial(gaussian_kernel, lengthscale=0.3)
fit = kernel_ridge(x, y, kernel=kernel, ridge=1e-6 * n, rank=400, landmarks="uniform", rng=0)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(int(fit.iterations), fit.bound, float(fit.residual), peak / 1e6)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux alone")
def test_twenty_thousand_points_in_a_tenth_of_the_memory():
    done = subprocess.run([sys.executable, "-c", TWENTY_THOUSAND], capture_output=True, text=True, check=True)
    iterations, bound, residual, gigabytes = (float(word) for word in done.stdout.split())
    assert residual <= 1e-8
    assert 1 <= iterations <= min(25, bound)
    assert gigabytes < 20_000**2 * 8 / 1e9 / 10


# What it shows


def test_progress_bar(capsys):
    x, y = problem()
    options = {"kernel": gaussian(0.5), "ridge": 1e-2, "rank": 12, "landmarks": "uniform", "rng": 0}
    fit = kernel_ridge(x, y, **options)
    assert capsys.readouterr() == ("", "")
    kernel_ridge(x, y, **options, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{int(fit.iterations)}/{fit.bound}" in err
    assert "residual=" in err


def test_it_says_what_it_is(xp):
    x, y = problem(columns=2)
    fit = kernel_ridge(xp.asarray(x), xp.asarray(y), ridge=0.25, rank=12, landmarks="uniform", rng=0)
    assert repr(fit) == (
        f"KernelRidge(coefficients=(40, 2), ridge=0.25, rank=12, iterations={to_host(fit.iterations).max()} of at most "
        f"{fit.bound}, residual={to_host(fit.residual).max():.1e})"
    )
    with pytest.raises(AttributeError, match="cannot assign"):
        fit.ridge = 1.0


# Errors


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ridge_that_rounding_swallows_is_refused(dtype):
    x, y = problem(300, noise=0.01, dtype=dtype)
    options = {"kernel": gaussian(0.5), "rank": 100, "landmarks": "uniform", "rng": 0}
    largest = np.linalg.eigvalsh(gaussian_gram(x, 0.5))[-1]
    least = 10 * largest * max(float(np.finfo(dtype).eps), 2.0**-52 / TOL[dtype])
    with pytest.raises(ValueError, match=r"out of the reach of rounding.*must be at least .* larger ridge or tol"):
        kernel_ridge(x, y, ridge=0.98 * least, **options)
    fit = kernel_ridge(x, y, ridge=1.02 * least, **options)
    assert true_residual(fit, gaussian_gram(x, 0.5), y) <= TOL[dtype]


def test_refused_kernels(xp):
    x, y = (xp.asarray(a) for a in problem())
    options = {"ridge": 1e-3, "landmarks": [3, 17, 8, 0, 12]}

    def indefinite(a, b):
        # Positive semidefinite on the landmarks alone: what they leave over has the wrong sign.
        k = gaussian_kernel(a, b, lengthscale=0.2)
        return k - 0.5 if a.shape[0] != 5 and b.shape[0] != 5 else k

    with pytest.raises(ValueError, match=r"not symmetric positive semidefinite.*v = -"):
        kernel_ridge(x, y, kernel=indefinite, **options)
    with pytest.raises(TypeError, match="kernel must be a callable"):
        kernel_ridge(x, y, kernel=None, **options)


def test_refused_numbers(xp):
    x, y = (xp.asarray(a) for a in problem())
    for ridge in (0.0, -1.0, np.inf, np.nan, "1"):
        with pytest.raises(ValueError, match="ridge must be a positive number, finite, not"):
            kernel_ridge(x, y, ridge=ridge, rank=5)
    for tol in (0.0, -1.0, 1.0, np.nan, "1"):
        with pytest.raises(ValueError, match="tol must be a positive number, below 1, not"):
            kernel_ridge(x, y, ridge=1.0, rank=5, tol=tol)
    with pytest.raises(ValueError, match="rank must be from 1 to the number of points, 40"):
        kernel_ridge(x, y, ridge=1.0, rank=41)


def test_refused_arrays(xp):
    x, y = problem()
    x_ = xp.asarray(x)
    for points, values in ((x, y[:-1]), (x[:0], y[:0]), (x[None], y), (x, y[:, None, None]), (x[:, 0], y)):
        with pytest.raises(ValueError, match=r"x has shape .* and y .*; points of shape \(n, d\)"):
            kernel_ridge(xp.asarray(points), xp.asarray(values), ridge=1.0, rank=5)
    for bad in (np.nan, np.inf):
        broken = y.copy()
        broken[3] = bad
        with pytest.raises(ValueError, match=r"y \(shape \(40,\)\) has NaN or infinite values"):
            kernel_ridge(x_, xp.asarray(broken), ridge=1.0, rank=5)
    with pytest.raises(TypeError, match=r"float64 and y has dtype .*float32"):
        kernel_ridge(x_, xp.asarray(y.astype(np.float32)), ridge=1.0, rank=5)
    with pytest.raises(TypeError, match="y must be an array, not list"):
        kernel_ridge(x_, list(y), ridge=1.0, rank=5)
    fit = kernel_ridge(x_, xp.asarray(y), ridge=1.0, rank=5, landmarks="uniform")
    with pytest.raises(ValueError, match=r"x_new has shape \(40, 1\); .* points of shape \(m, 2\)"):
        fit.predict(x_[:, :1])
    with pytest.raises(TypeError, match="x_new has dtype"):
        fit.predict(xp.asarray(x.astype(np.float32)))


def test_derivatives_are_refused_rather_than_wrong():
    import jax

    x, y = (torch.asarray(a) for a in problem())
    with pytest.raises(TypeError, match=r"y carries derivatives.*detach"):
        kernel_ridge(x, y.clone().requires_grad_(), ridge=1.0, rank=5)
    with pytest.raises(TypeError, match=r"x carries derivatives.*detach"):
        kernel_ridge(x.clone().requires_grad_(), y, ridge=1.0, rank=5, landmarks="uniform")
    trained = functools.partial(gaussian_kernel, lengthscale=torch.ones((), dtype=x.dtype, requires_grad=True))
    with pytest.raises(TypeError, match=r"kernel's parameters carry derivatives.*detach"):
        kernel_ridge(x, y, kernel=trained, ridge=1.0, rank=5, landmarks="uniform")
    x, y = (jax.numpy.asarray(a) for a in problem())
    with pytest.raises(TypeError, match="traced program"):
        jax.jit(lambda y: kernel_ridge(x, y, ridge=1.0, rank=5).coefficients)(y)
