"""The MLP of a block, on a CPU by rows of tokens, so that its hidden layer is stored once, or in parts only.

The hidden layer is four times as wide as the tokens: to write it, its activation and their gradients to memory takes as
long as the products. By rows, all of it stays in the cache but for what enters the activation, which is kept for the
way back. The activation is computed from a sigmoid, (1 + tanh y)/2 = σ(2y), in a quarter to a half of the time of a
tanh, and without its cancellation where y is far below 0. Where nothing is to be differentiated oneDNN has bias and
activation in the product's own pass, also in bfloat16: 0.6 to 0.9 of the time of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from lowrank._array import carries_derivative, gradients_of, is_traced, is_transformed, onednn_dtype, sum_in_place

# GELU(u) = u(1 + tanh(βu/2 + βγu³/2))/2 = uσ(βu + βγu³) (D. Hendrycks & K. Gimpel, arXiv 1606.08415, section 2).
_BETA, _GAMMA = 2 * math.sqrt(2 / math.pi), 0.044715
# Rows of tokens that are taken at a time.
ROWS = 1024
# Numbers of the hidden layer that are taken at a time where nothing is to be differentiated, 24 MiB in float32. What
# blocks of 32 MiB hold, and with smaller ones whatever else is free, the system may take back after every call.
FUSED = 3 * 2**21


class TokenMlp(Mlp):
    """timm's Mlp of two linear layers and a GELU between them, by default the one with a tanh."""

    def __init__(self, dim: int, *, approximate: str = "tanh"):
        super().__init__(dim, 4 * dim, act_layer=partial(nn.GELU, approximate=approximate))

    def forward(self, x: Tensor) -> Tensor:
        return self._computed(x, residual=False)

    def plus_input(self, x: Tensor) -> Tensor:
        """x + self(x), without passing through memory once more, nor by hooks."""
        return self._computed(x, residual=True)

    def _computed(self, x: Tensor, *, residual: bool) -> Tensor:
        arrays = x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        as_made = not torch.compiler.is_compiling() and self._is_as_made()
        # Of tokens that do not fit torch's layers have the clearer message.
        if as_made and x.shape[-1:] == self.fc1.weight.shape[1:] and _are_plain(*arrays):
            recorded = any(map(carries_derivative, arrays))
            if not recorded and (dtype := onednn_dtype(*arrays)):
                alike = residual and x.dtype == dtype
                out = _fused(*(y.to(dtype) for y in arrays), self.act.approximate, residual=alike)
                return sum_in_place(out, x) if residual and not alike else out
            plain = x.dtype in (torch.float32, torch.float64) and all(y.dtype == x.dtype for y in arrays)
            if plain and self.act.approximate == "tanh" and not torch.is_autocast_enabled("cpu"):
                return _ByRows.apply(*arrays, torch.is_grad_enabled(), residual)
        out = super().forward(x)
        return x + out if residual else out

    def _is_as_made(self) -> bool:
        """Whether no layer has given way to another, none drops anything, and nobody looks at what lies between."""
        linear = all(type(fc) is nn.Linear and fc.bias is not None for fc in (self.fc1, self.fc2))
        kept = all(type(drop) is nn.Dropout and not (drop.training and drop.p) for drop in (self.drop1, self.drop2))
        others = type(self.norm) is nn.Identity and type(self.act) is nn.GELU
        return linear and kept and others and not any(map(has_hooks, self.children()))


def _are_plain(*arrays: Tensor) -> bool:
    """Whether they are torch's own tensors on a CPU, whose values are there and followed backward at the most."""
    if is_traced(*arrays) or is_transformed(*arrays):
        return False
    return all(type(y) in (Tensor, nn.Parameter) and y.device.type == "cpu" for y in arrays)


def _fused(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, approximate: str, *, residual: bool) -> Tensor:
    """GELU(x W₁ᵀ + b₁) W₂ᵀ + b₂ (+ x if ``residual``) by the operators that torch's compiler uses on a CPU."""
    linear, some = torch.ops.mkldnn._linear_pointwise, []
    for x_ in x.flatten(0, -2).split(max(1, FUSED // len(b1))):
        h = linear(x_, w1, b1, "gelu", [], approximate)
        some.append(linear.binary(h, x_, w2, b2, "add") if residual else linear(h, w2, b2, "none", [], ""))
    return (some[0] if len(some) == 1 else torch.cat(some)).reshape(x.shape)


def has_hooks(layer: nn.Module) -> bool:
    """Whether somebody wants to see what passes through a layer."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return any(map(len, hooks))


def _linear_flops(x: Sequence[int], *others: Sequence[int], **_: object) -> int:
    """Of oneDNN's linear layer, from the shapes: of x, what is added to it if anything, the weight and its bias."""
    weight = others[1] if len(others[1]) == 2 else others[0]
    return 2 * math.prod(x) * weight[0]


# For whoever counts with torch's FlopCounterMode.
if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_linear_flops)


class _ByRows(torch.autograd.Function):
    """GELU(x W₁ᵀ + b₁) W₂ᵀ + b₂ (+ x if ``residual``) for x (..., C), W₁ (4C, C), b₁ (4C), W₂ (C, 4C), b₂ (C).

    ``recorded``: whether operations are, which inside of ``forward`` cannot be seen.
    """

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, recorded, residual):
        rows, out = x.flatten(0, -2), x.new_empty(x.shape)
        keeps = recorded and any(ctx.needs_input_grad)
        u = x.new_empty(len(rows) if keeps else min(ROWS, len(rows)), len(b1))
        h, beta = x.new_empty(ROWS, len(b1)), x.new_tensor(_BETA)
        for i, (x_, out_) in enumerate(zip(rows.split(ROWS), out.flatten(0, -2).split(ROWS), strict=True)):
            u_ = u[i * ROWS if keeps else 0 :][: len(x_)]
            torch.mm(x_, w1.T, out=u_).add_(b1)  # in the cache, where addmm writes b1 to memory first
            h_ = _sigmoid(u_, beta, out=h[: len(x_)]).mul_(u_)
            torch.add(x_, b2, out=out_) if residual else out_.copy_(b2)
            out_.addmm_(h_, w2.T)
        ctx.residual = residual
        ctx.save_for_backward(x, w1, b1, w2, b2, u if keeps else None)
        return out

    @staticmethod
    def backward(ctx, g):
        *inputs, u = ctx.saved_tensors
        if torch.is_grad_enabled() or is_traced(g):
            formula = partial(_formula, residual=ctx.residual)
            return *gradients_of(formula, tuple(inputs), g, ctx.needs_input_grad[:5]), None, None
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
            torch.addmm(g_, u_bar, w1, beta=int(ctx.residual), out=x_bar_)
        return x_bar, w1_bar, b1_bar, w2_bar, g.flatten(0, -2).sum(0), None, None


def _formula(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, residual: bool) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2) + (x if residual else 0)


def _sigmoid(u: Tensor, beta: Tensor, out: Tensor) -> Tensor:
    """σ(βu + βγu³)."""
    return torch.addcmul(beta, u, u, value=_BETA * _GAMMA, out=out).mul_(u).sigmoid_()
