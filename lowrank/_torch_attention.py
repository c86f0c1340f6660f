"""Softmax-free attention for torch: its way back as an autograd.Function, and Gaussian products by softmax attention.

The formulas are those of ``_attend``; the kernels that take their place on a GPU are in ``_fused_attention``. For a
Gaussian product with every key, −‖q − z‖²/2 = qᵀz − ‖z‖²/2 − ‖q‖²/2 makes of torch's softmax attention, which keeps no
matrix either, what is wanted: a bias for each key, and one key more whose weight says what to divide by.
"""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank import _attend, _fused_attention, _native_attention
from lowrank._array import Namespace, arithmetic, gradients_of, is_on_cpu, is_traced
from lowrank._formula import Factor, from_gram, gaussian_gram, plain
from lowrank._nearby import nearby
from lowrank._segments import add_cotangents, segment_means


def attend(*given: Any, ridge: float | None, recorded: bool, of_segments: bool) -> Tensor:
    """X for q, z, v, core, system, centre and scale as ``Attention`` has them, with its rule for the way back where one
    is ``recorded``: to attach it takes as long as a small product."""
    if recorded:
        return Attention.apply(*given, ridge, of_segments)
    return _way(*given[:3]).forward(*given, xp, most=0)[0]


class Attention(torch.autograd.Function):
    """C M (Cᵀ v), whose way back computes C again: by the kernels of ``_fused_attention`` on a GPU and those of
    ``_native_attention`` on a CPU where they serve, else by the blocks of ``_attend``."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        z: Tensor,
        v: Tensor,
        core: Tensor | Factor,
        system: Tensor | None,
        centre: Tensor,
        scale: float,
        ridge: float | None,
        of_segments: bool,
    ) -> Tensor:
        """Where ``ridge`` is given, P is k(z, z) + ridge·I, a constant, and its derivative is in that of z; where z are
        means of segments of q, a constant as well, that is in the one of q."""
        ctx.way = _way(q, z, v)
        most = _attend.most_amplified(of_gram=ridge is not None)
        out, sums, weights = ctx.way.forward(q, z, v, core, system, centre, scale, xp, most=most)
        ctx.scale, ctx.factored, ctx.ridge, ctx.of_segments = scale, isinstance(core, Factor), ridge, of_segments
        kept = core.lower if isinstance(core, Factor) else core
        ctx.save_for_backward(q, z, v, kept, system, centre, sums, weights)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, z, v, core, system, centre, sums, weights = ctx.saved_tensors
        core = Factor(core) if ctx.factored else core
        with arithmetic(q):
            if torch.is_grad_enabled() or is_traced(g):
                return Attention.differentiable_backward(ctx, g)
            q_bar, z_bar, v_bar, inner = ctx.way.backward(
                q, z, v, core, system, centre, ctx.scale, sums, weights, g, xp, of_gram=ctx.ridge is not None
            )
        inners = (inner, None) if system is None else (None, inner)
        if ctx.of_segments:
            add_cotangents(q_bar, z_bar, xp)
        return q_bar, None if ctx.of_segments else z_bar, v_bar, *inners, *(None,) * 4

    @staticmethod
    def differentiable_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """By the formula, to be differentiated again or for many cotangents at once."""
        *inputs, centre, _, _ = ctx.saved_tensors

        def formula(q: Tensor, z: Tensor, v: Tensor, core: Any, system: Tensor | None) -> Tensor:
            if ctx.of_segments:
                z = segment_means(q, z.shape[-2], xp)
            dtype = torch.float64 if is_on_cpu(z) else centre.dtype  # as softmax_free_attention has it
            z, c, core = z.to(dtype), centre.to(dtype), core.to(dtype)
            core = Factor(core) if ctx.factored else core
            near = None if system is None else nearby(z, c, ctx.scale, xp)
            if ctx.ridge is None:
                return plain(q, z, v, core, system, c, ctx.scale, xp, near=near)
            a = gaussian_gram((z - c) * ctx.scale, xp)
            return from_gram(q, z, v, a, core, near, c, ctx.scale, ctx.ridge, xp)

        return *gradients_of(formula, tuple(inputs), g, ctx.needs_input_grad[:5]), *(None,) * 4


def _way(q: Tensor, z: Tensor, v: Tensor) -> Any:
    if _fused_attention.applies(q, z, v):
        return _ByKernels
    return _native_attention if _native_attention.applies(q, z, v) else _attend


class _ByKernels:
    """``forward`` and ``backward`` of ``_attend`` by kernels that never store a block of C."""

    @staticmethod
    def forward(
        q: Tensor,
        z: Tensor,
        v: Tensor,
        core: Any,
        system: Tensor | None,
        centre: Tensor,
        scale: float,
        xp: Namespace,
        *,
        most: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, y = (q - centre) * scale, (z - centre) * scale
        sums, weights, _ = _solved(x, y, v.to(x.dtype), core, system, most, (q, z, v, centre, scale))
        return _fused_attention.product(x, y, weights).to(v.dtype), sums, weights

    @staticmethod
    def backward(
        q: Tensor,
        z: Tensor,
        v: Tensor,
        core: Any,
        system: Tensor | None,
        centre: Tensor,
        scale: float,
        sums: Tensor,
        weights: Tensor,
        g: Tensor,
        xp: Namespace,
        *,
        of_gram: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        x, y = (q - centre) * scale, (z - centre) * scale
        values, g = v.to(x.dtype), g.to(x.dtype)
        inverse, most = core.mT if system is None else core, _attend.most_amplified(of_gram=of_gram)
        w_bar, sigma_bar, amplified = _solved(x, y, g, inverse, system, most, (q, z, g, centre, scale))
        x_bar, y_bar, v_bar = _fused_attention.cotangents(x, y, values, g, weights, sigma_bar)
        q_bar, v_bar = (scale * x_bar).to(q.dtype), v_bar.to(v.dtype)
        wide_y = (z.to(torch.float64) - centre) * scale
        if amplified is not None:
            from_q, columns = _attend.exact_cotangents(q, z, g, v, weights, sigma_bar, centre, scale, xp)
            y_bar = torch.where(amplified, from_q - columns * wide_y, y_bar)
        if of_gram:
            y_bar = y_bar + _attend.gram_cotangent(wide_y, system, sigma_bar, weights, xp)
        inner = None if of_gram else _attend.inner_cotangent(system, w_bar, sigma_bar, sums, weights)
        return q_bar, (scale * y_bar).to(z.dtype), v_bar, inner


def _solved(
    x: Tensor, y: Tensor, v: Tensor, core: Any, system: Tensor | None, most: int, given: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As ``_attend.solved`` has them, by the kernels, of what q, z, v, centre and scale as ``given`` are made to."""

    def exact(_: Tensor) -> Tensor:
        q, z, v, centre, scale = given
        return _attend.exact_sums(q, z, v, centre, scale, xp)

    checked = most and _attend.is_checked(system, y, xp)
    half_y = 0.5 * y.square().sum(-1)[..., None, :]
    sums = _fused_attention.transposed_product(x, y, v)
    return _attend.solved(core, system, sums, half_y, exact if checked else None, most, xp)


def gaussian_product(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
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
    # Points so far out that rounding of their squares exceeds 1 could leave less than the bound, or nothing.
    return out[..., :e] / out[..., e : e + 1].clamp(min=0.5 / (1 + y.shape[-2]))


def _with_unit_row(t: Tensor, at: int, width: int) -> Tensor:
    """t with columns of zeros up to ``width`` and one more row, 1 in column ``at`` and 0 elsewhere."""
    row = (torch.arange(width, device=t.device) == at).to(t).expand(*t.shape[:-2], 1, width)
    return torch.cat([F.pad(t, (0, width - t.shape[-1])), row], -2)
