"""The rules of ``_gradients`` for torch, which wants classes, where its compiler can see them.

Each is an autograd.Function with forward, backward, jvp and vmap; the formulas are those of ``_differentials`` (Golub &
Pereyra, SIAM J. Numer. Anal. 10, 1973). They are apart from ``_gradients`` because they need torch at import, and
because the compiler is told at import which functions of ``_schedule`` it need not look into.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from lowrank._array import arithmetic
from lowrank._differentials import cotangent, differential, distance_cotangent, distance_differential
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
