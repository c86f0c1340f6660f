"""Matrix products with less rounding than one product in working precision has.

For residuals such as I − XA, where everything that matters is what cancellation leaves. The factors are
split into leading bits, whose product is free of rounding, and a remainder (Ozaki, Ogita, Oishi & Rump,
Numer. Algorithms 59, 2012); where there is a wider type, the product is formed in it.
"""

from __future__ import annotations

import math

from lowrank._array import Array, Namespace, add_to_diagonal, real_dtype, widest_real


def _leading_bits(a: Array, axis: int, bits: int, xp: Namespace) -> Array:
    """a rounded to a common grid along ``axis``, ``bits`` bits below the largest entry: (a + σ) − σ."""
    parts = (xp.real(a), xp.imag(a)) if xp.isdtype(a.dtype, "complex floating") else (a,)
    digits = 1 - round(math.log2(float(xp.finfo(a.dtype).eps)))
    leading = []
    for part in parts:
        largest = xp.max(xp.abs(part), axis=axis, keepdims=True)
        largest = xp.where(largest > 0, largest, xp.ones_like(largest))
        sigma = 1.5 * 2.0 ** (xp.ceil(xp.log2(largest)) + (digits - bits))
        rounded = part + sigma
        rounded -= sigma
        leading.append(rounded)
    return leading[0] if len(parts) == 1 else xp.astype(leading[0], a.dtype) + 1j * xp.astype(leading[1], a.dtype)


def split_product(a: Array, b: Array, xp: Namespace) -> tuple[Array, Array]:
    """Two arrays whose exact sum is a @ b with an error near 2^-bits·eps·|a||b|, in three products.

    The first is free of rounding: the leading bits of both factors are so few that sums of their products fit.
    """
    terms = a.shape[-1] * (2 if xp.isdtype(a.dtype, "complex floating") else 1)
    digits = 1 - round(math.log2(float(xp.finfo(a.dtype).eps)))
    bits = (digits - math.ceil(math.log2(terms)) - 1) // 2
    a_lead, b_lead = _leading_bits(a, -1, bits, xp), _leading_bits(b, -2, bits, xp)
    rest = a_lead @ (b - b_lead)
    rest += (a - a_lead) @ b
    return a_lead @ b_lead, rest


def accurate_cost(a: Array, xp: Namespace) -> int:
    """The matrix products that an accurate one with a takes."""
    return 3 if real_dtype(a, xp) == xp.float64 or widest_real(a, xp) == xp.float32 else 1


def accurate_product(a: Array, b: Array, xp: Namespace, *, minus: float = 0.0) -> Array:
    """a @ b − minus·I with an error near eps·|ab − minus·I| instead of eps·|a||b|, in :func:`accurate_cost` products.

    Single precision is multiplied in double where there is double, which takes half the time of a split product;
    double is split.
    """
    if accurate_cost(a, xp) > 1:
        exact, remainder = split_product(a, b, xp)
        exact = _less(exact, minus, xp)
        exact += remainder
        return exact
    wide = xp.complex128 if xp.isdtype(a.dtype, "complex floating") else xp.float64
    return xp.astype(_less(xp.astype(a, wide) @ xp.astype(b, wide), minus, xp), a.dtype)


def _less(product: Array, minus: float, xp: Namespace) -> Array:
    return add_to_diagonal(product, -minus, xp) if minus else product


def accurate_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """The rounded sum of x and y and its rounding error (D. Knuth, The Art of Computer Programming 2, 4.2.2)."""
    total = x + y
    shadow = total - x
    return total, (x - (total - shadow)) + (y - shadow)
