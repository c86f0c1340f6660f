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

from lowrank._array import Array, Namespace, arithmetic
from lowrank._array import matrix_transpose_conj as _h


def pseudoinverse(solve: Callable, p: Array, *, full_rank: bool, xp: Namespace) -> tuple:
    """solve(p) = (X, figures), with the derivative of the Moore–Penrose inverse attached to X.

    For constant rank, with X = A⁺ and a cotangent G of X,

        dX = −X dA X + XXᴴ dAᴴ (I − AX) + (I − XA) dAᴴ XᴴX
        Ā  = −XᴴGXᴴ + (I − AX) GᴴXXᴴ + XᴴXGᴴ (I − XA)

    (Golub & Pereyra, SIAM J. Numer. Anal. 10, 1973, eq. 4.12); where A is invertible (``full_rank``) only
    the first terms are left. Both are products of A and X, so that they differentiate again. The figures
    are arrays without a derivative. Returns (X, *figures).
    """
    rule = _torch_pseudoinverse() if compat.is_torch_array(p) else _jax_pseudoinverse
    return rule(p, solve, full_rank)


def _differential(a: Array, x: Array, da: Array, full_rank: bool, xp: Namespace) -> Array:
    if full_rank:
        return -(x @ da @ x)
    if a.shape[-2] < a.shape[-1]:
        return _h(_differential(_h(a, xp), _h(x, xp), _h(da, xp), full_rank, xp), xp)
    # Ordered so that no product is larger than n × n beside the tall matrices themselves.
    da_h, e = _h(da, xp), x @ a
    right = (x @ _h(x, xp)) @ (da_h - (da_h @ a) @ x)
    left = (da_h @ _h(x, xp)) @ x
    return -((x @ da) @ x) + right + (left - e @ left)


def _cotangent(a: Array, x: Array, g: Array, full_rank: bool, xp: Namespace) -> Array:
    if full_rank:
        return -(_h(x, xp) @ g @ _h(x, xp))
    if a.shape[-2] < a.shape[-1]:
        return _h(_cotangent(_h(a, xp), _h(x, xp), _h(g, xp), full_rank, xp), xp)
    g_h, x_h, e = _h(g, xp), _h(x, xp), x @ a
    xg = x @ g_h
    return -(x_h @ (g @ x_h)) + (g_h - a @ xg) @ (x @ x_h) + x_h @ (xg - xg @ e)


@functools.cache
def _torch_pseudoinverse() -> Callable:
    import array_api_compat.torch as xp
    import torch

    class Pseudoinverse(torch.autograd.Function):
        @staticmethod
        def forward(p, solve, full_rank):
            x, figures = solve(p)
            return x, *figures

        @staticmethod
        def setup_context(ctx, inputs, output):
            p, _, ctx.full_rank = inputs
            x, *figures = output
            ctx.mark_non_differentiable(*figures)
            ctx.save_for_backward(p, x)
            ctx.save_for_forward(p, x)

        @staticmethod
        def backward(ctx, g, *_):
            p, x = ctx.saved_tensors
            with arithmetic(p):
                return _cotangent(p, x, g, ctx.full_rank, xp), None, None

        @staticmethod
        def jvp(ctx, dp, *_):
            p, x = ctx.saved_tensors
            with arithmetic(p):
                return _differential(p, x, dp, ctx.full_rank, xp), *[None] * 5

        @staticmethod
        def vmap(info, in_dims, p, solve, full_rank):
            results = Pseudoinverse.apply(p.movedim(in_dims[0], 0), solve, full_rank)
            return results, (0,) * len(results)

    return Pseudoinverse.apply


def _jax_pseudoinverse(p: Array, solve: Callable, full_rank: bool) -> tuple:
    import jax

    @jax.custom_jvp
    def apply(p):
        x, figures = solve(p)
        return x, *figures

    @apply.defjvp
    def _(primals, tangents):
        (p,), (dp,) = primals, tangents
        x, *figures = apply(p)
        dx = _differential(p, x, dp, full_rank, jax.numpy)
        return (x, *figures), (dx, *(_jax_no_tangent(f) for f in figures))

    return apply(p)


def _jax_no_tangent(figure: Array) -> Array:
    import jax

    if jax.numpy.issubdtype(figure.dtype, jax.numpy.inexact):
        return jax.numpy.zeros_like(figure)
    return np.zeros(figure.shape, dtype=jax.dtypes.float0)


def squared_distances(choose: Callable, x: Array, y: Array, s: Array, c: Array, xp: Namespace) -> Array:
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
    return _torch_squared_distances()(choose, x, y, s, c)


def _distance_differential(x, y, s, c, dx, dy, ds, xp: Namespace) -> Array:
    u, v = (x - c) * s, (y - c) * s
    du, dv = dx * s + (x - c) * ds, dy * s + (y - c) * ds
    rows, columns = xp.sum(u * du, axis=-1)[..., :, None], xp.sum(v * dv, axis=-1)[..., None, :]
    return 2 * (rows + columns - du @ v.mT - u @ dv.mT)


def _distance_cotangent(u: Array, v: Array, g: Array, xp: Namespace) -> Array:
    """ū; and v̄ with the roles exchanged and G transposed."""
    return 2 * (u * xp.sum(g, axis=-1, keepdims=True) - g @ v)


@functools.cache
def _torch_squared_distances() -> Callable:
    import array_api_compat.torch as xp
    import torch

    class SquaredDistances(torch.autograd.Function):
        @staticmethod
        def forward(choose, x, y, s, c):
            # The choice is made here, where under torch.func.vmap the values are at hand.
            return choose(x, y, s, c, xp)(x, y, s, c, xp)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs[1:])
            ctx.save_for_forward(*inputs[1:])

        @staticmethod
        def backward(ctx, g):
            x, y, s, c = ctx.saved_tensors
            _, wants_x, wants_y, wants_s, _ = ctx.needs_input_grad
            x_bar = y_bar = s_bar = None
            with arithmetic(x):
                u, v = (x - c) * s, (y - c) * s
                if wants_x or wants_s:
                    u_bar = _distance_cotangent(u, v, g, xp)
                    x_bar = (u_bar * s).sum_to_size(x.shape)
                if wants_y or wants_s:
                    v_bar = _distance_cotangent(v, u, g.mT, xp)
                    y_bar = (v_bar * s).sum_to_size(y.shape)
                if wants_s:
                    s_bar = (u_bar * (x - c)).sum_to_size(s.shape) + (v_bar * (y - c)).sum_to_size(s.shape)
            return None, x_bar, y_bar, s_bar, None

        @staticmethod
        def jvp(ctx, _, dx, dy, ds, dc):
            x, y, s, c = ctx.saved_tensors
            with arithmetic(x):
                return _distance_differential(x, y, s, c, dx, dy, ds, xp)

        @staticmethod
        def vmap(info, in_dims, choose, *arrays):
            # The function is batched as it stands: the mapped axis becomes the first of the leading axes, which
            # broadcast from the right, so that an array with fewer of them needs axes of length one after it.
            ranks = [a.ndim - (dim is not None) for a, dim in zip(arrays, in_dims[1:], strict=True)]
            moved = [
                a if dim is None else a.movedim(dim, 0).reshape(info.batch_size, *[1] * (max(ranks) - rank), *shape)
                for a, dim, rank in zip(arrays, in_dims[1:], ranks, strict=True)
                for shape in [[k for i, k in enumerate(a.shape) if i != dim]]
            ]
            return SquaredDistances.apply(choose, *moved), 0

    return SquaredDistances.apply


@functools.cache
def _jax_squared_distances() -> Callable:
    import jax

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def rule(distances, x, y, s, c):
        return distances(x, y, s, c, jax.numpy)

    @rule.defjvp
    def _(distances, primals, tangents):
        x, y, s, c = primals
        dx, dy, ds, _ = tangents
        return rule(distances, x, y, s, c), _distance_differential(x, y, s, c, dx, dy, ds, jax.numpy)

    return jax.jit(rule, static_argnums=0)
