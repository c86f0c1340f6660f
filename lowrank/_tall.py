"""Pseudoinverses of tall matrices from their Gram matrix, in memory that does not grow with the rows.

A⁺ = (AᴴA)⁺Aᴴ squares the condition. In single precision the Gram matrix and its inverse are formed in double
precision, which leaves nothing to mend. In double precision they serve where they prove A to be of full rank, and the
result is polished against A itself; all other matrices are reduced by a QR decomposition, A⁺ = R⁺Qᴴ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from lowrank._accurate import accurate_product, accurate_sum, split_product
from lowrank._array import Array, Namespace, device, is_traced, matrix_transpose_conj, real_dtype, widest_real
from lowrank._newton import Work, as_matrices, frobenius, polynomial
from lowrank._truncated import square_pinv

# Numbers in a block of rows.
_BLOCK = 1 << 18
# The polish starts from an error κ(A)²·eps of this size at the most, and a step of order 9 ends it.
_POLISHED = 0.02
_POLISHING = (0.0, *(1.0,) * 8)
_POLISHING_PRODUCTS = 4


def tall_pinv(a: Array, *, scale: Array, finite: Array, rtol: float, xp: Namespace) -> tuple[Array, Work]:
    """The truncated pseudoinverse of a/scale for more rows than columns; elements that are not finite count as zero."""
    blocks = _Rows(a, scale, finite, xp)
    wide = xp.complex128 if xp.isdtype(a.dtype, "complex floating") else xp.float64
    if widest_real(a, xp) != real_dtype(a, xp):
        return _in_double(blocks, wide, rtol, xp)
    if is_traced(a):
        return _by_qr(blocks.whole(), rtol, xp)
    x, work = _by_gram(blocks, rtol, xp)
    if bool(xp.all(work.valid)):
        return x, work
    full = work.valid
    y, other = _by_qr(blocks.whole(), rtol, xp)
    other = other._replace(products=other.products + work.products)
    chosen = (xp.where(full, f, g) for f, g in zip(work, other, strict=True))
    return xp.where(as_matrices(full), x, y), Work(*chosen)


class _Rows:
    """The rows of a, scaled and with elements that are not finite set to zero, block by block."""

    def __init__(self, a: Array, scale: Array, finite: Array, xp: Namespace):
        self.a, self.scale, self.finite, self.xp = a, scale, finite, xp
        self.height = a.shape[-2] if is_traced(a) else max(4 * a.shape[-1], _BLOCK // max(1, a.shape[-1]))

    def __iter__(self) -> Iterator[Array]:
        rows = self.a.shape[-2]
        for start in range(0, rows, self.height):
            yield self._prepared(self.a[..., start : min(start + self.height, rows), :])

    def whole(self) -> Array:
        return self._prepared(self.a)

    def _prepared(self, block: Array) -> Array:
        return self.xp.where(as_matrices(self.finite), block / self.scale, self.xp.zeros_like(block))


def _in_double(rows: _Rows, wide: object, rtol: float, xp: Namespace) -> tuple[Array, Work]:
    """(AᴴA)⁺Aᴴ in double precision, rounded at the end."""
    narrow = rows.a.dtype
    gram = sum(matrix_transpose_conj(b, xp) @ b for b in (xp.astype(block, wide) for block in rows))
    inverse, work = square_pinv(gram, rtol=rtol**2, definite=True, hermitian=True, xp=xp)
    x = [xp.astype(inverse @ matrix_transpose_conj(xp.astype(block, wide), xp), narrow) for block in rows]
    figures = Work(*(xp.astype(f, real_dtype(rows.a, xp)) if f.dtype != xp.bool else f for f in work))
    figures = figures._replace(products=figures.products + 2, cutoff=xp.sqrt(figures.cutoff))
    return x[0] if len(x) == 1 else xp.concat(x, axis=-1), figures


def _by_gram(rows: _Rows, rtol: float, xp: Namespace) -> tuple[Array, Work]:
    """The same in working precision where AᴴA is proven to be of full rank, polished; ``valid`` says where."""
    n = rows.a.shape[-1]
    eps = float(xp.finfo(rows.a.dtype).eps)
    gram = sum(matrix_transpose_conj(block, xp) @ block for block in rows)
    reach = max(rtol**2, n * eps / _POLISHED)
    inverse, work = square_pinv(gram, rtol=reach, definite=True, hermitian=True, full_rank=True, xp=xp)
    eye = xp.eye(n, dtype=gram.dtype, device=device(gram))
    inverse = xp.where(as_matrices(work.valid), inverse, eye)
    parts, exact, remainder = [], -eye, xp.zeros_like(gram)
    for block in rows:
        part = accurate_product(inverse, matrix_transpose_conj(block, xp), xp)
        leading, rest = split_product(part, block, xp)
        exact, error = accurate_sum(exact, leading)
        remainder = remainder + (error + rest)
        parts.append(part)
    residual = -(exact + remainder)
    proven = work.valid & (frobenius(residual, xp) <= 0.25 * math.sqrt(n))
    correction = polynomial(residual, _POLISHING, xp)
    parts = [part + correction @ part for part in parts]
    x = parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1)
    # The Gram matrix, X, E in three products each, and the correction's.
    products = work.products + 1 + 3 + 3 + _POLISHING_PRODUCTS
    cutoff = rtol * xp.sqrt(work.cutoff / reach)
    return x, Work(work.steps + 1, products, work.bound, cutoff, proven)


def _by_qr(a: Array, rtol: float, xp: Namespace) -> tuple[Array, Work]:
    q, r = xp.linalg.qr(a)
    x, work = square_pinv(r, rtol=rtol, definite=False, hermitian=False, xp=xp)
    return x @ matrix_transpose_conj(q, xp), work._replace(products=work.products + 1)
