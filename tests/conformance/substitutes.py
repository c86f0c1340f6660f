"""``pinv_newton`` under the names and options of the functions it is put in place of.

A substitute translates: integers to float64, triangles to Hermitian matrices, ``atol`` and ``rcond`` to ``rtol``, a
result that is NaN to the exception the library raises. Every number it returns comes from ``pinv_newton``, but for the
one case in which none is needed: where the cutoff is σ_max or more, the pseudoinverse is zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank import pinv_newton

# What numpy calls an argument that was not passed, since None has a meaning of its own there.
_NOT_PASSED = object()


def numpy_pinv(a: Any, rcond: Any = None, hermitian: bool = False, *, rtol: Any = _NOT_PASSED) -> np.ndarray:
    """For :func:`numpy.linalg.pinv`."""
    if rcond is not None and rtol is not _NOT_PASSED:
        raise ValueError("`rtol` and `rcond` can't be both set.")
    cutoff = None if rtol is _NOT_PASSED else rtol
    cutoff = cutoff if rcond is None else rcond
    x, _ = _on_host(_floating(a), rtol=None if cutoff is None else float(cutoff), hermitian=hermitian)
    return x


def scipy_pinv(
    a: Any,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    return_rank: bool = False,
    check_finite: bool = True,
) -> Any:
    """For :func:`scipy.linalg.pinv`."""
    a = _floating(np.asarray_chkfinite(a) if check_finite else a)
    x, rank = _on_host(a, rtol=_combined(a, atol, rtol), hermitian=False)
    return (x, rank) if return_rank else x


def scipy_pinvh(
    a: Any,
    atol: float | None = None,
    rtol: float | None = None,
    lower: bool = True,
    return_rank: bool = False,
    check_finite: bool = True,
) -> Any:
    """For :func:`scipy.linalg.pinvh`."""
    a = _floating(np.asarray_chkfinite(a) if check_finite else a)
    a = a if lower else np.conj(a.mT)
    x, rank = _on_host(a, rtol=_combined(_completed(a, np.tril), atol, rtol), hermitian=True)
    return (x, rank) if return_rank else x


def torch_pinv(a: Any, *, rtol: Any = None, hermitian: bool = False) -> Any:
    """For :func:`torch.linalg.pinv` and :func:`torch.pinverse`, derivatives included."""
    if rtol is not None and float(rtol) >= 1:
        # Not .mH, which is a view that torch cannot push batched tangents through.
        return (0 * a).mT.conj_physical()
    return pinv_newton(
        _completed(a, lambda t, k: t.tril(k)) if hermitian else a,
        rtol=None if rtol is None else float(rtol),
        hermitian=hermitian,
    )


def _floating(a: Any) -> np.ndarray:
    """a in a floating dtype of native byte order; integers and booleans become float64, as in LAPACK's wrappers."""
    a = np.asarray(a)
    return a.astype(a.dtype.newbyteorder("=") if a.dtype.kind in "fc" else np.float64, copy=False)


def _completed(a: Any, lower_triangle: Any) -> Any:
    """The Hermitian matrix of a's lower triangle, the only one that LAPACK's Hermitian routines read."""
    below, diagonal_and_below = lower_triangle(a, -1), lower_triangle(a, 0)
    diagonal = diagonal_and_below - below
    return below + below.mT.conj() + 0.5 * (diagonal + diagonal.conj())


def _combined(a: np.ndarray, atol: float | None, rtol: float | None) -> float | None:
    """The relative cutoff that stands for atol + rtol·σ_max, of one matrix; σ_max as pinv_newton reports it, good to a
    few per cent."""
    if atol is None:
        return rtol
    _, info = pinv_newton(a, rtol=0.5, return_info=True)
    return float(atol / (info.cutoff / 0.5)) + (0.0 if rtol is None else rtol)


def _on_host(a: np.ndarray, *, rtol: float | None, hermitian: bool) -> tuple[np.ndarray, Any]:
    """The pseudoinverse and the rank, or the exception that LAPACK's failure to converge becomes."""
    if rtol is not None and rtol >= 1:
        return np.zeros_like(a.mT), np.zeros(a.shape[:-2], dtype=int)
    a = _completed(a, np.tril) if hermitian else a
    x, info = pinv_newton(a, rtol=rtol, hermitian=hermitian, return_info=True)
    if not np.all(info.finite):
        raise np.linalg.LinAlgError("the matrix is not finite")
    return x, info.rank
