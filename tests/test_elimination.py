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
from hypothesis import given
from hypothesis import strategies as st

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
            np.max(np.trace(a.real, axis1=1, axis2=2)) * condition + n <= 2**20
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
@pytest.mark.parametrize("condition", [10.0, 500.0, 3e3])
@pytest.mark.parametrize("n", [17, 40, 65])
def test_error_of_double_precision(n, condition, kind):
    eps = float(np.finfo(float).eps)
    q = np.linalg.qr(np.random.default_rng(n).standard_normal((2, n, n)))[0]
    a = (q * spectrum(kind, n, condition)) @ q.mT
    a = 1e100 * (a + a.mT) / 2
    # As often as there have to be numbers.
    many = np.concatenate([a] * 60)
    assert _elimination.applies(many, ridge=1e100 / condition, xp=xnp)
    x, info = pinv_newton(many, hermitian=True, ridge=1e100 / condition, return_info=True)
    assert info.finite.all()
    assert np.array_equal(x, x.mT)
    exact = refined(a / 1e100 + np.eye(n) / condition)
    # What a change of P in its last bits does: the sum A + δI is rounded.
    assert relative_error(1e100 * x[-2:], exact) <= 0.5 * condition * eps
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
    assert _elimination.applies(a, ridge=ridge, xp=xnp) == (scale != 1e-35)
    assert info.finite.all()
    wide = np.complex128 if dtype == "c8" else float
    exact = np.linalg.inv(a.astype(wide) / scale + 0.01 * np.eye(40))
    assert relative_error(x.astype(wide) * scale, exact) <= 4001 * float(np.finfo(a.dtype).eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [33, 49, 190])
def test_blocks_that_have_most_of_their_eigenvectors_in_common(n, dtype):
    """Points in order on a line, whose kernel is smooth: each half of them has the same few eigenvectors as the other,
    and what elimination has to keep is the difference. At the largest κ that it is used for."""
    points = np.linspace(0.0, 1.0, n)
    a = np.exp(-8 * (points[:, None] - points) ** 2).astype(dtype)
    most = _elimination._LARGEST[np.dtype(dtype).name]
    many = np.stack([a] * math.ceil(2**15 / a.size))
    ridge = 1.01 * n / (most - n)
    assert _elimination.applies(many, ridge=ridge, xp=xnp)
    x, info = pinv_newton(many, hermitian=True, ridge=ridge, return_info=True)
    assert info.finite.all()
    p = a.astype(float) + ridge * np.eye(n)
    exact = refined(p)
    lower = np.linalg.inv(np.linalg.cholesky(p.astype(dtype)))
    assert relative_error(x[0], exact) <= 0.5 * relative_error(lower.T @ lower, exact)


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
    # Matrices of one chunk share their steps; apart from that the results are the same numbers.
    assert relative_error(called, alone) <= 20 * EPS
    assert relative_error(called, plain) <= (n + RIDGE) / RIDGE * EPS
    assert info.products.max() <= (18 if n <= 16 else 8)  # of the whole matrix, where it is not divided
    assert info.steps.max() <= 14
    assert tuple(work.valid.shape) == tuple(info.bound.shape) == tuple(batch)


def test_where_it_applies():
    a = np.eye(5, dtype=np.float32)
    assert _elimination.applies(a, ridge=0.1, xp=xnp)
    assert not _elimination.applies(a.astype(np.float64), ridge=0.1, xp=xnp)
    assert not _elimination.applies(np.zeros((1000, 16, 16)), ridge=0.1, xp=xnp)
    assert _elimination.applies(np.zeros((130, 17, 17)), ridge=0.1, xp=xnp)
    assert not _elimination.applies(a, ridge=1e-7, xp=xnp)
    assert not _elimination.applies(jnp.asarray(a), ridge=0.1, xp=namespace(a=jnp.asarray(a)))
    # One that is not finite decides nothing.
    assert _elimination.applies(np.stack([a, a * np.nan]), ridge=0.1, xp=xnp)
    assert not _elimination.applies(np.stack([a, a * 1e6]), ridge=0.1, xp=xnp)
    inside = []
    torch.vmap(lambda v: inside.append(_elimination.applies(v, ridge=0.1, xp=xtorch)) or v)(torch.eye(3)[None])
    assert inside == [False]


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
        # Its norm may decide on the steps of all, which shows in rounding only.
        assert relative_error(x[[0, 2, 3]], expected[[0, 2, 3]]) <= 20 * EPS


@given(st.integers(1, 30), st.floats(-8, 0), st.integers(0, 2**16), st.booleans())
def test_the_interval_holds_the_spectrum(n, exponent, seed, flat):
    rng = np.random.default_rng(seed)
    values = 10.0**exponent * (1 + (1e-9 if flat else 1.0) * rng.exponential(size=n))
    ridge = values.min()
    low, high = _elimination._interval(np.mean(values), np.mean(values**2), n, ridge)
    assert ridge <= low <= values.min()
    assert high >= values.max()
    if n == 2 or flat:  # where it is tight
        assert high <= values.max() * (1 + 1e-5)


@pytest.mark.parametrize("condition", [1.2, 30.0, 5e3, 1e6])
def test_steps_lead_the_interval_to_one(condition):
    chosen = _elimination._steps(condition, 1e-4)
    e = np.geomspace(1 / condition, 1.0, 2001)
    for step in chosen.steps:
        inner, outer = _elimination._weights(step)
        e = inner * e - outer * e * e
    assert np.all((e >= chosen.low * (1 - 1e-12)) & (e <= chosen.high * (1 + 1e-12)))
    assert max(1 - chosen.low, chosen.high - 1) <= 1e-4
    # Each step but the last few makes the smallest eigenvalue almost four times as large.
    assert len(chosen.steps) <= np.log(condition) / np.log(3.9) + 5


def test_a_well_conditioned_matrix_takes_few_steps_whatever_the_ridge():
    def steps(a, ridge):
        return int(pinv_newton(a, hermitian=True, ridge=ridge, return_info=True)[1].steps.max())

    small = semidefinite(spectrum("even", 40, 5e3), 2, complex_=False)
    near_one = np.eye(40, dtype=np.float32) + small / 40
    assert steps(near_one, 2e-4) == steps(near_one, 1e-2) <= 5
    assert steps(small, 2e-4) >= 9


def test_matrices_beyond_its_reach_take_the_plain_path():
    a = semidefinite(spectrum("even", 20, 1e6), 2, complex_=False)
    assert not _elimination.applies(a, ridge=1e-6 / 8, xp=xnp)
    x, info = pinv_newton(a + 1e-6 * np.eye(20, dtype=np.float32), hermitian=True, ridge=1e-6 / 8, return_info=True)
    assert info.finite.all()
    assert relative_error(x, inverse_in_double(a + 1e-6 * np.eye(20, dtype=np.float32), 1e-6 / 8)) <= 1e6 * EPS
