"""Derivative rules of our own, for the libraries that differentiate (torch and JAX).

Reached lazily, through one function per rule, by the rooms whose results have a closed-form derivative
that is cheaper, or more accurate, than differentiating what was computed: ``pinv`` (Golub & Pereyra 1973)
and ``kernels`` (squared distances). torch gets an autograd.Function with forward, backward and vmap rules,
JAX a custom_jvp; both are written in differentiable operations, so that second derivatives follow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import array_api_compat as compat
import numpy as np

from lowrank import _newton
from lowrank._array import Array, Namespace, carries_derivative
from lowrank._differentials import differential, distance_differential


def pseudoinverse(
    solve: Callable[[Array], tuple[Array, tuple[Array, ...]]], p: Array, *, full_rank: bool, xp: Namespace
) -> tuple[Array, ...]:
    """solve(p) = (X, figures), with the derivative of the Moore–Penrose inverse attached to X.

    For constant rank, with X = A⁺ and a cotangent G of X,

        dX = −X dA X + XXᴴ dAᴴ (I − AX) + (I − XA) dAᴴ XᴴX
        Ā  = −XᴴGXᴴ + (I − AX) GᴴXXᴴ + XᴴXGᴴ (I − XA)

    (Golub & Pereyra, SIAM J. Numer. Anal. 10, 1973, eq. 4.12); where A is invertible (``full_rank``) only
    the first terms are left. Both are products of A and X, so that they differentiate again. The figures
    are arrays without a derivative. Returns (X, *figures).
    """
    if compat.is_torch_array(p):
        import torch

        from lowrank._torch_rules import Pseudoinverse, ReversePseudoinverse

        rule = ReversePseudoinverse if torch.compiler.is_compiling() else Pseudoinverse
        return rule.apply(p, solve, full_rank)
    return _jax_pseudoinverse(p, solve, full_rank)


def textbook_steps(x: Array, a: Array, steps: int) -> Array:
    """X ← 2X − XAX, ``steps`` times, of torch tensors, X of shape (..., n, m) and A (..., m, n), with the derivative of
    just that: from a step to the one before, with E = XA and a cotangent G,

        X̄ = 2G − EᴴG − (GXᴴ)Aᴴ,   Ā = −Xᴴ(GXᴴ),

    five products with that of E, in memory that is used again, where recording the steps takes new memory for all.
    """
    import array_api_compat.torch as xp

    from lowrank import _native_newton
    from lowrank._torch_rules import TextbookSteps

    if not (carries_derivative(x) or carries_derivative(a) or _native_newton.applies(x, a, steps)):
        return _newton.textbook_steps(x, a, steps, xp)
    if a.shape[-1] > a.shape[-2]:  # the iteration commutes with ᴴ
        return textbook_steps(x.mH, a.mH, steps).mH
    out = TextbookSteps.apply(*(y.reshape(-1, *y.shape[-2:]) for y in (x, a)), steps)
    return out.reshape(x.shape)


def _jax_pseudoinverse(
    p: Array, solve: Callable[[Array], tuple[Array, tuple[Array, ...]]], full_rank: bool
) -> tuple[Array, ...]:
    import jax

    @jax.custom_jvp
    def apply(p: Array) -> tuple[Array, ...]:
        x, figures = solve(p)
        return x, *figures

    @apply.defjvp
    def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        (p,), (dp,) = primals, tangents
        x, *figures = apply(p)
        dx = differential(p, x, dp, full_rank, jax.numpy)
        return (x, *figures), (dx, *(_jax_no_tangent(f) for f in figures))

    return apply(p)


def _jax_no_tangent(figure: Array) -> Array:
    import jax

    if jax.numpy.issubdtype(figure.dtype, jax.numpy.inexact):
        return jax.numpy.zeros_like(figure)
    return np.zeros(figure.shape, dtype=jax.dtypes.float0)


def squared_distances(
    choose: Callable[..., Callable[..., Array]], x: Array, y: Array, s: Array, c: Array, xp: Namespace
) -> Array:
    """D = Σᵢ sᵢ²(xᵢ − yᵢ)², of shape (..., n, m), with its derivative attached.

    x is (..., n, d), y is (..., m, d), s is (..., 1, d) or (..., 1, 1), and c, on which D does not depend, is a
    point (..., 1, d) near the data. choose(x, y, s, c, xp) looks at them and names the function of the same
    arguments that computes D. In terms of u = (x − c)s and v = (y − c)s, and for a cotangent G of D,

        dD = 2 [rowsum(u∘du) 1ᵀ + 1 rowsum(v∘dv)ᵀ − du vᵀ − u dvᵀ]
        ū  = 2 (diag(G1) u − G v),   v̄ = 2 (diag(Gᵀ1) v − Gᵀu),   x̄ = ū s,   ȳ = v̄ s,   s̄ = Σ [ū∘(x − c) + v̄∘(y − c)].

    What is kept for the way back is x, y and s: differentiating the sums would keep a block for every feature. All
    of it is products and sums of x, y, s and G, so that it differentiates again.
    """
    if not compat.is_torch_array(x):
        # Compiled, for dispatched one by one the operations on d features take ten times as long.
        return _jax_squared_distances()(choose(x, y, s, c, xp), x, y, s, c)
    import torch

    # The compiler differentiates the sums itself, and recomputes what it would otherwise keep.
    if torch.compiler.is_compiling():
        return choose(x, y, s, c, xp)(x, y, s, c, xp)
    from lowrank._torch_rules import SquaredDistances

    return SquaredDistances.apply(choose, x, y, s, c)


@functools.cache
def _jax_squared_distances() -> Callable[..., Array]:
    import jax

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def rule(distances: Callable[..., Array], x: Array, y: Array, s: Array, c: Array) -> Array:
        return distances(x, y, s, c, jax.numpy)

    @rule.defjvp
    def _(
        distances: Callable[..., Array], primals: tuple[Array, ...], tangents: tuple[Array, ...]
    ) -> tuple[Array, Array]:
        x, y, s, c = primals
        dx, dy, ds, _ = tangents
        return rule(distances, x, y, s, c), distance_differential(x, y, s, c, dx, dy, ds, jax.numpy)

    return jax.jit(rule, static_argnums=0)
