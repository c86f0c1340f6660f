"""An MLP of two layers, GELU(x W₁ᵀ + b₁) W₂ᵀ + b₂ with the GELU of a tanh, and that alone, by compiled kernels.

The MLP's hidden layer is never stored: a block of it is made where it is used, and made again on the way back. To keep
it would save a seventh of the products, and take as long.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lowrank import _native

# Features come in panels of as many, as rows do in blocks.
PANEL, BLOCK = 32, 128
# Blocks of rows whose hidden layer the way back has at a time, where there are few threads.
BLOCKS = 4


class Task(ctypes.Structure):
    """``struct mlp``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "width", "hidden", "residual", "blocks", "first", "last")),
        *((name, ctypes.c_void_p) for name in ("x", "g", "w1", "b1", "w2", "b2", "out", "x_bar")),
        *((name, ctypes.c_void_p) for name in ("w1_bar", "b1_bar", "w2_bar")),
        *((name, ctypes.c_void_p) for name in ("w1_rows", "w1_columns", "w2_rows", "w2_columns")),
        *((name, ctypes.c_void_p) for name in ("h", "u_bar", "sums")),
    )


class Activation(ctypes.Structure):
    """``struct gelu``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "half")),
        *((name, ctypes.c_void_p) for name in ("u", "g", "out")),
    )


def activates(u: Tensor) -> bool:
    """Whether it is float32 or bfloat16."""
    return u.dtype in (torch.float32, torch.bfloat16) and _native.serve(u)


def gelu(u: Tensor, g: Tensor | None = None) -> Tensor:
    """GELU(u), or the cotangent of u for that of GELU(u), g."""
    out = u.new_empty(u.shape)
    arrays = {"u": _native.packed(u), "out": out} | ({} if g is None else {"g": _native.packed(g)})
    task = Activation(count=u.numel(), half=u.dtype == torch.bfloat16)
    _native.run("lowrank_gelu", task, g is not None, arrays)
    return out


def applies(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> bool:
    """Whether they are float32, of shapes that fit, some rows, and of widths that panels fill."""
    arrays = x, w1, b1, w2, b2
    hidden, width = w1.shape
    fit = x.shape[-1] == width and w2.shape == (width, hidden) and b1.shape == (hidden,) and b2.shape == (width,)
    known = fit and x.numel() > 0 and all(y.dtype == torch.float32 for y in arrays)
    return known and width % PANEL == hidden % PANEL == 0 and _native.serve(*arrays)


def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, residual: bool) -> Tensor:
    """The output, + x if ``residual``, for x (..., C), W₁ (F, C), b₁ (F), W₂ (C, F), b₂ (C)."""
    out = x.new_empty(x.shape)
    panels = {name: x.new_empty(w1.shape) for name in ("w1_rows", "w2_rows")}
    given = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    _run(given, panels | {"out": out}, back=False, residual=residual)
    return out


def backward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, g: Tensor, *, residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x̄, W̄₁, b̄₁, W̄₂ and b̄₂ for the cotangent g of the output."""
    blocks = max(BLOCKS, 2 * torch.get_num_threads())
    found = {"x_bar": x.new_empty(x.shape), "w1_bar": x.new_empty(w1.shape)}
    found |= {"b1_bar": x.new_empty(b1.shape), "w2_bar": x.new_empty(w2.shape)}
    kept = {name: x.new_empty(w1.shape) for name in ("w1_rows", "w1_columns", "w2_columns")}
    kept |= {name: x.new_empty(blocks * BLOCK, len(b1)) for name in ("h", "u_bar")}
    kept |= {"sums": x.new_empty(blocks, len(b1))}
    given = {"x": x, "g": g, "w1": w1, "b1": b1, "w2": w2}
    _run(given, found | kept, back=True, residual=residual, blocks=blocks)
    return *found.values(), g.flatten(0, -2).sum(0)


def _run(given: dict[str, Tensor], made: dict[str, Tensor], *, back: bool, residual: bool, blocks: int = 0) -> None:
    (hidden, width), rows = given["w1"].shape, given["x"].shape[:-1].numel()
    task = Task(rows=rows, width=width, hidden=hidden, residual=residual, blocks=blocks)
    arrays = {name: _native.packed(x) for name, x in given.items()} | made
    _native.run("lowrank_mlp", task, back, arrays)
