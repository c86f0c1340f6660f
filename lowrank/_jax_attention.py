"""Softmax-free attention for JAX: its derivative, right in single precision where landmarks nearly coincide.

With D = C Lᵀ, P' = L P Lᵀ, w' = P'⁻¹ Dᵀ v and w = Lᵀ w' (``_formula``) the result is X = C w, and

    dX = D dw' + dC w,   dw' = P'⁻¹ L (Cᵀ dv + dCᵀ v − dA w).

Backward that is what it is for torch (``_attend``): only w' and, by the transpose of D dw', its counterpart for a
cotangent come from sums of differences. All else takes C, which the compiler has, where it would compute D again for
each product with it. Written in operations that JAX differentiates, the rule has derivatives of its own.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from lowrank._array import arithmetic
from lowrank._formula import corrected, differences, from_gram, gaussian_block, scaled
from lowrank._nearby import what_differs


@functools.partial(jax.custom_jvp, nondiff_argnums=(7, 8, 9))
def attend(
    q: Array,
    z: Array,
    v: Array,
    a: Array,
    core: Array,
    centre: Array,
    mask: Array | None,
    scale: float,
    ridge: float,
    normalize: bool,
) -> Array:
    """``from_gram`` of arrays in single precision, with the mask of landmarks."""
    return from_gram(q, z, v, a, core, None, centre, scale, ridge, jnp, normalize=normalize)


@attend.defjvp
def _(
    scale: float,
    ridge: float,
    normalize: bool,
    primals: tuple[Array, ...],
    tangents: tuple[Array, ...],
) -> tuple[Array, Array]:
    q, z, v, a, core, centre, mask = primals
    dq, dz, dv, da, *_ = tangents

    def columns(q: Array, z: Array, a: Array) -> tuple[Array, Array]:
        block = gaussian_block((q - centre) * scale, (z - centre) * scale, jnp)
        return scaled(block, a, normalize, jnp), block

    # A program may be differentiated after its call, and outside of what arithmetic was asked for there.
    with arithmetic(z):
        near = what_differs(z, centre, scale, jnp, mask=mask)
        x, y, values, dvalues = (t.astype(z.dtype) for t in (q, z, v, dv))
        c, dc, block = jax.jvp(columns, (x, z, a), (dq.astype(z.dtype), dz, da), has_aux=True)
        x, y = (x - centre) * scale, (z - centre) * scale
        d, system, core = differences(block, x, y, a, core, near, ridge, normalize, jnp)
        links = near.links.astype(z.dtype)
        difference = corrected(core, system, d.mT @ values, jnp)
        w = links.mT @ difference
        changed = corrected(core, system, links @ (c.mT @ dvalues + dc.mT @ values - da @ w), jnp)
        return (c @ w).astype(v.dtype), (d @ changed + dc @ w).astype(v.dtype)
