"""Row chunks: the factor and the fit of one array, whatever the chunks, the scheduler, and who dies on the way."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
from conftest import gaussian_gram
from scipy.stats import chisquare

import lowrank
from lowrank import _chunk
from lowrank import dask as chunked
from lowrank._array import to_host
from lowrank.kernels import gaussian_kernel, matern32_kernel

KERNEL = functools.partial(gaussian_kernel, lengthscale=2.0)
DTYPES = [np.float32, np.float64]
EPS = np.finfo(np.float64).eps


@pytest.fixture(autouse=True)
def _one_thread_at_a_time():
    with dask.config.set(scheduler="synchronous"):
        yield


def points(n, d=3, *, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(dtype)


def targets(x):
    return np.sin(x).sum(axis=1)


def lazy(x, rows=70):
    return da.from_array(x, chunks=(rows, *x.shape[1:]))


def loading(x, loads, rows=70):
    """x as a Dask array that notes which chunks are read."""

    def read(start):
        loads.append(start)
        return x[start : start + rows]

    parts = [
        da.from_delayed(dask.delayed(read)(i), shape=x[i : i + rows].shape, dtype=x.dtype)
        for i in range(0, len(x), rows)
    ]
    return da.concatenate(parts)


# The factor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("landmarks", ["uniform", "indices", "points"])
def test_the_factor_is_that_of_one_array(landmarks, dtype):
    x = points(300, dtype=dtype)
    chosen = {"uniform": "uniform", "indices": [150, 3, 299, 70, 69], "points": points(5, seed=1, dtype=dtype)}
    arguments = {"kernel": KERNEL, "landmarks": chosen[landmarks], "rank": 5, "rng": 3}
    whole, result = lowrank.nystrom(x, **arguments), chunked.nystrom(lazy(x), **arguments)
    assert result.shape == (300, 300)
    assert result.rank == 5
    assert result.factor.chunks == ((70, 70, 70, 70, 20), (5,))
    assert result.dtype == result.trace_error.dtype == dtype
    assert result.landmarks.dtype == dtype
    np.testing.assert_array_equal(result.landmarks, whole.landmarks)
    if landmarks == "points":
        assert result.pivots is None
    else:
        np.testing.assert_array_equal(result.pivots, whole.pivots)
    factor, error = dask.compute(result.factor, result.trace_error)
    assert factor.dtype == dtype
    # The same operations, but BLAS sums in an order that depends on the shapes.
    np.testing.assert_allclose(factor, whole.factor, rtol=0, atol=100 * np.finfo(dtype).eps)
    assert float(error) == pytest.approx(float(whole.trace_error), rel=float(100 * np.finfo(dtype).eps))
    new = points(7, seed=2, dtype=dtype)
    np.testing.assert_allclose(result.features(x), whole.factor, rtol=0, atol=100 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(result.features(lazy(new, 7)).compute(), result.features(new))
    assert "shape=(300, 300), rank=5" in repr(result)


def test_nothing_is_read_before_it_is_needed_and_then_once():
    x, loads, calls = points(300), [], []

    def kernel(a, b):
        calls.append(tuple(a.shape[:-1]) + tuple(b.shape[-2:-1]))
        return KERNEL(a, b)

    result = chunked.nystrom(loading(x, loads), kernel=kernel, landmarks=points(5, seed=1))
    assert loads == []
    assert calls == [(5, 5)]
    dask.compute(result.trace_error, result.factor.sum(axis=0))
    assert sorted(loads) == [0, 70, 140, 210, 280]
    assert sorted(call for call in calls if call[-1] == 5)[1:] == [(20, 5), *[(70, 5)] * 4]


def test_rows_as_landmarks_are_read_from_their_chunks_alone():
    loads = []
    x = points(300)
    result = chunked.nystrom(loading(x, loads), kernel=KERNEL, landmarks=[75, 299, 71])
    assert sorted(loads) == [70, 280]
    np.testing.assert_array_equal(result.landmarks, x[[75, 299, 71]])


def test_chunks_of_no_rows_and_memory_maps(tmp_path):
    x = points(100, dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    parts = [
        da.from_delayed(dask.delayed(mapped[i:j]), (j - i, 3), np.float32) for i, j in ((0, 40), (40, 40), (40, 100))
    ]
    for x_ in (da.concatenate(parts, allow_unknown_chunksizes=False), da.from_array(mapped, chunks=(30, 3))):
        fit = chunked.ridge(x_, x_[:, 0], kernel=KERNEL, landmarks=x[:9], ridge=1e-3)
        whole = chunked.ridge(lazy(x, 100), lazy(x[:, 0], 100), kernel=KERNEL, landmarks=x[:9], ridge=1e-3)
        np.testing.assert_allclose(fit.predict(x_).compute(), whole.predict(x), rtol=0, atol=1e-6)
        pivots = chunked.rpcholesky(x_, kernel=KERNEL, rank=9, rng=0)
        np.testing.assert_array_equal(pivots, chunked.rpcholesky(lazy(x, 100), kernel=KERNEL, rank=9, rng=0))


# The ridge fit


def by_least_squares(x, y, z, ridge, kernel=KERNEL):
    """β, the fitted values and the condition of the normal equations, from an SVD of [F; √ridge·I] in float64."""
    low_rank = lowrank.nystrom(x, kernel=kernel, landmarks=z)
    f = low_rank.factor
    stacked = np.concatenate([f, np.sqrt(ridge) * np.eye(f.shape[1])])
    right = np.concatenate([y, np.zeros((f.shape[1], *y.shape[1:]))])
    beta, _, _, s = np.linalg.lstsq(stacked, right, rcond=None)
    return beta, f @ beta, (s[0] / s[-1]) ** 2, low_rank


@pytest.mark.parametrize("several", [False, True])
def test_ridge_is_the_minimum(several):
    x, z = points(300), points(12, seed=1)
    y = np.stack([targets(x), x[:, 0] ** 2], axis=1) if several else targets(x)
    beta, fitted, condition, low_rank = by_least_squares(x, y, z, 1e-3)
    assert 1e2 < condition < 1e8
    y_ = lazy(y, 110)
    fit = chunked.ridge(lazy(x), y_, kernel=KERNEL, landmarks=z, ridge=1e-3)
    assert fit.coefficients.shape == beta.shape
    assert fit.coefficients.dtype == np.float64
    error = np.linalg.norm(fit.coefficients - beta, axis=0)
    assert np.all(error <= 10 * condition * EPS * np.linalg.norm(beta, axis=0))
    np.testing.assert_allclose(fit.residual, np.linalg.norm(y - fitted, axis=0), rtol=1e-6)
    assert fit.trace_error == pytest.approx(float(low_rank.trace_error), rel=1e-10)
    predicted = fit.predict(lazy(x))
    assert isinstance(predicted, da.Array)
    assert predicted.chunks[0] == (70, 70, 70, 70, 20)
    assert predicted.shape == y.shape
    # ‖F(β̂ − β)‖ for an error of β in the direction of a large singular value.
    np.testing.assert_allclose(
        predicted.compute(), fitted, rtol=0, atol=100 * np.sqrt(condition) * EPS * np.abs(y).max()
    )
    np.testing.assert_array_equal(fit.predict(x[:70]), predicted[:70].compute())
    assert "RidgeFit(rank=12" in repr(fit)


def test_ridge_in_single_precision():
    x, z = points(300), points(12, seed=1)
    x32, z32 = x.astype(np.float32), z.astype(np.float32)
    y = targets(x)
    _, fitted, _, _ = by_least_squares(x32.astype(np.float64), y, z32.astype(np.float64), 1e-3)
    fit = chunked.ridge(lazy(x32), lazy(y.astype(np.float32)), kernel=KERNEL, landmarks=z32, ridge=1e-3)
    assert fit.predict(x32).dtype == fit.predict(lazy(x32)).dtype == np.float32
    # The shift of the core is 30 eps·‖W‖ in single precision: it is a perturbation of the features' metric by
    # 30 eps·‖W‖/λ(W), felt where the fit needs small λ: the square root, by interpolation.
    atol = np.sqrt(30 * np.finfo(np.float32).eps) * np.abs(y).max()
    np.testing.assert_allclose(fit.predict(x32), fitted, rtol=0, atol=atol)


def test_least_squares_without_a_ridge():
    x, z = points(200), points(6, seed=1)
    y = targets(x)
    _, fitted, condition, _ = by_least_squares(x, y, z, 0.0)
    fit = chunked.ridge(lazy(x), lazy(y), kernel=KERNEL, landmarks=z, ridge=0)
    np.testing.assert_allclose(fit.predict(x), fitted, rtol=0, atol=10 * condition * EPS)


def test_every_chunk_is_read_once_and_every_kernel_value_computed_once():
    data, loads, calls = np.concatenate([points(300), targets(points(300))[:, None]], axis=1), [], []

    def kernel(a, b):
        calls.append(tuple(a.shape[:-1]) + tuple(b.shape[-2:-1]))
        return KERNEL(a, b)

    both = loading(data, loads)  # x and y from one file
    chunked.ridge(both[:, :3], both[:, 3], kernel=kernel, landmarks=points(5, seed=1), ridge=0.1)
    assert sorted(loads) == [0, 70, 140, 210, 280]
    assert sorted(call for call in calls if call[-1] == 5) == [(5, 5), (20, 5), *[(70, 5)] * 4]


@pytest.mark.parametrize("dtype", DTYPES)
def test_schedulers_agree(dtype):
    x = points(500, dtype=dtype)
    y = targets(x)
    results = []
    for scheduler in ("synchronous", "threads"):
        with dask.config.set(scheduler=scheduler):
            pivots = chunked.rpcholesky(lazy(x), kernel=KERNEL, rank=20, rng=5)
            fit = chunked.ridge(lazy(x), lazy(y), kernel=KERNEL, landmarks=pivots, ridge=1e-3)
            factor = chunked.nystrom(lazy(x), kernel=KERNEL, landmarks=pivots).factor.compute()
            results.append((pivots, fit.coefficients, fit.trace_error, fit.residual, factor))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10)


@pytest.mark.parametrize("rows", [1, 13, 500])
def test_chunks_matter_to_rounding(rows):
    n = 40 if rows == 1 else 500
    x, z = points(n), points(8, seed=1)
    y = targets(x)
    reference = chunked.ridge(lazy(x, 70), lazy(y, 70), kernel=KERNEL, landmarks=z, ridge=1e-3)
    _, _, condition, _ = by_least_squares(x, y, z, 1e-3)
    fit = chunked.ridge(lazy(x, rows), lazy(y, rows), kernel=KERNEL, landmarks=z, ridge=1e-3)
    error = np.linalg.norm(fit.coefficients - reference.coefficients)
    assert error <= 10 * condition * EPS * np.linalg.norm(reference.coefficients)
    assert fit.trace_error == pytest.approx(reference.trace_error, rel=1e-11)
    pivots = chunked.rpcholesky(lazy(x, rows), kernel=KERNEL, rank=15, rng=1)
    np.testing.assert_array_equal(pivots, chunked.rpcholesky(lazy(x, 70), kernel=KERNEL, rank=15, rng=1))


def test_blocks_within_a_chunk(monkeypatch):
    x, z = points(200), points(8, seed=1)
    y = targets(x)

    def everything():
        fit = chunked.ridge(lazy(x), lazy(y), kernel=KERNEL, landmarks=z, ridge=1.0)
        factor = chunked.nystrom(lazy(x), kernel=KERNEL, landmarks=z).factor.compute()
        return fit.coefficients, fit.predict(x), factor, chunked.rpcholesky(lazy(x), kernel=KERNEL, rank=20, rng=0)

    expected = everything()
    monkeypatch.setattr(_chunk, "_BLOCK_ENTRIES", 33)
    for got, want in zip(everything(), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-11)


def test_memory_is_a_few_blocks_however_large_the_chunk():
    x, z = points(200_000, 1), points(50, 1, seed=1)
    tracemalloc.start()
    chunked.ridge(lazy(x, 200_000), lazy(x[:, 0], 200_000), kernel=KERNEL, landmarks=z, ridge=1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # F has 80 MB; the blocks 2²¹ entries of 8 bytes, and six of these at most live at a time besides a few of x.
    assert 200_000 * 50 * 8 < 5 * 2**24
    assert peak < 6 * 2**24


# Landmarks


def one_by_one(k, rank, rng):
    """The simple algorithm, in float64."""
    left, factor, pivots = np.diagonal(k).copy(), np.zeros((len(k), 0)), []
    for _ in range(rank):
        s = rng.choice(len(k), p=left / left.sum())
        g = k[:, s] - factor @ factor[s]
        factor = np.column_stack([factor, g / np.sqrt(g[s])])
        left = np.maximum(left - factor[:, -1] ** 2, 0)
        left[s] = 0
        pivots.append(s)
    return pivots, left.sum()


def test_pairs_of_pivots_have_the_right_probabilities():
    # Rows of unequal diagonal and strong correlations, in chunks of 3: all 12 ordered pairs are enumerated.
    x = np.asarray([[0.0], [0.3], [0.9], [2.5]])

    def kernel(a, b):
        return (1 + 0.5 * a) * gaussian_kernel(a, b) * np.swapaxes(1 + 0.5 * b, -1, -2)

    k = kernel(x, x)
    first = np.diagonal(k) / np.trace(k)
    left = np.maximum(np.diagonal(k)[None] - k**2 / np.diagonal(k)[:, None], 0)
    probabilities = first[:, None] * left / left.sum(axis=1, keepdims=True)
    draws, counts, rng = 300, np.zeros((4, 4)), np.random.default_rng(0)
    for _ in range(draws):
        i, j = chunked.rpcholesky(lazy(x, 3), kernel=kernel, rank=2, rng=rng)
        counts[i, j] += 1
    assert np.all(np.diagonal(counts) == 0)
    likely = probabilities * draws >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(probabilities[likely], probabilities[~likely].sum()) * draws
    assert likely.sum() == 8
    assert chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_pivots_are_as_good_as_one_by_one(dtype):
    # Decaying: several rounds, in which most proposals are rejected.
    x = points(400, 2, dtype=dtype)
    k = gaussian_gram(x, 1.0)
    simple = [one_by_one(k, 30, np.random.default_rng(seed))[1] for seed in range(30)]
    got = [
        float(
            lowrank.nystrom(
                x, landmarks=chunked.rpcholesky(lazy(x), kernel=gaussian_kernel, rank=30, rng=s)
            ).trace_error
        )
        for s in range(30)
    ]
    spread = np.sqrt((np.var(simple) + np.var(got)) / 30)
    assert abs(np.mean(got) - np.mean(simple)) < 4 * spread
    uniform = [float(lowrank.nystrom(x, rank=30, rng=seed).trace_error) for seed in range(30)]
    assert np.mean(got) < 0.5 * np.mean(uniform)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tolerance_cuts_at_the_first_pivot_that_meets_it(dtype):
    x = points(400, 2, dtype=dtype)
    most = chunked.rpcholesky(lazy(x), kernel=gaussian_kernel, rank=60, rng=7)
    for rtol in (0.5, 0.05, 1e-2):
        pivots = chunked.rpcholesky(lazy(x), kernel=gaussian_kernel, rank=60, rng=7, rtol=rtol)
        assert 0 < len(pivots) < 60
        np.testing.assert_array_equal(pivots, most[: len(pivots)])
        errors = [float(lowrank.nystrom(x, landmarks=pivots[: len(pivots) - cut]).trace_error) for cut in (0, 1)]
        assert errors[0] <= rtol * 400 * (1 + 1e-4) < errors[1] * (1 + 2e-4)
    few = chunked.rpcholesky(lazy(x), kernel=gaussian_kernel, rank=5, rng=7, rtol=1e-2)
    assert len(few) == 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_is_found_where_there_is_no_more(dtype):
    duplicates = np.repeat(points(8, dtype=dtype), 10, axis=0)
    pivots = chunked.rpcholesky(lazy(duplicates), kernel=gaussian_kernel, rank=40, rng=0)
    assert sorted(np.asarray(pivots) // 10) == list(range(8))
    assert len(chunked.rpcholesky(lazy(np.full((80, 3), 7.3, dtype=dtype)), kernel=KERNEL, rank=40, rng=0)) == 1
    # All but the leading eigenvalues are below rounding: distinct pivots, and nothing left that is not rounding.
    x = points(300, 1, dtype=dtype)
    pivots = chunked.rpcholesky(lazy(x), kernel=KERNEL, rank=200, rng=0)
    assert len(set(pivots.tolist())) == len(pivots) < 60
    error = lowrank.nystrom(x, kernel=KERNEL, landmarks=pivots).trace_error
    assert float(error) <= 100 * np.finfo(dtype).eps * 300 * np.sqrt(len(pivots))


def test_all_rows_can_be_drawn():
    x = 10 * points(50)
    np.testing.assert_array_equal(
        np.sort(chunked.rpcholesky(lazy(x, 8), kernel=gaussian_kernel, rank=50, rng=0)), range(50)
    )


def test_a_zero_matrix_has_a_zero_factor():
    def zero(a, b):
        return 0 * gaussian_kernel(a, b)

    x = lazy(points(100))
    assert len(chunked.rpcholesky(x, kernel=zero, rank=5, rng=0)) == 1
    result = chunked.nystrom(x, kernel=zero, landmarks="rpcholesky", rank=5, rng=0)
    np.testing.assert_array_equal(result.factor.compute(), 0)


def test_landmarks_by_name_by_function_and_with_a_tolerance():
    x = lazy(points(300))
    named = chunked.nystrom(x, kernel=KERNEL, landmarks="rpcholesky", rank=20, rng=2)
    np.testing.assert_array_equal(named.pivots, chunked.rpcholesky(x, kernel=KERNEL, rank=20, rng=2))
    by_tolerance = functools.partial(chunked.rpcholesky, rtol=0.1)
    enough = chunked.nystrom(x, kernel=KERNEL, landmarks=by_tolerance, rank=20, rng=2)
    assert enough.rank < 20
    assert float(enough.trace_error.compute()) <= 0.1 * 300
    means = chunked.nystrom(x, kernel=KERNEL, landmarks=lambda x, /, *, rank, kernel, rng: x[:rank] + 1, rank=4)
    np.testing.assert_array_equal(means.landmarks, points(300)[:4] + 1)
    assert means.pivots is None


# Chunks of any library


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_any_library(xp, dtype):
    x, z = points(30, dtype=dtype), points(6, seed=1, dtype=dtype)
    y = targets(x)
    core, _ = chunked._core(lazy(x), KERNEL, z, None, None)
    x_, y_ = xp.asarray(x), xp.asarray(y)
    tolerance = {"rtol": 0, "atol": 300 * np.finfo(dtype).eps}
    rows = xp.check(_chunk.feature_rows(x_, core, start=0, name="x"), like=x_, shape=(30, 6))
    np.testing.assert_allclose(rows, _chunk.feature_rows(x, core, start=0, name="x"), **tolerance)
    beta = np.linspace(-1, 1, 6)
    predicted = xp.check(_chunk.predicted_rows(x_, core, start=0, name="x", coefficients=beta), like=x_, shape=(30,))
    np.testing.assert_allclose(
        predicted, _chunk.predicted_rows(x, core, start=0, name="x", coefficients=beta), **tolerance
    )
    left = _chunk.unexplained(x_, _chunk.feature_rows(x_, core, start=0, name="x"), kernel=KERNEL)
    assert to_host(left).shape == (30,)
    got, expected = _chunk.sums(x_, y_, 0, core), _chunk.sums(x, y, 0, core)
    np.testing.assert_allclose(got.products, expected.products, rtol=0, atol=30 * 300 * np.finfo(dtype).eps)
    assert got.trace == pytest.approx(expected.trace, rel=1e-4 if dtype == np.float32 else 1e-12)
    assert got.trace == pytest.approx(float(to_host(left).sum()), rel=1e-4 if dtype == np.float32 else 1e-12)
    assert got.bad_x == got.bad_y == np.inf
    x[17, 1] = y[4] = np.nan
    bad = _chunk.sums(xp.asarray(x), xp.asarray(y), 100, core)
    assert (bad.bad_x, bad.bad_y) == (117, 104)


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_within_chunks_of_any_library(xp, dtype):
    x = points(30, dtype=dtype)
    x_ = xp.asarray(x)
    blocks = [_chunk.Block(x[:2], np.linalg.cholesky(KERNEL(x[:2], x[:2]).astype(np.float64)))]
    before = _chunk.residual(x_, 0, [], KERNEL, 0)
    assert _chunk.summary(before).total == pytest.approx(30)
    after = _chunk.residual(x_, 0, blocks, KERNEL, 2)
    left = to_host(after.left)
    assert left[0] == left[1] == 0
    assert np.all(left[2:] > 0)
    assert after.columns.sum() == pytest.approx(30 - left.sum(), rel=1e-5)
    running = np.cumsum(left)
    rows, drawn, proposed = _chunk.drawn(after, x_, np.asarray([0.0, running[4], 2 * running[-1], -1e-17]))
    np.testing.assert_array_equal(rows, [2, 5, 29, 2])
    np.testing.assert_array_equal(drawn, x[rows])
    np.testing.assert_array_equal(proposed, left[rows])
    np.testing.assert_array_equal(_chunk.rows_at(x_, np.asarray([4, 0])), x[[4, 0]])


def test_chunks_on_a_gpu():
    cupy = pytest.importorskip("cupy", reason="CuPy chunks need CuPy and a CUDA device")
    x = points(300)
    x_ = da.from_array(cupy.asarray(x), chunks=(70, 3), asarray=False)
    y_ = cupy.sin(x_).sum(axis=1)
    fit = chunked.ridge(x_, y_, kernel=KERNEL, landmarks=x_[:9], ridge=1e-3)
    expected = chunked.ridge(lazy(x), lazy(targets(x)), kernel=KERNEL, landmarks=x[:9], ridge=1e-3)
    np.testing.assert_allclose(fit.coefficients, expected.coefficients, rtol=1e-9)
    predicted = fit.predict(x_).compute()
    assert isinstance(predicted, cupy.ndarray)
    np.testing.assert_allclose(cupy.asnumpy(predicted), expected.predict(x), rtol=0, atol=1e-9)
    pivots = chunked.rpcholesky(x_, kernel=KERNEL, rank=20, rng=0)
    np.testing.assert_array_equal(pivots, chunked.rpcholesky(lazy(x), kernel=KERNEL, rank=20, rng=0))
    result = chunked.nystrom(x_, kernel=KERNEL, landmarks=pivots)
    assert isinstance(result.factor.compute(), cupy.ndarray)
    assert float(result.trace_error.compute()) > 0


# A file


def test_the_example_fits_a_memory_map_and_cleans_up(tmp_path):
    script = Path(__file__).parents[1] / "examples" / "out_of_core.py"
    command = [sys.executable, str(script), "--rows", "500", "--chunk", "100", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [int(row[0]) for row in rows] == [25, 50, 100, 200]
    assert float(rows[-1][2]) < float(rows[0][2]) < 1
    assert [path.name for path in tmp_path.iterdir()] == ["out_of_core.png"]
    assert (tmp_path / "out_of_core.png").read_bytes().startswith(b"\x89PNG")


# Many processes


def processes():
    from distributed import LocalCluster

    # Port 0 is any free one. Without an address the scheduler's server insists on 8787, and warns where that is taken.
    with dask.config.set({"distributed.comm.timeouts.connect": "10s"}):
        return LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0")


def everything(x, y, kernel):
    pivots = chunked.rpcholesky(x, kernel=kernel, rank=15, rng=0)
    fit = chunked.ridge(x, y, kernel=kernel, landmarks=pivots, ridge=1e-3)
    low_rank = chunked.nystrom(x, kernel=kernel, landmarks=pivots)
    factor, error = dask.compute(low_rank.factor, low_rank.trace_error)
    return pivots, fit.coefficients, fit.trace_error, fit.residual, fit.predict(x).compute(), factor, error


def test_processes_agree_with_threads():
    from distributed import Client

    x = points(1000)
    x, y = lazy(x, 100), lazy(targets(x), 100)
    with dask.config.set(scheduler="threads"):
        expected = everything(x, y, KERNEL)
    with processes() as cluster, Client(cluster), dask.config.set(scheduler="distributed"):
        got = everything(x, y, KERNEL)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10)


@pytest.mark.parametrize("work", ["ridge", "rpcholesky"])
def test_a_worker_killed_midway_changes_nothing(work, tmp_path):
    from distributed import Client

    x = points(1000)
    x, y, z = lazy(x, 50), lazy(targets(x), 50), points(8, seed=1)

    def slow(a, b, folder=str(tmp_path), kernel=KERNEL):
        """The kernel, which leaves a file for each of its calls with the rows of a chunk."""
        import os
        import time
        import uuid

        if a.shape[-2] == 50:
            time.sleep(0.05)
            with open(f"{folder}/{uuid.uuid4()}", "w") as file:
                file.write(str(os.getpid()))
        return kernel(a, b)

    def result(kernel):
        if work == "rpcholesky":
            return chunked.rpcholesky(x, kernel=kernel, rank=20, rng=0), None
        fit = chunked.ridge(x, y, kernel=kernel, landmarks=z, ridge=1e-3)
        return fit.coefficients, fit.trace_error

    with dask.config.set(scheduler="threads"):
        expected = result(KERNEL)
    seen = []
    with processes() as cluster, Client(cluster) as client, dask.config.set(scheduler="distributed"):
        workers = sorted(client.run(os.getpid).values())

        def kill():
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                calls = [path.read_text() for path in Path(tmp_path).iterdir()]
                if calls.count(str(workers[0])) >= 3:
                    os.kill(workers[0], signal.SIGKILL)
                    seen.append(len(calls))
                    return
                time.sleep(0.005)

        killer = threading.Thread(target=kill)
        killer.start()
        got = result(slow)
        killer.join()
        calls = [int(path.read_text()) for path in tmp_path.iterdir()]
    # Killed while most chunks were still to come, and the dead worker's were computed by another.
    assert len(seen) == 1
    assert seen[0] < 20
    assert len(calls) > 20
    assert set(calls) - {workers[0]}
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-10)
    if work == "ridge":
        assert got[1] == pytest.approx(expected[1], rel=1e-10)


# What is refused


def test_refused_arrays():
    x, y = points(20), targets(points(20))
    x_, y_ = lazy(x), lazy(y)
    calls = {
        "nystrom": lambda x: chunked.nystrom(x, kernel=KERNEL, rank=3),
        "rpcholesky": lambda x: chunked.rpcholesky(x, kernel=KERNEL, rank=3),
        "ridge": lambda x: chunked.ridge(x, y_, kernel=KERNEL, rank=3, ridge=1.0),
    }
    for call in calls.values():
        with pytest.raises(TypeError, match=r"x must be a Dask array, not ndarray; wrap it by dask.array.from_array"):
            call(x)
        with pytest.raises(ValueError, match=r"x has chunks of unknown size .*x\.compute_chunk_sizes\(\)"):
            call(x_[x_[:, 0] > 0])
        with pytest.raises(ValueError, match=r"x has 3 chunks along its second axis.*x\.rechunk\(\{1: -1\}\)"):
            call(x_.rechunk((10, 1)))
        with pytest.raises(ValueError, match=r"x must have two axes.*\(20,\)"):
            call(x_[:, 0])
        with pytest.raises(ValueError, match=r"x has no rows \(shape \(0, 3\)\)"):
            call(x_[:0])
        for dtype in (np.int64, np.float16, np.complex128):
            with pytest.raises(TypeError, match=f"x has dtype {np.dtype(dtype)}"):
                call(x_.astype(dtype))


def test_unknown_chunks_can_be_computed():
    x_ = lazy(points(200))
    x_ = x_[x_[:, 0] > 0]
    x_.compute_chunk_sizes()
    assert chunked.nystrom(x_, kernel=KERNEL, rank=3, rng=0).factor.compute().shape == (x_.shape[0], 3)


def test_refused_targets():
    x = lazy(points(20))

    def fit(y, **arguments):
        return chunked.ridge(x, y, kernel=KERNEL, rank=3, rng=0, **{"ridge": 1.0, **arguments})

    with pytest.raises(TypeError, match=r"y must be a Dask array, not ndarray; wrap it"):
        fit(np.ones(20))
    with pytest.raises(ValueError, match=r"y has shape \(19,\); for x of shape \(20, 3\) it must be \(20,\)"):
        fit(da.ones(19))
    with pytest.raises(ValueError, match=r"y has shape \(20, 1, 1\)"):
        fit(da.ones((20, 1, 1)))
    with pytest.raises(TypeError, match="x has dtype float64 and y has dtype float32"):
        fit(da.ones(20, dtype=np.float32))
    with pytest.raises(ValueError, match=r"y has shape \(\); for x"):
        fit(da.ones(()))
    y = da.ones(30)
    with pytest.raises(ValueError, match=r"y has chunks of unknown size .*y\.compute_chunk_sizes\(\)"):
        fit(y[y > 0])
    for ridge in (-1.0, np.inf, np.nan, "1", None, True):
        with pytest.raises(ValueError, match="ridge must be a finite number, not negative"):
            fit(da.ones(20), ridge=ridge)


def test_refused_new_points():
    fit = chunked.ridge(lazy(points(20)), da.ones(20), kernel=KERNEL, rank=3, rng=0, ridge=1.0)
    low_rank = chunked.nystrom(lazy(points(20)), kernel=KERNEL, rank=3, rng=0)
    for call in (fit.predict, low_rank.features):
        for make in (np.asarray, lazy):
            with pytest.raises(ValueError, match=r"x_new has shape \(5, 2\); the landmarks need \(n_new, 3\)"):
                call(make(points(5, 2)))
            with pytest.raises(TypeError, match="x_new has dtype float32 and the landmarks have float64"):
                call(make(points(5, dtype=np.float32)))
        with pytest.raises(ValueError, match=r"x_new has 3 chunks along its second axis"):
            call(lazy(points(5)).rechunk((5, 1)))
        with pytest.raises(TypeError, match="x_new must be an array, not list"):
            call([[1.0, 2.0, 3.0]])
        with pytest.raises(ValueError, match="row 1 of x_new holds NaN"):
            call(np.asarray([[0.0] * 3, [np.nan] * 3]))


def test_refused_ranks_and_landmarks():
    x = lazy(points(20))
    for bad in (0, -1, 21):
        for call in (chunked.nystrom, chunked.rpcholesky):
            with pytest.raises(ValueError, match=rf"rank must be from 1 to the number of points, 20 .*not {bad}"):
                call(x, kernel=KERNEL, rank=bad)
    with pytest.raises(TypeError, match="rank must be an int"):
        chunked.nystrom(x, rank=2.0)
    with pytest.raises(ValueError, match="rank, the number of landmarks, is needed"):
        chunked.nystrom(x)
    with pytest.raises(ValueError, match=r"one of \['rpcholesky', 'uniform'\].*not 'kmeans'"):
        chunked.nystrom(x, landmarks="kmeans", rank=3)
    with pytest.raises(ValueError, match="holds indices from 0 to 20"):
        chunked.nystrom(x, landmarks=[0, 20])
    with pytest.raises(ValueError, match="landmarks is empty"):
        chunked.nystrom(x, landmarks=[])
    with pytest.raises(ValueError, match="there are 21 landmarks for 20 points"):
        chunked.nystrom(x, landmarks=points(21))
    with pytest.raises(ValueError, match="rank is 3 and there are 2 landmarks"):
        chunked.nystrom(x, landmarks=[0, 1], rank=3)
    with pytest.raises(ValueError, match=r"landmarks have shape \(3, 5\); for x of shape \(20, 3\)"):
        chunked.nystrom(x, landmarks=points(3, 5))
    with pytest.raises(TypeError, match="must be a name, a callable, indices or points, not NoneType"):
        chunked.nystrom(x, landmarks=None)
    with pytest.raises(TypeError, match="rng must be None"):
        chunked.nystrom(x, rank=2, rng="seed")
    for rtol in (-0.1, 1.0, np.nan, "1", True):
        with pytest.raises(ValueError, match="rtol must be a number from 0 to below 1"):
            chunked.rpcholesky(x, kernel=KERNEL, rank=2, rtol=rtol)


def test_refused_kernels():
    x, z = lazy(points(20)), points(3, seed=1)
    for call in (
        lambda kernel: chunked.nystrom(x, kernel=kernel, rank=3),
        lambda kernel: chunked.rpcholesky(x, kernel=kernel, rank=3),
    ):
        with pytest.raises(ValueError, match="a Dask array holds points here, not the matrix K"):
            call(None)
    with pytest.raises(ValueError, match="the kernel is not positive semidefinite"):
        chunked.nystrom(x, kernel=lambda a, b: -gaussian_kernel(a, b), landmarks=z)
    with pytest.raises(ValueError, match="the kernel has a negative diagonal, k"):
        chunked.rpcholesky(x, kernel=lambda a, b: -gaussian_kernel(a, b), rank=3)
    with pytest.raises(ValueError, match=r"returned a block of shape \(3, 20\) for points of shapes \(20, 3\)"):
        chunked.ridge(x, da.ones(20), kernel=lambda a, b: gaussian_kernel(b, a), landmarks=z, ridge=1.0)


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_the_first_row_that_is_not_finite_is_named(scheduler):
    x, y = points(300), targets(points(300))
    bad = x.copy()
    bad[[95, 123, 290], [0, 2, 1]] = np.nan, np.inf, np.nan
    z = points(3, seed=1)
    with dask.config.set(scheduler=scheduler):
        with pytest.raises(ValueError, match="row 95 of x holds NaN or infinite values"):
            chunked.ridge(lazy(bad), lazy(y), kernel=KERNEL, landmarks=z, ridge=1.0)
        with pytest.raises(ValueError, match="row 95 of x holds NaN or infinite values"):
            chunked.rpcholesky(lazy(bad), kernel=KERNEL, rank=3, rng=0)
        with pytest.raises(ValueError, match="row 123 of x holds NaN or infinite values"):
            chunked.nystrom(lazy(bad), kernel=KERNEL, landmarks=[0, 290, 123])
        lost = y.copy()
        lost[[211, 250]] = np.nan
        with pytest.raises(ValueError, match="row 211 of y holds NaN or infinite values"):
            chunked.ridge(lazy(x), lazy(lost), kernel=KERNEL, landmarks=z, ridge=1.0)
        bad[[95, 123]] = 0
        result = chunked.nystrom(lazy(bad), kernel=KERNEL, landmarks=z)
        for lazily in (result.factor, result.trace_error):
            with pytest.raises(ValueError, match="row 290 of x holds NaN or infinite values"):
                lazily.compute()


def test_a_singular_fit_without_a_ridge_names_the_rank():
    x = np.repeat(points(4), 10, axis=0)
    y = targets(x)
    z = np.concatenate([points(4), points(3)])
    with pytest.raises(ValueError, match=r"FᵀF \+ ridge·I is singular: F has 7 columns, the rank 4 in float64"):
        chunked.ridge(lazy(x, 7), lazy(y, 7), kernel=matern32_kernel, landmarks=z, ridge=0.0)
    fit = chunked.ridge(lazy(x, 7), lazy(y, 7), kernel=matern32_kernel, landmarks=z, ridge=1e-8)
    np.testing.assert_allclose(fit.predict(x), y, rtol=0, atol=1e-6)
