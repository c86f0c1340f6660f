"""C M (Cᵀ v) with C = exp(−s²‖q − z‖²/2), all of C at once: for every library, any tracer, any number of derivatives.

M inverts P = k(z, z) + δI up to rounding of cond(P)·eps, and w = P⁻¹Cᵀv is solved for by corrections, as in
``_attend``. Where derivatives are asked for, that is in double precision for torch on a CPU. For others, where
landmarks are near one another, C is replaced by D = C Lᵀ, the differences of its columns (``_nearby``), and P by
L P Lᵀ, for

    C P⁻¹ Cᵀ = D (L P Lᵀ)⁻¹ Dᵀ.

L P Lᵀ is made of differences of differences, and its error is eps of these, not of 1: no double precision is needed
for z̄ to be right to 1e-6, where the same formula in P and C leaves 1e-4 of it wrong in float32.
"""

from __future__ import annotations

from typing import NamedTuple

from lowrank._array import Array, Namespace, identity, solve_cholesky, solve_triangular, stop_gradient
from lowrank._nearby import Nearby
from lowrank.kernels import _expanded_squared_distances

# Each correction multiplies the error of w by I − MP once more: where that is eps^⅓, two leave eps. What a library
# takes for derivatives of the corrections, M held fixed, has for each derivative one factor less: two more corrections,
# and the second is as right as w.
CORRECTIONS, DERIVATIVES = 2, 2


class Factor(NamedTuple):
    """The lower Cholesky factor of P, in the place of M; of torch tensors, and without a derivative of its own."""

    lower: Array

    def __matmul__(self, b: Array) -> Array:
        return solve_cholesky(self.lower, b)


def plain(
    q: Array,
    z: Array,
    v: Array,
    core: Array | Factor,
    system: Array | None,
    centre: Array,
    scale: float,
    xp: Namespace,
    *,
    near: Nearby | None = None,
) -> Array:
    """X for M, and P where M is an inverse of it; with what differs between landmarks P is of double precision."""
    x, values = (xp.astype(y, z.dtype, copy=False) for y in (q, v))
    x = (x - centre) * scale
    c = gaussian_block(x, (z - centre) * scale, xp)
    if near is not None:
        c, system = near.of_columns(c, x, xp), near.links @ system @ xp.matrix_transpose(near.links)
        core = _of_differences(core, xp.astype(near.links, z.dtype, copy=False), xp)
    return xp.astype(c @ corrected(core, system, xp.matrix_transpose(c) @ values, xp), v.dtype, copy=False)


def from_gram(
    q: Array,
    z: Array,
    v: Array,
    a: Array,
    core: Array | Factor,
    near: Nearby | None,
    centre: Array,
    scale: float,
    ridge: float,
    xp: Namespace,
    *,
    normalize: bool = False,
) -> Array:
    """X for A = k(z, z), 0 between landmarks of which one is masked, M that inverts P = A + δI or is 0 where landmarks
    are masked, and what differs between landmarks. ``normalize``: for R^-½ P⁻¹ R^-½, R the row sums of A."""
    x, values = (xp.astype(y, z.dtype, copy=False) for y in (q, v))
    x, y = (x - centre) * scale, (z - centre) * scale
    c = gaussian_block(x, y, xp)
    if near is None:
        c, system = scaled(c, a, normalize, xp), a + ridge * identity(a, xp)
    else:
        c, system, core = differences(c, x, y, a, core, near, ridge, normalize, xp)
    w = corrected(core, system, xp.matrix_transpose(c) @ values, xp)
    return xp.astype(c @ w, v.dtype, copy=False)


def scaled(c: Array, a: Array, normalize: bool, xp: Namespace) -> Array:
    """C, or, with R the row sums of A, C R^-½."""
    return c / xp.sqrt(xp.sum(a, axis=-2, keepdims=True)) if normalize else c


def differences(
    c: Array,
    x: Array,
    y: Array,
    a: Array,
    core: Array | Factor,
    near: Nearby,
    ridge: float,
    normalize: bool,
    xp: Namespace,
) -> tuple[Array, Array, Array]:
    """C Lᵀ, or C R^-½ Lᵀ, and L P Lᵀ, to be differentiated, and L⁻ᵀ M L⁻¹; of points x and landmarks y near the
    origin, in lengthscales."""
    links, eye = xp.astype(near.links, y.dtype, copy=False), identity(a, xp)
    d = near.of_columns(c, x, xp)
    if normalize:
        d = _normalized(d, c, a, near.of_columns(a, y, xp), eye - links, xp)
    system = near.of_gram(a, y, xp) + ridge * (links @ xp.matrix_transpose(links))
    return d, system, _of_differences(core, links, xp)


def _of_differences(core: Array | Factor, links: Array, xp: Namespace) -> Array:
    """L⁻ᵀ M L⁻¹; the entries of L⁻¹ are 0 and 1."""
    inverse = solve_triangular(links, xp.broadcast_to(identity(links, xp), links.shape), xp)
    return stop_gradient(xp.matrix_transpose(inverse) @ (core @ inverse))


def _normalized(d: Array, c: Array, a: Array, of_a: Array, parents: Array, xp: Namespace) -> Array:
    """C/r less that of parents, r the roots of the row sums of A, for D = C less that of parents: with a landmark's r
    and its parent's r', D/r − C'(r − r')/(r r'), where r² − r'² is a sum of differences of A."""
    parents_t = xp.matrix_transpose(parents)
    roots = xp.sqrt(xp.sum(a, axis=-2, keepdims=True))
    has = xp.sum(parents_t, axis=-2, keepdims=True)
    others = roots @ parents_t + (1 - has)
    change = has * xp.sum(of_a, axis=-2, keepdims=True) / ((roots + others) * roots * others)
    return d / roots - (c @ parents_t) * change


def corrected(core: Array | Factor, system: Array | None, sigma: Array, xp: Namespace) -> Array:
    """w = Mσ, or, with P, the solution of P w = σ that M leads to, to be differentiated: it is the corrections that
    depend on P."""
    w = core @ sigma
    if system is not None:
        wide = system.dtype
        for _ in range(CORRECTIONS + DERIVATIVES):
            missing = xp.astype(sigma, wide, copy=False) - system @ xp.astype(w, wide, copy=False)
            w = w + core @ xp.astype(missing, w.dtype, copy=False)
    return w


def gaussian_block(x: Array, y: Array, xp: Namespace) -> Array:
    """exp(−‖x − y‖²/2) by the expansion, whatever the values; the points should lie near the origin."""
    return xp.exp(-0.5 * _expanded_squared_distances(x, y, xp))


def gaussian_gram(z: Array, xp: Namespace) -> Array:
    """k(z, z), to be differentiated."""
    a = gaussian_block(z, z, xp)
    # k(z, z) = 1, which the expansion of a distance misses by eps·‖z‖²: of far landmarks by all of it.
    eye = identity(a, xp)
    return xp.where(eye == 1, eye, a)
