"""The MLP of a block, on a CPU without its hidden layer in memory.

The hidden layer is four times as wide as the tokens: to write it, its activation and their gradients to memory takes as
long as the products. In float32 the package's kernels have a block of it in the caches, forward and back. In bfloat16,
or without kernels, the products are oneDNN's; where nothing is to be differentiated bias and activation are in the
same pass.
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

from lowrank import _native_mlp
from lowrank._array import carries_derivative, gradients_of, is_traced, is_transformed, onednn_dtype, sum_in_place

# Numbers of the hidden layer that are taken at a time where nothing is to be differentiated, 24 MiB in float32. What
# blocks of 32 MiB hold, and with smaller ones whatever else is free, the system may take back after every call.
FUSED = 3 * 2**21


class Gelu(nn.GELU):
    """torch's GELU; the one with a tanh, on a CPU, by the package's kernels, in half of the time."""

    def forward(self, u: Tensor) -> Tensor:
        if self.approximate == "tanh" and _are_plain(u) and _native_mlp.activates(u):
            return _CompiledGelu.apply(u)
        return super().forward(u)


class TokenMlp(Mlp):
    """timm's Mlp of two linear layers and a GELU between them, by default the one with a tanh."""

    def __init__(self, dim: int, *, approximate: str = "tanh"):
        super().__init__(dim, 4 * dim, act_layer=partial(Gelu, approximate=approximate))

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
            if self._is_compiled(*arrays):
                if recorded:
                    return _Compiled.apply(*arrays, residual)
                return _native_mlp.forward(*arrays, residual=residual)
            if not recorded and (dtype := onednn_dtype(*arrays)):
                alike = residual and x.dtype == dtype
                out = _fused(*(y.to(dtype) for y in arrays), self.act.approximate, residual=alike)
                return sum_in_place(out, x) if residual and not alike else out
        out = super().forward(x)
        return x + out if residual else out

    def _is_compiled(self, *arrays: Tensor) -> bool:
        tanh = self.act.approximate == "tanh" and not torch.is_autocast_enabled("cpu")
        return tanh and _native_mlp.applies(*arrays)

    def _is_as_made(self) -> bool:
        """Whether no layer has given way to another, none drops anything, and nobody looks at what lies between."""
        linear = all(type(fc) is nn.Linear and fc.bias is not None for fc in (self.fc1, self.fc2))
        kept = all(type(drop) is nn.Dropout and not (drop.training and drop.p) for drop in (self.drop1, self.drop2))
        others = type(self.norm) is nn.Identity and type(self.act) is Gelu
        return linear and kept and others and not any(map(has_hooks, self.children()))


def _are_plain(*arrays: Tensor) -> bool:
    """Whether they are torch's own tensors on a CPU, whose values are there and followed backward at the most."""
    if torch.compiler.is_compiling() or is_traced(*arrays) or is_transformed(*arrays):
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


class _CompiledGelu(torch.autograd.Function):
    """GELU(u), the one with a tanh."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return _native_mlp.gelu(u)

    @staticmethod
    def backward(ctx, g):
        (u,) = ctx.saved_tensors
        if torch.is_grad_enabled() or is_traced(g):
            return torch.ops.aten.gelu_backward(g, u, approximate="tanh")
        return _native_mlp.gelu(u, g)


class _Compiled(torch.autograd.Function):
    """GELU(x W₁ᵀ + b₁) W₂ᵀ + b₂ (+ x if ``residual``) for x (..., C), W₁ (4C, C), b₁ (4C), W₂ (C, 4C), b₂ (C), of which
    nothing is kept."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, residual):
        ctx.residual = residual
        ctx.save_for_backward(x, w1, b1, w2, b2)
        return _native_mlp.forward(x, w1, b1, w2, b2, residual=residual)

    @staticmethod
    def backward(ctx, g):
        x, w1, b1, w2, b2 = ctx.saved_tensors
        if torch.is_grad_enabled() or is_traced(g):
            formula = partial(_formula, residual=ctx.residual)
            return *gradients_of(formula, (x, w1, b1, w2, b2), g, ctx.needs_input_grad[:5]), None
        return *_native_mlp.backward(x, w1, b1, w2, g, residual=ctx.residual), None


def _formula(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, residual: bool) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2) + (x if residual else 0)
