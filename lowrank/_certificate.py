"""How far F Fᵀ is from K, from the diagonal of K and a few of its columns.

With E = K − F Fᵀ ≽ 0 and t = tr E everything follows from t and some columns E e_j:

- Spectral norm. ‖E‖₂ ≤ t. For E = BᵀB, ‖E e_j‖² = ‖BᵀB e_j‖² ≤ ‖E‖₂ ‖B e_j‖² = ‖E‖₂ E_jj, so that
  ‖E‖₂ ≥ ‖E e_j‖²/E_jj ≥ E_jj for every j.
- Frobenius norm. ‖E‖_F² = Σ_j E_jj² + Σ_j (‖E e_j‖² − E_jj²). The first sum is known; for j drawn with probability
  E_jj/t the number Z = t(‖E e_j‖² − E_jj²)/E_jj has the second as its mean. (Importance sampling in proportion to the
  diagonal: Drineas, Kannan & Mahoney, SIAM J. Comput. 36, 2006, draw columns in that way.) As E ≽ 0,
  t²/n ≤ ‖E‖_F² ≤ t².
- Conjugate gradients. See :meth:`Certificate.cg_bound`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lowrank._array import (
    Array,
    Namespace,
    arithmetic,
    device,
    from_host,
    generator,
    is_integer,
    is_traced,
    namespace,
    number,
    shown,
    stop_gradient,
    to_host,
    widest_real,
)
from lowrank._core import checked_block, checked_finite, diagonal

# Student's t interval for the mean of s numbers is exact for normal ones only. Measured over 2,000 draws of 30 columns
# each (n = 400, rows in random order: prescribed spectra with random eigenvectors; kernels of one, two and ten features
# with uniform and pivoted landmarks; clusters; heavy tails) it covers the truth in 93 to 96 % with independent columns.
# Columns drawn one from each of s equally likely strata, in the order of the diagonal, have at most the variance of
# independent ones (W. Cochran, Sampling Techniques, 3rd ed., 1977, §5.6); the interval supposes independence, is as
# wide as before and covers it in 94 to 100 %. A logarithm of the mean changes neither. No sample sees what a few
# rows hide where nothing in the diagonal sets them apart: with 20 of 400 rows alone correlated, 30 columns meet 1.5 of
# them on average, and both cover it in 78 %.
_FEWEST_COLUMNS = 20
_CONFIDENCE = 0.95

# Eigenvalues of E down to −10 eps·‖K‖ are taken for rounding; those of a factor of ours are above half of that.
_NEGATIVE = 10.0

# Entries of a block of K: rows times columns drawn.
_BLOCK_ENTRIES = 2**20


@dataclass(frozen=True)
class Certificate:
    """What is known of the error E = K − F Fᵀ of a low-rank factorisation. All numbers are in the units of K.

    Made by :meth:`lowrank.LowRank.certificate`.

    Parameters
    ----------
    trace : float
        t = tr E.
    spectral : (float, float)
        Lower and upper bound of ‖E‖₂, in which there is no chance.
    frobenius : (float, float)
        Interval for ‖E‖_F at 95 %, asymptotic in the number of columns. It may miss what a few rows hide among others
        of the same E_jj; ask for more columns then. Where there are no more rows than columns were asked for, both ends
        are ‖E‖_F itself.
    columns : int
        How many columns of E it comes from.
    largest : float
        Upper bound of ‖K‖₂, ‖F‖₂² plus the upper end of ``frobenius``.
    roundoff : float
        k·eps·tr K, for arrays of shape (n, k): rounding leaves E negative eigenvalues that add up to no more. The
        bounds hold up to this number, and an error below it means nothing.
    """

    trace: float
    spectral: tuple[float, float]
    frobenius: tuple[float, float]
    columns: int
    largest: float
    roundoff: float

    def cg_bound(self, *, ridge: float, tol: float) -> int:
        """The steps of conjugate gradients that suffice for (K + μI) x = b when preconditioned by F Fᵀ + μI.

        Parameters
        ----------
        ridge : float
            μ > 0, in the units of K.
        tol : float
            The residual asked for, ‖b − (K + μI) x‖ ≤ tol·‖b‖, starting from x = 0; in (0, 1).

        Returns
        -------
        int
            At least 1. It is certain for exact arithmetic if ‖E‖₂ ≤ u, where u is the upper end of ``frobenius``, at
            most t, plus ``roundoff``: with more confidence than the 95 % of that interval, for ‖E‖₂ ≤ ‖E‖_F.

        Raises
        ------
        ValueError
            If ``ridge`` is not positive and finite, or ``tol`` not in (0, 1).

        Notes
        -----
        K + μI is the preconditioner P plus E, so that the eigenvalues of P⁻¹(K + μI) lie in [1, κ], κ = 1 + u/μ. After
        j steps the error is at most 1/T_j((κ+1)/(κ−1)) of the first one in the norm of K + μI (T_j Chebyshev's
        polynomial; Golub & Van Loan, "Matrix Computations", 4th ed., §11.3), and the residual at most
        √((λ_max + μ)/μ) times that of ‖b‖. With T_j(c) = cosh(j·arcosh c) and (κ+1)/(κ−1) = 1 + 2μ/u

            j ≥ arcosh(√((λ_max + μ)/μ)/tol) / arcosh(1 + 2μ/u) ≈ ½√κ·ln(2√((λ_max + μ)/μ)/tol)  for large κ.
        """
        for name, value, most in (("ridge", ridge, math.inf), ("tol", tol, 1.0)):
            if not 0 < number(value) < most:
                raise ValueError(f"{name} must be above 0 and below {most}, not {shown(value)}")
        off = self.frobenius[1] + self.roundoff
        if off == 0:
            return 1
        # arcosh(1 + 2z²) = 2 arsinh z, and arcosh of e^s; neither overflows, however small the numbers given.
        root = math.sqrt(ridge)
        s = math.log(math.hypot(math.sqrt(self.largest), root)) - math.log(root) - math.log(tol)
        rate = 2 * math.asinh(root / math.sqrt(off))
        return max(1, math.ceil((s + math.log1p(math.sqrt(1 - math.exp(-2 * s)))) / rate))


class _Columns(NamedTuple):
    """Of the columns E e_j drawn: ‖E e_j‖² and E_jj; and ‖F‖₂²."""

    squares: np.ndarray
    own: np.ndarray
    leading: float


def certify(
    x: Array,
    kernel: Callable[..., Array] | None,
    factor: Array,
    *,
    width: int,
    columns: int,
    rng: int | np.random.Generator | None,
) -> Certificate:
    """The certificate of F for the points x, or for K = x without a kernel; ``width`` is the size of L."""
    xp = _checked(x, kernel, factor, columns)
    random = generator(rng)
    n, wide = factor.shape[-2], widest_real(factor, xp)
    x, factor = stop_gradient(x), stop_gradient(factor)
    eps = float(xp.finfo(factor.dtype).eps)
    with arithmetic(x):
        height = max(1, _BLOCK_ENTRIES // columns)
        slices = [slice(i, min(i + height, n)) for i in range(0, n, height)]
        whole = xp.concat([xp.astype(_diagonal(x, kernel, rows, wide, xp), wide) for rows in slices])
        explained = xp.concat([xp.sum(xp.astype(factor[rows, :], wide) ** 2, axis=-1) for rows in slices])
        left = xp.clip(whole - explained, min=0.0)
        t, diagonal_squares = float(xp.sum(left)), float(xp.sum(left * left))
        drawn = xp.arange(n, device=device(left)) if n <= columns else _drawn(left, columns, random, xp)
        seen = _columns(x, kernel, factor, left, drawn, slices, wide, xp)
    low, high = diagonal_squares, diagonal_squares
    if n <= columns:
        low = high = float(np.sum(seen.squares))
    elif t > 0:
        z = t * np.maximum(seen.squares - seen.own**2, 0.0) / seen.own
        reach = _quantile(columns - 1) * float(np.std(z, ddof=1)) / math.sqrt(columns)
        mean = float(np.mean(z))
        # ‖E‖_F² is at least what the diagonal and t²/n say, and at most t².
        floor = max(diagonal_squares, t * t / n)
        low, high = (min(max(diagonal_squares + end, floor), t * t) for end in (mean - reach, mean + reach))
    positive = seen.own > 0
    found = float(np.max(seen.squares[positive] / seen.own[positive])) if positive.any() else 0.0
    frobenius = (math.sqrt(low), math.sqrt(high))
    return Certificate(
        trace=t,
        spectral=(min(max(float(xp.max(left)), found), t), t),
        frobenius=frobenius,
        columns=min(n, columns),
        largest=seen.leading + frobenius[1],
        roundoff=width * eps * float(xp.sum(whole)),
    )


def _columns(
    x: Array,
    kernel: Callable[..., Array] | None,
    factor: Array,
    left: Array,
    drawn: Array,
    slices: list[slice],
    wide: object,
    xp: Namespace,
) -> _Columns:
    """The columns of E that were drawn, by blocks of rows and in double, after checking that E can be ≽ 0."""
    f = xp.astype(xp.take(factor, drawn, axis=0), wide)
    z = None if kernel is None else xp.astype(xp.take(x, drawn, axis=0), wide)
    own = xp.take(left, drawn)
    squares, over = xp.zeros_like(own), xp.zeros_like(own)
    gram = xp.zeros((f.shape[-1], f.shape[-1]), dtype=wide, device=device(f))
    for rows in slices:
        part = xp.astype(factor[rows, :], wide)
        gram = gram + xp.matrix_transpose(part) @ part
        if kernel is None:
            block = xp.astype(xp.take(x[rows, :], drawn, axis=1), wide)
        else:
            near = xp.astype(x[rows, :], wide)
            block = stop_gradient(checked_block(kernel(near, z), near, z))
        error = block - part @ xp.matrix_transpose(f)
        squares = squares + xp.sum(error * error, axis=0)
        # |E_ij| ≤ √(E_ii E_jj) for E ≽ 0.
        excess = xp.max(xp.abs(error) - xp.sqrt(left[rows][:, None] * own[None, :]), axis=0)
        over = xp.where(excess > over, excess, over)
    leading, worst = float(xp.max(xp.linalg.eigvalsh(gram))), float(xp.max(over))
    # With an eigenvalue −δ the bound is √((E_ii + δ)(E_jj + δ)) + δ ≤ √(E_ii E_jj) + √(2δ max E_ii) + 2δ.
    delta = _NEGATIVE * float(xp.finfo(factor.dtype).eps) * (leading + float(xp.sum(left)))
    if worst > math.sqrt(2 * delta * float(xp.max(left))) + 2 * delta:
        raise ValueError(
            f"K − F Fᵀ is not positive semidefinite: an entry exceeds √(E_ii E_jj) by {worst:.3g}; x (shape "
            f"{tuple(x.shape)}) is not what was factored, or the kernel is not symmetric positive semidefinite"
        )
    return _Columns(to_host(squares), to_host(own), leading)


def _drawn(left: Array, columns: int, rng: np.random.Generator, xp: Namespace) -> Array:
    """One row from each of so many strata of the same probability, in the order of the diagonal."""
    order = xp.argsort(left, stable=True)
    total = xp.cumulative_sum(xp.take(left, order))
    points = from_host((np.arange(columns) + rng.random(columns)) / columns, left, xp) * total[-1]
    return xp.take(order, xp.clip(xp.searchsorted(total, points, side="right"), max=left.shape[0] - 1))


def _diagonal(x: Array, kernel: Callable[..., Array] | None, rows: slice, wide: object, xp: Namespace) -> Array:
    if kernel is None:
        return xp.linalg.diagonal(x)[rows]
    return stop_gradient(diagonal(xp.astype(x[rows, :], wide), kernel, xp))


def _quantile(freedom: int) -> float:
    """The number that a Student variable exceeds in size with a probability of 5 %."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + _CONFIDENCE) / 2))


def _checked(x: Array, kernel: Callable[..., Array] | None, factor: Array, columns: int) -> Namespace:
    xp = namespace(factor=factor, x=x)
    if not is_integer(columns):
        raise TypeError(f"columns must be an int, not {shown(columns)}")
    if columns < _FEWEST_COLUMNS:
        raise ValueError(
            f"columns must be at least {_FEWEST_COLUMNS}, for an interval that rests on a mean, not {shown(columns)}"
        )
    if factor.ndim != 2:
        raise ValueError(
            f"a certificate is of one matrix, and the factor has shape {tuple(factor.shape)}; factor the batch "
            "elements one by one"
        )
    if is_traced(x, factor):
        raise TypeError("a certificate is made of values, which a traced program does not have; ask outside of it")
    n = factor.shape[-2]
    if x.ndim != 2 or x.shape[0] != n or (kernel is None and x.shape[1] != n):
        what = f"K, ({n}, {n})" if kernel is None else f"the points that were factored, ({n}, d)"
        raise ValueError(f"x must be {what}; it has shape {tuple(x.shape)}")
    checked_finite(x, "x", xp)
    return xp
