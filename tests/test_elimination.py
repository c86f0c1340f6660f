"""Inverses with a ridge by block elimination: their error in both precisions, what becomes NaN, and what they cost."""

from __future__ import annotations

import math

import array_api_compat.numpy as xnp
import array_api_compat.torch as xtorch
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import gaussian_gram

from lowrank import _definite, _elimination, pinv_newton
from lowrank._array import namespace, to_host

EPS = float(np.finfo(np.float32).eps)
RIDGE = 1e-3


def spectrum(kind: str, n: int, condition: float) -> np.ndarray:
    """Eigenvalues of A, such that those of A + δI, δ = 1/condition, are in [δ, 1]."""
    ridge = 1 / condition
    if kind == "even":
        return np.geomspace(ridge, 1.0, n) - ridge
    return np.where(np.arange(n) < (1 if kind == "one" else n // 2), 1 - ridge, 0.0)


def semidefinite(values: np.ndarray, batch: int, *, complex_: bool, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    n = len(values)
    z = rng.standard_normal((batch, n, n)) + (1j * rng.standard_normal((batch, n, n)) if complex_ else 0)
    q = np.linalg.qr(z)[0]
    a = ((q * values) @ q.conj().mT).astype(np.complex64 if complex_ else np.float32)
    return (a + a.conj().mT) / 2


def inverse_in_double(a: np.ndarray, ridge: float) -> np.ndarray:
    return np.linalg.inv(a.astype(np.complex128) + ridge * np.eye(a.shape[-1]))


def relative_error(x: np.ndarray, exact: np.ndarray) -> float:
    return float(np.max(np.linalg.norm(x - exact, axis=(-2, -1)) / np.linalg.norm(exact, axis=(-2, -1))))


@pytest.mark.parametrize("kind", ["even", "half", "one"])
@pytest.mark.parametrize("condition", [1.0, 10.0, 5e3, 6e4, 1e6])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33, 49, 130])
def test_error_of_single_precision(n, condition, kind):
    for complex_ in (False, True):
        a = semidefinite(spectrum(kind, n, condition), 3, complex_=complex_)
        assert _elimination.applies(a, ridge=1 / condition, xp=xnp) == (
            np.max(np.trace(a.real, axis1=1, axis2=2)) * condition + n <= 2**24
        )
        if not _elimination.applies(a, ridge=1 / condition, xp=xnp):
            continue
        exact = inverse_in_double(a, 1 / condition)
        x, work = _elimination.inverse(a, ridge=1 / condition, xp=xnp)
        assert work.valid.all()
        assert np.array_equal(x, x.conj().mT)
        # W, S⁻¹ and their product are rounded to single precision, ‖W‖² ≤ κ and √(‖S⁻¹‖·‖WᴴS⁻¹W‖) ≤ ‖P⁻¹‖: √κ·eps,
        # with the norm of the rounding of a product of n terms, √n at the most here.
        assert relative_error(x, exact) <= (2 + np.sqrt(condition)) * EPS


def refined(p: np.ndarray) -> np.ndarray:
    """P⁻¹, by Newton's iteration in extended precision."""
    x, p = np.linalg.inv(p).astype(np.longdouble), p.astype(np.longdouble)
    for _ in range(2):
        x = 2 * x - x @ p @ x
    return x


@pytest.mark.parametrize("kind", ["even", "half", "one"])
@pytest.mark.parametrize("condition", [10.0, 500.0, 3e4])
@pytest.mark.parametrize("n", [2, 16, 40, 65])
def test_error_of_double_precision(n, condition, kind):
    eps = float(np.finfo(float).eps)
    q = np.linalg.qr(np.random.default_rng(n).standard_normal((2, n, n)))[0]
    a = (q * spectrum(kind, n, condition)) @ q.mT
    a = 1e100 * (a + a.mT) / 2
    assert _elimination.applies(a, ridge=1e100 / condition, xp=xnp)
    x, info = pinv_newton(a, hermitian=True, ridge=1e100 / condition, return_info=True)
    assert info.finite.all()
    assert np.array_equal(x, x.mT)
    exact = refined(a / 1e100 + np.eye(n) / condition)
    # What a change of P in its last bits does: the sum A + δI is rounded.
    assert relative_error(1e100 * x, exact) <= 0.5 * condition * eps
    # From the last step on the residual is rounding as well, and the Hermitian part spreads it to both sides.
    assert info.residual.max() <= 0.05 * condition**2 * eps + n * condition * eps


@pytest.mark.parametrize(
    ("dtype", "scale"), [("f4", 1e-31), ("f4", 1e-35), ("f4", 1e35), ("c8", 1e30), ("f8", 1e-300), ("f8", 1e305)]
)
def test_no_scale_is_too_large_or_too_small(dtype, scale):
    gram = np.asarray(gaussian_gram(np.random.default_rng(0).standard_normal((30, 40, 3))))
    a = (gram * scale).astype(dtype)
    ridge = 0.01 * scale
    x, info = pinv_newton(a, hermitian=True, ridge=ridge, return_info=True)
    assert _elimination.applies(a, ridge=ridge, xp=xnp)
    assert info.finite.all()
    wide = np.complex128 if dtype == "c8" else float
    exact = np.linalg.inv(a.astype(wide) / scale + 0.01 * np.eye(40))
    assert relative_error(x.astype(wide) * scale, exact) <= 4001 * float(np.finfo(a.dtype).eps)


@pytest.mark.parametrize("n", [3, 40])
def test_a_ridge_beyond_the_numbers_of_the_dtype(n):
    zero = np.zeros((n, n), dtype=np.float32)
    for ridge in (1e46, 1e300):
        x, info = pinv_newton(zero, hermitian=True, ridge=ridge, return_info=True)
        assert info.finite
        assert not x.any()
    x, info = pinv_newton(zero, hermitian=True, ridge=2.0**-126, return_info=True)
    assert info.finite
    assert np.array_equal(x, 2.0**126 * np.eye(n))
    # Its inverse overflows, and is not taken for one.
    x, info = pinv_newton(zero, hermitian=True, ridge=1e-44, return_info=True)
    assert not info.finite
    assert np.isnan(x).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [33, 49, 190])
def test_blocks_that_have_most_of_their_eigenvectors_in_common(n, dtype):
    """Points in order on a line, whose kernel is smooth: each half of them has the same few eigenvectors as the other,
    and what elimination has to keep is the difference. At the largest κ that it is used for."""
    points = np.linspace(0.0, 1.0, n)
    a = np.exp(-8 * (points[:, None] - points) ** 2).astype(dtype)
    most = _elimination._LARGEST[np.dtype(dtype).name]
    ridge = 1.01 * n / (most - n)
    assert _elimination.applies(a, ridge=ridge, xp=xnp)
    x, info = pinv_newton(a, hermitian=True, ridge=ridge, return_info=True)
    assert info.finite
    p = a.astype(float) + ridge * np.eye(n)
    exact = refined(p)
    lower = np.linalg.inv(np.linalg.cholesky(p.astype(dtype)))
    assert relative_error(x, exact) <= 0.5 * relative_error(lower.T @ lower, exact)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("shape", [(16,), (2, 3, 20), (5, 49), (600, 49)])
def test_agrees_with_the_plain_path_and_is_what_is_called(library, shape):
    *batch, n = shape
    x = np.random.default_rng(n).standard_normal((*batch, n, 3))
    a = np.asarray(gaussian_gram(x), dtype=np.float32)
    a = torch.asarray(a) if library == "torch" else a
    xp = namespace(a=a)
    called, info = pinv_newton(a, hermitian=True, ridge=RIDGE, return_info=True)
    alone, work = _elimination.inverse(a, ridge=RIDGE, xp=xp)
    plain, _ = _definite.scaled_newton(a, ridge=RIDGE, xp=xp)
    called, alone, plain = (to_host(v) for v in (called, alone, plain))
    # A product may add up in another order in another batch.
    assert relative_error(called, alone) <= 20 * EPS
    assert relative_error(called, plain) <= (n + RIDGE) / RIDGE * EPS
    # Rank-one updates by all rows of a block are one product of it, and a level takes four of half the order.
    assert info.products.max() == 1
    assert info.steps.max() == info.bound.max() == 0
    assert tuple(work.valid.shape) == tuple(info.bound.shape) == tuple(batch)


@pytest.mark.parametrize("n", [1, 2, 12, 30])
@pytest.mark.parametrize("complex_", [False, True])
def test_sweeps_invert_and_show_the_pivots(n, complex_):
    rng = np.random.default_rng(n)
    z = rng.standard_normal((2, 5, n, n)) + (1j * rng.standard_normal((2, 5, n, n)) if complex_ else 0)
    a, ridge, scale = z @ z.conj().mT, 0.5, 2.0**-20
    a = (a + a.conj().mT) / 2
    p = a + ridge * np.eye(n)
    assert np.trace(p.real, axis1=-2, axis2=-1).max() < 1 / scale
    for xp, asarray in ((xnp, np.asarray), (xtorch, torch.asarray)):
        memory = asarray(np.full((2 * n + 1, n, 5), np.nan, dtype=a.dtype))
        sweeps = _elimination._Sweeps(memory, scale, xp)
        # A second time in the same memory.
        for given_, full in zip(a, p, strict=True):
            x = asarray(np.empty_like(full))
            ratios = sweeps(asarray(given_), ridge, x)
            tolerance = n * float(np.max(np.linalg.cond(full))) * np.finfo(float).eps
            assert relative_error(-to_host(x), np.linalg.inv(full)) <= tolerance
            pivots = np.diagonal(np.linalg.cholesky(full).real, axis1=1, axis2=2) ** 2
            np.testing.assert_allclose(scale * to_host(ratios).T * pivots, 1.0, rtol=tolerance)


def test_elimination_in_double_precision_leaves_what_one_step_mends():
    """κ²·eps/10, for kernels whose blocks have most of their eigenvectors in common, the worst that is known, times
    phases as well: for complex matrices that takes blocks that stay Hermitian to the last bits."""
    for n in (33, 65, 140):
        points = np.linspace(0.0, 1.0, n)
        phases = np.exp(2j * np.pi * np.random.default_rng(0).random(n))
        real = np.exp(-8 * (points[:, None] - points) ** 2)
        for a in (real, phases[:, None] * real * phases.conj()):
            for condition in (1e4, 1e6):
                p = (a + n / condition * np.eye(n)) / (2 * n)
                elimination = _elimination._Elimination(p[None], 0.0, 1.0, xnp)
                x = elimination.negative_inverse(p[None], math.ceil(math.log2(n / 16)), elimination.dtype)
                left, right = x[0] @ p + np.eye(n), p @ x[0] + np.eye(n)
                worst = max(np.linalg.norm(left, 2), np.linalg.norm(right, 2))
                assert worst <= 0.1 * condition**2 * np.finfo(float).eps


def test_the_least_eigenvalue_may_be_as_negative_as_was_declared_not_to_matter():
    q = np.linalg.qr(np.random.default_rng(1).standard_normal((20, 20)))[0]
    a = (q * np.where(np.arange(20) == 0, -0.5 * RIDGE, 1.0)) @ q.T
    x, info = pinv_newton((a + a.T) / 2, hermitian=True, ridge=RIDGE, return_info=True)
    assert info.finite
    assert relative_error(x, np.linalg.inv(a + RIDGE * np.eye(20))) <= 100 * 2 / RIDGE * np.finfo(float).eps


def test_where_it_applies():
    a = np.eye(5, dtype=np.float32)
    assert _elimination.applies(a, ridge=0.1, xp=xnp)
    assert _elimination.applies(a, ridge=5 / 2**23, xp=xnp)
    assert not _elimination.applies(a, ridge=5 / 2**25, xp=xnp)
    assert _elimination.applies(a.astype(float), ridge=5 / 2**19, xp=xnp)
    assert not _elimination.applies(a.astype(float), ridge=5 / 2**21, xp=xnp)
    assert not _elimination.applies(jnp.asarray(a), ridge=0.1, xp=namespace(a=jnp.asarray(a)))
    # One that is not finite decides nothing.
    assert _elimination.applies(np.stack([a, a * np.nan]), ridge=0.1, xp=xnp)
    assert not _elimination.applies(np.stack([a, a * 1e7]), ridge=0.1, xp=xnp)
    inside = []
    torch.vmap(lambda v: inside.append(_elimination.applies(v, ridge=0.1, xp=xtorch)) or v)(torch.eye(3)[None])
    assert inside == [False]


def test_a_tolerance_is_met_by_either_way():
    gram = np.asarray(gaussian_gram(np.random.default_rng(0).standard_normal((160, 49, 8))), dtype=np.float32)
    for batch, steps in ((1, True), (160, False)):
        a = gram[:batch]
        assert _elimination.applies(a, ridge=0.1, tol=1e-2, xp=xnp) != steps
        x, info = pinv_newton(a, hermitian=True, ridge=0.1, upper=49.0, tol=1e-2, return_info=True)
        assert (info.steps.max() > 0) == steps
        assert np.linalg.norm(np.eye(49) - x @ (a + 0.1 * np.eye(49)), 2, axis=(-2, -1)).max() <= 1e-2


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("n", [3, 16, 40])
@pytest.mark.parametrize("wrong", ["nan", "inf", "corner", "indefinite", "negative", "slightly"])
def test_what_is_not_as_declared_is_nan_and_harms_no_other(wrong, n, library):
    good = np.asarray(gaussian_gram(np.random.default_rng(0).standard_normal((4, n, 2))), dtype=np.float32)
    batch = good.copy()
    if wrong == "indefinite":
        batch[1] -= np.float32(np.linalg.eigvalsh(good[1])[0] + 0.1) * np.eye(n, dtype=np.float32)
    elif wrong == "negative":
        batch[1] = -good[1]
    elif wrong == "slightly":  # one eigenvalue, of −2δ
        q = np.linalg.qr(np.random.default_rng(1).standard_normal((n, n)))[0]
        batch[1] = (q * np.where(np.arange(n) == 0, -2 * RIDGE, 1.0)) @ q.T
    elif wrong == "corner":
        batch[1, 0, -1] = batch[1, -1, 0] = np.nan
    else:
        batch[1, n // 2, n // 2] = {"nan": np.nan, "inf": np.inf}[wrong]
    asarray = torch.asarray if library == "torch" else np.asarray
    x, info = pinv_newton(asarray(batch), hermitian=True, ridge=RIDGE, return_info=True)
    expected = to_host(pinv_newton(asarray(good), hermitian=True, ridge=RIDGE))
    x = to_host(x)
    assert np.isnan(x[1]).all()
    assert to_host(info.finite).tolist() == [True, False, True, True]
    if wrong in ("nan", "inf", "corner"):
        others = asarray(good[[0, 2, 3]])
        expected = to_host(pinv_newton(others, hermitian=True, ridge=RIDGE))
        assert np.array_equal(x[[0, 2, 3]], expected)
    else:
        assert np.array_equal(x[[0, 2, 3]], expected[[0, 2, 3]])


def test_matrices_beyond_its_reach_take_the_plain_path():
    a = semidefinite(spectrum("even", 20, 1e5), 2, complex_=False).astype(float)
    ridge = 1e-5 / 64
    assert not _elimination.applies(a, ridge=ridge, xp=xnp)
    p = a + 1e-5 * np.eye(20)
    x, info = pinv_newton(p, hermitian=True, ridge=ridge, return_info=True)
    assert info.finite.all()
    assert info.steps.min() > 1
    assert relative_error(x, np.linalg.inv(p + ridge * np.eye(20))) <= 1e5 * np.finfo(float).eps
