"""What is computed from the rows of one chunk: features, predictions, sums, and what is left of the diagonal.

The tasks of ``dask``, as functions of arrays that know nothing of Dask: of the rows of a chunk, in any array library,
and of what is as small as the landmarks, on the host. F = k(x, z) L⁻ᵀ (Williams & Seeger, NeurIPS 2000) is computed row
by row, by blocks whose size does not depend on that of the chunk, and the sums are those of the normal equations and of
randomly pivoted Cholesky (Epperly, Tropp & Webber, arXiv 2410.03969, 2024). Rows are numbered as in the whole array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lowrank._array import Array, Namespace, arithmetic, from_host, namespace, to_host, widest_real
from lowrank._core import SHIFT, checked_block, solve_right

# Entries of k(x, z) that a task holds at a time, whatever the size of its chunk: with the float64 copies of the solve
# some 100 MiB per thread. A chunk of x that is comfortable in memory is not so with rank/d times as many columns.
_BLOCK_ENTRIES = 2**21


@dataclass(frozen=True, eq=False)
class Core:
    """What a worker needs for the features of its rows: z in the dtype of x and L in float64, on the host."""

    landmarks: np.ndarray
    cholesky: np.ndarray
    kernel: Callable[..., Array]


@dataclass(frozen=True, eq=False)
class Block:
    """The landmarks that a round added, and their rows of L."""

    landmarks: np.ndarray
    cholesky: np.ndarray


def _features(x: Array, core: Core, xp: Namespace, dtype: Any) -> Array:
    """k(x, z) L⁻ᵀ for some rows, the kernel in the dtype of x and the solve in the one named."""
    z = from_host(core.landmarks, x, xp)
    c = checked_block(core.kernel(x, z), x, z)
    return solve_right(from_host(core.cholesky, x, xp, dtype=dtype), xp.astype(c, dtype, copy=False), xp)


def _diagonal(x: Array, kernel: Callable[..., Array], xp: Namespace) -> Array:
    """k(x_i, x_i) for every row, in float64 where the library has it."""
    each = x[:, None, :]
    diagonal = xp.astype(checked_block(kernel(each, each), each, each)[:, 0, 0], widest_real(x, xp))
    if bool(xp.any(diagonal < 0)):
        raise ValueError(f"the kernel has a negative diagonal, k(x, x) = {float(xp.min(diagonal)):.3g} for some row")
    return diagonal


def feature_rows(x: Array, core: Core, *, start: int, name: str) -> Array:
    xp = namespace(x=x)
    raise_bad(_first_bad(x, start, xp), name)
    with arithmetic(x):
        parts = [_features(x[rows, ...], core, xp, x.dtype) for rows in _row_blocks(x, core)]
        return parts[0] if len(parts) == 1 else xp.concat(parts, axis=0)


def predicted_rows(x: Array, core: Core, *, start: int, name: str, coefficients: np.ndarray) -> Array:
    xp = namespace(x=x)
    raise_bad(_first_bad(x, start, xp), name)
    wide = widest_real(x, xp)
    beta = from_host(coefficients, x, xp, dtype=wide)
    with arithmetic(x):
        parts = [_features(x[rows, ...], core, xp, wide) @ beta for rows in _row_blocks(x, core)]
        return xp.astype(parts[0] if len(parts) == 1 else xp.concat(parts, axis=0), x.dtype, copy=False)


def unexplained(x: Array, factor: Array, *, kernel: Callable[..., Array]) -> Array:
    """The diagonal of K − F Fᵀ for the rows of a chunk; its sum is that of lowrank.factor."""
    xp = namespace(x=x, factor=factor)
    diagonal = _diagonal(x, kernel, xp)
    return xp.clip(diagonal - xp.sum(factor * factor, axis=-1, dtype=diagonal.dtype), min=0.0)


class Sums(NamedTuple):
    """[F y]ᵀ[F y] and tr(K − F Fᵀ) over some rows, and the first rows that are not finite."""

    products: np.ndarray
    trace: float
    bad_x: float
    bad_y: float


def sums(x: Array, y: Array, start: int, core: Core) -> Sums:
    xp = namespace(x=x, y=y)
    y = y[:, None] if y.ndim == 1 else y
    bad_x, bad_y = _first_bad(x, start, xp), _first_bad(y, start, xp)
    size = len(core.landmarks) + y.shape[1]
    products, trace = np.zeros((size, size)), 0.0
    if min(bad_x, bad_y) < math.inf:
        return Sums(products, trace, bad_x, bad_y)
    wide = widest_real(x, xp)
    with arithmetic(x):
        for rows in _row_blocks(x, core):
            f = _features(x[rows, ...], core, xp, wide)
            left = _diagonal(x[rows, ...], core.kernel, xp) - xp.sum(f * f, axis=-1)
            both = xp.concat([f, xp.astype(y[rows, ...], wide)], axis=-1)
            products += to_host(xp.matrix_transpose(both) @ both)
            trace += float(xp.sum(xp.clip(left, min=0.0)))
    return Sums(products, trace, bad_x, bad_y)


def added(parts: Sequence[Sums]) -> Sums:
    products, traces, bad_x, bad_y = zip(*parts, strict=True)
    return Sums(sum(products[1:], products[0]), sum(traces), min(bad_x), min(bad_y))


class Residual(NamedTuple):
    """What is left of the diagonal in a chunk, and the sums of squares of the newest columns of F there."""

    left: Array
    columns: np.ndarray
    bad: float


class Summary(NamedTuple):
    total: float
    columns: np.ndarray
    bad: float


def residual(x: Array, start: int, blocks: Sequence[Block], kernel: Callable[..., Array], fresh: int) -> Residual:
    """The diagonal of K − F Fᵀ for the rows of a chunk, and zero where it is rounding.

    L is not shifted here: no pivot's square is below the same floor, 30 eps of its diagonal entry, so that the errors
    of the solve, about eps·√(k(x, x)·k(z, z)) in front of the last division by √(30 eps·k(z, z)), leave errors of a few
    eps in the diagonal.
    """
    xp = namespace(x=x)
    core = _joined(blocks, x, kernel)
    bad = _first_bad(x, start, xp)
    wide = widest_real(x, xp)
    floor = SHIFT * float(xp.finfo(x.dtype).eps)
    parts, columns = [], np.zeros(fresh)
    with arithmetic(x):
        for rows in _row_blocks(x, core) if bad == math.inf else []:
            diagonal = left = _diagonal(x[rows, ...], kernel, xp)
            if blocks:
                f = _features(x[rows, ...], core, xp, x.dtype)
                squares = f * f
                left = diagonal - xp.sum(squares, axis=-1, dtype=wide)
                columns += to_host(xp.sum(squares[:, -fresh:], axis=0, dtype=wide))
            parts.append(xp.where(left > floor * diagonal, left, xp.zeros_like(left)))
        left = xp.concat(parts) if parts else xp.zeros((0,), dtype=wide)
        return Residual(left, columns, bad)


def _joined(blocks: Sequence[Block], x: Array, kernel: Callable[..., Array]) -> Core:
    """The core of all rounds, from what each of them added."""
    sizes = [len(block.landmarks) for block in blocks]
    lower = np.zeros((sum(sizes), sum(sizes)))
    for block, stop in zip(blocks, np.cumsum(sizes), strict=True):
        lower[stop - len(block.landmarks) : stop, :stop] = block.cholesky
    points = [block.landmarks for block in blocks]
    return Core(np.concatenate(points) if points else np.zeros((0, x.shape[-1])), lower, kernel)


def summary(part: Residual) -> Summary:
    return Summary(float(namespace(left=part.left).sum(part.left)), part.columns, part.bad)


def drawn(part: Residual, x: Array, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows at which the running sum passes the targets, these points, and what was left of them."""
    xp = namespace(x=x)
    running = xp.cumulative_sum(part.left)
    # Strictly below the last of the running sums, so that the row found has something left.
    below = np.clip(targets, 0.0, np.nextafter(float(running[-1]), 0.0))
    rows = xp.searchsorted(running, from_host(below, running, xp), side="right")
    return to_host(rows), to_host(xp.take(x, rows, axis=0)), to_host(xp.take(part.left, rows, axis=0))


def rows_at(x: Array, rows: np.ndarray) -> np.ndarray:
    xp = namespace(x=x)
    return to_host(xp.take(x, from_host(rows, x, xp, dtype=xp.int64), axis=0))


def _first_bad(x: Array, start: int, xp: Namespace) -> float:
    """The number in the whole array of the first row that holds NaN or infinite values; infinity if none does."""
    bad = xp.logical_not(xp.all(xp.isfinite(x), axis=-1))
    return start + int(xp.argmax(xp.astype(bad, xp.int32))) if bool(xp.any(bad)) else math.inf


def raise_bad(row: float, name: str) -> None:
    if row < math.inf:
        raise ValueError(f"row {row} of {name} holds NaN or infinite values; remove such rows first")


def _row_blocks(x: Array, core: Core) -> Iterator[slice]:
    """Slices of rows with few enough entries of k(x, z); one slice of no rows if there are none."""
    step = max(1, _BLOCK_ENTRIES // max(1, len(core.landmarks)))
    return (slice(i, min(i + step, x.shape[0])) for i in range(0, max(1, x.shape[0]), step))
