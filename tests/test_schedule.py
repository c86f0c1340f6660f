"""newton_schedule: its bounds hold, on numbers in high precision and on matrices, and its products are those spent."""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from decimal import Decimal

import array_api_strict
import numpy as np
import pytest
from conftest import from_spectrum
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank import NewtonSchedule, newton_schedule, pinv_newton
from lowrank._newton import octic, polynomial
from lowrank._schedule import Step, chebyshev_step, plan
from lowrank._truncated import _PURIFYING

EPS = float(np.finfo(float).eps)
COST = {2: 2, 3: 3, 5: 4, 9: 5}
# The last product in three from split factors.
ACCURATE = 2
CONDITIONS = [1.5, 10.0, 1e2, 1e4, 1e6, 1e12]
# Products with this many rows, columns or terms at the most are thin: probes and leading eigenvectors.
THIN = 8


def start(condition: float, definite: bool) -> float:
    """The lower end of the spectrum of E for the start cI or cAᴴ, its upper end at 1."""
    return 1 / condition if definite else 1 / condition**2


def needed_degree(condition: float, tolerance: float, definite: bool) -> float:
    """acosh(1/tol)/acosh(1/ε₀): no polynomial of lower degree gets there (Chebyshev)."""
    low = start(condition, definite)
    # acosh(1/ε₀) = 2 artanh √low, ε₀ = (1 − low)/(1 + low).
    return math.acosh(1 / tolerance) / (2 * math.atanh(math.sqrt(low)))


def budget(degree: float) -> int:
    """The fewest products whose orders can have a product of at least ``degree``, by dynamic programming."""
    reach = [1, 1]
    while reach[-1] < degree:
        reach.append(max(reach[len(reach) - cost] * d for d, cost in COST.items() if cost <= len(reach)))
    return next(products for products, best in enumerate(reach) if best >= degree)


# --- What is promised -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "definite", "most"),
    [(1e2, True, 10), (1e4, True, 16), (1e6, True, 22), (1e2, False, 18), (1e4, False, 30), (1e6, False, 42)],
)
def test_few_products_are_enough(condition, definite, most):
    schedule = newton_schedule(condition, tolerance=1e-6, definite=definite)
    assert schedule.bounds[-1] <= 1e-6
    assert schedule.products[-1] + ACCURATE <= most


def test_example_of_the_documentation():
    schedule = newton_schedule(1e4, definite=True)
    assert isinstance(schedule, NewtonSchedule)
    assert schedule.orders == (9, 9, 9)
    assert schedule.products == (0, 3, 8, 13)
    # The least that degree 729 can do from ε₀ = (κ − 1)/(κ + 1), and what the floor under the first step costs.
    least = 1 / math.cosh(729 * math.acosh(10001 / 9999))
    assert least <= schedule.bounds[-1] <= 1.02 * least


@given(log_condition=st.floats(0.05, 12), log_tolerance=st.floats(-13, -0.1), definite=st.booleans())
@settings(max_examples=300)
def test_schedules_are_consistent_and_nearly_optimal(log_condition, log_tolerance, definite):
    condition, tolerance = 10.0**log_condition, 10.0**log_tolerance
    schedule = newton_schedule(condition, tolerance=tolerance, definite=definite)
    orders, bounds, products = schedule
    assert len(bounds) == len(products) == len(orders) + 1
    assert bounds[-1] <= tolerance
    assert list(bounds) == sorted(bounds, reverse=True)
    spent = np.cumsum([0] + [COST[d] for d in orders])
    assert products == (0, *(int(s) - 2 * definite for s in spent[1:]))
    degree = needed_degree(condition, tolerance, definite)
    if degree > 1:
        # No orders of fewer products reach the degree; and the floor under folded eigenvalues, which takes up to one
        # per cent of it, costs nothing where orders of as many products reach two per cent more.
        assert budget(degree * (1 - 1e-9)) <= spent[-1] <= budget(1.02 * degree)
        # From one number of products to the next, degrees grow by 9/5 at the most: 5, 9 and 10, 18.
        assert math.prod(orders) <= 1.02 * 1.8 * max(degree, 2)


@pytest.mark.parametrize("definite", [True, False])
@pytest.mark.parametrize("tolerance", [0.5, 1e-2, 1e-6, 1e-15])
def test_worse_conditions_take_no_fewer_products(tolerance, definite):
    conditions = np.geomspace(1, 1e12, 481).tolist()
    products = [newton_schedule(c, tolerance=tolerance, definite=definite).products[-1] for c in conditions]
    assert products == sorted(products)
    assert products[0] < products[-1]


@pytest.mark.parametrize("definite", [True, False])
@pytest.mark.parametrize("condition", [1.1, 2.0, 1e2, 1e4, 1e12])
def test_finer_tolerances_take_no_fewer_products(condition, definite):
    tolerances = np.geomspace(0.9, 1e-15, 301).tolist()
    products = [newton_schedule(condition, tolerance=t, definite=definite).products[-1] for t in tolerances]
    assert products == sorted(products)
    assert products[0] < products[-1]


@pytest.mark.parametrize("definite", [True, False])
@pytest.mark.parametrize("tolerance", [0.9, 1e-6, 1e-15])
def test_a_unitary_matrix_takes_no_steps(tolerance, definite):
    assert newton_schedule(1, tolerance=tolerance, definite=definite) == ((), (0.0,), (0,))


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_general_matrix_costs_what_a_definite_one_of_the_squared_condition_does_and_two_more(condition):
    general, definite = newton_schedule(condition), newton_schedule(condition**2, definite=True)
    assert general.orders == definite.orders
    assert general.products[1:] == tuple(p + 2 for p in definite.products[1:])


@pytest.mark.parametrize("condition", CONDITIONS)
def test_schedules_do_not_depend_on_what_was_asked_before(condition):
    first = newton_schedule(condition, tolerance=1e-9), plan(1 / condition, 1.0, 1e-9)
    for k in range(5000):
        chebyshev_step(2, 0.5 + k * 1e-5, 1.0)
    plan(0.3, 1.7, 1e-4)
    assert first == (newton_schedule(condition, tolerance=1e-9), plan(1 / condition, 1.0, 1e-9))


@pytest.mark.parametrize("condition", [0.999, 0.0, -3.0, math.nan, math.inf, -math.inf, "10", np.ones(2), None])
def test_conditions_that_are_none(condition):
    with pytest.raises(ValueError, match=r"condition must be a number from 1 to 1e\+100, not "):
        newton_schedule(condition)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1e-6, 2.0, math.nan, math.inf, "1", None])
def test_tolerances_that_are_none(tolerance):
    with pytest.raises(ValueError, match=r"tolerance must be a number from 1e-15 to 1, not "):
        newton_schedule(10.0, tolerance=tolerance)


def test_only_the_condition_is_positional():
    with pytest.raises(TypeError):
        newton_schedule(10.0, 1e-6)


# --- On numbers -----------------------------------------------------------------------------------------------------


def exactly(step: Step, e: Decimal) -> Decimal:
    """What the step makes of e, its double precision coefficients taken as they are."""
    r = 1 - Decimal(step.scale) * e
    s = Decimal(0)
    for c in reversed(step.coefficients):
        s = s * r + Decimal(c)
    return Decimal(step.scale) * e * s


def spectrum(low: float, high: float, degree: int) -> list[Decimal]:
    """Both ends, what is between them in the logarithm and evenly, and extrema of T_degree."""
    evenly, logarithmic = np.linspace(low, high, 60), np.geomspace(low, high, 120)
    j = np.unique(np.round(np.geomspace(1, degree, 80)))
    # (1 − ε cos πj/N) times the middle, near the lower end without cancellation.
    extrema = low + (high - low) * np.sin(np.pi * j / (2 * degree)) ** 2
    points = np.clip(np.concatenate([[low, high], evenly, logarithmic, extrema]), low, high)
    return [Decimal(float(e)) for e in points]


def rounding(step: Step) -> float:
    """How far rounding of the coefficients can move 1 − e: they and their sums cancel."""
    return 4 * EPS * sum(abs(c) for c in step.coefficients)


@pytest.mark.parametrize("definite", [True, False])
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-12])
def test_bounds_hold_and_are_reached(condition, tolerance, definite):
    schedule = newton_schedule(condition, tolerance=tolerance, definite=definite)
    low = start(condition, definite)
    steps = plan(low, 1.0, tolerance).steps
    assert schedule.orders == tuple(len(s.coefficients) for s in steps)
    with decimal.localcontext(decimal.Context(prec=60)):
        e = spectrum(low, 1.0, math.prod(schedule.orders))
        middle = (1 + Decimal(low)) / 2
        assert np.isclose(schedule.bounds[0], float(max(abs(1 - x / middle) for x in e)), rtol=4 * EPS)
        slack = 0.0
        for step, bound in zip(steps, schedule.bounds[1:], strict=True):
            e = [exactly(step, x) for x in e]
            worst = float(max(abs(1 - x) for x in e))
            # A step takes at most the whole of what the one before left, and then leaves less of it.
            slack = rounding(step) + slack
            assert bound - slack <= worst <= bound + slack


@given(
    log_low=st.floats(-24, -0.01),
    high=st.floats(1, 1.99),
    order=st.sampled_from(sorted(COST)),
)
@settings(max_examples=200)
def test_a_step_leaves_the_chebyshev_polynomial(log_low, high, order):
    """E's residual is T_d(r/ε)/T_d(1/ε) on a fine grid, between −1/T_d(1/ε) and the same: equal ripples."""
    low = 10.0**log_low
    step = chebyshev_step(order, low, high)
    # No step folds anything below 0.03, so its ripple is 0.97 at the most.
    low = max(low, high * math.tanh(math.acosh(1 / 0.97) / (2 * order)) ** 2)
    ripple = 1 / math.cosh(order * 2 * math.atanh(math.sqrt(low / high)))
    angle = np.linspace(0, math.pi, 8 * order + 1)
    e = low + (high - low) * np.sin(angle / 2) ** 2
    residual = np.array([1 - step.follow(x) for x in e])
    expected = ripple * np.cos(order * angle)
    assert np.allclose(residual, expected, rtol=0, atol=2 * rounding(step))


# --- On matrices ----------------------------------------------------------------------------------------------------


class Counted(np.ndarray):
    """A NumPy array that counts the matrix products it takes part in."""

    products = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        Counted.products += ufunc is np.matmul
        inputs, options["out"] = ([np.asarray(x) for x in several] for several in (inputs, options.get("out", ())))
        options["out"] = tuple(options["out"]) or None
        return getattr(ufunc, method)(*inputs, **options).view(Counted)


def test_products_are_counted():
    a = np.eye(3).view(Counted)
    before = Counted.products
    b = (np.eye(3) @ (2 * a) + np.eye(3)) @ a
    assert isinstance(b, Counted)
    assert Counted.products - before == 2
    assert np.array_equal(np.asarray(b), 3 * np.eye(3))


def spectra(condition: float, n: int) -> dict[str, np.ndarray]:
    return {
        "logarithmic": np.geomspace(1, 1 / condition, n),
        "even": np.linspace(1, 1 / condition, n),
        "one large": np.r_[1.0, np.full(n - 1, 1 / condition)],
        "one small": np.r_[np.ones(n - 1), 1 / condition],
    }


@pytest.mark.parametrize("shape", spectra(2.0, 2))
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize(
    ("condition", "definite"),
    [(1.5, True), (1e2, True), (1e4, True), (1e6, True), (1.5, False), (1e2, False), (1e4, False)],
)
def test_the_same_on_matrices(condition, definite, dtype, shape):
    n, tolerance = 24, 1e-6
    sigma = spectra(condition, n)[shape]
    a, _ = from_spectrum(sigma, n, n, dtype=dtype, complex_=dtype == np.complex128)
    if definite:
        u, _, _ = np.linalg.svd(a)
        a = (u * sigma) @ u.conj().T
    schedule = newton_schedule(condition, tolerance=tolerance, definite=definite)
    low = start(condition, definite)
    steps = plan(low, 1.0, tolerance).steps
    counted, eye, before = a.view(Counted), np.eye(n), Counted.products
    for k, step in enumerate(steps):
        c = step.coefficients
        if k == 0 and definite:  # X₀ = I needs no products with X.
            x = polynomial(eye - step.scale * counted, c, np, factor=step.scale)
        else:
            x = counted.conj().T if k == 0 else x
            r = eye - step.scale * (x @ counted)
            x = polynomial(r, c, np, factor=step.scale) @ x
        assert Counted.products - before == schedule.products[k + 1]
        # Rounding of E, √n·eps, is 1/low times as much of its smallest eigenvalues while these grow; once they have,
        # it is rounding of A alone that counts, which moves XA by κ·eps.
        worst = condition if step is steps[-1] else 1 / low
        residual = np.linalg.norm(eye - np.asarray(x) @ a, 2)
        assert residual <= schedule.bounds[k + 1] + 4 * math.sqrt(n) * worst * EPS


# --- Polynomials of matrices ----------------------------------------------------------------------------------------


def horner(r: np.ndarray, c: tuple[float, ...]) -> np.ndarray:
    """Σ cₖRᵏ, term by term from the highest, in extended precision where there is one."""
    wide = r.astype(np.clongdouble if np.iscomplexobj(r) else np.longdouble)
    total = np.zeros_like(wide)
    for coefficient in reversed(c):
        total = total @ wide + np.longdouble(coefficient) * np.eye(len(r), dtype=np.longdouble)
    return total.astype(r.dtype)


def contraction(n: int, *, complex_: bool, seed: int) -> np.ndarray:
    """A random matrix of norm 1, far from normal."""
    rng = np.random.default_rng(seed)
    r = rng.standard_normal((n, n)) + (1j * rng.standard_normal((n, n)) if complex_ else 0.0)
    return r / np.linalg.norm(r, 2)


def check_polynomial(c: tuple[float, ...], r: np.ndarray) -> None:
    expected, given_ = horner(r, c), r.copy()
    # Every product rounds by up to √n·eps of its factors' norms; those of the parts are those of the coefficients.
    tolerance = 4 * math.sqrt(len(r)) * EPS * sum(map(abs, c))
    assert np.linalg.norm(polynomial(r, c, np) - expected, 2) <= tolerance
    square = r @ r
    square.flags.writeable = False
    assert np.linalg.norm(polynomial(r, c, np, square=square) - expected, 2) <= tolerance
    assert np.linalg.norm(polynomial(r, c, np, factor=-0.7) + 0.7 * expected, 2) <= tolerance
    assert np.array_equal(r, given_)
    # On numbers it is polyval.
    eigenvalues = np.linspace(-1, 1, 9)
    values = np.diag(polynomial(np.diag(eigenvalues), c, np))
    assert np.allclose(values, np.polynomial.polynomial.polyval(eigenvalues, c), rtol=0, atol=tolerance)


@given(
    log_low=st.floats(-24, 0),
    high=st.floats(1, 1.99),
    order=st.sampled_from(sorted(COST)),
    n=st.integers(1, 24),
    complex_=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=200)
def test_polynomials_of_all_steps_are_what_horner_gives(log_low, high, order, n, complex_, seed):
    c = chebyshev_step(order, 10.0**log_low, high).coefficients
    assert len(c) == order
    check_polynomial(c, contraction(n, complex_=complex_, seed=seed))


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("c", [_PURIFYING, (1.0,) * 9, (1.0,) * 5, (1.0,) * 3, (1.0,) * 2, (0.3, -2.0, 5.0, 0.0, 1.0)])
def test_polynomials_of_purification_and_polishing_are_what_horner_gives(c, complex_):
    check_polynomial(c, contraction(24, complex_=complex_, seed=0))


@pytest.mark.parametrize("order", sorted(COST))
def test_polynomials_take_the_products_they_say(order):
    c, r = chebyshev_step(order, 1e-2, 1.0).coefficients, contraction(6, complex_=False, seed=0).view(Counted)
    square, before = r @ r, Counted.products
    polynomial(r, c, np)
    # S(R) alone; a step takes E = XA and S·X besides.
    assert Counted.products - before == COST[order] - 2
    polynomial(r, c, np, square=square)
    assert Counted.products - before == 2 * (COST[order] - 2) - (order > 2)


@given(log_low=st.floats(-24, 0), high=st.floats(1, 1.99))
@settings(max_examples=500)
def test_theoctic_form_exists_for_all_steps(log_low, high):
    """ρ of the form is a root of ρ² − 2hρ + h² − D; D > 0 with a margin, and no parameter is large."""
    c = np.array(chebyshev_step(9, 10.0**log_low, high).coefficients)
    monic = c / c[8]
    zeta = monic[7] / 2
    total = monic[6] - zeta**2
    gamma = monic[5] - zeta * total
    half = (total - gamma / zeta) / 2
    assert c[8] * (half**2 + zeta * gamma + monic[3] / zeta - monic[4]) > 1
    form = octic(tuple(c.tolist()))
    # The parts multiplied out, from the lowest power, are the coefficients above the linear one.
    left, right = [form.delta, form.gamma, form.beta, form.zeta, 1.0], [0.0, 0.0, form.rho, form.zeta, 1.0]
    product = np.polynomial.polynomial.polymul(left, right)
    product[2] += form.phi
    # What is multiplied is not much larger than what it adds up to, so that little cancels.
    size = sum(map(abs, left)) * sum(map(abs, right))
    assert size <= 8 * np.sum(np.abs(monic))
    assert np.allclose(product[2:], monic[2:], rtol=0, atol=8 * EPS * size)


# --- What pinv_newton spends ----------------------------------------------------------------------------------------


@pytest.fixture
def count_products(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The products in pinv_newton(a, ...) that are not thin, counted where array-api-strict multiplies."""
    array = type(array_api_strict.zeros(1))
    multiply = array.__matmul__
    found: list[tuple[int, ...]] = []

    def counting(self, other):
        found.append((*self.shape[-2:], other.shape[-1]))
        return multiply(self, other)

    def uncounted(*arguments, **options):
        raise AssertionError("a product that is not written with @ escapes the count")

    monkeypatch.setattr(array, "__matmul__", counting)
    for module, names in (
        (array_api_strict, ("matmul", "tensordot", "vecdot")),
        (array_api_strict.linalg, ("matmul", "tensordot", "vecdot", "matrix_power", "outer")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, uncounted)

    def count(a: np.ndarray, **options) -> int:
        found.clear()
        pinv_newton(array_api_strict.asarray(a), **options)
        return sum(min(dimensions) > THIN for dimensions in found)

    return count


def claimed(a: np.ndarray, **options) -> int:
    _, info = pinv_newton(array_api_strict.asarray(a), return_info=True, **options)
    assert bool(info.finite)
    return int(info.products)


def with_ridge(condition: float, n: int, dtype: type) -> tuple[np.ndarray, float]:
    """A ≽ 0 and δ, such that A + δI has its eigenvalues in [1/κ, 1] and δ is just below the least."""
    ridge = 0.999 / condition
    a, _ = from_spectrum(np.geomspace(1, 1 / condition, n) - ridge, n, n)
    u, sigma, _ = np.linalg.svd(a)
    a = ((u * sigma) @ u.T).astype(dtype)
    return (a + a.T) / 2, ridge


@pytest.mark.parametrize("steps", [0, 3])
def test_the_count_is_right_for_the_textbook_iteration(count_products, steps):
    a, _ = from_spectrum(np.geomspace(1, 0.5, 12), 12, 12)
    assert count_products(a, steps=steps) == claimed(a, steps=steps) == 2 * steps


@pytest.mark.parametrize(
    ("condition", "dtype", "most"),
    [
        (1e2, np.float32, 12),
        (1e2, np.float64, 14),
        (1e4, np.float32, 17),
        (1e4, np.float64, 18),
        (1e6, np.float64, 24),
    ],
)
def test_products_of_a_ridge_are_those_spent(count_products, condition, dtype, most):
    a, ridge = with_ridge(condition, 24, dtype)
    said, spent = (f(a, hermitian=True, ridge=ridge) for f in (claimed, count_products))
    assert said == spent <= most


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("condition", [1.0, 1e1, 1e2, 1e4])
@pytest.mark.parametrize(("m", "n", "rank"), [(24, 24, 24), (24, 24, 12), (60, 24, 24), (60, 24, 12), (24, 60, 24)])
def test_products_without_a_ridge_are_those_spent(count_products, m, n, rank, condition, dtype):
    a, _ = from_spectrum(np.geomspace(1, 1 / condition, rank), m, n, dtype=dtype)
    said, spent = claimed(a), count_products(a)
    assert said == spent


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rank", [24, 12])
def test_products_of_hermitian_matrices_are_those_spent(count_products, rank, dtype):
    a, _ = from_spectrum(np.geomspace(1, 1e-2, rank), 24, 24)
    u, sigma, _ = np.linalg.svd(a)
    a = ((u * sigma) @ u.T).astype(dtype)
    a = (a + a.T) / 2
    said, spent = claimed(a, hermitian=True), count_products(a, hermitian=True)
    assert said == spent
