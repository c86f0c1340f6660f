"""Exact kernel ridge regression: (K + ridge·I) α = y by preconditioned conjugate gradients, K never formed.

The preconditioner is P = F Fᵀ + ridge·I with the Nyström factor F of K (Frangella, Tropp & Udell, "Randomized Nyström
preconditioning", SIAM J. Matrix Anal. Appl. 44, 2023; Díaz, Epperly, Frangella, Tropp & Webber, "Robust, randomized
preconditioning for kernel ridge regression", arXiv 2304.12465). As K − F Fᵀ ≽ 0 has a known trace, the number of
iterations has a bound known before the first; the derivation is at ``_iteration_bound``.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowrank._array import (
    Array,
    Namespace,
    arithmetic,
    carries_derivative,
    check_flag,
    device,
    from_host,
    is_half,
    is_traced,
    namespace,
    number,
    shown,
    solve_triangular,
    to_host,
    widest_real,
)
from lowrank.factor import LowRank, nystrom
from lowrank.kernels import gaussian_kernel

# Side of the square tiles in which K is evaluated: 2¹⁸ entries, which stay in the cache of a CPU. Only the tiles on
# and above the diagonal are evaluated and each is multiplied from both sides. Measured (NumPy, 8000 points, one
# column): 2.1 times as fast as gaussian_matmul and 1.7 times as fast as strips of whole rows for 8 features, 1.5 to 3
# times as fast for 2; sides of 1024 cost up to a tenth more for 8 features, 2048 half as much again.
_TILE = 512

# Rows of F that its triangular factor is updated with at a time: a few times the rank, so that R adds little to them.
_ROWS_AT_A_TIME = 2048

# What single precision can do. The limit is not the accumulation, which is in float64 here, but the entries of K: off
# by a few eps each, they change K α by some eps·√n·‖α‖, and ‖α‖ goes up to ‖y‖/ridge. So the iteration runs on the
# tiles of x's own precision, as fast as they are, and the residual is replaced by the true one, from float64 tiles, as
# often as this. What is left is the rounding of α itself. Measured (3000 points, ridge 10⁻⁴ n to 10⁻⁶ n): every fifth
# step saves 1 or 2 of 10 to 34 steps and costs up to 2 more products in float64, which take twice as long; every
# twentieth adds 2 steps, and none before the end 8.
_STEPS_BETWEEN_TRUE_RESIDUALS = 10

# A ridge below this many roundings of λ_max is refused: the residual y − (K + ridge·I) α cannot be smaller than
# eps·λ_max‖α‖ with ‖α‖ up to ‖y‖/ridge, and P⁻¹A is near the identity only as long as eps·λ_max is below the ridge.
_ROUNDINGS = 10.0

# ‖K − F Fᵀ‖ that rounding alone can bring about, in eps·‖K‖: measured beside the shift of the factorisation.
_FACTOR_ROUNDINGS = 65.0


@dataclass(frozen=True, eq=False, repr=False)
class KernelRidge:
    """The solution α of (K + ridge·I) α = y, and the function x′ ↦ k(x′, x) α. Made by :func:`kernel_ridge`.

    Parameters
    ----------
    coefficients : array, shape (n,) or (n, t)
        α, in the units of y per unit of K.
    x : array, shape (n, d)
        The points that were fitted.
    kernel : callable
        k.
    ridge : float
        In the units of K.
    iterations : integer array, shape () or (t,)
        Steps taken for each column of y.
    bound : int
        The number of steps that exact arithmetic does not exceed, known before the first.
    residual : array, shape () or (t,)
        ‖y − (K + ridge·I) α‖/‖y‖ of the coefficients as they are, from kernel values in float64 where the library has
        it; 0 where y is 0.
    low_rank : LowRank
        The factorisation behind the preconditioner. ``low_rank.solve(y, ridge=ridge)`` is the cheap approximation.
    """

    coefficients: Array
    x: Array
    kernel: Callable[..., Array]
    ridge: float = field(kw_only=True)
    iterations: Array = field(kw_only=True)
    bound: int = field(kw_only=True)
    residual: Array = field(kw_only=True)
    low_rank: LowRank = field(kw_only=True)

    @property
    def ratio(self) -> float:
        """The most steps that a column took, in units of the bound."""
        return int(np.max(to_host(self.iterations), initial=0)) / self.bound

    def __repr__(self) -> str:
        steps = np.max(to_host(self.iterations), initial=0)
        residual = np.max(to_host(self.residual), initial=0.0)
        return (
            f"KernelRidge(coefficients={tuple(self.coefficients.shape)}, ridge={self.ridge:.3g}, "
            f"rank={self.low_rank.rank}, iterations={steps} of at most {self.bound}, residual={residual:.1e})"
        )

    def predict(self, x_new: Array, /) -> Array:
        """k(x_new, x) α, in tiles: the block between the two sets of points is never formed.

        Parameters
        ----------
        x_new : array, shape (m, d)
            Of the library, dtype and device of ``x``.

        Returns
        -------
        array, shape (m,) or (m, t)

        Raises
        ------
        TypeError
            If ``x_new`` is not an array of the library and dtype of ``x``.
        ValueError
            If it does not have two axes and d features, or is on another device.
        """
        xp = namespace(x=self.x, x_new=x_new)
        if x_new.ndim != 2 or x_new.shape[-1] != self.x.shape[-1]:
            raise ValueError(
                f"x_new has shape {tuple(x_new.shape)}; a fit of points of shape {tuple(self.x.shape)} "
                f"predicts points of shape (m, {self.x.shape[-1]})"
            )
        columns = self.coefficients[:, None] if self.coefficients.ndim == 1 else self.coefficients
        with arithmetic(columns):
            values = xp.astype(_product(x_new, self.x, columns, self.kernel, xp), columns.dtype, copy=False)
        return values[:, 0] if self.coefficients.ndim == 1 else values


def kernel_ridge(
    x: Array,
    y: Array,
    /,
    *,
    kernel: Callable[..., Array] = gaussian_kernel,
    ridge: float,
    rank: int | None = None,
    rtol: float | None = None,
    landmarks: str | Callable[..., Array] | Sequence[int] | Array = "rpcholesky",
    tol: float | None = None,
    rng: int | np.random.Generator | None = None,
    progress: bool = False,
) -> KernelRidge:
    """The exact kernel ridge regression of n points, (K + ridge·I) α = y with K = k(x, x), in O(n (d + rank)) memory.

    Parameters
    ----------
    x : array, shape (n, d)
        Points, float32 or float64.
    y : array, shape (n,) or (n, t)
        Values to fit, of the library and dtype of ``x``; t columns are solved for together, each until it is done.
    kernel : callable
        Symmetric positive semidefinite: ``kernel(a, b)`` is the block of shape (n, m) for points (n, d) and (m, d), in
        their dtype and, for float32 points, in float64 too. ``functools.partial(gaussian_kernel, lengthscale=…)`` in
        general.
    ridge : float
        Positive, in the units of K and not divided by n: scikit-learn's ``alpha``.
    rank, rtol, landmarks, rng
        Of the preconditioner; see :func:`lowrank.nystrom`.
    tol : float, optional
        The relative residual ‖y − (K + ridge·I) α‖/‖y‖ to reach in every column; by default 1e-8 in float64 and 1e-4
        in float32.
    progress : bool
        Show a progress bar (needs tqdm). Its total is the bound; most solves end before.

    Returns
    -------
    KernelRidge
        The coefficients with ``predict``, the steps taken and their bound, and the true residual.

    Raises
    ------
    TypeError
        If ``x`` and ``y`` are not arrays of one library and of one dtype, float32 or float64, carry derivatives or
        belong to a traced program; if ``kernel`` is not callable, returns no array of the library and dtype of its
        points, or has parameters that carry derivatives; if ``progress`` is neither True nor False; or as
        :func:`nystrom` for ``rank``, ``landmarks`` and ``rng``.
    ValueError
        If shapes or devices do not fit, values are NaN or infinite, ``ridge`` or ``tol`` is out of range, the ridge is
        too small for the tolerance and the precision, or the kernel turns out not to be positive semidefinite; or as
        :func:`nystrom` for ``rank``, ``rtol``, ``landmarks`` and ``rng``.
    ImportError
        If ``progress`` is asked for and tqdm is not installed.

    Warns
    -----
    RuntimeWarning
        If a column does not get to ``tol``: rounding is in the way.

    Notes
    -----
    A step costs the kernel values on and above the diagonal, n²/2 of them, and 4 n·rank·t products with the factor.
    With t = tr(K − F Fᵀ) the condition number of the preconditioned matrix is at most κ = 1 + t/ridge, and the steps
    at most about ½√κ·ln(2√(λ_max/ridge + 1)/tol). So the rank pays until t is about the ridge: with a unit diagonal
    ``rtol = κ·ridge/n`` asks for a condition number of κ. Where the spectrum does not decay no rank gets there, and the
    bound says so.

    In float32 the steps use kernel values in float32 and every tenth residual, and the last, values in float64. A
    column ends short of ``tol`` where its true residual has stopped falling, or after the steps of the bound; in
    float32 it is α itself that cannot be stored well enough.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.solve import kernel_ridge
    >>> x = np.linspace(-3.0, 3.0, 200)[:, None]
    >>> fit = kernel_ridge(x, np.sin(x[:, 0]), ridge=1e-3, rank=15, rng=0)
    >>> fit.predict(np.asarray([[0.5], [1.0]])).round(2)
    array([0.48, 0.84])
    """
    xp, columns, scale = _checked(x, y, kernel, ridge, tol)
    check_flag("progress", progress)
    ridge, tol = float(ridge), _default_tol(x, xp) if tol is None else float(tol)
    low_rank = nystrom(x, kernel=kernel, landmarks=landmarks, rank=rank, rtol=rtol, rng=rng)
    if low_rank.factor.ndim != 2:
        raise ValueError(
            f"landmarks are several sets of points, and the factor has the shape {tuple(low_rank.factor.shape)}; "
            "give one set, of shape (k, d)"
        )
    if carries_derivative(low_rank.factor):
        raise TypeError(
            "the kernel's parameters carry derivatives, and the number of steps depends on values; detach them"
        )
    with arithmetic(x):
        bound = _checked_bound(low_rank, ridge, tol, xp)
        precondition = _preconditioner(low_rank, ridge)
        wide = columns.dtype
        x_wide = xp.astype(x, wide, copy=False)

        def narrow(v: Array) -> Array:
            return xp.astype(v, x.dtype, copy=False)

        def widen(v: Array) -> Array:
            return xp.astype(v, wide, copy=False)

        def settle(v: Array) -> tuple[Array, Array]:
            v = widen(narrow(v))
            return v, columns - (_symmetric_product(x_wide, v, kernel, xp) + ridge * v)

        with _shown(progress, bound) as advance:
            solution, iterations, residual = _conjugate_gradients(
                lambda v: _symmetric_product(x, narrow(v), kernel, xp) + ridge * v,
                lambda v: widen(precondition(narrow(v))),
                settle,
                columns,
                tol=tol,
                bound=bound,
                every=bound if wide == x.dtype else _STEPS_BETWEEN_TRUE_RESIDUALS,
                advance=advance,
                xp=xp,
            )
        coefficients = xp.astype(solution * scale, x.dtype, copy=False)
        residual = xp.astype(residual, x.dtype, copy=False)
    _warn_above(tol, residual)
    if y.ndim == 1:
        coefficients, iterations, residual = coefficients[:, 0], iterations[0, ...], residual[0, ...]
    return KernelRidge(
        coefficients,
        x,
        kernel,
        ridge=ridge,
        iterations=iterations,
        bound=bound,
        residual=residual,
        low_rank=low_rank,
    )


def _conjugate_gradients(
    apply: Callable[[Array], Array],
    precondition: Callable[[Array], Array],
    settle: Callable[[Array], tuple[Array, Array]],
    b: Array,
    *,
    tol: float,
    bound: int,
    every: int,
    advance: Callable[[int, float], None],
    xp: Namespace,
) -> tuple[Array, Array, Array]:
    """x with A x = b for each column of b, the steps each took, and ‖b − A x‖/‖b‖.

    ``apply`` is v ↦ A v and ``precondition`` v ↦ P⁻¹ v, neither to more digits than needed; ``settle`` is x ↦ x as it
    can be returned, and its true residual.

    Hestenes & Stiefel, "Methods of conjugate gradients for solving linear systems", 1952, with their formulas
    rᵀp/pᵀAp for the step and −zᵀAp/pᵀAp for the next direction, preconditioned. In exact arithmetic the usual
    quotients of residuals are the same; these hold for any r, and so r can be replaced by the true residual of the
    rounded x at any time, without a restart: the next step still minimises along a direction conjugate to the last.

    Columns share the products with A and nothing else. Each goes on until its recursive residual says that it is done,
    or for ``every`` steps, and waits for the others; then the true residuals decide which columns are. A column whose
    recursive residual has got there, and whose true one is no smaller than the time before, keeps the better x and is
    done too: rounding allows no more.
    """
    zero = xp.zeros_like(b)
    x, best, r, p, q = zero, zero, b, zero, zero
    size = _norm(b, xp)
    size = xp.where(size > 0, size, xp.ones_like(size))
    residual = _norm(r, xp) / size
    curvature = xp.ones_like(size)
    steps = xp.zeros_like(size)
    unfinished = residual > tol
    while bool(xp.any(unfinished)):
        for _ in range(every):
            moving = unfinished & (_norm(r, xp) > tol * size) & (steps < bound)
            if not bool(xp.any(moving)):
                break
            z = precondition(r)
            p = xp.where(moving, z - p * (xp.sum(z * q, axis=0) / curvature), p)
            q = xp.where(moving, apply(p), q)
            curvature = _checked_curvature(p, q, curvature, moving, xp)
            step = xp.where(moving, xp.sum(r * p, axis=0) / curvature, xp.zeros_like(size))
            x, r = x + step * p, r - step * q
            steps = steps + xp.astype(moving, steps.dtype)
            advance(int(xp.max(steps)), float(xp.max(_norm(r, xp) / size)))
        arrived = _norm(r, xp) <= tol * size
        settled, true = settle(x)
        x, r = xp.where(unfinished, settled, x), xp.where(unfinished, true, r)
        now = _norm(r, xp) / size
        better = unfinished & (now < residual)
        best, residual = xp.where(better, x, best), xp.where(better, now, residual)
        unfinished = unfinished & (now > tol) & (steps < bound) & (better | ~arrived)
    return best, xp.astype(steps, xp.int32), residual


def _norm(v: Array, xp: Namespace) -> Array:
    return xp.sqrt(xp.sum(v * v, axis=0))


def _checked_curvature(p: Array, q: Array, last: Array, moving: Array, xp: Namespace) -> Array:
    """pᵀAp of the columns that move, which is positive if A is positive definite, and the last of the others."""
    curvature = xp.where(moving, xp.sum(p * q, axis=0), last)
    if not bool(xp.all(curvature > 0)):
        rayleigh = to_host(curvature / xp.where(moving, xp.sum(p * p, axis=0), last))
        raise ValueError(
            "the kernel is not symmetric positive semidefinite, or its values are not accurate enough for so small a "
            f"ridge: vᵀ(K + ridge·I)v = {rayleigh.min():.3g} for a unit vector v; "
            "check the kernel, or take a larger ridge or float64"
        )
    return curvature


def _preconditioner(low_rank: LowRank, ridge: float) -> Callable[[Array], Array]:
    """v ↦ (F Fᵀ + ridge·I)⁻¹ v for v of shape (n, t).

    The formula is that of :meth:`lowrank.LowRank.solve`, with Q₁ = F R⁻¹. R comes from the rows of F a few at a time,
    [R; F_c] = Q R′ (Golub & Van Loan, "Matrix Computations", 4th ed., §6.5.3), which needs the memory of Q₁ alone where
    a factorisation of all rows takes that of five F.
    """
    factor = low_rank.factor
    xp = namespace(factor=factor)
    n, k = factor.shape
    r = math.sqrt(ridge) * xp.eye(k, dtype=factor.dtype, device=device(factor))
    for start in range(0, n, _ROWS_AT_A_TIME):
        rows = factor[start : min(start + _ROWS_AT_A_TIME, n), :]
        r = xp.linalg.qr(xp.concat([r, rows], axis=0), mode="reduced")[1]
    q = solve_triangular(r.T, factor.T, xp).T
    return lambda v: (v - q @ (q.T @ v)) / ridge


def _checked_bound(low_rank: LowRank, ridge: float, tol: float, xp: Namespace) -> int:
    """The bound on the iterations, if the tolerance can be reached at all."""
    factor = low_rank.factor
    eps = float(xp.finfo(factor.dtype).eps)
    eps_wide = float(xp.finfo(widest_real(factor, xp)).eps)
    gram = np.asarray(to_host(factor.T @ factor), dtype=np.float64)
    trace = float(low_rank.trace_error)
    largest = float(np.linalg.eigvalsh(gram)[-1]) + trace
    least = _ROUNDINGS * largest * max(eps, eps_wide / tol)
    if ridge < least:
        raise ValueError(
            f"ridge={ridge:.3g} is out of the reach of rounding for tol={tol:.3g} and {factor.dtype}: the largest "
            f"eigenvalue of K is about {largest:.3g}, and so the ridge must be at least {least:.3g}; take a larger "
            "ridge or tolerance, or float64"
        )
    return _iteration_bound((trace + _FACTOR_ROUNDINGS * eps * largest) / ridge, largest / ridge, tol)


def _iteration_bound(excess: float, largest: float, tol: float) -> int:
    """Steps after which ‖r‖ ≤ tol·‖b‖, for P ≼ A ≼ (1 + excess) P and a largest eigenvalue of K/ridge.

    From A = P + E, 0 ≼ E ≼ t·I and P ≽ ridge·I: the eigenvalues of P⁻¹A are in [1, κ], κ = 1 + t/ridge. After k steps
    ‖e_k‖_A ≤ ‖e₀‖_A / T_k((κ + 1)/(κ − 1)) with the Chebyshev polynomial T_k = cosh(k·arcosh) (Saad, "Iterative methods
    for sparse linear systems", 2nd ed., §6.11.3), and arcosh((κ + 1)/(κ − 1)) = 2 artanh(1/√κ). From e₀ = A⁻¹b,
    ‖r_k‖² ≤ ‖A‖‖e_k‖²_A and ‖e₀‖²_A ≤ ‖b‖²/ridge, so that ‖r_k‖/‖b‖ ≤ √(‖A‖/ridge)/T_k. (½√κ ln(2√(‖A‖/ridge)/tol) is
    the same for large κ, and a little more.)

    At most j eigenvalues of P⁻¹A exceed 1 + t/(j·ridge), and a step spent on each would give a smaller number where t
    is large; but that argument does not survive rounding (Gergelits & Strakoš, Numer. Algorithms 65, 2014).
    """
    if excess == 0:
        return 1
    root = math.sqrt(1 + excess)
    rate = 2 * math.log(1 + root) - math.log(excess)
    return max(1, math.ceil(math.acosh(math.sqrt(1 + largest) / tol) / rate))


def _symmetric_product(x: Array, v: Array, kernel: Callable[..., Array], xp: Namespace) -> Array:
    """k(x, x) v for v of shape (n, t), from tiles in the dtype of x summed in the widest."""
    wide = widest_real(x, xp)
    rows = _slices(x.shape[0])
    strips = [xp.zeros((i.stop - i.start, v.shape[1]), dtype=wide, device=device(x)) for i in rows]
    for a, i in enumerate(rows):
        for b, j in enumerate(rows[a:], start=a):
            tile = kernel(x[i, :], x[j, :])
            strips[a] = strips[a] + xp.astype(tile @ v[j, :], wide, copy=False)
            if b > a:
                strips[b] = strips[b] + xp.astype(tile.T @ v[i, :], wide, copy=False)
    return xp.concat(strips, axis=0)


def _product(x: Array, z: Array, v: Array, kernel: Callable[..., Array], xp: Namespace) -> Array:
    """k(x, z) v for v of shape (m, t), from tiles in the dtype of x summed in the widest."""
    wide = widest_real(x, xp)
    strips = [xp.zeros((0, v.shape[1]), dtype=wide, device=device(x))]
    for i in _slices(x.shape[0]):
        parts = (xp.astype(kernel(x[i, :], z[j, :]) @ v[j, :], wide, copy=False) for j in _slices(z.shape[0]))
        strips.append(functools.reduce(lambda total, part: total + part, parts))
    return xp.concat(strips, axis=0)


def _slices(n: int) -> list[slice]:
    return [slice(i, min(i + _TILE, n)) for i in range(0, n, _TILE)]


@contextlib.contextmanager
def _shown(progress: bool, bound: int) -> Iterator[Callable[[int, float], None]]:
    """A function that is told the steps taken and the largest residual, and draws them if asked to."""
    if not progress:
        yield lambda steps, residual: None
        return
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError as missing:
        raise ImportError("progress=True draws by tqdm, which is not installed: pip install tqdm") from missing

    with tqdm(total=bound, desc="kernel_ridge", unit="step") as bar:

        def advance(steps: int, residual: float) -> None:
            bar.set_postfix(residual=f"{residual:.1e}", refresh=False)
            bar.update(steps - bar.n)

        yield advance


def _default_tol(x: Array, xp: Namespace) -> float:
    return 1e-8 if x.dtype == xp.float64 else 1e-4


def _warn_above(tol: float, residual: Array) -> None:
    reached = to_host(residual)
    above = int(np.sum(~(reached <= tol)))
    if above:
        warnings.warn(
            f"{above} of {reached.size} columns of y did not reach the relative residual {tol:.3g}: the largest is "
            f"{reached.max():.3g}, and rounding in {reached.dtype} is in the way. Take a larger ridge or tolerance"
            + ("" if reached.dtype == np.float64 else ", or float64"),
            RuntimeWarning,
            stacklevel=3,
        )


def _checked(x: Array, y: Array, kernel: Any, ridge: Any, tol: Any) -> tuple[Namespace, Array, Array]:
    """The namespace, y as columns with entries up to 1 in the widest dtype, and the powers of two that took."""
    xp = namespace(x=x, y=y)
    if is_half(x) or xp.isdtype(x.dtype, "complex floating"):
        raise TypeError(f"x has dtype {x.dtype} (shape {tuple(x.shape)}); convert it and y to float32 or float64")
    if not callable(kernel):
        raise TypeError(
            f"kernel must be a callable (a, b) ↦ block, not {shown(kernel)}; for a matrix K that is at hand, factor "
            "it with nystrom(K, kernel=None, …) or solve with it directly"
        )
    if x.ndim != 2 or y.ndim not in (1, 2) or y.shape[0] != x.shape[0] or x.shape[0] == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; points of shape (n, d), one at least, need values "
            "of shape (n,) or (n, t)"
        )
    for name, value, most in (("ridge", ridge, math.inf), ("tol", 0.5 if tol is None else tol, 1)):
        if not 0 < number(value) < most:
            upper = "finite" if most == math.inf else "below 1"
            raise ValueError(f"{name} must be a positive number, {upper}, not {shown(value)}")
    for name, array in (("x", x), ("y", y)):
        if is_traced(array) or carries_derivative(array):
            raise TypeError(
                f"{name} carries derivatives or belongs to a traced program, and the number of steps depends on its "
                "values; detach it, or solve outside of the transformation"
            )
    if not bool(xp.all(xp.isfinite(y))):
        raise ValueError(f"y (shape {tuple(y.shape)}) has NaN or infinite values; remove them and their points first")
    columns = xp.astype(y[:, None] if y.ndim == 1 else y, widest_real(y, xp), copy=False)
    largest = to_host(xp.max(xp.abs(columns), axis=0))
    # Powers of two: the columns' bits do not change, and squares neither overflow nor vanish.
    scale = from_host(np.exp2(np.floor(np.log2(np.where(largest > 0, largest, 1.0)))), columns, xp)
    return xp, columns / scale, scale
