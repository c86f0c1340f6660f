"""The differentials and cotangents that ``_gradients`` attaches, as formulas of arrays.

Golub & Pereyra, SIAM J. Numer. Anal. 10, 1973, for the pseudoinverse; the product rule for squared distances. A
differential maps a change of the argument to the change of the result, a cotangent is its adjoint. All are products and
sums, so that they differentiate again.
"""

from __future__ import annotations

from lowrank._array import Array, Namespace
from lowrank._array import matrix_transpose_conj as _h


def differential(a: Array, x: Array, da: Array, full_rank: bool, xp: Namespace) -> Array:
    if full_rank:
        return -(x @ da @ x)
    if a.shape[-2] < a.shape[-1]:
        return _h(differential(_h(a, xp), _h(x, xp), _h(da, xp), full_rank, xp), xp)
    # Ordered so that no product is larger than n × n beside the tall matrices themselves.
    da_h, e = _h(da, xp), x @ a
    right = (x @ _h(x, xp)) @ (da_h - (da_h @ a) @ x)
    left = (da_h @ _h(x, xp)) @ x
    return -((x @ da) @ x) + right + (left - e @ left)


def cotangent(a: Array, x: Array, g: Array, full_rank: bool, xp: Namespace) -> Array:
    if full_rank:
        return -(_h(x, xp) @ g @ _h(x, xp))
    if a.shape[-2] < a.shape[-1]:
        return _h(cotangent(_h(a, xp), _h(x, xp), _h(g, xp), full_rank, xp), xp)
    g_h, x_h, e = _h(g, xp), _h(x, xp), x @ a
    xg = x @ g_h
    return -(x_h @ (g @ x_h)) + (g_h - a @ xg) @ (x @ x_h) + x_h @ (xg - xg @ e)


def distance_differential(
    x: Array, y: Array, s: Array, c: Array, dx: Array, dy: Array, ds: Array, xp: Namespace
) -> Array:
    u, v = (x - c) * s, (y - c) * s
    du, dv = dx * s + (x - c) * ds, dy * s + (y - c) * ds
    rows, columns = xp.sum(u * du, axis=-1)[..., :, None], xp.sum(v * dv, axis=-1)[..., None, :]
    return 2 * (rows + columns - du @ v.mT - u @ dv.mT)


def distance_cotangent(u: Array, v: Array, g: Array, xp: Namespace) -> Array:
    """ū; and v̄ with the roles exchanged and G transposed."""
    return 2 * (u * xp.sum(g, axis=-1, keepdims=True) - g @ v)
