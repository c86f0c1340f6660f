"""The MLP of a block, on a CPU by rows of tokens, so that its hidden layer is stored once, or not at all.

The hidden layer is four times as wide as the tokens: to write it, its activation and their gradients to memory takes as
long as the products. By rows, all of it stays in the cache but for what enters the activation, which is kept for the
way back. The activation is computed from a sigmoid, (1 + tanh y)/2 = σ(2y), in a quarter to a half of the time of a
tanh, and without its cancellation where y is far below 0.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from lowrank._array import is_traced, is_transformed

# GELU(u) = u(1 + tanh(βu/2 + βγu³/2))/2 = uσ(βu + βγu³) (D. Hendrycks & K. Gimpel, arXiv 1606.08415, section 2).
_BETA, _GAMMA = 2 * math.sqrt(2 / math.pi), 0.044715
# Rows of tokens that are taken at a time.
ROWS = 1024


class TokenMlp(Mlp):
    """timm's Mlp of two linear layers and a tanh-GELU between them."""

    def __init__(self, dim: int):
        super().__init__(dim, 4 * dim, act_layer=partial(nn.GELU, approximate="tanh"))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not self._is_as_made() or any(map(has_hooks, self.children())):
            return super().forward(x)
        arrays = x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        return _ByRows.apply(*arrays, torch.is_grad_enabled()) if _are_plain(*arrays) else super().forward(x)

    def _is_as_made(self) -> bool:
        """Whether no layer has given way to another, and none drops anything."""
        linear = all(type(fc) is nn.Linear and fc.bias is not None for fc in (self.fc1, self.fc2))
        kept = all(type(drop) is nn.Dropout and not (drop.training and drop.p) for drop in (self.drop1, self.drop2))
        return linear and kept and type(self.norm) is nn.Identity and _is_tanh_gelu(self.act)


def _are_plain(x: Tensor, *parameters: Tensor) -> bool:
    """Whether x and the parameters are plain tensors on a CPU, of one dtype that is computed in."""
    if is_traced(x) or is_transformed(x, *parameters) or torch.is_autocast_enabled(x.device.type):
        return False
    alike = all(p.device.type == "cpu" and p.dtype == x.dtype for p in (x, *parameters))
    return alike and x.dtype in (torch.float32, torch.float64)


def _is_tanh_gelu(layer: nn.Module) -> bool:
    return type(layer) is nn.GELU and layer.approximate == "tanh"


def has_hooks(layer: nn.Module) -> bool:
    """Whether somebody wants to see what passes through a layer."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return any(map(len, hooks))


class _ByRows(torch.autograd.Function):
    """GELU(x W₁ᵀ + b₁) W₂ᵀ + b₂ for x (..., C), W₁ (4C, C), b₁ (4C), W₂ (C, 4C), b₂ (C).

    ``recorded``: whether operations are, which inside of ``forward`` cannot be seen.
    """

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, recorded):
        rows, out = x.flatten(0, -2), x.new_empty(x.shape)
        keeps = recorded and any(ctx.needs_input_grad)
        u = x.new_empty(len(rows) if keeps else min(ROWS, len(rows)), len(b1))
        h, beta = x.new_empty(ROWS, len(b1)), x.new_tensor(_BETA)
        for i, (x_, out_) in enumerate(zip(rows.split(ROWS), out.flatten(0, -2).split(ROWS), strict=True)):
            u_ = u[i * ROWS if keeps else 0 :][: len(x_)]
            torch.addmm(b1, x_, w1.T, out=u_)
            h_ = _sigmoid(u_, beta, out=h[: len(x_)]).mul_(u_)
            torch.addmm(b2, h_, w2.T, out=out_)
        ctx.save_for_backward(x, w1, b1, w2, b2, u if keeps else None)
        return out

    @staticmethod
    def backward(ctx, g):
        *inputs, u = ctx.saved_tensors
        if torch.is_grad_enabled() or is_traced(g):
            return _ByRows.differentiable_backward(ctx, g)
        x, w1, b1, w2, _ = inputs
        x_bar, g = x.new_empty(x.shape), g.contiguous()
        w1_bar, b1_bar, w2_bar = (torch.zeros_like(y) for y in (w1, b1, w2))
        blocks, beta = [x.new_empty(ROWS, len(b1)) for _ in range(3)], x.new_tensor(_BETA)
        for x_, u_, g_, x_bar_ in zip(*(y.flatten(0, -2).split(ROWS) for y in (x, u, g, x_bar)), strict=True):
            t, h, s = (y[: len(x_)] for y in blocks)
            torch.mul(u_, _sigmoid(u_, beta, out=t), out=h)
            w2_bar.addmm_(g_.T, h)
            # GELU′(u) = σ + uσ(1 − σ)β(1 + 3γu²).
            torch.addcmul(h, h, t, value=-1, out=h)
            torch.addcmul(beta, u_, u_, value=3 * _BETA * _GAMMA, out=s)
            torch.addcmul(t, h, s, out=t)
            torch.mm(g_, w2, out=h)
            u_bar = torch.mul(h, t, out=h)
            w1_bar.addmm_(u_bar.T, x_)
            b1_bar.add_(u_bar.sum(0))
            torch.mm(u_bar, w1, out=x_bar_)
        return x_bar, w1_bar, b1_bar, w2_bar, g.flatten(0, -2).sum(0), None

    @staticmethod
    def differentiable_backward(ctx, g):
        """By the formula, to be differentiated again or for many cotangents at once."""
        *inputs, _ = ctx.saved_tensors
        x, w1, b1, w2, b2 = inputs
        with torch.enable_grad():
            out = F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)
        wanted = [y for y, wants in zip(inputs, ctx.needs_input_grad, strict=False) if wants]
        found = iter(torch.autograd.grad(out, wanted, g, create_graph=torch.is_grad_enabled()))
        return tuple(next(found) if wants else None for wants in ctx.needs_input_grad)


def _sigmoid(u: Tensor, beta: Tensor, out: Tensor) -> Tensor:
    """σ(βu + βγu³)."""
    return torch.addcmul(beta, u, u, value=_BETA * _GAMMA, out=out).mul_(u).sigmoid_()
