"""What differs between the columns of C of landmarks that are near one another, for where there is no double precision.

With σ = Cᵀ v, w solves P w = σ, and where landmarks are close P is nearly singular: it is what differs in σ between
them that w depends on, and the columns of C are rounded apart from one another. So for a landmark z that has an earlier
one, p, nearby, its parent, the difference of their columns takes the place of its own,

    c_z − c_p = −c_z expm1(−t),   t = s²(q − (z + p)/2)ᵀ(z − p),

whose error is small as the difference is; z − p is that of the landmarks as they are given, before rounding of anything
else. In float32 z̄ is then right to 1e-6, where landmarks in pairs, clusters or all together nearly coincide, and
without it to 1e-4 (``_formula``). It is for JAX, and for programs for a GPU: where double precision can be had at a
price, sums are formed in that where it matters (``_attend``).
"""

from __future__ import annotations

from typing import NamedTuple

from lowrank._array import Array, Namespace, device, identity, stop_gradient, widest_real

# In lengthscales. For 49 landmarks in a ball whose distances are about that the error in z̄ is 8e-6 instead of the 2e-5
# that half of it would leave. Of landmarks 1.18 apart the difference of columns is as large as these.
WITHIN = 1.0
# The most that −t is: with |z − p| of a lengthscale, more than 13.7 is where C is below 1e-38. What would be 0 times an
# infinite number is 0 then, in derivatives too, which multiply by values of tokens.
STEEP = 20.0


class Nearby(NamedTuple):
    """What differs between landmarks and their parents: s(z − p), a column each, 0 where there is no parent; what with
    −sxᵀ(z − p) gives −t, −∞ there; and L, which is I less a 1 for each parent."""

    steps: Array  # (..., d, m)
    falls: Array  # (..., 1, m)
    links: Array  # (..., m, m), of double precision where there is

    def of_columns(self, c: Array, x: Array, xp: Namespace) -> Array:
        """C Lᵀ, to be differentiated, for C = k(x, z) of points x near the origin that the landmarks have."""
        return -c * xp.expm1(self._falls(x, xp))

    def of_gram(self, a: Array, z: Array, xp: Namespace) -> Array:
        """L A Lᵀ, likewise, for A = k(z, z)."""
        fall = self._falls(z, xp)
        fall_t = xp.matrix_transpose(fall)
        both = xp.expm1(xp.matrix_transpose(self.steps) @ self.steps)
        return a * (xp.expm1(fall) * xp.expm1(fall_t) + xp.exp(fall + fall_t) * both)

    def _falls(self, x: Array, xp: Namespace) -> Array:
        return xp.clip(self.falls - x @ self.steps, max=STEEP)


def nearby(z: Array, centre: Array, scale: float, xp: Namespace, *, mask: Array | None = None) -> Nearby | None:
    """``what_differs``, but None for double precision, which needs none, and where there are no two landmarks."""
    if z.dtype == xp.float64 or z.shape[-2] < 2:
        return None
    return what_differs(z, centre, scale, xp, mask=mask)


def what_differs(z: Array, centre: Array, scale: float, xp: Namespace, *, mask: Array | None = None) -> Nearby:
    """Of landmarks (..., m, d), of which those count where the ``mask`` (..., m) is True: the parent of one is the
    nearest of those before it, if that is within ``WITHIN``. Differentiable in z."""
    order = xp.arange(z.shape[-2], device=device(z))
    y = (z - centre) * scale
    fixed = stop_gradient(y)
    products = fixed @ xp.matrix_transpose(fixed)
    half = 0.5 * xp.sum(fixed * fixed, axis=-1, keepdims=True)
    before = order < order[:, None]
    if mask is not None:
        before = before & mask[..., :, None] & mask[..., None, :]
    close = xp.where(before, products - half - xp.matrix_transpose(half), -xp.inf)  # −‖y − y'‖²/2
    has = xp.max(close, axis=-1, keepdims=True) > -0.5 * WITHIN**2
    parents = xp.astype(has & (order == xp.argmax(close, axis=-1, keepdims=True)), z.dtype)
    # A product with zeros and one 1 is what it is of, exactly.
    steps = xp.where(has, (z - parents @ z) * scale, xp.zeros_like(z))
    falls = xp.where(has, 0.5 * xp.sum(steps * (y + parents @ y), axis=-1, keepdims=True), -xp.inf)
    links = xp.astype(identity(products, xp) - parents, widest_real(z, xp))
    return Nearby(xp.matrix_transpose(steps), xp.matrix_transpose(falls), links)
