"""The rules of ``_gradients`` for torch, which wants classes, where its compiler can see them.

Each is an autograd.Function with forward, backward, jvp and vmap; the formulas are those of ``_differentials`` (Golub &
Pereyra, SIAM J. Numer. Anal. 10, 1973). They are apart from ``_gradients`` because they need torch at import, and
because the compiler is told at import which functions of ``_schedule`` it need not look into.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from lowrank import _native_newton
from lowrank._array import arithmetic, gradients_of, is_traced
from lowrank._differentials import cotangent, differential, distance_cotangent, distance_differential
from lowrank._newton import textbook_steps
from lowrank._schedule import constants

# The compiler is not to trace how they were found.
for constant in constants:
    torch.compiler.assume_constant_result(constant)


class ReversePseudoinverse(torch.autograd.Function):
    """What torch's compiler can trace: it knows no rules for jvp and vmap."""

    @staticmethod
    def forward(
        p: Tensor, solve: Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]], full_rank: bool
    ) -> tuple[Tensor, ...]:
        x, figures = solve(p)
        return x, *figures

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        p, _, ctx.full_rank = inputs
        x, *figures = output
        ctx.mark_non_differentiable(*figures)
        ctx.save_for_backward(p, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        p, x = ctx.saved_tensors
        with arithmetic(p):
            return cotangent(p, x, g, ctx.full_rank, xp), None, None


class Pseudoinverse(ReversePseudoinverse):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ReversePseudoinverse.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], output[0])

    @staticmethod
    def jvp(ctx: Any, dp: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        p, x = ctx.saved_tensors
        with arithmetic(p):
            return differential(p, x, dp, ctx.full_rank, xp), *[None] * 5

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int, None, None],
        p: Tensor,
        solve: Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]],
        full_rank: bool,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        results = Pseudoinverse.apply(p.movedim(in_dims[0], 0), solve, full_rank)
        return results, (0,) * len(results)


class TextbookSteps(torch.autograd.Function):
    """``textbook_steps`` of X (b, n, m) and A (b, m, n), n ≤ m, of which only the X of each step is kept; or by the
    compiled kernels, for which none is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, steps: int) -> Tensor:
        ctx.steps = steps
        if _native_newton.applies(x, a, steps):
            ctx.save_for_backward(x, a, None)
            return _native_newton.steps(x, a, steps)
        kept, e = x.new_empty(steps + 1, *x.shape), x.new_empty(*x.shape[:-1], a.shape[-1])
        kept[0] = x
        for before, after in itertools.pairwise(kept):
            torch.baddbmm(before, torch.bmm(before, a, out=e), before, beta=2, alpha=-1, out=after)
        ctx.save_for_backward(x, a, kept)
        return kept[-1].clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, a, kept = ctx.saved_tensors
        with arithmetic(x):
            if torch.is_grad_enabled() or is_traced(g):
                steps = partial(textbook_steps, steps=ctx.steps, xp=xp)
                return *gradients_of(steps, (x, a), g, ctx.needs_input_grad[:2]), None
            if kept is None:
                return *_native_newton.cotangents(x, a, g, ctx.steps), None
            scale, a_bar = _power_of_two(g), torch.zeros_like(a)
            g = _flushed((g / scale).contiguous())
            new, e, h = torch.empty_like(g), *(x.new_empty(*x.shape[:-1], a.shape[-1]) for _ in range(2))
            for before in kept[:-1].flip(0).unbind():
                torch.bmm(before, a, out=e)
                torch.bmm(g, before.mH, out=h)
                a_bar.baddbmm_(before.mH, h, alpha=-1)
                torch.baddbmm(g, e.mH, g, beta=2, alpha=-1, out=new)
                g, new = _flushed(new.baddbmm_(h, a.mH, alpha=-1)), g
        return g * scale, a_bar * scale, None


def _power_of_two(g: Tensor) -> Tensor:
    """For each matrix one near its largest entry, by which products are exact; 1 where that is 0 or not finite."""
    largest = g.abs().amax((-2, -1), keepdim=True)
    power = torch.exp2(largest.log2().round())
    return torch.where(torch.isfinite(power) & (power > 0), power, 1.0)


def _flushed(g: Tensor) -> Tensor:
    """g, in its own memory, with 0 for what is smaller than 2⁻⁹⁰: on the way back through converged steps it falls with
    the square of the residual, and products of numbers below the normal ones take ten times as long."""
    parts = torch.view_as_real(g) if g.is_complex() else g
    torch.hardshrink(parts, 2.0**-90, out=parts)
    return g


class SquaredDistances(torch.autograd.Function):
    @staticmethod
    def forward(choose: Callable[..., Callable[..., Tensor]], x: Tensor, y: Tensor, s: Tensor, c: Tensor) -> Tensor:
        # The choice is made here, where under torch.func.vmap the values are at hand.
        return choose(x, y, s, c, xp)(x, y, s, c, xp)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
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
    def jvp(ctx: Any, _: Any, dx: Tensor, dy: Tensor, ds: Tensor, dc: Any) -> Tensor:
        x, y, s, c = ctx.saved_tensors
        with arithmetic(x):
            return distance_differential(x, y, s, c, dx, dy, ds, xp)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], choose: Callable[..., Callable[..., Tensor]], *arrays: Tensor
    ) -> tuple[Tensor, int]:
        # The function is batched as it stands: the mapped axis becomes the first of the leading axes, which
        # broadcast from the right, so that an array with fewer of them needs axes of length one after it.
        ranks = [a.ndim - (dim is not None) for a, dim in zip(arrays, in_dims[1:], strict=True)]
        moved = [
            a if dim is None else a.movedim(dim, 0).reshape(info.batch_size, *[1] * (max(ranks) - rank), *shape)
            for a, dim, rank in zip(arrays, in_dims[1:], ranks, strict=True)
            for shape in [[k for i, k in enumerate(a.shape) if i != dim]]
        ]
        return SquaredDistances.apply(choose, *moved), 0
