"""``pinv_newton`` on NumPy alone: values on prescribed spectra, what its info says, and every refusal."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import from_spectrum, gaussian_gram

from lowrank import PinvInfo, _newton, newton_schedule, pinv_newton

SIGMA = np.array([3.0, 1.0, 0.5, 0.1])
EPS = 2.3e-16


def close(x, expected, *, kappa=30.0, eps=EPS):
    """To 50·κ·eps of the largest entry."""
    assert x.shape == expected.shape
    np.testing.assert_allclose(x, expected, rtol=0, atol=50 * kappa * eps * np.abs(expected).max(initial=1e-300))


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("method", ["newton", "direct"])
@pytest.mark.parametrize("shape", [(4, 4), (9, 4), (4, 9), (7, 6), (6, 7), (40, 5)])
def test_pseudoinverse(shape, method, complex_):
    a, expected = from_spectrum(SIGMA, *shape, complex_=complex_, dtype=np.complex128 if complex_ else np.float64)
    x, info = pinv_newton(a, method=method, return_info=True)
    close(x, expected)
    assert info.rank == 4
    assert bool(info.finite)
    assert info.residual < 1e-13
    # σ_max is known to a few per cent.
    assert math.isclose(info.cutoff, 1e-11 * 3.0, rel_tol=0.1)
    # Whoever runs no iteration has none to count.
    assert (info.steps == 0) == (info.products == 0) == (info.bound == 0) == (method == "direct")
    assert method == "direct" or 0 < info.bound < 1e-8
    np.testing.assert_array_equal(pinv_newton(a, method=method), x)


@pytest.mark.parametrize("method", ["newton", "direct"])
def test_hermitian_and_indefinite(method):
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
    values = np.array([2.0, -1.0, 0.5, -0.25, 0.0, 0.0])
    inverse = np.where(values != 0, 1 / np.where(values == 0, 1, values), 0)
    x, info = pinv_newton((q * values) @ q.T, hermitian=True, method=method, return_info=True)
    close(x, (q * inverse) @ q.T)
    np.testing.assert_array_equal(x, x.T)
    assert info.rank == 4


@pytest.mark.parametrize("options", [{}, {"method": "direct"}, {"upper": 8.0}])
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_ridge(ridge, options):
    a = np.stack([gaussian_gram(s * np.random.default_rng(1).standard_normal((8, 2))) for s in (0.1, 1.0, 3.0)])
    expected = np.linalg.inv(a + ridge * np.eye(8))
    x, info = pinv_newton(a, hermitian=True, ridge=ridge, return_info=True, **options)
    close(x, expected, kappa=1 + 8 / ridge)
    np.testing.assert_array_equal(x, x.mT)
    assert (info.rank == 8).all()
    assert (info.cutoff == 0).all()
    assert info.finite.all()


def test_eigenvalues_below_the_ridge():
    """Rounding may leave one eps·n·‖P‖ below it, and no more."""
    slack = np.finfo(float).eps * 4 * 1001.0
    a = np.stack([np.diag([1000.0, 0.0, 0.0, -below * slack]) for below in (0.0, 0.5, 2.0)])[:, None]
    x, info = pinv_newton(a, hermitian=True, ridge=1.0, method="direct", return_info=True)
    assert info.finite[:, 0].tolist() == [True, True, False]
    close(x[0, 0], np.diag([1 / 1001, 1.0, 1.0, 1.0]), kappa=1001.0)
    for method in ("newton", "direct"):
        assert pinv_newton(np.array([[3.0]]), hermitian=True, ridge=1.0, method=method).tolist() == [[0.25]]
        singular = np.diag([1.0, -1e-17])
        assert np.isnan(pinv_newton(singular, hermitian=True, ridge=1e-17, method=method)).all()


def test_products_follow_from_the_condition_where_steps_are_taken():
    a = np.diag(np.linspace(1.0, 0.0, 16))
    options = {"hermitian": True, "upper": 1.0, "return_info": True}
    infos = [pinv_newton(a, ridge=ridge, tol=1e-6, **options)[1] for ridge in (0.5, 1e-4)]
    assert infos[0].products < infos[1].products <= 25
    assert infos[0].steps < infos[1].steps
    loose = pinv_newton(np.eye(16), ridge=1e-4, tol=0.1, **options)[1]
    assert loose.products < infos[1].products
    # ‖E − E²‖ in the Frobenius norm, of 16 eigenvalues that are all the same and no more than 0.1 off 1.
    assert loose.bound <= 0.1
    assert loose.residual <= 4 * 0.1 * 1.1
    # Without a tolerance it is by elimination and a step, whatever the condition is.
    exact = [pinv_newton(a, hermitian=True, ridge=ridge, return_info=True)[1] for ridge in (0.5, 1e-4)]
    assert exact[0].steps == exact[1].steps == 1
    assert exact[0].products == exact[1].products <= 5


def test_textbook_steps_to_the_letter():
    a = np.random.default_rng(2).standard_normal((3, 5, 4))
    for steps in (0, 1, 3):
        x, info = pinv_newton(a, steps=steps, return_info=True)
        for one, found, k, products in zip(a, x, info.steps, info.products, strict=True):
            expected = 1.8 / (np.linalg.norm(one, 1) * np.linalg.norm(one, np.inf)) * one.T
            for _ in range(steps):
                expected = 2 * expected - expected @ one @ expected
            close(found, expected, kappa=1.0)
            assert k == steps
            assert products == 2 * steps
    close(pinv_newton(1e-3 * a, steps=3), 1e3 * x, kappa=1.0)
    wide = np.swapaxes(a, -1, -2)
    close(pinv_newton(wide, steps=2), np.swapaxes(pinv_newton(a, steps=2), -1, -2), kappa=1.0)
    alpha = np.array([0.01, 0.02, 0.03])
    close(pinv_newton(a, steps=0, alpha=alpha), alpha[:, None, None] * wide, kappa=1.0)
    p = gaussian_gram(a[0]) + 0.5 * np.eye(5)
    close(pinv_newton(gaussian_gram(a[0]), hermitian=True, ridge=0.5, alpha=0.1, steps=0), 0.1 * p, kappa=1.0)
    # The bound is the larger of 1 − s·(δ/‖P‖₁)(δ/‖P‖_∞) and s − 1, s = α‖P‖₁‖P‖_∞, to the power 2^steps.
    for ridge, given in ((0.5, None), (20.0, None), (0.5, 0.02), (20.0, 0.003)):
        options = {"hermitian": True, "ridge": ridge, "alpha": given, "steps": 3}
        bound = pinv_newton(gaussian_gram(a[0]), return_info=True, **options)[1].bound
        one = np.linalg.norm(gaussian_gram(a[0]) + ridge * np.eye(5), 1)
        spread = 1.8 if given is None else given * one**2
        assert math.isclose(bound, max(1 - spread * (ridge / one) ** 2, spread - 1) ** 8, rel_tol=1e-9)
    assert not pinv_newton(np.zeros((2, 2)), steps=2).any()


def test_cutoff_decides_the_rank():
    a, _ = from_spectrum(np.array([1.0, 1e-3, 1e-6]), 5, 5)
    assert pinv_newton(a, return_info=True)[1].rank == 3
    x, info = pinv_newton(a, rtol=1e-4, return_info=True)
    assert info.rank == 2
    assert 0.9e-4 < info.cutoff < 1.2e-4
    close(x, np.linalg.pinv(a, rcond=1e-4), kappa=1e3)
    assert pinv_newton(a, rtol=1e-2, method="direct", return_info=True)[1].rank == 1
    # Out of reach of products, and raised to what is not; eigh and SVD take it as it is.
    single = a.astype(np.float32)
    assert 0.9e-12 < pinv_newton(a, rtol=0.0, return_info=True)[1].cutoff < 1.2e-12
    assert pinv_newton(a, rtol=0.0, method="direct", return_info=True)[1].cutoff == 0
    assert 0.9e-6 < pinv_newton(single, rtol=0.0, return_info=True)[1].cutoff < 1.2e-6
    assert 0.9e-5 < pinv_newton(single, return_info=True)[1].cutoff < 1.2e-5
    # What is at the cutoff is dropped, zeros with it.
    half = np.diag([1.0, 0.5])
    assert pinv_newton(half, rtol=0.5, method="direct").tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert pinv_newton(np.diag([1.0, 0.0]), rtol=0.0, method="direct").tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_what_is_not_finite_stays_alone():
    a = np.random.default_rng(3).standard_normal((4, 3, 3))
    clean = pinv_newton(a)
    a[1, 0, 0], a[2, 2, 2] = np.nan, np.inf
    for options in ({}, {"method": "direct"}, {"steps": 3}):
        x, info = pinv_newton(a, return_info=True, **options)
        assert np.isnan(x[1:3]).all()
        assert info.finite.tolist() == [True, False, False, True]
        assert info.rank.tolist()[1:3] == [-1, -1]
        assert np.isnan(info.residual[1:3]).all()
    np.testing.assert_array_equal(pinv_newton(a)[[0, 3]], clean[[0, 3]])


def test_declarations_that_do_not_hold():
    a = np.stack([np.eye(3), np.diag([1.0, 1.0, -1.0]), np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1.0]])])
    for options in ({}, {"method": "direct"}):
        x, info = pinv_newton(a, hermitian=True, ridge=0.1, return_info=True, **options)
        assert np.isnan(x).all((1, 2)).tolist() == [False, True, True]
        assert info.finite.tolist() == [True, False, False]
        assert info.residual[1] == np.inf  # it is finite, but not what it was said to be
        close(x[0], np.eye(3) / 1.1)
    assert np.isnan(pinv_newton(a, hermitian=True)).all((1, 2)).tolist() == [False, False, True]
    one_sided = np.where(np.arange(9).reshape(3, 3) == 1, np.inf, np.eye(3))
    for options in ({}, {"method": "direct"}, {"steps": 2}):
        assert np.isnan(pinv_newton(one_sided, hermitian=True, ridge=0.1, **options)).all()


@pytest.mark.parametrize("options", [{}, {"method": "direct"}, {"steps": 2}])
def test_rounding_is_taken_for_hermitian(options, monkeypatch):
    """Up to √eps, 1.5e-8, of the largest entry of a matrix, whatever the others are, and in chunks of the batch."""
    a = np.stack([np.eye(3) + np.triu(np.full((3, 3), off), 1) for off in (1e-8, 2e-8)] + [np.zeros((3, 3))])
    a = np.stack([1e-6 * a, 1e6 * a])[:, None]
    x, info = pinv_newton(a, hermitian=True, return_info=True, **options)
    assert info.finite.tolist() == [[[True, False, True]]] * 2
    assert np.isnan(x).all((-2, -1)).tolist() == [[[False, True, False]]] * 2
    monkeypatch.setattr(_newton, "_CHUNK", {True: 2 * 9})
    for found, whole in zip(pinv_newton(a, hermitian=True, **options), x, strict=True):
        np.testing.assert_array_equal(np.isnan(found), np.isnan(whole))
        close(np.nan_to_num(found), np.nan_to_num(whole), kappa=1.0)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_scales_are_neither_lost_nor_overflow(scale):
    a, expected = from_spectrum(SIGMA, 7, 5)
    close(pinv_newton(a * scale) * scale, expected)


@pytest.mark.parametrize(("dtype", "eps"), [(np.float32, 1.2e-7), (np.float16, 1e-3)])
def test_dtypes(dtype, eps):
    a, expected = from_spectrum(SIGMA, 6, 4)  # of full rank: rounding to half precision is not below any cutoff
    x = pinv_newton(a.astype(dtype))
    assert x.dtype == dtype
    close(x.astype(float), expected, eps=eps)


def test_nothing_and_no_batch():
    for shape in ((0, 3), (3, 0), (2, 0, 0), (0, 2, 3)):
        x, info = pinv_newton(np.zeros(shape), return_info=True)
        assert x.shape == (*shape[:-2], shape[-1], shape[-2])
        assert (info.rank == 0).all()
        assert all(values.shape == shape[:-2] for values in info)
        assert info.finite.all()
        assert isinstance(info, PinvInfo)
    close(pinv_newton(np.array([[4.0]])), np.array([[0.25]]), kappa=1.0)
    assert pinv_newton(np.zeros((3, 2))).tolist() == [[0.0] * 3] * 2


EYE = np.eye(3)


@pytest.mark.parametrize(
    ("a", "options", "error", "message"),
    [
        (np.ones(3), {}, ValueError, r"must have shape \(..., m, n\), not \(3,\)"),
        (np.ones((2, 3), dtype=int), {}, TypeError, "int"),
        (np.ones((2, 3)), {"hermitian": True}, ValueError, r"square matrices, a has shape \(2, 3\)"),
        (np.ones((2, 2, 3)), {"hermitian": True}, ValueError, r"square matrices, a has shape \(2, 2, 3\)"),
        (EYE, {"hermitian": True, "ridge": -1.0}, ValueError, "ridge must be a finite number >= 0, not -1.0"),
        (EYE, {"hermitian": True, "ridge": math.nan}, ValueError, "ridge must be a finite number >= 0, not nan"),
        (EYE, {"hermitian": True, "ridge": math.inf}, ValueError, "ridge must be a finite number >= 0, not inf"),
        (EYE, {"hermitian": True, "ridge": "1"}, ValueError, "ridge must be a finite number >= 0, not '1'"),
        (EYE, {"ridge": 1.0}, ValueError, "pass hermitian=True as well"),
        (EYE, {"rtol": 1.0}, ValueError, r"rtol must be a number in \[0, 1\), not 1.0"),
        (EYE, {"rtol": -0.1}, ValueError, r"rtol must be a number in \[0, 1\), not -0.1"),
        (EYE, {"rtol": "no"}, ValueError, r"rtol must be a number in \[0, 1\), not 'no'"),
        (EYE, {"rtol": 0.1, "steps": 2}, ValueError, "has no meaning with steps"),
        (EYE, {"rtol": 0.1, "hermitian": True, "ridge": 1.0}, ValueError, "has no meaning with ridge > 0"),
        (EYE, {"method": "svd"}, ValueError, "method must be 'newton' or 'direct', not 'svd'"),
        (EYE, {"steps": -1}, ValueError, "steps must be an integer >= 0, not -1"),
        (EYE, {"steps": 2.0}, ValueError, "steps must be an integer >= 0, not 2.0"),
        (EYE, {"steps": True}, ValueError, "steps must be an integer >= 0, not True"),
        (EYE, {"steps": 2, "method": "direct"}, ValueError, "steps belongs to method='newton'"),
        (EYE, {"alpha": 0.1}, ValueError, "pass steps as well"),
        (EYE, {"alpha": math.inf, "steps": 1}, ValueError, "alpha must be finite, not inf"),
        (EYE, {"alpha": np.asarray(1j), "steps": 1}, TypeError, "alpha has dtype complex128"),
        (EYE, {"alpha": np.ones(2), "steps": 1}, ValueError, r"alpha has shape \(2,\), which does not broadcast"),
        (np.ones((2, 3, 3)), {"alpha": np.ones(5), "steps": 1}, ValueError, r"alpha has shape \(5,\)"),
        (EYE, {"upper": 0.0, "hermitian": True, "ridge": 1.0}, ValueError, "upper must be a number above 0"),
        (EYE, {"upper": math.inf, "hermitian": True, "ridge": 1.0}, ValueError, "upper must be a number above 0"),
        (EYE, {"tol": 1.0, "upper": 1.0, "hermitian": True, "ridge": 1.0}, ValueError, "tol must be a number above 0"),
        (EYE, {"tol": 0.1, "hermitian": True, "ridge": 1.0}, ValueError, "tol=0.1 needs upper"),
        (EYE, {"upper": 1.0}, ValueError, "upper=1.0 belongs to method='newton' with ridge > 0"),
        (EYE, {"upper": 1.0, "hermitian": True, "ridge": 1.0, "steps": 1}, ValueError, "upper=1.0 belongs to"),
        (EYE, {"upper": 1.0, "hermitian": True, "ridge": 1.0, "method": "direct"}, ValueError, "upper=1.0 belongs to"),
    ],
)
def test_refusals(a, options, error, message):
    with pytest.raises(error, match=message):
        pinv_newton(a, **options)


def test_bounds_of_the_options_themselves_are_taken():
    assert np.isfinite(pinv_newton(EYE, rtol=0)).all()
    assert np.isfinite(pinv_newton(EYE, rtol=np.float64(0.999))).all()
    assert np.isfinite(pinv_newton(EYE, steps=np.int64(0))).all()
    assert np.isfinite(pinv_newton(np.ones((2, 3, 3)), steps=1, alpha=np.ones(1))).all()
    assert np.isfinite(pinv_newton(EYE, hermitian=True, ridge=0)).all()
    schedule = newton_schedule(1e4, definite=True)
    assert schedule.bounds[-1] <= 1e-6
