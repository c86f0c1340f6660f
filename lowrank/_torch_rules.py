"""The rules of ``_gradients`` for torch, which wants classes, where its compiler can see them.

Each is an autograd.Function with forward, backward, jvp and vmap; the formulas are those of ``_gradients``.
"""

from __future__ import annotations

import array_api_compat.torch as xp
import torch
import torch.nn.functional as F

from lowrank import _attend, _fused_attention
from lowrank._array import arithmetic, is_traced
from lowrank._differentials import cotangent, differential, distance_cotangent, distance_differential
from lowrank._schedule import constants

# The compiler is not to trace how they were found.
for constant in constants:
    torch.compiler.assume_constant_result(constant)


class ReversePseudoinverse(torch.autograd.Function):
    """What torch's compiler can trace: it knows no rules for jvp and vmap."""

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

    @staticmethod
    def backward(ctx, g, *_):
        p, x = ctx.saved_tensors
        with arithmetic(p):
            return cotangent(p, x, g, ctx.full_rank, xp), None, None


class Pseudoinverse(ReversePseudoinverse):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ReversePseudoinverse.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], output[0])

    @staticmethod
    def jvp(ctx, dp, *_):
        p, x = ctx.saved_tensors
        with arithmetic(p):
            return differential(p, x, dp, ctx.full_rank, xp), *[None] * 5

    @staticmethod
    def vmap(info, in_dims, p, solve, full_rank):
        results = Pseudoinverse.apply(p.movedim(in_dims[0], 0), solve, full_rank)
        return results, (0,) * len(results)


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
                u_bar = distance_cotangent(u, v, g, xp)
                x_bar = (u_bar * s).sum_to_size(x.shape)
            if wants_y or wants_s:
                v_bar = distance_cotangent(v, u, g.mT, xp)
                y_bar = (v_bar * s).sum_to_size(y.shape)
            if wants_s:
                s_bar = (u_bar * (x - c)).sum_to_size(s.shape) + (v_bar * (y - c)).sum_to_size(s.shape)
        return None, x_bar, y_bar, s_bar, None

    @staticmethod
    def jvp(ctx, _, dx, dy, ds, dc):
        x, y, s, c = ctx.saved_tensors
        with arithmetic(x):
            return distance_differential(x, y, s, c, dx, dy, ds, xp)

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


class Attention(torch.autograd.Function):
    """C M (Cᵀ v), whose way back computes C again: by the kernels of ``_fused_attention`` where they serve, else by the
    blocks of ``_attend``."""

    @staticmethod
    def forward(ctx, q, z, v, core, system, centre, scale):
        ctx.way = _fused_way if _fused_attention.applies(q, z, v) else _attend
        out, sums, weights = ctx.way.forward(q, z, v, core, system, centre, scale, xp)
        ctx.save_for_backward(q, z, v, core, system, centre, sums, weights)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, g):
        q, z, v, core, system, centre, sums, weights = ctx.saved_tensors
        with arithmetic(q):
            if torch.is_grad_enabled() or is_traced(g):
                return Attention.differentiable_backward(ctx, g)
            q_bar, z_bar, v_bar, inner = ctx.way.backward(
                q, z, v, core, system, centre, ctx.scale, sums, weights, g, xp
            )
        return q_bar, z_bar, v_bar, *((inner, None) if system is None else (None, inner)), None, None

    @staticmethod
    def differentiable_backward(ctx, g):
        """By the formula, to be differentiated again or for many cotangents at once."""
        q, z, v, core, system, centre, *_ = ctx.saved_tensors
        inputs = q, z, v, core, system
        wanted = [x for x, wants in zip(inputs, ctx.needs_input_grad, strict=False) if wants]
        with torch.enable_grad():
            out = _attend.plain(q, z, v, core, system, centre, ctx.scale, xp)
        found = iter(torch.autograd.grad(out, wanted, g, create_graph=torch.is_grad_enabled()))
        return *(next(found) if wants else None for wants in ctx.needs_input_grad[:5]), None, None


class _fused_way:
    """``forward`` and ``backward`` of ``_attend`` by kernels that never store a block of C."""

    @staticmethod
    def forward(q, z, v, core, system, centre, scale, xp):
        x, y = (q - centre) * scale, (z - centre) * scale
        sums = _fused_attention.transposed_product(x, y, v)
        weights = _attend.applied(core, system, sums)
        return _fused_attention.product(x, y, weights), sums, weights

    @staticmethod
    def backward(q, z, v, core, system, centre, scale, sums, weights, g, xp):
        x, y = (q - centre) * scale, (z - centre) * scale
        w_bar = _fused_attention.transposed_product(x, y, g)
        sigma_bar = _attend.applied(core.mT if system is None else core, system, w_bar)
        x_bar, y_bar, v_bar = _fused_attention.cotangents(x, y, v, g, weights, sigma_bar)
        return scale * x_bar, scale * y_bar, v_bar, _attend.inner_cotangent(system, w_bar, sigma_bar, sums, weights)


def gaussian_product(x, y, v):
    """exp(−‖x − y‖²/2) v by torch's softmax attention, which stores no block, with one key more.

    Softmax over xᵀy − ‖y‖²/2 and, for that key, ‖x‖²/2 gives the key the weight 1/(1 + Σ exp(−‖x − y‖²/2)) and each y
    that times exp(−‖x − y‖²/2). The key has no value, but one more column of the values is 1 there alone, and returns
    its weight, at least 1/(1 + the number of y), to divide by.
    """
    half_x, half_y = (0.5 * t.square().sum(-1, keepdim=True) for t in (x, y))
    d, e = x.shape[-1], v.shape[-1]
    width = max(d + 2, e + 1)  # kernels are made for one
    asked = F.pad(torch.cat([x, torch.ones_like(half_x), half_x], -1), (0, width - d - 2))
    keys = _with_unit_row(torch.cat([y, -half_y], -1), d + 1, width)
    out = F.scaled_dot_product_attention(asked, keys, _with_unit_row(v, e, width), scale=1.0)
    return out[..., :e] / out[..., e : e + 1]


def _with_unit_row(t, at, width):
    """t with columns of zeros up to ``width`` and one more row, 1 in column ``at`` and 0 elsewhere."""
    row = (torch.arange(width, device=t.device) == at).to(t).expand(*t.shape[:-2], 1, width)
    return torch.cat([F.pad(t, (0, width - t.shape[-1])), row], -2)
