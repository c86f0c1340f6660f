"""How many steps Newton's iteration takes, from a scalar recursion: ``newton_schedule``.

Everything in ``_newton`` is a composition of steps X ← s S(I − sE) X, E = XA, with polynomials S of degree d − 1
that act on the eigenvalues of E alone. S is chosen so that I − E becomes the Chebyshev polynomial T_d, the minimax
choice; since T_a∘T_b = T_ab a composition is minimax again (V. Pan and R. Schreiber, SIAM J. Sci. Stat. Comput. 12,
1991, for d = 2). Steps of different orders are mixed so that the number of matrix products is least.
"""

from __future__ import annotations

import functools
import itertools
import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

# Matrix products of a step of order d: one for E, one for S·X, and those that S takes (see _newton.polynomial).
PRODUCTS = {2: 2, 3: 3, 5: 4, 9: 5}
# No step folds the large eigenvalues of E below this. Folded to rounding level they could change sign and never come
# back; it takes one per cent off the growth of the small ones.
_FLOOR = 0.03
# What newton_schedule takes: squares of conditions that do not overflow, and bounds that differ from 0 when rounded.
_LARGEST, _SMALLEST = 1e100, 1e-15


_Result = TypeVar("_Result")

# Functions of numbers alone, whose results torch's compiler is to take as they are (see _torch_rules).
constants: list[Callable[..., Any]] = []


def remembered(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Compute once per argument. (Not functools.cache, which torch's compiler looks behind.)"""
    known: dict[tuple[Any, ...], _Result] = {}

    @functools.wraps(function)
    def recalled(*arguments: Any) -> _Result:
        found = known.get(arguments)
        if found is None:
            if len(known) >= 4096:
                known.clear()
            found = known[arguments] = function(*arguments)
        return found  # and not known[arguments], which another thread may have cleared

    constants.append(recalled)
    return recalled


class Step(NamedTuple):
    """X ← scale·S(R)X with R = I − scale·E and S(R) = Σ coefficients[k] Rᵏ."""

    scale: float
    coefficients: tuple[float, ...]

    def follow(self, e: float) -> float:
        """What the step makes of an eigenvalue e of E."""
        r, s = 1 - self.scale * e, 0.0
        for c in reversed(self.coefficients):
            s = s * r + c
        return self.scale * e * s


class Plan(NamedTuple):
    """Steps for spectra of E in [low, high], the interval they lead to, and their matrix products."""

    steps: tuple[Step, ...]
    low: float
    high: float
    products: int


class NewtonSchedule(NamedTuple):
    """Steps to a tolerance: see :func:`newton_schedule`.

    Parameters
    ----------
    orders : tuple of int
        The order d of every step; the distance of E from I becomes that of T_d.
    bounds : tuple of float
        Bounds on ‖I − E‖₂ before the first step and after each, in exact arithmetic.
    products : tuple of int
        Matrix products spent up to there.
    """

    orders: tuple[int, ...]
    bounds: tuple[float, ...]
    products: tuple[int, ...]


def newton_schedule(condition: float, /, *, tolerance: float = 1e-6, definite: bool = False) -> NewtonSchedule:
    """The steps of fewest matrix products that lead to ‖I − XA‖₂ ≤ tolerance.

    With the spectrum of E = XA in [1 − ε, 1 + ε], a step of order d leaves ε' = 1/T_d(1/ε), T_d the Chebyshev
    polynomial: for d = 2, ε' = ε²/(2 − ε²), against ε² without scaling. The orders 2, 3, 5 and 9 take 2, 3, 4
    and 5 products.

    Parameters
    ----------
    condition : float
        κ ≥ 1, the ratio of the largest to the smallest singular value of A.
    tolerance : float
        Bound to reach, from 1e-15 to 1.
    definite : bool
        A is Hermitian positive definite and the start is a multiple of I: ε₀ = (κ − 1)/(κ + 1), and the first
        step takes two products less. Otherwise the start is a multiple of Aᴴ, with κ² in place of κ.

    Returns
    -------
    NewtonSchedule

    Raises
    ------
    TypeError
        If ``definite`` is neither True nor False.
    ValueError
        If ``condition`` is no number from 1 to 1e100, or ``tolerance`` none from 1e-15 to 1.

    Examples
    --------
    >>> from lowrank import newton_schedule
    >>> schedule = newton_schedule(1e4, definite=True)
    >>> schedule.orders, schedule.products[-1]
    ((9, 9, 9), 13)
    """
    if not (isinstance(condition, numbers.Real) and 1 <= condition <= _LARGEST):
        raise ValueError(f"condition must be a number from 1 to {_LARGEST:g}, not {_shown(condition)}")
    if not (isinstance(tolerance, numbers.Real) and _SMALLEST <= tolerance < 1):
        raise ValueError(f"tolerance must be a number from {_SMALLEST:g} to 1, not {_shown(tolerance)}")
    if not isinstance(definite, (bool, np.bool_)):
        raise TypeError(f"definite must be True or False, not {_shown(definite)}")
    condition, tolerance = float(condition), float(tolerance)
    low = 1 / condition if definite else 1 / condition**2
    bounds, spent = [(1 - low) / (1 + low)], [0]
    chosen = plan(low, 1.0, tolerance) if bounds[0] > tolerance else Plan((), low, 1.0, 0)
    interval = (low, 1.0)
    for step in chosen.steps:
        interval = advance(step, *interval)
        bounds.append(max(1 - interval[0], interval[1] - 1))
        spent.append(spent[-1] + PRODUCTS[len(step.coefficients)] - 2 * (definite and len(spent) == 1))
    return NewtonSchedule(tuple(len(s.coefficients) for s in chosen.steps), tuple(bounds), tuple(spent))


def _shown(value: Any) -> str:
    """A value as a message names it, on one line: a number or a text by its first digits, all else by its type."""
    return f"{value!r:.40}" if isinstance(value, (numbers.Real, str)) else type(value).__name__


@remembered
def plan(low: float, high: float, tolerance: float, largest: int = 9) -> Plan:
    """The steps of fewest products from [low, high] into [1 − tolerance, 1 + tolerance], of orders up to ``largest``,
    which is 3 or 9."""
    if max(1 - low, high - 1) <= tolerance:
        return Plan((), low, high, 0)
    growth = math.acosh(1 / tolerance) / _acosh_of_inverse(low, high)
    # Candidates in the order of their products; the floor may take a little from what the orders promise.
    for products, orders in _compositions(math.ceil(math.log(max(growth, 2), largest)) + 1, largest):
        if math.prod(orders) >= 0.99 * growth:
            found = _run(orders, low, high)
            if max(1 - found.low, found.high - 1) <= tolerance:
                return found._replace(products=products)
    raise AssertionError(f"no schedule from [{low}, {high}] to {tolerance}")


@remembered
def _compositions(longest: int, largest: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Non-increasing sequences of orders, of the largest so many and of others a few, with their products, cheapest
    first."""
    found = []
    most = (longest + 1, 3, 4, 3) if largest == 9 else (1, 1, longest + 1, 3)
    for nines, fives, threes, twos in itertools.product(*map(range, most)):
        orders = (9,) * nines + (5,) * fives + (3,) * threes + (2,) * twos
        found.append((sum(PRODUCTS[d] for d in orders), orders))
    return tuple(sorted((f for f in found if f[1]), key=lambda f: (f[0], -math.prod(f[1]))))


def _run(orders: tuple[int, ...], low: float, high: float) -> Plan:
    steps = []
    for d in orders:
        steps.append(chebyshev_step(d, low, high))
        low, high = advance(steps[-1], low, high)
    return Plan(tuple(steps), low, high, 0)


def advance(step: Step, low: float, high: float) -> tuple[float, float]:
    """The interval that a step leads [low, high] into."""
    d = len(step.coefficients)
    ripple = 1 / math.cosh(d * _safe_acosh(d, low, high))
    return min(step.follow(low), 1 - ripple), 1 + ripple


def _acosh_of_inverse(low: float, high: float) -> float:
    """acosh(1/ε) of ε = (high − low)/(high + low), with all digits also where low is tiny; at most 40, where
    1/cosh is below the rounding of anything."""
    z = 2 * low / (high - low) if high > low else math.inf
    return min(math.log1p(z + math.sqrt(z * (2 + z))), 40.0) if math.isfinite(z) else 40.0


def _safe_acosh(d: int, low: float, high: float) -> float:
    """acosh(1/ε) for a step of order d that leaves nothing below the floor but what came from below it."""
    return max(_acosh_of_inverse(low, high), math.acosh(1 / (1 - _FLOOR)) / d)


@remembered
def chebyshev_step(d: int, low: float, high: float) -> Step:
    """The step that makes of R = I − scale·E, eigenvalues in [−ε, ε], the residual T_d(R/ε)/T_d(1/ε).

    With t(r) = Σ tₖrᵏ that residual, 1 − t(r) = (1 − r)S(r) gives S(r) = Σₖ rᵏ Σ_{j>k} tⱼ.
    """
    t = _safe_acosh(d, low, high)
    chebyshev = np.polynomial.chebyshev.cheb2poly([0] * d + [1])
    tails = np.cumsum((chebyshev * math.cosh(t) ** np.arange(d + 1))[::-1])[::-1]
    # Where the residual's own scale cancels, so does its rounding: S(0) = 1 exactly for odd d.
    coefficients = tails[1:] / tails[0]
    floor = high * math.tanh(t / 2) ** 2
    return Step(2 / (floor + high), tuple(float(c) for c in coefficients))


def levels(rtol: float, ratio: float) -> Iterator[float]:
    """Relative cutoffs from 1/ratio down to rtol, each ``ratio`` times the next but for the last."""
    level = 1 / ratio
    while level > 2 * rtol:
        yield level
        level /= ratio
    yield rtol
