"""pinv_newton: right on prescribed spectra, on every backend, element by element, twice differentiable."""

from __future__ import annotations

import pickle
import warnings
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from array_api_compat import array_namespace
from conftest import Backend, from_spectrum, gaussian_gram
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from torch.autograd import gradcheck, gradgradcheck

from lowrank import pinv_newton
from lowrank._accurate import accurate_product
from lowrank._array import to_host

SHAPES = [(12, 12), (30, 7), (7, 30), (1, 9)]


def adjoint(a: np.ndarray) -> np.ndarray:
    return np.conj(np.swapaxes(a, -1, -2))


def norm(a: np.ndarray) -> float:
    return float(np.linalg.norm(a, 2))


def penrose(a: np.ndarray, x: np.ndarray) -> float:
    """The largest relative defect of the four Penrose equations, evaluated in fp64."""
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    a, x = a.astype(wide), x.astype(wide)
    e, f = x @ a, a @ x
    if norm(a) == 0:
        return norm(x)
    return max(norm(a @ e - a) / norm(a), norm(e @ x - x) / norm(x), norm(e - adjoint(e)), norm(f - adjoint(f)))


@st.composite
def spectra(draw, precision: str):
    """Shape, nonzero singular values (log-spaced with multiplicities, scaled), complexity and seed."""
    m, n = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rank = draw(st.integers(1, min(m, n)))
    kappa = 10.0 ** draw(st.floats(0, 8 if precision == "double" else 4)) if rank > 1 else 1.0
    repeats = draw(st.integers(1, 4))
    distinct = np.logspace(0, -np.log10(kappa), max(2, -(-rank // repeats)))
    sigma = np.sort(np.tile(distinct, repeats)[: rank - 1])[::-1] if rank > 1 else np.empty(0)
    sigma = np.append(sigma, distinct[-1] if rank > 1 else 1.0)
    sigma[0] = 1.0
    scale = 10.0 ** draw(st.integers(-12, 12))
    return m, n, sigma * scale, kappa, draw(st.booleans()), draw(st.integers(0, 2**16))


def check_spectrum(case, real, complex_) -> None:
    m, n, sigma, kappa, is_complex, seed = case
    dtype = complex_ if is_complex else real
    a, exact = from_spectrum(sigma, m, n, seed=seed, complex_=is_complex, dtype=dtype)
    x, info = pinv_newton(a, return_info=True)
    assert x.dtype == dtype
    assert x.shape == (n, m)
    assert info.rank == len(sigma)
    assert info.cutoff < sigma[-1]
    # Entries of A are rounded to eps·‖A‖, which alone moves X by κ·eps·‖X‖; products add √n of the same.
    tolerance = 8 * np.sqrt(max(m, n)) * kappa * np.finfo(dtype).eps
    assert norm(x - exact) <= tolerance * norm(exact)
    assert penrose(a, x) <= tolerance
    assert info.residual <= tolerance * np.sqrt(n)


def random_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float, int]:
    """A matrix, its exact pseudoinverse, the condition of what is kept and the rank.

    Sometimes the spectrum goes on below the cutoff, at least ten times lower.
    """
    single, is_complex = rng.random() < 0.5, rng.random() < 0.3
    dtype = np.dtype([[np.float64, np.complex128], [np.float32, np.complex64]][int(single)][int(is_complex)])
    cutoff = 1e-5 if single else 1e-11
    m, n = rng.integers(1, 33, 2)
    rank = int(rng.integers(1, min(m, n) + 1))
    lowest = rng.uniform(0, -np.log10(cutoff) - 0.5)
    sigma = [
        lambda: np.logspace(0, -lowest, rank),
        lambda: 10.0 ** -rng.uniform(0, lowest, rank),
        lambda: np.where(rng.random(rank) < 0.5, 1.0, 10.0**-lowest),
        lambda: np.linspace(1, 10.0**-lowest, rank),
    ][rng.integers(4)]()
    sigma = np.sort(sigma / sigma.max())[::-1]
    kappa = float(sigma[0] / sigma[-1])
    a, exact = from_spectrum(sigma, m, n, seed=int(rng.integers(1 << 30)), complex_=is_complex, dtype=dtype)
    if rng.random() < 0.2 and rank < min(m, n):
        # Everything from a tenth of the last kept value, and no more than a third of the cutoff, downwards.
        head = min(sigma[-1] / 10, cutoff / 3)
        tail = np.concatenate([sigma, head * np.logspace(0, -3, min(m, n) - rank)])
        wide = np.complex128 if is_complex else np.float64
        u, s, vh = np.linalg.svd(from_spectrum(tail, m, n, complex_=is_complex, dtype=wide)[0], full_matrices=False)
        a, exact = ((u * s) @ vh).astype(dtype), (adjoint(vh)[:, :rank] / s[:rank]) @ adjoint(u[:, :rank])
    scale = 10.0 ** int(rng.integers(-12, 13))
    return (a * scale).astype(dtype), exact / scale, kappa, rank


def test_ten_thousand_matrices():
    """No error beyond 50·κ·eps against the factors that the matrix was made of, and no bound exceeded."""
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        a, exact, kappa, rank = random_case(rng)
        eps = np.finfo(a.dtype).eps
        x, info = pinv_newton(a, return_info=True)
        assert norm(x - exact) <= 50 * kappa * eps * norm(exact), (a.shape, a.dtype, kappa, rank)
        assert (info.rank, bool(info.finite)) == (rank, True)
        assert info.residual <= 2 * np.sqrt(rank) * (float(info.bound) + 50 * kappa * eps)


@settings(max_examples=150)
@given(spectra("double"))
def test_penrose_equations_in_double_precision(case):
    check_spectrum(case, np.float64, np.complex128)


@settings(max_examples=150)
@given(spectra("single"))
def test_penrose_equations_in_single_precision(case):
    check_spectrum(case, np.float32, np.complex64)


@pytest.mark.parametrize("rank", range(13))
def test_every_rank_of_a_square_matrix(rank):
    a, exact = from_spectrum(np.logspace(0, -6, rank), 12, 12)
    x, info = pinv_newton(a, return_info=True)
    assert info.rank == rank
    assert norm(x - exact) <= 8 * np.sqrt(12) * 1e6 * np.finfo(float).eps * max(norm(exact), 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rtol_below_what_is_reachable_is_raised_to_it(dtype):
    smallest = 1e-12 if dtype == np.float64 else 1e-6
    a, _ = from_spectrum(np.array([1.0, 0.5]), 5, 5, dtype=dtype)
    for rtol in (0, smallest / 100):
        x, info = pinv_newton(a, rtol=rtol, return_info=True)
        assert np.isclose(info.cutoff, smallest, rtol=0.1)
        assert np.array_equal(x, pinv_newton(a, rtol=smallest))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cutoff_separates_a_gap_of_ten(dtype):
    rtol = 1e-3
    sigma = np.array([1.0, 0.9, 0.1, rtol * np.sqrt(10), rtol / np.sqrt(10), 1e-5])
    a, _ = from_spectrum(sigma, 10, 8, dtype=dtype)
    x, info = pinv_newton(a, rtol=rtol, return_info=True)
    assert info.rank == 4
    assert np.isclose(info.cutoff, rtol, rtol=0.1)
    expected = np.linalg.pinv(a.astype(np.float64), rcond=rtol)
    # A gap between kept and dropped values of relative size 1 turns a perturbation eps·‖A‖ of A
    # into eps·‖A‖·‖X‖² of X, κ = 1/(rtol √10).
    assert norm(x - expected) <= 30 * np.finfo(dtype).eps / (rtol * np.sqrt(10)) * norm(expected)


def around_cutoff(kind: str, n: int, rtol: float, rng: np.random.Generator) -> np.ndarray:
    """Singular values up to 1, the largest, none of them within five per cent of the cutoff."""
    below, above = 0.95 * rtol, min(1.05 * rtol, 1.0)
    if kind == "all below":
        sigma = np.full(n, below)
    elif kind == "both sides":
        sigma = np.where(np.arange(n) < n / 2, above, below)
    else:
        sigma = rng.uniform(0.7 * rtol, 1, n)
        sigma = np.where((sigma > below) & (sigma < above), np.where(rng.random(n) < 0.5, below, above), sigma)
    sigma[0] = 1.0
    return np.sort(sigma)[::-1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", ["general", "hermitian", "tall", "wide"])
@pytest.mark.parametrize("n", [2, 5, 16, 49])
@pytest.mark.parametrize("rtol", [0.3, 0.5, 0.65, 0.7, 0.9, 0.97])
def test_large_cutoffs(rtol, n, shape, dtype):
    rng = np.random.default_rng(n)
    rows = n if shape in ("general", "hermitian") else n + 7
    for kind in ("all below", "both sides", "anywhere"):
        sigma = around_cutoff(kind, n, rtol, rng)
        rank = int(np.sum(sigma > rtol))
        u = np.linalg.qr(rng.standard_normal((rows, n)))[0]
        v = u * rng.choice([-1.0, 1.0], n) if shape == "hermitian" else np.linalg.qr(rng.standard_normal((n, n)))[0]
        a, exact = (u * sigma) @ v.T, (v[:, :rank] / sigma[:rank]) @ u[:, :rank].T
        if shape == "wide":
            a, exact = a.T, exact.T
        x, info = pinv_newton(a.astype(dtype), rtol=rtol, hermitian=shape == "hermitian", return_info=True)
        assert info.rank == rank
        # σ_max from below within one per cent, and rounding.
        assert 0.985 * rtol <= info.cutoff <= (1 + 1e-5) * rtol
        # What is kept and what is dropped differ by a tenth of the cutoff, which enlarges eps·‖A‖ tenfold.
        kappa = sigma[0] / sigma[rank - 1]
        assert norm(x - exact) <= 50 * kappa * np.finfo(dtype).eps * norm(exact)
        assert info.residual <= 50 * np.sqrt(n) * kappa * np.finfo(dtype).eps


def test_large_cutoffs_when_compiled():
    rng = np.random.default_rng(0)
    for rtol in (0.3, 0.7, 0.97):
        sigma = around_cutoff("both sides", 8, rtol, rng)
        u, v = (np.linalg.qr(rng.standard_normal((8, 8)))[0] for _ in range(2))
        rank = int(np.sum(sigma > rtol))
        a, exact = (u * sigma) @ v.T, (v[:, :rank] / sigma[:rank]) @ u[:, :rank].T
        x, info = jax.jit(partial(pinv_newton, rtol=rtol, return_info=True))(jnp.asarray(a))
        assert info.rank == rank
        assert norm(np.asarray(x) - exact) <= 50 * sigma[0] / sigma[rank - 1] * np.finfo(float).eps * norm(exact)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_backends_agree(xp: Backend, m, n):
    rank = max(1, min(m, n) - 2)
    a, exact = from_spectrum(np.logspace(0, -3, rank), m, n)
    given_ = xp.asarray(np.stack([a, 3 * a]))
    x, info = pinv_newton(given_, return_info=True)
    got = xp.check(x, given_, (2, n, m))
    assert np.allclose(got, np.stack([exact, exact / 3]), rtol=0, atol=1e3 * 1e3 * np.finfo(float).eps * norm(exact))
    assert to_host(info.rank).tolist() == [rank, rank]
    for field in (info.bound, info.residual, info.cutoff):
        xp.check(field, given_, (2,))


def test_backends_agree_with_a_ridge(xp: Backend):
    gram = gaussian_gram(np.random.default_rng(0).standard_normal((5, 16, 3)))
    given_ = xp.asarray(gram)
    x, info = pinv_newton(given_, hermitian=True, ridge=0.01, return_info=True)
    exact = np.linalg.inv(gram + 0.01 * np.eye(16))
    assert np.allclose(xp.check(x, given_, (5, 16, 16)), exact, rtol=0, atol=1e4 * np.finfo(float).eps)
    assert to_host(info.rank).tolist() == [16] * 5


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_backends_agree(xp: Backend, dtype):
    a, exact = from_spectrum(np.logspace(0, -2, 5), 6, 5, complex_=True, dtype=np.dtype(dtype))
    given_ = xp.asarray(a)
    got = xp.check(pinv_newton(given_), given_, (5, 6))
    assert norm(got - exact) <= 40 * 100 * np.finfo(dtype).eps * norm(exact)


@pytest.mark.parametrize("method", ["newton", "direct"])
@pytest.mark.parametrize("hermitian", [False, True])
def test_methods_agree_with_numpy(method, hermitian):
    rng = np.random.default_rng(5)
    q = np.linalg.qr(rng.standard_normal((9, 9)) + 1j * rng.standard_normal((9, 9)))[0]
    values = np.array([1.0, -0.5, 0.3, -1e-3, 1e-2, 0, 0, 0, 2.0])  # indefinite and singular
    a = (q * values) @ adjoint(q)
    a = 0.5 * (a + adjoint(a))
    x, info = pinv_newton(a, hermitian=hermitian, method=method, return_info=True)
    assert norm(x - np.linalg.pinv(a, rcond=1e-11)) <= 2e3 * 30 * np.finfo(float).eps * 1e3
    assert info.rank == 6
    if hermitian:
        assert np.array_equal(x, adjoint(x))


def test_direct_with_a_ridge_is_the_inverse():
    gram = gaussian_gram(np.random.default_rng(1).standard_normal((3, 12, 2)))
    direct = pinv_newton(gram, hermitian=True, ridge=0.1, method="direct")
    newton = pinv_newton(gram, hermitian=True, ridge=0.1)
    assert np.allclose(direct, newton, rtol=0, atol=1e3 * np.finfo(float).eps * 10)


@pytest.mark.parametrize("spread", [1.0, 0.3, 0.1, 0.03])
def test_ridge_matches_cholesky_in_single_precision(spread):
    """At κ up to 4.9e3, with no more than the error of a Cholesky inverse."""
    points = spread * np.random.default_rng(0).standard_normal((64, 49, 4))
    gram = gaussian_gram(points).astype(np.float32)
    exact = np.linalg.inv(gram.astype(np.float64) + 0.01 * np.eye(49))
    x, info = pinv_newton(gram, hermitian=True, ridge=0.01, return_info=True)
    shifted = torch.from_numpy(gram) + 0.01 * torch.eye(49)
    cholesky = torch.cholesky_inverse(torch.linalg.cholesky(shifted)).numpy()

    def error(y):
        return np.linalg.norm(y - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))

    assert info.finite.all()
    assert np.all(error(x) <= error(cholesky))
    assert np.array_equal(x, np.swapaxes(x, 1, 2))


@given(st.integers(1, 12), st.floats(1e-4, 10.0), st.booleans(), st.integers(0, 2**16))
def test_ridge_on_singular_matrices(n, ridge, is_complex, seed):
    dtype = np.complex128 if is_complex else np.float64
    b, _ = from_spectrum(np.ones(max(1, n // 2)), n, n, seed=seed, complex_=is_complex, dtype=dtype)
    a = b @ adjoint(b)
    x, info = pinv_newton(a, hermitian=True, ridge=ridge, return_info=True)
    kappa = (1 + ridge) / ridge
    exact = np.linalg.inv(a + ridge * np.eye(n))
    assert norm(x - exact) <= (8 * np.sqrt(n) * kappa * np.finfo(float).eps + info.bound) * norm(exact)
    assert info.rank == n
    assert info.bound <= max(n * (1.01 * (1 + ridge)) / ridge / 512, 0.25) * np.finfo(float).eps


def test_textbook_iteration_is_the_literal_one():
    a, _ = from_spectrum(np.logspace(0, -1, 5), 8, 5)
    alpha = 0.7
    x = alpha * a.T
    for _ in range(6):
        x = 2 * x - x @ a @ x
    got, info = pinv_newton(a, steps=6, alpha=alpha, return_info=True)
    assert np.allclose(got, x, rtol=0, atol=50 * np.finfo(float).eps * norm(x))
    assert (info.steps, info.products) == (6, 12)
    assert np.array_equal(pinv_newton(a, steps=0, alpha=alpha), alpha * a.T)


def test_textbook_iteration_with_a_ridge_and_one_alpha_per_matrix():
    a = gaussian_gram(np.random.default_rng(0).standard_normal((2, 6, 2)))
    alpha = 1.8 / np.max(np.sum(a, axis=-1), axis=-1) ** 2
    p = a + 0.01 * np.eye(6)
    x = alpha[:, None, None] * p
    for _ in range(20):
        x = 2 * x - x @ p @ x
    got, info = pinv_newton(a, hermitian=True, ridge=0.01, steps=20, alpha=alpha, return_info=True)
    assert np.allclose(got, x, rtol=0, atol=1e4 * np.finfo(float).eps)
    assert np.all(info.residual < info.bound)


def test_textbook_default_start_converges_on_any_scale():
    a, exact = from_spectrum(np.logspace(0, -1, 6), 6, 6, dtype=np.float32)
    for scale in (np.float32(2.0**-70), np.float32(1), np.float32(2.0**70)):
        x = pinv_newton(scale * a, steps=30)
        assert norm(x * scale - exact) <= 100 * np.finfo(np.float32).eps * norm(exact)


@given(spectra("double"))
def test_adjoint_and_scaling(case):
    m, n, sigma, kappa, is_complex, seed = case
    a, exact = from_spectrum(
        sigma, m, n, seed=seed, complex_=is_complex, dtype=np.complex128 if is_complex else np.float64
    )
    x = pinv_newton(a)
    tolerance = 16 * np.sqrt(max(m, n)) * kappa * np.finfo(float).eps * norm(exact)
    assert norm(pinv_newton(adjoint(a).copy()) - adjoint(x)) <= tolerance
    assert norm(pinv_newton(3.0 * a) * 3.0 - x) <= tolerance
    # A power of two changes no significant bit anywhere.
    assert np.array_equal(pinv_newton(a * 2.0**40) * 2.0**40, x)


@pytest.mark.parametrize("tol", [None, 0.9, 0.1, 1e-3, 1e-6])
@pytest.mark.parametrize("condition", [1 + 1e-9, 3.0, 1e2, 4.9e3, 1e6])
def test_a_declared_bound_and_tolerance(tol, condition, xp: Backend):
    """‖I − XP‖ ≤ tol by steps known from (upper + δ)/δ, whatever part of the interval the spectrum takes."""
    ridge = 1 / (condition - 1)
    for low in (1e-9, 0.1, 0.999):
        a = from_spectrum(np.linspace(1.0, low, 12), 12, 12)[0]
        a = xp.asarray(np.stack([a @ a.T, np.eye(12) * low]))
        x, info = pinv_newton(a, hermitian=True, ridge=ridge, upper=1.0, tol=tol, return_info=True)
        x, steps = xp.check(x, a, (2, 12, 12)), to_host(info.steps)
        off = np.linalg.norm(np.eye(12) - x @ (to_host(a) + ridge * np.eye(12)), 2, axis=(-2, -1))
        # X times P is right to κ·eps.
        assert np.all(off <= (tol or 0) + 20 * condition * 2.3e-16)
        assert tol is not None or np.array_equal(x, np.swapaxes(x, -1, -2))
        assert np.all(to_host(info.finite))
        assert len(set(steps.tolist())) == 1
        if tol is not None:
            assert np.all(to_host(info.bound) <= tol)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("upper", "ridge"), [(1e308, 1e308), (5e-324, 5e-324), (1e-310, 1e-320), (1e300, 1e-300)])
def test_bounds_beyond_the_numbers_are_answered(upper, ridge, dtype):
    a = np.diag(np.asarray([min(upper, 1e37)] * 3, dtype=dtype))
    x, info = pinv_newton(a, hermitian=True, ridge=ridge, upper=upper, tol=0.01, return_info=True)
    assert np.isnan(x).all()
    assert not info.finite


def test_a_tolerance_saves_products():
    """Of steps whose sums are in the passes of products; with passes of their own, 11 products would do."""
    a = gaussian_gram(np.random.default_rng(0).standard_normal((4, 49, 8)))
    options = {"hermitian": True, "ridge": 0.01, "upper": 49.0, "return_info": True}
    products = [int(pinv_newton(a, **options, tol=tol)[1].products[0]) for tol in (0.1, 5e-3, 1e-6)]
    assert products == sorted(products)
    assert products[1] <= 14


def test_a_bound_shortens_the_schedule_of_a_traced_program():
    a = jnp.asarray(gaussian_gram(np.random.default_rng(0).standard_normal((3, 20, 2))))

    def steps(**options):
        traced = jax.jit(lambda a: pinv_newton(a, hermitian=True, ridge=0.01, return_info=True, **options))(a)
        np.testing.assert_allclose(traced[0], np.linalg.inv(a + 0.01 * np.eye(20)), rtol=0, atol=2001 * 100 * 2.3e-15)
        return int(traced[1].products[0])

    assert steps(upper=20.0) < 0.7 * steps()


def test_a_negative_matrix_is_seen_alone_and_beside_others(xp: Backend):
    good = gaussian_gram(np.random.default_rng(0).standard_normal((3, 6, 2)))
    for a in (-good, np.concatenate([-good, good])):
        x, info = pinv_newton(xp.asarray(a), hermitian=True, ridge=0.01, return_info=True)
        assert to_host(info.finite).tolist() == [False] * 3 + [True] * (len(a) - 3)
        assert np.isnan(to_host(x)[:3]).all()
        assert np.isfinite(to_host(x)[3:]).all()


@pytest.mark.parametrize("wrong", ["indefinite", "larger", "nan"])
def test_a_bound_that_does_not_hold_is_seen(wrong):
    good = gaussian_gram(np.random.default_rng(0).standard_normal((10, 3)))
    bad = {"indefinite": good - 0.5 * np.eye(10), "larger": 40 * good, "nan": np.where(good == 1.0, np.nan, good)}[
        wrong
    ]
    for tol in (None, 1e-3):
        both, info = pinv_newton(
            np.stack([good, bad]), hermitian=True, ridge=0.01, upper=10.0, tol=tol, return_info=True
        )
        alone = pinv_newton(good, hermitian=True, ridge=0.01, upper=10.0, tol=tol)
        assert np.array_equal(both[0], alone)
        if wrong != "larger" or tol is not None:
            assert np.all(np.isnan(both[1]))
            assert info.finite.tolist() == [True, False]
        else:
            # Polished and tried, it may as well have converged; a result that is not NaN is right.
            assert np.isnan(both[1]).all() or np.allclose(both[1], np.linalg.inv(bad + 0.01 * np.eye(10)), rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"hermitian": True, "ridge": 0.01}, {"steps": 12}, {"method": "direct"}])
def test_batch_equals_loop_and_neighbours_do_not_matter(xp: Backend, options):
    rng = np.random.default_rng(3)
    batch = gaussian_gram(rng.standard_normal((6, 10, 2)) * np.logspace(-1, 1, 6)[:, None, None])
    together = to_host(pinv_newton(xp.asarray(batch), **options))
    kappa = 1e11 if "ridge" not in options else 1e3
    for k, a in enumerate(batch):
        alone = to_host(pinv_newton(xp.asarray(a), **options))
        scale = norm(alone)
        # Rounding differs by κ·eps, κ of what was kept.
        kept = min(kappa, norm(a) * scale)
        assert norm(together[k] - alone) <= 100 * kept * np.finfo(float).eps * scale
    for bad in (np.nan, np.inf, 1e30, 0.0):
        changed = batch.copy()
        changed[2] = bad
        changed[2, 0, 1] = changed[2, 1, 0] = bad
        others = to_host(pinv_newton(xp.asarray(changed), **options))
        keep = [0, 1, 3, 4, 5]
        if not np.isfinite(bad):
            assert np.all(np.isnan(others[2]))
            assert np.array_equal(others[keep], together[keep])
        # Matrices that are solved together take the same steps, which shows in rounding only.
        for k in keep:
            kept = min(kappa, norm(batch[k]) * norm(together[k]))
            assert norm(others[k] - together[k]) <= 100 * kept * np.finfo(float).eps * norm(together[k])


def test_info_names_what_went_wrong(xp: Backend):
    good = np.eye(3)
    nonfinite = np.where(np.eye(3) > 0, np.nan, 0.0)
    skew = np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    indefinite = np.diag([1.0, 1.0, -0.5])
    barely = np.diag([1.0, 1.0, -0.01 - 1e-9])
    a = xp.asarray(np.stack([good, nonfinite, skew, indefinite, barely]))
    x, info = pinv_newton(a, hermitian=True, ridge=0.01, return_info=True)
    assert to_host(info.finite).tolist() == [True, False, False, False, False]
    residual = to_host(info.residual)
    assert np.isnan(residual[1])
    assert np.all(np.isinf(residual[2:]))
    assert np.isnan(to_host(x)).all(axis=(1, 2)).tolist() == [False, True, True, True, True]
    x, info = pinv_newton(a, hermitian=True, return_info=True)
    assert to_host(info.finite).tolist() == [True, False, False, True, True]
    assert to_host(info.rank).tolist() == [3, -1, -1, 3, 3]
    x, info = pinv_newton(a, hermitian=True, ridge=0.01, method="direct", return_info=True)
    assert to_host(info.finite).tolist() == [True, False, False, False, False]
    x, info = pinv_newton(a, hermitian=True, steps=3, return_info=True)
    assert to_host(info.finite).tolist() == [True, False, False, True, True]
    assert np.isnan(to_host(x)).all(axis=(1, 2)).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (0, 3, 2), (2, 0, 2), (0, 3, 3)])
def test_empty(xp: Backend, shape):
    a = xp.asarray(np.zeros(shape))
    for options in ({}, {"steps": 3}, {"method": "direct"}):
        x, info = pinv_newton(a, return_info=True, **options)
        xp.check(x, a, (*shape[:-2], shape[-1], shape[-2]))
        xp.check(info.residual, a, shape[:-2])
    if shape[-1] == shape[-2]:
        x = pinv_newton(a, hermitian=True, ridge=0.1)
        xp.check(x, a, shape)


def test_zero_and_identity(xp: Backend):
    zero = xp.asarray(np.zeros((4, 3)))
    x, info = pinv_newton(zero, return_info=True)
    assert np.array_equal(xp.check(x, zero, (3, 4)), np.zeros((3, 4)))
    assert int(info.rank) == 0
    eye = xp.asarray(np.eye(4))
    assert np.allclose(xp.check(pinv_newton(eye), eye, (4, 4)), np.eye(4), rtol=0, atol=8 * np.finfo(float).eps)
    assert np.array_equal(to_host(pinv_newton(zero, steps=5)), np.zeros((3, 4)))


@pytest.mark.parametrize("scale", [1e-290, 1e-150, 1e150, 1e290])
def test_no_underflow_or_overflow_inside(scale):
    a, exact = from_spectrum(np.array([1.0, 0.5, 0.1]), 4, 4)
    x = pinv_newton(a * scale)
    assert norm(x * scale - exact) <= 100 * 10 * np.finfo(float).eps * norm(exact)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_half_precision_is_computed_in_single(dtype, library):
    a, _ = from_spectrum(np.logspace(0, -1, 6), 6, 6)
    if library == "torch":
        half = torch.asarray(a).to(getattr(torch, dtype))
        x, wide, eps = pinv_newton(half), half.double().numpy(), torch.finfo(half.dtype).eps
        got = x.double().numpy()
    else:
        half = jnp.asarray(a, dtype=dtype)
        x, wide, eps = pinv_newton(half), np.asarray(half, dtype=float), float(jnp.finfo(dtype).eps)
        got = np.asarray(x, dtype=float)
    assert x.dtype == half.dtype
    exact = np.linalg.pinv(wide)
    # Only the rounding of the result to half precision is left.
    assert np.all(np.abs(got - exact) <= 0.51 * eps * np.abs(exact) + 1e-5 * norm(exact))


def test_rounding_does_not_contradict_the_declaration(xp: Backend):
    a, _ = from_spectrum(np.logspace(0, -2, 6), 6, 6)
    gram = a @ a.T + 1e-9 * np.triu(np.ones((6, 6)), 1)
    for options in ({}, {"ridge": 0.1}):
        given_ = xp.asarray(gram)
        x, info = pinv_newton(given_, hermitian=True, return_info=True, **options)
        part = 0.5 * (gram + gram.T) + options.get("ridge", 0.0) * np.eye(6)
        exact = np.linalg.inv(part)
        got = xp.check(x, given_, (6, 6))
        assert norm(got - exact) <= 100 * 1e4 * np.finfo(float).eps * norm(exact)
        assert bool(to_host(info.finite))
    half = torch.asarray(gram).to(torch.float16)
    half[0, 1] *= 1.002
    assert torch.isfinite(pinv_newton(half, hermitian=True, ridge=0.1)).all()


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_a_false_declaration_is_seen_at_any_scale(scale):
    a = scale * np.array([[0.0, 1.0], [0.5, 0.0]])
    assert np.isnan(pinv_newton(a, hermitian=True)).all()
    assert np.isfinite(pinv_newton(a)).all()


def test_autocast_does_not_reach_inside():
    a, exact = from_spectrum(np.logspace(0, -1, 6), 6, 6, dtype=np.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = pinv_newton(torch.from_numpy(a))
    assert norm(x.numpy() - exact) <= 100 * np.finfo(np.float32).eps * norm(exact)


GRADIENT_CASES = [(4, 4, 4), (5, 3, 3), (3, 5, 3), (4, 4, 2), (5, 4, 2), (3, 4, 1)]


def constant_rank(m, n, rank, is_complex):
    """Factors whose product keeps its rank under every perturbation of them."""
    dtype = np.complex128 if is_complex else np.float64
    left, _ = from_spectrum(np.linspace(1, 2, rank), m, rank, complex_=is_complex, dtype=dtype)
    right, _ = from_spectrum(np.linspace(1, 2, rank), rank, n, complex_=is_complex, seed=1, dtype=dtype)
    return left, right


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("m", "n", "rank"), GRADIENT_CASES)
def test_torch_derivatives(m, n, rank, is_complex):
    factors = [torch.tensor(f, requires_grad=True) for f in constant_rank(m, n, rank, is_complex)]

    def function(left, right):
        return pinv_newton(left @ right)

    assert gradcheck(function, factors, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(function, factors, fast_mode=True)


@pytest.mark.parametrize(("m", "n", "rank"), GRADIENT_CASES[2:5])
def test_jax_derivatives(m, n, rank):
    factors = tuple(jnp.asarray(f) for f in constant_rank(m, n, rank, False))

    def function(left, right):
        return pinv_newton(left @ right)

    check_grads(jax.jit(function), factors, order=2, modes=("fwd", "rev"), eps=1e-5)


def test_hermitian_derivatives():
    b = torch.tensor(from_spectrum(np.linspace(1, 2, 5), 5, 5)[0], requires_grad=True)
    for function in (
        lambda b: pinv_newton(b @ b.mT, hermitian=True, ridge=0.1),
        lambda b: pinv_newton(b + b.mT, hermitian=True),
        lambda b: pinv_newton(b + b.mT, hermitian=True, method="direct"),
        lambda b: pinv_newton(b, method="direct"),
        lambda b: pinv_newton(b[:, :2] @ b[:, :2].mT, hermitian=True),
        lambda b: pinv_newton(b, steps=4),
        lambda b: pinv_newton(b @ b.mT, hermitian=True, ridge=0.1, steps=4),
    ):
        assert gradcheck(function, b, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(function, b, fast_mode=True)
    c = jnp.asarray(b.detach().numpy())
    check_grads(lambda b: pinv_newton(b, hermitian=False), (c,), order=1, eps=1e-5)
    check_grads(jax.jit(lambda b: pinv_newton(b @ b.T, hermitian=True, ridge=0.1)), (c,), order=2, eps=1e-5)
    check_grads(jax.jit(lambda b: pinv_newton(b, steps=4)), (c,), order=2, eps=1e-5)


def test_steps_differentiate_the_iteration_not_the_limit():
    a = torch.tensor(np.diag([1.0, 0.01]), requires_grad=True)
    (unconverged,) = torch.autograd.grad(pinv_newton(a, steps=3).sum(), a)
    (converged,) = torch.autograd.grad(pinv_newton(a).sum(), a)
    assert torch.autograd.gradcheck(lambda a: pinv_newton(a, steps=3), a)
    assert abs(converged[1, 1] + 1e4) < 1e-6 * 1e4
    assert abs(unconverged[1, 1]) < 0.1 * abs(converged[1, 1])


def recorded_steps(a, steps, **given):
    """The gradient of the iteration that torch finds from a record of it."""
    x = pinv_newton(a.detach(), steps=0, **given)  # αAᴴ, α a constant
    a = a.detach().requires_grad_()
    out = (x / a.detach().mH) * a.mH
    for _ in range(steps):
        out = 2 * out - out @ a @ out
    return out, a


@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5), (2, 3, 6, 4), (2, 4, 6), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("steps", [0, 1, 12, 40])
@pytest.mark.parametrize("size", [1.0, 1e-250, 1e100])
def test_the_way_back_through_steps_is_that_of_their_record(shape, dtype, steps, size):
    generator = torch.Generator().manual_seed(sum(shape) + steps)
    a = torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()
    g = size * torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=dtype, generator=generator)
    alpha = torch.full(shape[:-2], 0.01, dtype=torch.float64)
    expected, leaf = recorded_steps(a, steps, alpha=alpha)
    found = pinv_newton(a, steps=steps, alpha=alpha)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    ours, theirs = torch.autograd.grad(found, a, g)[0] / size, torch.autograd.grad(expected, leaf, g)[0] / size
    # Steps double what rounding leaves of the inverse's small directions.
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9 * float(theirs.abs().max()))


def test_the_way_back_through_steps_leaves_no_small_numbers_and_no_trace_of_neighbours():
    a = torch.eye(4).repeat(3, 1, 1) + 0.01 * torch.arange(16.0).reshape(4, 4)
    a[1] = torch.nan
    g = torch.ones(3, 4, 4)
    g[2] = 1e-30

    def gradients(a, g):
        a = a.clone().requires_grad_()
        start = (0.1 * a.mT).detach().requires_grad_()
        from lowrank._torch_rules import TextbookSteps

        return torch.autograd.grad(TextbookSteps.apply(start, a, 20), (start, a), g)

    together = gradients(a, g)
    for i in range(3):
        for x, y in zip(together, gradients(a[i : i + 1], g[i : i + 1]), strict=True):
            assert torch.equal(x[i], y[0]) or (i == 1 and x[i].isnan().all() and y[0].isnan().all())
    tiny = torch.finfo(torch.float32).tiny
    assert not ((together[0][0].abs() < tiny) & (together[0][0] != 0)).any()
    # Twenty steps from within the region of convergence: the inverse's own derivative, and nothing of the start.
    assert together[0][0].abs().max() == 0
    exact = torch.linalg.inv(a[0].double()).mT
    torch.testing.assert_close(together[1][0].double(), -exact @ g[0].double() @ exact, rtol=0, atol=1e-5)


def test_function_transforms():
    a, exact = from_spectrum(np.logspace(0, -2, 4), 5, 4)
    batch = np.stack([a, 2 * a, -a])
    expected = np.stack([exact, exact / 2, -exact])
    tolerance = 100 * 100 * np.finfo(float).eps * norm(exact)
    for result in (
        torch.func.vmap(pinv_newton)(torch.asarray(batch)),
        torch.func.vmap(pinv_newton, in_dims=2)(torch.asarray(batch.transpose(1, 2, 0).copy())),
        jax.vmap(pinv_newton)(jnp.asarray(batch)),
        jax.jit(pinv_newton)(jnp.asarray(batch)),
        jax.jit(jax.vmap(pinv_newton))(jnp.asarray(batch)),
    ):
        assert np.allclose(np.asarray(result), expected, rtol=0, atol=tolerance)

    def total(a):
        return pinv_newton(a).sum()

    singles = [torch.func.grad(total)(torch.asarray(a)) for a in batch]
    together = torch.func.vmap(torch.func.grad(total))(torch.asarray(batch))
    assert torch.allclose(together, torch.stack(singles), rtol=0, atol=tolerance * norm(exact))
    hessian = torch.func.hessian(total)(torch.asarray(a))
    assert torch.allclose(hessian, torch.tensor(np.asarray(jax.hessian(total)(jnp.asarray(a)))), rtol=1e-8, atol=1e-6)


def test_traced_info_is_an_array_pytree():
    a = jnp.asarray(gaussian_gram(np.random.default_rng(0).standard_normal((3, 8, 2))))
    for options in ({}, {"hermitian": True, "ridge": 0.01}):
        eager = pinv_newton(a, return_info=True, **options)
        traced = jax.jit(lambda a, o=options: pinv_newton(a, return_info=True, **o))(a)
        assert np.allclose(traced[0], eager[0], rtol=0, atol=1e-6 * np.abs(eager[0]).max())
        assert np.array_equal(traced[1].rank, eager[1].rank)
        assert np.array_equal(traced[1].finite, eager[1].finite)
        # Compiled, the schedule is that of the worst case; eagerly it ends when every element is certified.
        assert np.all(traced[1].steps >= eager[1].steps)


RIDGE = {"hermitian": True, "ridge": 0.1}
COMPILED = [{}, {"hermitian": True}, RIDGE, {"steps": 5}, {"method": "direct"}, RIDGE | {"method": "direct"}]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("options", COMPILED)
def test_torch_compiles_the_whole_call(options):
    """One graph, forward and backward, with the result and the derivative of the eager call."""
    a = torch.tensor(from_spectrum(np.logspace(0, -2, 7), 7, 7)[0])
    a = torch.stack([a @ a.mT, a.mT @ a]) if options.get("hermitian") else torch.stack([a, 3 * a])

    def function(a):
        return pinv_newton(a, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results, gradients = [], []
    for call in (function, compiled):
        leaf = a.clone().requires_grad_()
        results.append(call(leaf))
        gradients.append(torch.autograd.grad((results[-1] ** 2).sum(), leaf)[0])
    # The schedules differ, not what they converge to: κ·eps, and its square in the derivative.
    assert torch.allclose(*results, rtol=1e-8 if options != {"steps": 5} else 1e-14, atol=0)
    assert torch.allclose(*gradients, rtol=0, atol=1e-6 * float(gradients[0].abs().max()))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("options", [*COMPILED, RIDGE | {"upper": 4.0, "tol": 1e-2}])
def test_torch_compiles_it_for_one_size_after_the_other(options):
    """From the second on its compiler takes sizes for symbols; plans and trial vectors are made from them."""
    torch._dynamo.reset()  # It compiles no more than eight programs of a line of code.

    def function(a):
        return pinv_newton(a, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in (5, 6, 8):
        a = torch.tensor(from_spectrum(np.logspace(0, -2, n), n, n)[0])
        a = torch.stack([a @ a.mT, a.mT @ a])
        assert torch.allclose(compiled(a), function(a), rtol=0, atol=1e-8 * float(function(a).abs().max()))


def test_an_undecided_rank_is_warned_of_where_it_spoils_the_derivative():
    a = torch.tensor(np.diag([1.0, 0.5, 1e-3]), requires_grad=True)
    with pytest.warns(RuntimeWarning, match="the rank is undecided"):
        pinv_newton(a, rtol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pinv_newton(a.detach(), rtol=1e-3)
        pinv_newton(a, rtol=1e-2)


def test_jax_without_x64():
    a, exact = from_spectrum(np.logspace(0, -2, 6), 8, 6, dtype=np.float32)
    with jax.enable_x64(False):
        x, info = pinv_newton(jnp.asarray(a), return_info=True)
        assert x.dtype == jnp.float32
        assert norm(np.asarray(x) - exact) <= 40 * 100 * np.finfo(np.float32).eps * norm(exact)
        assert int(info.rank) == 6


def test_info_survives_pickling():
    _, info = pinv_newton(np.eye(3), return_info=True)
    assert pickle.loads(pickle.dumps(info))._asdict().keys() == info._asdict().keys()


def test_accurate_product_beats_working_precision(xp: Backend):
    a, x = from_spectrum(np.logspace(0, -6, 30), 30, 30)
    given_ = xp.asarray(x)
    got = xp.check(accurate_product(given_, xp.asarray(a), array_namespace(given_)), given_, (30, 30))
    exact = np.array(
        [[float(sum(Fraction(s) * Fraction(t) for s, t in zip(r, c, strict=True))) for c in a.T] for r in x]
    )
    unit = np.finfo(float).eps / 2
    # Two sums of 30 products with one factor rounded to 23 leading bits, and three roundings of the sum.
    remainder = 2 * 30 * unit * 2.0**-22 * (np.abs(x) @ np.abs(a))
    assert np.all(np.abs(got - exact) <= 3 * unit * np.maximum(np.abs(exact), remainder) + remainder)
    assert norm(x @ a - exact) > 1e3 * norm(got - exact)


@pytest.mark.parametrize(
    ("a", "options", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "a must be an array, not list"),
        (np.eye(3, dtype=int), {}, TypeError, r"a has dtype int64 \(shape \(3, 3\)\)"),
        (np.eye(3, dtype=bool), {}, TypeError, "bool"),
        (np.eye(3, dtype=np.longdouble), {}, TypeError, "float128"),
        (np.ma.masked_array(np.eye(3)), {}, TypeError, "not MaskedArray"),
        (np.ones(3), {}, ValueError, r"\(\.\.\., m, n\), not \(3,\)"),
        (np.ones((2, 3)), {"hermitian": True}, ValueError, r"square matrices, a has shape \(2, 3\)"),
        (np.eye(3), {"ridge": -1.0, "hermitian": True}, ValueError, "ridge must be a finite number >= 0, not -1.0"),
        (np.eye(3), {"ridge": np.nan, "hermitian": True}, ValueError, "ridge must be a finite number"),
        (np.eye(3), {"ridge": 0.1}, ValueError, "pass hermitian=True"),
        (np.eye(3), {"rtol": 2.0}, ValueError, r"in \[0, 1\), not 2.0"),
        (np.eye(3), {"rtol": 1.0}, ValueError, r"in \[0, 1\), not 1.0"),
        (np.eye(3), {"rtol": -1e-9}, ValueError, r"in \[0, 1\), not -1e-09"),
        (np.eye(3), {"rtol": np.nan}, ValueError, r"in \[0, 1\), not nan"),
        (np.eye(3), {"rtol": 0.1, "steps": 3}, ValueError, "no meaning with steps"),
        (np.eye(3), {"rtol": 0.1, "hermitian": True, "ridge": 1.0}, ValueError, "no meaning with ridge"),
        (np.eye(3), {"steps": -1}, ValueError, "steps must be an integer >= 0, not -1"),
        (np.eye(3), {"steps": 2.5}, ValueError, "steps must be an integer >= 0, not 2.5"),
        (np.eye(3), {"steps": True}, ValueError, "steps must be an integer"),
        (np.eye(3), {"alpha": 0.1}, ValueError, "pass steps as well"),
        (np.ones((2, 3, 3)), {"alpha": np.ones(3), "steps": 2}, ValueError, r"alpha has shape \(3,\).*batch \(2,\)"),
        (np.eye(3), {"method": "svd"}, ValueError, "'newton' or 'direct', not 'svd'"),
        (np.eye(3), {"method": "direct", "steps": 2}, ValueError, "leave it out for method='direct'"),
        (np.eye(3), {"upper": 1.0}, ValueError, "upper=1.0 belongs to method='newton' with ridge > 0"),
        (np.eye(3), RIDGE | {"upper": 0.0}, ValueError, "upper must be a number above 0"),
        (np.eye(3), RIDGE | {"upper": np.inf}, ValueError, "upper must be a number above 0 and below inf, not inf"),
        (np.eye(3), RIDGE | {"upper": 1.0, "steps": 2}, ValueError, "without steps"),
        (np.eye(3), RIDGE | {"upper": 1.0, "method": "direct"}, ValueError, "belongs to method='newton'"),
        (np.eye(3), RIDGE | {"tol": 0.1}, ValueError, "tol=0.1 needs upper"),
        (
            np.eye(3),
            RIDGE | {"tol": 1.0, "upper": 1.0},
            ValueError,
            "tol must be a number above 0 and below 1.0, not 1.0",
        ),
        (np.eye(3), RIDGE | {"tol": "a", "upper": 1.0}, ValueError, "tol must be a number"),
    ],
)
def test_bad_input(a, options, error, message):
    with pytest.raises(error, match=message):
        pinv_newton(a, **options)
